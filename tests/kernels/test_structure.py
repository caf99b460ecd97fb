"""``structure`` and ``inter_structure`` on every backend: values, gradients, dtypes, bad input, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fsd_kernels import GramBasis, frozen_gram, gram, inter_structure, structure
from fsd_kernels.gram import eager as gram_eager
from tests.interpreted import (
    DEVICE,
    assert_close,
    backpropagate,
    framed,
    kept_mask,
    normal,
    on_triton,
    outliers,
    poison,
)
from tests.kernel_cases import (
    HALF,
    INTER_SHAPES,
    MASKS,
    Function,
    accuracy_case,
    assert_same,
    bert_features,
    centroids,
    make_mask,
    ragged_mask,
    relative_error,
    rms_errors,
    value_and_gradient,
)

# --- eager in float64 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", INTER_SHAPES)
def test_inter_structure_in_float64(shape: str, kind: str) -> None:
    batch, rows, width, teacher_width, count, extra = INTER_SHAPES[shape]
    teacher, mask = bert_features(batch, rows, teacher_width, seed=1), make_mask(kind, batch, rows)
    student = bert_features(batch, rows, width, seed=2)
    if not count:
        assert_same(
            lambda backend: lambda x: inter_structure(x, teacher, mask=mask, backend=backend), [student]
        )
        return
    memory = centroids(count, rows + extra, teacher_width)
    for teacher_memory in (memory, frozen_gram(memory)):
        assert_same(
            lambda backend, teacher_memory=teacher_memory: (
                lambda x, m: inter_structure(x, teacher, m, teacher_memory, mask, backend=backend)
            ),
            [student, centroids(count, rows + extra, width, seed=3)],
        )


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
    memory, teacher_memory = centroids(3, 4, 6), centroids(3, 4, 7, seed=4)
    direct = inter_structure(student, teacher, memory, teacher_memory, backend="reference")
    for backend in ("reference", "eager"):
        read = structure(gram(student, memory), gram(teacher, teacher_memory), 3, backend=backend)
        torch.testing.assert_close(torch.stack(read), torch.stack(direct), rtol=1e-9, atol=0)


@pytest.mark.parametrize("num_centroid", [0, 3])
def test_gammas_of_slices_of_the_features_add_up(num_centroid: int) -> None:
    """So processes may hold a slice along F each."""
    student, teacher = (bert_features(5, 4, d, seed=d).flatten(1) for d in (6, 7))
    memory, teacher_memory = (centroids(3, 4, d, seed=d) if num_centroid else None for d in (6, 7))
    parts = []
    for features, rows in ((student, memory), (teacher, teacher_memory)):
        cuts = [slice(0, 9), slice(9, features.shape[1])]
        parts.append(sum(gram(features[:, cut], None if rows is None else rows[:, cut]) for cut in cuts))
    found = structure(parts[0], parts[1], num_centroid)
    whole = inter_structure(student, teacher, memory, teacher_memory, backend="reference")
    torch.testing.assert_close(torch.stack(found), torch.stack(whole), rtol=1e-9, atol=0)


def test_sums_over_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    # A slice holds one token, or 5 columns without a mask.
    monkeypatch.setattr(gram_eager, "_COLUMNS", 5)
    student, teacher = bert_features(4, 6, 4, seed=1), bert_features(4, 6, 9, seed=2)
    memory, teacher_memory = centroids(3, 8, 4), centroids(3, 8, 9)
    for kept in (None, ragged_mask(4, 6, lengths=[6, 2, 5, 1])):
        assert_same(
            lambda backend, kept=kept: (
                lambda x, m: inter_structure(x, teacher, m, teacher_memory, kept, backend=backend)
            ),
            [student, memory],
        )


@pytest.mark.parametrize("kind", ["none", "ragged"])
@pytest.mark.parametrize(("count", "extra"), [(0, 0), (3, 0), (2, 2)])
def test_gradcheck_inter_structure(count: int, extra: int, kind: str) -> None:
    mask = make_mask(kind, 3, 4)
    student, teacher = bert_features(3, 4, 2).requires_grad_(), bert_features(3, 4, 3, seed=1)
    if count == 0:
        assert torch.autograd.gradcheck(lambda x: inter_structure(x, teacher, mask=mask).local, [student])
        return
    memory, teacher_memory = centroids(count, 4 + extra, 2).requires_grad_(), centroids(count, 4 + extra, 3)
    assert torch.autograd.gradcheck(
        lambda x, m: tuple(inter_structure(x, teacher, m, teacher_memory, mask)), [student, memory]
    )


def test_gradcheck_structure() -> None:
    teacher = gram(bert_features(3, 2, 3, seed=1), centroids(2, 2, 3))
    student = gram(bert_features(3, 2, 4), centroids(2, 2, 4)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(structure((x + x.T) / 2, teacher, 2)), [student])


# --- eager in narrow dtypes ------------------------------------------------------------------------------------------


def local(student: Tensor, memory: Tensor, constants: Sequence[Tensor], backend: str) -> Tensor:
    return inter_structure(student, constants[0], backend=backend).local


def between(name: str) -> Callable[[Tensor, Tensor, Sequence[Tensor], str], Tensor]:
    return lambda student, memory, constants, backend: getattr(
        inter_structure(student, constants[0], memory, constants[1], backend=backend), name
    )


STRUCTURES = {
    "local": local,
    "memory": between("memory"),
    "distance": between("distance"),
    "cosine": between("cosine"),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_float32_is_within_1e_5_and_twice_plain_torch(name: str) -> None:
    found = rms_errors(STRUCTURES[name], torch.float32, (8, 16, 384, 768, 10))
    for what, error in found["eager"].items():
        assert error <= 1e-5, (what, found)
        assert error <= 2 * found["plain"][what], (what, found)


def test_float32_distances_of_narrow_features_near_their_centroids() -> None:
    found = rms_errors(STRUCTURES["distance"], torch.float32, (6, 16, 128, 192, 5))
    assert found["eager"]["value"] <= 1e-5, found
    assert found["eager"]["gradient"] <= 1e-5, found


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["local"])
def test_half_precision_features_lose_only_the_rounding_of_the_gradient(
    name: str, dtype: torch.dtype
) -> None:
    found = rms_errors(STRUCTURES[name], dtype, (6, 16, 96, 160, 5), seeds=2)
    assert found["eager"]["value"] <= 1e-5, found
    assert found["eager"]["gradient"] <= torch.finfo(dtype).eps, found
    for what, error in found["eager"].items():
        # Plain torch overflows to NaN in float16, which is no better than any error.
        assert not error > 2 * found["plain"][what], (what, found)


# torch has no cdist in half precision: with a memory the absolute bounds stand alone.
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["memory", "distance", "cosine"])
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


# --- the Triton kernels ----------------------------------------------------------------------------------------------


def gammas(batch: int, num_centroid: int, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    result = []
    for factor in (0.0, noise):
        features = normal(batch, 60, seed=1) + factor * normal(batch, 60, seed=3)
        memory = normal(num_centroid, 60, seed=2) + factor * normal(num_centroid, 60, seed=4)
        result.append(gram(features.double(), memory.double() if num_centroid else None, backend="reference"))
    return result[0], result[1]


@on_triton
@pytest.mark.parametrize(
    "sizes", [(4, 3), (5, 1), (1, 1), (33, 34), (33, 0), (1, 5), (0, 4), (1, 0), (2, 40), (0, 0)], ids=str
)
def test_kernels_match_the_formula(sizes: tuple[int, int]) -> None:
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


@on_triton
@pytest.mark.parametrize("offset", [0.0, 30.0], ids=["at right angles", "in one direction"])
def test_kernels_keep_the_digits_of_cosines(offset: float) -> None:
    """1 - cos hides a cosine of 0.01 behind the rounding of 1, as the cosine hides a distance of 0.001."""
    features, memory, first, second = (
        normal(rows, 8192, seed=rows, offset=0.0).double() for rows in (16, 40, 17, 41)
    )
    teacher_features, teacher_memory = features + first[:16], memory + 0.5 * second[:40]
    student = gram(features + offset, memory + offset, backend="reference").requires_grad_()
    teacher = gram(teacher_features + offset, teacher_memory + offset, backend="reference")
    (expected,) = torch.autograd.grad(structure(student, teacher, 40, backend="eager").cosine, student)
    rounded = student.detach().float().requires_grad_()
    value = structure(rounded, teacher.float(), 40, backend="triton").cosine
    (gradient,) = torch.autograd.grad(value, rounded)
    assert relative_error(gradient, expected) < 5e-6


@on_triton
def test_kernels_of_zero_vectors_and_equal_points() -> None:
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


@on_triton
def test_kernels_pass_no_gradient_through_a_distance_of_zero() -> None:
    """With whole numbers all entries of Gamma are exact, and so is a distance of 0."""
    memory = torch.tensor([[2.0, 0.0, 4.0], [0.0, 2.0, 0.0]], device=DEVICE)
    features = torch.tensor([[2.0, 0.0, 4.0], [4.0, 6.0, 0.0]], device=DEVICE)
    student = gram(features, memory, backend="eager").float().requires_grad_()
    teacher = gram(2 * features, memory, backend="eager").float()
    structure(student, teacher, 2, backend="triton").distance.backward()
    truth = student.detach().clone().requires_grad_()
    structure(truth, teacher, 2, backend="eager").distance.backward()
    assert_close(student.grad, truth.grad, 1e-5)  # type: ignore[arg-type]


@on_triton
def test_kernels_of_a_distance_rounded_below_zero() -> None:
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


@on_triton
def test_kernels_launched(launches: list[str]) -> None:
    student, teacher = (x.float() for x in gammas(4, 3))
    structure(student.requires_grad_(), teacher, 3, backend="triton").cosine.backward()
    assert launches == ["_structure_stats_kernel", "_structure_grad_kernel", "_structure_bwd_kernel"]


@on_triton
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_centroid", [0, 5])
def test_kernels_of_inter_structure_match_the_formula(num_centroid: int, masked: bool) -> None:
    mask = kept_mask("ragged", 6, 7) if masked else None
    inputs = [outliers(6, 7, 32, seed=1), outliers(6, 7, 32, seed=2)]
    inputs = [poison(x, mask) for x in inputs]
    memories = [outliers(num_centroid, 240, seed=3), outliers(num_centroid, 240, seed=4)]
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        student, teacher = (x.to(dtype, copy=True) for x in inputs)
        memory, teacher_memory = (x.to(dtype, copy=True) for x in memories)
        student.requires_grad_()
        memory.requires_grad_()
        pair = (memory, teacher_memory) if num_centroid else (None, None)
        values = inter_structure(student, teacher, pair[0], pair[1], mask, backend=backend)
        (values.local + 2 * values.memory + 0.3 * values.distance + 5 * values.cosine).backward()
        results.append((torch.stack(values), student.grad, memory.grad))
    assert_close(results[0][0], results[1][0], 1e-4)
    assert_close(results[0][1], results[1][1].nan_to_num(0.0), 1e-4)  # type: ignore[union-attr, arg-type]
    if num_centroid:
        assert_close(results[0][2], results[1][2], 1e-4)  # type: ignore[arg-type]


# --- bad input -------------------------------------------------------------------------------------------------------


X = bert_features(3, 4, 5, dtype=torch.float32)
MEMORY = centroids(2, 4, 5, dtype=torch.float32)
GAMMA = gram(X, MEMORY)

ERRORS: list[tuple[Function, type[Exception], str]] = [
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


@pytest.mark.parametrize("teacher", [X[:, :3], X.flatten(1)])
def test_the_teacher_has_the_tokens_of_the_mask(teacher: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"teacher: expected \[B, S, D\] with S = 4 like the mask, got \[3, "
    ):
        inter_structure(X, teacher, mask=torch.ones(3, 4, dtype=torch.bool))
