"""``intra_cka``: linear CKA between the tokens of student and teacher, sample by sample [paper, eq. 6].

``intra_cka(student, teacher, mask)`` returns 1 - CKA and -log CKA for every layer pair and sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsd_kernels._backend import implementation, resolve_backend
from fsd_kernels._checks import check_features, check_mask, check_same_device
from fsd_kernels._numerics import compute_dtype
from fsd_kernels._op import op, run_reference


class IntraCKA(NamedTuple):
    """The values of ``intra_cka``, [P, B] each: P layer pairs, B samples."""

    one_minus_cka: Tensor
    """1 - CKA, in [0, 1]."""
    neg_log: Tensor
    """-log CKA, in [0, -log 1e-8]."""


@op(
    "intra_cka_backward",
    fake=lambda students, *_: [
        torch.empty_like(student, memory_format=torch.contiguous_format) for student in students
    ],
)
def _backward(
    students: Sequence[Tensor],
    mask: Tensor | None,
    gradient: Tensor,
    neg_log: Tensor,
    d_one_minus_cka: Tensor | None,
    d_neg_log: Tensor | None,
    backend: str,
) -> list[Tensor]:
    run = implementation("intra_cka", backend).backward
    return run(students, mask, gradient, neg_log, d_one_minus_cka, d_neg_log)


def _fake_forward(students: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, rows = students[0].shape[:2]
    dtype = compute_dtype(students[0])
    values = students[0].new_empty((len(students), batch), dtype=dtype)
    gradient = students[0].new_empty((len(students), batch, rows, rows), dtype=dtype)
    return values, torch.empty_like(values), gradient


@op("intra_cka_forward", fake=_fake_forward)
def _forward(
    students: Sequence[Tensor], teachers: Sequence[Tensor], mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation("intra_cka", backend).forward(students, teachers, mask)


def _keep(inputs: Sequence[Any], outputs: Sequence[Tensor]) -> Sequence[Any]:
    students, _, mask, backend = inputs
    _, neg_log, gradient = outputs
    return neg_log, gradient, mask, backend, *students


def _gradients(
    kept: Sequence[Any], needs: Sequence[Any], d_one_minus_cka: Tensor | None, d_neg_log: Tensor | None
) -> Sequence[list[Tensor]]:
    neg_log, gradient, mask, backend, *students = kept
    return [_backward(students, mask, gradient, neg_log, d_one_minus_cka, d_neg_log, backend)]


_forward.differentiable(_keep, _gradients, outputs=2)


def _as_layers(name: str, features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    layers = [features] if isinstance(features, Tensor) else list(features)
    if not layers:
        raise ValueError(f"{name}: expected at least one layer, got an empty sequence")
    for i, layer in enumerate(layers):
        check_features(f"{name}[{i}]" if len(layers) > 1 else name, layer, 3, "[B, S, D]")
    return layers


def intra_cka(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> IntraCKA:
    """Linear CKA between the tokens of student and teacher, for every layer pair and sample.

    CKA = <K_T, K_S> / (|K_T| |K_S|) with K_T and K_S the centred S x S Gram matrices of the teacher's and the student's
    token features [paper, eq. 4-6]. A sample without structure on either side (fewer than two kept rows, or rows equal
    up to rounding) has 1 - CKA 0, -log CKA 0 and gradient 0. A kept feature that is NaN or infinite, or so large that
    squares overflow (about 1e19 in float32), makes the sample's values and gradient NaN, never 0.

    Args:
        student: [B, S, D_s], or P such tensors (layers), all with the same B, S, dtype and device. Differentiable.
        teacher: [B, S, D_t], or as many. A constant: no gradient flows into it.
        mask: [B, S], 1 = keep. Dropped rows touch neither value nor gradient, whatever they hold.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        ``IntraCKA(one_minus_cka, neg_log)``: 1 - CKA and -log CKA, [P, B], float32 (float64 for float64 input).

    Raises:
        TypeError: An argument is not a floating tensor, or the mask is neither boolean nor integer.
            A layer's dtype differs from the others of its side.
        ValueError: Shapes, devices or the numbers of layers do not fit.
        RuntimeError: ``backend="triton"`` where it cannot run.
    """
    students, teachers = _as_layers("student", student), _as_layers("teacher", teacher)
    if len(students) != len(teachers):
        raise ValueError(f"teacher: expected {len(students)} layers like the student, got {len(teachers)}")
    batch, rows = students[0].shape[:2]
    for name, layers in (("student", students), ("teacher", teachers)):
        for i, layer in enumerate(layers):
            if layer.shape[:2] != (batch, rows):
                raise ValueError(
                    f"{name}[{i}]: expected [{batch}, {rows}, D] like student[0], got {list(layer.shape)}"
                )
            if layer.dtype != layers[0].dtype:
                raise TypeError(f"{name}[{i}]: expected {layers[0].dtype} like {name}[0], got {layer.dtype}")
    named = [("student", layer) for layer in students] + [("teacher", layer) for layer in teachers]
    device = check_same_device(named)
    kept = check_mask(mask, batch, rows, device)
    teachers = [layer.detach() for layer in teachers]
    chosen = resolve_backend(backend, device, "intra_cka")
    if chosen == "reference":
        return IntraCKA(*run_reference("intra_cka", "forward", students, teachers, kept))
    one_minus_cka, neg_log, _ = _forward(students, teachers, kept, chosen)
    return IntraCKA(one_minus_cka, neg_log)
