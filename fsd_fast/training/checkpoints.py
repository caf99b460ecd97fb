"""Folders of runs: whether one is free, and which checkpoint a run continues from."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from fsd_fast.distributed import Collectives
from fsd_fast.files import is_scratch
from fsd_fast.training.manifest import checkpoint_faults, checkpoint_folders
from fsd_fast.training.record import RECORD_FILE

logger = logging.getLogger(__name__)


def check_writable(name: str, folder: str) -> None:
    """Check that a folder, which need not exist yet, can be made and written to.

    Args:
        name: The flag, for the message.
        folder: The folder.

    Raises:
        FileExistsError: It, or a part of its path, is a file.
        OSError: It cannot be reached or written to, or its name is too long.
    """
    path = Path(os.path.abspath(folder))
    for part in (path, *path.parents):
        try:
            os.stat(part)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise type(error)(f"{name}: {str(part)[:100]}: {error.strerror}") from None
        if not part.is_dir():
            raise FileExistsError(f"{name}: {part} is a file; expected a folder")
        if not os.access(part, os.W_OK | os.X_OK):
            raise PermissionError(f"{name}: {part} is not writable")
        return


def check_output_dir(
    output_dir: str, resume: str | None, overwrite: bool, *, can_resume: bool = True
) -> None:
    """Check that a run's folder is free; locks and half-written files in it do not count.

    Args:
        output_dir: The folder.
        resume: A checkpoint, "last", or "auto", which takes a folder of this package's own run as it is.
        overwrite: Whether the folder may hold anything.
        can_resume: The command has ``--resume_from_checkpoint``, so that the error may advise it.

    Raises:
        FileExistsError: The folder holds something, and neither resuming nor overwriting was asked for.
    """
    folder = Path(output_dir)
    if folder.is_file():
        raise FileExistsError(f"output_dir: {folder} is a file; expected a folder")
    if overwrite or not folder.is_dir() or all(is_scratch(path.name) for path in folder.iterdir()):
        return
    if resume is None:
        advice = "continue it with --resume_from_checkpoint last, " if can_resume else ""
        raise FileExistsError(
            f"output_dir: {folder} holds a run already; {advice}start anew with --overwrite_output_dir true, "
            "or choose another folder"
        )
    if resume.lower() == "auto" and not (folder / RECORD_FILE).is_file():
        raise FileExistsError(
            f"output_dir: {folder} holds files and no {RECORD_FILE}, so they are no run that "
            "--resume_from_checkpoint auto could continue; choose another folder"
        )


def find_checkpoint(output_dir: str, resume: str | None, *, allow_partial: bool = False) -> str | None:
    """Find the checkpoint that ``--resume_from_checkpoint`` names; None where the run starts anew.

    The first process looks at the files, and all processes get what it found.

    Args:
        output_dir: The run's folder.
        resume: A checkpoint's folder; "last" or "true" for the newest whole one in ``output_dir``, "auto" for the same,
            or None where there is none yet. Damaged ones are named in a warning and passed over.
        allow_partial: Take a checkpoint that lacks the state of the optimizer, the schedule or the random numbers.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The checkpoint named is damaged; every fault is listed.
    """
    if resume is None:
        return None
    collectives = Collectives()
    found: list[str] = []

    def look() -> None:
        if collectives.rank == 0:
            path = _find(output_dir, resume, allow_partial)
            found.extend([] if path is None else [str(path)])

    collectives.run_on_all_ranks(look)
    listed = collectives.broadcast_json(found)
    return listed[0] if listed else None


def _find(output_dir: str, resume: str, allow_partial: bool) -> Path | None:
    if resume.lower() not in ("last", "true", "auto"):
        folder = Path(resume)
        if not folder.is_dir():
            raise FileNotFoundError(f"resume_from_checkpoint: {resume} is no folder")
        reason = _refusal(folder, allow_partial)
        if reason is not None:
            raise ValueError(f"resume_from_checkpoint: {folder} is damaged: {reason}")
        return folder
    damaged = []
    for folder in reversed(checkpoint_folders(output_dir)):
        reason = _refusal(folder, allow_partial)
        if reason is None:
            return folder
        damaged.append(f"{folder}: {reason}")
        logger.warning("passed over, a damaged checkpoint: %s", damaged[-1])
    if resume.lower() == "auto":
        return None
    if damaged:
        raise FileNotFoundError(
            f"resume_from_checkpoint: {output_dir} holds no whole checkpoint: {'; '.join(damaged)}"
        )
    raise FileNotFoundError(f"resume_from_checkpoint: {output_dir} holds no checkpoint-N folder")


def _refusal(folder: Path, allow_partial: bool) -> str | None:
    """Say why a checkpoint cannot be resumed from; None if it can."""
    faults = checkpoint_faults(folder)
    if faults is None:
        return None
    listed = ", ".join(faults.reasons)
    if not faults.missing_state:
        return listed
    if allow_partial:
        logger.warning("%s: %s; the run goes on without, on another trajectory", folder, listed)
        return None
    return f"{listed}; --allow_partial_resume true goes on without, on another trajectory"
