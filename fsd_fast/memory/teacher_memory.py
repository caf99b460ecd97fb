"""Memories of the global inter-feature structure: K centroids of flattened features, M ``[K, S*D]``.

    teacher memory   k-means centroids of the teacher's features over the training set, built once
    student memory   a trainable matrix, random at first; not part of the student that is deployed

(Paper, section on the global inter-feature structure.) A teacher memory on disk is ``memory.safetensors``
(the centroids) and ``memory.json`` (whose features they are, and how they were made). The JSON is written
last and holds the sha256 of the other file, so a half-written pair is never loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor
from tqdm.auto import tqdm

from fsd_fast.clustering.checkpoint import ClusteringState
from fsd_fast.clustering.lloyd import IterationStats
from fsd_fast.clustering.two_pass import StreamClustering, cluster_stream
from fsd_fast.distributed import Collectives
from fsd_fast.files import write_atomically
from fsd_fast.memory.features import FeatureBatch, MemoryIdentity, flatten_features

CENTROIDS_FILE = "memory.safetensors"
METADATA_FILE = "memory.json"
STATE_FOLDER = ".state"
_FORMAT = 1
_COMPUTED = "computed_samples"


class _Bars:
    """Progress with an ETA: samples of a reading, and restarts of k-means in the sketch."""

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

    def reading(self, samples: int) -> None:
        """A reading begins, or goes on after so many samples."""
        self._open(self._samples, "sample", samples)

    def samples(self, number: int) -> None:
        if self._bar is not None:
            self._bar.update(number)

    def epoch(self, restart: int, stats: IterationStats) -> None:
        """An epoch of k-means in the sketch is done, in the restart of that number."""
        if self._bar is None:
            self._open(self._restarts, "restart", restart)
        if self._bar is not None:
            self._bar.update(restart - self._bar.n)
            self._bar.set_postfix(epoch=stats.iteration, inertia=f"{stats.inertia:.6g}", refresh=False)
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


class _Points:
    """The flattened features of batches as a stream that can start in the middle."""

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

    def read_from(self, batches: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._bars.reading(rows)
        for batch in self._batches(batches):
            yield flatten_features(batch, self._identity), batch.index
            size = batch.index.shape[0]
            rows += size
            self._tally[_COMPUTED] += size * batch.computed
            self._bars.samples(size)
        if self._samples is not None and rows != self._samples:
            raise ValueError(f"num_samples: expected {self._samples} samples, the batches held {rows}")


@dataclass
class TeacherMemory:
    """The teacher's centroids and where they come from.

    Attributes:
        centroids: ``[K, S*D]`` float32.
        identity: Whose features they are the centroids of.
        seed: Of the clustering.
        num_samples: N.
        inertia: Sum of squared distances of the N samples to their centroids.
        cluster_sizes: K numbers that add up to N.
        empty_clusters: How often an epoch found a cluster empty, which was then reseeded.
        iteration_stats: The figures of each epoch: of the restart that was kept (stage "sketch", inertia in the
            sketch), then of the exact ones (stage "refine").
        settings: The arguments of the clustering.
        teacher_passes: Samples that the teacher was run on / N: 2, or 1 with a new feature cache, 0 with a whole one.
            What a killed build had not yet saved is not counted.
        seconds: Wall-clock time of each stage, earlier runs of a continued build included.
        versions: Of the libraries that made it.
    """

    centroids: Tensor
    identity: MemoryIdentity
    seed: int
    num_samples: int
    inertia: float
    cluster_sizes: list[int]
    empty_clusters: int
    iteration_stats: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, int | str] = field(default_factory=dict)
    teacher_passes: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        batches: Callable[[int], Iterable[FeatureBatch]],
        identity: MemoryIdentity,
        *,
        seed: int,
        algorithm: str = "sketch",
        refine: int = 0,
        sketch_width: int = 2048,
        restarts: int = 4,
        backend: str | None = None,
        progress: bool = True,
        num_samples: int | None = None,
        state_dir: str | os.PathLike[str] | None = None,
        layout: Mapping[str, Any] | None = None,
        save_every: int = 200,
    ) -> TeacherMemory:
        """Cluster the teacher's features, read twice, and ``refine`` + 1 times more if that is not 0.

        Under ``torch.distributed`` each process passes the batches of its own samples, and all get the same
        memory.

        Args:
            batches: Starts a reading at the batch of the number given: the same samples in the same order
                every time.
            identity: Whose features these are; gives S, D, K and the padding policy.
            seed: Of the sketch and of k-means.
            algorithm: "sketch", or "lloyd": exact k-means from one start, with a reading per epoch. Nothing of it is
                saved in ``state_dir``.
            refine: Epochs of exact Lloyd after the two passes.
            sketch_width: Length of the random image in which k-means runs.
            restarts: Runs of k-means there; the best one is kept.
            backend: Of the k-means kernels, see ``fsd_kernels``.
            progress: Show progress bars (on the first process).
            num_samples: Samples of this process: the length of the progress bar, and checked if given.
            state_dir: Where the build is saved as it goes: one that was killed, started again with the same
                arguments, continues there and gives the same memory bit for bit. None: nowhere. It is not
                removed, see ``discard_state``.
            layout: Whatever else the numbers depend on (JSON values): which samples this process has, in which
                batches. A state with another layout is refused.
            save_every: Batches between two savings.

        Raises:
            ValueError: Fewer samples than centroids; a NaN or infinite feature (the sample is named);
                features that do not fit ``identity``; a sample that occurs twice; readings that differ; a
                state of another build; an unknown algorithm, or ``refine`` with "lloyd".
        """
        settings: dict[str, int | str] = {"algorithm": algorithm}
        if algorithm == "sketch":
            settings |= {"sketch_width": sketch_width, "restarts": restarts, "refine": refine}
        collectives = Collectives()
        key = {name: value for name, value in dataclasses.asdict(identity).items() if name != "teacher"}
        key |= {"seed": seed, "torch": torch.__version__, "processes": collectives.world_size}
        key |= {**settings, **(layout or {})}
        folder = None if state_dir is None else Path(state_dir)
        # An error in one process must be one in all: the others would wait for it.
        state = collectives.agree(
            lambda: ClusteringState(folder, key, save_every=save_every, rank=collectives.rank)
        )
        bars = _Bars(num_samples, restarts, disable=not progress or collectives.rank > 0)
        with contextlib.closing(bars):
            found = cluster_stream(
                _Points(batches, identity, num_samples, bars, state.tally),
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
                state=state,
            )
        computed = int(collectives.sum_(torch.tensor(state.tally[_COMPUTED])))
        return cls._from_clustering(found, identity, seed, settings, computed / found.num_samples)

    @classmethod
    def _from_clustering(
        cls,
        found: StreamClustering,
        identity: MemoryIdentity,
        seed: int,
        settings: dict[str, int | str],
        teacher_passes: float,
    ) -> TeacherMemory:
        stages = (("sketch", found.sketch_stats), ("refine", found.refine_stats))
        epochs = [{"stage": name, **dataclasses.asdict(epoch)} for name, stats in stages for epoch in stats]
        return cls(
            centroids=found.centroids.cpu(),
            identity=identity,
            seed=seed,
            num_samples=found.num_samples,
            inertia=found.inertia,
            cluster_sizes=found.counts.tolist(),
            empty_clusters=sum(epoch["empty_clusters"] for epoch in epochs),
            iteration_stats=epochs,
            settings=settings,
            teacher_passes=teacher_passes,
            seconds={name: round(value, 3) for name, value in found.seconds.items()},
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "safetensors": safetensors.__version__,
            },
        )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write ``memory.safetensors``, then ``memory.json``, each under its name only when it is complete.

        Raises:
            OSError: The folder cannot be written; what it held before is left as it was or is refused by
                ``from_pretrained``.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        values = save_safetensors({"centroids": self.centroids.contiguous()})
        metadata: dict[str, Any] = {"format": _FORMAT, "sha256": hashlib.sha256(values).hexdigest()}
        metadata |= {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name != "centroids"
        }
        metadata["identity"] = dataclasses.asdict(self.identity)
        write_atomically(folder / CENTROIDS_FILE, values)
        write_atomically(folder / METADATA_FILE, json.dumps(metadata, indent=2).encode() + b"\n")

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], expected: MemoryIdentity | None = None
    ) -> TeacherMemory:
        """Read a memory and check it.

        Args:
            directory: Where ``save_pretrained`` wrote it.
            expected: What the run needs; None: any.

        Raises:
            FileNotFoundError: One of the two files is missing.
            ValueError: The files are damaged or do not belong together, or the memory was built for another
                run: every field that differs is listed with both values.
        """
        folder = Path(directory)
        for name in (CENTROIDS_FILE, METADATA_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name}: not found; a memory is {CENTROIDS_FILE} and {METADATA_FILE}"
                )
        metadata, identity = _read_metadata(folder / METADATA_FILE)
        if expected is not None:
            identity.check(expected, str(folder))
        values = (folder / CENTROIDS_FILE).read_bytes()
        if hashlib.sha256(values).hexdigest() != metadata["sha256"]:
            raise ValueError(
                f"{folder / CENTROIDS_FILE}: its sha256 is not the one in {METADATA_FILE}: the file is damaged, or "
                f"writing the memory was interrupted"
            )
        centroids = load_safetensors(values).get("centroids")
        shape = [identity.num_centroid, identity.features]
        if centroids is None or list(centroids.shape) != shape or centroids.dtype != torch.float32:
            found = "nothing" if centroids is None else f"{centroids.dtype} {list(centroids.shape)}"
            raise ValueError(f"{folder / CENTROIDS_FILE}: expected centroids float32 {shape}, got {found}")
        if not bool(centroids.isfinite().all()):
            raise ValueError(f"{folder / CENTROIDS_FILE}: centroids hold NaN or infinite numbers")
        fields = {
            item.name: metadata[item.name]
            for item in dataclasses.fields(cls)
            if item.name not in ("centroids", "identity")
        }
        return cls(centroids=centroids, identity=identity, **fields)


def _read_metadata(path: Path) -> tuple[dict[str, Any], MemoryIdentity]:
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise ValueError(f"{path}: expected a memory of format {_FORMAT}")
    needed = {item.name for item in dataclasses.fields(TeacherMemory)} - {"centroids"} | {"sha256"}
    missing = needed - metadata.keys()
    if missing:
        raise ValueError(f"{path}: fields are missing: {', '.join(sorted(missing))}")
    try:
        identity = MemoryIdentity(**metadata["identity"])
    except TypeError as error:
        raise ValueError(f"{path}: the field 'identity' is not one of a memory ({error})") from error
    sizes = metadata["cluster_sizes"]
    if len(sizes) != identity.num_centroid or sum(sizes) != metadata["num_samples"]:
        raise ValueError(
            f"{path}: expected {identity.num_centroid} cluster sizes that add up to {metadata['num_samples']}, "
            f"got {len(sizes)} that add up to {sum(sizes)}"
        )
    if not math.isfinite(metadata["inertia"]):
        raise ValueError(f"{path}: inertia is {metadata['inertia']}, expected a finite number")
    return metadata, identity
