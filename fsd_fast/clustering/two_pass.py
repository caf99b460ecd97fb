"""k-means of very wide points in two passes: cluster their sketches, then average the points.

    pass 1   y_i = sketch(x_i), F features down to w;   k-means of all y_i to convergence, in memory  ->  l_i
    pass 2   c_k = (sum of x_i over l_i = k) / n_k,   inertia = sum_i ||x_i - mu||^2 - sum_k n_k ||c_k - mu||^2

with mu the mean of all points, known from pass 1, which keeps the difference free of cancellation. Epochs of
exact Lloyd may follow (``refine``). What is expensive, computing x_i, is done twice however many epochs
k-means takes.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fsd_fast.clustering.checkpoint import NOT_SAVED, ClusteringCheckpoint
from fsd_fast.clustering.first_pass import FirstPass, first_pass
from fsd_fast.clustering.lloyd import EpochStats, LloydSettings
from fsd_fast.clustering.lloyd_of_stream import kmeans_of_stream, lloyd_of_stream
from fsd_fast.clustering.seeding import new_generator
from fsd_fast.clustering.sketch import CountSketch
from fsd_fast.clustering.sketch_clustering import cluster_sketches
from fsd_fast.clustering.stream import PointBatch, PointSource, PointStream
from fsd_fast.distributed import Collectives
from fsd_kernels import resolve_backend
from fsd_kernels.kmeans import assign, update_

# The norms of a sample in the two passes may differ by the rounding of a teacher cache, not by more.
_NORM_TOLERANCE = 1e-2

ALGORITHMS = ("sketch", "lloyd")
SKETCH_WIDTH = 2048
"""w, by default."""
RESTARTS = 4
"""Restarts of k-means in the sketch, by default."""


@dataclass
class StreamClustering:
    """What ``cluster_stream`` found.

    Attributes:
        centroids: ``[K, F]`` float32: exact means of the points of each cluster.
        counts: int64 ``[K]``.
        labels: int64 ``[n]``: of the points of this process in the order of the stream.
        sample_index: int64 ``[n]``: of the same points.
        inertia: Sum of squared distances of all points to the centroids of their clusters, exact in F.
        num_samples: N, over all processes.
        sketch_inertia: The same sum in the sketch, of the best restart; 0 without a sketch.
        epochs: How many epochs each restart of k-means in the sketch took.
        sketch_stats: The figures of each epoch of the restart that was kept; inertia in the sketch.
        exact_stats: The figures of the exact epochs: those after pass 2, or all without a sketch.
        seconds: Wall-clock time of "pass_1", "sketch_clustering", "pass_2" and "refine", earlier runs of a
            continued clustering included; of "lloyd" without a sketch.
    """

    centroids: Tensor
    counts: Tensor
    labels: Tensor
    sample_index: Tensor
    inertia: float
    num_samples: int
    sketch_inertia: float
    epochs: list[int]
    sketch_stats: list[EpochStats]
    exact_stats: list[EpochStats] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def cluster_stream(
    points: PointSource,
    n_clusters: int,
    *,
    seed: int,
    algorithm: str = "sketch",
    features: int | None = None,
    sketch_width: int = SKETCH_WIDTH,
    restarts: int = RESTARTS,
    refine: int = 0,
    max_iter: int = LloydSettings.max_iter,
    batch_size: int = LloydSettings.batch_size,
    backend: str | None = None,
    progress: Callable[[str], None] | None = None,
    epoch_progress: Callable[[int, EpochStats], None] | None = None,
    checkpoint: ClusteringCheckpoint = NOT_SAVED,
) -> StreamClustering:
    """Cluster a stream in two passes, more with ``refine``.

    ``refine`` adds a pass per epoch and, unless the last one left the centroids where they were, a pass for the labels:
    4 passes in all for one epoch, 5 for two. With ``algorithm="lloyd"`` k-means is exact from one start: two passes for
    the start, one per epoch, and one for the labels as above; nothing is saved in ``checkpoint``, and the sketch's
    arguments are ignored. In both, an epoch that finds empty clusters takes one more pass, which fetches far points.

    Args:
        points: This process's points, see ``fsd_fast.clustering.stream``. Every pass must give the same points
            in the same order.
        n_clusters: K.
        seed: Of the sketch and of every restart.
        algorithm: "sketch" or "lloyd".
        features: F, where batches may be narrower than it; None: all batches are as wide as the first.
        sketch_width: w. The relative error of a squared distance is about sqrt(2 / w): 3 percent for 2048.
        restarts: Of k-means in the sketch; the one with the lowest inertia is kept.
        refine: Epochs of exact Lloyd in F afterwards, at most.
        max_iter: Epochs of one restart at most, or of exact k-means.
        batch_size: Rows at a time in the sketch, and where ``points`` is a tensor.
        backend: Of the k-means kernels.
        progress: Called with the name of each stage as it begins.
        epoch_progress: Called on the first process with the restart (from 0) and the figures of its latest epoch.
        checkpoint: Where the work is saved: a killed clustering, started again with the same points and arguments,
            continues there and ends with the same bits.

    Raises:
        TypeError: Points of another kind.
        ValueError: An argument out of range; fewer points than clusters; a feature that is NaN, infinite or too large
            or a wrong width (the sample is named); two points with one sample index; passes that differ.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: expected one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if algorithm == "lloyd" and refine:
        raise ValueError(f"refine: every epoch is exact under algorithm='lloyd', expected 0, got {refine}")
    limits = {"n_clusters": (n_clusters, 1), "refine": (refine, 0), "max_iter": (max_iter, 1)}
    limits |= {"sketch_width": (sketch_width, 1), "restarts": (restarts, 1), "batch_size": (batch_size, 1)}
    for name, (value, minimum) in limits.items():
        if value < minimum:
            raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    stream = PointStream(points, batch_size=batch_size, features=features, narrower=features is not None)
    settings = LloydSettings(max_iter=max_iter, batch_size=batch_size, backend=backend)
    clustering = _Clustering(stream, n_clusters, seed, settings, checkpoint, progress)
    if algorithm == "lloyd":
        return clustering.exactly()
    result = clustering.by_sketches(sketch_width, restarts, epoch_progress)
    if refine:
        clustering.refine_(result, refine)
    return result


class _Clustering:
    """The stages of a clustering, and what they share."""

    def __init__(
        self,
        stream: PointStream,
        n_clusters: int,
        seed: int,
        settings: LloydSettings,
        checkpoint: ClusteringCheckpoint,
        progress: Callable[[str], None] | None,
    ) -> None:
        self._stream, self._n_clusters, self._seed = stream, n_clusters, seed
        self._settings, self._checkpoint, self._progress = settings, checkpoint, progress
        self._collectives = Collectives()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Announce a stage and note its seconds, earlier runs included."""
        if self._progress is not None:
            self._progress(stage)
        started = time.perf_counter()
        yield
        self._seconds[stage] = time.perf_counter() - started + self._checkpoint.earlier_seconds(stage)

    def exactly(self) -> StreamClustering:
        """Lloyd's algorithm among the points themselves."""
        with self._timed("lloyd"):
            found, sample_index = kmeans_of_stream(
                self._stream,
                self._n_clusters,
                self._collectives,
                generator=new_generator(self._seed),
                settings=self._settings,
            )
        return StreamClustering(
            found.centroids,
            found.counts,
            found.labels,
            sample_index,
            found.inertia,
            int(found.counts.sum()),
            sketch_inertia=0.0,
            epochs=[],
            sketch_stats=[],
            exact_stats=found.stats,
            seconds=self._seconds,
        )

    def by_sketches(
        self,
        sketch_width: int,
        restarts: int,
        epoch_progress: Callable[[int, EpochStats], None] | None,
    ) -> StreamClustering:
        """Sketch the points, cluster the sketches, and average the points of each cluster."""
        with self._timed("pass_1"):
            first = first_pass(
                self._stream,
                lambda width: CountSketch(width, sketch_width, self._seed),
                self._n_clusters,
                self._collectives,
                self._checkpoint,
            )
        self._collectives.run_on_all_ranks(lambda: self._check_kernels(first.mean.device))
        with self._timed("sketch_clustering"):
            labels, best = cluster_sketches(
                first,
                self._n_clusters,
                self._collectives,
                seed=self._seed,
                restarts=restarts,
                settings=self._settings,
                progress=epoch_progress,
                checkpoint=self._checkpoint,
            )
        with self._timed("pass_2"):
            sums, counts, scatter = self._exact_sums(first, labels)
            centroids = _means(sums, counts)
            inertia = _inertia(scatter, centroids, counts, first.mean)
            return StreamClustering(
                centroids.float(),
                counts,
                labels,
                first.sample_index,
                inertia,
                first.num_samples,
                best.inertia,
                best.epochs,
                best.stats,
                seconds=self._seconds,
            )

    def _check_kernels(self, device: torch.device) -> None:
        """Refuse to continue a saved clustering with kernels other than those it has used so far."""
        backend = resolve_backend(self._settings.backend, device, "kmeans")
        self._checkpoint.set_later_key({"backend": backend, "device": device.type})

    def refine_(self, result: StreamClustering, epochs: int) -> None:
        """Go on from a result with epochs of exact Lloyd."""
        with self._timed("refine"):
            settings = dataclasses.replace(self._settings, max_iter=epochs, tol=0, max_no_improvement=None)
            refined = lloyd_of_stream(
                self._stream,
                result.centroids,
                result.sample_index,
                self._collectives,
                settings,
                checkpoint=self._checkpoint,
            )
        result.centroids, result.counts, result.labels = refined.centroids, refined.counts, refined.labels
        result.inertia, result.exact_stats = refined.inertia, refined.stats

    def _exact_sums(self, first: FirstPass, labels: Tensor) -> tuple[Tensor, Tensor, float]:
        """Read the points again: sums ``[K, F]`` float64, counts ``[K]`` and scatter of all processes."""
        device = first.mean.device
        backend = self._settings.backend
        center = first.mean.float()[None]

        def read() -> tuple[Tensor, Tensor, Tensor]:
            stage = self._checkpoint.stage("pass_2")
            shape = (self._n_clusters, first.mean.shape[0])
            sums = stage.restore("sums", torch.zeros(shape, dtype=torch.float64, device=device))
            counts = stage.restore("counts", torch.zeros(shape[0], dtype=torch.int64, device=device))
            scatter = stage.restore("scatter", torch.zeros((), dtype=torch.float64, device=device))

            def tensors() -> dict[str, Tensor]:
                return {"sums": sums, "counts": counts, "scatter": scatter}

            for batch in stage.unread(self._stream):
                _check_same(first, batch)
                points = batch.points.to(device)
                update_(sums, counts, points, labels[batch.offset : batch.end].to(device), backend=backend)
                scatter.add_(assign(points, center, backend=backend)[1].sum(dtype=torch.float64))
                stage.batch_done(batch, tensors)
            if stage.rows != first.norms.shape[0]:
                raise ValueError(
                    f"points: {stage.rows} samples in the second pass, {first.norms.shape[0]} in the first"
                )
            stage.finish(tensors)
            return sums, counts, scatter

        sums, counts, scatter = self._collectives.run_on_all_ranks(read)
        return (
            self._collectives.sum_(sums),
            self._collectives.sum_(counts),
            float(self._collectives.sum_(scatter)),
        )


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    """Centroids ``[K, F]`` float64, in place of the sums; those of empty clusters share a place, with a warning."""
    centroids = sums.div_(counts.clamp(min=1)[:, None])
    # Only where there are fewer distinct points than clusters is one left empty.
    vacant = (counts == 0).nonzero().flatten()
    if vacant.numel():
        warnings.warn(
            f"{vacant.numel()} of {counts.shape[0]} clusters are empty: the points have only about "
            f"{counts.shape[0] - vacant.numel()} distinct values",
            RuntimeWarning,
            stacklevel=4,
        )
        centroids[vacant] = centroids[counts.argmax()].clone()
    return centroids


def _check_same(first: FirstPass, batch: PointBatch) -> None:
    """Raise ValueError unless a batch of pass 2 is what it was in pass 1."""
    place = batch.offset
    if batch.end > first.norms.shape[0]:
        raise ValueError(
            f"points: more samples in the second pass than the {first.norms.shape[0]} of the first"
        )
    expected = first.sample_index[place : batch.end]
    found = batch.sample_index
    if found is not None and not torch.equal(found, expected):
        row = int((found != expected).nonzero()[0])
        raise ValueError(
            f"points: the passes differ in order: position {place + row} is sample {int(found[row])}, "
            f"it was sample {int(expected[row])}"
        )
    norms = first.norms[place : batch.end]
    differ = (batch.norms - norms).abs() > _NORM_TOLERANCE * norms
    if bool(differ.any()):
        row = int(differ.nonzero()[0])
        raise ValueError(
            f"points: the passes differ: sample {int(expected[row])} has norm {float(batch.norms[row]):.6g}, "
            f"it was {float(norms[row]):.6g}"
        )


def _inertia(scatter: float, centroids: Tensor, counts: Tensor, mean: Tensor) -> float:
    """Scatter within the clusters: the scatter about the mean less n_k times that of each centroid."""
    between = sum(
        int(count) * float((centroid - mean).square().sum())
        for centroid, count in zip(centroids, counts, strict=True)
    )
    if not math.isfinite(scatter - between):
        raise ValueError(f"points: expected a finite inertia, got {scatter} - {between}")
    return max(0.0, scatter - between)
