"""Points as a stream: batches ``[b, F]`` that can be read again and need not fit in memory together.

A source is a tensor ``[N, F]``, an iterable that starts afresh on every ``iter``, a callable that returns an
iterator, or an object that can also start in the middle (``Resumable``). It yields tensors ``[b, F]``, pairs of such a
tensor and the samples' indices ``[b]`` int64, or a ``PointBatch`` of the two. Several processes each hold a source of
their own, with samples that no other process has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

# Squared distances between points, 4 times their squared norms at most, stay finite in float32, and so do those of
# their sketches, which are a few percent off.
MAXIMUM_NORM = 2.0**62


@runtime_checkable
class Resumable(Protocol):
    """A source whose first batches can be left out without the work of making them."""

    def read_from(self, batch_number: int, offset: int) -> Iterable[object]:
        """Batches from this number on; those before it hold ``offset`` points."""


PointSource = Tensor | Resumable | Iterable[object] | Callable[[], Iterable[object]]


@dataclass
class PointBatch:
    """A batch of points and its place in the stream.

    A source gives the first two; the stream checks them and fills in the others.

    Attributes:
        points: ``[b, F_p]``, floating, F_p <= F: missing columns are zero.
        sample_index: int64 ``[b]`` on the CPU, or None where the source gives no indices.
        offset: Points of this process before this batch.
        batch_number: Batches of the source before this one, empty ones included.
        norms: Euclidean norms of the points, float32 ``[b]`` on the CPU.
    """

    points: Tensor
    sample_index: Tensor | None
    offset: int = 0
    batch_number: int = 0
    norms: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def end(self) -> int:
        """Points of this process up to the end of this batch."""
        return self.offset + self.points.shape[0]

    def name_row(self, row: int) -> str:
        """Say which sample a row is."""
        if self.sample_index is None:
            return f"sample at position {self.offset + row}"
        return f"sample {int(self.sample_index[row])}"


class PointStream:
    """A source of points, checked as it is read.

    Args:
        source: See the module's docstring.
        batch_size: Rows per batch where the source is a tensor.
        features: F; None: the width of the first batch.
        narrower: Batches may have fewer than F columns: the missing ones are zero.

    Raises:
        TypeError: A source of another kind, such as an iterator, which cannot be read twice.
        ValueError: A tensor that is not ``[N, F]``.
    """

    def __init__(
        self, source: PointSource, *, batch_size: int, features: int | None = None, narrower: bool = False
    ) -> None:
        if isinstance(source, Iterator) or not (
            callable(source) or hasattr(source, "__iter__") or isinstance(source, Resumable)
        ):
            raise TypeError(
                f"points: expected a tensor [N, F], a re-iterable of batches or a callable that returns an "
                f"iterator, got {type(source).__name__}"
            )
        if isinstance(source, Tensor) and source.ndim != 2:
            raise ValueError(f"points: expected shape [N, F], got {list(source.shape)}")
        self._source = source
        self._batch_size = batch_size
        self._narrower = narrower
        self.features = features

    def read(self, batch_number: int = 0, offset: int = 0) -> Iterator[PointBatch]:
        """Read the source once, from this batch on; the batches before it hold ``offset`` points.

        Raises:
            TypeError: A batch is no tensor, or sample indices are not int64.
            ValueError: A batch of the wrong shape or width, a NaN or infinite feature, or features so large that
                squared distances overflow float32; the sample is named.
        """
        for number, item in enumerate(self._items(batch_number, offset), batch_number):
            batch = _as_batch(item)
            batch.offset, batch.batch_number = offset, number
            if batch.points.shape[0]:
                self._check_width(batch)
                batch.norms = _checked_norms(batch)
                yield batch
                offset = batch.end

    def _items(self, batch_number: int, offset: int) -> Iterable[object]:
        if isinstance(self._source, Tensor):
            return self._source.split(self._batch_size)[batch_number:]
        if isinstance(self._source, Resumable):
            return self._source.read_from(batch_number, offset)
        items = self._source() if callable(self._source) else self._source
        return itertools.islice(items, batch_number, None)

    def _check_width(self, batch: PointBatch) -> None:
        width = batch.points.shape[1]
        if self.features is None:
            self.features = width
        if width > self.features or (width < self.features and not self._narrower):
            bound = "at most " if self._narrower else ""
            raise ValueError(
                f"points: {batch.name_row(0)} has {width} features, expected {bound}{self.features}"
            )


def _as_batch(item: object) -> PointBatch:
    """What a source has yielded, checked for kind and shape."""
    if isinstance(item, PointBatch):
        points, index = item.points, item.sample_index
    else:
        points, index = item if isinstance(item, tuple) else (item, None)
    if not isinstance(points, Tensor) or not points.is_floating_point():
        kind = points.dtype if isinstance(points, Tensor) else type(points).__name__
        raise TypeError(f"points: expected batches that are floating tensors [b, F], got {kind}")
    if points.ndim != 2:
        raise ValueError(f"points: expected batches [b, F], got shape {list(points.shape)}")
    if index is None:
        return PointBatch(points.detach(), None)
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"points: expected sample indices as an int64 tensor [b], got {kind}")
    if index.shape != points.shape[:1]:
        raise ValueError(f"points: {points.shape[0]} rows with sample indices of shape {list(index.shape)}")
    return PointBatch(points.detach(), index.cpu())


def _checked_norms(batch: PointBatch) -> Tensor:
    """Norms of a batch, which tell in one read whether all of its features are finite and small enough."""
    dtype = torch.promote_types(batch.points.dtype, torch.float32)
    norms = torch.linalg.vector_norm(batch.points, dim=1, dtype=dtype).cpu().float()
    # A NaN compares as False.
    suspects = (~(norms <= MAXIMUM_NORM)).nonzero().flatten().tolist()
    for row in suspects:
        if not bool(batch.points[row].isfinite().all()):
            raise ValueError(f"points: {batch.name_row(row)} has a NaN or infinite feature")
    if suspects:
        largest = float(batch.points[suspects[0]].abs().max())
        raise ValueError(
            f"points: {batch.name_row(suspects[0])} has features as large as {largest:.3g}: expected a norm of at "
            f"most {MAXIMUM_NORM:.3g}, beyond which squared distances overflow float32"
        )
    return norms
