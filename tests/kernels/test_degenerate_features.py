"""Features that are not finite, that vanish, or that coincide: what every backend makes of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fsd_kernels import gram, inter_structure, intra_cka
from tests.interpreted import DEVICE
from tests.kernel_cases import bert_features, centroids, ragged_mask, relative_error

TRITON = pytest.param("triton", marks=pytest.mark.triton)
BACKENDS = ("reference", "eager", TRITON)
B, S, D, D_T, K = 4, 6, 8, 12, 3
# Its square overflows float32.
HUGE = 1e20

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((backend, dtype) for backend in ("reference", "eager") for dtype in (torch.float32, torch.float64)),
        pytest.param("triton", torch.float32, marks=pytest.mark.triton),
    ],
)


def device_of(backend: str) -> torch.device:
    return DEVICE if backend == "triton" else torch.device("cpu")


def inputs(backend: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student [B, S, D], teacher [B, S, D_t] and their memories, on the device of the backend."""
    made = (
        bert_features(B, S, D, seed=seed),
        bert_features(B, S, D_T, seed=seed + 1),
        centroids(K, S, D, seed=seed),
        centroids(K, S, D_T, seed=seed),
    )
    return tuple(x.to(device_of(backend), dtype) for x in made)  # type: ignore[return-value]


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(True)


@every_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("masked", [False, True])
def test_intra_cka_of_what_is_not_finite_is_nan(backend, dtype, bad, side, masked):
    student, teacher, _, _ = inputs(backend, dtype)
    mask = ragged_mask(B, S, lengths=[6, 4, 3, 5]).to(device_of(backend)) if masked else None
    good = leaf(student)
    whole = intra_cka(good, teacher, mask, backend=backend)
    whole.neg_log.sum().backward()
    (student if side == "student" else teacher)[1, 2, 3] = bad
    spoilt = leaf(student)
    found = intra_cka(spoilt, teacher, mask, backend=backend)
    found.neg_log.sum().backward()
    others = [0, 2, 3]
    for value, before in zip(found, whole, strict=True):
        assert bool(value[0, 1].isnan())
        torch.testing.assert_close(value[0, others], before[0, others])
    torch.testing.assert_close(spoilt.grad[others], good.grad[others])
    kept = 6 if mask is None else 4
    assert bool(spoilt.grad[1, :kept].isnan().all())
    assert not bool(spoilt.grad[1, kept:].any()), "a dropped position has no gradient"


def is_right_or_not_finite(value, gradient, true_value, true_gradient):
    """What overflows may be right all the same; it is never a finite number that is wrong."""
    if bool(value.isfinite()):
        torch.testing.assert_close(value.double(), true_value, rtol=1e-3, atol=1e-6)
        if bool(gradient.isfinite().all()):
            # By its norm: what a huge sample leaves of the others' gradients is rounding of its own.
            assert relative_error(gradient, true_gradient) < 1e-2
    else:
        assert not bool(gradient.isfinite().any())


@every_backend
@pytest.mark.parametrize("scale", [1e15, 1e17, 1e18, 1e19, HUGE, 1e30])
@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("side", [0, 1])
def test_huge_features_are_right_or_not_finite(backend, scale, one, side):
    features = inputs(backend, torch.float32)
    if one:
        features[side][1, 2, 3] = scale
    else:
        features[side][:] *= scale
    student, teacher, memory, teacher_memory = features
    results = []
    for kind in (torch.float32, torch.float64):
        spoilt = leaf(student.to(kind))
        chosen = backend if kind == torch.float32 else "reference"
        intra = intra_cka(spoilt, teacher.to(kind), backend=chosen).neg_log[0, 1]
        between = inter_structure(
            spoilt, teacher.to(kind), memory.to(kind), teacher_memory.to(kind), backend=chosen
        )
        values = [intra, between.local, between.distance, between.cosine]
        results.append([(v, torch.autograd.grad(v, spoilt, retain_graph=True)[0]) for v in values])
    for i, ((value, gradient), (true_value, true_gradient)) in enumerate(zip(*results, strict=True)):
        if i == 0:
            gradient, true_gradient = gradient[1], true_gradient[1]
        if i == 3 and backend != "reference":
            # Vectors more than 1024 times shorter than others count as zero vectors: a cosine of 0, no gradient.
            assert not bool(value.isfinite()) or 0 <= float(value) <= 1.5
            if bool(value.isfinite() and gradient.isfinite().all()):
                # A teacher's cosine that counts as 0 leaves the student a larger error to follow.
                assert float(gradient.norm()) <= (1.1 * float(true_gradient.norm()) if side == 0 else 1e-3)
            continue
        is_right_or_not_finite(value, gradient, true_value, true_gradient)


@every_backend
def test_cosines_with_vectors_far_shorter_count_as_those_with_zero_vectors(backend):
    if backend == "reference":
        pytest.skip("the formula itself has no such limit")
    student, teacher, memory, teacher_memory = inputs(backend, torch.float32)
    expected = inter_structure(
        torch.zeros_like(student).double(),
        teacher.double(),
        memory.double(),
        teacher_memory.double(),
        backend="reference",
    ).cosine
    for scale in (1e5, 1e15):
        scaled = leaf(student * scale)
        value = inter_structure(scaled, teacher, memory, teacher_memory, backend=backend).cosine
        value.backward()
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)
        assert not bool(scaled.grad.any())
    near = inter_structure(student * 300, teacher, memory, teacher_memory, backend=backend).cosine
    truth = inter_structure(
        *(x.double() for x in (student * 300, teacher, memory, teacher_memory)), backend="reference"
    ).cosine
    torch.testing.assert_close(near.double(), truth, rtol=0, atol=1e-3)


@every_backend
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_one_kept_token_that_is_not_finite_is_no_missing_structure(backend, side):
    student, teacher, _, _ = inputs(backend, torch.float32)
    mask = ragged_mask(B, S, lengths=[6, 1, 3, 5]).to(device_of(backend))
    (student if side == "student" else teacher)[1, 0, 0] = math.nan
    spoilt = leaf(student)
    found = intra_cka(spoilt, teacher, mask, backend=backend)
    assert bool(found.neg_log[0, 1].isnan())
    assert bool(found.one_minus_cka[0, 1].isnan())
    # The same token, dropped, is of no account.
    mask[1, 0] = 0
    assert float(intra_cka(student, teacher, mask, backend=backend).neg_log[0, 1]) == 0


@every_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("side", "spoilt_values"),
    [
        ("student", {"local", "distance", "cosine"}),
        ("teacher", {"local", "distance", "cosine"}),
        ("student_memory", {"memory", "distance", "cosine"}),
        ("teacher_memory", {"memory", "distance", "cosine"}),
    ],
)
def test_between_samples_what_is_not_finite_is_nan(backend, dtype, bad, side, spoilt_values):
    names = ("student", "teacher", "student_memory", "teacher_memory")
    tensors = dict(zip(names, inputs(backend, dtype), strict=True))
    target = tensors[side]
    target[(1, 2, 3) if target.ndim == 3 else (1, 19)] = bad
    mask = ragged_mask(B, S, lengths=[6, 4, 3, 5]).to(device_of(backend))
    for name in spoilt_values:
        student, memory = leaf(tensors["student"]), leaf(tensors["student_memory"])
        found = inter_structure(
            student, tensors["teacher"], memory, tensors["teacher_memory"], mask, backend=backend
        )
        value = getattr(found, name)
        assert not bool(value.isfinite()), name
        if math.isnan(bad):
            assert bool(value.isnan()), name
        value.backward()
        gradient = memory.grad if name == "memory" else student.grad[mask.bool()]
        assert not bool(gradient.isfinite().any()), name
        assert not bool(student.grad[~mask.bool()].any()) if student.grad is not None else True


@every_backend
@pytest.mark.parametrize("side", [0, 1])
def test_local_structure_without_a_memory(backend, side):
    student, teacher, _, _ = inputs(backend, torch.float32)
    (student, teacher)[side][2, 1, 1] = math.nan
    spoilt = leaf(student)
    value = inter_structure(spoilt, teacher, backend=backend).local
    value.backward()
    assert bool(value.isnan())
    assert bool(spoilt.grad.isnan().all())


@every_backend
def test_gamma_of_what_is_not_finite_is_nan(backend):
    student, _, memory, _ = inputs(backend, torch.float32)
    student[0, 0, 0] = math.nan
    assert bool(gram(student, memory, backend=backend).isnan().any())


def global_gradient(backend, student, teacher, memory, teacher_memory, name):
    """Value of a term of L_G and its gradients in the student's features and memory."""
    student_leaf, memory_leaf = leaf(student), leaf(memory)
    value = getattr(
        inter_structure(student_leaf, teacher, memory_leaf, teacher_memory, backend=backend), name
    )
    value.backward()
    return value.detach().double(), student_leaf.grad.double(), memory_leaf.grad.double()


@every_dtype
@pytest.mark.parametrize("name", ["distance", "cosine"])
@pytest.mark.parametrize(
    "kind", ["a zero sample", "a zero centroid", "all zero", "a sample that is a centroid"]
)
def test_norms_and_distances_that_vanish(backend, dtype, name, kind):
    # The rounding of a norm that is 0 was taken for a norm in a third of draws: the gradient was 1e5 times too large.
    for seed in range(12):
        student, teacher, memory, teacher_memory = inputs(backend, dtype, seed)
        if kind == "a zero sample":
            student[1] = 0
        elif kind == "a zero centroid":
            memory[1] = 0
        elif kind == "all zero":
            student.zero_()
            memory.zero_()
        else:
            student[1] = memory[2].view(S, D)
        truth = global_gradient(
            "reference", student.double(), teacher.double(), memory.double(), teacher_memory.double(), name
        )
        found = global_gradient(backend, student, teacher, memory, teacher_memory, name)
        # A norm is known to about the square root of its square's rounding.
        tolerance = 1e-6 if dtype == torch.float64 else 2e-2
        for value, wanted in zip(found, truth, strict=True):
            assert bool(value.isfinite().all())
            torch.testing.assert_close(
                value, wanted, rtol=tolerance, atol=tolerance * max(1e-9, float(wanted.abs().max()))
            )


@every_backend
@pytest.mark.parametrize("op", ["intra", "inter", "gram"])
def test_masks_are_booleans_or_ones_and_zeros(backend, op):
    student, teacher, _, _ = inputs(backend, torch.float32)
    kept = ragged_mask(B, S, lengths=[6, 4, 3, 5]).to(device_of(backend))

    def value(mask):
        if op == "intra":
            return intra_cka(student, teacher, mask, backend=backend).neg_log
        if op == "inter":
            return inter_structure(student, teacher, mask=mask, backend=backend).local
        return gram(student, mask=mask, backend=backend)

    for mask in (kept.bool(), kept.int(), kept.to(torch.uint8)):
        assert torch.equal(value(mask), value(kept))
    additive = (1 - kept.float()) * -1e9
    for mask in (kept.float(), kept.half(), additive):
        with pytest.raises(TypeError, match=r"mask: expected booleans or integers, 1 = keep and 0 = drop"):
            value(mask)
    if device_of(backend).type == "cpu":
        with pytest.raises(
            ValueError, match=r"mask: expected 1 = keep and 0 = drop, got values from -10000 to 0"
        ):
            value((1 - kept) * -10000)
