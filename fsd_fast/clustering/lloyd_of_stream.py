"""Lloyd's algorithm over a stream, with exact sums per epoch and over any number of processes.

Sums are all-reduced, so the centroids do not depend on the batches or on the number of processes beyond rounding.
``fsd_fast.clustering.lloyd`` has the formulas.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from fsd_fast.clustering.checkpoint import NOT_SAVED, ClusteringCheckpoint
from fsd_fast.clustering.first_pass import FirstPass, fetch_rows, first_pass
from fsd_fast.clustering.lloyd import (
    Epoch,
    EpochStats,
    LloydResult,
    LloydRun,
    LloydSettings,
    empty_clusters,
    farthest,
    rank_candidates,
    reseed_,
)
from fsd_fast.clustering.seeding import SEEDING_WIDTH, draw_seeds, draw_sketch_seed, sort_centred_
from fsd_fast.clustering.sketch import CountSketch
from fsd_fast.clustering.stream import PointStream
from fsd_fast.distributed import Collectives
from fsd_kernels.kmeans import assign, update_


def kmeans_of_stream(
    stream: PointStream,
    n_clusters: int,
    collectives: Collectives,
    *,
    init: str | Tensor = "k-means++",
    generator: torch.Generator,
    settings: LloydSettings,
    progress: Callable[[EpochStats], None] | None = None,
) -> tuple[LloydResult, Tensor]:
    """One run of k-means on a stream.

    It takes a pass to check the points, one to fetch the start unless ``init`` is centroids, and those of
    ``lloyd_of_stream``.

    Args:
        stream: The points of this process.
        n_clusters: K.
        collectives: The processes.
        init: "k-means++", "random" or centroids ``[K, F]``.
        generator: Draws the start; the first process's decides.
        settings: When to stop.
        progress: Called with the figures of each epoch.

    Returns:
        The result, and the sample index int64 ``[n]`` of each of this process's labels.

    Raises:
        ValueError: Fewer points than clusters, or a sample index that two points share.
    """
    # Only generators that are seeded alike agree on it already.
    seed = int(collectives.broadcast_(torch.tensor([draw_sketch_seed(generator)])))
    first = first_pass(
        stream, lambda features: CountSketch(features, SEEDING_WIDTH, seed), n_clusters, collectives
    )
    device = first.mean.device
    if isinstance(init, Tensor):
        centroids = init.to(device, torch.float32)
    else:
        wanted = _draw_start(first, n_clusters, init, generator, collectives)
        like = torch.empty(0, first.mean.shape[0], device=device)
        centroids = fetch_rows(stream, wanted, first.sample_index, like, collectives)
    result = lloyd_of_stream(stream, centroids, first.sample_index, collectives, settings, progress=progress)
    return result, first.sample_index


def _draw_start(
    first: FirstPass, n_clusters: int, init: str, generator: torch.Generator, collectives: Collectives
) -> Tensor:
    """Sample indices of the points to start from, drawn on the first process; uses up the sketches."""
    wanted = torch.empty(n_clusters, dtype=torch.int64)
    sample_index = collectives.gather_rows_to_first(first.sample_index)
    sketches = collectives.gather_rows_to_first(first.sketches)
    if sample_index is not None and sketches is not None:
        order = sample_index.argsort()
        sort_centred_(sketches, order)
        wanted = sample_index[order][draw_seeds(sketches, n_clusters, init, generator)]
    return collectives.broadcast_(wanted)


def lloyd_of_stream(
    stream: PointStream,
    centroids: Tensor,
    sample_index: Tensor,
    collectives: Collectives,
    settings: LloydSettings,
    *,
    progress: Callable[[EpochStats], None] | None = None,
    checkpoint: ClusteringCheckpoint = NOT_SAVED,
) -> LloydResult:
    """Alternate assignment and update until the centroids stay where they are.

    Each epoch is a pass over the points. One that finds empty clusters takes a second pass, which fetches the farthest
    points.

    Args:
        stream: The points of this process.
        centroids: Where to start, ``[K, F]`` float32.
        sample_index: Of this process's points, int64 ``[n]``.
        collectives: The processes.
        settings: When to stop.
        progress: Called with the figures of each epoch.
        checkpoint: Where the passes are saved, as stages "refine_1", "refine_1_far" and so on.

    Returns:
        Labels, counts and inertia are those of the centroids returned: unless these stayed where they were, the
        points are read once more for them.
    """
    run = LloydRun(settings, progress)
    for number in range(1, settings.max_iter + 1):
        started = time.perf_counter()
        stage = f"refine_{number}"
        epoch = _epoch(stream, centroids, collectives, settings, checkpoint, stage, accumulate=True)
        empty = empty_clusters(epoch)
        reseeded = 0
        if empty:
            candidates = collectives.gather_rows(farthest(epoch, sample_index, len(empty)))
            wanted, donors = rank_candidates(candidates, len(empty))
            points = fetch_rows(
                stream, wanted, sample_index, centroids, collectives, checkpoint, f"{stage}_far"
            )
            reseeded = reseed_(epoch, centroids, empty, points, donors)
        centroids = run.update(epoch, centroids, len(empty), reseeded, started)
        if run.should_stop():
            break
    if not run.settled:
        epoch = _epoch(
            stream, centroids, collectives, settings, checkpoint, "refine_labels", accumulate=False
        )
    return LloydResult(centroids, epoch.counts, epoch.labels, epoch.inertia, run.stats)


def _epoch(
    stream: PointStream,
    centroids: Tensor,
    collectives: Collectives,
    settings: LloydSettings,
    checkpoint: ClusteringCheckpoint,
    stage_name: str,
    *,
    accumulate: bool,
) -> Epoch:
    """One pass over the points of all processes; without ``accumulate`` the sums have no columns."""
    clusters, width = centroids.shape
    backend = settings.backend

    def read() -> Epoch:
        stage = checkpoint.stage(stage_name)
        sums = centroids.new_zeros(clusters, width if accumulate else 0, dtype=torch.float64)
        sums = stage.restore("sums", sums)
        counts = torch.zeros(clusters, dtype=torch.int64, device=centroids.device)
        counts = stage.restore("counts", counts)
        labels = [stage.restore_rows("labels", torch.int64)]
        distances = [stage.restore_rows("distances", torch.float32, torch.float64)]

        def tensors() -> dict[str, Tensor]:
            rows = {"labels": torch.cat(labels), "distances": torch.cat(distances)}
            return {"sums": sums, "counts": counts, **rows}

        for batch in stage.unread(stream):
            points = batch.points.to(centroids.device)
            nearest, squared = assign(points, centroids, backend=backend)
            update_(sums, counts, points if accumulate else points[:, :0], nearest, backend=backend)
            labels.append(nearest.cpu())
            distances.append(squared.cpu())
            stage.batch_done(batch, tensors)
        stage.finish(tensors)
        return Epoch(sums, counts, torch.cat(labels), torch.cat(distances), 0.0)

    epoch = collectives.run_on_all_ranks(read)
    collectives.sum_(epoch.sums)
    collectives.sum_(epoch.counts)
    epoch.inertia = float(collectives.sum_(epoch.distances.sum(dtype=torch.float64)))
    return epoch
