"""Folders of runs: whether one is free, and which checkpoint a run continues from."""

from __future__ import annotations

import os
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from fsd_fast.files import is_scratch
from fsd_fast.training.record import RECORD_FILE


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


def find_checkpoint(output_dir: str, resume: str | None) -> str | None:
    """Find the checkpoint that ``--resume_from_checkpoint`` names; None where the run starts anew.

    Args:
        output_dir: The run's folder.
        resume: A folder; "last" or "true" for the newest checkpoint in ``output_dir``; "auto" for the newest one, or
            None where there is none yet.

    Raises:
        FileNotFoundError: There is no such checkpoint.
    """
    if resume is None:
        return None
    if resume.lower() in ("last", "true", "auto"):
        last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if last is None and resume.lower() != "auto":
            raise FileNotFoundError(f"resume_from_checkpoint: {output_dir} holds no checkpoint-N folder")
        return last
    if not Path(resume).is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint: {resume} is no folder")
    return resume
