"""Intra-feature CKA from restructured torch operations, with the backward written by hand.

Per layer pair and sample, with the rows centred first (X_c = C X, so that X_c X_c^T = C K C):

    A = K_c / |K_c|,  B = L_c / |L_c|          (Frobenius norms)
    1 - CKA = 1/2 |A - B|^2                     exact where CKA is near 1
    G = d CKA / d L_c = (A - CKA B) / |L_c| = ((A - B) + (1 - CKA) B) / |L_c|
    dY = 2 c G Y_c,   c = dCKA_upstream - dNegLog_upstream / CKA

Two Gram products forward, one product backward; G [P, B, S, S] is kept, the centred features are not.
Arithmetic is in float32 (float64 for float64 features), whatever the features' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CKA_FLOOR = 1e-8

# Samples worked on at once: their centred features should stay in a core's cache.
_CHUNK_ELEMENTS = 1 << 20


def compute_dtype(features: Tensor) -> torch.dtype:
    """float64 for float64 features, float32 for all others."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _chunk(features: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // max(1, features.shape[1] * features.shape[2]))


def _centred(features: Tensor, kept: Tensor | None, count: Tensor | float) -> tuple[Tensor, Tensor]:
    """Centre ``[b, S, D]`` over the kept rows; dropped rows become 0. Returns (centred, |mean|^2 [b])."""
    values = features.to(compute_dtype(features))
    if kept is None:
        mean = values.mean(dim=1, keepdim=True)
        centred = values - mean
    else:
        values = values.masked_fill(~kept, 0.0)
        mean = values.sum(dim=1, keepdim=True) / count
        centred = torch.sub(values, mean).masked_fill_(~kept, 0.0)
    return centred, mean.square().sum(dim=(1, 2))


def _unit_gram(centred: Tensor, mean_energy: Tensor, rows: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (Gram / its Frobenius norm, that norm, whether the rows differ by more than rounding)."""
    gram = torch.bmm(centred, centred.transpose(1, 2))
    energy = gram.diagonal(dim1=1, dim2=2).sum(dim=1)
    rounding = (8 * torch.finfo(centred.dtype).eps) ** 2 * rows * mean_energy
    exists = energy > rounding
    # Dividing by the trace first keeps the fourth powers of the features out of overflow and underflow.
    gram *= torch.where(exists, 1 / energy, 0.0)[:, None, None]
    norm = gram.square().sum(dim=(1, 2)).sqrt()
    gram *= torch.where(exists, 1 / norm, 0.0)[:, None, None]
    return gram, norm * energy, exists


def forward(
    students: Sequence[Tensor], teachers: Sequence[Tensor], mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (1 - CKA [P, B], -log CKA [P, B], G [P, B, S, S])."""
    batch, rows = students[0].shape[:2]
    pairs = len(students)
    dtype = compute_dtype(students[0])
    distance = students[0].new_zeros((pairs, batch), dtype=dtype)
    neg_log = torch.zeros_like(distance)
    gradient = students[0].new_zeros((pairs, batch, rows, rows), dtype=dtype)
    for p, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        step = min(_chunk(student), _chunk(teacher))
        for start in range(0, batch, step):
            part = slice(start, start + step)
            kept = None if mask is None else mask[part, :, None]
            count: Tensor | float = rows if kept is None else kept.sum(dim=1, keepdim=True).clamp(min=1)
            number = count if isinstance(count, int | float) else count[:, 0, 0]
            unit_t, _, exists_t = _unit_gram(*_centred(teacher[part].to(dtype), kept, count), number)
            unit_s, norm_s, exists_s = _unit_gram(*_centred(student[part], kept, count), number)
            exists = exists_t & exists_s
            difference = unit_t - unit_s
            delta = 0.5 * difference.square().sum(dim=(1, 2))
            product = (unit_t * unit_s).sum(dim=(1, 2)).clamp(min=CKA_FLOOR)
            distance[p, part] = torch.where(exists, delta, 0.0)
            near = delta < 0.5
            logs = torch.where(near, -torch.log1p(-torch.where(near, delta, 0.0)), -torch.log(product))
            neg_log[p, part] = torch.where(exists, logs, 0.0)
            difference += delta[:, None, None] * unit_s
            difference *= torch.where(exists, 1 / norm_s, 0.0)[:, None, None]
            gradient[p, part] = difference
    return distance, neg_log, gradient


def backward(
    students: Sequence[Tensor], mask: Tensor | None, gradient: Tensor, coefficient: Tensor
) -> list[Tensor]:
    """Return dY [B, S, D] per layer pair: 2 c G Y_c, with c = ``coefficient`` [P, B]."""
    results = []
    for p, student in enumerate(students):
        result = torch.empty_like(student, memory_format=torch.contiguous_format)
        step = _chunk(student)
        for start in range(0, student.shape[0], step):
            part = slice(start, start + step)
            kept = None if mask is None else mask[part, :, None]
            count: Tensor | float = 1 if kept is None else kept.sum(dim=1, keepdim=True).clamp(min=1)
            centred, _ = _centred(student[part], kept, count)
            weighted = gradient[p, part] * (2 * coefficient[p, part])[:, None, None]
            result[part] = torch.bmm(weighted, centred)
        results.append(result)
    return results
