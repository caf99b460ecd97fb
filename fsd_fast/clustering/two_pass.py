"""k-means of very wide points in two readings: cluster their sketches, then average the points.

    pass 1   y_i = sketch(x_i), F features down to w;   k-means of all y_i to convergence, in memory  ->  l_i
    pass 2   c_k = (sum of x_i over l_i = k) / n_k,   inertia = sum_i ||x_i - m||^2 - sum_k n_k ||c_k - m||^2

with m the mean of all points, known from pass 1, which keeps the difference free of cancellation. Epochs of
exact Lloyd may follow (``refine``). What is expensive, computing x_i, is done twice however many iterations
k-means takes.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fsd_fast.clustering.checkpoint import NOT_SAVED, ClusteringState
from fsd_fast.clustering.kmeans import MiniBatchKMeans
from fsd_fast.clustering.lloyd import IterationStats, Survey, lloyd, survey
from fsd_fast.clustering.seeding import sort_centred_
from fsd_fast.clustering.sketch import CountSketch
from fsd_fast.clustering.stream import PointStream, Source
from fsd_fast.distributed import Collectives
from fsd_kernels.kmeans import assign, update_

# The norms of a sample in the two passes may differ by the rounding of a feature cache, not by more.
_NORM_TOLERANCE = 1e-2

ALGORITHMS = ("sketch", "lloyd")


@dataclass
class StreamClustering:
    """What ``cluster_stream`` found.

    Attributes:
        centroids: ``[K, F]`` float32: exact means of the points of each cluster.
        counts: int64 ``[K]``.
        labels: int64 ``[n]``: of the points of this process in the order of the stream.
        inertia: Sum of squared distances of all points to the centroids of their clusters, exact in F.
        num_samples: N, over all processes.
        sketch_inertia: The same sum in the sketch, of the best restart; 0 without a sketch.
        iterations: Epochs of k-means in the sketch, of each restart.
        sketch_stats: The figures of each epoch of the restart that was kept; inertia in the sketch.
        refine_stats: The figures of the exact epochs: those after pass 2, or all without a sketch.
        seconds: Wall-clock time of "pass_1", "sketch_clustering", "pass_2" and "refine", earlier runs of a
            continued clustering included; of "lloyd" without a sketch.
    """

    centroids: Tensor
    counts: Tensor
    labels: Tensor
    inertia: float
    num_samples: int
    sketch_inertia: float
    iterations: list[int]
    sketch_stats: list[IterationStats]
    refine_stats: list[IterationStats] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def cluster_stream(
    points: Source,
    n_clusters: int,
    *,
    seed: int,
    algorithm: str = "sketch",
    features: int | None = None,
    sketch_width: int = 2048,
    restarts: int = 4,
    refine: int = 0,
    max_iter: int = 300,
    batch_size: int = 1024,
    backend: str | None = None,
    progress: Callable[[str], None] | None = None,
    epoch_progress: Callable[[int, IterationStats], None] | None = None,
    state: ClusteringState = NOT_SAVED,
) -> StreamClustering:
    """Cluster a stream in two readings, plus ``refine`` + 1 if ``refine`` is not 0.

    With ``algorithm="lloyd"`` there is no sketch: exact k-means from one start, a reading per epoch and up to three
    more; nothing is saved in ``state``, and the sketch's arguments play no part.

    Args:
        points: This process's points, see ``fsd_fast.clustering.stream``. Every reading must give the same points
            in the same order.
        n_clusters: K.
        seed: Of the sketch and of every restart.
        algorithm: "sketch" or "lloyd".
        features: F, where batches may be narrower than it; None: all batches are as wide as the first.
        sketch_width: w. The relative error of a squared distance is about sqrt(2 / w): 3 percent for 2048.
        restarts: Runs of k-means in the sketch; the one with the lowest inertia is kept.
        refine: Epochs of exact Lloyd in F afterwards.
        max_iter: Epochs of one run of k-means in the sketch at most.
        batch_size: Rows at a time in the sketch, and where ``points`` is a tensor.
        backend: Of the k-means kernels.
        progress: Called with the name of each stage as it begins.
        epoch_progress: Called in the sketch stage, on the first process, with the number of the restart (from
            0) and the figures of its latest epoch.
        state: Where what has been worked out is saved: a killed clustering that is started again with the same
            points and arguments continues there and ends with the same bits.

    Raises:
        TypeError: Points of another kind.
        ValueError: Fewer points than clusters; a NaN or infinite feature or a wrong width (the sample is
            named); two points with one number; passes that differ; an unknown algorithm, or ``refine`` with "lloyd".
    """
    for name, value, least in (
        ("sketch_width", sketch_width, 1),
        ("restarts", restarts, 1),
        ("refine", refine, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: expected one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if algorithm == "lloyd":
        if refine:
            raise ValueError(
                f"refine: every epoch is exact under algorithm='lloyd', expected 0, got {refine}"
            )
        return _cluster_exactly(points, n_clusters, seed, features, max_iter, batch_size, backend, progress)
    collectives = Collectives()
    stream = PointStream(points, batch_size=batch_size, features=features, narrower=features is not None)
    seconds: dict[str, float] = {}

    def begin(stage: str) -> float:
        if progress is not None:
            progress(stage)
        return time.perf_counter()

    def end(stage: str, started: float) -> float:
        return time.perf_counter() - started + state.earlier_seconds(stage)

    started = begin("pass_1")
    seen = survey(
        stream, lambda width: CountSketch(width, sketch_width, seed), n_clusters, collectives, state
    )
    seconds["pass_1"] = end("pass_1", started)

    started = begin("sketch_clustering")
    labels, best = _cluster_sketches(
        seen,
        n_clusters,
        collectives,
        seed=seed,
        restarts=restarts,
        max_iter=max_iter,
        batch_size=batch_size,
        backend=backend,
        progress=epoch_progress,
        state=state,
    )
    seconds["sketch_clustering"] = end("sketch_clustering", started)

    started = begin("pass_2")
    sums, counts, scatter = _exact_sums(stream, seen, labels, n_clusters, collectives, backend, state)
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
        best.inertia,
        best.iterations,
        best.stats,
        seconds=seconds,
    )
    seconds["pass_2"] = end("pass_2", started)

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
            state=state,
        )
        result.centroids, result.counts, result.labels = refined.centroids, refined.counts, refined.labels
        result.inertia, result.refine_stats = refined.inertia, refined.stats
        seconds["refine"] = end("refine", started)
    return result


def _cluster_exactly(
    points: Source,
    n_clusters: int,
    seed: int,
    features: int | None,
    max_iter: int,
    batch_size: int,
    backend: str | None,
    progress: Callable[[str], None] | None,
) -> StreamClustering:
    """Lloyd's algorithm among the points themselves."""
    if progress is not None:
        progress("lloyd")
    started = time.perf_counter()
    kmeans = MiniBatchKMeans(
        n_clusters, batch_size=batch_size, max_iter=max_iter, random_state=seed, backend=backend
    )
    kmeans.fit(points, features=features)
    return StreamClustering(
        kmeans.cluster_centers_,
        kmeans.counts_,
        kmeans.labels_,
        kmeans.inertia_,
        int(kmeans.counts_.sum()),
        sketch_inertia=0.0,
        iterations=[],
        sketch_stats=[],
        refine_stats=kmeans.iteration_stats_,
        seconds={"lloyd": time.perf_counter() - started},
    )


@dataclass
class _SketchClustering:
    """Figures of k-means in the sketch: epochs of each restart so far; inertia and epochs of the best one."""

    iterations: list[int] = field(default_factory=list)
    inertia: float = float("inf")
    stats: list[IterationStats] = field(default_factory=list)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> _SketchClustering:
        """Read what ``dataclasses.asdict`` made of one."""
        return cls(
            facts["iterations"], facts["inertia"], [IterationStats(**epoch) for epoch in facts["stats"]]
        )


def _cluster_sketches(
    seen: Survey,
    n_clusters: int,
    collectives: Collectives,
    *,
    seed: int,
    restarts: int,
    max_iter: int,
    batch_size: int,
    backend: str | None,
    progress: Callable[[int, IterationStats], None] | None,
    state: ClusteringState,
) -> tuple[Tensor, _SketchClustering]:
    """Cluster all sketches on the first process; return the labels of this process and the run's figures.

    The sketches are taken in the order of their numbers, so that the result does not depend on who has which.
    """
    numbers = collectives.gather_rows(seen.numbers)
    order = numbers.argsort()
    sketches = collectives.gather_rows_to_first(seen.sketches)
    # No view: it would keep all of them in memory.
    seen.sketches = torch.empty(0)
    all_labels = torch.empty(numbers.shape[0], dtype=torch.int64)
    found = _SketchClustering()

    def run() -> None:
        nonlocal sketches, found
        if sketches is None:
            return
        saved = state.load("sketch_clustering")
        all_labels.copy_(saved.last("labels", all_labels))
        if saved.parts:
            found = _SketchClustering.from_facts(saved.facts)
        if len(found.iterations) < restarts:
            sort_centred_(sketches, order)
            sketches = sketches.to(seen.mean.device)
        started = time.perf_counter()
        for restart in range(len(found.iterations), restarts):
            kmeans = MiniBatchKMeans(
                n_clusters,
                batch_size=batch_size,
                max_iter=max_iter,
                random_state=seed + restart,
                backend=backend,
                progress=None if progress is None else functools.partial(progress, restart),
            ).fit_alone(sketches)
            found.iterations.append(kmeans.n_iter_)
            if kmeans.inertia_ < found.inertia:
                found.inertia, found.stats = kmeans.inertia_, kmeans.iteration_stats_
                all_labels.copy_(kmeans.labels_)
            state.save(
                "sketch_clustering",
                {"labels": all_labels},
                complete=restart + 1 == restarts,
                facts=dataclasses.asdict(found),
                seconds=state.earlier_seconds("sketch_clustering") + time.perf_counter() - started,
            )

    collectives.agree(run)
    collectives.broadcast_(all_labels)
    found = _SketchClustering.from_facts(collectives.broadcast_json(dataclasses.asdict(found)))
    return all_labels[torch.searchsorted(numbers[order], seen.numbers)], found


def _exact_sums(
    stream: PointStream,
    seen: Survey,
    labels: Tensor,
    n_clusters: int,
    collectives: Collectives,
    backend: str | None,
    state: ClusteringState,
) -> tuple[Tensor, Tensor, float]:
    """Read the points again: sums ``[K, F]`` float64, counts ``[K]`` and scatter of all processes."""
    device = seen.mean.device
    saved = state.load("pass_2")
    sums = saved.last("sums", torch.zeros(n_clusters, seen.mean.shape[0], dtype=torch.float64, device=device))
    counts = saved.last("counts", torch.zeros(n_clusters, dtype=torch.int64, device=device))
    scatter = saved.last("scatter", torch.zeros((), dtype=torch.float64, device=device))
    center = seen.mean.float()[None]

    def kept() -> dict[str, Tensor]:
        return {"sums": sums, "counts": counts, "scatter": scatter}

    def read() -> None:
        stop = saved.rows
        for batch in state.reading(stream, "pass_2", kept):
            place, stop = batch.offset, batch.offset + batch.points.shape[0]
            _check_same(seen, place, stop, batch.points, batch.index)
            points = batch.points.to(device)
            update_(sums, counts, points, labels[place:stop].to(device), backend=backend)
            scatter.add_(assign(points, center, backend=backend)[1].sum(dtype=torch.float64))
        if stop != seen.numbers.shape[0]:
            raise ValueError(
                f"points: {stop} samples in the second pass, {seen.numbers.shape[0]} in the first"
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
