"""k-means of the sketches of all points, gathered on the first process: several restarts; the best one is kept."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fsd_fast.clustering.checkpoint import ClusteringCheckpoint
from fsd_fast.clustering.first_pass import FirstPass
from fsd_fast.clustering.lloyd import EPOCH_FIELDS, EpochStats, LloydSettings, kmeans_in_memory
from fsd_fast.clustering.seeding import new_generator, sort_centred_
from fsd_fast.distributed import Collectives
from fsd_fast.untrusted import integer, list_of, number, object_of

_STAGE = "sketch_clustering"
_FIGURES = object_of(
    {"epochs": list_of(integer(1)), "inertia": number(0), "stats": list_of(object_of(EPOCH_FIELDS))}
)


@dataclass
class SketchClustering:
    """Restarts of k-means in the sketch: each is Lloyd's algorithm from a start of its own.

    Attributes:
        labels: int64 ``[N]`` of the best restart, in the order of the sample indices of all processes.
        epochs: Epochs of each restart so far.
        inertia: In the sketch, of the best restart.
        stats: The figures of each epoch of the best restart.
    """

    labels: Tensor
    epochs: list[int] = field(default_factory=list)
    inertia: float = 0.0
    stats: list[EpochStats] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """All but the labels, as JSON values."""
        stats = [dataclasses.asdict(epoch) for epoch in self.stats]
        return {"epochs": self.epochs, "inertia": self.inertia, "stats": stats}

    def take_figures(self, figures: Mapping[str, Any], where: str) -> None:
        """Take over what ``figures`` gave.

        Raises:
            ValueError: It is something else.
        """
        _FIGURES(figures, where)
        self.epochs, self.inertia = list(figures["epochs"]), figures["inertia"]
        self.stats = [EpochStats(**epoch) for epoch in figures["stats"]]


def cluster_sketches(
    first: FirstPass,
    n_clusters: int,
    collectives: Collectives,
    *,
    seed: int,
    restarts: int,
    settings: LloydSettings,
    progress: Callable[[int, EpochStats], None] | None,
    checkpoint: ClusteringCheckpoint,
) -> tuple[Tensor, SketchClustering]:
    """Cluster all sketches on the first process; uses up those of ``first``.

    The sketches are taken in the order of their sample indices, so that the result does not depend on who has which.

    Args:
        first: What the first pass gave.
        n_clusters: K.
        collectives: The processes.
        seed: Of the first restart; each further one adds 1.
        restarts: How many.
        settings: When a restart stops.
        progress: Called with the number of the restart (from 0) and the figures of its latest epoch.
        checkpoint: Where each restart is saved, as stage "sketch_clustering".

    Returns:
        Labels int64 ``[n]`` of this process's points, and the restarts.
    """
    sample_index = collectives.gather_rows(first.sample_index)
    order = sample_index.argsort()
    sketches = collectives.gather_rows_to_first(first.sketches)
    # No view: it would keep all of them in memory.
    first.sketches = torch.empty(0)
    found = SketchClustering(torch.zeros(sample_index.shape[0], dtype=torch.int64))

    def cluster() -> None:
        nonlocal sketches
        if sketches is None:
            return
        stage = checkpoint.stage(_STAGE)
        found.labels.copy_(stage.restore("labels", found.labels))
        if stage.chunks:
            found.take_figures(stage.metadata, stage.where)
        if len(found.epochs) < restarts:
            sort_centred_(sketches, order)
            sketches = sketches.to(first.mean.device)
        for restart in range(len(found.epochs), restarts):
            stage.stop_if_requested()
            _restart_once(sketches, n_clusters, seed, restart, settings, progress, found)
            stage.metadata = found.figures()
            stage.complete = restart + 1 == restarts
            stage.save(lambda: {"labels": found.labels})

    collectives.run_on_all_ranks(cluster)
    collectives.broadcast_(found.labels)
    found.take_figures(collectives.broadcast_json(found.figures()), "the first process")
    return found.labels[torch.searchsorted(sample_index[order], first.sample_index)], found


def _restart_once(
    sketches: Tensor,
    n_clusters: int,
    seed: int,
    restart: int,
    settings: LloydSettings,
    progress: Callable[[int, EpochStats], None] | None,
    found: SketchClustering,
) -> None:
    """Run k-means from one start; ``found`` keeps the result if it is the best so far."""
    one = kmeans_in_memory(
        sketches,
        n_clusters,
        generator=new_generator(seed + restart),
        settings=settings,
        progress=None if progress is None else functools.partial(progress, restart),
    )
    if not math.isfinite(one.inertia):
        raise ValueError(f"points: expected a finite inertia of their sketches, got {one.inertia}")
    if not found.epochs or one.inertia < found.inertia:
        found.inertia, found.stats = one.inertia, one.stats
        found.labels.copy_(one.labels)
    found.epochs.append(len(one.stats))
