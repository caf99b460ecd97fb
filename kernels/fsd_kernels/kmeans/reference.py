"""k-means as it is defined: the oracle of the tests and the baseline of the benchmarks.

    assignment   l_i = argmin_k ||x_i - c_k||^2            x [N, F], c [K, F]  ->  l [N]
    update       s_k = sum of x_i over l_i = k,  n_k = number of such i      ->  s [K, F], n [K]

The new centroid of a cluster is s_k / n_k. Float64 in gives float64 truth; narrower dtypes are computed in float32.
Points may be narrower than the centroids: their missing columns count as zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid (lowest index on ties) and squared distance to it, from all N x K distances."""
    dtype = torch.promote_types(torch.promote_types(points.dtype, centroids.dtype), torch.float32)
    missing = centroids.shape[1] - points.shape[1]
    padded = torch.nn.functional.pad(points.to(dtype), (0, missing))
    distances = torch.cdist(padded, centroids.to(dtype), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.argmin(dim=1)
    return nearest, distances.gather(1, nearest[:, None]).squeeze(1).square()


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid alone."""
    return assign(points, centroids)[0]


def update_(sums: Tensor, counts: Tensor, points: Tensor, labels: Tensor) -> None:
    """Add every point to its cluster's row of ``sums`` and to its cluster's count, one cluster at a time."""
    for cluster in range(sums.shape[0]):
        members = labels == cluster
        sums[cluster, : points.shape[1]] += points[members].to(sums.dtype).sum(dim=0)
        counts[cluster] += members.sum()
