"""Points as a stream: batches ``[b, F]`` that can be read again and need not fit in memory together.

A source is a tensor ``[N, F]``, an iterable that starts afresh on every ``iter``, a callable that returns an
iterator, or an object that can also start in the middle (``Resumable``). It yields tensors ``[b, F]``, or pairs of
such a tensor and the samples' numbers ``[b]`` int64. Several processes each hold a source of their own, with samples
that no other process has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Resumable(Protocol):
    """A source whose first batches can be left out without the work of making them."""

    def read_from(self, batches: int, rows: int) -> Iterable[object]:
        """Batches from number ``batches`` on; those before it hold ``rows`` points."""


Source = Tensor | Resumable | Iterable[object] | Callable[[], Iterable[object]]


@dataclass
class PointBatch:
    """Points ``[b, F_p]``, their numbers ``[b]`` if the source gives any, and the place of the first.

    ``number`` is the batch's own place in the source, empty batches counted.
    """

    points: Tensor
    index: Tensor | None
    offset: int
    number: int

    def name_row(self, row: int) -> str:
        """Say which sample a row is."""
        if self.index is None:
            return f"sample at position {self.offset + row}"
        return f"sample {int(self.index[row])}"


class PointStream:
    """A source of points, checked as it is read.

    Args:
        source: See the module's docstring.
        batch_size: Rows per batch where the source is a tensor.
        features: F; None: the width of the first batch.
        narrower: Batches may have fewer than F columns: the missing ones are zero.

    Raises:
        TypeError: A source of another kind, such as an iterator, which cannot be read twice.
    """

    def __init__(
        self, source: Source, *, batch_size: int, features: int | None = None, narrower: bool = False
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

    def _items(self, batches: int, rows: int) -> Iterable[object]:
        if isinstance(self._source, Tensor):
            return self._source.split(self._batch_size)[batches:]
        if isinstance(self._source, Resumable):
            return self._source.read_from(batches, rows)
        items = self._source() if callable(self._source) else self._source
        return itertools.islice(items, batches, None)

    def read(self, batches: int = 0, rows: int = 0) -> Iterator[PointBatch]:
        """Read the source once, from batch number ``batches`` on; those before it hold ``rows`` points.

        Raises:
            TypeError: A batch is no tensor, or numbers are not int64.
            ValueError: A batch of the wrong shape or width, or a NaN or infinite feature; the sample is
                named.
        """
        offset = rows
        for number, item in enumerate(self._items(batches, rows), batches):
            points, index = item if isinstance(item, tuple) else (item, None)
            if not isinstance(points, Tensor) or not points.is_floating_point():
                kind = points.dtype if isinstance(points, Tensor) else type(points).__name__
                raise TypeError(f"points: expected batches that are floating tensors [b, F], got {kind}")
            if points.ndim != 2:
                raise ValueError(f"points: expected batches [b, F], got shape {list(points.shape)}")
            if index is not None:
                if not isinstance(index, Tensor) or index.dtype != torch.int64:
                    raise TypeError("points: expected the samples' numbers as an int64 tensor [b]")
                if index.shape != points.shape[:1]:
                    raise ValueError(
                        f"points: {points.shape[0]} rows with numbers of shape {list(index.shape)}"
                    )
                index = index.cpu()
            if points.shape[0] == 0:
                continue
            batch = PointBatch(points.detach(), index, offset, number)
            self._check(batch)
            yield batch
            offset += points.shape[0]

    def _check(self, batch: PointBatch) -> None:
        width = batch.points.shape[1]
        if self.features is None:
            self.features = width
        if width > self.features or (width < self.features and not self._narrower):
            bound = "at most " if self._narrower else ""
            raise ValueError(
                f"points: {batch.name_row(0)} has {width} features, expected {bound}{self.features}"
            )
        # A row's sum is finite if all of it is, unless it overflows: then every number is looked at.
        dtype = torch.promote_types(batch.points.dtype, torch.float32)
        suspects = (~batch.points.sum(dim=1, dtype=dtype).isfinite()).nonzero().flatten()
        for row in suspects.tolist():
            if not bool(batch.points[row].isfinite().all()):
                raise ValueError(f"points: {batch.name_row(row)} has a NaN or infinite feature")
