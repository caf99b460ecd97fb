"""Intra-feature CKA from restructured torch operations, with the backward written by hand.

Per layer pair and sample, with the rows centred first (X_c = C X, so that X_c X_c^T = C K C):

    A = K_c / |K_c|,  B = L_c / |L_c|          (Frobenius norms)
    1 - CKA = 1/2 |A - B|^2                     used where CKA is near 1: no difference of two numbers near 1
    G = d CKA / d L_c = (A - CKA B) / |L_c| = ((A - B) + (1 - CKA) B) / |L_c|
    dY = 2 c G Y,   c = dCKA_upstream - dNegLog_upstream / CKA

A Gram is symmetric: its S rows are cut into n blocks of h, and only the n (n + 1) / 2 blocks on and below the
diagonal are multiplied. The rows of G sum to zero, which is why the backward need not centre Y; ``_assemble`` sees
to it that they still do after rounding. G [P, B, S, S] is kept, the centred features are not. Arithmetic is in
float32 (float64 for float64 features), whatever the features' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CKA_FLOOR = 1e-8

# Features of one side worked on at once: their centred rows should stay in the last cache, and the many small
# operations on a chunk's Grams should be few against its products.
_CHUNK_ELEMENTS = 1 << 21
# Rows of a block of a Gram; products of smaller blocks take longer than the work that they save.
_BLOCK_ROWS = 64


def compute_dtype(features: Tensor) -> torch.dtype:
    """float64 for float64 features, float32 for all others."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def block_sizes(rows: int) -> tuple[int, int]:
    """Into how many blocks, of how many rows, a Gram of S rows is cut; rows beyond S are zero."""
    number = -(-rows // _BLOCK_ROWS)
    # Products of blocks whose rows are no multiple of 16 are slow.
    size = -(-rows // (16 * max(1, number))) * 16
    worth = number > 1 and number * (number + 1) // 2 * size**2 <= 0.8 * rows**2
    return (number, size) if worth else (1, rows)


def _chunks(batch: int, elements: int) -> list[slice]:
    """Cut ``batch`` samples of so many elements each into about equal parts, the last of them the smallest."""
    parts = max(1, min(batch, -(-batch * elements // _CHUNK_ELEMENTS)))
    step = max(1, -(-batch // parts))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def _dropped(kept: Tensor | None, batch: int, rows: int, device: torch.device) -> Tensor | None:
    """Which rows of [n, b, h, D] are no kept rows of a sample, [n, b, h, 1]; None where all are."""
    number, size = block_sizes(rows)
    if kept is None and number * size == rows:
        return None
    dropped = torch.ones((batch, number * size), dtype=torch.bool, device=device)
    dropped[:, :rows] = False if kept is None else ~kept
    return dropped.unflatten(1, (number, size)).transpose(0, 1)[..., None]


def _view(buffer: Tensor, *shape: int) -> Tensor:
    """The beginning of a flat buffer as a tensor of ``shape``."""
    return buffer[: math.prod(shape)].view(shape)


def _centre(centred: Tensor, features: Tensor, dropped: Tensor | None, count: Tensor | float) -> Tensor:
    """Write [b, S, D] to [n, b, h, D], centred over the kept rows, with 0 for dropped ones; returns the mean."""
    # From memory to cache first: the means' order of reading is slow on what is not there.
    for block, source in zip(centred, features.split(centred.shape[2], dim=1), strict=True):
        block[:, : source.shape[1]].copy_(source)
    if dropped is not None:
        centred.masked_fill_(dropped, 0.0)
    mean = centred.sum(dim=2).sum(dim=0) / count
    centred -= mean[:, None]
    if dropped is not None:
        centred.masked_fill_(dropped, 0.0)
    return mean


def _grams(gram: Tensor, centred: Tensor) -> None:
    """Write the Grams of [n, b, h, D] to [n (n + 1) / 2, b, h, h]: blocks on the diagonal, one below it, and so on."""
    number, batch = centred.shape[:2]
    rows, products = centred.flatten(0, 1), gram.flatten(0, 1)
    start = 0
    for offset in range(number):
        pairs = (number - offset) * batch
        torch.bmm(rows[offset * batch :], rows[:pairs].mT, out=products[start : start + pairs])
        start += pairs


def _over_matrix(parts: Tensor, number: int) -> Tensor:
    """Sum [..., b] over a symmetric matrix, given the sums over its blocks, [..., n (n + 1) / 2, b]."""
    return parts[..., :number, :].sum(dim=-2) + 2 * parts[..., number:, :].sum(dim=-2)


def _square(grams: Tensor, number: int) -> Tensor:
    """|K|^2 [..., b] of blocks [..., n (n + 1) / 2, b, h, h]."""
    return _over_matrix(torch.linalg.vector_norm(grams.flatten(-2), dim=-1).square_(), number)


def _assemble(result: Tensor, gram: Tensor, kept: Tensor | None, count: Tensor | float) -> None:
    """Write blocks to [b, S, S], and take out of every row the mean over kept columns that rounding left in it.

    A mean of the rounding's size would bring back an offset common to all tokens.
    """
    number, size = block_sizes(result.shape[1])
    parts = [slice(i * size, (i + 1) * size) for i in range(number)]
    places = [(i + offset, i) for offset in range(number) for i in range(number - offset)]
    for block, (i, j) in zip(gram, places, strict=True):
        target = result[:, parts[i], parts[j]]
        block = block[:, : target.shape[1], : target.shape[2]]
        target.copy_(block)
        if i != j:
            result[:, parts[j], parts[i]].copy_(block.mT)
    left = result.sum(dim=2) / count
    result -= left[:, :, None] if kept is None else left[:, :, None] * kept[:, None]


def forward(
    students: Sequence[Tensor], teachers: Sequence[Tensor], mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (1 - CKA [P, B], -log CKA [P, B], G [P, B, S, S])."""
    batch, rows = students[0].shape[:2]
    pairs = len(students)
    dtype = compute_dtype(students[0])
    number, size = block_sizes(rows)
    blocks = number * (number + 1) // 2
    rounding = (8 * torch.finfo(dtype).eps) ** 2
    gradient = students[0].new_empty((pairs, batch, rows, rows), dtype=dtype)
    delta, product = gradient.new_empty((2, pairs, batch))
    exists = torch.empty_like(delta, dtype=torch.bool)
    for p, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        width = max(student.shape[2], teacher.shape[2])
        chunks = _chunks(batch, rows * width)
        most = chunks[0].stop if chunks else 0
        buffer = gradient.new_empty(number * most * size * width)
        gram_buffer = gradient.new_empty(2 * blocks * most * size**2)
        for part in chunks:
            samples = part.stop - part.start
            kept = None if mask is None else mask[part]
            dropped = _dropped(kept, samples, rows, student.device)
            count: Tensor | float = rows if kept is None else kept.sum(dim=1, keepdim=True).clamp(min=1)
            units = _view(gram_buffer, 2, blocks, samples, size, size)
            floor = gradient.new_empty((2, samples))
            for side, features in enumerate((teacher[part], student[part])):
                centred = _view(buffer, number, samples, size, features.shape[2])
                mean = _centre(centred, features, dropped, count)
                floor[side] = (mean.square() * (rounding * count)).sum(dim=1)
                _grams(units[side], centred)
            energy = units[:, :number].diagonal(dim1=3, dim2=4).sum(dim=(1, 3))
            differ = energy > floor
            # Dividing by the trace first keeps the fourth powers of the features out of overflow and underflow.
            units *= torch.where(differ, 1 / energy, 0.0)[:, None, :, None, None]
            norm = _square(units, number).sqrt_()
            units *= torch.where(differ, 1 / norm, 0.0)[:, None, :, None, None]
            torch.all(differ, dim=0, out=exists[p, part])
            product[p, part] = _over_matrix(torch.linalg.vecdot(*units.flatten(3)), number)
            difference = units[0].sub_(units[1])
            delta[p, part] = 0.5 * _square(difference, number)
            difference += units[1].mul_(delta[p, part, None, None])
            difference *= torch.where(exists[p, part], 1 / (norm[1] * energy[1]), 0.0)[:, None, None]
            _assemble(gradient[p, part], difference, kept, count)
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
