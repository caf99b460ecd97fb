"""``MiniBatchKMeans``: k-means with ``fit`` by exact epochs and ``partial_fit`` by mini-batches.

The mini-batch update is the classical one for streams without an end (Sculley 2010):

    c_k <- c_k + (sum of the batch's x_i in k  -  n_k c_k) / N_k,     N_k all points that k has ever had
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fsd_fast.clustering.lloyd import EpochStats
from fsd_fast.clustering.seeding import draw_seeds
from fsd_fast.clustering.stream import PointStream
from fsd_fast.clustering.stream_kmeans import StreamKMeans
from fsd_kernels.kmeans import assign, update


class MiniBatchKMeans(StreamKMeans):
    """``StreamKMeans`` that also learns from one batch at a time with ``partial_fit``.

    ``fit`` is that of ``StreamKMeans``: points that can be read again deserve exact epochs, which end at a lower
    inertia than mini-batches and give the same centroids however the points are cut. The class has the name under
    which such an estimator is looked for; what is mini-batch about it is ``partial_fit``, for points that pass by once.

    Args:
        n_clusters: K.
        init: See ``StreamKMeans``, like all arguments not listed here.
        batch_size: As there.
        max_iter: As there.
        tol: As there.
        max_no_improvement: As there.
        reassignment_ratio: ``partial_fit`` moves clusters that have had fewer than this fraction of the points of
            the largest to points of the batch; 0: never. (``fit`` reseeds empty clusters at the farthest points.)
        random_state: As there.
        backend: As there.
        progress: As there.

    Attributes:
        labels_: After ``partial_fit``, of the batch.
        inertia_: After ``partial_fit``, of the batch.
        counts_: After ``partial_fit``, the points that each cluster has ever had.

    ``partial_fit`` is this process's own under ``torch.distributed``.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        init: str | Tensor | np.ndarray[Any, Any] = "k-means++",
        *,
        batch_size: int = 1024,
        max_iter: int = 100,
        tol: float = 0.0,
        max_no_improvement: int | None = 10,
        reassignment_ratio: float = 0.01,
        random_state: int | np.random.RandomState | None = None,
        backend: str | None = None,
        progress: Callable[[EpochStats], None] | None = None,
    ) -> None:
        super().__init__(
            n_clusters,
            init,
            batch_size=batch_size,
            max_iter=max_iter,
            tol=tol,
            max_no_improvement=max_no_improvement,
            random_state=random_state,
            backend=backend,
            progress=progress,
        )
        self.reassignment_ratio = reassignment_ratio

    def _limits(self) -> list[tuple[str, Any, float]]:
        return [*super()._limits(), ("reassignment_ratio", Real, 0)]

    def fit(self, X: Any, y: object = None, *, features: int | None = None) -> MiniBatchKMeans:
        """Exact epochs over all points: ``StreamKMeans.fit``."""
        super().fit(X, y, features=features)
        self._since_reassignment = 0
        return self

    def partial_fit(self, X: Any, y: object = None) -> MiniBatchKMeans:
        """Move the centroids towards one batch. The first batch also gives the centroids to start from.

        Args:
            X: An array-like or a tensor ``[b, F]``; at least K points in the first batch, unless ``init`` is centroids.
            y: Ignored; there by convention.

        Returns:
            This object.

        Raises:
            TypeError: A stream, or an argument of this object of another kind.
            ValueError: An argument of this object out of range; too few points in the first batch; a NaN, infinite
                or too large feature, or a wrong width.
        """
        self._check_parameters()
        is_new = not hasattr(self, "cluster_centers_")
        points, is_array = self._points(X, reset=is_new)
        batch = self._checked_batch(points)
        if is_new:
            self._generator = self._new_generator()
            self._since_reassignment = 0
            centroids = self._first_centroids(batch)
            totals = torch.zeros(self.n_clusters, dtype=torch.int64, device=batch.device)
        else:
            centroids = torch.as_tensor(self.cluster_centers_)
            totals = torch.as_tensor(self.counts_)
        labels, distances = assign(batch, centroids, backend=self.backend)
        self.inertia_ = float(distances.sum(dtype=torch.float64))
        sums, counts = update(batch, labels, self.n_clusters, backend=self.backend)
        totals = totals + counts
        pull = sums - counts[:, None] * centroids
        centroids = (centroids + pull / totals.clamp(min=1)[:, None]).float()
        self._since_reassignment += batch.shape[0]
        # As often as scikit-learn does: not before every cluster has had a fair chance of ten points.
        if self.reassignment_ratio > 0 and self._since_reassignment >= 10 * self.n_clusters:
            self._reassign_(batch, centroids, totals)
            self._since_reassignment = 0
        self._set(is_array, cluster_centers_=centroids, labels_=labels, counts_=totals)
        return self

    def _checked_batch(self, points: Any) -> Tensor:
        if not isinstance(points, Tensor):
            raise TypeError(f"points: expected an array or a tensor [b, F], got {type(points).__name__}")
        init = self._start()
        features = init.shape[1] if isinstance(init, Tensor) else None
        if hasattr(self, "cluster_centers_"):
            features = self.cluster_centers_.shape[1]
        stream = PointStream(points, batch_size=max(1, points.shape[0]), features=features)
        batches = [batch.points for batch in stream.read()]
        if not batches:
            raise ValueError("points: the batch is empty")
        return batches[0]

    def _first_centroids(self, batch: Tensor) -> Tensor:
        init = self._start()
        if isinstance(init, Tensor):
            return init.to(batch.device, torch.float32)
        if batch.shape[0] < self.n_clusters:
            raise ValueError(
                f"points: the first batch has {batch.shape[0]} samples, fewer than the {self.n_clusters} clusters"
            )
        centred = batch.float() - batch.mean(dim=0, dtype=torch.float32)
        drawn = draw_seeds(centred, self.n_clusters, init, self._generator)
        return batch[drawn.to(batch.device)].float()

    def _reassign_(self, batch: Tensor, centroids: Tensor, totals: Tensor) -> None:
        """Move the clusters that have had few points to points of the batch, in place."""
        weak = totals < self.reassignment_ratio * totals.max()
        weakest = totals.argsort(stable=True)[: min(int(weak.sum()), batch.shape[0] // 2)]
        if weakest.numel() == 0:
            return
        drawn = torch.randperm(batch.shape[0], generator=self._generator)[: weakest.shape[0]]
        centroids[weakest] = batch[drawn.to(batch.device)].float()
        totals[weakest] = totals[~weak].min()
