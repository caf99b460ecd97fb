"""Folders of runs: whether one is free, and which checkpoint a run continues from."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint


def check_output_dir(output_dir: str, resume: str | None, overwrite: bool) -> None:
    """Check that a run's folder is free.

    Raises:
        FileExistsError: The folder holds something, and neither resuming nor overwriting was asked for.
    """
    folder = Path(output_dir)
    if folder.is_file():
        raise FileExistsError(f"output_dir: {folder} is a file; expected a folder")
    if folder.is_dir() and any(folder.iterdir()) and resume is None and not overwrite:
        raise FileExistsError(
            f"output_dir: {folder} holds a run already; continue it with --resume_from_checkpoint last, "
            "start anew with --overwrite_output_dir true, or choose another folder"
        )


def find_checkpoint(output_dir: str, resume: str | None) -> str | None:
    """Find the checkpoint that ``--resume_from_checkpoint`` names; None where it is not given.

    Args:
        output_dir: The run's folder.
        resume: A folder, or "last" or "true" for the newest checkpoint in ``output_dir``.

    Raises:
        FileNotFoundError: There is no such checkpoint.
    """
    if resume is None:
        return None
    if resume.lower() in ("last", "true"):
        last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if last is None:
            raise FileNotFoundError(f"resume_from_checkpoint: {output_dir} holds no checkpoint-N folder")
        return last
    if not Path(resume).is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint: {resume} is no folder")
    return resume
