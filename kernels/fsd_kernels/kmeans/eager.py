"""k-means in blocks of torch operations: no temporary of the points' size, and no cancellation.

With o an origin that points and centroids are shifted to,

    ||x - c_k||^2 = ||x - o||^2 + ||c_k - o||^2 - 2 <x - o, c_k - o>,

where ||x - o||^2 does not affect the argmin. An offset that all points share (the outlier dimensions of BERT) would
take up the digits that tell the centroids apart. Then o is the medoid of the centroids, and points and centroids are
copied and shifted tile by tile before they are multiplied. If the medoid is about as near to zero as to the other
centroids, little would be gained: o = 0, and points and centroids are multiplied in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# o = 0 if the medoid's squared norm is at most this many times the median of its squared distances to the other
# centroids. Rounding grows by about this factor.
_OFFSET = 2.5
# Points of a block, for which the centroids are shifted once.
_BLOCK = 4096
# (points of a batch, points of a product, features of a slice); threads share the products of a batch. In place, long
# slices are read faster. Copied points [512, 2032] in float32 take 4 MB, which caches hold.
_IN_PLACE = (4096, 512, 49152)
_COPIED = (512, 256, 2032)
# Keeps leading dimensions off powers of two, which collide in caches.
_PADDING = 16
# Numbers that are converted to the accumulators' dtype at a time.
_CONVERTED = 1 << 20


def assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid (lowest index on ties) and squared distance to it; memory O(N + K + F + tiles)."""
    return _assign(points, centroids, True)


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid alone, which saves reading the points again for their norms."""
    return _assign(points, centroids, False)[0]


def _assign(points: Tensor, centroids: Tensor, distances: bool) -> tuple[Tensor, Tensor]:
    """Labels and squared distances; without ``distances`` the second has no elements."""
    rows, width = points.shape
    clusters = len(centroids)
    dtype = torch.promote_types(torch.promote_types(points.dtype, centroids.dtype), torch.float32)
    origin, is_near_zero = _medoid(centroids.to(dtype))
    adjacent = all(each.dtype == dtype and each.stride(1) == 1 for each in (points, centroids))
    copied = not (adjacent and is_near_zero)
    batch_rows, product_rows, length = _COPIED if copied else _IN_PLACE
    # Slices end at the width of the points. Beyond it points count as zero, without a shift.
    slices = [(start, min(start + length, width)) for start in range(0, width, length)]
    sizes = (min(rows, batch_rows), clusters) if copied else (0, 0)
    point_tile, centroid_tile = (origin.new_empty(size, min(length, width) + _PADDING) for size in sizes)

    def shifted(values: Tensor, start: int, tile: Tensor) -> Tensor:
        height, span = values.shape
        shift = origin[start : start + span]
        return torch.sub(values, shift, out=tile[:height, :span]) if copied else values

    norms = _squared_norms(centroids[:, width:].to(dtype))
    products = origin.new_empty(clusters * min(rows, _BLOCK))
    labels = torch.empty(rows, dtype=torch.int64, device=points.device)
    squared_distance = origin.new_zeros(rows if distances else 0)
    for top in range(0, rows, _BLOCK):
        batches = list(_batches(top, min(top + _BLOCK, rows), batch_rows, product_rows))
        outputs = [
            products[clusters * (first - top) : clusters * (last - top)].view(-1, clusters, each).zero_()
            for first, last, each in batches
        ]
        for start, stop in slices:
            c = shifted(centroids[:, start:stop], start, centroid_tile)
            if top == 0:
                norms += _squared_norms(c)
            for (first, last, each), out in zip(batches, outputs, strict=True):
                x = shifted(points[first:last, start:stop], start, point_tile)
                if distances:
                    squared_distance[first:last] += _squared_norms(x)
                out.baddbmm_(c.expand(len(out), -1, -1), x.unflatten(0, (-1, each)).mT)
        for (first, last, _), out in zip(batches, outputs, strict=True):
            scores = out.mul_(-2).add_(norms[:, None])
            lowest = scores.argmin(dim=1, keepdim=True)
            labels[first:last] = lowest.flatten()
            if distances:
                squared_distance[first:last] += scores.gather(1, lowest).flatten()
    return labels, squared_distance.clamp_(min=0)


def _medoid(centroids: Tensor) -> tuple[Tensor, bool]:
    """Return the centroid nearest to their mean, and True if it is near zero by ``_OFFSET``.

    A single centroid far away would move the mean of the centroids or of the distances, but not medoid and median.
    """
    norms = _squared_norms(centroids)
    nearest = (norms - 2 * (centroids @ centroids.mean(dim=0))).argmin()
    origin = centroids[nearest]
    apart = norms - 2 * (centroids @ origin) + norms[nearest]
    return origin, bool(norms[nearest] <= _OFFSET * apart.sort().values[len(apart) // 2])


def _batches(top: int, bottom: int, batch_rows: int, product_rows: int) -> Iterator[tuple[int, int, int]]:
    """Cut rows into batches (first, last, rows of a product); rows that fill no product are a batch of their own."""
    for first in range(top, bottom, batch_rows):
        last = min(first + batch_rows, bottom)
        whole = last - (last - first) % product_rows
        if whole > first:
            yield first, whole, product_rows
        if last > whole:
            yield whole, last, last - whole


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
    """Add the points one after another; on the CPU ``index_add_`` keeps their order."""
    if points.dtype == sums.dtype:
        sums.index_add_(0, labels, points)
        return
    block = max(1, _CONVERTED // max(1, points.shape[1]))
    for top in range(0, points.shape[0], block):
        sums.index_add_(0, labels[top : top + block], points[top : top + block].to(sums.dtype))


def _add_products(sums: Tensor, points: Tensor, labels: Tensor) -> None:
    """Add one-hot(labels)^T x per feature slice; ``index_add_`` on a GPU uses atomics, in no fixed order."""
    one_hot = torch.arange(sums.shape[0], device=points.device)[:, None] == labels[None]
    one_hot = one_hot.to(sums.dtype)
    step = max(1, _CONVERTED // max(1, points.shape[0]))
    for start in range(0, points.shape[1], step):
        stop = min(start + step, points.shape[1])
        sums[:, start:stop] += one_hot @ points[:, start:stop].to(sums.dtype)
