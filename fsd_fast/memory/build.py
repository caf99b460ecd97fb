"""Clustering the teacher's features: points for k-means, progress bars, and what an interrupted build leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from fsd_fast.clustering.checkpoint import ClusteringCheckpoint
from fsd_fast.clustering.lloyd import EpochStats
from fsd_fast.clustering.stream import PointBatch
from fsd_fast.clustering.two_pass import StreamClustering, cluster_stream
from fsd_fast.distributed import Collectives
from fsd_fast.memory.features import FeatureBatch, MemoryIdentity, flatten_features

CHECKPOINT_FOLDER = ".state"
_COMPUTED = "computed_samples"


class _Bars:
    """Progress with an ETA: samples of a pass, and restarts of k-means in the sketch."""

    def __init__(self, samples: int | None, restarts: int, *, disable: bool) -> None:
        self._samples, self._restarts, self._disable = samples, restarts, disable
        self._name = "features"
        self._bar: tqdm[Any] | None = None

    def begin(self, stage: str) -> None:
        """A stage begins; the one before it is done."""
        if self._bar is not None and self._bar.total is not None:
            self._bar.update(self._bar.total - self._bar.n)
        self.close()
        self._name = stage.replace("_", " ")

    def begin_pass(self, samples: int) -> None:
        """A pass begins, or goes on after so many samples."""
        self._open(self._samples, "sample", samples)

    def add(self, samples: int) -> None:
        """So many more samples are done."""
        if self._bar is not None:
            self._bar.update(samples)

    def epoch(self, restart: int, stats: EpochStats) -> None:
        """An epoch of k-means in the sketch is done, in this restart."""
        if self._bar is None:
            self._open(self._restarts, "restart", restart)
        if self._bar is not None:
            self._bar.update(restart - self._bar.n)
            self._bar.set_postfix(epoch=stats.epoch, inertia=f"{stats.inertia:.6g}", refresh=False)
            self._bar.refresh()

    def _open(self, total: int | None, unit: str, initial: int) -> None:
        self.close()
        self._bar = tqdm(
            total=total, desc=f"memory: {self._name}", unit=unit, initial=initial, disable=self._disable
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _FeaturePoints:
    """The flattened features of batches as a stream of points that can start in the middle."""

    def __init__(
        self,
        batches: Callable[[int], Iterable[FeatureBatch]],
        identity: MemoryIdentity,
        samples: int | None,
        bars: _Bars,
        tally: Counter[str],
    ) -> None:
        self._batches, self._identity, self._samples = batches, identity, samples
        self._bars, self._tally = bars, tally

    def read_from(self, batch_number: int, offset: int) -> Iterator[PointBatch]:
        self._bars.begin_pass(offset)
        for batch in self._batches(batch_number):
            yield PointBatch(flatten_features(batch, self._identity), batch.sample_index)
            size = batch.sample_index.shape[0]
            offset += size
            self._tally[_COMPUTED] += size * batch.computed
            self._bars.add(size)
        if self._samples is not None and offset != self._samples:
            raise ValueError(f"num_samples: expected {self._samples} samples, the batches held {offset}")


@dataclass
class BuiltCentroids:
    """The clustering, its arguments, and teacher runs per sample."""

    clustering: StreamClustering
    settings: dict[str, int | str]
    teacher_passes: float


def build_centroids(
    batches: Callable[[int], Iterable[FeatureBatch]],
    identity: MemoryIdentity,
    *,
    seed: int,
    algorithm: str,
    refine: int,
    sketch_width: int,
    restarts: int,
    backend: str | None,
    progress: bool,
    num_samples: int | None,
    checkpoint_dir: str | os.PathLike[str] | None,
    layout: Mapping[str, Any] | None,
    save_every: int,
) -> BuiltCentroids:
    """Cluster the teacher's features; see ``TeacherMemory.build``, which has the same arguments."""
    settings: dict[str, int | str] = {"algorithm": algorithm}
    if algorithm == "sketch":
        settings |= {"sketch_width": sketch_width, "restarts": restarts, "refine": refine}
    collectives = Collectives()
    key = {name: value for name, value in dataclasses.asdict(identity).items() if name != "teacher"}
    key |= {"seed": seed, "torch": torch.__version__, "processes": collectives.world_size}
    key |= {**settings, **(layout or {})}
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    # An error in one process must be one in all: the others would wait for it.
    checkpoint = collectives.run_on_all_ranks(
        lambda: ClusteringCheckpoint(folder, key, save_every=save_every, rank=collectives.rank)
    )
    bars = _Bars(num_samples, restarts, disable=not progress or collectives.rank > 0)
    with contextlib.closing(bars):
        found = cluster_stream(
            _FeaturePoints(batches, identity, num_samples, bars, checkpoint.tally),
            identity.num_centroid,
            seed=seed,
            algorithm=algorithm,
            features=identity.features,
            sketch_width=sketch_width,
            restarts=restarts,
            refine=refine,
            backend=backend,
            progress=bars.begin,
            epoch_progress=bars.epoch,
            checkpoint=checkpoint,
        )
    computed = int(collectives.sum_(torch.tensor(checkpoint.tally[_COMPUTED])))
    return BuiltCentroids(found, settings, computed / found.num_samples)
