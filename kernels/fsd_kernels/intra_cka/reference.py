"""Intra-feature CKA, written as the formula reads; any dtype, float64 for truth.

For one sample with W tokens, X [W, D_t] of the teacher and Y [W, D_s] of the student:

    C = I - 1 1^T / W,  K_T = C X X^T C,  K_S = C Y Y^T C
    HSIC(X, Y) = tr(K_T K_S) / (W - 1)^2
    CKA = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y))

Gradients come from autograd. Rows that the mask drops are removed first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Linear CKA is at least 0, and 0 if two structures share nothing: -log needs a floor under it.
CKA_FLOOR = 1e-8


def centering_matrix(rows: int, like: Tensor) -> Tensor:
    """C = I - 1 1^T / n."""
    identity = torch.eye(rows, dtype=like.dtype, device=like.device)
    return identity - torch.ones_like(identity) / rows


def hsic(gram_x: Tensor, gram_y: Tensor) -> Tensor:
    """HSIC = tr(C G_X C C G_Y C) / (n - 1)^2 of two Gram matrices G_X and G_Y [n, n]."""
    rows = gram_x.shape[0]
    centering = centering_matrix(rows, gram_x)
    centred_x = centering @ gram_x @ centering
    centred_y = centering @ gram_y @ centering
    return torch.trace(centred_x @ centred_y) / (rows - 1) ** 2


def has_structure(features: Tensor) -> bool:
    """True for at least two rows that are not equal up to rounding."""
    rows = features.shape[0]
    if rows < 2 or features.shape[1] == 0:
        return False
    mean = features.mean(dim=0, keepdim=True)
    energy = (features - mean).square().sum()
    rounding = (8 * torch.finfo(features.dtype).eps) ** 2 * rows * mean.square().sum()
    return bool(energy > rounding)


def overflows(features: Tensor) -> bool:
    """True if rows hold NaN or infinity, or their fourth powers overflow; results are NaN then."""
    return not bool(features.square().sum().square().isfinite())


def sample_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """CKA of the kept rows of one sample, student [n, D_s] and teacher [n, D_t]; 1 without structure."""
    if overflows(student) or overflows(teacher):
        # NaN for the value and for every gradient.
        return ((student * torch.nan).sum() + (teacher * torch.nan).sum()).reshape(())
    if not (has_structure(student) and has_structure(teacher)):
        return torch.ones((), dtype=student.dtype, device=student.device)
    gram_s, gram_t = student @ student.T, teacher @ teacher.T
    return hsic(gram_t, gram_s) / torch.sqrt(hsic(gram_t, gram_t) * hsic(gram_s, gram_s))


def forward(
    students: Sequence[Tensor], teachers: Sequence[Tensor], mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (1 - CKA, -log CKA), each [P, B], for P layer pairs of [B, S, D] features."""
    pairs = []
    for student, teacher in zip(students, teachers, strict=True):
        values = []
        for i in range(student.shape[0]):
            kept = slice(None) if mask is None else mask[i]
            values.append(sample_cka(student[i][kept], teacher[i][kept].to(student.dtype)))
        pairs.append(torch.stack(values) if values else student.new_zeros(0))
    cka = torch.stack(pairs)
    return 1 - cka, -torch.log(cka.clamp(min=CKA_FLOOR))
