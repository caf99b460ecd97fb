"""k-means of very wide points in two readings: cluster their sketches, then average the points.

    pass 1   y_i = sketch(x_i), F features down to w;   k-means of all y_i to convergence, in memory  ->  l_i
    pass 2   c_k = (sum of x_i over l_i = k) / n_k,   inertia = sum_i ||x_i - m||^2 - sum_k n_k ||c_k - m||^2

with m the mean of all points, known from pass 1, which keeps the difference free of cancellation. Epochs of
exact Lloyd may follow (``refine``). What is expensive, computing x_i, is done twice however many iterations
k-means takes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fsd_fast.clustering import MiniBatchKMeans
from fsd_fast.collectives import Collectives
from fsd_fast.lloyd import IterationStats, Survey, lloyd, survey
from fsd_fast.sketch import CountSketch
from fsd_fast.stream import PointStream, Source
from fsd_kernels.kmeans import assign, update_

# The norms of a sample in the two passes may differ by the rounding of a feature cache, not by more.
_NORM_TOLERANCE = 1e-2


@dataclass
class StreamClustering:
    """What ``cluster_stream`` found.

    Attributes:
        centroids: ``[K, F]`` float32: exact means of the points of each cluster.
        counts: int64 ``[K]``.
        labels: int64 ``[n]``: of the points of this process in the order of the stream.
        inertia: Sum of squared distances of all points to the centroids of their clusters, exact in F.
        num_samples: N, over all processes.
        sketch_inertia: The same sum in the sketch, of the best restart.
        iterations: Epochs of k-means in the sketch, of each restart.
        empty_clusters: Epochs in which a cluster was empty, summed over clusters, in the restart that was
            kept.
        refine_stats: The figures of the exact epochs after pass 2.
        seconds: Wall-clock time of "pass_1", "sketch_clustering", "pass_2" and "refine".
    """

    centroids: Tensor
    counts: Tensor
    labels: Tensor
    inertia: float
    num_samples: int
    sketch_inertia: float
    iterations: list[int]
    empty_clusters: int
    refine_stats: list[IterationStats] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def cluster_stream(
    points: Source,
    n_clusters: int,
    *,
    seed: int,
    features: int | None = None,
    sketch_width: int = 2048,
    restarts: int = 4,
    refine: int = 0,
    max_iter: int = 300,
    batch_size: int = 1024,
    backend: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> StreamClustering:
    """Cluster a stream in two readings, plus ``refine`` + 1 if ``refine`` is not 0.

    Args:
        points: This process's points, see ``fsd_fast.stream``. Every reading must give the same points in the
            same order.
        n_clusters: K.
        seed: Of the sketch and of every restart.
        features: F, where batches may be narrower than it; None: all batches are as wide as the first.
        sketch_width: w. The relative error of a squared distance is about sqrt(2 / w): 3 percent for 2048.
        restarts: Runs of k-means in the sketch; the one with the lowest inertia is kept.
        refine: Epochs of exact Lloyd in F afterwards.
        max_iter: Epochs of one run of k-means in the sketch at most.
        batch_size: Rows at a time where ``points`` is a tensor.
        backend: Of the k-means kernels.
        progress: Called with the name of each stage as it begins.

    Raises:
        TypeError: Points of another kind.
        ValueError: Fewer points than clusters; a NaN or infinite feature or a wrong width (the sample is
            named); two points with one number; passes that differ.
    """
    for name, value, least in (
        ("sketch_width", sketch_width, 1),
        ("restarts", restarts, 1),
        ("refine", refine, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    collectives = Collectives()
    stream = PointStream(points, batch_size=batch_size, features=features, narrower=features is not None)
    seconds: dict[str, float] = {}

    def begin(stage: str) -> float:
        if progress is not None:
            progress(stage)
        return time.perf_counter()

    started = begin("pass_1")
    seen = survey(stream, lambda width: CountSketch(width, sketch_width, seed), n_clusters, collectives)
    seconds["pass_1"] = time.perf_counter() - started

    started = begin("sketch_clustering")
    labels, sketch_inertia, iterations, empty = _cluster_sketches(
        seen, n_clusters, collectives, seed=seed, restarts=restarts, max_iter=max_iter, backend=backend
    )
    seconds["sketch_clustering"] = time.perf_counter() - started

    started = begin("pass_2")
    sums, counts, scatter = _exact_sums(stream, seen, labels, n_clusters, collectives, backend)
    centroids = sums.div_(counts.clamp(min=1)[:, None])
    # Only where there are fewer distinct points than clusters is one left empty: it shares a place.
    vacant = (counts == 0).nonzero().flatten()
    if vacant.numel():
        warnings.warn(
            f"{vacant.numel()} of {n_clusters} clusters are empty: the points have only about "
            f"{n_clusters - vacant.numel()} distinct values",
            RuntimeWarning,
            stacklevel=2,
        )
        centroids[vacant] = centroids[counts.argmax()].clone()
    inertia = _inertia(scatter, centroids, counts, seen.mean)
    result = StreamClustering(
        centroids.float(),
        counts,
        labels,
        inertia,
        seen.total,
        sketch_inertia,
        iterations,
        empty,
        seconds=seconds,
    )
    seconds["pass_2"] = time.perf_counter() - started

    if refine:
        started = begin("refine")
        refined = lloyd(
            stream,
            result.centroids,
            seen.numbers,
            collectives,
            max_iter=refine,
            tol=0,
            max_no_improvement=None,
            backend=backend,
        )
        result.centroids, result.counts, result.labels = refined.centroids, refined.counts, refined.labels
        result.inertia, result.refine_stats = refined.inertia, refined.stats
        seconds["refine"] = time.perf_counter() - started
    return result


def _cluster_sketches(
    seen: Survey,
    n_clusters: int,
    collectives: Collectives,
    *,
    seed: int,
    restarts: int,
    max_iter: int,
    backend: str | None,
) -> tuple[Tensor, float, list[int], int]:
    """Cluster all sketches on the first process; return the labels of this process and the run's figures.

    The sketches are taken in the order of their numbers, so that the result does not depend on who has which.
    """
    numbers = collectives.gather_rows(seen.numbers)
    order = numbers.argsort()
    sketches = collectives.gather_rows_to_first(seen.sketches)
    seen.sketches = seen.sketches[:0]
    all_labels = torch.empty(numbers.shape[0], dtype=torch.int64)
    figures = torch.zeros(restarts + 2, dtype=torch.float64)

    def run() -> None:
        if sketches is None:
            return
        # Distances do not change with the origin, and rounding is least around the mean.
        centred = sketches[order]
        centred -= centred.mean(dim=0)
        centred = centred.to(seen.mean.device)
        best: MiniBatchKMeans | None = None
        for restart in range(restarts):
            kmeans = MiniBatchKMeans(
                n_clusters,
                batch_size=centred.shape[0],
                max_iter=max_iter,
                random_state=seed + restart,
                backend=backend,
            ).fit_alone(centred)
            figures[restart + 2] = kmeans.n_iter_
            if best is None or kmeans.inertia_ < best.inertia_:
                best = kmeans
        if best is not None:
            all_labels.copy_(best.labels_)
            figures[0] = best.inertia_
            figures[1] = sum(epoch.empty_clusters for epoch in best.iteration_stats_)

    collectives.agree(run)
    collectives.broadcast_(all_labels)
    collectives.broadcast_(figures)
    own = all_labels[torch.searchsorted(numbers[order], seen.numbers)]
    return own, float(figures[0]), [int(value) for value in figures[2:]], int(figures[1])


def _exact_sums(
    stream: PointStream,
    seen: Survey,
    labels: Tensor,
    n_clusters: int,
    collectives: Collectives,
    backend: str | None,
) -> tuple[Tensor, Tensor, float]:
    """Read the points again: sums ``[K, F]`` float64, counts ``[K]`` and scatter of all processes."""
    device = seen.mean.device
    sums = torch.zeros(n_clusters, seen.mean.shape[0], dtype=torch.float64, device=device)
    counts = torch.zeros(n_clusters, dtype=torch.int64, device=device)
    scatter = torch.zeros((), dtype=torch.float64, device=device)
    center = seen.mean.float()[None]

    def read() -> None:
        place = 0
        for batch in stream:
            stop = place + batch.points.shape[0]
            _check_same(seen, place, stop, batch.points, batch.index)
            points = batch.points.to(device)
            update_(sums, counts, points, labels[place:stop].to(device), backend=backend)
            scatter.add_(assign(points, center, backend=backend)[1].sum(dtype=torch.float64))
            place = stop
        if place != seen.numbers.shape[0]:
            raise ValueError(
                f"points: {place} samples in the second pass, {seen.numbers.shape[0]} in the first"
            )

    collectives.agree(read)
    return collectives.sum_(sums), collectives.sum_(counts), float(collectives.sum_(scatter))


def _check_same(seen: Survey, place: int, stop: int, points: Tensor, index: Tensor | None) -> None:
    """Raise ValueError unless rows ``place`` to ``stop`` of pass 2 are what they were in pass 1."""
    if stop > seen.numbers.shape[0]:
        raise ValueError(
            f"points: more samples in the second pass than the {seen.numbers.shape[0]} of the first"
        )
    expected = seen.numbers[place:stop]
    if index is not None and not torch.equal(index, expected):
        row = int((index != expected).nonzero()[0])
        raise ValueError(
            f"points: the passes differ in order: position {place + row} is sample {int(index[row])}, "
            f"it was sample {int(expected[row])}"
        )
    norms = torch.linalg.vector_norm(points, dim=1, dtype=torch.float32).cpu()
    differ = (norms - seen.norms[place:stop]).abs() > _NORM_TOLERANCE * seen.norms[place:stop]
    if bool(differ.any()):
        row = int(differ.nonzero()[0])
        raise ValueError(
            f"points: the passes differ: sample {int(expected[row])} has norm {float(norms[row]):.6g}, "
            f"it was {float(seen.norms[place + row]):.6g}"
        )


def _inertia(scatter: float, centroids: Tensor, counts: Tensor, mean: Tensor) -> float:
    """Scatter within the clusters: that about the mean less that of the centroids, each n_k times."""
    between = sum(
        int(count) * float((centroid - mean).square().sum())
        for centroid, count in zip(centroids, counts, strict=True)
    )
    return max(0.0, scatter - between)
