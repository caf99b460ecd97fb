"""The between-sample structures: ``inter_structure`` of features, ``structure`` of two Gamma matrices.

L_L compares the samples of a batch with each other, F_MM the centroids of two memories with each other, and F^E and F^C
each sample with each centroid. All four are sums over entries of Gamma (``fsd_kernels.gram``): one Gram matrix
of each side forward and one product backward serve all of them.

``inter_structure`` runs ``gram`` of both sides and ``structure`` as one op, because each further op costs as much as
the products of a small batch. ``structure`` serves features that no process holds whole: Gamma of all features is the
sum of the Gammas of slices along F, whichever process computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fsd_kernels._backend import implementation, resolve_backend
from fsd_kernels._checks import check_features, check_flat_mask, check_same_device, flatten_features
from fsd_kernels._numerics import compute_dtype, norm_rounding
from fsd_kernels._op import op, run_reference
from fsd_kernels.gram.api import GramBasis, check_memory, gamma_like, gradients_like


class InterStructure(NamedTuple):
    """The between-sample structures; scalars, float32 (float64 for float64 features)."""

    local: Tensor
    """L_L = -log CKA of the batch's samples."""
    memory: Tensor
    """F_MM = -log CKA of the two memories."""
    distance: Tensor
    """F^E = mean (d_S - d_T)^2 over samples and centroids, d the Euclidean distance."""
    cosine: Tensor
    """F^C = the same with the cosine similarity."""


@op(
    "structure_backward",
    fake=lambda gradients, _d_values, _backend: gradients.new_empty(gradients.shape[1:]),
)
def _backward(gradients: Tensor, d_values: Tensor, backend: str) -> Tensor:
    return implementation("structure", backend).backward(gradients, d_values)


@op(
    "structure_forward",
    fake=lambda student, *_: (student.new_empty(4), student.new_empty((4, *student.shape))),
)
def _forward(student: Tensor, teacher: Tensor, num_centroid: int, backend: str) -> tuple[Tensor, Tensor]:
    rounding = norm_rounding(student.dtype)
    return implementation("structure", backend).forward(student, teacher, num_centroid, rounding)


_forward.differentiable(
    keep=lambda inputs, outputs: (outputs[1], inputs[3]),
    gradients=lambda kept, needs, d_values: [_backward(kept[0], d_values, kept[1])],
)


def structure(
    student: Tensor, teacher: Tensor, num_centroid: int = 0, *, backend: str | None = None
) -> InterStructure:
    """L_L, F_MM, F^E and F^C of two Gamma matrices as ``gram`` returns them [paper, eq. 7-10].

    A block without structure (fewer than two rows, or rows equal up to rounding) has -log CKA 0 with gradient 0. A
    Euclidean distance of 0 passes no gradient; the cosine with the zero vector is 0 and passes none. A squared norm or
    distance counts as 0 up to 64 eps of the sum of the absolute terms that it is computed from. A cosine counts as 0 if
    the lengths of its vectors differ by more than 2^-13 / eps (1024 times in float32). NaN, infinity and what overflows
    make value and gradient NaN.

    Args:
        student: [N, N], float32 or float64, symmetric, N = (num_centroid + 1) + (B + 1), or B + 1 without
            centroids. Differentiable.
        teacher: [N, N], a constant.
        num_centroid: K, the rows of the memories that the matrices were made with; 0: no memory.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        ``InterStructure``; without centroids its last three are 0.

    Raises:
        TypeError: A matrix is not a floating tensor.
        ValueError: Shapes or devices do not fit.
        RuntimeError: ``backend="triton"`` where it cannot run.
    """
    check_features("student", student, 2, "[N, N]")
    check_features("teacher", teacher, 2, "[N, N]")
    minimum = num_centroid + 2 if num_centroid else 1
    if student.shape[0] != student.shape[1] or student.shape[0] < minimum:
        raise ValueError(f"student: expected [N, N] with N >= {minimum}, got {list(student.shape)}")
    if teacher.shape != student.shape or teacher.dtype != student.dtype:
        raise ValueError(
            f"teacher: expected {list(student.shape)} {student.dtype} like the student, "
            f"got {list(teacher.shape)} {teacher.dtype}"
        )
    check_same_device([("student", student), ("teacher", teacher)])
    teacher = teacher.detach()
    chosen = resolve_backend(backend, student.device, "structure")
    if chosen == "reference":
        return InterStructure(*run_reference("structure", "forward", student, teacher, num_centroid))
    values, _ = _forward(student, teacher, num_centroid, chosen)
    return InterStructure(*values.unbind())


@op(
    "inter_structure_backward",
    fake=lambda _gradients, _d_values, student, memory, _mask, need_student, need_memory, _backend: (
        gradients_like(student, memory, need_student, need_memory)
    ),
)
def _inter_backward(
    gradients: Tensor,
    d_values: Tensor,
    student: Tensor,
    student_memory: Tensor | None,
    mask: Tensor | None,
    need_student: bool,
    need_memory: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    needs = need_student, need_memory
    return implementation("gram", backend).backward(student, student_memory, mask, gradients, d_values, needs)


def _fake_inter_forward(
    student: Tensor, student_memory: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    gamma = gamma_like(student, student_memory, backend=others[-1])
    return student.new_empty(4, dtype=compute_dtype(student)), gamma.new_empty((4, *gamma.shape))


@op("inter_structure_forward", fake=_fake_inter_forward)
def _inter_forward(
    student: Tensor,
    student_memory: Tensor | None,
    teacher: Tensor,
    teacher_memory: Tensor | None,
    teacher_gram: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    gram, structure = implementation("gram", backend), implementation("structure", backend)
    sides = [(student, student_memory, None), (teacher, teacher_memory, teacher_gram)]
    student_gamma, teacher_gamma = gram.forward(sides, mask)
    dtype = compute_dtype(student)
    num_centroid = 0 if student_memory is None else student_memory.shape[0]
    values, gradients = structure.forward(
        student_gamma, teacher_gamma.to(student_gamma.dtype), num_centroid, norm_rounding(dtype)
    )
    return values.to(dtype), gradients


def _keep_inter(inputs: Sequence[Any], outputs: Sequence[Tensor]) -> Sequence[Any]:
    student, student_memory, _, _, _, mask, backend = inputs
    return outputs[1], student, student_memory, mask, backend


def _inter_gradients(kept: Sequence[Any], needs: Sequence[bool], d_values: Tensor) -> Sequence[Tensor]:
    gradients, student, student_memory, mask, backend = kept
    return _inter_backward(gradients, d_values, student, student_memory, mask, *needs, backend)


_inter_forward.differentiable(_keep_inter, _inter_gradients, leaves=2)


def inter_structure(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor | None = None,
    teacher_memory: Tensor | GramBasis | None = None,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> InterStructure:
    """L_L, F_MM, F^E and F^C of the features of a batch [paper, eq. 7-10].

    Args:
        student: [B, S, D_s] (or [B, F_s]), differentiable.
        teacher: [B, S, D_t] (or [B, F_t]), a constant.
        student_memory: [K, F] with F >= S * D_s, differentiable; narrower features count as padded with zeros.
        teacher_memory: [K, F] with F >= S * D_t, a constant; a ``GramBasis`` saves computing its own block.
        mask: [B, S], 1 = keep. Dropped positions count as zeros, whatever they hold.
        backend: "auto", "triton", "eager" or "reference" (the paper's formulas on the features themselves).

    Returns:
        ``InterStructure``; without memories its last three are 0. "eager" and "triton" read them off Gamma, with the
        limits of ``structure``: short distances and norms, and cosines of vectors of very different lengths, count as
        0; "reference" has none. A kept feature that is NaN or infinite, or so large
        that squares overflow (about 1e19 in float32), makes value and gradient NaN, never 0.

    Raises:
        TypeError: An argument is not a floating tensor, or the mask is neither boolean nor integer.
        ValueError: Shapes or devices do not fit, or only one memory is given.
        RuntimeError: ``backend="triton"`` where it cannot run.
    """
    student_flat = flatten_features("student", student)
    kept = check_flat_mask(mask, "student", student)
    teacher_flat = flatten_features("teacher", teacher).detach()
    if student_flat.shape[0] != teacher_flat.shape[0]:
        raise ValueError(
            f"teacher: expected {student_flat.shape[0]} samples like the student, got {teacher_flat.shape[0]}"
        )
    if kept is not None and (teacher.ndim == 2 or teacher.shape[1] != kept.shape[1]):
        raise ValueError(
            f"teacher: expected [B, S, D] with S = {kept.shape[1]} like the mask, got {list(teacher.shape)}"
        )
    if (student_memory is None) != (teacher_memory is None):
        raise ValueError("student_memory, teacher_memory: expected both or neither")
    check_same_device([("student", student), ("teacher", teacher)])
    teacher_rows, teacher_gram = None, None
    if student_memory is not None and teacher_memory is not None:
        student_memory, _ = check_memory("student_memory", student_memory, "student", student_flat)
        teacher_rows, teacher_gram = check_memory("teacher_memory", teacher_memory, "teacher", teacher_flat)
        if teacher_rows.shape[0] != student_memory.shape[0]:
            raise ValueError(
                f"teacher_memory: expected {student_memory.shape[0]} centroids like student_memory, "
                f"got {teacher_rows.shape[0]}"
            )
        teacher_rows = teacher_rows.detach()
    chosen = resolve_backend(backend, student.device, "structure")
    if chosen == "reference":
        features = student_flat, teacher_flat, student_memory, teacher_rows, kept
        return InterStructure(*run_reference("structure", "inter_structure", *features))
    values, _ = _inter_forward(
        student_flat, student_memory, teacher_flat, teacher_rows, teacher_gram, kept, chosen
    )
    return InterStructure(*values.unbind())
