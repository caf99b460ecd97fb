"""The teacher's memory: K centroids of its flattened features over the training set, M ``[K, S*D]``, built once.

(Paper, section on the global inter-feature structure.) A teacher memory on disk is ``memory.safetensors`` (the
centroids, and the cluster of each sample) and ``memory.json`` (whose features they are, and how they were made). The
JSON is written last and holds the sha256 of the other file and of its own fields, so a half-written or damaged pair is
never loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fsd_fast.clustering.checkpoint import SAVE_EVERY
from fsd_fast.clustering.lloyd import EPOCH_FIELDS
from fsd_fast.clustering.two_pass import RESTARTS, SKETCH_WIDTH
from fsd_fast.distributed import Collectives
from fsd_fast.files import remove_stale_temporaries, write_atomically
from fsd_fast.memory.build import BuiltCentroids, build_centroids
from fsd_fast.memory.features import FeatureBatch, MemoryIdentity
from fsd_fast.untrusted import (
    CHECKSUM,
    SHA256,
    TEXT,
    TEXT_OR_INTEGER,
    check_seal,
    integer,
    list_of,
    load_tensors,
    map_of,
    number,
    object_of,
    read_json_object,
    seal,
    shorten,
)

CENTROIDS_FILE = "memory.safetensors"
METADATA_FILE = "memory.json"
_FORMAT = 3
# A safetensors header of three tensors is shorter.
_HEADER_BYTES = 1 << 20
_TENSORS = ("centroids", "labels", "sample_index")
_IDENTITY = {
    "task_name": TEXT,
    "teacher": TEXT,
    "teacher_fingerprint": TEXT,
    "layer": integer(0),
    "max_seq_length": integer(1),
    "hidden_size": integer(1),
    "num_centroid": integer(1),
    "pad_features": TEXT,
}
_METADATA = object_of(
    {
        "format": integer(),
        "sha256": SHA256,
        "identity": object_of(_IDENTITY),
        "seed": integer(),
        "num_samples": integer(1),
        "tokens": TEXT,
        "inertia": number(0),
        "cluster_sizes": list_of(integer(0)),
        "empty_clusters": integer(0),
        "epoch_stats": list_of(object_of({"stage": TEXT, **EPOCH_FIELDS})),
        "settings": map_of(TEXT_OR_INTEGER),
        "teacher_passes": number(0),
        "seconds": map_of(number(0)),
        "versions": map_of(TEXT),
        CHECKSUM: SHA256,
    }
)


@dataclass
class TeacherMemory:
    """The teacher's centroids and where they come from.

    Attributes:
        centroids: ``[K, S*D]`` float32.
        labels: int64 ``[N]``: the cluster of each sample, by rising sample index.
        sample_index: int64 ``[N]``: the samples' places in the training set, rising.
        identity: Whose features they are the centroids of.
        seed: Of the clustering.
        num_samples: N.
        tokens: sha256 of the training set's tokens, see ``tokens_digest``; empty where it was not given.
        inertia: Sum of squared distances of the N samples to their centroids.
        cluster_sizes: K numbers that add up to N.
        empty_clusters: How often an epoch found a cluster empty, which was then reseeded.
        epoch_stats: The figures of each epoch: of the restart that was kept (stage "sketch", inertia in the
            sketch), then of the exact ones (stage "exact").
        settings: The arguments of the clustering.
        teacher_passes: Samples that the teacher was run on / N. Without a teacher cache these are all passes of
            ``build``, 2 by default; with a new cache 1, with a whole one 0. What a killed build had not yet saved is
            not counted.
        seconds: Wall-clock time of each stage, earlier runs of a continued build included.
        versions: Of the libraries that made it.
    """

    centroids: Tensor
    labels: Tensor
    sample_index: Tensor
    identity: MemoryIdentity
    seed: int
    num_samples: int
    tokens: str
    inertia: float
    cluster_sizes: list[int]
    empty_clusters: int
    epoch_stats: list[dict[str, Any]] = field(default_factory=list)
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
        sketch_width: int = SKETCH_WIDTH,
        restarts: int = RESTARTS,
        backend: str | None = None,
        progress: bool = True,
        num_samples: int | None = None,
        tokens: str = "",
        checkpoint_dir: str | os.PathLike[str] | None = None,
        layout: Mapping[str, Any] | None = None,
        save_every: int = SAVE_EVERY,
    ) -> TeacherMemory:
        """Cluster the teacher's features in two passes; ``refine`` and "lloyd" take more.

        With ``refine`` each epoch is one more pass, and so are the labels at the end, unless the last epoch left the
        centroids where they were: 4 passes in all for one epoch, 5 for two. "lloyd" takes two passes for the start, one
        per epoch, and one for the labels as above. In both, an epoch that finds empty clusters takes one more.

        Under ``torch.distributed`` each process passes its own samples, and all get the same memory.

        Args:
            batches: Starts a pass at the batch of this number: the same samples in the same order every time.
            identity: Whose features these are; gives S, D, K and the padding policy.
            seed: Of the sketch and of k-means.
            algorithm: "sketch", or "lloyd": exact k-means, nothing saved in ``checkpoint_dir``.
            refine: Epochs of exact Lloyd after the two passes, at most.
            sketch_width: Length of the random image in which k-means runs.
            restarts: Of k-means there; the best one is kept.
            backend: Of the k-means kernels, see ``fsd_kernels``. A build goes on with the same ones alone.
            progress: Show progress bars (on the first process).
            num_samples: Samples of this process: the length of the progress bar, and checked if given.
            tokens: ``tokens_digest`` of the training set, kept with the memory.
            checkpoint_dir: Where the build is saved as it goes: one that was killed, started again with the same
                arguments, continues there and gives the same memory bit for bit. None: nowhere. It is not
                removed, see ``fsd_fast.clustering.checkpoint.discard_checkpoint``.
            layout: Whatever else the numbers depend on (JSON values): which samples this process has, in which
                batches. A checkpoint with another layout is refused.
            save_every: Batches between two savings.

        Raises:
            ValueError: Fewer samples than centroids; a NaN or infinite feature (the sample is named);
                features that do not fit ``identity``; a sample that occurs twice; passes that differ; a
                checkpoint of another build; an unknown algorithm, or ``refine`` below 0 or with "lloyd".
        """
        built = build_centroids(
            batches,
            identity,
            seed=seed,
            algorithm=algorithm,
            refine=refine,
            sketch_width=sketch_width,
            restarts=restarts,
            backend=backend,
            progress=progress,
            num_samples=num_samples,
            checkpoint_dir=checkpoint_dir,
            layout=layout,
            save_every=save_every,
        )
        return cls._from_clustering(built, identity, seed, tokens)

    @classmethod
    def _from_clustering(
        cls, built: BuiltCentroids, identity: MemoryIdentity, seed: int, tokens: str
    ) -> TeacherMemory:
        found = built.clustering
        collectives = Collectives()
        sample_index, order = collectives.gather_rows(found.sample_index).sort()
        labels = collectives.gather_rows(found.labels)[order]
        stages = (("sketch", found.sketch_stats), ("exact", found.exact_stats))
        epochs = [{"stage": name, **dataclasses.asdict(epoch)} for name, stats in stages for epoch in stats]
        return cls(
            centroids=found.centroids.cpu(),
            labels=labels.cpu(),
            sample_index=sample_index.cpu(),
            identity=identity,
            seed=seed,
            num_samples=found.num_samples,
            tokens=tokens,
            inertia=found.inertia,
            cluster_sizes=found.counts.tolist(),
            empty_clusters=sum(epoch["empty_clusters"] for epoch in epochs),
            epoch_stats=epochs,
            settings=built.settings,
            teacher_passes=built.teacher_passes,
            seconds={name: round(value, 3) for name, value in found.seconds.items()},
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "safetensors": safetensors.__version__,
            },
        )

    def labels_of(self, sample_index: Tensor) -> Tensor:
        """The clusters int64 ``[b]`` of samples, by their places in the training set, int64 ``[b]``.

        Raises:
            ValueError: One of them was not there when the memory was built.
        """
        rows = torch.searchsorted(self.sample_index, sample_index).clamp(max=self.num_samples - 1)
        unknown = self.sample_index[rows] != sample_index
        if bool(unknown.any()):
            sample = int(sample_index[unknown][0])
            raise ValueError(f"teacher_memory: training sample {sample} was not among those it was built on")
        return self.labels[rows]

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write ``memory.safetensors``, then ``memory.json``, each under its name only when it is complete.

        Raises:
            OSError: The folder cannot be written; what it held before is left as it was or is refused by
                ``from_pretrained``.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(folder)
        values = save_safetensors({name: getattr(self, name).contiguous() for name in _TENSORS})
        metadata: dict[str, Any] = {"format": _FORMAT, "sha256": hashlib.sha256(values).hexdigest()}
        metadata |= {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name not in _TENSORS
        }
        metadata["identity"] = dataclasses.asdict(self.identity)
        write_atomically(folder / CENTROIDS_FILE, values)
        write_atomically(folder / METADATA_FILE, json.dumps(seal(metadata), indent=2).encode() + b"\n")

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
        tensors: dict[str, Any] = {**_read_tensors(folder / CENTROIDS_FILE, metadata, identity)}
        fields = {
            item.name: metadata[item.name]
            for item in dataclasses.fields(cls)
            if item.name not in (*_TENSORS, "identity")
        }
        return cls(**tensors, identity=identity, **fields)


def _read_metadata(path: Path) -> tuple[dict[str, Any], MemoryIdentity]:
    metadata = read_json_object(path)
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: expected a memory of format {_FORMAT}, got {shorten(metadata.get('format'))}; build it again"
        )
    _METADATA(metadata, str(path))
    try:
        identity = MemoryIdentity(**metadata["identity"])
    except ValueError as error:
        raise ValueError(f"{path}: identity: {error}") from None
    sizes = metadata["cluster_sizes"]
    if len(sizes) != identity.num_centroid or sum(sizes) != metadata["num_samples"]:
        raise ValueError(
            f"{path}: expected {identity.num_centroid} cluster sizes that add up to {metadata['num_samples']}, "
            f"got {len(sizes)} that add up to {sum(sizes)}"
        )
    check_seal(metadata, path)
    return metadata, identity


def _read_tensors(path: Path, metadata: dict[str, Any], identity: MemoryIdentity) -> dict[str, Tensor]:
    samples = metadata["num_samples"]
    # Room for float64, so that a wrong dtype is called one.
    maximum = 8 * identity.num_centroid * identity.features + 16 * samples + _HEADER_BYTES
    size = path.stat().st_size
    if size > maximum:
        raise ValueError(
            f"{path}: {size:,} bytes are more than {identity.num_centroid} centroids of {identity.features} numbers "
            f"and {samples} labels take"
        )
    values = path.read_bytes()
    if hashlib.sha256(values).hexdigest() != metadata["sha256"]:
        raise ValueError(
            f"{path}: its sha256 is not the one in {METADATA_FILE}: the file is damaged, or writing the memory was "
            f"interrupted"
        )
    tensors = load_tensors(values, path)
    for name, dtype, shape in (
        ("centroids", torch.float32, [identity.num_centroid, identity.features]),
        ("labels", torch.int64, [samples]),
        ("sample_index", torch.int64, [samples]),
    ):
        tensor = tensors.get(name)
        if tensor is None or list(tensor.shape) != shape or tensor.dtype != dtype:
            found = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            wanted = str(dtype).removeprefix("torch.")
            raise ValueError(f"{path}: expected {name} {wanted} {shape}, got {found}")
    if not bool(tensors["centroids"].isfinite().all()):
        raise ValueError(f"{path}: centroids hold NaN or infinite numbers")
    labels, sample_index = tensors["labels"], tensors["sample_index"]
    is_cluster = bool(((labels >= 0) & (labels < identity.num_centroid)).all())
    if (
        not is_cluster
        or labels.bincount(minlength=identity.num_centroid).tolist() != metadata["cluster_sizes"]
    ):
        raise ValueError(f"{path}: expected labels with the cluster sizes that {METADATA_FILE} lists")
    if bool((sample_index.diff() <= 0).any()) or int(sample_index[0]) < 0:
        raise ValueError(f"{path}: expected sample_index to rise from 0 or more")
    return {name: tensors[name] for name in _TENSORS}
