"""The Gram matrix of stacked, centred rows from restructured torch operations, with its backward.

The feature axis is walked in slices. A slice holds all rows, so their means are local to it: the rows are
copied to a small float32 buffer (float64 for float64 features), centred there and multiplied into Gamma.
Only the buffer is extra memory; the inputs are never concatenated. Where a slice starts depends on nothing but
F, so equal memories give equal bits. The buffer's rows are in an order of their own, in which those that are
multiplied with each other lie together: [memory, features, mean of the memory, mean of the features less it].

Backward: Z = T [memory; features] with a constant T (centring, block by block, and the means' rows), so
d[memory; features] = T^T (dGamma + dGamma^T) Z, slice by slice, written straight to the gradients. Without a memory
it is (T^T (dGamma + dGamma^T) T) features, whose small matrix centres them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Columns that one product takes, and how many such products a slice holds. Forward a slice of 34 rows of float32 is
# 1.7 MB, of 134 rows 6.6 MB; backward, where the gradients are held as well, a third of it.
_PART, _FORWARD_PARTS, _BACKWARD_PARTS = 2048, 6, 2
# The rows of a buffer are this much longer than a slice: a multiple of 1024 apart they would share cache sets.
_GAP = 16


def _dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _slices(width: int, parts: int) -> Iterator[slice]:
    """Cut the feature axis into slices of so many parts."""
    for start in range(0, width, _PART * parts):
        yield slice(start, min(start + _PART * parts, width))


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
    rows.copy_(source[:, columns])
    if mask is not None:
        rows.masked_fill_(_dropped(mask, columns, source.shape[1]), 0.0)
    torch.mean(rows, dim=0, out=mean)
    rows -= mean


def _stacked(
    features: Tensor, memory: Tensor | None, mask: Tensor | None, parts: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, Z[:, columns]) along the feature axis, in the buffer's order; every slice reuses one buffer.

    Z is followed by columns of zeros up to a multiple of a product's.
    """
    count = 0 if memory is None else memory.shape[0]
    last = count + features.shape[0]
    width = features.shape[1] if memory is None else memory.shape[1]
    part = min(_PART, width)
    buffer = features.new_empty(
        (last + (1 if memory is None else 2), part * parts + _GAP), dtype=_dtype(features)
    )
    for columns in _slices(width, parts):
        stacked = buffer[:, : -(-(columns.stop - columns.start) // part) * part]
        if memory is not None:
            _centre(stacked[:count], stacked[last], memory, columns, None)
        _centre(stacked[count:last], stacked[-1], features, columns, mask)
        if memory is not None:
            stacked[-1] -= stacked[last]
        yield columns, stacked


def _order(count: int, samples: int, device: torch.device) -> Tensor:
    """Where the rows of Gamma are in the buffer's order, beside a memory of ``count`` rows."""
    last = count + samples
    return torch.tensor([*range(count), last, *range(count, last), last + 1], device=device)


def _add_products(gram: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left right^T of [parts, n, columns] to ``gram``: float32 within a part, float64 over the parts.

    Near CKA = 1 the losses live in the last bits of Gamma.
    """
    gram += torch.bmm(left, right.mT).sum(dim=0, dtype=torch.float64)


def forward(
    features: Tensor, memory: Tensor | None, memory_gram: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Gamma of features [B, F] and memory [K, F'] or None, whose own block may be known already."""
    count = 0 if memory is None else memory.shape[0]
    last = count + features.shape[0]
    total = last + (2 if count else 1)
    own, batch, means = slice(0, count), slice(count, last), slice(last, total)
    gram = features.new_zeros((total, total), dtype=torch.float64)
    for _, stacked in _stacked(features, memory, mask, _FORWARD_PARTS):
        rows = stacked.unflatten(1, (-1, min(_PART, stacked.shape[1]))).transpose(0, 1)
        # The rows of the means apart: one row more than a multiple of 4 makes a product a third slower. And the
        # memory's own products apart: they are the same ones whether its block is known already or not.
        if count and memory_gram is None:
            _add_products(gram[own, own], rows[:, own], rows[:, own])
            _add_products(gram[last : last + 1, own], rows[:, last : last + 1], rows[:, own])
        _add_products(gram[batch, :last], rows[:, batch], rows[:, :last])
        _add_products(gram[means, batch], rows[:, means], rows[:, batch])
        if count:
            _add_products(gram[-1:, own], rows[:, -1:], rows[:, own])
        for i in range(last, total):
            _add_products(gram[i : i + 1, last : i + 1], rows[:, i : i + 1], rows[:, last : i + 1])
    gram[own, batch] = gram[batch, own].T
    gram[:last, means] = gram[means, :last].T
    if count:
        gram[last, -1] = gram[-1, last]
        order = _order(count, features.shape[0], gram.device)
        gram = gram[order[:, None], order]
    if memory_gram is not None:
        gram[: count + 1, : count + 1] = memory_gram
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


def _uncentred(features: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, features[:, columns]), 0 where dropped, along the feature axis."""
    for columns in _slices(features.shape[1], _BACKWARD_PARTS):
        rows = features[:, columns].to(_dtype(features))
        if mask is not None:
            rows = rows.masked_fill(_dropped(mask, columns, features.shape[1]), 0.0)
        yield columns, rows


def _multiply(left: Tensor, right: Tensor, target: Tensor) -> None:
    """Write left @ right to ``target``, in its dtype, in parts of the columns that stay in a core's cache."""
    for part, result in zip(right.split(_PART, dim=1), target.split(_PART, dim=1), strict=True):
        if result.dtype == left.dtype:
            torch.mm(left, part, out=result)
        else:
            result.copy_(left @ part)


def backward(
    features: Tensor, memory: Tensor | None, mask: Tensor | None, d_gram: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return (d features, d memory); one that is not needed is empty."""
    d_features = torch.empty_like(features) if needs[0] else features.new_empty(0)
    d_memory = torch.empty_like(memory) if memory is not None and needs[1] else features.new_empty(0)
    if memory is None:
        left, _ = _transposed_map(d_gram.double(), 0)
        own, mean = left[:, :-1], left[:, -1:]
        own = own - own.mean(dim=1, keepdim=True) + mean / max(1, features.shape[0])
        from_features = from_memory = own.to(d_gram.dtype)
        slices = _uncentred(features, mask)
    else:
        order = _order(memory.shape[0], features.shape[0], d_gram.device).argsort()
        from_features, from_memory = (
            weights[:, order] for weights in _transposed_map(d_gram, memory.shape[0] + 1)
        )
        slices = _stacked(features, memory, mask, _BACKWARD_PARTS)
    for columns, rows in slices:
        inside = slice(columns.start, min(columns.stop, features.shape[1]))
        length = inside.stop - inside.start
        if needs[0] and length > 0 and features.shape[0]:
            _multiply(from_features, rows[:, :length], d_features[:, inside])
            if mask is not None:
                d_features[:, inside].masked_fill_(_dropped(mask, inside, features.shape[1]), 0.0)
        if needs[1] and memory is not None:
            _multiply(from_memory, rows[:, : columns.stop - columns.start], d_memory[:, columns])
    return d_features, d_memory
