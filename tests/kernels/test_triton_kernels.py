"""The Triton kernels, run in Triton's interpreter, and on a GPU where there is one, against the formulas in float64.

The interpreter has to be chosen before triton is first imported, and changes what "cannot run on the CPU"
means. So where TRITON_INTERPRET is not set, this file holds one test, which runs all others in a process of
their own; on a GPU it holds the others too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fsd_kernels import frozen_gram, gram, inter_structure, intra_cka, structure
from tests.interpreted import (
    DEVICE,
    GPU,
    INTERPRETED,
    RUNS_KERNELS,
    framed,
    on_gpu,
    poison_outputs,
    record_launches,
    round_dots,
    round_like,
    run_in_interpreter,
)

if RUNS_KERNELS:
    from fsd_kernels import _triton as shared
    from fsd_kernels.gram import triton as gram_kernels
    from fsd_kernels.intra_cka import triton as intra_kernels

    MODULES = (gram_kernels, intra_kernels)

    @triton.jit
    def round_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        index = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index, mask=index < size)
        tl.store(y_ptr + index, shared.round_to_tf32(x), mask=index < size)


QUICK = settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_outputs(monkeypatch)


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the number of multiprocessors that the heuristics see: few make them fuse, many make them split."""

    def choose(count: int) -> None:
        target = shared.target_of(DEVICE)._replace(multiprocessors=count)
        for module in MODULES:
            monkeypatch.setattr(module, "target_of", lambda device: target)

    if RUNS_KERNELS:
        choose(2)
    return choose


def tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``gram`` take small inputs as it takes those with many rows, in tiles of 16."""
    monkeypatch.setattr(gram_kernels, "_tiles", lambda total: (16, 16, 0))
    original = gram_kernels.backward_config

    def small(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)._replace(block=16, inner=16)

    monkeypatch.setattr(gram_kernels, "backward_config", small)


@pytest.fixture(params=["fused", "split", "tiled"])
def path(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, multiprocessors: Callable[[int], None]
) -> str:
    """Run a test on each way through the kernels; small tiles take small inputs through those for large ones."""
    name = str(request.param)
    if name != "fused":
        multiprocessors(132 if name == "split" else 3)
    if name == "tiled":
        monkeypatch.setattr(intra_kernels, "_WHOLE", 16)
        tile_by_tile(monkeypatch)
    return name


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched."""
    return record_launches(monkeypatch)


def backpropagate(total: Tensor) -> None:
    """Backward, unless nothing the total was made of needs it (the formula of a sample without structure)."""
    if total.requires_grad:
        total.backward()


def normal(*shape: int, seed: int, offset: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator) + offset * torch.randn(shape[-1], generator=generator)
    return values.to(DEVICE)


def transposed(x: Tensor) -> Tensor:
    """The same values with the last two axes swapped in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def make_mask(kind: str | None, batch: int, rows: int) -> Tensor | None:
    if kind is None:
        return None
    mask = torch.zeros(batch, rows, dtype=torch.bool, device=DEVICE)
    for i in range(batch):
        kept = {"ragged": rows - (5 * i) % rows, "one": 1, "none": 0 if i == 0 else rows}[kind]
        mask[i, :kept] = True
    if kind == "ragged" and rows > 3:
        mask[0, 2] = False
    return mask


def poison(x: Tensor, mask: Tensor | None) -> Tensor:
    """NaN wherever the mask drops."""
    return x if mask is None else x.masked_fill(~mask[:, :, None], float("nan"))


def assert_close(ours: Tensor, truth: Tensor, tolerance: float) -> None:
    """|ours - truth| <= tolerance |truth| in Euclidean norm, and everything finite."""
    assert ours.isfinite().all()
    ours, truth = ours.detach().double(), truth.detach().double()
    assert float((ours - truth).norm()) <= tolerance * float(truth.norm()) + 1e-7


TF32 = 4e-3
"""What products of operands of 10 bits may be off by."""

# -- intra_cka ----------------------------------------------------------------------------------------------------

INTRA_CASES: list[tuple[tuple[int, ...], str | None]] = [
    # layer pairs, B, S, D_s, D_t; mask
    ((1, 2, 16, 32, 64), None),
    ((2, 2, 13, 20, 37), "ragged"),
    ((1, 2, 1, 8, 8), None),
    ((1, 1, 2, 16, 3), "ragged"),
    ((2, 1, 33, 24, 24), "ragged"),
    ((1, 1, 48, 40, 16), None),
]


def check_intra(
    students: list[Tensor], teachers: list[Tensor], mask: Tensor | None, tolerance: float
) -> None:
    """Values and gradients of 1 - CKA and -log CKA against autograd through the formula, upstream not 1."""
    weights = normal(2, len(students), students[0].shape[0], seed=9)
    students = [x.detach().requires_grad_() for x in students]
    truth = [x.detach().double().requires_grad_() for x in students]
    ours = intra_cka(students, teachers, mask, backend="triton")
    right = intra_cka(truth, [x.double() for x in teachers], mask, backend="reference")
    for value, expected in zip(ours, right, strict=True):
        assert_close(value, expected, on_gpu(tolerance, 1e-5))
    (ours.distance * weights[0] + ours.neg_log * weights[1]).sum().backward()
    backpropagate((right.distance * weights[0] + right.neg_log * weights[1]).sum())
    for x, expected in zip(students, truth, strict=True):
        assert x.grad is not None
        assert x.grad.dtype == x.dtype
        kept = expected.grad if expected.grad is not None else torch.zeros_like(expected)
        assert_close(x.grad, kept.nan_to_num(0.0), tolerance)


@pytest.mark.parametrize(("shape", "kind"), INTRA_CASES, ids=str)
def test_intra_cka_matches_the_formula(shape: tuple[int, ...], kind: str | None, path: str) -> None:
    pairs, batch, rows, width_s, width_t = shape
    mask = make_mask(kind, batch, rows)
    students = [framed(poison(normal(batch, rows, width_s + i, seed=i), mask)) for i in range(pairs)]
    teachers = [framed(poison(normal(batch, rows, width_t, seed=50 + i), mask)) for i in range(pairs)]
    check_intra(students, teachers, mask, 1e-5)


@pytest.mark.parametrize("rows", [128, 129, 260])
def test_intra_cka_of_long_inputs(rows: int, tf32: None) -> None:
    mask = make_mask("ragged", 1, rows)
    check_intra([normal(1, rows, 16, seed=1)], [normal(1, rows, 20, seed=2)], mask, on_gpu(TF32, 1e-5))


@pytest.mark.parametrize("kind", ["one", "none"])
def test_intra_cka_of_too_few_rows_is_zero(kind: str, path: str) -> None:
    mask = make_mask(kind, 3, 18)
    x = poison(normal(3, 18, 20, seed=1), mask)
    check_intra([x], [poison(normal(3, 18, 16, seed=2), mask)], mask, 1e-5)
    assert intra_cka(x, x, mask, backend="triton").distance[0, 0] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_intra_cka_in_16_bits(dtype: torch.dtype, path: str) -> None:
    students, teachers = normal(2, 20, 24, seed=1).to(dtype), normal(2, 20, 32, seed=2).to(dtype)
    # The gradient is rounded to its dtype (truncated in the interpreter).
    check_intra([students], [teachers], None, 1e-2 if dtype == torch.bfloat16 else 2e-3)
    check_intra([students], [teachers.float()], None, 1e-2 if dtype == torch.bfloat16 else 2e-3)


def test_intra_cka_reads_any_strides(path: str) -> None:
    students = [transposed(normal(2, 20, 24, seed=1)), normal(20, 2, 16, seed=2).transpose(0, 1)]
    teachers = [normal(2, 20, 48, seed=3)[:, :, ::2], transposed(normal(2, 20, 20, seed=4))]
    mask = make_mask("ragged", 20, 2)
    assert mask is not None
    check_intra(students, teachers, mask.T, 1e-5)


def test_intra_cka_of_aligned_rows(path: str) -> None:
    students, teachers = [normal(2, 24, 96, seed=1)], [normal(2, 24, 64, seed=2)]
    assert intra_kernels._aligned(students)
    assert not intra_kernels._aligned([students[0][:, :, :90]])
    check_intra(students, teachers, None, 1e-5)


def test_intra_cka_of_equal_features_is_zero(path: str) -> None:
    x = normal(2, 18, 32, seed=3).requires_grad_()
    result = intra_cka(x, x.detach().clone(), backend="triton")
    (result.distance + result.neg_log).sum().backward()
    assert x.grad is not None
    assert result.distance.abs().max() <= 1e-12
    assert result.neg_log.abs().max() <= 1e-12
    assert x.grad.abs().max() <= 1e-8


def test_intra_cka_of_constant_rows_is_zero(path: str) -> None:
    for offset in (1.0, 1e4):
        x = (offset * normal(2, 1, 24, seed=3)).expand(2, 18, 24).contiguous().requires_grad_()
        other = normal(2, 18, 24, seed=4)
        for student, teacher in ((x, other), (other.clone().requires_grad_(), x)):
            result = intra_cka(student, teacher, backend="triton")
            (result.distance + result.neg_log).sum().backward()
            assert result.distance.tolist() == result.neg_log.tolist() == [[0.0, 0.0]]
            assert student.grad is not None
            assert not student.grad.any()


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_intra_cka_keeps_small_and_large_features(scale: float, path: str) -> None:
    x, y = normal(1, 18, 16, seed=1).double() * scale, normal(1, 18, 16, seed=2).double() * scale
    ours = intra_cka(x.float(), y.float(), backend="triton").distance
    assert_close(ours, intra_cka(x, y, backend="reference").distance, 1e-5)


def test_intra_cka_of_unrelated_structures() -> None:
    """Far from CKA = 1 the logarithm is taken of CKA, not of 1 - CKA; at CKA = 0 it stops at its floor."""
    x, y = torch.zeros(2, 2, 4, 2, device=DEVICE)
    x[:, :, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    y[:, :, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    y[1, :, 1] = 0.3 * x[1, :, 0]
    x = x.requires_grad_()
    ours, right = (intra_cka(x, y, backend=name) for name in ("triton", "reference"))
    assert_close(ours.neg_log, right.neg_log, 1e-5)
    assert_close(ours.distance, right.distance, 1e-5)


def test_intra_cka_next_to_one(path: str) -> None:
    """Where 1 - delta rounds to 1, -log CKA is delta itself."""
    x = normal(2, 18, 32, seed=1)
    result = intra_cka(x, x + 1e-5 * normal(2, 18, 32, seed=2), backend="triton")
    assert (result.distance > 0).all()
    assert (result.distance < 1e-8).all()
    torch.testing.assert_close(result.neg_log, result.distance, rtol=1e-5, atol=0.0)


def test_intra_cka_keeps_its_promise_on_outlier_features(path: str) -> None:
    x, y = outliers(2, 18, 48, seed=1), outliers(2, 18, 48, seed=2)
    check_intra([x], [y], None, 1e-5)


def outliers(*shape: int, seed: int) -> Tensor:
    """Features like BERT's: a few dimensions with a mean of 30 standard deviations."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., ::16] += 30
    return x.to(DEVICE)


def test_intra_cka_launches(launches: list[str], multiprocessors: Callable[[int], None]) -> None:
    """All layer pairs and samples of a step in one launch each way."""
    students = [normal(2, 9, 16 + i, seed=i).requires_grad_() for i in range(3)]
    result = intra_cka(students, students[::-1], backend="triton")
    assert launches == ["_intra_cka_fwd_kernel"]
    result.distance.sum().backward()
    assert launches == ["_intra_cka_fwd_kernel", "_intra_cka_bwd_kernel"]
    launches.clear()
    multiprocessors(132)
    intra_cka(students, students[::-1], backend="triton")
    assert launches == ["_intra_cka_tile_kernel", "_intra_cka_finish_kernel"]
    launches.clear()
    result = intra_cka(
        normal(1, 130, 8, seed=1).requires_grad_(), normal(1, 130, 8, seed=2), backend="triton"
    )
    assert launches == ["_intra_cka_mean_kernel", "_intra_cka_tile_kernel", "_intra_cka_finish_kernel"]
    result.distance.sum().backward()
    assert launches[3:] == ["_intra_cka_bwd_tile_kernel"]


def test_intra_cka_of_nothing() -> None:
    for shape in ((0, 4, 8), (2, 0, 8), (2, 4, 0)):
        x = torch.zeros(shape, device=DEVICE, requires_grad=True)
        result = intra_cka(x, torch.zeros(shape, device=DEVICE), backend="triton")
        result.distance.sum().backward()
        assert not result.distance.any()
        assert x.grad is not None
        assert not x.grad.any()


# -- gram ---------------------------------------------------------------------------------------------------------

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
    features: Tensor, memory: Tensor | None, mask: Tensor | None, tolerance: float, known: bool = False
) -> None:
    features = features.detach().requires_grad_()
    truth = features.detach().double().requires_grad_()
    given: Any = memory
    right = memory.double() if memory is not None else None
    if memory is not None and not known:
        memory = given = memory.detach().requires_grad_()
        right = memory.detach().double().requires_grad_()
    elif memory is not None:
        given = frozen_gram(memory.float(), backend="eager")._replace(memory=memory)
    ours = gram(features, given, mask, backend="triton")
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


@pytest.fixture(params=["fused", "tiled"])
def gram_path(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, multiprocessors: Callable[[int], None]
) -> str:
    """Run a test with one program per part of F, and with one per tile of Gamma."""
    multiprocessors(3)
    if request.param == "tiled":
        tile_by_tile(monkeypatch)
    return str(request.param)


@pytest.mark.parametrize(("shape", "kind"), GRAM_CASES, ids=str)
def test_gram_matches_the_formula(shape: tuple[int, ...], kind: str | None, gram_path: str) -> None:
    batch, num_centroid, rows, width, extra = shape
    mask = make_mask(kind, batch, rows)
    features = framed(poison(normal(batch, rows, width, seed=1), mask))
    memory = framed(normal(num_centroid, rows * width + extra, seed=2)) if num_centroid else None
    check_gram(features, memory, mask, 1e-5)


@pytest.fixture
def tf32() -> Iterator[None]:
    """Let the heuristics choose as where tensor cores may multiply float32 (the interpreter does not)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


MANY_ROWS = [
    (30, 100, 2, 16, 20),
    (20, 50, 1, 9, 0),
    (2, 200, 1, 9, 5),
    (32, 300, 1, 33, 4),
    (2, 400, 1, 9, 5),
]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("shape", MANY_ROWS, ids=str)
def test_gram_of_many_rows(shape: tuple[int, ...], known: bool, tf32: None) -> None:
    batch, num_centroid, rows, width, extra = shape
    features = normal(batch, rows, width, seed=1)
    memory = normal(num_centroid, rows * width + extra, seed=2)
    check_gram(features, memory, None, on_gpu(TF32, 1e-5), known=known)


@pytest.mark.parametrize("shape", [(4, 3, 2, 8, 0), (20, 31, 2, 8, 3)], ids=str)
def test_gram_copies_a_known_block(shape: tuple[int, ...], gram_path: str) -> None:
    batch, num_centroid, rows, width, extra = shape
    memory = normal(num_centroid, rows * width + extra, seed=2)
    features = normal(batch, rows, width, seed=1)
    check_gram(features, memory, None, 1e-5, known=True)
    marked = frozen_gram(memory, backend="eager")
    marked.gram.fill_(7.0)
    gamma = gram(features, marked, backend="triton")
    assert (gamma[: num_centroid + 1, : num_centroid + 1] == 7).all()
    assert (gamma == 7).sum() == (num_centroid + 1) ** 2


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
def test_gram_in_16_bits(types: tuple[torch.dtype, torch.dtype], gram_path: str) -> None:
    features, memory = normal(5, 2, 32, seed=1).to(types[0]), normal(16, 70, seed=2).to(types[1])
    check_gram(features, memory, None, 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gram_in_16_bits_of_many_rows(dtype: torch.dtype) -> None:
    """Programs of the backward then hold a panel of A each, of two tiles of rows."""
    features, memory = normal(32, 1, 33, seed=1).to(dtype), normal(300, 37, seed=2).to(dtype)
    check_gram(features, memory, None, 1e-2)


def test_gram_reads_any_strides(gram_path: str) -> None:
    mask = make_mask("ragged", 2, 5)
    assert mask is not None
    features = normal(32, 5, 2, seed=1).permute(1, 2, 0)
    memory = transposed(normal(16, 64, seed=2))
    check_gram(features, memory, mask.T, 1e-5)
    check_gram(normal(5, 128, seed=1)[:, ::2], memory, None, 1e-5)
    # Slices of F that straddle tokens read the mask column by column.
    check_gram(normal(20, 5, 2, seed=1).permute(1, 2, 0), None, mask.T, 1e-5)


def test_gram_gradient_of_one_input_alone(gram_path: str) -> None:
    features, memory = normal(5, 20, seed=1), normal(16, 20, seed=2)
    weights = normal(23, 23, seed=3)
    both = [x.clone().requires_grad_() for x in (features, memory)]
    (gram(*both, backend="triton") * weights).sum().backward()
    for i in range(2):
        inputs = [x.clone().requires_grad_(i == j) for j, x in enumerate((features, memory))]
        (gram(*inputs, backend="triton") * weights).sum().backward()
        assert inputs[1 - i].grad is None
        assert torch.equal(inputs[i].grad, both[i].grad)  # type: ignore[arg-type]


def test_gram_launches(launches: list[str]) -> None:
    features = normal(4, 40, seed=1).requires_grad_()
    gram(features, normal(6, 40, seed=2), backend="triton").sum().backward()
    assert launches == ["_gram_fwd_kernel", "_gram_sum_kernel", "_gram_rows_kernel", "_gram_bwd_kernel"]


def test_gram_of_nothing() -> None:
    assert gram(torch.zeros(3, 0, device=DEVICE), backend="triton").tolist() == [[0.0] * 4] * 4
    assert gram(torch.zeros(0, 5, device=DEVICE), backend="triton").tolist() == [[0.0]]


# -- structure ----------------------------------------------------------------------------------------------------


def gammas(batch: int, num_centroid: int, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    result = []
    for factor in (0.0, noise):
        features = normal(batch, 60, seed=1) + factor * normal(batch, 60, seed=3)
        memory = normal(num_centroid, 60, seed=2) + factor * normal(num_centroid, 60, seed=4)
        result.append(gram(features.double(), memory.double() if num_centroid else None, backend="reference"))
    return result[0], result[1]


@pytest.mark.parametrize(
    "sizes", [(4, 3), (5, 1), (1, 1), (33, 34), (33, 0), (1, 5), (0, 4), (1, 0), (2, 40), (0, 0)], ids=str
)
def test_structure_matches_the_formula(sizes: tuple[int, int]) -> None:
    student, teacher = gammas(*sizes)
    ours = framed(student.float()).requires_grad_()
    truth = ours.detach().double().requires_grad_()
    weights = torch.tensor([0.7, -1.3, 0.4, 2.1], device=DEVICE)
    got = torch.stack(structure(ours, framed(teacher.float()), sizes[1], backend="triton"))
    expected = torch.stack(structure(truth, teacher.float().double(), sizes[1], backend="reference"))
    assert got.isfinite().all()
    for value, right in zip(got, expected, strict=True):
        assert_close(value, right, 3e-5)
    (got * weights).sum().backward()
    backpropagate((expected * weights).sum())
    assert ours.grad is not None
    symmetric = torch.zeros_like(truth) if truth.grad is None else (truth.grad + truth.grad.T) / 2
    assert_close(ours.grad, symmetric, 3e-5)


def test_structure_of_zero_vectors_and_equal_points() -> None:
    """A distance of 0 passes no gradient; the cosine with the zero vector is 0."""
    memory, features = normal(3, 20, seed=1), normal(4, 20, seed=2)
    features[0], features[1], memory[2] = 0.0, memory[0], 0.0
    student = gram(features, memory, backend="eager").float().requires_grad_()
    teacher = gram(normal(4, 20, seed=3), normal(3, 20, seed=4), backend="eager").float()
    ours = structure(student, teacher, 3, backend="triton")
    (ours.distance + ours.cosine).backward()
    truth = student.detach().clone().requires_grad_()
    expected = structure(truth, teacher, 3, backend="eager")
    (expected.distance + expected.cosine).backward()
    assert_close(torch.stack(ours), torch.stack(expected), 1e-5)
    assert_close(student.grad, truth.grad, 1e-3)  # type: ignore[arg-type]


def test_structure_passes_no_gradient_through_a_distance_of_zero() -> None:
    """With whole numbers all entries of Gamma are exact, and so is a distance of 0."""
    memory = torch.tensor([[2.0, 0.0, 4.0], [0.0, 2.0, 0.0]], device=DEVICE)
    features = torch.tensor([[2.0, 0.0, 4.0], [4.0, 6.0, 0.0]], device=DEVICE)
    student = gram(features, memory, backend="eager").float().requires_grad_()
    teacher = gram(2 * features, memory, backend="eager").float()
    structure(student, teacher, 2, backend="triton").distance.backward()
    truth = student.detach().clone().requires_grad_()
    structure(truth, teacher, 2, backend="eager").distance.backward()
    assert_close(student.grad, truth.grad, 1e-5)  # type: ignore[arg-type]


def test_structure_of_a_distance_rounded_below_zero() -> None:
    memory = torch.tensor([[2.0, 0.0, 4.0], [0.0, 2.0, 0.0]], device=DEVICE)
    features = torch.tensor([[2.0, 0.0, 4.0], [4.0, 6.0, 0.0]], device=DEVICE)
    student = gram(features, memory, backend="eager").float()
    teacher = gram(2 * features, memory, backend="eager").float()
    # The product of the first sample with the first centroid, which are equal.
    student[3, 0] += 1e-5
    student[0, 3] += 1e-5
    student.requires_grad_()
    ours = structure(student, teacher, 2, backend="triton")
    (ours.distance + ours.cosine).backward()
    truth = student.detach().clone().requires_grad_()
    expected = structure(truth, teacher, 2, backend="eager")
    (expected.distance + expected.cosine).backward()
    assert torch.stack(ours).isfinite().all()
    assert_close(torch.stack(ours), torch.stack(expected), 1e-5)
    assert_close(student.grad, truth.grad, 1e-4)  # type: ignore[arg-type]


def test_structure_launches(launches: list[str]) -> None:
    student, teacher = (x.float() for x in gammas(4, 3))
    structure(student.requires_grad_(), teacher, 3, backend="triton").cosine.backward()
    assert launches == ["_structure_stats_kernel", "_structure_grad_kernel", "_structure_bwd_kernel"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_centroid", [0, 5])
def test_inter_structure_matches_the_formula(num_centroid: int, masked: bool) -> None:
    mask = make_mask("ragged", 6, 7) if masked else None
    inputs = [outliers(6, 7, 32, seed=1), outliers(6, 7, 32, seed=2)]
    inputs = [poison(x, mask) for x in inputs]
    memories = [outliers(num_centroid, 240, seed=3), outliers(num_centroid, 240, seed=4)]
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        student, teacher = (x.to(dtype, copy=True) for x in inputs)
        own, given = (x.to(dtype, copy=True) for x in memories)
        student.requires_grad_()
        own.requires_grad_()
        pair = (own, given) if num_centroid else (None, None)
        values = inter_structure(student, teacher, pair[0], pair[1], mask, backend=backend)
        (values.local + 2 * values.memory_cka + 0.3 * values.distance + 5 * values.cosine).backward()
        results.append((torch.stack(values), student.grad, own.grad))
    assert_close(results[0][0], results[1][0], 1e-4)
    assert_close(results[0][1], results[1][1].nan_to_num(0.0), 1e-4)  # type: ignore[union-attr, arg-type]
    if num_centroid:
        assert_close(results[0][2], results[1][2], 1e-4)  # type: ignore[arg-type]


# -- what holds for all -------------------------------------------------------------------------------------------


def test_same_inputs_give_the_same_bits() -> None:
    mask = make_mask("ragged", 3, 9)
    assert mask is not None
    student, teacher = normal(3, 9, 32, seed=1), normal(3, 9, 32, seed=2)
    memories = normal(4, 288, seed=3), normal(4, 288, seed=4)
    results = []
    for garbage in (float("nan"), 1e30):
        x = student.masked_fill(~mask[:, :, None], garbage).requires_grad_()
        m = memories[0].clone().requires_grad_()
        intra = intra_cka(x, teacher, mask, backend="triton")
        inter = inter_structure(x, teacher, m, memories[1], mask, backend="triton")
        (intra.neg_log.sum() + torch.stack(inter).sum()).backward()
        results.append([intra.distance, intra.neg_log, torch.stack(inter), x.grad, m.grad])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_float64_is_refused() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        intra_cka(x, x, backend="triton")
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        intra_cka(x.float(), x, backend="triton")
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        gram(x, backend="triton")
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        gram(x.float(), x.flatten(1), backend="triton")
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        structure(x[0, :, :3], x[1, :, :3], backend="triton")


def test_registered_ops_compile_in_one_graph() -> None:
    x, y = normal(2, 5, 16, seed=1), normal(2, 5, 16, seed=2)
    memories = normal(3, 80, seed=3), normal(3, 80, seed=4)

    def loss(student: Tensor) -> Tensor:
        intra = intra_cka(student, y, backend="triton").neg_log.sum()
        return intra + torch.stack(inter_structure(student, y, *memories, backend="triton")).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(ours).backward()
    loss(plain).backward()
    assert torch.equal(ours.grad, plain.grad)  # type: ignore[arg-type]


@pytest.fixture
def rounded_dots(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Round the operands of every dot to this many bits; on a GPU its tensor cores do."""
    if INTERPRETED:
        return lambda bits: round_dots(monkeypatch, bits)

    def choose(bits: int) -> None:
        for module in MODULES:
            monkeypatch.setattr(module, "dot_precision", lambda: "tf32")

    return choose


class RoundedProduct(torch.autograd.Function):
    """a @ b on tensor cores: operands rounded to some bits of mantissa, sums in float32, both ways."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bits: int) -> Tensor:
        a, b = (torch.from_numpy(round_like(z.detach().cpu().numpy(), bits)).to(z.device) for z in (a, b))
        ctx.save_for_backward(a, b)
        ctx.bits = bits
        return a @ b

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        gradient = torch.from_numpy(round_like(gradients[0].contiguous().cpu().numpy(), ctx.bits)).to(
            a.device
        )
        return gradient @ b.mT, a.mT @ gradient, None


def plain_gram(x: Tensor, bits: int) -> Tensor:
    """The Gram matrix in plain torch, centred by its means: in bfloat16 throughout, or with tf32 products."""
    gram = x @ x.mT if x.dtype == torch.bfloat16 else RoundedProduct.apply(x, x.mT, bits)
    mean = gram.mean(dim=-1, keepdim=True)
    return gram - mean - mean.mT + mean.mean(dim=-2, keepdim=True)


def plain_distance(x: Tensor, y: Tensor, bits: int) -> Tensor:
    """1 - CKA per sample in plain torch."""
    grams = plain_gram(x, bits), plain_gram(y, bits)
    unit_x, unit_y = (gram / gram.square().sum(dim=(-2, -1), keepdim=True).sqrt() for gram in grams)
    return 1 - (unit_x * unit_y).sum(dim=(-2, -1))


def error_of(run: Callable[[Tensor], Tensor], x: Tensor, truth: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Relative errors of a value and of the gradient of its sum weighted by w, against (value, gradient)."""
    x = x.detach().clone().requires_grad_()
    value = run(x)
    (value.float() * normal(*value.shape, seed=7)).sum().backward()
    assert x.grad is not None
    pairs = ((value, truth[0]), (x.grad, truth[1]))
    value_error, gradient_error = (float((a.detach().double() - b).norm() / b.norm()) for a, b in pairs)
    return value_error, gradient_error


def truth_of(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().double().requires_grad_()
    value = run(x)
    (value * normal(*value.shape, seed=7)).sum().backward()
    assert x.grad is not None
    return value.detach(), x.grad


TENSOR_CORES = [(10, torch.float32), (7, torch.bfloat16)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("bits", "dtype"), TENSOR_CORES, ids=["tf32", "bf16"])
def test_rounding_of_intra_cka_stays_below_plain_torch(
    seed: int, bits: int, dtype: torch.dtype, rounded_dots: Callable[[int], None]
) -> None:
    """On outlier features, value and gradient: at most twice the error of plain torch in the same dtype."""
    x, y = outliers(2, 24, 64, seed=seed).to(dtype), outliers(2, 24, 64, seed=9 + seed).to(dtype)
    truth = truth_of(lambda z: intra_cka(z, y.double(), backend="reference").distance[0], x)
    plain = error_of(lambda z: plain_distance(z, y, bits), x, truth)
    rounded_dots(bits)
    ours = error_of(lambda z: intra_cka(z, y, backend="triton").distance[0], x, truth)
    assert ours[0] <= 2 * plain[0]
    assert ours[1] <= 2 * plain[1]
    # Centred before they are rounded, features keep the digits that the dtype has.
    assert max(ours) <= 2.0 ** (2 - bits)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize(("bits", "dtype"), TENSOR_CORES, ids=["tf32", "bf16"])
def test_rounding_of_gram_stays_below_plain_torch(
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


@QUICK
@given(batch=st.integers(1, 3), rows=st.integers(1, 20), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_intra_cka_ignores_rotation_scale_and_order(batch: int, rows: int, width: int, seed: int) -> None:
    x, y = normal(batch, rows, width, seed=seed), normal(batch, rows, 12, seed=seed + 1)
    rotation = torch.linalg.qr(normal(width, width, seed=seed + 2)).Q
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    plain = intra_cka(x, y, backend="triton").distance
    moved = intra_cka(3.7 * (x @ rotation)[:, order], y[:, order], backend="triton").distance
    torch.testing.assert_close(plain, moved, atol=2e-5, rtol=1e-4)
    assert ((plain >= 0) & (plain <= 1 + 1e-6)).all()


@QUICK
@given(rows=st.integers(2, 20), kept=st.integers(1, 20), seed=st.integers(0, 99))
def test_intra_cka_of_a_mask_is_that_of_the_kept_rows(rows: int, kept: int, seed: int) -> None:
    kept = min(kept, rows)
    x, y = normal(1, rows, 24, seed=seed), normal(1, rows, 24, seed=seed + 1)
    mask = torch.arange(rows, device=DEVICE)[None] < kept
    whole = intra_cka(x, y, mask, backend="triton")
    part = intra_cka(x[:, :kept], y[:, :kept], backend="triton")
    torch.testing.assert_close(torch.stack(whole), torch.stack(part), atol=1e-6, rtol=1e-5)


@QUICK
@given(
    batch=st.integers(0, 20), centroids=st.integers(0, 20), width=st.integers(1, 70), seed=st.integers(0, 99)
)
def test_gram_has_the_form_it_promises(batch: int, centroids: int, width: int, seed: int) -> None:
    memory = normal(centroids, width, seed=seed) if centroids else None
    gamma = gram(normal(batch, width, seed=seed + 1), memory, backend="triton")
    head = centroids + 1 if centroids else 0
    tolerance = 1e-5 * max(1.0, float(gamma.abs().max()))
    assert (gamma.diagonal() >= 0).all()
    # Centred rows sum to zero, so their products with anything do.
    assert float(gamma[:, head : head + batch].sum(1).abs().max()) <= tolerance * (batch + 1)
    assert float(gamma[:, :centroids].sum(1).abs().max()) <= tolerance * (centroids + 1)


def test_tuning_takes_the_fastest_and_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"a": 3.0, "b": 1.0, "c": float("inf")}
    calls: list[str] = []
    monkeypatch.setattr(shared, "INTERPRETED", False)
    monkeypatch.setattr(shared, "_tuned", {})
    monkeypatch.setattr(shared, "_milliseconds", lambda call: times[call.args[0]])
    assert shared.pick("key", ["a", "b", "c"], calls.append) == "a"
    monkeypatch.setenv("FSD_AUTOTUNE", "1")
    assert shared.pick("key", ["a", "b", "c"], calls.append) == "b"
    times["b"] = 9.0
    assert shared.pick("key", ["a", "b", "c"], calls.append) == "b"
    assert calls == []


def test_operands_are_rounded_to_tf32() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-500, 500)
    special = torch.tensor([0.0, -0.0, 1.0, -(1.0 + 2.0**-11), float("inf"), -float("inf"), float("nan")])
    x = torch.cat([x.clamp(-1e38, 1e38), special]).to(DEVICE)
    rounded = torch.empty_like(x)
    round_kernel[(1,)](x, rounded, x.numel(), BLOCK=1024)
    expected = torch.from_numpy(round_like(x.cpu().numpy(), 10)).to(DEVICE)
    # Halves go away from 0, in the emulation to the even neighbour.
    expected[-4] = -(1.0 + 2.0**-10)
    assert torch.equal(rounded[:-1], expected[:-1])
    assert rounded[-1].isnan()


def test_precision_follows_torch() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert shared.dot_precision() == "ieee"
        torch.set_float32_matmul_precision("high")
        assert shared.dot_precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_heuristics_fill_the_gpu_and_fit_it(name: str) -> None:
    target = shared.TARGETS[name]
    config = intra_kernels.forward_config(128, 32, torch.float32, "tf32", target)
    assert config.splits == 0 or 64 * config.splits <= 2 * target.multiprocessors
    few = intra_kernels.forward_config(128, 2, torch.float32, "tf32", target)
    assert few.splits > 1
    wide = gram_kernels.forward_config(134, 98304, torch.float32, "tf32", target)
    assert wide.tiles
    assert 64 <= wide.parts <= 2 * target.multiprocessors
    # Both tiles of 128 rows and their Gram would not fit beside the others.
    many = [
        gram_kernels.forward_config(334, 98304, torch.float32, "tf32", target, known) for known in (0, 301)
    ]
    for config in many:
        assert not config.tiles
        assert 64 <= 6 * config.parts <= target.multiprocessors


if not RUNS_KERNELS:
    for _name in [name for name in globals() if name.startswith("test_")]:
        del globals()[_name]

if not INTERPRETED:

    def test_in_the_interpreter() -> None:
        """Run everything above with TRITON_INTERPRET=1."""
        run_in_interpreter(__file__)
