"""The Gram matrix of stacked, centred rows from restructured torch operations, with its backward.

The feature axis is walked in slices. A slice holds all rows, so their means are local to it. The rows are centred into
a small float32 buffer (float64 for float64 features) and multiplied. Products of slices are summed in float64, and
Gamma stays float64: near CKA = 1, and in differences between small cosines, the losses depend on its last bits. A
diagonal block that holds nothing but the rounding of its features is 0. The buffer is the only extra memory; the inputs
are never concatenated. Where a slice starts depends on F alone, so equal memories give equal bits. The product of a
block with itself is computed in strips of its lower triangle.

Two inputs are multiplied as they are, which saves writing centred copies, and centred in Gamma in float64: a memory,
and features without a memory. If their mean row has more energy than the differences between rows, this would lose
digits, and they are centred first as well. Features beside a memory have fewer rows and are always centred first.

Backward: Z = T [memory; features] with a constant T (centring, block by block, and the rows of the means), so
d[memory; features] = (T^T (dGamma + dGamma^T) T) [memory; features], written straight to the gradients: the small
matrix does the centring. Rows are walked in slices only if they must be copied, to drop tokens or to change dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fsd_kernels._numerics import MAXIMUM_ENERGY_RATIO, compute_dtype, rounding_energy

# Columns of a slice: enough for threads to share a product of few rows, yet few enough that its sums lose little to
# rounding and its centred rows stay in the cache until they are multiplied.
_COLUMNS = 8192
# Columns in each of the about eight places where a memory is sampled.
_SAMPLED = 256
# Rows of a strip.
_STRIP = 64
# Products handle rows in groups of this size: one row more takes up to a third longer.
_MULTIPLE = 4
# Columns between the rows of a buffer: rows a multiple of 1024 columns apart would share cache sets.
_GAP = 16


def _slices(width: int) -> Iterator[slice]:
    """Cut the feature axis into slices."""
    for start in range(0, width, _COLUMNS):
        yield slice(start, min(start + _COLUMNS, width))


def _dropped(mask: Tensor, columns: slice, width: int) -> Tensor:
    """True for those ``columns`` of rows ``width`` wide that belong to dropped tokens, [n, columns]."""
    token = width // mask.shape[1]
    first, last = columns.start // token, -(-columns.stop // token)
    dropped = mask[:, first:last].logical_not().repeat_interleave(token, dim=1)
    return dropped[:, columns.start - first * token :][:, : columns.stop - columns.start]


def _centre(rows: Tensor, mean: Tensor, source: Tensor, columns: slice, mask: Tensor | None) -> None:
    """Write columns of ``source`` [n, F], centred, to ``rows`` and their mean to ``mean``; columns beyond F are 0."""
    columns = slice(columns.start, min(columns.stop, source.shape[1]))
    inside = max(0, columns.stop - columns.start) if rows.shape[0] else 0
    if inside < len(mean):
        rows[:, inside:] = 0.0
        mean[inside:] = 0.0
        rows, mean = rows[:, :inside], mean[:inside]
    if inside == 0:
        return
    values = source[:, columns]
    if mask is not None or values.dtype != rows.dtype:
        rows.copy_(values)
        values = rows
    if mask is not None:
        rows.masked_fill_(_dropped(mask, columns, source.shape[1]), 0.0)
    torch.mean(values, dim=0, out=mean)
    torch.sub(values, mean, out=rows)


def padded(rows: int) -> int:
    """``rows`` rounded up to a multiple of ``_MULTIPLE``; a block is padded with rows of zeros."""
    return -(-rows // _MULTIPLE) * _MULTIPLE


def _stacked(features: Tensor, memory: Tensor | None, mask: Tensor | None) -> Iterator[Tensor]:
    """Yield Z[:, columns] slice by slice, in one buffer. Memory and features are each padded with rows of zeros."""
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
    """Cut the rows of a block into strips, so that little above the diagonal of its Gram is computed."""
    for start in range(0, rows, _STRIP):
        yield slice(start, min(start + _STRIP, rows))


def _self_product(rows: Tensor) -> Tensor:
    """rows rows^T, [n, n], of rows [n, w]: strips of the lower triangle and their mirror images."""
    if len(rows) <= _STRIP:
        return rows @ rows.T
    result = rows.new_empty((len(rows), len(rows)))
    for strip in strips(len(rows)):
        result[strip, : strip.stop] = rows[strip] @ rows[: strip.stop].T
        result[: strip.start, strip] = result[strip, : strip.start].T
    return result


def _rows_of(source: Tensor, columns: slice, dtype: torch.dtype, mask: Tensor | None = None) -> Tensor:
    """Columns of ``source`` [n, F] in ``dtype``, 0 where dropped; a view if neither changes anything."""
    rows = source[:, columns].to(dtype)
    return rows if mask is None else rows.masked_fill(_dropped(mask, columns, source.shape[1]), 0.0)


def _drop_rounding(block: Tensor, mean_energy: Tensor, dtype: torch.dtype) -> None:
    """Zero a centred Gram in place if its rows are equal up to rounding; ``mean_energy`` is |mean row|^2."""
    energy = block.diagonal().sum()
    block *= energy > rounding_energy(dtype) * block.shape[0] * mean_energy


def _has_offset(gram: Tensor) -> bool:
    """True if rows with this uncentred Gram must be centred before they are multiplied."""
    energy = gram.diagonal().sum()
    return not energy <= MAXIMUM_ENERGY_RATIO * (energy - len(gram) * gram.mean())


def _centre_gram(gram: Tensor, gamma: Tensor) -> None:
    """Write to ``gamma`` [n + 1, n + 1] the Gram matrix of centred rows and their mean, from the uncentred [n, n]."""
    row_mean = gram.mean(dim=1)
    mean_energy = row_mean.mean()
    to_mean = row_mean - mean_energy
    torch.sub(gram - row_mean[:, None], to_mean, out=gamma[:-1, :-1])
    gamma[:-1, -1] = gamma[-1, :-1] = to_mean
    gamma[-1, -1] = mean_energy


def _forward_uncentred(features: Tensor, mask: Tensor | None) -> Tensor | None:
    """Gamma of features [B, F] without a memory, multiplied as they are; None if they must be centred first."""
    gram: Tensor | None = None
    for columns in _slices(features.shape[1]):
        product = _self_product(_rows_of(features, columns, compute_dtype(features), mask))
        if gram is None:
            gram = product.double()
            # The other slices are most likely like the first.
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
    """True if the rows of a memory [K, F] need no centring before they are multiplied, judged by some columns."""
    starts = range(0, memory.shape[1], max(_SAMPLED, memory.shape[1] // 8))
    sample = torch.cat([memory[:, start : start + _SAMPLED] for start in starts], dim=1)
    sample = sample.to(compute_dtype(sample))
    energy = sample.square().sum()
    return bool(energy <= MAXIMUM_ENERGY_RATIO * (energy - len(sample) * sample.mean(dim=0).square().sum()))


def _forward_uncentred_memory(
    features: Tensor, memory: Tensor, memory_gram: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """Gamma with a memory that is multiplied as it is and centred in Gamma; None if it must be centred first.

    That depends on the memory alone, whether its block is given or computed.
    """
    if not _looks_centred(memory):
        return None
    batch, (num_centroid, width), dtype = len(features), memory.shape, compute_dtype(features)
    head = num_centroid + 1
    buffer = features.new_empty((padded(batch + 1), min(_COLUMNS, width) + _GAP), dtype=dtype)
    buffer[batch + 1 :] = 0.0
    features_gram = features.new_zeros((len(buffer), len(buffer)), dtype=torch.float64)
    cross = features.new_zeros((len(buffer), num_centroid), dtype=torch.float64)
    memory_products = features.new_zeros((num_centroid, num_centroid), dtype=torch.float64)
    for columns in _slices(width):
        rows = _rows_of(memory, columns, dtype)
        if memory_gram is None:
            memory_products += _self_product(rows)
        if columns.start >= features.shape[1]:
            continue  # a batch of short samples has no columns here: their products are 0
        centred = buffer[:, : columns.stop - columns.start]
        _centre(centred[:batch], centred[batch], features, columns, mask)
        features_gram += _self_product(centred)
        cross += centred @ rows.T
    gamma = features.new_empty((head + batch + 1, head + batch + 1), dtype=torch.float64)
    memory_gamma = gamma[:head, :head]
    if memory_gram is None:
        _centre_gram(memory_products, memory_gamma)
        _drop_rounding(memory_gamma[:-1, :-1], memory_gamma[-1, -1], dtype)
    else:
        memory_gamma.copy_(memory_gram)
    energy = memory_gamma.diagonal()[:-1].sum()
    if not energy + num_centroid * memory_gamma[-1, -1] <= MAXIMUM_ENERGY_RATIO * energy:
        return None
    # Products of mu_m with the rows of the features and with mu_h. The row of mu_h becomes that of mu_h - mu_m.
    mean_products = cross[: batch + 1].mean(dim=1)
    gamma[head:, :num_centroid] = cross[: batch + 1] - mean_products[:, None]
    gamma[head:, num_centroid] = mean_products
    gamma[-1, :head] -= memory_gamma[-1]
    gamma[:head, head:] = gamma[head:, :head].T
    gamma[head:, head:] = features_gram[: batch + 1, : batch + 1]
    gamma[-1, head:-1] -= mean_products[:-1]
    gamma[head:-1, -1] = gamma[-1, head:-1]
    gamma[-1, -1] += memory_gamma[-1, -1] - 2 * mean_products[-1]
    _drop_rounding(gamma[head:-1, head:-1], features_gram[batch, batch], dtype)
    return gamma


def forward(
    sides: Sequence[tuple[Tensor, Tensor | None, Tensor | None]], mask: Tensor | None
) -> Sequence[Tensor]:
    """Gamma, float64, of each side: features [B, F], memory [K, F'] or None, and its own block of Gamma if given."""
    return [_forward(*side, mask) for side in sides]


def _forward(
    features: Tensor, memory: Tensor | None, memory_gram: Tensor | None, mask: Tensor | None
) -> Tensor:
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
    # (rows, columns) of the products that make up the lower triangle.
    memory_rows, feature_rows = slice(0, first), slice(first, total)
    products = [(feature_rows, feature_rows)]
    if head:
        products.append((feature_rows, memory_rows))
        if memory_gram is None:
            products.append((memory_rows, memory_rows))
    sums = features.new_zeros((total, total), dtype=torch.float64)
    for stacked in _stacked(features, memory, mask):
        for rows, columns in products:
            if rows == columns:
                sums[rows, rows] += _self_product(stacked[rows])
            else:
                sums[rows, columns] += stacked[rows] @ stacked[columns].T
    sums[memory_rows, feature_rows] = sums[feature_rows, memory_rows].T
    unpadded = torch.tensor([*range(head), *range(first, last + 1)], device=sums.device)
    gram = sums[unpadded[:, None], unpadded]
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
    """T^T ``matrix`` for a matrix [N, n]: the rows of the features [B, n] and those of the memory [K, n]."""
    features, last = matrix[head:-1], matrix[-1]
    d_features = features - features.mean(dim=0) + last / max(1, features.shape[0])
    if head == 0:
        return d_features, matrix[:0]
    memory, memory_mean = matrix[: head - 1], matrix[head - 1]
    return d_features, memory - memory.mean(dim=0) + (memory_mean - last) / (head - 1)


def _weighted_sum(target: Tensor, terms: list[tuple[Tensor, Tensor]]) -> None:
    """Write the sum of weights [n, m] @ rows [m, w] over ``terms`` to a target [n, w], in its dtype."""
    (weights, rows), *others = terms
    total = target if target.dtype == rows.dtype else rows.new_empty(target.shape)
    torch.mm(weights, rows, out=total)
    for weights, rows in others:
        torch.addmm(total, weights, rows, out=total)
    if total is not target:
        target.copy_(total)


def backward(
    features: Tensor,
    memory: Tensor | None,
    mask: Tensor | None,
    d_gram: Tensor,
    weights: Tensor | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Return (d features, d memory); one that is not needed has no elements.

    ``d_gram`` [L, N, N] are derivatives by Gamma, to be added with ``weights`` [L] or, with None, as they are.
    """
    total = (
        d_gram.sum(dim=0) if weights is None else torch.tensordot(weights.to(d_gram.dtype), d_gram, dims=1)
    )
    needs = needs[0], needs[1] and memory is not None
    d_features = torch.empty_like(features) if needs[0] else features.new_empty(0)
    d_memory = torch.empty_like(memory) if memory is not None and needs[1] else features.new_empty(0)
    features_width = features.shape[1]
    head = 0 if memory is None else memory.shape[0] + 1
    width = features_width if memory is None else memory.shape[1]
    dtype = compute_dtype(features)
    # For each gradient, the weights of the features' rows and of the memory's rows.
    of_rows = [
        [columns.T.to(dtype) for columns in _transposed_map(rows.T, head)]
        for rows in _transposed_map(total + total.T, head)
    ]
    copied = mask is not None or any(each is not None and each.dtype != dtype for each in (features, memory))
    step = _COLUMNS if copied else width
    # No slice straddles the end of the features.
    for start, stop in pairwise(
        [*range(0, features_width, step), *range(features_width, width, step), width]
    ):
        columns, inside = slice(start, stop), stop <= features_width
        of_features = _rows_of(features, columns, dtype, mask) if inside else None
        of_memory = None if memory is None else _rows_of(memory, columns, dtype)
        for target, needed, weights_of_target in zip((d_features, d_memory), needs, of_rows, strict=True):
            if needed and (inside or target is d_memory):
                pairs = zip(weights_of_target, (of_features, of_memory), strict=True)
                _weighted_sum(target[:, columns], [(w, rows) for w, rows in pairs if rows is not None])
        if needs[0] and mask is not None and inside:
            d_features[:, columns].masked_fill_(_dropped(mask, columns, features_width), 0.0)
    return d_features, d_memory
