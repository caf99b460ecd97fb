"""Intra-feature CKA from restructured torch operations, with the backward written by hand.

Per layer pair and sample, with the rows centred first (X_c = C X, so that X_c X_c^T = C K C):

    A = K_c / |K_c|,  B = L_c / |L_c|          (Frobenius norms)
    1 - CKA = 1/2 |A - B|^2                     used where CKA is near 1: no difference of two numbers near 1
    G = d CKA / d L_c = (A - CKA B) / |L_c| = ((A - B) + (1 - CKA) B) / |L_c|
    dY = 2 c G Y,   c = dCKA_upstream - dNegLog_upstream / CKA

The rows of G sum to zero, which is why the backward need not centre Y; ``_balance`` sees to it that they still do
after rounding. A Gram is symmetric: of a large one the lower left quarter is copied from the upper right.
G [P, B, S, S] is kept, the centred features are not. Arithmetic is in float32 (float64 for float64 features),
whatever the features' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CKA_FLOOR = 1e-8

# Features of one side worked on at once: few chunks make few small operations, small ones stay in the cache.
_CHUNK_ELEMENTS = 1 << 22
# From so many rows on the lower left quarter of a Gram is copied: a smaller one is multiplied whole in less time.
_QUARTER_ROWS = 96


def compute_dtype(features: Tensor) -> torch.dtype:
    """float64 for float64 features, float32 for all others."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _chunks(batch: int, elements: int) -> list[slice]:
    """Cut ``batch`` samples of so many elements each into about equal parts, the last of them the smallest."""
    parts = max(1, min(batch, -(-batch * elements // _CHUNK_ELEMENTS)))
    step = max(1, -(-batch // parts))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def _view(buffer: Tensor, *shape: int) -> Tensor:
    """The beginning of a flat buffer as a tensor of ``shape``."""
    return buffer[: math.prod(shape)].view(shape)


def _centre(centred: Tensor, features: Tensor, dropped: Tensor | None, count: Tensor | float) -> Tensor:
    """Write [b, S, D], centred over the kept rows, with 0 for dropped ones; returns the mean [b, 1, D]."""
    if dropped is not None or features.dtype != centred.dtype:
        centred.copy_(features)
        features = centred
    if dropped is not None:
        centred.masked_fill_(dropped, 0.0)
    mean = features.sum(dim=1, keepdim=True) / count
    torch.sub(features, mean, out=centred)
    if dropped is not None:
        centred.masked_fill_(dropped, 0.0)
    return mean


def quarter_rows(rows: int) -> int:
    """How many of the first rows of a Gram are copied to its columns instead of multiplied again."""
    return rows // 32 * 16 if rows >= _QUARTER_ROWS else 0


def _grams(gram: Tensor, centred: Tensor) -> None:
    """Write the Grams [b, S, S] of [b, S, D]."""
    first = quarter_rows(gram.shape[1])
    if first == 0:
        torch.bmm(centred, centred.mT, out=gram)
        return
    upper, lower = slice(0, first), slice(first, None)
    # Into a part of ``gram`` itself bmm would multiply one sample after the other.
    gram[:, upper] = torch.bmm(centred[:, upper], centred.mT)
    gram[:, lower, lower] = torch.bmm(centred[:, lower], centred[:, lower].mT)
    gram[:, lower, upper] = gram[:, upper, lower].mT


def _norm(grams: Tensor) -> Tensor:
    """|K| of matrices [..., S, S]."""
    return torch.linalg.vector_norm(grams.flatten(-2), dim=-1)


def _balance(gram: Tensor, kept: Tensor | None, count: Tensor | float) -> None:
    """Take out of every row of [b, S, S] the mean over kept columns that rounding left in it.

    A mean of the rounding's size would bring back an offset common to all tokens.
    """
    left = gram.sum(dim=2, keepdim=True) / count
    gram -= left if kept is None else left * kept[:, None]


def forward(
    students: Sequence[Tensor], teachers: Sequence[Tensor], mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (1 - CKA [P, B], -log CKA [P, B], G [P, B, S, S])."""
    batch, rows = students[0].shape[:2]
    pairs = len(students)
    dtype = compute_dtype(students[0])
    rounding = (8 * torch.finfo(dtype).eps) ** 2
    gradient = students[0].new_empty((pairs, batch, rows, rows), dtype=dtype)
    delta, product = gradient.new_empty((2, pairs, batch))
    exists = torch.empty_like(delta, dtype=torch.bool)
    for p, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        width = max(student.shape[2], teacher.shape[2])
        chunks = _chunks(batch, rows * width)
        most = chunks[0].stop if chunks else 0
        buffer = gradient.new_empty(most * rows * width)
        gram_buffer = gradient.new_empty(2 * most * rows**2)
        for part in chunks:
            samples = part.stop - part.start
            kept = None if mask is None else mask[part]
            dropped = None if kept is None else ~kept[:, :, None]
            count: Tensor | float = rows if kept is None else kept.sum(dim=1).clamp(min=1)[:, None, None]
            units = _view(gram_buffer, 2, samples, rows, rows)
            floor = gradient.new_empty((2, samples))
            for side, features in enumerate((teacher[part], student[part])):
                centred = _view(buffer, samples, rows, features.shape[2])
                mean = _centre(centred, features, dropped, count)
                floor[side] = (mean.square() * (rounding * count)).sum(dim=(1, 2))
                _grams(units[side], centred)
            energy = units.diagonal(dim1=2, dim2=3).sum(dim=2)
            differ = energy > floor
            # Dividing by the trace first keeps the fourth powers of the features out of overflow and underflow.
            units *= torch.where(differ, 1 / energy, 0.0)[..., None, None]
            norm = _norm(units)
            # Both scaled before they are subtracted: equal ones are then exactly equal.
            units *= torch.where(differ, 1 / norm, 0.0)[..., None, None]
            torch.all(differ, dim=0, out=exists[p, part])
            product[p, part] = torch.linalg.vecdot(*units.flatten(2))
            result = torch.sub(*units, out=gradient[p, part])
            delta[p, part] = 0.5 * _norm(result).square()
            result.addcmul_(units[1], delta[p, part][:, None, None])
            scale = torch.where(exists[p, part], 1 / (norm[1] * energy[1]), 0.0)
            result *= scale[:, None, None]
            _balance(result, kept, count)
    near = delta < 0.5
    distance = torch.where(near, delta, 1 - product)
    log1p = -torch.log1p(-torch.where(near, delta, 0.0))
    neg_log = torch.where(near, log1p, -torch.log(product.clamp(min=CKA_FLOOR)))
    return torch.where(exists, distance, 0.0), torch.where(exists, neg_log, 0.0), gradient


def backward(
    students: Sequence[Tensor], mask: Tensor | None, gradient: Tensor, coefficient: Tensor
) -> list[Tensor]:
    """Return dY [B, S, D] per layer pair: 2 c G Y, with c = ``coefficient`` [P, B] and rows of G that sum to 0."""
    results = []
    for p, student in enumerate(students):
        result = torch.empty_like(student, memory_format=torch.contiguous_format)
        for part in _chunks(len(student), student.shape[1] * student.shape[2]):
            own = student[part].to(gradient.dtype)
            if mask is not None:
                own = own.masked_fill(~mask[part, :, None], 0.0)
            weighted = gradient[p, part] * (2 * coefficient[p, part])[:, None, None]
            if result.dtype == own.dtype:
                torch.bmm(weighted, own, out=result[part])
            else:
                result[part] = torch.bmm(weighted, own)
        results.append(result)
    return results
