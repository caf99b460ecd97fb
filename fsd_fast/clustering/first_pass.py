"""The first pass over a stream: check the points, index them, and keep a sketch of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fsd_fast.clustering.checkpoint import NOT_SAVED, Chunk, ClusteringCheckpoint, Stage
from fsd_fast.clustering.sketch import CountSketch
from fsd_fast.clustering.stream import PointBatch, PointStream
from fsd_fast.distributed import Collectives
from fsd_fast.untrusted import FLAG, TEXT, object_of, shorten

# Larger than what the allocator ever keeps for itself.
_BLOCK_BYTES = 64 << 20
_STAGE = "pass_1"
_METADATA = object_of({"has_index": FLAG, "device": TEXT})


@dataclass
class FirstPass:
    """What one pass over the points gives.

    Attributes:
        sketches: ``[n, w]`` of this process's points.
        sample_index: int64 ``[n]``: the source's own, or the places of the points in the order of the processes.
        norms: Euclidean norms of this process's points, float32 ``[n]``.
        mean: ``[F]`` float64, of the points of all processes.
        num_samples: N, over all processes.
    """

    sketches: Tensor
    sample_index: Tensor
    norms: Tensor
    mean: Tensor
    num_samples: int


class _Rows:
    """Rows ``[n, w]`` that arrive batch by batch, kept in large blocks.

    Small tensors between the points' own tensors would leave the heap full of holes.
    """

    def __init__(self) -> None:
        self.count = 0
        self._blocks: list[Tensor] = []

    def append(self, rows: Tensor) -> None:
        while rows.shape[0]:
            size = max(1, _BLOCK_BYTES // (rows.element_size() * rows.shape[1]))
            place = self.count % size
            if place == 0:
                self._blocks.append(rows.new_empty(size, rows.shape[1]))
            taken = min(size - place, rows.shape[0])
            self._blocks[-1][place : place + taken] = rows[:taken]
            self.count += taken
            rows = rows[taken:]

    def since(self, row: int) -> Tensor:
        """The rows from this one on; there is at least one."""
        size = self._blocks[0].shape[0]
        tails = [
            block[max(row - first, 0) : self.count - first]
            for first, block in zip(range(0, self.count, size), self._blocks, strict=True)
            if first + size > row
        ]
        return torch.cat(tails)

    def join(self) -> Tensor:
        """All rows; nothing stays here, and they are never in memory twice."""
        if len(self._blocks) == 1:
            return self._blocks.pop()[: self.count]
        joined = self._blocks[0].new_empty(self.count, self._blocks[0].shape[1])
        size = self._blocks[0].shape[0]
        while self._blocks:
            first = (len(self._blocks) - 1) * size
            joined[first : first + size] = self._blocks.pop()[: self.count - first]
        return joined


class _Record:
    """What is kept of this process's points: rows of sketches, sample indices and norms, and the points' sum.

    Args:
        stage: Where it is saved; what an interrupted pass had saved is taken over.
        make_sketch: Gives the sketch of points with F features.
        features: F, where it is known before a batch is read.

    Raises:
        ValueError: What is saved is something else.
    """

    def __init__(self, stage: Stage, make_sketch: Callable[[int], CountSketch], features: int | None) -> None:
        self._stage, self._make_sketch = stage, make_sketch
        self._sketch: CountSketch | None = None
        self._width: int | None = None
        self.columns = {"sketches": _Rows(), "sample_index": _Rows(), "norms": _Rows()}
        self.total: Tensor | None = None
        if not stage.metadata:
            stage.metadata |= {"has_index": False, "device": "cpu"}
        _METADATA(stage.metadata, stage.where)
        self.has_index: bool = stage.metadata["has_index"]
        while stage.chunks:
            self._restore(stage.chunks.pop(0), features)
        if self.count != stage.rows:
            raise ValueError(
                f"{stage.where}: rows: expected the {self.count} of its chunks, got {stage.rows}"
            )
        self._saved_rows = self.count

    @property
    def count(self) -> int:
        return self.columns["norms"].count

    def _restore(self, chunk: Chunk, features: int | None) -> None:
        if "norms" in chunk:
            norms = chunk.tensor("norms", torch.float32, [None, 1])
            rows = norms.shape[0]
            sketches = chunk.tensor("sketches", torch.float32, [rows, self._width])
            index = chunk.tensor("sample_index", torch.int64, [rows, 1])
            self._check_width(sketches.shape[1])
            for name, tensor in (("norms", norms), ("sketches", sketches), ("sample_index", index)):
                self.columns[name].append(tensor)
        if "total" in chunk:
            total = chunk.tensor("total", torch.float64, [features])
            try:
                self.total = total.to(self._stage.metadata["device"])
            except (RuntimeError, AssertionError) as error:
                raise ValueError(f"{self._stage.where}: device: {shorten(str(error))}") from None

    def _check_width(self, width: int) -> None:
        if width < 1 or self._width not in (None, width):
            raise ValueError(
                f"{self._stage.where}: expected sketches of one width, at least 1, got {width} after {self._width}"
            )
        self._width = width

    def add(self, batch: PointBatch, features: int) -> None:
        """Take a batch in; F is ``features``."""
        points = batch.points
        if self._sketch is None:
            self._sketch = self._make_sketch(features)
            self._check_width(self._sketch.width)
            self.has_index = batch.sample_index is not None
            self._stage.metadata |= {"has_index": self.has_index, "device": points.device.type}
        if self.total is None:
            self.total = torch.zeros(features, dtype=torch.float64, device=points.device)
        places = torch.arange(batch.offset, batch.end)
        index = places if batch.sample_index is None else batch.sample_index
        self.columns["sketches"].append(self._sketch(points).cpu())
        self.columns["sample_index"].append(index[:, None])
        self.columns["norms"].append(batch.norms[:, None])
        self.total[: points.shape[1]] += points.sum(dim=0, dtype=torch.float32)

    def unsaved(self) -> dict[str, Tensor]:
        """The rows since the last saving, and the sum so far."""
        tensors = {} if self.total is None else {"total": self.total}
        if self.count > self._saved_rows:
            tensors |= {name: rows.since(self._saved_rows) for name, rows in self.columns.items()}
        self._saved_rows = self.count
        return tensors


def first_pass(
    stream: PointStream,
    make_sketch: Callable[[int], CountSketch],
    n_clusters: int,
    collectives: Collectives,
    checkpoint: ClusteringCheckpoint = NOT_SAVED,
) -> FirstPass:
    """Read the points once: check them, index them, and keep a sketch of each.

    Args:
        stream: The points of this process.
        make_sketch: Gives the sketch of points with F features.
        n_clusters: K.
        collectives: The processes.
        checkpoint: Where the pass is saved, as stage "pass_1".

    Raises:
        ValueError: Fewer points than clusters, or a sample index that two points share.
    """

    def read() -> _Record:
        stage = checkpoint.stage(_STAGE, append=True)
        record = _Record(stage, make_sketch, stream.features)
        for batch in stage.unread(stream):
            record.add(batch, stream.features or batch.points.shape[1])
            stage.batch_done(batch, record.unsaved)
        stage.finish(record.unsaved)
        return record

    record = collectives.run_on_all_ranks(read)
    sizes = collectives.gather_sizes(record.count)
    if sum(sizes) < n_clusters:
        raise ValueError(f"points: {sum(sizes)} samples are fewer than the {n_clusters} clusters asked for")

    def finish() -> FirstPass:
        if record.total is None:
            raise ValueError("points: this process has no sample; every process needs at least one")
        index = record.columns["sample_index"].join().squeeze(1)
        if not record.has_index:
            index += sum(sizes[: collectives.rank])
        norms = record.columns["norms"].join().squeeze(1)
        return FirstPass(record.columns["sketches"].join(), index, norms, record.total, sum(sizes))

    found = collectives.run_on_all_ranks(finish)
    _check_unique(collectives.gather_rows(found.sample_index))
    found.mean = collectives.sum_(found.mean) / found.num_samples
    return found


def _check_unique(sample_index: Tensor) -> None:
    values, occurrences = sample_index.unique(return_counts=True)
    if values.shape[0] < sample_index.shape[0]:
        shared = values[occurrences > 1]
        raise ValueError(
            f"points: {shared.shape[0]} sample indices occur more than once, {shared[:5].tolist()} among them; "
            f"every sample counts exactly once, on one process"
        )


def fetch_rows(
    stream: PointStream,
    wanted: Tensor,
    sample_index: Tensor,
    like: Tensor,
    collectives: Collectives,
    checkpoint: ClusteringCheckpoint = NOT_SAVED,
    stage_name: str = "fetch",
) -> Tensor:
    """Read the points once more and return the ones wanted.

    Args:
        stream: The points of this process.
        wanted: Sample indices, int64 ``[m]``.
        sample_index: Of this process's points in the order of the stream, int64 ``[n]``.
        like: Gives F and the device.
        collectives: The processes.
        checkpoint: Where the pass is saved.
        stage_name: Its name there.

    Returns:
        ``[m, F]`` float32.
    """
    shape = [wanted.shape[0], like.shape[-1]]

    def read() -> Tensor:
        stage = checkpoint.stage(stage_name)
        rows = stage.restore("rows", torch.zeros(shape, dtype=torch.float32, device=like.device))
        for batch in stage.unread(stream):
            here = sample_index[batch.offset : batch.end]
            slots, places = (wanted[:, None] == here[None]).nonzero(as_tuple=True)
            if slots.numel():
                found = batch.points[places.to(batch.points.device)]
                rows[slots.to(rows.device), : found.shape[1]] = found.to(rows)
            stage.batch_done(batch, lambda: {"rows": rows})
        stage.finish(lambda: {"rows": rows})
        return rows

    # Each row is on one process and zero on the others.
    return collectives.sum_(collectives.run_on_all_ranks(read))
