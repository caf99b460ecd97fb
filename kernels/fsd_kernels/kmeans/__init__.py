"""k-means over wide points: ``assign`` and ``nearest`` find the nearest centroids, ``update`` sums the clusters."""

from fsd_kernels.kmeans.api import assign, nearest, update, update_

__all__ = ["assign", "nearest", "update", "update_"]
