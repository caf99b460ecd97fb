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
d[memory; features] = (T^T (dGamma + dGamma^T) T) [memory; features], slice by slice, written straight to the gradients:
the small matrix centres them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fsd_kernels._numerics import MOST_ENERGY, compute_dtype, rounding_energy

# Columns of a slice. Long slices make few products, of which each pays for its start; the rows of a short one stay in
# the cache between centring and multiplying. Backward the gradients are held as well, so that the buffer is small.
_FORWARD_COLUMNS, _BACKWARD_COLUMNS = 16384, 2048
# Columns of a part of a slice. The parts of a slice are one batch of products, of which a thread takes whole ones: that
# is faster than threads which share a product of so few rows, and short sums lose less to rounding.
_PART, _BACKWARD_PART = 2048, 1024
# Columns of each of some eight samples of a memory.
_SAMPLED = 256
# Rows of a strip.
_STRIP = 64
# Products take rows by so many: with one more they take up to a third longer.
_MULTIPLE = 4
# The rows of a buffer are this much longer than a slice: a multiple of 1024 apart they would share cache sets.
_GAP = 16


def _slices(width: int, most: int) -> Iterator[slice]:
    """Cut the feature axis into slices of so many columns."""
    for start in range(0, width, most):
        yield slice(start, min(start + most, width))


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


def _stacked(
    features: Tensor, memory: Tensor | None, mask: Tensor | None, most: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, Z[:, columns]) along the feature axis; every slice reuses one buffer.

    The rows of the memory and those of the features are each ``padded`` with zeros.
    """
    head = 0 if memory is None else memory.shape[0] + 1
    first = padded(head)
    last = first + features.shape[0]
    width = features.shape[1] if memory is None else memory.shape[1]
    total = first + padded(features.shape[0] + 1)
    buffer = features.new_empty((total, min(most, width) + _GAP), dtype=compute_dtype(features))
    buffer[head:first] = 0.0
    buffer[last + 1 :] = 0.0
    for columns in _slices(width, most):
        stacked = buffer[:, : columns.stop - columns.start]
        if memory is not None:
            _centre(stacked[: head - 1], stacked[head - 1], memory, columns, None)
        _centre(stacked[first:last], stacked[last], features, columns, mask)
        if memory is not None:
            stacked[last] -= stacked[head - 1]
        yield columns, stacked


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left right^T, [n, m] in float64, of [n, w] and [m, w]: float32 within parts of the columns, float64 over them."""
    width = left.shape[1]
    whole = width - width % _PART
    result = left.new_zeros((left.shape[0], right.shape[0]), dtype=torch.float64)
    if whole:
        parts = [rows[:, :whole].unflatten(1, (-1, _PART)).transpose(0, 1) for rows in (left, right)]
        torch.sum(torch.bmm(parts[0], parts[1].mT), dim=0, dtype=torch.float64, out=result)
    if whole < width:
        result += left[:, whole:] @ right[:, whole:].T
    return result


def strips(rows: int) -> Iterator[slice]:
    """Cut the rows of a block into strips, of whose product with the block nothing above the diagonal is needed."""
    for start in range(0, rows, _STRIP):
        yield slice(start, min(start + _STRIP, rows))


def _own_product(rows: Tensor) -> Tensor:
    """rows rows^T, [n, n] in float64, of [n, w]: strips of the lower triangle, and their mirror images."""
    result = rows.new_empty((len(rows), len(rows)), dtype=torch.float64)
    for strip in strips(len(rows)):
        result[strip, : strip.stop] = _product(rows[strip], rows[: strip.stop])
        result[: strip.start, strip] = result[strip, : strip.start].T
    return result


def _uncentred(features: Tensor, mask: Tensor | None, most: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, features[:, columns]), 0 where dropped, along the feature axis."""
    for columns in _slices(features.shape[1], most):
        rows = features[:, columns].to(compute_dtype(features))
        if mask is not None:
            rows = rows.masked_fill(_dropped(mask, columns, features.shape[1]), 0.0)
        yield columns, rows


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
    for _, rows in _uncentred(features, mask, _FORWARD_COLUMNS):
        product = _own_product(rows)
        if gram is None:
            gram = product
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
    buffer = features.new_empty((padded(batch + 1), min(_FORWARD_COLUMNS, width) + _GAP), dtype=dtype)
    buffer[batch + 1 :] = 0.0
    own = features.new_zeros((len(buffer), len(buffer)), dtype=torch.float64)
    cross = features.new_zeros((len(buffer), num_centroid), dtype=torch.float64)
    block = features.new_zeros((num_centroid, num_centroid), dtype=torch.float64)
    for columns in _slices(width, _FORWARD_COLUMNS):
        centred = buffer[:, : columns.stop - columns.start]
        _centre(centred[:batch], centred[batch], features, columns, mask)
        rows = memory[:, columns].to(dtype)
        own += _own_product(centred)
        cross += _product(centred, rows)
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
    for _, stacked in _stacked(features, memory, mask, _FORWARD_COLUMNS):
        for rows, columns in products:
            if rows == columns:
                sums[rows, rows] += _own_product(stacked[rows])
            else:
                sums[rows, columns] += _product(stacked[rows], stacked[columns])
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


def _parts(rows: Tensor) -> Tensor:
    """[n, w] as [w / _BACKWARD_PART, n, _BACKWARD_PART], or whole."""
    part = _BACKWARD_PART if rows.shape[1] % _BACKWARD_PART == 0 else rows.shape[1]
    return rows.unflatten(1, (-1, part)).transpose(0, 1)


def _write(target: Tensor, parts: Tensor) -> None:
    """Write what ``_parts`` made of [n, w] to a target [n, w], in its dtype."""
    target.unflatten(1, (len(parts), -1)).copy_(parts.transpose(0, 1))


def backward(
    features: Tensor, memory: Tensor | None, mask: Tensor | None, d_gram: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return (d features, d memory); one that is not needed is empty."""
    needs = needs[0], needs[1] and memory is not None
    d_features = torch.empty_like(features) if needs[0] else features.new_empty(0)
    d_memory = torch.empty_like(memory) if memory is not None and needs[1] else features.new_empty(0)
    batch, own = features.shape
    head = 0 if memory is None else memory.shape[0] + 1
    rows_of = [
        left for left, needed in zip(_transposed_map(d_gram + d_gram.T, head), needs, strict=True) if needed
    ]
    if not rows_of:
        return d_features, d_memory
    dtype = compute_dtype(features)
    of_features, of_memory = (
        right.T.contiguous().to(dtype) for right in _transposed_map(torch.cat(rows_of).T, head)
    )
    if memory is None and mask is None and features.dtype == dtype:
        return torch.mm(of_features, features, out=d_features), d_memory
    most = _FORWARD_COLUMNS if memory is None else _BACKWARD_COLUMNS
    width = own if memory is None else memory.shape[1]
    # No slice is cut by the end of the features.
    edges = [*range(0, own, most), *range(own, width, most), width]
    for start, stop in pairwise(edges):
        columns = slice(start, stop)
        product = None
        if memory is not None:
            rows = _parts(memory[:, columns].to(dtype))
            product = torch.bmm(of_memory.expand(len(rows), -1, -1), rows)
        if stop <= own and batch:
            rows = features[:, columns].to(dtype)
            if mask is not None:
                rows = rows.masked_fill(_dropped(mask, columns, own), 0.0)
            rows = _parts(rows)
            weights = of_features.expand(len(rows), -1, -1)
            if product is None:
                product = torch.bmm(weights, rows)
            else:
                torch.baddbmm(product, weights, rows, out=product)
        if product is None:
            continue
        if needs[0] and stop <= own:
            _write(d_features[:, columns], product[:, :batch])
            if mask is not None:
                d_features[:, columns].masked_fill_(_dropped(mask, columns, own), 0.0)
        if needs[1]:
            _write(d_memory[:, columns], product[:, batch if needs[0] else 0 :])
    return d_features, d_memory
