"""``intra_cka``, ``gram`` and ``structure``: values, gradients, registration, dispatch and errors.

``reference`` in float64 is the truth. The Triton kernels have their own file.
"""

from __future__ import annotations

import importlib
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fsd_kernels
from fsd_kernels import GramBasis, _backend, frozen_gram, gram, inter_structure, intra_cka, structure
from fsd_kernels.gram import eager as gram_eager
from fsd_kernels.intra_cka import eager as intra_eager
from tests.kernel_cases import bert_features, centroids, ragged_mask, relative_error

Function = Callable[..., Any]

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
MASKS = ["none", "all", "ragged", "one token", "dropped sample", "holes"]
# B, S, D of student, D of teacher, K (0: no memory), tokens by which the memory is longer than the features.
INTER_SHAPES = {
    "odd": (3, 5, 7, 4, 3, 0),
    "powers of two": (4, 8, 16, 8, 2, 0),
    "no memory": (5, 3, 6, 6, 0, 0),
    "one centroid": (4, 3, 5, 6, 1, 0),
    "narrower features": (3, 4, 6, 5, 4, 3),
    "batch of one": (1, 6, 4, 9, 5, 0),
    "batch of one, no memory": (1, 6, 4, 9, 0, 0),
    "empty batch": (0, 4, 5, 6, 3, 0),
    "one token": (4, 1, 40, 33, 3, 2),
}


def make_mask(kind: str, batch: int, rows: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "all":
        return torch.ones(batch, rows, dtype=torch.int64)
    if kind == "ragged":
        return ragged_mask(batch, rows, seed=3)
    if kind == "one token":
        return ragged_mask(batch, rows, lengths=[1] * batch)
    if kind == "dropped sample":
        return ragged_mask(batch, rows, lengths=[0 if i == 0 else rows for i in range(batch)]).bool()
    return torch.rand(batch, rows, generator=torch.Generator().manual_seed(5)) < 0.6


def value_and_gradient(
    function: Function, inputs: Sequence[Tensor], scale: float = 1.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of ``function(*inputs)`` and the inputs' gradients for an upstream gradient that differs everywhere."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    total = torch.zeros((), dtype=torch.float64)
    for number, output in enumerate(outputs):
        weight = torch.rand(
            output.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64
        )
        total = total + scale * ((weight + 0.25 + number) * output.double()).sum()
    if not total.requires_grad:  # no sample has a structure
        return [output.detach() for output in outputs], [torch.zeros_like(leaf) for leaf in leaves]
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    pairs = zip(gradients, leaves, strict=True)
    return [output.detach() for output in outputs], [
        torch.zeros_like(y) if x is None else x for x, y in pairs
    ]


def assert_same(
    function: Callable[[str], Function], inputs: Sequence[Tensor], tolerance: float = 1e-10
) -> None:
    """eager equals reference, values and gradients."""
    values, gradients = value_and_gradient(function("eager"), inputs)
    true_values, true_gradients = value_and_gradient(function("reference"), inputs)
    for value, truth in zip([*values, *gradients], [*true_values, *true_gradients], strict=True):
        assert value.dtype == truth.dtype
        assert value.shape == truth.shape
        torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance)


def layers(widths: Sequence[int], batch: int, rows: int, seed: int, **kwargs: Any) -> list[Tensor]:
    return [bert_features(batch, rows, width, seed=seed + i, **kwargs) for i, width in enumerate(widths)]


def make_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- values and gradients in float64 -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", INTRA_SHAPES)
def test_intra_cka_in_float64(shape: str, kind: str) -> None:
    batch, rows, own, given = INTRA_SHAPES[shape]
    teachers, mask = layers(given, batch, rows, 10), make_mask(kind, batch, rows)
    assert_same(
        lambda backend: lambda *students: intra_cka(students, teachers, mask, backend=backend),
        layers(own, batch, rows, 20),
    )


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", INTER_SHAPES)
def test_inter_structure_in_float64(shape: str, kind: str) -> None:
    batch, rows, own, given, count, extra = INTER_SHAPES[shape]
    teacher, mask = bert_features(batch, rows, given, seed=1), make_mask(kind, batch, rows)
    student = bert_features(batch, rows, own, seed=2)
    if not count:
        assert_same(
            lambda backend: lambda x: inter_structure(x, teacher, mask=mask, backend=backend), [student]
        )
        return
    memory = centroids(count, rows + extra, given)
    for given_memory in (memory, frozen_gram(memory)):
        assert_same(
            lambda backend, known=given_memory: (
                lambda x, m: inter_structure(x, teacher, m, known, mask, backend=backend)
            ),
            [student, centroids(count, rows + extra, own, seed=3)],
        )


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
    known = gram(features, frozen_gram(memory), mask)
    torch.testing.assert_close(known, gram(features, memory, mask, backend="reference"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("batch", "count"), [(5, 4), (2, 1), (1, 3), (0, 3), (4, 0), (1, 0), (0, 0)])
def test_structure_in_float64(batch: int, count: int) -> None:
    memories = [centroids(count, 3, width) if count else None for width in (5, 7)]
    teacher = gram(bert_features(batch, 3, 7, seed=1), memories[1], backend="reference")
    student = gram(bert_features(batch, 3, 5), memories[0], backend="reference")
    # Gamma is symmetric, and only the symmetric part of its gradient means anything.
    assert_same(
        lambda backend: lambda x: structure((x + x.T) / 2, teacher, count, backend=backend), [student], 1e-9
    )


def test_structure_reads_the_losses_of_the_features_off_gamma() -> None:
    student, teacher = bert_features(5, 4, 6, seed=1), bert_features(5, 4, 7, seed=2)
    own, given = centroids(3, 4, 6), centroids(3, 4, 7, seed=4)
    direct = inter_structure(student, teacher, own, given, backend="reference")
    for backend in ("reference", "eager"):
        read = structure(gram(student, own), gram(teacher, given), 3, backend=backend)
        torch.testing.assert_close(torch.stack(read), torch.stack(direct), rtol=1e-9, atol=0)


def test_sums_over_chunks_and_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    # Small enough that samples are worked on one by one, and a slice holds one token, or 5 columns without a mask.
    monkeypatch.setattr(intra_eager, "_CHUNK_ELEMENTS", 50)
    monkeypatch.setattr(intra_eager, "_CACHED_ELEMENTS", 20)
    monkeypatch.setattr(gram_eager, "_COLUMNS", 5)
    mask = ragged_mask(4, 6, lengths=[6, 2, 5, 1])
    student, teacher = bert_features(4, 6, 4, seed=1), bert_features(4, 6, 9, seed=2)
    own, given = centroids(3, 8, 4), centroids(3, 8, 9)
    for kept in (None, mask):
        assert_same(
            lambda backend, kept=kept: lambda x: intra_cka(x, teacher, kept, backend=backend), [student]
        )
        assert_same(
            lambda backend, kept=kept: (
                lambda x, m: inter_structure(x, teacher, m, given, kept, backend=backend)
            ),
            [student, own],
        )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "count"), [(32, 1), (33, 2), (64, 2), (100, 4), (128, 4)])
def test_grams_in_strips(rows: int, count: int, masked: bool) -> None:
    assert len(intra_eager.strips(rows)) == count
    mask = ragged_mask(3, rows, lengths=[rows, 20, 7]) if masked else None
    student, teacher = bert_features(3, rows, 4, seed=1), bert_features(3, rows, 9, seed=2)
    assert_same(lambda backend: lambda x: intra_cka(x, teacher, mask, backend=backend), [student])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("guess", [False, True])
def test_features_or_grams_are_centred(guess: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intra_eager, "_likely_has_offset", lambda features, kept: guess)
    mask = ragged_mask(4, 12, lengths=[12, 5, 9, 1]) if masked else None
    student, teacher = (torch.randn(4, 12, 6, generator=make_generator(i)).double() for i in (0, 1))
    student[1] += 40.0
    teacher[2] += 40.0
    assert_same(lambda backend: lambda x: intra_cka(x, teacher, mask, backend=backend), [student])


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
    assert not intra_eager._likely_has_offset(features, None)
    offset = torch.zeros(9, 1, 1)
    offset[:8] = 2.0
    assert intra_eager._likely_has_offset(features + offset, None)
    offset[2:] = 0.0
    assert not intra_eager._likely_has_offset(features + offset, None)
    # What dropped tokens hold is not looked at.
    kept = torch.arange(40).expand(9, 40) < 10
    features[:, 10:] = 1e6
    assert intra_eager._likely_has_offset(features, None)
    assert not intra_eager._likely_has_offset(features, kept)


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
    monkeypatch.setattr(gram_eager, "_COLUMNS", 16)
    features = torch.randn(7, 48, generator=make_generator(0))
    features[:, 32:] += 1000.0
    truth = gram(features.double(), backend="reference")
    own = slice(0, 7)
    assert relative_error(gram(features)[own, own], truth[own, own]) < 1e-4


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_a_frozen_gram_is_the_block_of_any_batch(offset: float) -> None:
    """Whether the memory is centred before it is multiplied, or in Gamma."""
    memory = torch.randn(6, 30, generator=make_generator(0)) + offset
    assert gram_eager._looks_centred(memory) == (offset == 0.0)
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
    assert len(list(gram_eager.strips(70))) == 2
    features = torch.randn(70, 40, generator=make_generator(0)).double() + offset
    memory = torch.randn(140, 40, generator=make_generator(1)).double() + offset if with_memory else None
    truth = gram(features, memory, backend="reference")
    assert relative_error(gram(features, memory), truth) < 1e-12


def test_a_memory_whose_offset_lies_between_the_samples() -> None:
    memory = torch.randn(6, 8192, generator=make_generator(0))
    memory[:, 512:700] += 100.0
    assert gram_eager._looks_centred(memory)
    assert gram_eager._forward_uncentred_memory(memory[:0], memory, None, None) is None
    truth = gram(memory[:2].double(), memory.double(), backend="reference")
    known = gram(memory[:2], frozen_gram(memory))
    assert torch.equal(known, gram(memory[:2], memory))
    assert relative_error(known[:6, :6], truth[:6, :6]) < 1e-6


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


def test_inputs_need_not_be_contiguous() -> None:
    student, teacher = bert_features(3, 6, 5, seed=1), bert_features(3, 6, 8, seed=2)
    memory, given = centroids(4, 6, 5), centroids(4, 6, 8)
    mask = ragged_mask(3, 6, lengths=[6, 4, 2])

    def losses(x: Tensor, m: Tensor, t: Tensor, g: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        return *intra_cka(x, t, kept), *inter_structure(x, t, m, g, kept)

    expected = value_and_gradient(lambda x, m: losses(x, m, teacher, given, mask), [student, memory])

    def strided(x: Tensor) -> Tensor:
        """The same values, laid out the other way round and with gaps."""
        gaps = x.permute(*reversed(range(x.ndim))).repeat_interleave(2, dim=0).contiguous()
        return gaps[::2].permute(*reversed(range(x.ndim)))

    views = [strided(x) for x in (teacher, given, mask)]
    assert not any(view.is_contiguous() for view in views)
    actual = value_and_gradient(lambda x, m: losses(strided(x), strided(m), *views), [student, memory])
    for value, truth in zip(sum(actual, []), sum(expected, []), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)
    leaf = strided(student).requires_grad_()
    intra_cka(leaf, teacher).neg_log.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum() > 0


def test_a_layer_may_appear_in_several_pairs() -> None:
    student, teachers = bert_features(2, 5, 4), layers([6, 3], 2, 5, 7)
    assert_same(lambda backend: lambda x: intra_cka([x, x], teachers, backend=backend), [student])


# --- gradcheck ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "ragged"])
def test_gradcheck_intra_cka(kind: str) -> None:
    students = [x.requires_grad_() for x in layers([3, 4], 2, 5, 1)]
    teachers, mask = layers([4, 2], 2, 5, 11), make_mask(kind, 2, 5)
    assert torch.autograd.gradcheck(lambda *x: tuple(intra_cka(x, teachers, mask)), students)


@pytest.mark.parametrize("kind", ["none", "ragged"])
@pytest.mark.parametrize(("count", "extra"), [(0, 0), (3, 0), (2, 2)])
def test_gradcheck_gram_and_inter_structure(count: int, extra: int, kind: str) -> None:
    mask = make_mask(kind, 3, 4)
    student, teacher = bert_features(3, 4, 2).requires_grad_(), bert_features(3, 4, 3, seed=1)
    if count == 0:
        assert torch.autograd.gradcheck(lambda x: gram(x, mask=mask), [student])
        assert torch.autograd.gradcheck(lambda x: inter_structure(x, teacher, mask=mask).local, [student])
        return
    memory, given = centroids(count, 4 + extra, 2).requires_grad_(), centroids(count, 4 + extra, 3)
    assert torch.autograd.gradcheck(lambda x, m: gram(x, m, mask), [student, memory])
    assert torch.autograd.gradcheck(
        lambda x, m: tuple(inter_structure(x, teacher, m, given, mask)), [student, memory]
    )


def test_gradcheck_structure() -> None:
    teacher = gram(bert_features(3, 2, 3, seed=1), centroids(2, 2, 3))
    student = gram(bert_features(3, 2, 4), centroids(2, 2, 4)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(structure((x + x.T) / 2, teacher, 2)), [student])


# --- accuracy in narrow dtypes ------------------------------------------------------------------------------------

HALF = [torch.bfloat16, torch.float16]


def accuracy_case(seed: int, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """(student, student memory), (teacher, teacher memory), rounded to ``dtype``."""
    batch, rows, own, given, count = shape
    student, teacher = (
        bert_features(batch, rows, own, seed=seed),
        bert_features(batch, rows, given, seed=seed + 50),
    )
    memories = centroids(count, rows, own, seed=seed), centroids(count, rows, given, seed=seed + 50)
    return [student.to(dtype), memories[0].to(dtype)], [teacher.to(dtype), memories[1].to(dtype)]


def errors(
    function: Callable[[Tensor, Tensor, Sequence[Tensor], str], Tensor],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    seeds: int = 4,
) -> dict[str, dict[str, float]]:
    """Root mean square, over seeds, of the relative errors of value and gradients: {"eager": {"value": ...}, ...}."""
    squares = {name: {"value": 0.0, "gradient": 0.0} for name in ("eager", "plain")}
    for seed in range(seeds):
        inputs, constants = accuracy_case(seed, dtype, shape)

        def run(kind: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
            given = [x.to(kind) for x in constants]  # noqa: B023
            # Scaled so that no gradient is too small for float16.
            values, gradients = value_and_gradient(
                lambda x, m: function(x, m, given, backend),
                [x.to(kind) for x in inputs],  # noqa: B023
                scale=4096.0,
            )
            return values[0], torch.cat([x.double().flatten() for x in gradients])

        truth = run(torch.float64, "reference")
        for name, result in (("eager", run(dtype, "eager")), ("plain", run(dtype, "reference"))):
            squares[name]["value"] += relative_error(result[0], truth[0]) ** 2
            squares[name]["gradient"] += relative_error(result[1], truth[1]) ** 2
    return {name: {k: (v / seeds) ** 0.5 for k, v in sums.items()} for name, sums in squares.items()}


def intra(student: Tensor, memory: Tensor, given: Sequence[Tensor], backend: str) -> Tensor:
    return intra_cka(student, given[0], backend=backend).neg_log


def local(student: Tensor, memory: Tensor, given: Sequence[Tensor], backend: str) -> Tensor:
    return inter_structure(student, given[0], backend=backend).local


def between(name: str) -> Callable[[Tensor, Tensor, Sequence[Tensor], str], Tensor]:
    return lambda student, memory, given, backend: getattr(
        inter_structure(student, given[0], memory, given[1], backend=backend), name
    )


STRUCTURES = {
    "intra": intra,
    "local": local,
    "memory_cka": between("memory_cka"),
    "distance": between("distance"),
    "cosine": between("cosine"),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_float32_is_within_1e_5_and_twice_plain_torch(name: str) -> None:
    found = errors(STRUCTURES[name], torch.float32, (8, 16, 384, 768, 10))
    for what, error in found["eager"].items():
        assert error <= 1e-5, (what, found)
        assert error <= 2 * found["plain"][what], (what, found)


def test_float32_distances_of_narrow_features_near_their_centroids() -> None:
    found = errors(STRUCTURES["distance"], torch.float32, (6, 16, 128, 192, 5))
    assert found["eager"]["value"] <= 1e-5, found
    assert found["eager"]["gradient"] <= 1e-5, found


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["intra", "local"])
def test_half_precision_features_lose_only_the_rounding_of_the_gradient(
    name: str, dtype: torch.dtype
) -> None:
    found = errors(STRUCTURES[name], dtype, (6, 16, 96, 160, 5), seeds=2)
    assert found["eager"]["value"] <= 1e-5, found
    assert found["eager"]["gradient"] <= torch.finfo(dtype).eps, found
    for what, error in found["eager"].items():
        # Plain torch overflows to NaN in float16, which is no better than any error.
        assert not error > 2 * found["plain"][what], (what, found)


# torch has no cdist in half precision: with a memory the absolute bounds stand alone.
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["memory_cka", "distance", "cosine"])
def test_half_precision_features_and_memories(name: str, dtype: torch.dtype) -> None:
    inputs, constants = accuracy_case(0, dtype, (8, 16, 384, 768, 10))
    wide = [x.double() for x in constants]
    values, gradients = value_and_gradient(
        lambda x, m: STRUCTURES[name](x, m, constants, "eager"), inputs, scale=4096.0
    )
    true_values, true_gradients = value_and_gradient(
        lambda x, m: STRUCTURES[name](x, m, wide, "reference"), [x.double() for x in inputs], scale=4096.0
    )
    assert relative_error(values[0], true_values[0]) <= 1e-5
    for gradient, truth in zip(gradients, true_gradients, strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, truth) <= torch.finfo(dtype).eps


# --- registration ---------------------------------------------------------------------------------------------------


def op_calls(dtype: torch.dtype, masked: bool) -> dict[str, tuple[Any, ...]]:
    batch, rows, own, given, count = 3, 4, 5, 6, 2
    student, teacher = (
        bert_features(batch, rows, own, dtype=dtype),
        bert_features(batch, rows, given, dtype=dtype),
    )
    memory = centroids(count, rows, own, dtype=dtype)
    mask = ragged_mask(batch, rows, lengths=[4, 2, 1]).bool() if masked else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given_memory = centroids(count, rows, given, dtype=dtype)
    gamma_s, gamma_t = gram(student, memory), gram(teacher, given_memory)
    noise = torch.Generator().manual_seed(0)
    flat = student.flatten(1)
    pair_gradient = torch.randn(1, batch, rows, rows, dtype=wide, generator=noise)
    coefficient = torch.randn(1, batch, dtype=wide, generator=noise)
    return {
        "intra_cka_forward": ([student.clone().requires_grad_()], [teacher], mask, "eager"),
        "intra_cka_backward": ([student], mask, pair_gradient, coefficient, "eager"),
        "gram_forward": (
            flat.clone().requires_grad_(),
            memory.clone().requires_grad_(),
            None,
            mask,
            "eager",
        ),
        "gram_backward": (flat, memory, mask, torch.randn_like(gamma_s), True, True, "eager"),
        "structure_forward": (gamma_s.clone().requires_grad_(), gamma_t, count, "eager"),
        "structure_backward": (
            torch.randn(4, *gamma_s.shape, dtype=wide, generator=noise),
            torch.randn(4, dtype=wide, generator=noise),
            "eager",
        ),
        "inter_structure_forward": (
            flat.clone().requires_grad_(),
            memory.clone().requires_grad_(),
            teacher.flatten(1),
            given_memory,
            frozen_gram(given_memory).gram,
            mask,
            "eager",
        ),
        "inter_structure_backward": (
            torch.randn(4, *gamma_s.shape, dtype=gamma_s.dtype, generator=noise),
            torch.randn(4, dtype=wide, generator=noise),
            flat,
            memory,
            mask,
            True,
            True,
            "eager",
        ),
    }


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", op_calls(torch.float32, False))
def test_opcheck(name: str, dtype: torch.dtype, masked: bool) -> None:
    op = getattr(torch.ops.fsd_kernels, name).default
    torch.library.opcheck(op, op_calls(dtype, masked)[name])


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("name", ["gram_backward", "inter_structure_backward"])
def test_opcheck_of_a_gradient_that_is_not_needed(name: str, needs: tuple[bool, bool]) -> None:
    op = getattr(torch.ops.fsd_kernels, name)
    arguments = list(op_calls(torch.float32, True)[name])
    arguments[-3:-1] = needs
    torch.library.opcheck(op.default, tuple(arguments))
    d_features, d_memory = op(*arguments)
    assert (d_features.numel() > 0, d_memory.numel() > 0) == needs


def public_ops() -> dict[str, tuple[Function, list[Tensor]]]:
    f32 = torch.float32
    student, teacher = bert_features(4, 5, 6, seed=1, dtype=f32), bert_features(4, 5, 8, seed=2, dtype=f32)
    memory, given = centroids(3, 5, 6, dtype=f32), centroids(3, 5, 8, dtype=f32)
    mask = ragged_mask(4, 5, lengths=[5, 2, 1, 4])
    basis, gamma_t = frozen_gram(given), gram(teacher, given)
    return {
        "intra_cka": (lambda x: tuple(intra_cka([x, x], [teacher, teacher], mask)), [student]),
        "gram": (lambda x, m: gram(x, m, mask), [student, memory]),
        "structure": (lambda x: tuple(structure(x, gamma_t.float(), 3)), [gram(student, memory).float()]),
        "inter_structure": (
            lambda x, m: tuple(inter_structure(x, teacher, m, basis, mask)),
            [student, memory],
        ),
        "frozen_gram": (lambda x, m: gram(x, frozen_gram(m * 2), mask), [student, memory]),
    }


@pytest.mark.parametrize("name", public_ops())
def test_compiled_equals_uncompiled(name: str) -> None:
    function, inputs = public_ops()[name]
    expected = value_and_gradient(function, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual = value_and_gradient(compiled, inputs)
    for value, truth in zip(sum(actual, []), sum(expected, []), strict=True):
        assert torch.equal(value, truth)


@pytest.mark.parametrize("name", ["intra_cka", "inter_structure"])
def test_tensors_that_are_no_plain_ones_go_through_the_registered_op(name: str) -> None:
    # Fake tensors hold no numbers: the implementation would raise where it reads some.
    function, inputs = public_ops()[name]
    expected = function(*inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(each).requires_grad_() for each in inputs]
        values = function(*fakes)
        gradients = torch.autograd.grad([each.sum() for each in values], fakes)
    assert [each.shape for each in values] == [each.shape for each in expected]
    assert [each.shape for each in gradients] == [each.shape for each in inputs]


@pytest.mark.parametrize("name", ["intra_cka", "inter_structure"])
def test_a_second_derivative_is_refused(name: str) -> None:
    function, inputs = public_ops()[name]
    leaves = [each.clone().requires_grad_() for each in inputs]
    gradients = torch.autograd.grad(function(*leaves)[0].sum(), leaves, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(sum(each.sum() for each in gradients if each is not None), leaves)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("name", ["intra_cka", "gram", "structure", "inter_structure"])
def test_autocast_changes_nothing(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSD_BACKEND", backend)
    function, inputs = public_ops()[name]
    expected = value_and_gradient(function, inputs)

    def forward(*tensors: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            assert (inputs[0].flatten(1) @ inputs[0].flatten(1).T).dtype == torch.bfloat16
            return function(*tensors)

    actual = value_and_gradient(forward, inputs)
    for value, truth in zip(sum(actual, []), sum(expected, []), strict=True):
        assert value.dtype == truth.dtype
        assert torch.equal(value, truth)


# --- backends ---------------------------------------------------------------------------------------------------------


def ran(monkeypatch: pytest.MonkeyPatch, backend: str | None) -> set[str]:
    """The implementations that ``intra_cka`` and ``inter_structure`` use for a ``backend`` argument."""
    used = set()

    def spy(op: str, chosen: str) -> types.ModuleType:
        used.add(chosen)
        return _backend.implementation(op, chosen)

    for name in ("intra_cka.api", "gram.api", "structure.api", "_op"):
        monkeypatch.setattr(importlib.import_module(f"fsd_kernels.{name}"), "implementation", spy)
    student, memory = bert_features(2, 3, 4), centroids(2, 3, 4)
    intra_cka(student, student, backend=backend)
    inter_structure(student, student, memory, memory, backend=backend)
    return used


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_backend_by_argument_and_by_environment(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran(monkeypatch, backend) == {backend}
    monkeypatch.setenv("FSD_BACKEND", backend)
    assert ran(monkeypatch, None) == {backend}
    assert ran(monkeypatch, "auto") == {backend}
    monkeypatch.setenv("FSD_BACKEND", "reference" if backend == "eager" else "eager")
    assert ran(monkeypatch, backend) == {backend}  # the argument wins


def test_auto_is_eager_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran(monkeypatch, None) == {"eager"}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ran(monkeypatch, "auto") == {"eager"}


def test_unknown_backends_are_named_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    student = bert_features(2, 3, 4)
    with pytest.raises(ValueError, match=r"backend: 'cuda' is not one of auto, triton, eager, reference"):
        intra_cka(student, student, backend="cuda")
    monkeypatch.setenv("FSD_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"FSD_BACKEND: 'fast' is not one of auto, triton, eager, reference"):
        gram(student)
    gram(student, backend="eager")  # not asked for, so not looked at


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_triton_never_falls_back(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend = "triton" if by == "argument" else None
    if by == "environment":
        monkeypatch.setenv("FSD_BACKEND", "triton")
    student = bert_features(2, 3, 4, dtype=torch.float32)
    gamma = torch.eye(3)
    calls: dict[str, Callable[[], object]] = {
        "intra_cka": lambda: intra_cka(student, student, backend=backend),
        "gram": lambda: gram(student, backend=backend),
        "structure": lambda: structure(gamma, gamma, backend=backend),
    }
    for op, call in calls.items():
        with pytest.raises(RuntimeError, match=rf"{op}: backend 'triton' .*on the CPU.*TRITON_INTERPRET"):
            call()
    with pytest.raises(RuntimeError, match="on the CPU"):
        inter_structure(student, student, backend=backend)


def test_auto_falls_back_once_with_a_warning_that_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> types.ModuleType:
        raise ImportError(f"no triton for {name}")

    monkeypatch.setattr(_backend.importlib, "import_module", missing)
    monkeypatch.setattr(_backend, "_fallback_reasons", set())
    gpu = torch.device("cuda", 0)
    with pytest.warns(RuntimeWarning, match=r"gram: using backend 'eager', because .*no triton for"):
        assert _backend.resolve_backend("auto", gpu, "gram") == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backend.resolve_backend(None, gpu, "gram") == "eager"
    with pytest.raises(RuntimeError, match="no triton for"):
        _backend.resolve_backend("triton", gpu, "gram")


def test_auto_is_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend.importlib, "import_module", lambda name: types.ModuleType(name))
    assert _backend.resolve_backend("auto", torch.device("cuda", 0), "gram") == "triton"
    assert _backend.resolve_backend("eager", torch.device("cuda", 0), "gram") == "eager"


def test_everything_public_is_exported() -> None:
    assert sorted(fsd_kernels.__all__) == list(fsd_kernels.__all__)
    assert all(hasattr(fsd_kernels, name) for name in fsd_kernels.__all__)


# --- errors -----------------------------------------------------------------------------------------------------------

X = bert_features(3, 4, 5, dtype=torch.float32)
MEMORY = centroids(2, 4, 5, dtype=torch.float32)
GAMMA = gram(X, MEMORY)

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
    (
        lambda b: structure(GAMMA[:3], GAMMA, 2, backend=b),
        ValueError,
        r"student: expected \[N, N\] with N >= 4",
    ),
    (lambda b: structure(GAMMA, GAMMA, 6, backend=b), ValueError, r"student: .*N >= 8, got \[7, 7\]"),
    (
        lambda b: structure(GAMMA, GAMMA[:3, :3], backend=b),
        ValueError,
        r"teacher: expected \[7, 7\] .*got \[3, 3\]",
    ),
    (lambda b: structure(GAMMA, GAMMA.float(), 2, backend=b), ValueError, r"teacher: .*float64.*float32"),
    (lambda b: structure(GAMMA.int(), GAMMA, 2, backend=b), TypeError, r"student: expected one of"),
    (lambda b: structure(GAMMA, [1.0], 2, backend=b), TypeError, r"teacher: expected a tensor \[N, N\]"),
    (lambda b: inter_structure([X], X, backend=b), TypeError, r"student: expected a tensor"),
    (
        lambda b: inter_structure(X, X.int(), backend=b),
        TypeError,
        r"teacher: expected one of .*got torch.int32",
    ),
    (lambda b: inter_structure(X, X[:2], backend=b), ValueError, r"teacher: expected 3 samples .*got 2"),
    (
        lambda b: inter_structure(X, X, MEMORY, backend=b),
        ValueError,
        r"student_memory, teacher_memory: .*both",
    ),
    (
        lambda b: inter_structure(X, X, MEMORY, MEMORY[:1], backend=b),
        ValueError,
        r"teacher_memory: expected 2 centroids .*got 1",
    ),
    (
        lambda b: inter_structure(X, X, MEMORY[:, :-1], MEMORY, backend=b),
        ValueError,
        r"student_memory: expected \[K, F\] .*F >= 20 .*got \[2, 19\]",
    ),
    (
        lambda b: inter_structure(X, X, MEMORY, GramBasis(MEMORY, torch.ones(2, 2)), backend=b),
        ValueError,
        r"teacher_memory.gram: expected \[K \+ 1, K \+ 1\], got \[2, 2\]",
    ),
    (
        lambda b: inter_structure(X, X, MEMORY, frozen_gram(MEMORY[:, :-1]), backend=b),
        ValueError,
        r"teacher_memory: expected \[K, F\] .*F >= 20 .*got \[2, 19\]",
    ),
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
