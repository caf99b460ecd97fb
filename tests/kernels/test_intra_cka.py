"""``intra_cka`` on every backend: values, gradients, dtypes, masks, strides, bad input, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fsd_kernels import intra_cka
from fsd_kernels.intra_cka import eager
from fsd_kernels.intra_cka import triton as kernels
from tests.interpreted import (
    DEVICE,
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
    HALF,
    MASKS,
    Function,
    assert_same,
    bert_features,
    layers,
    make_generator,
    make_mask,
    ragged_mask,
    relative_error,
    rms_errors,
    value_and_gradient,
)

# B, S, widths of the student's layers, widths of the teacher's.
INTRA_SHAPES = {
    "odd": (3, 7, [5], [9]),
    "powers of two": (4, 16, [32], [8]),
    "two rows": (3, 2, [4], [6]),
    "one row": (3, 1, [4], [6]),
    "batch of one": (1, 9, [6], [6]),
    "empty batch": (0, 5, [4], [8]),
    "one feature": (2, 6, [1], [1]),
    "three layer pairs": (2, 33, [5, 40, 1], [9, 7, 3]),
    "more rows than features": (2, 33, [4], [4]),
}


# --- eager in float64 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", INTRA_SHAPES)
def test_intra_cka_in_float64(shape: str, kind: str) -> None:
    batch, rows, widths, teacher_widths = INTRA_SHAPES[shape]
    teachers, mask = layers(teacher_widths, batch, rows, 10), make_mask(kind, batch, rows)
    assert_same(
        lambda backend: lambda *students: intra_cka(students, teachers, mask, backend=backend),
        layers(widths, batch, rows, 20),
    )


def test_sums_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Small enough that samples are worked on one by one.
    monkeypatch.setattr(eager, "_CHUNK_ELEMENTS", 50)
    monkeypatch.setattr(eager, "_CACHED_ELEMENTS", 20)
    student, teacher = bert_features(4, 6, 4, seed=1), bert_features(4, 6, 9, seed=2)
    for kept in (None, ragged_mask(4, 6, lengths=[6, 2, 5, 1])):
        assert_same(
            lambda backend, kept=kept: lambda x: intra_cka(x, teacher, kept, backend=backend), [student]
        )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "count"), [(32, 1), (33, 2), (64, 2), (100, 4), (128, 4)])
def test_grams_in_strips(rows: int, count: int, masked: bool) -> None:
    assert len(eager.strips(rows)) == count
    mask = ragged_mask(3, rows, lengths=[rows, 20, 7]) if masked else None
    student, teacher = bert_features(3, rows, 4, seed=1), bert_features(3, rows, 9, seed=2)
    assert_same(lambda backend: lambda x: intra_cka(x, teacher, mask, backend=backend), [student])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("guess", [False, True])
def test_features_or_grams_are_centred(guess: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_likely_has_offset", lambda features, kept: guess)
    mask = ragged_mask(4, 12, lengths=[12, 5, 9, 1]) if masked else None
    student, teacher = (torch.randn(4, 12, 6, generator=make_generator(i)).double() for i in (0, 1))
    student[1] += 40.0
    teacher[2] += 40.0
    assert_same(lambda backend: lambda x: intra_cka(x, teacher, mask, backend=backend), [student])


def test_a_layer_may_appear_in_several_pairs() -> None:
    student, teachers = bert_features(2, 5, 4), layers([6, 3], 2, 5, 7)
    assert_same(lambda backend: lambda x: intra_cka([x, x], teachers, backend=backend), [student])


@pytest.mark.parametrize("kind", ["none", "ragged"])
def test_gradcheck_intra_cka(kind: str) -> None:
    students = [x.requires_grad_() for x in layers([3, 4], 2, 5, 1)]
    teachers, mask = layers([4, 2], 2, 5, 11), make_mask(kind, 2, 5)
    assert torch.autograd.gradcheck(lambda *x: tuple(intra_cka(x, teachers, mask)), students)


# --- eager in narrow dtypes, and features with an offset -------------------------------------------------------------


def neg_log(student: Tensor, memory: Tensor, constants: list[Tensor], backend: str) -> Tensor:
    return intra_cka(student, constants[0], backend=backend).neg_log


def test_float32_is_within_1e_5_and_twice_plain_torch() -> None:
    found = rms_errors(neg_log, torch.float32, (8, 16, 384, 768, 10))
    for what, error in found["eager"].items():
        assert error <= 1e-5, (what, found)
        assert error <= 2 * found["plain"][what], (what, found)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_features_lose_only_the_rounding_of_the_gradient(dtype: torch.dtype) -> None:
    found = rms_errors(neg_log, dtype, (6, 16, 96, 160, 5), seeds=2)
    assert found["eager"]["value"] <= 1e-5, found
    assert found["eager"]["gradient"] <= torch.finfo(dtype).eps, found
    for what, error in found["eager"].items():
        # Plain torch overflows to NaN in float16, which is no better than any error.
        assert not error > 2 * found["plain"][what], (what, found)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e-19), (torch.float32, 1e-21), (torch.float64, 1e-154), (torch.float64, 1e-160)],
)
def test_features_whose_squares_leave_the_dtype(dtype: torch.dtype, scale: float) -> None:
    student, teacher = (torch.randn(3, 8, 5, generator=make_generator(i)).to(dtype) for i in (0, 1))
    student *= scale
    student[0] /= scale  # one sample is as usual, and stays so
    truth, (expected,) = value_and_gradient(
        lambda x: intra_cka(x, teacher, backend="reference").neg_log[:, 0], [student]
    )
    values, (gradient,) = value_and_gradient(lambda x: intra_cka(x, teacher).neg_log, [student])
    assert values[0].isfinite().all()
    assert gradient.isfinite().all()
    torch.testing.assert_close(values[0][:, 0], truth[0])
    torch.testing.assert_close(gradient[0], expected[0], rtol=1e-4, atol=1e-6)


def test_the_guess_sees_an_offset_of_most_samples() -> None:
    features = torch.randn(9, 40, 30, generator=make_generator(0))
    assert not eager._likely_has_offset(features, None)
    offset = torch.zeros(9, 1, 1)
    offset[:8] = 2.0
    assert eager._likely_has_offset(features + offset, None)
    offset[2:] = 0.0
    assert not eager._likely_has_offset(features + offset, None)
    # What dropped tokens hold is not looked at.
    kept = torch.arange(40).expand(9, 40) < 10
    features[:, 10:] = 1e6
    assert eager._likely_has_offset(features, None)
    assert not eager._likely_has_offset(features, kept)


@pytest.mark.parametrize("energy", [0.0, 0.9, 1.1, 30.0])
def test_gradients_of_features_with_an_offset(energy: float) -> None:
    """Relative to the energy of what sets the tokens apart; from 1 on the rows are centred first."""
    student, teacher = (torch.randn(3, 128, 256, generator=make_generator(i)) for i in (0, 1))
    offset = energy**0.5 * torch.randn(256, generator=make_generator(2))
    offset *= energy**0.5 * 16 / offset.norm().clamp(min=1e-9)
    # Of one sample alone, so that the guess does not see it.
    student[1] += offset
    teacher[1] += offset
    _, (truth,) = value_and_gradient(lambda x: intra_cka(x, teacher.double()).neg_log, [student.double()])
    _, (gradient,) = value_and_gradient(lambda x: intra_cka(x, teacher).neg_log, [student])
    for sample in range(3):
        assert relative_error(gradient[sample], truth[sample]) < 1e-5


def test_a_large_offset_does_not_come_back_with_the_rounding_of_g() -> None:
    # The backward multiplies uncentred rows: it relies on rows of G that sum to zero as far as they can.
    student, teacher = (torch.randn(2, 128, 32, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    offset = torch.zeros(32)
    offset[:3] = 1000.0
    _, (truth,) = value_and_gradient(
        lambda x: intra_cka(x, teacher.double()).neg_log, [(student + offset).double()]
    )
    _, (gradient,) = value_and_gradient(lambda x: intra_cka(x, teacher).neg_log, [student + offset])
    assert relative_error(gradient, truth) < 1e-4


# --- the Triton kernels ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["fused", "tiled"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test on each way through the kernels; small tiles take small inputs through those for large ones."""
    name = str(request.param)
    if name == "tiled":
        monkeypatch.setattr(kernels, "_WHOLE", 16)
    for configs in (kernels.forward_config, kernels.backward_config):
        configs.cache_clear()
    yield name
    for configs in (kernels.forward_config, kernels.backward_config):
        configs.cache_clear()


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
    (ours.one_minus_cka * weights[0] + ours.neg_log * weights[1]).sum().backward()
    backpropagate((right.one_minus_cka * weights[0] + right.neg_log * weights[1]).sum())
    for x, expected in zip(students, truth, strict=True):
        assert x.grad is not None
        assert x.grad.dtype == x.dtype
        kept = expected.grad if expected.grad is not None else torch.zeros_like(expected)
        assert_close(x.grad, kept.nan_to_num(0.0), tolerance)


@on_triton
@pytest.mark.parametrize(("shape", "kind"), INTRA_CASES, ids=str)
def test_kernels_match_the_formula(shape: tuple[int, ...], kind: str | None, path: str) -> None:
    pairs, batch, rows, width_s, width_t = shape
    mask = kept_mask(kind, batch, rows)
    students = [framed(poison(normal(batch, rows, width_s + i, seed=i), mask)) for i in range(pairs)]
    teachers = [framed(poison(normal(batch, rows, width_t, seed=50 + i), mask)) for i in range(pairs)]
    check_intra(students, teachers, mask, 1e-5)


@on_triton
@pytest.mark.parametrize("rows", [128, 129, 260])
def test_kernels_of_long_inputs(rows: int, tf32: None) -> None:
    mask = kept_mask("ragged", 1, rows)
    check_intra([normal(1, rows, 16, seed=1)], [normal(1, rows, 20, seed=2)], mask, on_gpu(TF32, 1e-5))


@on_triton
@pytest.mark.parametrize("kind", ["one", "none"])
def test_kernels_give_zero_for_too_few_rows(kind: str, path: str) -> None:
    mask = kept_mask(kind, 3, 18)
    x = poison(normal(3, 18, 20, seed=1), mask)
    check_intra([x], [poison(normal(3, 18, 16, seed=2), mask)], mask, 1e-5)
    assert intra_cka(x, x, mask, backend="triton").one_minus_cka[0, 0] == 0


@on_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_in_16_bits(dtype: torch.dtype, path: str) -> None:
    students, teachers = normal(2, 20, 24, seed=1).to(dtype), normal(2, 20, 32, seed=2).to(dtype)
    # The gradient is rounded to its dtype (truncated in the interpreter).
    check_intra([students], [teachers], None, 1e-2 if dtype == torch.bfloat16 else 2e-3)
    check_intra([students], [teachers.float()], None, 1e-2 if dtype == torch.bfloat16 else 2e-3)


@on_triton
def test_kernels_read_any_strides(path: str) -> None:
    students = [transposed(normal(2, 20, 24, seed=1)), normal(20, 2, 16, seed=2).transpose(0, 1)]
    teachers = [normal(2, 20, 48, seed=3)[:, :, ::2], transposed(normal(2, 20, 20, seed=4))]
    mask = kept_mask("ragged", 20, 2)
    assert mask is not None
    check_intra(students, teachers, mask.T, 1e-5)


@on_triton
def test_kernels_of_aligned_rows(path: str) -> None:
    check_intra([normal(2, 24, 96, seed=1)], [normal(2, 24, 64, seed=2)], None, 1e-5)


@on_triton
def test_kernels_give_zero_for_equal_features(path: str) -> None:
    x = normal(2, 18, 32, seed=3).requires_grad_()
    result = intra_cka(x, x.detach().clone(), backend="triton")
    (result.one_minus_cka + result.neg_log).sum().backward()
    assert x.grad is not None
    assert result.one_minus_cka.abs().max() <= 1e-12
    assert result.neg_log.abs().max() <= 1e-12
    assert x.grad.abs().max() <= 1e-8


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_rows_equal_up_to_rounding_have_no_structure(dtype: torch.dtype, path: str) -> None:
    """float32 rows that differ in their last bits, and 16-bit rows whose products do."""
    row = 100 * normal(48, seed=1)
    student = row.repeat(2, 24, 1)
    if dtype == torch.float32:
        last_bit = torch.randint(-1, 2, student.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        student = student + student * last_bit * 2.0**-23
    student = student.to(dtype).requires_grad_()
    values = intra_cka(student, normal(2, 24, 48, seed=2).to(dtype), backend="triton")
    assert (values.neg_log == 0).all()
    assert (values.one_minus_cka == 0).all()
    (gradient,) = torch.autograd.grad(values.neg_log.sum(), student)
    assert (gradient == 0).all()


@on_triton
def test_kernels_give_zero_for_constant_rows(path: str) -> None:
    for offset in (1.0, 1e4):
        x = (offset * normal(2, 1, 24, seed=3)).expand(2, 18, 24).contiguous().requires_grad_()
        other = normal(2, 18, 24, seed=4)
        for student, teacher in ((x, other), (other.clone().requires_grad_(), x)):
            result = intra_cka(student, teacher, backend="triton")
            (result.one_minus_cka + result.neg_log).sum().backward()
            assert result.one_minus_cka.tolist() == result.neg_log.tolist() == [[0.0, 0.0]]
            assert student.grad is not None
            assert not student.grad.any()


@on_triton
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_kernels_keep_small_and_large_features(scale: float, path: str) -> None:
    x, y = normal(1, 18, 16, seed=1).double() * scale, normal(1, 18, 16, seed=2).double() * scale
    ours = intra_cka(x.float(), y.float(), backend="triton").one_minus_cka
    assert_close(ours, intra_cka(x, y, backend="reference").one_minus_cka, 1e-5)


@on_triton
def test_kernels_of_unrelated_structures() -> None:
    """Far from CKA = 1 the logarithm is taken of CKA, not of 1 - CKA; at CKA = 0 it stops at its floor."""
    x, y = torch.zeros(2, 2, 4, 2, device=DEVICE)
    x[:, :, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    y[:, :, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    y[1, :, 1] = 0.3 * x[1, :, 0]
    x = x.requires_grad_()
    ours, right = (intra_cka(x, y, backend=name) for name in ("triton", "reference"))
    assert_close(ours.neg_log, right.neg_log, 1e-5)
    assert_close(ours.one_minus_cka, right.one_minus_cka, 1e-5)


@on_triton
def test_kernels_give_no_gradient_on_the_floor_of_the_logarithm(path: str) -> None:
    x, g = normal(2, 18, 6, seed=1), normal(1, 2, 18, 18, seed=2)
    neg_log = torch.tensor([[-math.log(1e-8), 17.0]], device=DEVICE)
    derivative = torch.ones_like(neg_log)
    (gradient,) = kernels.backward([x], None, g + g.mT, neg_log, None, derivative)
    assert not gradient[0].any()
    assert gradient[1].all()
    # The other value has no floor.
    (gradient,) = kernels.backward([x], None, g + g.mT, neg_log, derivative, None)
    assert gradient.all()


@on_triton
@pytest.mark.parametrize("which", [0, 1])
def test_kernels_take_each_derivative_as_it_comes(which: int, path: str) -> None:
    """Of one value alone, with strides of its own."""
    students, teachers = (
        [normal(3, 20, 9, seed=i) for i in range(2)],
        [normal(3, 20, 7, seed=5 + i) for i in range(2)],
    )
    gradients = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in students]
        value = intra_cka(leaves, [x.to(dtype) for x in teachers], backend=backend)[which]
        derivatives = normal(3, 2, seed=9).to(dtype).T
        gradients.append(torch.autograd.grad(value, leaves, derivatives))
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected, 1e-5)


@on_triton
def test_kernels_next_to_one(path: str) -> None:
    """Where 1 - delta rounds to 1, -log CKA is delta itself."""
    x = normal(2, 18, 32, seed=1)
    result = intra_cka(x, x + 1e-5 * normal(2, 18, 32, seed=2), backend="triton")
    assert (result.one_minus_cka > 0).all()
    assert (result.one_minus_cka < 1e-8).all()
    torch.testing.assert_close(result.neg_log, result.one_minus_cka, rtol=1e-5, atol=0.0)


@on_triton
def test_kernels_keep_their_promise_on_outlier_features(path: str) -> None:
    x, y = outliers(2, 18, 48, seed=1), outliers(2, 18, 48, seed=2)
    check_intra([x], [y], None, 1e-5)


@on_triton
def test_kernels_launched(launches: list[str]) -> None:
    """All layer pairs and samples of a step in one launch each way."""
    students = [normal(2, 9, 16 + i, seed=i).requires_grad_() for i in range(3)]
    result = intra_cka(students, students[::-1], backend="triton")
    assert launches == ["_intra_cka_fwd_kernel"]
    result.one_minus_cka.sum().backward()
    assert launches == ["_intra_cka_fwd_kernel", "_intra_cka_bwd_kernel"]
    launches.clear()
    result = intra_cka(
        normal(1, 130, 8, seed=1).requires_grad_(), normal(1, 130, 8, seed=2), backend="triton"
    )
    tiles = ["_intra_cka_tile_kernel"] * 2
    assert launches == [*tiles, "_intra_cka_mean_kernel", "_intra_cka_finish_kernel"]
    result.one_minus_cka.sum().backward()
    assert launches[4:] == ["_intra_cka_bwd_tile_kernel"]


@on_triton
def test_kernels_of_many_layer_pairs(launches: list[str]) -> None:
    """More than one launch takes, of different widths."""
    students = [normal(1, 5, 3 + i, seed=i) for i in range(14)]
    teachers = [normal(1, 5, 20 - i, seed=50 + i) for i in range(14)]
    check_intra(students, teachers, None, 1e-5)
    assert launches == ["_intra_cka_fwd_kernel"] * 2 + ["_intra_cka_bwd_kernel"] * 2


class Called(TorchDispatchMode):
    """Names of the operations that torch carries out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [9, 130])
@pytest.mark.parametrize("kind", [None, "ragged"])
def test_a_cuda_graph_can_capture_the_host_side(
    rows: int, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward allocate, take views and launch: nothing is copied from the host, nothing waits for it."""
    launched: list[str] = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, *_, **options: launched.append(kernel.fn.__name__))
    students, teachers = ([normal(2, rows, 8 + i, seed=i) for i in range(2)] for _ in range(2))
    mask = kept_mask(kind, 2, rows)
    with Called() as called:
        _, neg_log, g = kernels.forward(students, teachers, mask)
        kernels.backward(students, mask, g, neg_log, neg_log, None)
    assert set(called.names) <= {"empty", "empty_like", "view", "detach", "select", "slice"}
    assert len(launched) == (2 if rows == 9 else 5)


@on_triton
def test_kernels_of_nothing() -> None:
    for shape in ((0, 4, 8), (2, 0, 8), (2, 4, 0)):
        x = torch.zeros(shape, device=DEVICE, requires_grad=True)
        result = intra_cka(x, torch.zeros(shape, device=DEVICE), backend="triton")
        result.one_minus_cka.sum().backward()
        assert not result.one_minus_cka.any()
        assert x.grad is not None
        assert not x.grad.any()


def plain_distance(x: Tensor, y: Tensor, bits: int) -> Tensor:
    """1 - CKA per sample in plain torch."""
    grams = plain_gram(x, bits), plain_gram(y, bits)
    unit_x, unit_y = (gram / gram.square().sum(dim=(-2, -1), keepdim=True).sqrt() for gram in grams)
    return 1 - (unit_x * unit_y).sum(dim=(-2, -1))


@on_triton
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("bits", "dtype"), TENSOR_CORES, ids=["tf32", "bf16"])
def test_rounding_stays_below_plain_torch(
    seed: int, bits: int, dtype: torch.dtype, rounded_dots: Callable[[int], None]
) -> None:
    """On outlier features, value and gradient: at most twice the error of plain torch in the same dtype."""
    x, y = outliers(2, 24, 64, seed=seed).to(dtype), outliers(2, 24, 64, seed=9 + seed).to(dtype)
    truth = truth_of(lambda z: intra_cka(z, y.double(), backend="reference").one_minus_cka[0], x)
    plain = error_of(lambda z: plain_distance(z, y, bits), x, truth)
    rounded_dots(bits)
    ours = error_of(lambda z: intra_cka(z, y, backend="triton").one_minus_cka[0], x, truth)
    assert ours[0] <= 2 * plain[0]
    assert ours[1] <= 2 * plain[1]
    # No offset is rounded, so that features keep the digits that the dtype has.
    assert max(ours) <= 2.0 ** (2 - bits)


@on_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("offset", "limit"), [(0.0, 5e-5), (1.0, 5e-5), (10.0, 1e-3)])
def test_features_of_16_bits_lose_nothing_before_their_gradient_is_rounded(
    dtype: torch.dtype, offset: float, limit: float, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 on the same features: G is two terms, and an offset of 10 standard deviations costs digits."""
    teacher = normal(1, 48, 64, seed=1, offset=offset)
    student = 0.7 * teacher + 0.5 * normal(1, 48, 64, seed=2, offset=0.0)
    student, teacher = student.to(dtype), teacher.to(dtype)
    truth = student.double().requires_grad_()
    right = intra_cka(truth, teacher.double(), backend="reference")
    right.neg_log.sum().backward()
    one_minus_cka, neg_log, g = kernels.forward([student], [teacher], None)
    assert_close(one_minus_cka, right.one_minus_cka, 1e-5 * (1 + offset**2))
    # The kernel stores the type of the features: a float32 result shows what is lost before.
    monkeypatch.setattr(
        torch, "empty_like", lambda x, **_: torch.empty(x.shape, dtype=torch.float32, device=x.device)
    )
    (gradient,) = kernels.backward([student], None, g, neg_log, None, torch.ones_like(neg_log))
    assert truth.grad is not None
    assert_close(gradient, truth.grad, limit)


@on_triton
@QUICK
@given(batch=st.integers(1, 3), rows=st.integers(1, 20), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_kernels_ignore_rotation_scale_and_order(batch: int, rows: int, width: int, seed: int) -> None:
    x, y = normal(batch, rows, width, seed=seed), normal(batch, rows, 12, seed=seed + 1)
    rotation = torch.linalg.qr(normal(width, width, seed=seed + 2)).Q
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    plain = intra_cka(x, y, backend="triton").one_minus_cka
    moved = intra_cka(3.7 * (x @ rotation)[:, order], y[:, order], backend="triton").one_minus_cka
    torch.testing.assert_close(plain, moved, atol=2e-5, rtol=1e-4)
    assert ((plain >= 0) & (plain <= 1 + 1e-6)).all()


@on_triton
@QUICK
@given(rows=st.integers(2, 20), kept=st.integers(1, 20), seed=st.integers(0, 99))
def test_kernels_give_a_mask_the_value_of_its_kept_rows(rows: int, kept: int, seed: int) -> None:
    kept = min(kept, rows)
    x, y = normal(1, rows, 24, seed=seed), normal(1, rows, 24, seed=seed + 1)
    mask = torch.arange(rows, device=DEVICE)[None] < kept
    whole = intra_cka(x, y, mask, backend="triton")
    part = intra_cka(x[:, :kept], y[:, :kept], backend="triton")
    torch.testing.assert_close(torch.stack(whole), torch.stack(part), atol=1e-6, rtol=1e-5)


# --- bad input -------------------------------------------------------------------------------------------------------


X = bert_features(3, 4, 5, dtype=torch.float32)

ERRORS: list[tuple[Function, type[Exception], str]] = [
    (
        lambda b: intra_cka(X[0], X, backend=b),
        ValueError,
        r"student: expected \[B, S, D\], got shape \[4, 5\]",
    ),
    (
        lambda b: intra_cka(X, X[0], backend=b),
        ValueError,
        r"teacher: expected \[B, S, D\], got shape \[4, 5\]",
    ),
    (lambda b: intra_cka([], X, backend=b), ValueError, r"student: expected at least one layer"),
    (
        lambda b: intra_cka(X.int(), X, backend=b),
        TypeError,
        r"student: expected one of .*float32.*got torch.int32",
    ),
    (lambda b: intra_cka(X, X.long(), backend=b), TypeError, r"teacher: expected one of .*got torch.int64"),
    (
        lambda b: intra_cka(X, ["layer"], backend=b),
        TypeError,
        r"teacher: expected a tensor \[B, S, D\], got str",
    ),
    (lambda b: intra_cka([X, X], [X], backend=b), ValueError, r"teacher: expected 2 layers .*got 1"),
    (
        lambda b: intra_cka([X, X], [X, X[0]], backend=b),
        ValueError,
        r"teacher\[1\]: expected .*got shape \[4, 5\]",
    ),
    (
        lambda b: intra_cka(X, X[:, :3], backend=b),
        ValueError,
        r"teacher\[0\]: expected \[3, 4, D\] .*got \[3, 3, 5\]",
    ),
    (
        lambda b: intra_cka([X, X[:2]], [X, X], backend=b),
        ValueError,
        r"student\[1\]: expected \[3, 4, D\] .*got \[2, 4, 5\]",
    ),
    (
        lambda b: intra_cka([X, X.double()], [X, X], backend=b),
        TypeError,
        r"student\[1\]: expected torch.float32 like student\[0\], got torch.float64",
    ),
    (
        lambda b: intra_cka(X, X, torch.ones(3, 5), backend=b),
        ValueError,
        r"mask: expected \[B, S\] = \[3, 4\] .*got \[3, 5\]",
    ),
    (lambda b: intra_cka(X, X, [[1]], backend=b), TypeError, r"mask: expected a tensor \[B, S\], got list"),
]


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors_name_the_argument_and_the_shapes(case: int, backend: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        call(backend)


def test_a_mask_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask: on meta, but the features are on cpu"):
        intra_cka(X, X, torch.ones(3, 4, device="meta"))
    with pytest.raises(ValueError, match=r"teacher: on meta, but student is on cpu"):
        intra_cka(X, X.to("meta"))
