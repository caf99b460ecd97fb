"""The Gram matrix of stacked, centred rows from restructured torch operations, with its backward.

The feature axis is walked in slices. A slice holds all rows, so their means are local to it: the rows are
copied to a small float32 buffer (float64 for float64 features), centred there and multiplied into Gamma.
Only the buffer is extra memory; the inputs are never concatenated.

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
    """Write columns of ``source`` [n, F], centred, and their mean to ``block`` [n + 1, columns]."""
    rows, mean = block[:-1], block[-1]
    if rows.shape[0] == 0 or columns.start >= source.shape[1]:
        block.zero_()
        return
    rows.copy_(source[:, columns])
    if mask is not None:
        token = source.shape[1] // mask.shape[1]
        kept = mask[:, columns.start // token : columns.stop // token]
        rows.view(*kept.shape, token).masked_fill_(~kept[:, :, None], 0.0)
    torch.mean(rows, dim=0, out=mean)
    rows -= mean


def _slices(features: Tensor, memory: Tensor | None, mask: Tensor | None) -> Iterator[slice]:
    """Cut the feature axis into slices of whole tokens; none straddles the end of narrower features."""
    own = features.shape[1]
    token = 1 if mask is None or own == 0 else own // mask.shape[1]
    step = max(1, _SLICE // token) * token
    for start in range(0, own, step):
        yield slice(start, min(start + step, own))
    for start in range(own, own if memory is None else memory.shape[1], _SLICE):
        assert memory is not None
        yield slice(start, min(start + _SLICE, memory.shape[1]))


def _stacked(features: Tensor, memory: Tensor | None, mask: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, Z[:, columns]) along the feature axis; every slice reuses one buffer."""
    head = 0 if memory is None else memory.shape[0] + 1
    buffer = features.new_empty(0, dtype=_dtype(features))
    for columns in _slices(features, memory, mask):
        shape = (head + features.shape[0] + 1, columns.stop - columns.start)
        if buffer.shape != shape:
            buffer = features.new_empty(shape, dtype=_dtype(features))
        if memory is not None:
            _fill_block(buffer[:head], memory, columns, None)
        _fill_block(buffer[head:], features, columns, mask)
        yield columns, buffer


def forward(
    features: Tensor, memory: Tensor | None, memory_gram: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Gamma of features [B, F] and memory [K, F'] or None, whose own block may be known already."""
    head = 0 if memory is None else memory.shape[0] + 1
    total = head + features.shape[0] + 1
    # Slices are summed in float64: near CKA = 1 the losses live in the last bits of Gamma.
    gram = features.new_zeros((total, total), dtype=torch.float64)
    first = head if memory_gram is not None else 0
    for _, rows in _stacked(features, memory, mask):
        gram[first:] += rows[first:] @ rows.T
    if memory_gram is not None:
        gram[:head, :head] = memory_gram
        gram[:head, head:] = gram[head:, :head].T
    return gram.to(_dtype(features))


def _rows_of_transposed(d_sum: Tensor, first: int, rows: int) -> Tensor:
    """Rows of T^T (dGamma + dGamma^T) that belong to the block of ``rows`` rows starting at ``first``."""
    block, mean_row = d_sum[first : first + rows], d_sum[first + rows]
    return block - block.mean(dim=0) + mean_row / rows


def backward(
    features: Tensor, memory: Tensor | None, mask: Tensor | None, d_gram: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return (d features, d memory); one that is not needed is empty."""
    head = 0 if memory is None else memory.shape[0] + 1
    d_features = torch.empty_like(features) if needs[0] else features.new_empty(0)
    d_memory = torch.empty_like(memory) if memory is not None and needs[1] else features.new_empty(0)
    d_sum = d_gram + d_gram.T
    batch = features.shape[0]
    from_features = _rows_of_transposed(d_sum, head, batch) if needs[0] and batch else None
    from_memory = _rows_of_transposed(d_sum, 0, head - 1) if needs[1] and head > 1 else None
    for columns, rows in _stacked(features, memory, mask):
        if from_features is not None and columns.start < features.shape[1]:
            product = torch.mm(from_features, rows)
            if mask is not None:
                token = features.shape[1] // mask.shape[1]
                kept = mask[:, columns.start // token : columns.stop // token]
                product.view(*kept.shape, token).masked_fill_(~kept[:, :, None], 0.0)
            d_features[:, columns] = product
        if from_memory is not None:
            d_memory[:, columns] = torch.mm(from_memory, rows)
    return d_features, d_memory
