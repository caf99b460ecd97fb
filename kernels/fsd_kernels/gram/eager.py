"""The Gram matrix of stacked, centred rows from restructured torch operations, with its backward.

The feature axis is walked in slices. A slice holds all rows, so their means are local to it: the rows are
centred into a small float32 buffer (float64 for float64 features) and multiplied into Gamma in parts of the slice,
float32 within a part and float64 over the parts, and Gamma stays float64: near CKA = 1, and in the differences of
cosines that are all but 0, the losses live in its last bits. A diagonal block that holds nothing but the rounding of
its features is 0. Only the buffer is extra memory; the inputs are never concatenated. Where a slice starts depends on
nothing but F, so equal memories give equal bits. A block's product with itself is made of strips of its lower triangle.

What is multiplied as it is, and centred in Gamma, in float64, is read once and written nowhere: features without a
memory, and a memory, unless their mean row has more energy than all that sets them apart, so that this would lose much.
Beside a memory the features, of which there are fewer, are always centred first.

Backward: Z = T [memory; features] with a constant T (centring, block by block, and the means' rows), so
d[memory; features] = (T^T (dGamma + dGamma^T) T) [memory; features], written straight to the gradients: the small
matrix centres them. Only rows that must be copied, to drop tokens or for another dtype, are walked in slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fsd_kernels._numerics import MOST_ENERGY, compute_dtype, rounding_energy

# Columns of a slice: enough for threads to share a product of few rows, and so few that its sums lose little to
# rounding and its centred rows stay in the cache until they are multiplied.
_COLUMNS = 8192
# Columns of each of some eight samples of a memory.
_SAMPLED = 256
# Rows of a strip.
_STRIP = 64
# Products take rows by so many: with one more they take up to a third longer.
_MULTIPLE = 4
# The rows of a buffer are this much longer than a slice: a multiple of 1024 apart they would share cache sets.
_GAP = 16


def _slices(width: int) -> Iterator[slice]:
    """Cut the feature axis into slices."""
    for start in range(0, width, _COLUMNS):
        yield slice(start, min(start + _COLUMNS, width))


def _dropped(mask: Tensor, columns: slice, width: int) -> Tensor:
    """Which ``columns`` of rows ``width`` wide belong to dropped tokens, [n, columns]."""
    token = width // mask.shape[1]
    first, last = columns.start // token, -(-columns.stop // token)
    dropped = mask[:, first:last].logical_not().repeat_interleave(token, dim=1)
    return dropped[:, columns.start - first * token :][:, : columns.stop - columns.start]


def _centre(rows: Tensor, mean: Tensor, source: Tensor, columns: slice, mask: Tensor | None) -> None:
    """Write columns of ``source`` [n, F], centred, to ``rows`` and their mean to ``mean``; 0 beyond F."""
    columns = slice(columns.start, min(columns.stop, source.shape[1]))
    inside = max(0, columns.stop - columns.start) if rows.shape[0] else 0
    if inside < len(mean):
        rows[:, inside:] = 0.0
        mean[inside:] = 0.0
        rows, mean = rows[:, :inside], mean[:inside]
    if inside == 0:
        return
    part = source[:, columns]
    if mask is not None or part.dtype != rows.dtype:
        rows.copy_(part)
        part = rows
    if mask is not None:
        rows.masked_fill_(_dropped(mask, columns, source.shape[1]), 0.0)
    torch.mean(part, dim=0, out=mean)
    torch.sub(part, mean, out=rows)


def padded(rows: int) -> int:
    """So many rows of a block, its mean's included, and those of zeros up to a multiple of ``_MULTIPLE``."""
    return -(-rows // _MULTIPLE) * _MULTIPLE


def _stacked(features: Tensor, memory: Tensor | None, mask: Tensor | None) -> Iterator[Tensor]:
    """Yield Z[:, columns] along the feature axis; every slice reuses one buffer.

    The rows of the memory and those of the features are each ``padded`` with zeros.
    """
    head = 0 if memory is None else memory.shape[0] + 1
    first = padded(head)
    last = first + features.shape[0]
    width = features.shape[1] if memory is None else memory.shape[1]
    total = first + padded(features.shape[0] + 1)
    buffer = features.new_empty((total, min(_COLUMNS, width) + _GAP), dtype=compute_dtype(features))
    buffer[head:first] = 0.0
    buffer[last + 1 :] = 0.0
    for columns in _slices(width):
        stacked = buffer[:, : columns.stop - columns.start]
        if memory is not None:
            _centre(stacked[: head - 1], stacked[head - 1], memory, columns, None)
        _centre(stacked[first:last], stacked[last], features, columns, mask)
        if memory is not None:
            stacked[last] -= stacked[head - 1]
        yield stacked


def strips(rows: int) -> Iterator[slice]:
    """Cut the rows of a block into strips, of whose product with the block nothing above the diagonal is needed."""
    for start in range(0, rows, _STRIP):
        yield slice(start, min(start + _STRIP, rows))


def _own_product(rows: Tensor) -> Tensor:
    """rows rows^T, [n, n], of [n, w]: strips of the lower triangle, and their mirror images."""
    if len(rows) <= _STRIP:
        return rows @ rows.T
    result = rows.new_empty((len(rows), len(rows)))
    for strip in strips(len(rows)):
        result[strip, : strip.stop] = rows[strip] @ rows[: strip.stop].T
        result[: strip.start, strip] = result[strip, : strip.start].T
    return result


def _rows_of(source: Tensor, columns: slice, dtype: torch.dtype, mask: Tensor | None = None) -> Tensor:
    """Columns of ``source`` [n, F] in ``dtype``, 0 where dropped: a copy only where they are not that already."""
    rows = source[:, columns].to(dtype)
    return rows if mask is None else rows.masked_fill(_dropped(mask, columns, source.shape[1]), 0.0)


def _drop_rounding(block: Tensor, mean_energy: Tensor, dtype: torch.dtype) -> None:
    """Zero the centred Gram of rows that are equal up to rounding of their mean, of squared norm ``mean_energy``."""
    energy = block.diagonal().sum()
    block *= energy > rounding_energy(dtype) * block.shape[0] * mean_energy


def _has_offset(gram: Tensor) -> bool:
    """Whether rows with this Gram, which are not centred, must be centred before they are multiplied."""
    energy = gram.diagonal().sum()
    return not energy <= MOST_ENERGY * (energy - len(gram) * gram.mean())


def _centre_gram(gram: Tensor, gamma: Tensor) -> None:
    """Write to ``gamma`` [n + 1, n + 1] what a Gram [n, n] says of its centred rows and of their mean."""
    row_mean = gram.mean(dim=1)
    mean_energy = row_mean.mean()
    to_mean = row_mean - mean_energy
    torch.sub(gram - row_mean[:, None], to_mean, out=gamma[:-1, :-1])
    gamma[:-1, -1] = gamma[-1, :-1] = to_mean
    gamma[-1, -1] = mean_energy


def _forward_uncentred(features: Tensor, mask: Tensor | None) -> Tensor | None:
    """Gamma of features [B, F] without a memory, multiplied as they are; None where they must be centred first."""
    gram: Tensor | None = None
    for columns in _slices(features.shape[1]):
        product = _own_product(_rows_of(features, columns, compute_dtype(features), mask))
        if gram is None:
            gram = product.double()
            # Most probably the other slices are no better than the first.
            if _has_offset(gram):
                return None
        else:
            gram += product
    if gram is None or _has_offset(gram):
        return None
    gamma = gram.new_empty((len(gram) + 1, len(gram) + 1))
    _centre_gram(gram, gamma)
    return gamma


def _looks_centred(memory: Tensor) -> bool:
    """Whether the rows of a memory [K, F] need no centring before they are multiplied, judged by some columns."""
    starts = range(0, memory.shape[1], max(_SAMPLED, memory.shape[1] // 8))
    sample = torch.cat([memory[:, start : start + _SAMPLED] for start in starts], dim=1)
    sample = sample.to(compute_dtype(sample))
    energy = sample.square().sum()
    return bool(energy <= MOST_ENERGY * (energy - len(sample) * sample.mean(dim=0).square().sum()))


def _forward_uncentred_memory(
    features: Tensor, memory: Tensor, memory_gram: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """Gamma with a memory that is multiplied as it is and centred in Gamma; None where it must be centred first.

    The answer depends on the memory alone, and not on whether its block is known.
    """
    if not _looks_centred(memory):
        return None
    batch, (num_centroid, width), dtype = len(features), memory.shape, compute_dtype(features)
    head = num_centroid + 1
    buffer = features.new_empty((padded(batch + 1), min(_COLUMNS, width) + _GAP), dtype=dtype)
    buffer[batch + 1 :] = 0.0
    own = features.new_zeros((len(buffer), len(buffer)), dtype=torch.float64)
    cross = features.new_zeros((len(buffer), num_centroid), dtype=torch.float64)
    block = features.new_zeros((num_centroid, num_centroid), dtype=torch.float64)
    for columns in _slices(width):
        centred = buffer[:, : columns.stop - columns.start]
        _centre(centred[:batch], centred[batch], features, columns, mask)
        rows = _rows_of(memory, columns, dtype)
        own += _own_product(centred)
        cross += centred @ rows.T
        if memory_gram is None:
            block += _own_product(rows)
    gamma = features.new_empty((head + batch + 1, head + batch + 1), dtype=torch.float64)
    known = gamma[:head, :head]
    if memory_gram is None:
        _centre_gram(block, known)
        _drop_rounding(known[:-1, :-1], known[-1, -1], dtype)
    else:
        known.copy_(memory_gram)
    energy = known.diagonal()[:-1].sum()
    if not energy + num_centroid * known[-1, -1] <= MOST_ENERGY * energy:
        return None
    # Products of mu_m with the rows of the features and with mu_h, whose row becomes that of mu_h - mu_m.
    with_mean = cross[: batch + 1].mean(dim=1)
    gamma[head:, :num_centroid] = cross[: batch + 1] - with_mean[:, None]
    gamma[head:, num_centroid] = with_mean
    gamma[-1, :head] -= known[-1]
    gamma[:head, head:] = gamma[head:, :head].T
    gamma[head:, head:] = own[: batch + 1, : batch + 1]
    gamma[-1, head:-1] -= with_mean[:-1]
    gamma[head:-1, -1] = gamma[-1, head:-1]
    gamma[-1, -1] += known[-1, -1] - 2 * with_mean[-1]
    _drop_rounding(gamma[head:-1, head:-1], own[batch, batch], dtype)
    return gamma


def forward(
    features: Tensor, memory: Tensor | None, memory_gram: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Gamma, float64, of features [B, F] and memory [K, F'] or None, whose own block may be known already."""
    if memory is None and features.shape[0]:
        gamma = _forward_uncentred(features, mask)
        if gamma is not None:
            return gamma
    if memory is not None:
        gamma = _forward_uncentred_memory(features, memory, memory_gram, mask)
        if gamma is not None:
            return gamma
    head = 0 if memory is None else memory.shape[0] + 1
    first = padded(head)
    last = first + features.shape[0]
    total = first + padded(features.shape[0] + 1)
    # (rows, columns) of the products that make up the lower triangle. The memory's own are the same one whether its
    # block is known already or not.
    own, other = slice(0, first), slice(first, total)
    products = [(other, other)]
    if head:
        products += [(other, own)] if memory_gram is not None else [(other, own), (own, own)]
    sums = features.new_zeros((total, total), dtype=torch.float64)
    for stacked in _stacked(features, memory, mask):
        for rows, columns in products:
            if rows == columns:
                sums[rows, rows] += _own_product(stacked[rows])
            else:
                sums[rows, columns] += stacked[rows] @ stacked[columns].T
    sums[own, other] = sums[other, own].T
    kept = torch.tensor([*range(head), *range(first, last + 1)], device=sums.device)
    gram = sums[kept[:, None], kept]
    if memory_gram is not None:
        gram[:head, :head] = memory_gram
    elif head:
        _drop_rounding(gram[: head - 1, : head - 1], gram[head - 1, head - 1], compute_dtype(features))
    mean_energy = gram[-1, -1]
    if head:
        mean_energy = mean_energy + 2 * gram[-1, head - 1] + gram[head - 1, head - 1]
    _drop_rounding(gram[head:-1, head:-1], mean_energy, compute_dtype(features))
    return gram


def _transposed_map(matrix: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """T^T ``matrix`` for a matrix [N, n]: the rows that belong to the features [B, n] and to the memory [K, n]."""
    own, mean = matrix[head:-1], matrix[-1]
    features = own - own.mean(dim=0) + mean / max(1, own.shape[0])
    if head == 0:
        return features, matrix[:0]
    own, own_mean = matrix[: head - 1], matrix[head - 1]
    return features, own - own.mean(dim=0) + (own_mean - mean) / (head - 1)


def _weighted_sum(target: Tensor, terms: list[tuple[Tensor, Tensor]]) -> None:
    """Write the sum of the products of weights [n, m] and rows [m, w] to a target [n, w], in its dtype."""
    (weights, rows), *others = terms
    total = target if target.dtype == rows.dtype else rows.new_empty(target.shape)
    torch.mm(weights, rows, out=total)
    for weights, rows in others:
        torch.addmm(total, weights, rows, out=total)
    if total is not target:
        target.copy_(total)


def backward(
    features: Tensor, memory: Tensor | None, mask: Tensor | None, d_gram: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return (d features, d memory); one that is not needed is empty."""
    needs = needs[0], needs[1] and memory is not None
    d_features = torch.empty_like(features) if needs[0] else features.new_empty(0)
    d_memory = torch.empty_like(memory) if memory is not None and needs[1] else features.new_empty(0)
    own = features.shape[1]
    head = 0 if memory is None else memory.shape[0] + 1
    width = own if memory is None else memory.shape[1]
    dtype = compute_dtype(features)
    # What the rows of the features and of the memory weigh in each gradient.
    weights = [
        [columns.T.to(dtype) for columns in _transposed_map(rows.T, head)]
        for rows in _transposed_map(d_gram + d_gram.T, head)
    ]
    copied = mask is not None or any(each is not None and each.dtype != dtype for each in (features, memory))
    most = _COLUMNS if copied else width
    # No slice is cut by the end of the features.
    for start, stop in pairwise([*range(0, own, most), *range(own, width, most), width]):
        columns, inside = slice(start, stop), stop <= own
        of_features = _rows_of(features, columns, dtype, mask) if inside else None
        of_memory = None if memory is None else _rows_of(memory, columns, dtype)
        for target, needed, own_weights in zip((d_features, d_memory), needs, weights, strict=True):
            if needed and (inside or target is d_memory):
                both = zip(own_weights, (of_features, of_memory), strict=True)
                _weighted_sum(target[:, columns], [(w, rows) for w, rows in both if rows is not None])
        if needs[0] and mask is not None and inside:
            d_features[:, columns].masked_fill_(_dropped(mask, columns, own), 0.0)
    return d_features, d_memory
