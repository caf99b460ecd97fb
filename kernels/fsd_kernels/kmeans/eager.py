"""k-means in tiles of torch operations: no temporary of the size of the points, and no cancellation.

A tile is a block of rows and a slice of features. With m the mean centroid,

    ||x - c_k||^2 = ||x - m||^2 + ||c_k - m||^2 - 2 <x - m, c_k - m>,

and m is subtracted from points and centroids inside the tile, in float32, before the product: an offset that
all features share (the outlier dimensions of BERT) would otherwise take the digits that tell the centroids
apart. ||x - m||^2 plays no part in the argmin and is added to the winner only.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Shifted points [1024, 304] in float32 take 1.2 MB, about a core's second-level cache. Short slices make the
# product faster, and padding keeps the leading dimension off powers of two, which collide in that cache.
_ROWS = 1024
_FEATURES = 304
_PADDING = 16
# A point is widened to the accumulators' dtype in blocks of this many numbers.
_WIDENED = 1 << 20


def assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid (lowest index on ties) and squared distance to it; memory O(N + F + tile)."""
    rows, width = points.shape
    clusters, features = centroids.shape
    dtype = torch.promote_types(torch.promote_types(points.dtype, centroids.dtype), torch.float32)
    device = points.device
    center = centroids.mean(dim=0, dtype=dtype)

    # Slices never straddle the width of the points: beyond it a point is zero, its shifted value is -m, and
    # what it adds to products and norms is the same for every point.
    inside = [(start, min(start + _FEATURES, width)) for start in range(0, width, _FEATURES)]
    beyond = [(start, min(start + _FEATURES, features)) for start in range(width, features, _FEATURES)]

    point_tile = torch.empty(_ROWS, _FEATURES + _PADDING, dtype=dtype, device=device)
    centroid_tile = torch.empty(clusters, _FEATURES + _PADDING, dtype=dtype, device=device)
    centroid_norms = torch.zeros(clusters, dtype=dtype, device=device)
    beyond_products = torch.zeros(clusters, 1, dtype=dtype, device=device)
    beyond_norm = torch.zeros((), dtype=dtype, device=device)
    for start, stop in beyond:
        shift = center[start:stop]
        shifted = torch.sub(centroids[:, start:stop], shift, out=centroid_tile[:, : stop - start])
        centroid_norms += torch.linalg.vecdot(shifted, shifted)
        beyond_products -= shifted @ shift[:, None]
        beyond_norm += shift.dot(shift)

    labels = torch.empty(rows, dtype=torch.int64, device=device)
    squared_distance = torch.empty(rows, dtype=dtype, device=device)
    for top in range(0, rows, _ROWS):
        bottom = min(top + _ROWS, rows)
        products = beyond_products.repeat(1, bottom - top)
        norms = beyond_norm.repeat(bottom - top)
        for start, stop in inside:
            shift = center[start:stop]
            x = torch.sub(
                points[top:bottom, start:stop], shift, out=point_tile[: bottom - top, : stop - start]
            )
            c = torch.sub(centroids[:, start:stop], shift, out=centroid_tile[:, : stop - start])
            products.addmm_(c, x.t())
            norms += torch.linalg.vecdot(x, x)
            if top == 0:
                centroid_norms += torch.linalg.vecdot(c, c)
        scores = products.mul_(-2).add_(centroid_norms[:, None])
        nearest = scores.argmin(dim=0)
        labels[top:bottom] = nearest
        norms += scores.gather(0, nearest[None]).squeeze(0)
        squared_distance[top:bottom] = norms.clamp_(min=0)
    return labels, squared_distance


def update_(sums: Tensor, counts: Tensor, points: Tensor, labels: Tensor) -> None:
    """Add every point to its cluster's row of ``sums``, in the order of the points, and count it."""
    counts += torch.bincount(labels, minlength=counts.shape[0])
    if points.device.type == "cpu":
        _add_rows(sums[:, : points.shape[1]], points, labels)
    else:
        _add_products(sums[:, : points.shape[1]], points, labels)


def _add_rows(sums: Tensor, points: Tensor, labels: Tensor) -> None:
    """Add the points one after another: on the CPU ``index_add_`` walks through them in order."""
    if points.dtype == sums.dtype:
        sums.index_add_(0, labels, points)
        return
    block = max(1, _WIDENED // max(1, points.shape[1]))
    for top in range(0, points.shape[0], block):
        sums.index_add_(0, labels[top : top + block], points[top : top + block].to(sums.dtype))


def _add_products(sums: Tensor, points: Tensor, labels: Tensor) -> None:
    """Add one-hot(labels)^T x per feature slice: elsewhere ``index_add_`` uses atomics, in no fixed order."""
    one_hot = torch.arange(sums.shape[0], device=points.device)[:, None] == labels[None]
    one_hot = one_hot.to(sums.dtype)
    step = max(1, _WIDENED // max(1, points.shape[0]))
    for start in range(0, points.shape[1], step):
        stop = min(start + step, points.shape[1])
        sums[:, start:stop] += one_hot @ points[:, start:stop].to(sums.dtype)
