"""``gram`` on every backend: values, gradients, dtypes, masks, strides, bad input, against ``reference`` in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fsd_kernels import GramBasis, frozen_gram, gram, inter_structure
from fsd_kernels.gram import eager, plan
from fsd_kernels.gram import triton as kernels
from tests.interpreted import (
    DEVICE,
    GPU,
    QUICK,
    TENSOR_CORES,
    TF32,
    assert_close,
    backpropagate,
    error_of,
    framed,
    kept_mask,
    normal,
    on_gpu,
    on_triton,
    outliers,
    plain_gram,
    poison,
    transposed,
    truth_of,
)
from tests.kernel_cases import (
    INTER_SHAPES,
    MASKS,
    Function,
    assert_same,
    bert_features,
    centroids,
    make_generator,
    make_mask,
    ragged_mask,
    relative_error,
    value_and_gradient,
)

# --- eager -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", INTER_SHAPES)
def test_gram_in_float64(shape: str, kind: str) -> None:
    batch, rows, width, _, count, extra = INTER_SHAPES[shape]
    features, mask = bert_features(batch, rows, width), make_mask(kind, batch, rows)
    if not count:
        assert_same(lambda backend: lambda x: gram(x, mask=mask, backend=backend), [features], 1e-9)
        return
    memory = centroids(count, rows + extra, width)
    assert_same(lambda backend: lambda x, m: gram(x, m, mask, backend=backend), [features, memory], 1e-9)
    with_frozen = gram(features, frozen_gram(memory), mask)
    torch.testing.assert_close(
        with_frozen, gram(features, memory, mask, backend="reference"), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.5, 40.0])
def test_gram_of_features_with_an_offset(offset: float, masked: bool) -> None:
    features = torch.randn(7, 12, 6, generator=make_generator(0)).double() + offset
    mask = ragged_mask(7, 12, lengths=[12, 5, 9, 1, 12, 3, 2]) if masked else None
    assert_same(lambda backend: lambda x: gram(x, mask=mask, backend=backend), [features], 1e-9)
    narrow, teacher = features.float(), torch.randn(7, 12, 6, generator=make_generator(1))
    _, (truth,) = value_and_gradient(
        lambda x: inter_structure(x, teacher.double(), mask=mask).local, [narrow.double()]
    )
    _, (gradient,) = value_and_gradient(lambda x: inter_structure(x, teacher, mask=mask).local, [narrow])
    assert relative_error(gradient, truth) < 1e-5


def test_an_offset_that_only_later_slices_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_COLUMNS", 16)
    features = torch.randn(7, 48, generator=make_generator(0))
    features[:, 32:] += 1000.0
    truth = gram(features.double(), backend="reference")
    samples = slice(0, 7)
    assert relative_error(gram(features)[samples, samples], truth[samples, samples]) < 1e-4


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_a_frozen_gram_is_the_block_of_any_batch(offset: float) -> None:
    """Whether the memory is centred before it is multiplied, or in Gamma."""
    memory = torch.randn(6, 30, generator=make_generator(0)) + offset
    assert eager._looks_centred(memory) == (offset == 0.0)
    for batch in (1, 5):
        features = torch.randn(batch, 30, generator=make_generator(batch))
        whole = gram(features, memory)
        assert torch.equal(frozen_gram(memory).gram, whole[:7, :7])
        assert torch.equal(gram(features, frozen_gram(memory)), whole)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.5, 40.0])
def test_gram_beside_a_memory_with_an_offset(offset: float, masked: bool) -> None:
    """Against the formula in float64, at the features' end within a slice too."""
    memory = torch.randn(9, 80, generator=make_generator(2)).double() + offset
    features = torch.randn(7, 12, 6, generator=make_generator(0)).double() + 3.0
    mask = ragged_mask(7, 12, lengths=[12, 5, 9, 1, 12, 3, 2]) if masked else None
    assert_same(lambda backend: lambda x, m: gram(x, m, mask, backend=backend), [features, memory], 1e-9)
    truth = gram(features, memory, mask, backend="reference")
    assert relative_error(gram(features.float(), memory.float(), mask), truth) < 1e-6


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("with_memory", [False, True])
def test_gram_of_many_rows_in_strips(with_memory: bool, offset: float) -> None:
    assert len(list(eager.strips(70))) == 2
    features = torch.randn(70, 40, generator=make_generator(0)).double() + offset
    memory = torch.randn(140, 40, generator=make_generator(1)).double() + offset if with_memory else None
    truth = gram(features, memory, backend="reference")
    assert relative_error(gram(features, memory), truth) < 1e-12


def test_a_memory_whose_offset_lies_between_the_samples() -> None:
    memory = torch.randn(6, 8192, generator=make_generator(0))
    memory[:, 512:700] += 100.0
    assert eager._looks_centred(memory)
    assert eager._forward_uncentred_memory(memory[:0], memory, None, None) is None
    truth = gram(memory[:2].double(), memory.double(), backend="reference")
    with_frozen = gram(memory[:2], frozen_gram(memory))
    assert torch.equal(with_frozen, gram(memory[:2], memory))
    assert relative_error(with_frozen[:6, :6], truth[:6, :6]) < 1e-6


@pytest.mark.parametrize("kind", ["none", "ragged"])
@pytest.mark.parametrize(("count", "extra"), [(0, 0), (3, 0), (2, 2)])
def test_gradcheck_gram(count: int, extra: int, kind: str) -> None:
    mask = make_mask(kind, 3, 4)
    features = bert_features(3, 4, 2).requires_grad_()
    if count == 0:
        assert torch.autograd.gradcheck(lambda x: gram(x, mask=mask), [features])
        return
    memory = centroids(count, 4 + extra, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, m: gram(x, m, mask), [features, memory])


# --- the Triton kernels ----------------------------------------------------------------------------------------------


def tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``gram`` take small inputs as it takes those with many rows, in tiles of 16."""
    monkeypatch.setattr(plan, "_tiles", lambda rows: (16, 16, 0))
    original = plan.backward_config

    def small(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)._replace(block=16, inner=16)

    monkeypatch.setattr(plan, "backward_config", small)


@pytest.fixture(params=["fused", "tiled"])
def path(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, multiprocessors: Callable[[int], None]
) -> Iterator[str]:
    """Run a test with one program per part of F, and with one per tile of Gamma."""
    multiprocessors(3)
    plans = plan.forward_plan, plan.backward_plan
    if request.param == "tiled":
        tile_by_tile(monkeypatch)
        for each in plans:
            each.cache_clear()
    yield str(request.param)
    for each in plans:
        each.cache_clear()


GRAM_CASES: list[tuple[tuple[int, ...], str | None]] = [
    # B, K, S, D, columns of the memory beyond the features; mask
    ((4, 3, 4, 16, 0), "ragged"),
    ((5, 1, 3, 7, 6), "ragged"),
    ((5, 1, 3, 7, 6), None),
    ((20, 30, 2, 32, 0), "ragged"),
    ((17, 0, 3, 32, 0), None),
    ((17, 0, 3, 20, 0), "ragged"),
    ((1, 0, 2, 9, 0), None),
    ((3, 15, 1, 1, 0), "ragged"),
    ((33, 16, 2, 5, 1), None),
    ((0, 4, 2, 8, 0), "ragged"),
]


def check_gram(
    features: Tensor, memory: Tensor | None, mask: Tensor | None, tolerance: float, frozen: bool = False
) -> None:
    features = features.detach().requires_grad_()
    truth = features.detach().double().requires_grad_()
    given_memory: Any = memory
    right = memory.double() if memory is not None else None
    if memory is not None and not frozen:
        memory = given_memory = memory.detach().requires_grad_()
        right = memory.detach().double().requires_grad_()
    elif memory is not None:
        given_memory = frozen_gram(memory.float(), backend="eager")._replace(memory=memory)
    ours = gram(features, given_memory, mask, backend="triton")
    expected = gram(truth, right, mask, backend="reference")
    assert_close(ours, expected, tolerance if GPU and tolerance > 1e-5 else 1e-6)
    assert torch.equal(ours, ours.T)
    weights = normal(*ours.shape, seed=5)
    (ours * weights).sum().backward()
    backpropagate((expected * weights).sum())
    assert features.grad is not None
    assert features.grad.dtype == features.dtype
    right_grad = torch.zeros_like(truth) if truth.grad is None else truth.grad.nan_to_num(0.0)
    assert_close(features.grad, right_grad, tolerance)
    if memory is not None and right is not None and right.requires_grad:
        assert memory.grad is not None
        assert memory.grad.dtype == memory.dtype
        assert_close(memory.grad, right.grad, tolerance)  # type: ignore[arg-type]


@on_triton
@pytest.mark.parametrize(("shape", "kind"), GRAM_CASES, ids=str)
def test_kernels_match_the_formula(shape: tuple[int, ...], kind: str | None, path: str) -> None:
    batch, num_centroid, rows, width, extra = shape
    mask = kept_mask(kind, batch, rows)
    features = framed(poison(normal(batch, rows, width, seed=1), mask))
    memory = framed(normal(num_centroid, rows * width + extra, seed=2)) if num_centroid else None
    check_gram(features, memory, mask, 1e-5)


MANY_ROWS = [
    (30, 100, 2, 16, 20),
    (20, 50, 1, 9, 0),
    (2, 200, 1, 9, 5),
    (32, 300, 1, 33, 4),
    (2, 400, 1, 9, 5),
]


@on_triton
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", MANY_ROWS, ids=str)
def test_kernels_of_many_rows(shape: tuple[int, ...], frozen: bool, tf32: None) -> None:
    batch, num_centroid, rows, width, extra = shape
    features = normal(batch, rows, width, seed=1)
    memory = normal(num_centroid, rows * width + extra, seed=2)
    check_gram(features, memory, None, on_gpu(TF32, 1e-5), frozen=frozen)


@on_triton
@pytest.mark.parametrize("shape", [(4, 3, 2, 8, 0), (20, 31, 2, 8, 3)], ids=str)
def test_kernels_copy_a_frozen_block(shape: tuple[int, ...], path: str) -> None:
    batch, num_centroid, rows, width, extra = shape
    memory = normal(num_centroid, rows * width + extra, seed=2)
    features = normal(batch, rows, width, seed=1)
    check_gram(features, memory, None, 1e-5, frozen=True)
    marked = frozen_gram(memory, backend="eager")
    marked.gram.fill_(7.0)
    gamma = gram(features, marked, backend="triton")
    assert (gamma[: num_centroid + 1, : num_centroid + 1] == 7).all()
    assert (gamma == 7).sum() == (num_centroid + 1) ** 2


@on_triton
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
def test_kernels_in_16_bits(types: tuple[torch.dtype, torch.dtype], path: str) -> None:
    features, memory = normal(5, 2, 32, seed=1).to(types[0]), normal(16, 70, seed=2).to(types[1])
    check_gram(features, memory, None, 1e-2)


@on_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_in_16_bits_of_many_rows(dtype: torch.dtype) -> None:
    """Programs then hold a tile of Gamma, or of the gradient, each."""
    features, memory = normal(32, 1, 33, seed=1).to(dtype), normal(300, 37, seed=2).to(dtype)
    check_gram(features, memory, None, 1e-2)


@on_triton
def test_kernels_read_any_strides(path: str) -> None:
    mask = kept_mask("ragged", 2, 5)
    assert mask is not None
    features = normal(32, 5, 2, seed=1).permute(1, 2, 0)
    memory = transposed(normal(16, 64, seed=2))
    check_gram(features, memory, mask.T, 1e-5)
    check_gram(normal(5, 128, seed=1)[:, ::2], memory, None, 1e-5)
    # Slices of F that straddle tokens read the mask column by column.
    check_gram(normal(20, 5, 2, seed=1).permute(1, 2, 0), None, mask.T, 1e-5)


@on_triton
def test_kernels_give_the_gradient_of_one_input_alone(path: str) -> None:
    features, memory = normal(5, 20, seed=1), normal(16, 20, seed=2)
    weights = normal(23, 23, seed=3)
    both = [x.clone().requires_grad_() for x in (features, memory)]
    (gram(*both, backend="triton") * weights).sum().backward()
    for i in range(2):
        inputs = [x.clone().requires_grad_(i == j) for j, x in enumerate((features, memory))]
        (gram(*inputs, backend="triton") * weights).sum().backward()
        assert inputs[1 - i].grad is None
        assert torch.equal(inputs[i].grad, both[i].grad)  # type: ignore[arg-type]


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_two_sides_at_once_are_what_each_is_alone(dtype: torch.dtype, path: str) -> None:
    """With other widths, so that the sides have other numbers of parts, and the block of the second memory given."""
    student, teacher = normal(4, 700, seed=1).to(dtype), normal(4, 1500, seed=2).to(dtype)
    own, given = normal(20, 700, seed=3).to(dtype), normal(20, 1500, seed=4).to(dtype)
    block = frozen_gram(given, backend="triton").gram
    sides = [(student, own, None), (teacher, given, block)]
    for both, side in zip(kernels.forward(sides, None), sides, strict=True):
        (alone,) = kernels.forward([side], None)
        # Parts are fewer where two sides share the programs.
        assert relative_error(both, alone) < 1e-6
        assert relative_error(both, gram(*(x.double() for x in side[:2]), backend="reference")) < 1e-5


@on_triton
def test_kernels_derivatives_of_several_losses_are_added_with_their_weights(path: str) -> None:
    features, memory = normal(4, 40, seed=1), normal(6, 40, seed=2)
    derivatives, weights = normal(3, 12, 12, seed=3), torch.tensor([0.5, -2.0, 3.0], device=DEVICE)
    found = kernels.backward(features, memory, None, derivatives, weights, (True, True))
    total = torch.tensordot(weights, derivatives, dims=1)
    expected = kernels.backward(features, memory, None, total[None], None, (True, True))
    for gradient, wanted in zip(found, expected, strict=True):
        assert relative_error(gradient, wanted) < 1e-6


@on_triton
def test_kernels_gradients_in_16_bits_are_the_truth_rounded(path: str) -> None:
    """One term of A would move a third of the entries to a neighbour. float16: the interpreter truncates bfloat16."""
    features, memory = normal(4, 200, seed=1).half(), normal(6, 200, seed=2).half()
    derivatives = normal(12, 12, seed=3)
    found = kernels.backward(features, memory, None, derivatives[None], None, (True, True))
    inputs = [x.double().requires_grad_() for x in (features, memory)]
    gamma = gram(*inputs, backend="reference")
    truth = torch.autograd.grad((gamma * derivatives).sum(), inputs)
    for gradient, wanted in zip(found, truth, strict=True):
        assert (gradient == wanted.half()).double().mean() > 0.97


@on_triton
def test_kernels_rows_that_nothing_depends_on_get_a_gradient_of_zero(path: str) -> None:
    features, memory = (normal(rows, 40, seed=rows).requires_grad_() for rows in (4, 6))
    weights = normal(4, 4, seed=3)
    gradients = []
    for backend in ("triton", "reference"):
        samples = gram(features, memory, backend=backend)[7:11, 7:11]
        gradients.append(torch.autograd.grad((samples * weights).sum(), (features, memory)))
    assert torch.equal(gradients[0][1], torch.zeros_like(memory))
    assert relative_error(gradients[0][0], gradients[1][0]) < 1e-5


@on_triton
def test_kernels_launched(launches: list[str]) -> None:
    features = normal(4, 40, seed=1).requires_grad_()
    gram(features, normal(6, 40, seed=2), backend="triton").sum().backward()
    assert launches == [
        "_gram_fwd_kernel", "_gram_sum_kernel", "_gram_centre_kernel",
        "_gram_symmetric_kernel", "_gram_rows_kernel", "_gram_bwd_kernel",
    ]  # fmt: skip


@on_triton
def test_kernels_of_nothing() -> None:
    assert gram(torch.zeros(3, 0, device=DEVICE), backend="triton").tolist() == [[0.0] * 4] * 4
    assert gram(torch.zeros(0, 5, device=DEVICE), backend="triton").tolist() == [[0.0]]


@on_triton
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize(("bits", "dtype"), TENSOR_CORES, ids=["tf32", "bf16"])
def test_rounding_stays_below_plain_torch(
    seed: int, memory: bool, bits: int, dtype: torch.dtype, rounded_dots: Callable[[int], None]
) -> None:
    """The centred blocks of Gamma and their gradients, as above: the features' and the memory's."""
    features, centroids = outliers(8, 200, seed=seed).to(dtype), outliers(5, 200, seed=5 + seed).to(dtype)

    def block(z: Tensor, backend: str) -> Tensor:
        other = features.to(z.dtype) if memory else centroids.to(z.dtype)
        if memory:
            return gram(other, z, backend=backend)[:5, :5]
        return gram(z, other, backend=backend)[6:14, 6:14]

    x = centroids if memory else features
    truth = truth_of(lambda z: block(z, "reference"), x)
    plain = error_of(lambda z: plain_gram(z, bits), x, truth)
    rounded_dots(bits)
    ours = error_of(lambda z: block(z, "triton"), x, truth)
    assert ours[0] <= 2 * plain[0]
    assert ours[1] <= 2 * plain[1]
    assert max(ours) <= 2.0 ** (2 - bits)


@on_triton
@QUICK
@given(
    batch=st.integers(0, 20), centroids=st.integers(0, 20), width=st.integers(1, 70), seed=st.integers(0, 99)
)
def test_gamma_has_the_form_it_promises(batch: int, centroids: int, width: int, seed: int) -> None:
    memory = normal(centroids, width, seed=seed) if centroids else None
    gamma = gram(normal(batch, width, seed=seed + 1), memory, backend="triton")
    head = centroids + 1 if centroids else 0
    tolerance = 1e-5 * max(1.0, float(gamma.abs().max()))
    assert (gamma.diagonal() >= 0).all()
    # Centred rows sum to zero, so their products with anything do.
    assert float(gamma[:, head : head + batch].sum(1).abs().max()) <= tolerance * (batch + 1)
    assert float(gamma[:, :centroids].sum(1).abs().max()) <= tolerance * (centroids + 1)


# --- bad input -------------------------------------------------------------------------------------------------------


X = bert_features(3, 4, 5, dtype=torch.float32)
MEMORY = centroids(2, 4, 5, dtype=torch.float32)

ERRORS: list[tuple[Function, type[Exception], str]] = [
    (
        lambda b: gram(X[0, 0], backend=b),
        ValueError,
        r"features: expected \[B, S, D\] or \[B, F\], got shape \[5\]",
    ),
    (lambda b: gram(X.bool(), backend=b), TypeError, r"features: expected one of .*got torch.bool"),
    (lambda b: gram([1.0], backend=b), TypeError, r"features: expected a tensor"),
    (lambda b: gram(X, X, backend=b), ValueError, r"memory: expected \[K, F\], got shape \[3, 4, 5\]"),
    (lambda b: gram(X, [1.0], backend=b), TypeError, r"memory: expected a tensor \[K, F\], got list"),
    (
        lambda b: gram(X, MEMORY[:, :-1], backend=b),
        ValueError,
        r"memory: expected \[K, F\] with K >= 1 and F >= 20 .*got \[2, 19\]",
    ),
    (lambda b: gram(X, MEMORY[:0], backend=b), ValueError, r"memory: expected .*K >= 1 .*got \[0, 20\]"),
    (
        lambda b: gram(X, GramBasis(MEMORY, torch.eye(2)), backend=b),
        ValueError,
        r"memory.gram: expected \[K \+ 1, K \+ 1\], got \[2, 2\]",
    ),
    (
        lambda b: gram(X, MEMORY, torch.ones(4, 3), backend=b),
        ValueError,
        r"mask: expected \[B, S\] = \[3, 4\]",
    ),
    (
        lambda b: gram(X.flatten(1), mask=torch.ones(3, 4, dtype=torch.int64), backend=b),
        ValueError,
        r"mask: needs features \[B, S, D\]",
    ),
    (lambda b: frozen_gram(X, backend=b), ValueError, r"memory: expected \[K, F\], got shape \[3, 4, 5\]"),
    (lambda b: frozen_gram(MEMORY[:0], backend=b), ValueError, r"memory: expected \[K, F\] with K >= 1"),
]


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors_name_the_argument_and_the_shapes(case: int, backend: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        call(backend)
