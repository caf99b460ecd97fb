"""Exact k-means for points too wide or too many to hold, with scikit-learn's interface and names.

``StreamKMeans.fit`` is Lloyd's algorithm with exact sums per epoch. ``cluster_stream`` in
``fsd_fast.clustering.two_pass`` clusters with two passes over the points in all.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from fsd_fast.clustering.lloyd import EpochStats, LloydSettings, kmeans_in_memory
from fsd_fast.clustering.lloyd_of_stream import kmeans_of_stream
from fsd_fast.clustering.seeding import new_generator
from fsd_fast.clustering.stream import PointSource, PointStream, Resumable
from fsd_fast.distributed import Collectives
from fsd_kernels.kmeans import nearest


class StreamKMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """Exact k-means of a stream of points: each epoch reads all of them before the centroids move.

    Points are an array-like ``[N, F]``, a tensor ``[N, F]``, or a stream: a re-iterable or callable that gives tensors
    ``[b, F]``, or pairs of such a tensor and the samples' indices ``[b]`` int64, which must differ. Arrays in give
    NumPy arrays out; tensors and streams give tensors.

    Args:
        n_clusters: K.
        init: "k-means++", "random" (points drawn uniformly) or centroids ``[K, F]``.
        batch_size: Rows at a time where the points are an array or a tensor.
        max_iter: Epochs at most.
        tol: ``fit`` stops once an epoch lowers the inertia by less than this fraction of it. 0: only where the
            centroids stay put.
        max_no_improvement: ``fit`` stops after this many epochs in a row without a new lowest inertia; None:
            never.
        random_state: Seed of the local generator, or a ``numpy.random.RandomState`` that gives it; None: a new one
            every time.
        backend: Of the k-means kernels, see ``fsd_kernels``.
        progress: Called after each epoch of ``fit`` with its ``EpochStats``.

    Attributes:
        cluster_centers_: ``[K, F]`` float32.
        labels_: int64 ``[N]``: of the points of this process in the order of the stream.
        inertia_: Sum of squared distances to the nearest centroid, over all processes.
        n_iter_: Epochs.
        counts_: int64 ``[K]``: sizes of the clusters.
        epoch_stats_: One ``EpochStats`` per epoch.
        n_features_in_: F.

    Under ``torch.distributed``, ``fit`` takes the points of this process only, and gives the same centroids on all.
    ``predict`` and ``transform`` are this process's own.
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
        random_state: int | np.random.RandomState | None = None,
        backend: str | None = None,
        progress: Callable[[EpochStats], None] | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.tol = tol
        self.max_no_improvement = max_no_improvement
        self.random_state = random_state
        self.backend = backend
        self.progress = progress

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    @property
    def _n_features_out(self) -> int:
        return len(self.cluster_centers_)

    def fit(self, X: Any, y: object = None, *, features: int | None = None) -> StreamKMeans:
        """Cluster the points.

        A stream is read once to check it, once for the start unless ``init`` is centroids, once per epoch, once more
        for an epoch that finds empty clusters, and once for the labels unless the last epoch moved nothing.

        Args:
            X: The points. With sample indices, the result is the same however the samples are spread over processes;
                without, they count as ordered by process.
            y: Ignored; there by convention.
            features: F, where batches may be narrower than it: what they lack is zero. None: all are as wide as the
                first.

        Returns:
            This object.

        Raises:
            TypeError: Points, or an argument of this object, of another kind.
            ValueError: An argument of this object out of range; fewer points than clusters; a NaN, infinite or too
                large feature (the sample is named), or a wrong width.
        """
        self._check_parameters()
        points, is_array = self._points(X, reset=True)
        init = self._start()
        narrower = features is not None
        if isinstance(init, Tensor):
            if features not in (None, init.shape[1]):
                raise ValueError(
                    f"init: expected centroids [K, F] with F = {features}, got {list(init.shape)}"
                )
            features = init.shape[1]
        stream = PointStream(points, batch_size=self.batch_size, features=features, narrower=narrower)
        generator = self._new_generator()
        settings = LloydSettings(
            self.max_iter, self.tol, self.max_no_improvement, self.batch_size, self.backend
        )
        collectives = Collectives()
        if isinstance(points, Tensor) and collectives.world_size == 1:
            self._check_all(stream)
            run = kmeans_in_memory(
                points.detach(), self.n_clusters, init=init, generator=generator, settings=settings,
                progress=self.progress,
            )  # fmt: skip
        else:
            run, _ = kmeans_of_stream(
                stream, self.n_clusters, collectives, init=init, generator=generator, settings=settings,
                progress=self.progress,
            )  # fmt: skip
        self._set(is_array, cluster_centers_=run.centroids, labels_=run.labels, counts_=run.counts)
        self.inertia_ = run.inertia
        self.n_iter_ = len(run.stats)
        self.epoch_stats_ = run.stats
        self._generator = generator
        return self

    def predict(self, X: Any) -> Any:
        """Nearest centroid of each point: int64 ``[N]``.

        Raises:
            TypeError: Points of another kind.
            ValueError: Not fitted, a NaN, infinite or too large feature, or a wrong width.
        """
        check_is_fitted(self)
        points, is_array = self._points(X, reset=False)
        centroids = torch.as_tensor(self.cluster_centers_)
        labels = [torch.empty(0, dtype=torch.int64, device=centroids.device)]
        labels += [
            nearest(batch.points.to(centroids.device), centroids, backend=self.backend)
            for batch in self._fitted_stream(points).read()
        ]
        return as_given(torch.cat(labels), is_array)

    def transform(self, X: Any) -> Any:
        """Distance of each point to each centroid: float32 ``[N, K]``.

        Raises:
            TypeError: Points of another kind.
            ValueError: Not fitted, a NaN, infinite or too large feature, or a wrong width.
        """
        check_is_fitted(self)
        points, is_array = self._points(X, reset=False)
        centroids = torch.as_tensor(self.cluster_centers_)
        distances = [torch.empty(0, len(centroids), device=centroids.device)]
        distances += [
            torch.cdist(batch.points.to(centroids), centroids, compute_mode="donot_use_mm_for_euclid_dist")
            for batch in self._fitted_stream(points).read()
        ]
        return as_given(torch.cat(distances), is_array)

    def _fitted_stream(self, points: PointSource) -> PointStream:
        return PointStream(points, batch_size=self.batch_size, features=self.cluster_centers_.shape[1])

    def _points(self, given: Any, *, reset: bool) -> tuple[Any, bool]:
        """A source of points, and whether they were given as an array."""
        if not _is_array_like(given):
            return given, False
        checked = validate_data(self, given, dtype=[np.float64, np.float32], order="C", reset=reset)
        return torch.from_numpy(checked if checked.flags.writeable else checked.copy()), True

    def _check_all(self, stream: PointStream) -> None:
        """Read points in memory once, which checks them."""
        rows = sum(batch.points.shape[0] for batch in stream.read())
        if rows < self.n_clusters:
            raise ValueError(
                f"points: {rows} samples are fewer than the {self.n_clusters} clusters asked for"
            )

    def _set(self, is_array: bool, **fitted: Tensor) -> None:
        for name, value in fitted.items():
            setattr(self, name, as_given(value, is_array))
        self.n_features_in_ = self.cluster_centers_.shape[1]
        if not is_array:
            # Of an earlier data frame.
            self.__dict__.pop("feature_names_in_", None)

    def _new_generator(self) -> torch.Generator:
        if isinstance(self.random_state, np.random.RandomState):
            return new_generator(int(self.random_state.randint(np.iinfo(np.int32).max)))
        return new_generator(None if self.random_state is None else int(self.random_state))

    def _start(self) -> str | Tensor:
        """``init``, checked; centroids as a tensor."""
        if isinstance(self.init, str):
            if self.init not in ("k-means++", "random"):
                raise ValueError(
                    f"init: expected 'k-means++', 'random' or centroids [K, F], got {self.init!r}"
                )
            return self.init
        if not isinstance(self.init, Tensor | np.ndarray):
            kind = type(self.init).__name__
            raise TypeError(f"init: expected 'k-means++', 'random' or centroids [K, F], got {kind}")
        centroids = torch.as_tensor(self.init)
        if (
            centroids.ndim != 2
            or centroids.shape[0] != self.n_clusters
            or not bool(centroids.isfinite().all())
        ):
            raise ValueError(
                f"init: expected finite centroids [K, F] with K = {self.n_clusters}, got {list(centroids.shape)}"
            )
        return centroids

    def _limits(self) -> list[tuple[str, Any, float]]:
        """Arguments that are numbers: name, kind, lowest value."""
        return [
            ("n_clusters", Integral, 1),
            ("batch_size", Integral, 1),
            ("max_iter", Integral, 1),
            ("tol", Real, 0),
            ("max_no_improvement", Integral, 1),
        ]

    def _check_parameters(self) -> None:
        for name, kind, minimum in self._limits():
            value = getattr(self, name)
            if name == "max_no_improvement" and value is None:
                continue
            if not isinstance(value, kind) or isinstance(value, bool):
                wanted = "an integer" if kind is Integral else "a number"
                raise TypeError(f"{name}: expected {wanted}, got {value!r}")
            if not value >= minimum:
                raise ValueError(f"{name}: expected at least {minimum}, got {value}")
        if not isinstance(self.random_state, Integral | np.random.RandomState | None):
            raise TypeError(
                f"random_state: expected an integer, a numpy RandomState or None, got {self.random_state!r}"
            )


def as_given(value: Tensor, is_array: bool) -> Any:
    """A NumPy array where the points were one, else the tensor."""
    return value.numpy() if is_array else value


def _is_array_like(points: Any) -> bool:
    """Whether scikit-learn should check these points: anything but tensors and streams of them."""
    if isinstance(points, Tensor | Resumable) or (callable(points) and not hasattr(points, "__array__")):
        return False
    if isinstance(points, list | tuple):
        first = points[0] if points else torch.empty(0)
        return not isinstance(first[0] if isinstance(first, tuple) and first else first, Tensor)
    return hasattr(points, "__array__") or hasattr(points, "shape") or isinstance(points, str)
