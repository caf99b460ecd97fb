"""What a clustering has worked out so far, on disk, so that a killed run continues where it was.

    <folder>/rank<r>.json                        the key, the tally, and of each stage its parts, facts and place
    <folder>/rank<r>-<stage>-<n>.safetensors     tensors of a part

Each process saves the work that it does alone: its readings of the points and, on the first process, k-means of
the sketches. What the processes do together is done again from there, so they need not have been stopped at the
same point. The key is everything the numbers depend on; equal keys give equal bits. The JSON holds the sha256 of
the parts and is written after them, each under its name only when it is complete: a half-written file is never
read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fsd_fast.clustering.stream import PointBatch, PointStream
from fsd_fast.distributed import Collectives
from fsd_fast.files import differences, write_atomically

_FORMAT = 2


@dataclass
class Stage:
    """How far a stage has come: the batches and rows behind it, the tensors of its parts, and some facts."""

    batches: int = 0
    rows: int = 0
    complete: bool = False
    parts: list[dict[str, Tensor]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def last(self, name: str, otherwise: Tensor) -> Tensor:
        """The tensor of that name in the last part, on the device of ``otherwise``, which stands in for it."""
        return self.parts[-1][name].to(otherwise.device) if self.parts else otherwise


class ClusteringState:
    """The state of one clustering and one process.

    Args:
        folder: Where it is kept; None: nowhere, and every stage starts from its beginning.
        key: What the numbers depend on (JSON values). Must be that of the state found, if there is one.
        save_every: Batches between two savings of a reading.
        rank: Of this process.

    Attributes:
        tally: Counts of whatever its user counts, saved along with every stage.

    Raises:
        ValueError: The folder holds the state of another clustering; the fields that differ are listed.
    """

    def __init__(
        self,
        folder: Path | None,
        key: Mapping[str, Any] | None = None,
        *,
        save_every: int = 200,
        rank: int = 0,
    ) -> None:
        if save_every < 1:
            raise ValueError(f"save_every: expected at least 1, got {save_every}")
        self._folder = folder
        self._save_every = save_every
        self._rank = rank
        # As it comes back from the file: tuples become lists.
        self._key: dict[str, Any] = json.loads(json.dumps({"format": _FORMAT, **(key or {})}))
        self._stages: dict[str, dict[str, Any]] = {}
        self.tally: Counter[str] = Counter()
        if folder is not None and self._manifest(folder).is_file():
            self._stages, self.tally = self._read(self._manifest(folder))
        self._earlier = {name: record["seconds"] for name, record in self._stages.items()}

    def _manifest(self, folder: Path) -> Path:
        return folder / f"rank{self._rank}.json"

    def _read(self, path: Path) -> tuple[dict[str, dict[str, Any]], Counter[str]]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found, stages, tally = dict(content["key"]), dict(content["stages"]), Counter(content["tally"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not the state of an interrupted clustering ({error})") from error
        different = differences(found, self._key)
        if different:
            raise ValueError(
                f"{path.parent} is what another, interrupted run left: {different}. Continue it with "
                f"its own settings, start anew with --overwrite_output_dir true, or choose another folder"
            )
        return stages, tally

    def earlier_seconds(self, stage: str) -> float:
        """Seconds that runs before this one spent in a stage and its sub-stages, up to their last saving."""
        return float(sum(value for name, value in self._earlier.items() if name.startswith(stage)))

    def load(self, name: str) -> Stage:
        """Return what is saved of a stage; a damaged one is begun again, with a warning."""
        record = self._stages.get(name)
        if record is None or self._folder is None:
            return Stage()
        parts = []
        for part in record["parts"]:
            path = self._folder / part["file"]
            content = path.read_bytes() if path.is_file() else b""
            if hashlib.sha256(content).hexdigest() != part["sha256"]:
                warnings.warn(
                    f"{path} is damaged or missing: stage {name} is begun again", RuntimeWarning, stacklevel=2
                )
                del self._stages[name]
                return Stage()
            parts.append(load_safetensors(content))
        return Stage(record["batches"], record["rows"], record["complete"], parts, record["facts"])

    def save(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        *,
        complete: bool,
        batches: int = 0,
        rows: int = 0,
        facts: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
        append: bool = False,
    ) -> None:
        """Save how far a stage has come: in place of its parts so far, or as one more part (``append``).

        Raises:
            OSError: The folder cannot be written; what was saved before stays.
        """
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        before = self._stages.get(name)
        old = before["parts"] if before is not None else []
        number = before["number"] + 1 if before is not None else 0
        file = f"rank{self._rank}-{name}-{number}.safetensors"
        # A view would carry all of its storage, and a tensor that is part of another is refused.
        content = save_safetensors({key: value.detach().cpu().clone() for key, value in tensors.items()})
        write_atomically(self._folder / file, content)
        part = {"file": file, "sha256": hashlib.sha256(content).hexdigest()}
        self._stages[name] = {
            "number": number,
            "batches": batches,
            "rows": rows,
            "complete": complete,
            "facts": dict(facts or {}),
            "seconds": seconds,
            "parts": [*old, part] if append else [part],
        }
        manifest = {"key": self._key, "tally": self.tally, "stages": self._stages}
        write_atomically(self._manifest(self._folder), json.dumps(manifest, indent=1).encode())
        if not append:
            for part in old:
                (self._folder / part["file"]).unlink(missing_ok=True)

    def reading(
        self,
        stream: PointStream,
        name: str,
        kept: Callable[[], Mapping[str, Tensor]],
        *,
        facts: Mapping[str, Any] | None = None,
        append: bool = False,
    ) -> Iterator[PointBatch]:
        """Yield the batches that a stage has not yet read; save ``kept()`` now and then, and at the end.

        ``kept()`` is called and ``facts`` read when the last batch yielded has been worked in, ``append`` as in
        ``save``. The caller starts from ``load(name)``.
        """
        record = self._stages.get(name, {"batches": 0, "rows": 0, "complete": False, "seconds": 0.0})
        if record["complete"]:
            return
        batches, rows = record["batches"], record["rows"]
        started = time.perf_counter()

        def save(complete: bool) -> None:
            if self._folder is not None:
                seconds = record["seconds"] + time.perf_counter() - started
                self.save(
                    name,
                    kept(),
                    complete=complete,
                    batches=batches,
                    rows=rows,
                    facts=facts,
                    seconds=seconds,
                    append=append,
                )

        for batch in stream.read(batches, rows):
            yield batch
            batches = batch.number + 1
            rows = batch.offset + batch.points.shape[0]
            if batches % self._save_every == 0:
                save(complete=False)
        save(complete=True)


NOT_SAVED = ClusteringState(None)
"""Keeps nothing."""


def discard_state(folder: Path) -> None:
    """Remove a state, on all processes together; no state is none to remove."""
    collectives = Collectives()

    def remove() -> None:
        if collectives.rank == 0 and folder.is_dir():
            shutil.rmtree(folder)

    collectives.agree(remove)
