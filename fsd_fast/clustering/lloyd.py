"""Lloyd's algorithm over a stream, with exact sums per epoch and over any number of processes.

    assign   l_i = argmin_k ||x_i - c_k||^2
    update   c_k = (sum of x_i over l_i = k) / n_k,  at the end of the epoch

Sums are kept in float64 and all-reduced, so the centroids do not depend on the batches or on the number of
processes beyond rounding. An empty cluster moves to the point that is farthest from its own centroid.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fsd_fast.clustering.checkpoint import NOT_SAVED, ClusteringState
from fsd_fast.clustering.sketch import CountSketch
from fsd_fast.clustering.stream import PointStream
from fsd_fast.distributed import Collectives
from fsd_kernels.kmeans import assign, update_

_COLUMNS = ("sketches", "numbers", "norms")
# Larger than what the allocator ever keeps for itself.
_BLOCK_BYTES = 64 << 20


class _Rows:
    """Rows ``[n, w]`` that arrive in parts, kept in large blocks.

    Small tensors between the points' own tensors would leave the heap full of holes.
    """

    def __init__(self) -> None:
        self.count = 0
        self._blocks: list[Tensor] = []

    def append(self, part: Tensor) -> None:
        while part.shape[0]:
            size = max(1, _BLOCK_BYTES // (part.element_size() * part.shape[1]))
            place = self.count % size
            if place == 0:
                self._blocks.append(part.new_empty(size, part.shape[1]))
            taken = min(size - place, part.shape[0])
            self._blocks[-1][place : place + taken] = part[:taken]
            self.count += taken
            part = part[taken:]

    def since(self, row: int) -> Tensor:
        """The rows from number ``row`` on, of which there is at least one."""
        size = self._blocks[0].shape[0]
        parts = [
            block[max(row - first, 0) : self.count - first]
            for first, block in zip(range(0, self.count, size), self._blocks, strict=True)
            if first + size > row
        ]
        return torch.cat(parts)

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


@dataclass
class IterationStats:
    """One epoch: ``inertia`` is measured against the centroids that the epoch started from."""

    iteration: int
    inertia: float
    empty_clusters: int
    reseeded: int
    shift: float
    seconds: float


@dataclass
class Survey:
    """What one look at the points gives: their sketches ``[n, w]``, numbers ``[n]``, norms ``[n]`` and mean.

    ``numbers`` are the source's own, or the places in the order of the processes; sketches, numbers and norms
    are those of this process, ``mean`` ``[F]`` float64 and ``total`` are those of all.
    """

    sketches: Tensor
    numbers: Tensor
    norms: Tensor
    mean: Tensor
    total: int


@dataclass
class LloydResult:
    """Centroids ``[K, F]`` float32, counts ``[K]``, labels ``[n]`` of this process, inertia, each epoch's stats."""

    centroids: Tensor
    counts: Tensor
    labels: Tensor
    inertia: float
    n_iter: int
    stats: list[IterationStats] = field(default_factory=list)


def survey(
    stream: PointStream,
    sketch: Callable[[int], CountSketch],
    n_clusters: int,
    collectives: Collectives,
    state: ClusteringState = NOT_SAVED,
) -> Survey:
    """Read the points once: check them, number them, and keep a sketch of each.

    Args:
        stream: The points of this process.
        sketch: Gives the sketch of points with F features.
        n_clusters: K.
        collectives: The processes.
        state: Where the reading is saved, as stage "pass_1".

    Raises:
        ValueError: Fewer points than clusters, or a number that two points share.
    """

    def read() -> tuple[_Rows, _Rows, _Rows, Tensor | None, bool]:
        saved = state.load("pass_1")
        mapping: CountSketch | None = None
        sketches, numbers, norms = columns = _Rows(), _Rows(), _Rows()
        facts: dict[str, Any] = {"numbered": False, "device": "cpu"} | saved.facts
        total: Tensor | None = None
        while saved.parts:
            part = saved.parts.pop(0)
            for name, rows_so_far in zip(_COLUMNS, columns, strict=True):
                if name in part:
                    rows_so_far.append(part[name])
            total = part["total"].to(facts["device"]) if "total" in part else total
        fresh = sketches.count

        def kept() -> dict[str, Tensor]:
            nonlocal fresh
            new = {} if total is None else {"total": total}
            if sketches.count > fresh:
                new |= {name: rows.since(fresh) for name, rows in zip(_COLUMNS, columns, strict=True)}
            fresh = sketches.count
            return new

        for batch in state.reading(stream, "pass_1", kept, facts=facts, append=True):
            if mapping is None:
                mapping = sketch(stream.features or batch.points.shape[1])
                facts |= {"numbered": batch.index is not None, "device": batch.points.device.type}
            if total is None:
                total = torch.zeros(mapping.features, dtype=torch.float64, device=batch.points.device)
            rows, width = batch.points.shape
            sketches.append(mapping(batch.points).cpu())
            norms.append(torch.linalg.vector_norm(batch.points, dim=1, dtype=torch.float32).cpu()[:, None])
            total[:width] += batch.points.sum(dim=0, dtype=torch.float32)
            own = torch.arange(batch.offset, batch.offset + rows)
            numbers.append((own if batch.index is None else batch.index)[:, None])
        return sketches, numbers, norms, total, facts["numbered"]

    sketches, numbers, norms, total, numbered = collectives.agree(read)
    sizes = collectives.gather_sizes(sketches.count)
    if sum(sizes) < n_clusters:
        raise ValueError(f"points: {sum(sizes)} samples are fewer than the {n_clusters} clusters asked for")

    def complete() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if total is None:
            raise ValueError("points: this process has no sample; every process needs at least one")
        own = numbers.join().squeeze(1)
        if not numbered:
            own += sum(sizes[: collectives.rank])
        return sketches.join(), own, norms.join().squeeze(1), total

    own_sketches, own, own_norms, own_total = collectives.agree(complete)
    everyone = collectives.gather_rows(own)
    values, occurrences = everyone.unique(return_counts=True)
    if values.shape[0] < everyone.shape[0]:
        shared = values[occurrences > 1]
        raise ValueError(
            f"points: {shared.shape[0]} sample numbers occur more than once, {shared[:5].tolist()} among them; "
            f"every sample counts exactly once, on one process"
        )
    mean = collectives.sum_(own_total) / sum(sizes)
    return Survey(own_sketches, own, own_norms, mean, sum(sizes))


def fetch_rows(
    stream: PointStream,
    wanted: Tensor,
    numbers: Tensor,
    like: Tensor,
    collectives: Collectives,
    state: ClusteringState = NOT_SAVED,
    stage: str = "fetch",
) -> Tensor:
    """Read the points once more and return those with the numbers ``wanted`` ``[m]``, as ``[m, F]`` float32.

    ``numbers`` ``[n]`` are those of this process's points in the order of the stream; ``like`` gives F and
    the device; ``stage`` is the reading's name in ``state``.
    """

    def read() -> Tensor:
        rows = torch.zeros(wanted.shape[0], like.shape[-1], dtype=torch.float32, device=like.device)
        rows = state.load(stage).last("rows", rows)
        for batch in state.reading(stream, stage, lambda: {"rows": rows}):
            here = numbers[batch.offset : batch.offset + batch.points.shape[0]]
            slots, places = (wanted[:, None] == here[None]).nonzero(as_tuple=True)
            if slots.numel():
                found = batch.points[places.to(batch.points.device)]
                rows[slots.to(rows.device), : found.shape[1]] = found.to(rows)
        return rows

    # Each row is on one process and zero on the others.
    return collectives.sum_(collectives.agree(read))


class _Epoch:
    """One pass: labels and squared distances of this process's points, sums and counts of all."""

    def __init__(
        self,
        stream: PointStream,
        centroids: Tensor,
        collectives: Collectives,
        backend: str | None,
        *,
        accumulate: bool,
        state: ClusteringState,
        stage: str,
    ) -> None:
        saved = state.load(stage)
        device = centroids.device
        self.counts = saved.last("counts", torch.zeros(centroids.shape[0], dtype=torch.int64, device=device))
        self.sums = saved.last(
            "sums",
            torch.zeros(
                centroids.shape if accumulate else (centroids.shape[0], 0), dtype=torch.float64, device=device
            ),
        )
        labels = [saved.last("labels", torch.empty(0, dtype=torch.int64))]
        distances = [saved.last("distances", torch.empty(0))]

        def kept() -> dict[str, Tensor]:
            return {
                "counts": self.counts,
                "sums": self.sums,
                "labels": torch.cat(labels),
                "distances": torch.cat(distances),
            }

        def read() -> None:
            for batch in state.reading(stream, stage, kept):
                points = batch.points.to(centroids.device)
                nearest, squared = assign(points, centroids, backend=backend)
                update_(
                    self.sums, self.counts, points if accumulate else points[:, :0], nearest, backend=backend
                )
                labels.append(nearest.cpu())
                distances.append(squared.cpu())

        collectives.agree(read)
        self.labels = torch.cat(labels)
        self.distances = torch.cat(distances)
        collectives.sum_(self.sums)
        collectives.sum_(self.counts)
        self.inertia = float(collectives.sum_(self.distances.sum(dtype=torch.float64)))


def _reseed(
    epoch: _Epoch,
    centroids: Tensor,
    stream: PointStream,
    numbers: Tensor,
    collectives: Collectives,
    state: ClusteringState,
    stage: str,
) -> int:
    """Move empty clusters to the farthest points, which leave their own; return how many moved."""
    empty = (epoch.counts == 0).nonzero().flatten().tolist()
    if not empty:
        return 0
    far = epoch.distances.topk(min(len(empty), epoch.distances.shape[0])).indices
    own = torch.stack(
        [epoch.distances[far].double(), numbers[far].double(), epoch.labels[far].double()], dim=1
    )
    candidates = collectives.gather_rows(own)
    # Farthest first, of equally far ones the lower number: the same choice for any number of processes.
    ranked = sorted(candidates.tolist(), key=lambda row: (-row[0], row[1]))[: len(empty)]
    wanted = torch.tensor([int(row[1]) for row in ranked], dtype=torch.int64)
    points = fetch_rows(stream, wanted, numbers, centroids, collectives, state, stage).double()
    moved = 0
    for cluster, point, (_, _, label) in zip(empty, points, ranked, strict=False):
        donor = int(label)
        # A point that equals its centroid has nothing to gain: there are fewer distinct points than clusters.
        if int(epoch.counts[donor]) > 1 and not torch.equal(point, centroids[donor].double()):
            epoch.sums[donor] -= point
            epoch.counts[donor] -= 1
            epoch.sums[cluster] = point
            epoch.counts[cluster] = 1
            moved += 1
    return moved


def lloyd(
    stream: PointStream,
    centroids: Tensor,
    numbers: Tensor,
    collectives: Collectives,
    *,
    max_iter: int,
    tol: float,
    max_no_improvement: int | None,
    backend: str | None,
    progress: Callable[[IterationStats], None] | None = None,
    state: ClusteringState = NOT_SAVED,
) -> LloydResult:
    """Alternate assignment and update until the centroids stay where they are.

    Args:
        stream: The points of this process.
        centroids: Where to start, ``[K, F]`` float32.
        numbers: The numbers of this process's points ``[n]``.
        collectives: The processes.
        max_iter: Epochs at most.
        tol: Stop once an epoch lowers the inertia by less than this part of it.
        max_no_improvement: Stop after this many epochs in a row without a new lowest inertia; None: never.
        backend: Of the k-means kernels.
        progress: Called with the figures of each epoch.
        state: Where the readings are saved, as stages "refine_1", "refine_1_far" and so on.

    Returns:
        Labels, counts and inertia are those of the centroids returned: unless these stayed where they were,
        the points are read once more for them.
    """
    stats: list[IterationStats] = []
    best, stale, settled = float("inf"), 0, False
    epoch: _Epoch | None = None
    for iteration in range(1, max_iter + 1):
        started = time.perf_counter()
        stage = f"refine_{iteration}"
        epoch = _Epoch(stream, centroids, collectives, backend, accumulate=True, state=state, stage=stage)
        empty = int((epoch.counts == 0).sum())
        reseeded = _reseed(epoch, centroids, stream, numbers, collectives, state, f"{stage}_far")
        filled = (epoch.counts > 0)[:, None]
        means = epoch.sums.div_(epoch.counts.clamp(min=1)[:, None]).float()
        updated = torch.where(filled, means, centroids)
        shift = float(torch.linalg.vector_norm(updated - centroids, dtype=torch.float64))
        settled = torch.equal(updated, centroids)
        centroids = updated
        seconds = time.perf_counter() - started
        stats.append(IterationStats(iteration, epoch.inertia, empty, reseeded, shift, seconds))
        if progress is not None:
            progress(stats[-1])
        fall = best - epoch.inertia
        stale = 0 if fall > 0 else stale + 1
        small = iteration > 1 and not reseeded and fall < tol * epoch.inertia
        best = min(best, epoch.inertia)
        if settled or small or (max_no_improvement is not None and stale >= max_no_improvement):
            break
    if epoch is None or not settled:
        epoch = _Epoch(
            stream, centroids, collectives, backend, accumulate=False, state=state, stage="refine_labels"
        )
    return LloydResult(centroids, epoch.counts, epoch.labels, epoch.inertia, len(stats), stats)
