"""k-means over wide points: ``assign`` gives each its nearest centroid, ``update`` sums the points of each cluster.

``nearest`` is ``assign`` without the distances.

    l_i = argmin_k ||x_i - c_k||^2,    s_k = sum of x_i over l_i = k,    n_k = number of i with l_i = k

Shapes: points x ``[N, F_p]``, centroids c ``[K, F]``, labels l ``[N]``, sums s ``[K, F]``, counts n ``[K]``. F_p <= F:
points may be narrower than the centroids, as in a batch padded only to its own longest sample. The missing columns
count as zero and are never materialised. No op has gradients, since nothing is trained through clustering.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fsd_kernels._backend import implementation, resolve_backend
from fsd_kernels._checks import check_features, check_same_device
from fsd_kernels._op import op


def _fake_assign(points: Tensor, centroids: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(points.dtype, centroids.dtype), torch.float32)
    rows = points.shape[0]
    return points.new_empty(rows, dtype=torch.int64), points.new_empty(rows, dtype=dtype)


@op("kmeans_assign", fake=_fake_assign)
def _assign(points: Tensor, centroids: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return implementation("kmeans", backend).assign(points, centroids)


@op("kmeans_nearest", fake=lambda points, *_: points.new_empty(points.shape[0], dtype=torch.int64))
def _nearest(points: Tensor, centroids: Tensor, backend: str) -> Tensor:
    return implementation("kmeans", backend).nearest(points, centroids)


@op("kmeans_update_", fake=lambda *_: None, mutates=("sums", "counts"))
def _update(sums: Tensor, counts: Tensor, points: Tensor, labels: Tensor, backend: str) -> None:
    # On a GPU reading the extremes would wait for the device: counting the labels fails there instead.
    if labels.numel() and labels.device.type == "cpu":
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= sums.shape[0]:
            raise ValueError(f"labels: expected values in [0, {sums.shape[0]}), got {low} to {high}")
    implementation("kmeans", backend).update_(sums, counts, points, labels)


def assign(points: Tensor, centroids: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Nearest centroid of every point, and the squared distance to it.

        l_i = argmin_k ||x_i - c_k||^2,    d_i = ||x_i - c_{l_i}||^2

    Args:
        points: x ``[N, F_p]``, F_p <= F; float16, bfloat16, float32 or float64, computed in at least float32.
        centroids: c ``[K, F]`` with K >= 1.
        backend: See ``fsd_kernels._backend``.

    Returns:
        ``labels`` int64 ``[N]``, the lowest index on ties, and ``squared_distance`` ``[N]``, float64 if either input is
        and float32 otherwise. Points and centroids are shifted by a point o amid the centroids, which removes an offset
        that all share. Two centroids may be confused if their squared distances differ by less than the rounding of
        ||x - o||^2; a point far away loses digits of its own distance alone. "triton" rounds x - o and c - o before it
        multiplies them: to bfloat16 or float16 if points and centroids both have that dtype, to tf32 if
        ``torch.get_float32_matmul_precision()`` allows it. A point that holds NaN has distance NaN.

    Raises:
        TypeError: An argument is not a floating tensor, or is float64 with "triton".
        ValueError: Shapes or devices do not fit, or there is no centroid.
        RuntimeError: ``backend="triton"`` where it cannot run.
    """
    _check_assignment(points, centroids)
    chosen = resolve_backend(backend, points.device, "kmeans")
    labels, squared_distance = _assign(points.detach(), centroids.detach(), chosen)
    return labels, squared_distance


def nearest(points: Tensor, centroids: Tensor, *, backend: str | None = None) -> Tensor:
    """The labels of ``assign`` alone, which on a CPU saves another read of the points.

    Args:
        points: x ``[N, F_p]``, F_p <= F, as in ``assign``.
        centroids: c ``[K, F]`` with K >= 1.
        backend: See ``fsd_kernels._backend``.

    Returns:
        int64 ``[N]``, the lowest index on ties.

    Raises:
        TypeError, ValueError, RuntimeError: As ``assign``.
    """
    _check_assignment(points, centroids)
    chosen = resolve_backend(backend, points.device, "kmeans")
    labels: Tensor = _nearest(points.detach(), centroids.detach(), chosen)
    return labels


def _check_assignment(points: Tensor, centroids: Tensor) -> None:
    check_features("points", points, 2, "[N, F]")
    check_features("centroids", centroids, 2, "[K, F]")
    check_same_device([("points", points), ("centroids", centroids)])
    if centroids.shape[0] == 0:
        raise ValueError("centroids: expected at least one row [K, F], got none")
    if points.shape[1] > centroids.shape[1]:
        raise ValueError(
            f"points: {points.shape[1]} features, but the centroids have only {centroids.shape[1]}: "
            f"expected at most as many"
        )


def update(
    points: Tensor, labels: Tensor, num_clusters: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Sum and number of the points of every cluster.

        s_k = sum of x_i over l_i = k,    n_k = number of i with l_i = k

    Every call gives the same bits, because each sum adds its points in a fixed order.

    Args:
        points: x ``[N, F]``; float16, bfloat16, float32 or float64.
        labels: l int64 ``[N]``, values in [0, num_clusters).
        num_clusters: K >= 1.
        backend: See ``fsd_kernels._backend``.

    Returns:
        ``sums`` ``[K, F]``, float64 for float64 points and float32 otherwise, and ``counts`` int64 ``[K]``.

    Raises:
        TypeError: Dtypes do not fit, or float64 points with "triton".
        ValueError: Shapes or devices do not fit, or a label is out of range.
        RuntimeError: ``backend="triton"`` where it cannot run.
    """
    _check_labels(points, labels)
    if num_clusters < 1:
        raise ValueError(f"num_clusters: expected at least 1, got {num_clusters}")
    chosen = resolve_backend(backend, points.device, "kmeans")
    dtype = torch.promote_types(points.dtype, torch.float32)
    sums = torch.zeros(num_clusters, points.shape[1], dtype=dtype, device=points.device)
    counts = torch.zeros(num_clusters, dtype=torch.int64, device=points.device)
    _update(sums, counts, points.detach(), labels, chosen)
    return sums, counts


def update_(
    sums: Tensor, counts: Tensor, points: Tensor, labels: Tensor, *, backend: str | None = None
) -> None:
    """Add a batch of points to running sums and counts: ``update`` over a stream, in place.

    Args:
        sums: ``[K, F]`` float32 or float64, changed in place; float64 keeps sums over a long stream exact.
        counts: int64 ``[K]``, changed in place.
        points: x ``[N, F_p]``, F_p <= F.
        labels: l int64 ``[N]``, values in [0, K).
        backend: See ``fsd_kernels._backend``.

    Raises:
        TypeError: Dtypes do not fit, or float64 points with "triton".
        ValueError: Shapes or devices do not fit, or a label is out of range.
        RuntimeError: ``backend="triton"`` where it cannot run.
    """
    _check_labels(points, labels)
    check_features("sums", sums, 2, "[K, F]")
    if sums.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"sums: expected float32 or float64, got {sums.dtype}")
    if counts.dtype != torch.int64:
        raise TypeError(f"counts: expected int64, got {counts.dtype}")
    if counts.shape != sums.shape[:1]:
        raise ValueError(f"counts: expected [K] = [{sums.shape[0]}], got {list(counts.shape)}")
    if points.shape[1] > sums.shape[1]:
        raise ValueError(f"points: {points.shape[1]} features, but sums has only {sums.shape[1]}")
    check_same_device([("points", points), ("sums", sums), ("counts", counts)])
    chosen = resolve_backend(backend, points.device, "kmeans")
    _update(sums, counts, points.detach(), labels, chosen)


def _check_labels(points: Tensor, labels: Tensor) -> None:
    check_features("points", points, 2, "[N, F]")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64, got {labels.dtype}")
    if labels.shape != points.shape[:1]:
        raise ValueError(f"labels: expected [N] = [{points.shape[0]}], got {list(labels.shape)}")
    check_same_device([("points", points), ("labels", labels)])
