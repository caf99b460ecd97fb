"""Lloyd's algorithm: what is common to points in memory and points in a stream, and the one run in memory.

    assign   l_i = argmin_k ||x_i - c_k||^2
    update   c_k = (sum of x_i over l_i = k) / n_k,  at the end of the epoch

Sums are kept in float64. An empty cluster moves to the point that is farthest from its own centroid.
``fsd_fast.clustering.lloyd_of_stream`` runs the same epochs over a stream and over any number of processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fsd_fast.clustering.seeding import SEEDING_WIDTH, draw_seeds, draw_sketch_seed, sort_centred_
from fsd_fast.clustering.sketch import CountSketch
from fsd_fast.untrusted import integer, number
from fsd_kernels.kmeans import assign, update_


@dataclass(frozen=True)
class LloydSettings:
    """When a run of Lloyd's algorithm stops, and how it computes.

    Attributes:
        max_iter: Epochs at most.
        tol: Stop once an epoch lowers the inertia by less than this fraction of it. 0: only where the centroids stay
            put.
        max_no_improvement: Stop after this many epochs in a row without a new lowest inertia; None: never.
        batch_size: Rows at a time where the points are a tensor.
        backend: Of the k-means kernels, see ``fsd_kernels``.
    """

    max_iter: int = 300
    tol: float = 0.0
    max_no_improvement: int | None = 10
    batch_size: int = 1024
    backend: str | None = None


EPOCH_FIELDS = {
    "epoch": integer(1),
    "inertia": number(0),
    "empty_clusters": integer(0),
    "reseeded": integer(0),
    "shift": number(0),
    "seconds": number(0),
}
"""The fields of ``EpochStats``, as JSON values."""


@dataclass
class EpochStats:
    """One epoch: ``inertia`` is measured against the centroids that the epoch started from."""

    epoch: int
    inertia: float
    empty_clusters: int
    reseeded: int
    shift: float
    seconds: float


@dataclass
class LloydResult:
    """Centroids ``[K, F]`` float32, counts ``[K]``, labels ``[n]`` of this process, inertia, each epoch's stats."""

    centroids: Tensor
    counts: Tensor
    labels: Tensor
    inertia: float
    stats: list[EpochStats] = field(default_factory=list)


@dataclass
class Epoch:
    """Sums ``[K, F]`` float64 and counts ``[K]`` of all points; labels and squared distances ``[n]`` of this process's.

    ``inertia`` is the sum of the squared distances of all points.
    """

    sums: Tensor
    counts: Tensor
    labels: Tensor
    distances: Tensor
    inertia: float


class LloydRun:
    """The figures of a run as it goes, and the decision when to stop.

    Args:
        settings: When to stop.
        progress: Called with the figures of each epoch.

    Attributes:
        stats: The figures of each epoch so far.
        settled: The last epoch left all centroids where they were.
    """

    def __init__(self, settings: LloydSettings, progress: Callable[[EpochStats], None] | None) -> None:
        self._settings, self._progress = settings, progress
        self._lowest, self._stale = float("inf"), 0
        self.stats: list[EpochStats] = []
        self.settled = False

    def update(self, epoch: Epoch, centroids: Tensor, empty: int, reseeded: int, started: float) -> Tensor:
        """Record an epoch and return the centroids after it; uses up its sums."""
        filled = (epoch.counts > 0)[:, None]
        means = epoch.sums.div_(epoch.counts.clamp(min=1)[:, None]).float()
        updated = torch.where(filled, means, centroids)
        shift = float(torch.linalg.vector_norm(updated - centroids, dtype=torch.float64))
        self.settled = torch.equal(updated, centroids)
        seconds = time.perf_counter() - started
        self.stats.append(EpochStats(len(self.stats) + 1, epoch.inertia, empty, reseeded, shift, seconds))
        if self._progress is not None:
            self._progress(self.stats[-1])
        return updated

    def should_stop(self) -> bool:
        """Whether the run is over; asked once after each epoch."""
        last, settings = self.stats[-1], self._settings
        fall = self._lowest - last.inertia
        self._stale = 0 if fall > 0 else self._stale + 1
        self._lowest = min(self._lowest, last.inertia)
        small = last.epoch > 1 and not last.reseeded and fall < settings.tol * last.inertia
        patience = settings.max_no_improvement
        return self.settled or small or (patience is not None and self._stale >= patience)


def farthest(epoch: Epoch, sample_index: Tensor, count: int) -> Tensor:
    """Up to ``count`` points of this process that are farthest from their centroids.

    Returns:
        Rows (squared distance, sample index, label), float64 ``[m, 3]``.
    """
    far = epoch.distances.topk(min(count, epoch.distances.shape[0])).indices
    columns = (epoch.distances[far], sample_index[far], epoch.labels[far])
    return torch.stack([column.double() for column in columns], dim=1)


def rank_candidates(candidates: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """Sample indices int64 ``[m]`` and labels of the ``count`` farthest of all processes' candidates.

    Farthest first, among equally far ones the lower index first: the same choice for any number of processes.
    """
    ranked = sorted(candidates.tolist(), key=lambda row: (-row[0], row[1]))[:count]
    return torch.tensor([int(row[1]) for row in ranked], dtype=torch.int64), [int(row[2]) for row in ranked]


def reseed_(epoch: Epoch, centroids: Tensor, empty: list[int], points: Tensor, donors: list[int]) -> int:
    """Move empty clusters to far points ``[m, F]``, which leave their donors; return how many moved."""
    moved = 0
    for cluster, point, donor in zip(empty, points.double(), donors, strict=False):
        # A point that equals its centroid has nothing to gain: there are fewer distinct points than clusters.
        if int(epoch.counts[donor]) > 1 and not torch.equal(point, centroids[donor].double()):
            epoch.sums[donor] -= point
            epoch.counts[donor] -= 1
            epoch.sums[cluster] = point
            epoch.counts[cluster] = 1
            moved += 1
    return moved


def empty_clusters(epoch: Epoch) -> list[int]:
    """Clusters that no point belongs to."""
    clusters: list[int] = (epoch.counts == 0).nonzero().flatten().tolist()
    return clusters


def kmeans_in_memory(
    points: Tensor,
    n_clusters: int,
    *,
    init: str | Tensor = "k-means++",
    generator: torch.Generator,
    settings: LloydSettings,
    progress: Callable[[EpochStats], None] | None = None,
) -> LloydResult:
    """One run of k-means on points in memory, by this process alone.

    Args:
        points: ``[N, F]``, finite, N >= K.
        n_clusters: K.
        init: "k-means++", "random" or centroids ``[K, F]``.
        generator: Draws the start.
        settings: When to stop.
        progress: Called with the figures of each epoch.
    """
    sketch_seed = draw_sketch_seed(generator)
    if isinstance(init, Tensor):
        centroids = init.to(points.device, torch.float32)
    else:
        drawn = draw_seeds(_sketches(points, sketch_seed, settings), n_clusters, init, generator)
        centroids = points[drawn.to(points.device)].float()
    return lloyd_in_memory(points, centroids, settings, progress)


def _sketches(points: Tensor, seed: int, settings: LloydSettings) -> Tensor:
    """Centred sketches ``[N, w]`` on the CPU, by which the start is drawn."""
    sketch = CountSketch(points.shape[1], SEEDING_WIDTH, seed)
    sketches = torch.empty(points.shape[0], sketch.width)
    for rows, place in zip(
        points.split(settings.batch_size), sketches.split(settings.batch_size), strict=True
    ):
        place.copy_(sketch(rows))
    sort_centred_(sketches, torch.arange(sketches.shape[0]))
    return sketches


def lloyd_in_memory(
    points: Tensor,
    centroids: Tensor,
    settings: LloydSettings,
    progress: Callable[[EpochStats], None] | None = None,
) -> LloydResult:
    """Alternate assignment and update until the centroids stay where they are.

    Args:
        points: ``[N, F]``.
        centroids: Where to start, ``[K, F]`` float32.
        settings: When to stop.
        progress: Called with the figures of each epoch.

    Returns:
        Labels, counts and inertia are those of the centroids returned: unless these stayed where they were, the
        points are assigned once more.
    """
    run = LloydRun(settings, progress)
    everyone = torch.arange(points.shape[0])
    for _ in range(settings.max_iter):
        started = time.perf_counter()
        epoch = _epoch_in_memory(points, centroids, settings, accumulate=True)
        empty = empty_clusters(epoch)
        reseeded = 0
        if empty:
            index, donors = rank_candidates(farthest(epoch, everyone, len(empty)), len(empty))
            far = points[index.to(points.device)].float()
            reseeded = reseed_(epoch, centroids, empty, far, donors)
        centroids = run.update(epoch, centroids, len(empty), reseeded, started)
        if run.should_stop():
            break
    if not run.settled:
        epoch = _epoch_in_memory(points, centroids, settings, accumulate=False)
    return LloydResult(centroids, epoch.counts, epoch.labels, epoch.inertia, run.stats)


def _epoch_in_memory(
    points: Tensor, centroids: Tensor, settings: LloydSettings, *, accumulate: bool
) -> Epoch:
    """One pass over the points; without ``accumulate`` the sums have no columns."""
    clusters, width = centroids.shape
    sums = centroids.new_zeros(clusters, width if accumulate else 0, dtype=torch.float64)
    counts = torch.zeros(clusters, dtype=torch.int64, device=centroids.device)
    labels, distances = [], []
    for batch in points.split(settings.batch_size):
        nearest, squared = assign(batch, centroids, backend=settings.backend)
        update_(sums, counts, batch if accumulate else batch[:, :0], nearest, backend=settings.backend)
        labels.append(nearest.cpu())
        distances.append(squared.cpu())
    squared_distances = torch.cat(distances)
    return Epoch(
        sums, counts, torch.cat(labels), squared_distances, float(squared_distances.sum(dtype=torch.float64))
    )
