"""k-means in blocks of torch operations: no temporary of the size of the points, and no cancellation.

With o an origin that points and centroids are shifted to,

    ||x - c_k||^2 = ||x - o||^2 + ||c_k - o||^2 - 2 <x - o, c_k - o>,

and ||x - o||^2 plays no part in the argmin. An offset that all features share (the outlier dimensions of BERT)
takes the digits that tell the centroids apart: then o is the centroid in the midst of the others, and points and
centroids are copied and shifted tile by tile before they are multiplied. Where that centroid is about as near to
zero as to the others there is little to lose, and they are multiplied where they lie, o = 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Largest squared norm of the centroid in the midst, against the median of its squared distances to the others, at
# which o = 0. Rounding grows with it: it is about this many times what it would be.
_OFFSET = 2.5
# Centroids are shifted once for a block of points. Points are multiplied in batches of products, which the threads
# share: (points of a batch, points of a product, features of a slice). Where they lie, long slices are read faster;
# copied points [512, 2032] in float32 take 4 MB, which caches hold.
_BLOCK = 4096
_IN_PLACE = (4096, 512, 49152)
_COPIED = (512, 256, 2032)
# Keeps leading dimensions off powers of two, which collide in caches.
_PADDING = 16
# A point is widened to the accumulators' dtype in blocks of this many numbers.
_WIDENED = 1 << 20


def assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid (lowest index on ties) and squared distance to it; memory O(N + K + F + tiles)."""
    return _assign(points, centroids, True)


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid alone: the points' own norms, another read of them, are not needed."""
    return _assign(points, centroids, False)[0]


def _assign(points: Tensor, centroids: Tensor, distances: bool) -> tuple[Tensor, Tensor]:
    """Labels, and squared distances or nothing."""
    rows, width = points.shape
    clusters = len(centroids)
    dtype = torch.promote_types(torch.promote_types(points.dtype, centroids.dtype), torch.float32)
    origin, is_near_zero = _midst(centroids.to(dtype))
    as_they_lie = all(each.dtype == dtype and each.stride(1) == 1 for each in (points, centroids))
    copied = not (as_they_lie and is_near_zero)
    together, alone, length = _COPIED if copied else _IN_PLACE
    # Slices never straddle the width of the points: beyond it they are zero, and so is the origin.
    slices = [(start, min(start + length, width)) for start in range(0, width, length)]
    sizes = (min(rows, together), clusters) if copied else (0, 0)
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
        batches = list(_batches(top, min(top + _BLOCK, rows), together, alone))
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


def _midst(centroids: Tensor) -> tuple[Tensor, bool]:
    """The centroid that is nearest to their mean, and whether it is near zero as ``_OFFSET`` says.

    Not the mean itself, nor a mean of the distances: one centroid that is far away would move both.
    """
    norms = _squared_norms(centroids)
    nearest = (norms - 2 * (centroids @ centroids.mean(dim=0))).argmin()
    origin = centroids[nearest]
    apart = norms - 2 * (centroids @ origin) + norms[nearest]
    return origin, bool(norms[nearest] <= _OFFSET * apart.sort().values[len(apart) // 2])


def _batches(top: int, bottom: int, together: int, alone: int) -> Iterator[tuple[int, int, int]]:
    """Cut rows into batches (first, last, rows of a product), the rest being a batch of one product."""
    for first in range(top, bottom, together):
        last = min(first + together, bottom)
        whole = last - (last - first) % alone
        if whole > first:
            yield first, whole, alone
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
