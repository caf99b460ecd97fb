"""Whole checkpoints: a manifest, written last, with the size and sha256 of every file.

    checkpoint-N/manifest.json
    {"format": 2, "resumable": true, "files": {"optimizer.pt": {"size": 5243, "sha256": "9f86..."}, ...},
     "checksum": "60ed..."}

A checkpoint without a manifest was cut off while it was written. One whose files differ from it was damaged afterwards.
Neither is resumed from.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from fsd_fast.files import is_scratch, write_json
from fsd_fast.untrusted import (
    CHECKSUM,
    FLAG,
    SHA256,
    check_seal,
    integer,
    map_of,
    object_of,
    read_json_object,
    seal,
    shorten,
)

MANIFEST_FILE = "manifest.json"
_FORMAT = 2
_CHUNK_BYTES = 1 << 20
_FIELDS = {
    "format": integer(1),
    "resumable": FLAG,
    "files": map_of(object_of({"size": integer(0), "sha256": SHA256})),
}
# Format -> the check of its fields. Manifests of version 0.2.0 have no checksum.
_CHECKS = {1: object_of(_FIELDS), _FORMAT: object_of({**_FIELDS, CHECKSUM: SHA256})}
# What a run can go on without, on another trajectory; the weights are not among them.
_STATE_FILES = re.compile(r"optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth")


@dataclass(frozen=True)
class Faults:
    """What keeps a checkpoint from being resumed.

    Args:
        reasons: One text for each fault.
        missing_state: Every fault is a missing file of the optimizer, the schedule or the random numbers.
    """

    reasons: list[str]
    missing_state: bool


def checkpoint_folders(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The folders ``checkpoint-N`` of a run, lowest N first; a folder such as checkpoint-analysis is none of them."""
    found = {
        int(match[1]): path
        for path in Path(output_dir).glob("checkpoint-*")
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return [found[step] for step in sorted(found)]


def seal_checkpoint(folder: Path, *, resumable: bool) -> None:
    """Write a checkpoint's manifest, after its files have reached the disk.

    Args:
        folder: The checkpoint; all its files are written.
        resumable: It holds the optimizer's state and not the model alone.

    Raises:
        OSError: A file cannot be read, or the manifest cannot be written.
    """
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _digest(path, sync=True)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE and not is_scratch(path.name)
    }
    manifest = seal({"format": _FORMAT, "resumable": resumable, "files": files})
    write_json(folder / MANIFEST_FILE, manifest)


def break_seal(folder: Path) -> None:
    """Remove a checkpoint's manifest, before its files are written anew or removed."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; what a kill leaves of it is none."""
    break_seal(folder)
    shutil.rmtree(folder)


def checkpoint_faults(folder: Path) -> Faults | None:
    """Compare a checkpoint with its manifest; None where it is whole."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return Faults(
            [f"{MANIFEST_FILE} is missing: it was cut off while it was written"], missing_state=False
        )
    try:
        manifest = read_json_object(path)
        number = manifest.get("format")
        check = _CHECKS.get(number) if isinstance(number, int) else None
        if check is None:
            expected = " or ".join(map(str, _CHECKS))
            raise ValueError(f"{path}: format: expected {expected}, got {shorten(number)}")
        check(manifest, str(path))
        if CHECKSUM in manifest:
            check_seal(manifest, path)
    except (OSError, ValueError) as error:
        return Faults([str(error)], missing_state=False)
    if not manifest["resumable"]:
        return Faults(["it holds the model alone, as --save_only_model asks for"], missing_state=False)
    reasons, missing_state = [], True
    for name, entry in manifest["files"].items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            reasons.append(f"{name} lies outside of the checkpoint")
        elif not file.is_file():
            reasons.append(f"{name} is missing")
            missing_state = missing_state and _STATE_FILES.fullmatch(name) is not None
            continue
        elif file.stat().st_size != entry["size"]:
            reasons.append(f"{name} has {file.stat().st_size:,} bytes, expected {entry['size']:,}")
        elif _digest(file) != entry["sha256"]:
            reasons.append(f"{name} has another sha256 than when it was written")
        else:
            continue
        missing_state = False
    return Faults(reasons, missing_state) if reasons else None


def _digest(path: Path, *, sync: bool = False) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()
