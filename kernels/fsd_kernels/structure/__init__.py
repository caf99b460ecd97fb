"""``structure``: every between-sample loss, read off two small Gamma matrices; ``inter_structure``: from features.

L_L compares the samples of a batch with each other; F_MM the centroids of two memories with each other; F^E
and F^C each sample with each centroid. All four are sums over entries of Gamma (``fsd_kernels.gram``), so
the features are read once forward and once backward, whichever of the four are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsd_kernels._backend import implementation, resolve_backend, without_autocast
from fsd_kernels._checks import check_features, check_same_device
from fsd_kernels._direct import may_call_directly
from fsd_kernels._numerics import compute_dtype, norm_rounding
from fsd_kernels._saved import save, saved
from fsd_kernels.gram import GramBasis, check_memory, fake_gamma, fake_gradients, flatten_features


class InterStructure(NamedTuple):
    """The between-sample structures; scalars, float32 (float64 for float64 features)."""

    local: Tensor
    """L_L = -log CKA of the batch's samples."""
    memory_cka: Tensor
    """F_MM = -log CKA of the two memories."""
    distance: Tensor
    """F^E = mean (d_T - d_S)^2 over samples and centroids, d the Euclidean distance."""
    cosine: Tensor
    """F^C = the same with the cosine similarity."""


@torch.library.custom_op("fsd_kernels::structure_forward", mutates_args=())
def _forward(student: Tensor, teacher: Tensor, num_centroid: int, backend: str) -> tuple[Tensor, Tensor]:
    rounding = norm_rounding(student.dtype)
    return implementation("structure", backend).forward(student, teacher, num_centroid, rounding)


@_forward.register_fake
def _(student: Tensor, teacher: Tensor, num_centroid: int, backend: str) -> tuple[Tensor, Tensor]:
    return student.new_empty(4), student.new_empty((4, *student.shape))


@torch.library.custom_op("fsd_kernels::structure_backward", mutates_args=())
def _backward(gradients: Tensor, d_values: Tensor, backend: str) -> Tensor:
    with without_autocast(gradients.device):
        return implementation("structure", backend).backward(gradients, d_values)


@_backward.register_fake
def _(gradients: Tensor, d_values: Tensor, backend: str) -> Tensor:
    return gradients.new_empty(gradients.shape[1:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.backend = inputs[3]
    ctx.mark_non_differentiable(output[1])
    # Or the backward would be given zeros for the gradient of the gradients.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _autograd(ctx: Any, d_values: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None]:
    if d_values is None:
        return None, None, None, None
    (gradients,) = ctx.saved_tensors
    return _backward(gradients, d_values, ctx.backend), None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def structure(
    student: Tensor, teacher: Tensor, num_centroid: int = 0, *, backend: str | None = None
) -> InterStructure:
    """L_L, F_MM, F^E and F^C of two Gamma matrices as ``gram`` returns them [paper, eq. 7-10].

    Where a block has no structure (fewer than two rows, or rows equal up to rounding) its -log CKA is 0 with
    gradient 0. A Euclidean distance of 0 passes no gradient; the cosine with the zero vector is 0 and passes none.
    A squared norm or distance is 0 up to 64 eps of the sum of the absolute terms that it is computed from, and so is a
    cosine of vectors whose lengths differ by more than 2^-13 / eps (1024 times in float32). NaN, infinity and what
    overflows make value and gradient NaN.

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
    """
    check_features("student", student, 2, "[N, N]")
    check_features("teacher", teacher, 2, "[N, N]")
    least = num_centroid + 2 if num_centroid else 1
    if student.shape[0] != student.shape[1] or student.shape[0] < least:
        raise ValueError(f"student: expected [N, N] with N >= {least}, got {list(student.shape)}")
    if teacher.shape != student.shape or teacher.dtype != student.dtype:
        raise ValueError(
            f"teacher: expected {list(student.shape)} {student.dtype} like the student, "
            f"got {list(teacher.shape)} {teacher.dtype}"
        )
    check_same_device([("student", student), ("teacher", teacher)])
    teacher = teacher.detach()
    chosen = resolve_backend(backend, student.device, "structure")
    if chosen == "reference":
        with without_autocast(student.device):
            return InterStructure(
                *implementation("structure", chosen).forward(student, teacher, num_centroid)
            )
    return InterStructure(*_forward(student, teacher, num_centroid, chosen)[0].unbind())


def _run_inter_forward(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor | None,
    teacher_memory: Tensor | None,
    teacher_gram: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    gamma = implementation("gram", backend).forward
    with without_autocast(student.device):
        given = gamma(teacher, teacher_memory, teacher_gram, mask)
        own = gamma(student, student_memory, None, mask)
        num_centroid = 0 if student_memory is None else student_memory.shape[0]
        values, gradients = implementation("structure", backend).forward(
            own, given.to(own.dtype), num_centroid, norm_rounding(compute_dtype(student))
        )
    return values.to(compute_dtype(student)), gradients


_inter_forward = torch.library.custom_op(
    "fsd_kernels::inter_structure_forward", _run_inter_forward, mutates_args=()
)


@_inter_forward.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor | None,
    teacher_memory: Tensor | None,
    teacher_gram: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    gamma = fake_gamma(student, student_memory, backend)
    return student.new_empty(4, dtype=compute_dtype(student)), gamma.new_empty((4, *gamma.shape))


def _run_inter_backward(
    gradients: Tensor,
    d_values: Tensor,
    student: Tensor,
    student_memory: Tensor | None,
    mask: Tensor | None,
    need_student: bool,
    need_memory: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with without_autocast(student.device):
        d_gamma = implementation("structure", backend).backward(gradients, d_values)
        return implementation("gram", backend).backward(
            student, student_memory, mask, d_gamma, (need_student, need_memory)
        )


_inter_backward = torch.library.custom_op(
    "fsd_kernels::inter_structure_backward", _run_inter_backward, mutates_args=()
)


@_inter_backward.register_fake
def _(
    gradients: Tensor,
    d_values: Tensor,
    student: Tensor,
    student_memory: Tensor | None,
    mask: Tensor | None,
    need_student: bool,
    need_memory: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return fake_gradients(student, student_memory, need_student, need_memory)


def _inter_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, _, student_memory, _, _, mask, backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.backend = backend
    save(ctx, output[1], student, student_memory, mask)


def _inter_autograd(
    ctx: Any, d_values: Tensor | None, _: None, run: Callable[..., tuple[Tensor, Tensor]] = _inter_backward
) -> tuple[Tensor | None, ...]:
    if d_values is None:
        return (None,) * 7
    gradients, student, memory, mask = saved(ctx)
    needs = (ctx.needs_input_grad[0], memory is not None and ctx.needs_input_grad[2])
    d_student, d_memory = run(gradients, d_values, student, memory, mask, *needs, ctx.backend)
    return d_student if needs[0] else None, None, d_memory if needs[1] else None, None, None, None, None


_inter_forward.register_autograd(_inter_autograd, setup_context=_inter_setup_context)


class _DirectInter(torch.autograd.Function):
    """The op without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _run_inter_forward(*inputs)
        _inter_setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, d_values: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        # Where a second derivative may be asked for, the registered op refuses it.
        return _inter_autograd(
            ctx, d_values, _, _inter_backward if torch.is_grad_enabled() else _run_inter_backward
        )


def _flat(name: str, features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As ``flatten_features``, with errors that name the student's or the teacher's features."""
    ndim = 2 if isinstance(features, Tensor) and features.ndim == 2 else 3
    check_features(name, features, ndim, "[B, S, D] or [B, F]")
    return flatten_features(features, mask)


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
        student_memory: [K, F] with F >= S * D_s, differentiable; features narrower than it end in zeros.
        teacher_memory: [K, F] with F >= S * D_t, a constant; a ``GramBasis`` saves its own block.
        mask: [B, S], 1 = keep. Dropped positions count as zeros, whatever they hold.
        backend: "auto", "triton", "eager" or "reference" (the paper's formulas on the features themselves).

    Returns:
        ``InterStructure``; without memories its last three are 0. A kept feature that is NaN or infinite, or so large
        that squares overflow (about 1e19 in float32), makes value and gradient NaN, never 0.

    Raises:
        TypeError: An argument is not a floating tensor, or the mask is neither boolean nor integer.
        ValueError: Shapes or devices do not fit, or only one memory is given.
    """
    own, kept = _flat("student", student, mask)
    given, _ = _flat("teacher", teacher, mask)
    if own.shape[0] != given.shape[0]:
        raise ValueError(f"teacher: expected {own.shape[0]} samples like the student, got {given.shape[0]}")
    if (student_memory is None) != (teacher_memory is None):
        raise ValueError("student_memory, teacher_memory: expected both or neither")
    check_same_device([("student", own), ("teacher", given)])
    rows, known = None, None
    if student_memory is not None and teacher_memory is not None:
        student_memory, _ = check_memory("student_memory", student_memory, "student", own)
        rows, known = check_memory("teacher_memory", teacher_memory, "teacher", given)
        if rows.shape[0] != student_memory.shape[0]:
            raise ValueError(
                f"teacher_memory: expected {student_memory.shape[0]} centroids like student_memory, "
                f"got {rows.shape[0]}"
            )
        rows = rows.detach()
    chosen = resolve_backend(backend, student.device, "structure")
    if chosen == "reference":
        reference = implementation("structure", chosen)
        with without_autocast(student.device):
            return InterStructure(*reference.inter_structure(own, given.detach(), student_memory, rows, kept))
    # One op for what ``gram`` and ``structure`` do in three: calling one costs as much as a small batch's products.
    inputs = own, given.detach(), student_memory, rows, known, kept
    forward = _DirectInter.apply if may_call_directly(inputs) else _inter_forward
    values, _ = forward(*inputs, chosen)
    return InterStructure(*values.unbind())
