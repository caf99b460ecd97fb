"""The Gram matrix of stacked, centred rows from restructured torch operations, with its backward.

The feature axis is walked in slices. A slice holds all rows, so their means are local to it: the rows are
copied to a small float32 buffer (float64 for float64 features), centred there and multiplied into Gamma.
Only the buffer is extra memory; the inputs are never concatenated. Where a slice starts depends on nothing but
F, so equal memories give equal bits.

Backward: Z = T [memory; features] with a constant T (centring, block by block, and the means' rows), so
d[memory; features] = T^T (dGamma + dGamma^T) Z, slice by slice, written straight to the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Columns of one slice: with 134 rows in float32 about 2 MB, which stays in cache.
_SLICE = 4096


def _dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _fill_block(block: Tensor, source: Tensor, columns: slice, mask: Tensor | None) -> None:
    """Write columns of ``source`` [n, F], centred, and their mean to ``block`` [n + 1, columns]; 0 beyond F."""
    rows, mean = block[:-1], block[-1]
    inside = max(0, min(columns.stop, source.shape[1]) - columns.start)
    if rows.shape[0] == 0 or inside == 0:
        block.zero_()
        return
    block[:, inside:] = 0.0
    rows, mean = rows[:, :inside], mean[:inside]
    rows.copy_(source[:, columns])
    if mask is not None:
        rows.masked_fill_(_dropped(mask, columns.start, inside, source.shape[1]), 0.0)
    torch.mean(rows, dim=0, out=mean)
    rows -= mean


def _dropped(mask: Tensor, start: int, length: int, width: int) -> Tensor:
    """Which of ``length`` columns from ``start`` belong to dropped tokens, [n, length], of rows ``width`` wide."""
    token = width // mask.shape[1]
    first, last = start // token, -(-(start + length) // token)
    columns = mask[:, first:last].logical_not().repeat_interleave(token, dim=1)
    return columns[:, start - first * token :][:, :length]


def _stacked(features: Tensor, memory: Tensor | None, mask: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, Z[:, columns]) along the feature axis; every slice reuses one buffer."""
    head = 0 if memory is None else memory.shape[0] + 1
    width = features.shape[1] if memory is None else memory.shape[1]
    rows = head + features.shape[0] + 1
    buffer = features.new_empty(rows * min(_SLICE, width), dtype=_dtype(features))
    for start in range(0, width, _SLICE):
        columns = slice(start, min(start + _SLICE, width))
        length = columns.stop - columns.start
        stacked = buffer[: rows * length].view(rows, length)
        if memory is not None:
            _fill_block(stacked[:head], memory, columns, None)
        _fill_block(stacked[head:], features, columns, mask)
        if memory is not None:
            stacked[-1] -= stacked[head - 1]
        yield columns, stacked


def forward(
    features: Tensor, memory: Tensor | None, memory_gram: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Gamma of features [B, F] and memory [K, F'] or None, whose own block may be known already."""
    head = 0 if memory is None else memory.shape[0] + 1
    total = head + features.shape[0] + 1
    # Slices are summed in float64: near CKA = 1 the losses live in the last bits of Gamma.
    gram = features.new_zeros((total, total), dtype=torch.float64)
    for _, rows in _stacked(features, memory, mask):
        # The memory's own block is a product of its own, the same one whether it is known already or not.
        if memory_gram is None and head:
            gram[:head, :head] += rows[:head] @ rows[:head].T
        gram[head:] += rows[head:] @ rows.T
    if memory_gram is not None:
        gram[:head, :head] = memory_gram
    gram[:head, head:] = gram[head:, :head].T
    return gram.to(_dtype(features))


def _transposed_map(d_gram: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """T^T (dGamma + dGamma^T): the rows that belong to the features [B, N] and to the memory [K, N]."""
    d_sum = d_gram + d_gram.T
    own, mean = d_sum[head:-1], d_sum[-1]
    features = own - own.mean(dim=0) + mean / max(1, own.shape[0])
    if head == 0:
        return features, d_sum[:0]
    own, own_mean = d_sum[: head - 1], d_sum[head - 1]
    return features, own - own.mean(dim=0) + (own_mean - mean) / (head - 1)


def backward(
    features: Tensor, memory: Tensor | None, mask: Tensor | None, d_gram: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return (d features, d memory); one that is not needed is empty."""
    head = 0 if memory is None else memory.shape[0] + 1
    d_features = torch.empty_like(features) if needs[0] else features.new_empty(0)
    d_memory = torch.empty_like(memory) if memory is not None and needs[1] else features.new_empty(0)
    from_features, from_memory = _transposed_map(d_gram, head)
    for columns, rows in _stacked(features, memory, mask):
        inside = max(0, min(columns.stop, features.shape[1]) - columns.start)
        if needs[0] and inside and features.shape[0]:
            product = from_features @ rows[:, :inside]
            if mask is not None:
                product.masked_fill_(_dropped(mask, columns.start, inside, features.shape[1]), 0.0)
            d_features[:, columns.start : columns.start + inside] = product
        if needs[1] and memory is not None:
            d_memory[:, columns] = from_memory @ rows
    return d_features, d_memory
