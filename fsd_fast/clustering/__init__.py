"""k-means for points that are too wide or too many to hold in memory."""
