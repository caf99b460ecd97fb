"""The checkpoint of a clustering: what it has computed so far, on disk, so that a killed one continues where it was.

    <folder>/rank<r>.json                        the keys, the tally, and how far each stage has come
    <folder>/rank<r>-<stage>-<n>.safetensors     a chunk: tensors of a stage, saved together

Each process saves the work that it does alone: its passes over the points and, on the first process, k-means of the
sketches. Collective steps are replayed, so processes may have stopped at different points. Two keys, one known at the
start and one after the first pass, hold everything that the numbers depend on; equal keys give equal bits. The JSON
holds the sha256 of the chunks and of itself and is written after them, each file under its name only when it is
complete: a half-written file is never read.

A pass over the points reads

    stage = checkpoint.stage("pass_2")
    sums = stage.restore("sums", zeros)
    for batch in stage.unread(stream):
        ...
        stage.batch_done(batch, lambda: {"sums": sums})
    stage.finish(lambda: {"sums": sums})
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fsd_fast.clustering.stream import PointBatch, PointStream
from fsd_fast.distributed import Collectives
from fsd_fast.files import differences, write_atomically
from fsd_fast.shutdown import Stopped, stop_requested
from fsd_fast.untrusted import (
    CHECKSUM,
    FLAG,
    OBJECT,
    SHA256,
    TEXT,
    check_seal,
    integer,
    list_of,
    load_tensors,
    map_of,
    number,
    object_of,
    read_json_object,
    seal,
)

Snapshot = Callable[[], Mapping[str, Tensor]]
"""Gives the tensors of a stage that are to be saved, when they are to be saved."""
SAVE_EVERY = 200
"""Batches between two savings of a pass, by default."""
_FORMAT = 4
_ANEW = (
    "start anew (memory: --overwrite_output_dir true; in Python: discard_checkpoint) or choose another folder"
)
_CHUNK = object_of({"number": integer(0), "bytes": integer(0), "sha256": SHA256})
_STAGE = object_of(
    {
        "batches": integer(0),
        "rows": integer(0),
        "complete": FLAG,
        "metadata": OBJECT,
        "seconds": number(0),
        "chunks": list_of(_CHUNK),
    }
)
_MANIFEST = object_of(
    {
        "key": OBJECT,
        "later_key": map_of(TEXT),
        "tally": map_of(integer(0)),
        "stages": map_of(_STAGE),
        CHECKSUM: SHA256,
    }
)


class Chunk:
    """Tensors that were saved together, and the file that holds them."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self._path, self._tensors = path, tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(
        self, name: str, dtype: torch.dtype | Sequence[torch.dtype], shape: Sequence[int | None]
    ) -> Tensor:
        """A tensor of this dtype (or one of these) and this shape, None standing for any size.

        Raises:
            ValueError: It is not there, or of another kind.
        """
        found = self._tensors.get(name)
        dtypes = [dtype] if isinstance(dtype, torch.dtype) else list(dtype)
        if (
            found is None
            or found.dtype not in dtypes
            or found.ndim != len(shape)
            or any(size not in (None, given) for size, given in zip(shape, found.shape, strict=True))
        ):
            given = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{self._path}: expected {name} {dtypes[0]} [{sizes}], got {given}")
        return found


class Stage:
    """How far one stage of a clustering has come.

    Attributes:
        batches: Batches behind it.
        rows: Points in these batches.
        complete: Nothing is left to do.
        metadata: JSON values saved with it.
        chunks: The tensors that were found saved.
    """

    def __init__(
        self,
        checkpoint: ClusteringCheckpoint,
        name: str,
        record: Mapping[str, Any],
        chunks: list[Chunk],
        append: bool,
    ) -> None:
        self._checkpoint, self._name, self._append = checkpoint, name, append
        self._earlier = float(record.get("seconds", 0.0))
        self._started = time.perf_counter()
        self.batches: int = record.get("batches", 0)
        self.rows: int = record.get("rows", 0)
        self.complete: bool = record.get("complete", False)
        self.metadata: dict[str, Any] = dict(record.get("metadata", {}))
        self.chunks = chunks

    @property
    def where(self) -> str:
        """The file that says how far this stage has come, for errors."""
        folder = self._checkpoint.folder
        return f"{'' if folder is None else self._checkpoint.manifest(folder)}: stage {self._name}"

    def restore(self, name: str, otherwise: Tensor) -> Tensor:
        """The tensor saved last under a name, on the device of ``otherwise``, which stands in for it.

        Raises:
            ValueError: It has another dtype or shape than ``otherwise``.
        """
        if not self.chunks:
            return otherwise
        saved = self.chunks[-1].tensor(name, otherwise.dtype, list(otherwise.shape))
        return saved.to(otherwise.device)

    def restore_rows(self, name: str, *dtypes: torch.dtype) -> Tensor:
        """The values ``[rows]`` saved last under a name, one for each point so far, of one of these dtypes.

        Raises:
            ValueError: They have another dtype or shape.
        """
        if not self.chunks:
            return torch.empty(0, dtype=dtypes[0])
        return self.chunks[-1].tensor(name, dtypes, [self.rows])

    def unread(self, stream: PointStream) -> Iterator[PointBatch]:
        """The batches that this stage has not read yet."""
        if not self.complete:
            yield from stream.read(self.batches, self.rows)

    def batch_done(self, batch: PointBatch, snapshot: Snapshot) -> None:
        """Count a batch that has been worked in; save ``snapshot()`` now and then.

        Raises:
            Stopped: A signal asked for it; ``snapshot()`` is saved.
        """
        self.batches, self.rows = batch.batch_number + 1, batch.end
        if stop_requested() is not None or self.batches % self._checkpoint.save_every == 0:
            self.save(snapshot)
        self.stop_if_requested()

    def stop_if_requested(self) -> None:
        """Stop where a signal has asked for it; what is saved stays.

        Raises:
            Stopped: A signal asked for it.
        """
        number = stop_requested()
        if number is not None:
            folder = self._checkpoint.folder
            kept = "nothing was saved" if folder is None else f"saved in {folder}"
            raise Stopped(number, f"batch {self.batches} of stage {self._name}, {kept}")

    def finish(self, snapshot: Snapshot) -> None:
        """Save ``snapshot()`` as the whole of this stage, unless it was complete when it was found."""
        if not self.complete:
            self.complete = True
            self.save(snapshot)

    def save(self, snapshot: Snapshot) -> None:
        """Save how far this stage has come: in place of its chunks so far, or as one more.

        Raises:
            OSError: The folder cannot be written; what was saved before stays.
        """
        if self._checkpoint.folder is not None:
            record = {
                "batches": self.batches,
                "rows": self.rows,
                "complete": self.complete,
                "metadata": self.metadata,
                "seconds": self._earlier + time.perf_counter() - self._started,
            }
            self._checkpoint.write(self._name, record, snapshot(), self._append)


class ClusteringCheckpoint:
    """The checkpoint of one clustering and one process.

    Args:
        folder: Where it is kept; None: nowhere, and every stage starts from its beginning.
        key: What the numbers depend on (JSON values). Must be that of the checkpoint found, if there is one.
        save_every: Batches between two savings of a pass.
        rank: Of this process.

    Attributes:
        tally: Counts of whatever its user counts, saved along with every stage.

    Raises:
        ValueError: The folder holds the checkpoint of another clustering (the fields that differ are listed), or a
            damaged one.
    """

    def __init__(
        self,
        folder: Path | None,
        key: Mapping[str, Any] | None = None,
        *,
        save_every: int = SAVE_EVERY,
        rank: int = 0,
    ) -> None:
        if save_every < 1:
            raise ValueError(f"save_every: expected at least 1, got {save_every}")
        self.folder = folder
        self.save_every = save_every
        self._rank = rank
        # As it comes back from the file: tuples become lists.
        self._key: dict[str, Any] = json.loads(json.dumps({"format": _FORMAT, **(key or {})}))
        self._later_key: dict[str, str] = {}
        self._stages: dict[str, dict[str, Any]] = {}
        self.tally: Counter[str] = Counter()
        if folder is not None and self.manifest(folder).is_file():
            content = self._read(self.manifest(folder))
            self._later_key, self._stages = content["later_key"], content["stages"]
            self.tally = Counter(content["tally"])
        self._earlier = {name: record["seconds"] for name, record in self._stages.items()}

    def manifest(self, folder: Path) -> Path:
        """The file in a folder that says how far this process has come."""
        return folder / f"rank{self._rank}.json"

    def _chunk_path(self, folder: Path, stage: str, number: int) -> Path:
        return folder / f"rank{self._rank}-{stage}-{number}.safetensors"

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content = read_json_object(path)
            found = content.get("key")
            if isinstance(found, dict) and found.get("format") == _FORMAT:
                _MANIFEST(content, str(path))
                check_seal(content, path)
            elif not isinstance(found, dict):
                raise ValueError(f"{path}: key: expected an object")
        except ValueError as error:
            raise ValueError(
                f"{error}. It is not the checkpoint of an interrupted clustering: {_ANEW}"
            ) from None
        self._check_same(found, self._key)
        return content

    def _check_same(self, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        different = differences(found, expected)
        if different:
            raise ValueError(
                f"{self.folder} is what another, interrupted run left: {different}. Continue it with "
                f"its own settings, {_ANEW}"
            )

    def set_later_key(self, key: Mapping[str, str]) -> None:
        """Give what the numbers depend on from here on, known only now; it is saved with the next stage.

        Raises:
            ValueError: The checkpoint found had another one (the fields that differ are listed).
        """
        if self._later_key:
            self._check_same(self._later_key, key)
        self._later_key = dict(key)

    def earlier_seconds(self, stage: str) -> float:
        """Seconds that runs before this one spent in a stage and its sub-stages, up to their last saving."""
        return float(sum(value for name, value in self._earlier.items() if name.startswith(stage)))

    def stage(self, name: str, *, append: bool = False) -> Stage:
        """Open a stage where it was left; a damaged one is begun again, with a warning.

        Args:
            name: Of the stage.
            append: Each saving adds a chunk; otherwise it replaces the one before.
        """
        record = self._stages.get(name, {})
        chunks: list[Chunk] = []
        if self.folder is not None:
            for listed in record.get("chunks", []):
                path = self._chunk_path(self.folder, name, listed["number"])
                content = _read_chunk(path, listed)
                if content is None:
                    warnings.warn(
                        f"{path} is damaged or missing: stage {name} is begun again",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                    del self._stages[name]
                    return Stage(self, name, {}, [], append)
                chunks.append(Chunk(path, load_tensors(content, path)))
        return Stage(self, name, record, chunks, append)

    def write(
        self, name: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor], append: bool
    ) -> None:
        """Write the tensors of a stage, then how far it has come; ``Stage.save`` calls this."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        old = self._stages[name]["chunks"] if name in self._stages else []
        number = old[-1]["number"] + 1 if old else 0
        # A view would carry all of its storage, and a tensor that is part of another is refused.
        content = save_safetensors({key: value.detach().cpu().clone() for key, value in tensors.items()})
        write_atomically(self._chunk_path(self.folder, name, number), content)
        chunk = {"number": number, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        self._stages[name] = {**record, "chunks": [*old, chunk] if append else [chunk]}
        manifest = {
            "key": self._key,
            "later_key": self._later_key,
            "tally": dict(self.tally),
            "stages": self._stages,
        }
        write_atomically(self.manifest(self.folder), json.dumps(seal(manifest), indent=1).encode())
        if not append:
            for replaced in old:
                self._chunk_path(self.folder, name, replaced["number"]).unlink(missing_ok=True)


NOT_SAVED = ClusteringCheckpoint(None)
"""Keeps nothing."""


def _read_chunk(path: Path, listed: Mapping[str, Any]) -> bytes | None:
    """The content of a chunk; None where it is not the one that was written."""
    if not path.is_file() or path.stat().st_size != listed["bytes"]:
        return None
    content = path.read_bytes()
    return content if hashlib.sha256(content).hexdigest() == listed["sha256"] else None


def discard_checkpoint(folder: Path) -> None:
    """Remove the checkpoints of all processes, which call this together; a folder that is not there is no error."""
    collectives = Collectives()

    def remove() -> None:
        if collectives.rank == 0 and folder.is_dir():
            shutil.rmtree(folder)

    collectives.run_on_all_ranks(remove)
