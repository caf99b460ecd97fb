"""k-means for points that are too wide or too many to hold in memory.

What the memory command calls, from the top:

    two_pass            cluster_stream: sketch the points, cluster the sketches, average the points of each cluster
    first_pass          pass 1: check the points, index them, sketch each
    sketch_clustering   k-means of the sketches on the first process, several restarts
    lloyd_of_stream     exact epochs over the stream, for ``refine`` and ``algorithm="lloyd"``
    checkpoint          what is computed so far, on disk

and what these are made of:

    lloyd               Lloyd's algorithm in memory, and what it shares with the one over a stream
    seeding             k-means++
    sketch              CountSketch, the random image that keeps squared distances
    stream              PointStream: batches of points, checked as they are read

Two estimators with scikit-learn's interface stand on the same parts: ``stream_kmeans.StreamKMeans`` (exact) and
``mini_batch_kmeans.MiniBatchKMeans`` (the same with ``partial_fit``).
"""
