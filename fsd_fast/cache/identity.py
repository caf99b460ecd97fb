"""What a teacher cache was computed from: the record in its folder, and which runs may read it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsd_fast.files import differences, write_json
from fsd_fast.untrusted import (
    CHECKSUM,
    SHA256,
    TEXT,
    check_seal,
    integer,
    list_of,
    object_of,
    read_json_object,
    seal,
)

IDENTITY_FILE = "teacher_cache.json"
_FORMAT = 1
_FIELDS = {
    "format": integer(_FORMAT),
    "task_name": TEXT,
    "teacher_fingerprint": SHA256,
    "teacher_config": SHA256,
    "tokens": SHA256,
    "layers": list_of(integer(0)),
    "num_samples": integer(0),
    "max_seq_length": integer(1),
    "hidden_size": integer(1),
    "num_labels": integer(1),
    "pad_features": TEXT,
    "precision": TEXT,
    "dtype": TEXT,
}
CACHE_DTYPES = ("float32", "bfloat16")
"""How numbers may be stored."""


@dataclass(frozen=True)
class CacheIdentity:
    """What the numbers in a cache depend on.

    Attributes:
        task_name: The task whose training set this is.
        teacher_fingerprint: sha256 of the teacher's parameters, its outputs in the task's order.
        teacher_config: sha256 of the settings that the teacher's forward pass depends on.
        tokens: sha256 of the training set's tokens.
        layers: Indices of the hidden states, ascending, 0 = embeddings; logits are always there.
        num_samples: N; sample indices run from 0 to N - 1.
        max_seq_length: S.
        hidden_size: D.
        num_labels: C.
        pad_features: "include" (all S positions are kept) or "exclude" (padding is left out).
        precision: Of the teacher's matrix products: "float32", "bfloat16" or "float16".
        dtype: Of the stored hidden states: "float32" or "bfloat16". Logits are always float32.
    """

    task_name: str
    teacher_fingerprint: str
    teacher_config: str
    tokens: str
    layers: tuple[int, ...]
    num_samples: int
    max_seq_length: int
    hidden_size: int
    num_labels: int
    pad_features: str
    precision: str
    dtype: str

    def record(self) -> dict[str, Any]:
        """All fields, as they are written."""
        return {"format": _FORMAT, **dataclasses.asdict(self), "layers": list(self.layers)}

    def digest(self) -> str:
        """sha256 of all fields."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()

    def position_bytes(self) -> int:
        """Bytes that one position of one sample takes."""
        return len(self.layers) * self.hidden_size * (4 if self.dtype == "float32" else 2)

    def sample_bytes(self, positions: int) -> int:
        """Bytes that a sample of so many positions takes: hidden states, logits, and its entries in the index."""
        index = 8 * (3 + len(self.layers))
        return positions * self.position_bytes() + 4 * self.num_labels + index


@dataclass(frozen=True)
class CacheRecord:
    """The content of a cache's ``teacher_cache.json``.

    Attributes:
        identity: What the numbers depend on.
        weights: sha256 of the files that the teacher was loaded from, by which it is known without loading it; None
            where it came from no folder.
    """

    identity: CacheIdentity
    weights: str | None


def write_record(folder: Path, record: CacheRecord) -> None:
    """Write a cache's record, sealed.

    Raises:
        OSError: It cannot be written.
    """
    write_json(folder / IDENTITY_FILE, seal({**record.identity.record(), "weights": record.weights}))


def read_record(folder: Path) -> CacheRecord | None:
    """Read the record of the cache in a folder; None where there is none.

    Raises:
        ValueError: The file is damaged, or of another format.
    """
    path = folder / IDENTITY_FILE
    if not path.is_file():
        return None
    try:
        found = read_json_object(path)
        if found.get("format") != _FORMAT:
            raise ValueError(
                f"{path}: expected a teacher cache of format {_FORMAT}, got {found.get('format')!r}"
            )
        check_seal(found, path)
        weights = found.pop("weights", None)
        fields = {name: value for name, value in found.items() if name != CHECKSUM}
        object_of(_FIELDS)(fields, str(path))
        del fields["format"]
        if weights is not None:
            SHA256(weights, f"{path}: weights")
        if fields["dtype"] not in CACHE_DTYPES:
            raise ValueError(
                f"{path}: dtype: expected one of {', '.join(CACHE_DTYPES)}, got {fields['dtype']!r}"
            )
    except ValueError as error:
        raise ValueError(f"teacher_cache_dir: {error}; remove the cache or choose another folder") from None
    return CacheRecord(CacheIdentity(**{**fields, "layers": tuple(fields["layers"])}), weights)


def check_readable(folder: Path, found: CacheIdentity, wanted: CacheIdentity) -> None:
    """Check that a run may read a cache.

    The cache may hold more layers than the run reads, and may have been computed in float32 where the run's own teacher
    would compute in half precision. Everything else must be the same.

    Args:
        folder: The cache's, for the message.
        found: Of the cache.
        wanted: Of the cache that the run would make.

    Raises:
        ValueError: It may not; every field that differs is listed, or the layers that are missing.
    """
    compared = dataclasses.replace(wanted, layers=found.layers)
    if found.precision == "float32":
        compared = dataclasses.replace(compared, precision="float32")
    different = differences(found.record(), compared.record())
    if different:
        raise ValueError(
            f"teacher_cache_dir: {folder} was made for another run: {different}. Choose another folder"
        )
    missing = sorted(set(wanted.layers) - set(found.layers))
    if missing:
        every = sorted({*wanted.layers, *found.layers})
        raise ValueError(
            f"teacher_cache_dir: {folder} holds the hidden states of layers {_listed(found.layers) or 'none'}, the run "
            f"also reads {_listed(missing)}; make a cache of all of them in another folder: fsd-fast cache --layers "
            f"{_listed(every)}"
        )


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))
