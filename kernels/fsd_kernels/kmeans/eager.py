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

# Shifted points [256, 1264] in float32 take 1.3 MB, about a core's second-level cache; padding keeps the leading
# dimension off powers of two, which collide there. A block of rows shares the shifted slices of the centroids, whose
# number is rounded up: products of full register tiles are faster.
_ROWS = 256
_BLOCK = 4096
_FEATURES = 1264
_PADDING = 16
_CLUSTERS = 8
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

    padded = -(-clusters // _CLUSTERS) * _CLUSTERS
    point_tile = torch.empty(min(rows, _ROWS), _FEATURES + _PADDING, dtype=dtype, device=device)
    centroid_tile = torch.zeros(padded, _FEATURES + _PADDING, dtype=dtype, device=device)
    all_products = torch.empty(padded, min(rows, _BLOCK) + _PADDING, dtype=dtype, device=device)
    centroid_norms = torch.zeros(clusters, dtype=dtype, device=device)
    beyond_products = torch.zeros(padded, 1, dtype=dtype, device=device)
    beyond_norm = torch.zeros((), dtype=dtype, device=device)
    for start, stop in beyond:
        shift = center[start:stop]
        shifted = torch.sub(centroids[:, start:stop], shift, out=centroid_tile[:clusters, : stop - start])
        centroid_norms += _squared_norms(shifted)
        beyond_products[:clusters] -= shifted @ shift[:, None]
        beyond_norm += shift.dot(shift)

    labels = torch.empty(rows, dtype=torch.int64, device=device)
    squared_distance = torch.empty(rows, dtype=dtype, device=device)
    for top in range(0, rows, _BLOCK):
        bottom = min(top + _BLOCK, rows)
        products = all_products[:, : bottom - top].copy_(beyond_products.expand(-1, bottom - top))
        norms = squared_distance[top:bottom].copy_(beyond_norm.expand(bottom - top))
        for start, stop in inside:
            shift = center[start:stop]
            c = torch.sub(centroids[:, start:stop], shift, out=centroid_tile[:clusters, : stop - start])
            if top == 0:
                centroid_norms += _squared_norms(c)
            for first in range(top, bottom, _ROWS):
                last = min(first + _ROWS, bottom)
                x = torch.sub(
                    points[first:last, start:stop], shift, out=point_tile[: last - first, : stop - start]
                )
                products[:, first - top : last - top].addmm_(centroid_tile[:, : stop - start], x.t())
                norms[first - top : last - top] += _squared_norms(x)
        scores = products[:clusters].mul_(-2).add_(centroid_norms[:, None])
        nearest = scores.argmin(dim=0)
        labels[top:bottom] = nearest
        norms += scores.gather(0, nearest[None]).squeeze(0)
        norms.clamp_(min=0)
    return labels, squared_distance


def _squared_norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1).square_()


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
