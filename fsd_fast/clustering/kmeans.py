"""k-means for points too wide or too many to hold: ``MiniBatchKMeans`` with scikit-learn's names.

``fit`` is Lloyd's algorithm with exact sums per epoch, read from a stream (a tensor, a re-iterable, or a
callable that returns an iterator of batches). ``partial_fit`` is the classical mini-batch update for streams
without an end:

    c_k <- c_k + (sum of the batch's x_i in k  -  n_k c_k) / N_k,     N_k all points that k has ever had

(Sculley 2010). ``cluster_stream`` in ``fsd_fast.clustering.two_pass`` clusters with two readings of the points in all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fsd_fast.clustering.lloyd import IterationStats, fetch_rows, lloyd, survey
from fsd_fast.clustering.seeding import k_means_plus_plus, sort_centred_
from fsd_fast.clustering.sketch import CountSketch
from fsd_fast.clustering.stream import PointStream, Source
from fsd_fast.distributed import Collectives
from fsd_kernels.kmeans import assign, nearest, update

# k-means++ draws by distances in a sketch this wide, or by the points' own where they are narrower.
_SEEDING_WIDTH = 1024


def _new_generator(random_state: int | None) -> torch.Generator:
    generator = torch.Generator()
    if random_state is None:
        generator.seed()
    else:
        generator.manual_seed(random_state)
    return generator


class MiniBatchKMeans:
    """k-means clustering of a stream of points.

    Args:
        n_clusters: K.
        init: "k-means++", "random" (points drawn uniformly) or centroids ``[K, F]``.
        batch_size: Rows at a time where the points are a tensor.
        max_iter: Epochs of ``fit`` at most.
        tol: ``fit`` stops once an epoch lowers the inertia by less than this part of it. 0: only where the
            centroids stay put.
        max_no_improvement: ``fit`` stops after this many epochs in a row without a new lowest inertia; None:
            never.
        reassignment_ratio: ``partial_fit`` moves clusters that have had fewer than this part of the points of
            the largest to points of the batch; 0: never. (``fit`` reseeds empty clusters at the farthest
            points.)
        random_state: Seed of the local generator; None: a new one every time.
        backend: Of the k-means kernels, see ``fsd_kernels``.
        progress: Called after each epoch of ``fit`` with its ``IterationStats``.

    Attributes:
        cluster_centers_: ``[K, F]`` float32.
        labels_: int64 ``[N]``: of the points of this process in the order of the stream; after
            ``partial_fit`` of the batch.
        inertia_: Sum of squared distances to the nearest centroid, over all processes; after ``partial_fit``
            of the batch.
        n_iter_: Epochs of ``fit``.
        counts_: int64 ``[K]``: sizes of the clusters; after ``partial_fit`` the points each has ever had.
        iteration_stats_: One ``IterationStats`` per epoch of ``fit``.

    Under ``torch.distributed``, ``fit`` takes the points of this process only, and gives the same centroids
    on all. ``partial_fit``, ``predict`` and ``transform`` are this process's own.

    Raises:
        ValueError: An argument out of range.
    """

    cluster_centers_: Tensor
    labels_: Tensor
    inertia_: float
    n_iter_: int
    counts_: Tensor
    iteration_stats_: list[IterationStats]

    def __init__(
        self,
        n_clusters: int,
        init: str | Tensor = "k-means++",
        *,
        batch_size: int = 1024,
        max_iter: int = 100,
        tol: float = 0.0,
        max_no_improvement: int | None = 10,
        reassignment_ratio: float = 0.01,
        random_state: int | None = None,
        backend: str | None = None,
        progress: Callable[[IterationStats], None] | None = None,
    ) -> None:
        limits: tuple[tuple[str, float, float], ...] = (
            ("n_clusters", n_clusters, 1),
            ("batch_size", batch_size, 1),
            ("max_iter", max_iter, 1),
            ("tol", tol, 0),
            ("max_no_improvement", 1 if max_no_improvement is None else max_no_improvement, 1),
            ("reassignment_ratio", reassignment_ratio, 0),
        )
        for name, value, least in limits:
            if not value >= least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if isinstance(init, Tensor):
            if init.ndim != 2 or init.shape[0] != n_clusters or not bool(init.isfinite().all()):
                raise ValueError(
                    f"init: expected finite centroids [K, F] with K = {n_clusters}, got {list(init.shape)}"
                )
        elif init not in ("k-means++", "random"):
            raise ValueError(f"init: expected 'k-means++', 'random' or a tensor [K, F], got {init!r}")
        self.n_clusters = n_clusters
        self.init = init
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.tol = tol
        self.max_no_improvement = max_no_improvement
        self.reassignment_ratio = reassignment_ratio
        self.random_state = random_state
        self.backend = backend
        self.progress = progress
        self._generator: torch.Generator | None = None
        self._since_reassignment = 0

    def fit(self, points: Source, *, features: int | None = None) -> MiniBatchKMeans:
        """Cluster the points, read once or twice for the start, once per epoch and once for the labels.

        Args:
            points: ``[N, F]``, or a re-iterable or callable that gives batches ``[b, F]``, or pairs of a
                batch and the samples' numbers ``[b]`` int64, which must differ. With numbers, the result is
                the same however the samples are spread over processes; without, they count as ordered by
                process.
            features: F, where batches may be narrower than it: what they lack is zero. None: all are as wide as the
                first.

        Returns:
            This object.

        Raises:
            TypeError: Points of another kind.
            ValueError: Fewer points than clusters, a NaN or infinite feature (the sample is named), or a
                wrong width.
        """
        return self._fit(points, Collectives(), features)

    def fit_alone(self, points: Source) -> MiniBatchKMeans:
        """Like ``fit``, on this process only: the points are all there are."""
        return self._fit(points, Collectives(together=False))

    def _fit(self, points: Source, collectives: Collectives, features: int | None = None) -> MiniBatchKMeans:
        stream = PointStream(
            points, batch_size=self.batch_size, features=features, narrower=features is not None
        )
        if isinstance(self.init, Tensor):
            stream.features = self.init.shape[1]
        generator = _new_generator(self.random_state)
        sketch_seed = int(torch.randint(1 << 62, (1,), generator=generator))
        if self.random_state is None:
            sketch_seed = int(collectives.broadcast_(torch.tensor([sketch_seed])))
        seen = survey(
            stream,
            lambda features: CountSketch(features, _SEEDING_WIDTH, sketch_seed),
            self.n_clusters,
            collectives,
        )
        if isinstance(self.init, Tensor):
            centroids = self.init.to(seen.mean.device, torch.float32)
        else:
            wanted = self._draw_seeds(seen.sketches, seen.numbers, generator, collectives)
            like = torch.empty(0, seen.mean.shape[0], device=seen.mean.device)
            centroids = fetch_rows(stream, wanted, seen.numbers, like, collectives)
        result = lloyd(
            stream,
            centroids,
            seen.numbers,
            collectives,
            max_iter=self.max_iter,
            tol=self.tol,
            max_no_improvement=self.max_no_improvement,
            backend=self.backend,
            progress=self.progress,
        )
        self.cluster_centers_ = result.centroids
        self.counts_ = result.counts
        self.labels_ = result.labels
        self.inertia_ = result.inertia
        self.n_iter_ = result.n_iter
        self.iteration_stats_ = result.stats
        self._generator = generator
        self._since_reassignment = 0
        return self

    def _draw_seeds(
        self, sketches: Tensor, numbers: Tensor, generator: torch.Generator, collectives: Collectives
    ) -> Tensor:
        """Return the numbers of the points to start from, drawn on the first process; uses up the sketches."""
        wanted = torch.empty(self.n_clusters, dtype=torch.int64)
        all_numbers = collectives.gather_rows_to_first(numbers)
        all_sketches = collectives.gather_rows_to_first(sketches)
        if all_numbers is not None and all_sketches is not None:
            order = all_numbers.argsort()
            if self.init == "random":
                drawn = torch.randperm(order.shape[0], generator=generator)[: self.n_clusters]
            else:
                sort_centred_(all_sketches, order)
                drawn = k_means_plus_plus(all_sketches, self.n_clusters, generator)
            wanted = all_numbers[order][drawn]
        return collectives.broadcast_(wanted)

    def partial_fit(self, points: Tensor) -> MiniBatchKMeans:
        """Move the centroids towards one batch. The first batch also gives the centroids to start from.

        Args:
            points: ``[b, F]``; at least K of them in the first batch, unless ``init`` is a tensor.

        Returns:
            This object.

        Raises:
            TypeError: No floating tensor.
            ValueError: Too few points in the first batch, a NaN or infinite feature, or a wrong width.
        """
        batch = self._checked(points)
        rows = batch.shape[0]
        if self._generator is None:
            self._generator = _new_generator(self.random_state)
        if not hasattr(self, "cluster_centers_"):
            self.cluster_centers_ = self._first_centroids(batch, self._generator)
            self.counts_ = torch.zeros(self.n_clusters, dtype=torch.int64, device=batch.device)
        self.labels_, distances = assign(batch, self.cluster_centers_, backend=self.backend)
        self.inertia_ = float(distances.sum(dtype=torch.float64))
        sums, counts = update(batch, self.labels_, self.n_clusters, backend=self.backend)
        self.counts_ = self.counts_ + counts
        pull = sums - counts[:, None] * self.cluster_centers_
        self.cluster_centers_ = self.cluster_centers_ + pull / self.counts_.clamp(min=1)[:, None]
        self._since_reassignment += rows
        # As often as scikit-learn does: not before every cluster has had a fair chance of ten points.
        if self.reassignment_ratio > 0 and self._since_reassignment >= 10 * self.n_clusters:
            self._reassign(batch, self._generator)
            self._since_reassignment = 0
        return self

    def _first_centroids(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        if isinstance(self.init, Tensor):
            return self.init.to(batch.device, torch.float32)
        if batch.shape[0] < self.n_clusters:
            raise ValueError(
                f"points: the first batch has {batch.shape[0]} samples, fewer than the {self.n_clusters} clusters"
            )
        if self.init == "random":
            drawn = torch.randperm(batch.shape[0], generator=generator)[: self.n_clusters]
        else:
            centred = batch.float() - batch.mean(dim=0, dtype=torch.float32)
            drawn = k_means_plus_plus(centred, self.n_clusters, generator)
        return batch[drawn.to(batch.device)].float()

    def _reassign(self, batch: Tensor, generator: torch.Generator) -> None:
        weak = self.counts_ < self.reassignment_ratio * self.counts_.max()
        weakest = self.counts_.argsort(stable=True)[: min(int(weak.sum()), batch.shape[0] // 2)]
        if weakest.numel() == 0:
            return
        drawn = torch.randperm(batch.shape[0], generator=generator)[: weakest.shape[0]].to(batch.device)
        self.cluster_centers_[weakest] = batch[drawn].float()
        self.counts_[weakest] = self.counts_[~weak].min()

    def predict(self, points: Source) -> Tensor:
        """Nearest centroid of each point: int64 ``[N]``.

        Raises:
            TypeError: Points of another kind.
            ValueError: Not fitted, a NaN or infinite feature, or a wrong width.
        """
        centroids, stream = self._fitted(points)
        labels = [torch.empty(0, dtype=torch.int64, device=centroids.device)]
        labels += [
            nearest(batch.points.to(centroids.device), centroids, backend=self.backend)
            for batch in stream.read()
        ]
        return torch.cat(labels)

    def transform(self, points: Source) -> Tensor:
        """Distance of each point to each centroid: float32 ``[N, K]``.

        Raises:
            TypeError: Points of another kind.
            ValueError: Not fitted, a NaN or infinite feature, or a wrong width.
        """
        centroids, stream = self._fitted(points)
        distances = [torch.empty(0, self.n_clusters, device=centroids.device)]
        distances += [
            torch.cdist(batch.points.to(centroids), centroids, compute_mode="donot_use_mm_for_euclid_dist")
            for batch in stream.read()
        ]
        return torch.cat(distances)

    def _fitted(self, points: Source) -> tuple[Tensor, PointStream]:
        if not hasattr(self, "cluster_centers_"):
            raise ValueError("MiniBatchKMeans is not fitted: call fit or partial_fit first")
        features = self.cluster_centers_.shape[1]
        return self.cluster_centers_, PointStream(points, batch_size=self.batch_size, features=features)

    def _checked(self, points: Tensor) -> Tensor:
        if not isinstance(points, Tensor):
            raise TypeError(f"points: expected a tensor [b, F], got {type(points).__name__}")
        known = self.init.shape[1] if isinstance(self.init, Tensor) else None
        if hasattr(self, "cluster_centers_"):
            known = self.cluster_centers_.shape[1]
        stream = PointStream(points, batch_size=max(1, points.shape[0]), features=known)
        batches = [batch.points for batch in stream.read()]
        if not batches:
            raise ValueError("points: the batch is empty")
        return batches[0]
