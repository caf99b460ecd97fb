"""Folders of runs: whether one is free, and which checkpoint a run continues from."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from fsd_fast.files import is_scratch


def check_output_dir(
    output_dir: str, resume: str | None, overwrite: bool, *, can_resume: bool = True
) -> None:
    """Check that a run's folder is free; locks and half-written files in it do not count.

    Args:
        output_dir: The folder.
        resume: The value of ``--resume_from_checkpoint``.
        overwrite: The value of ``--overwrite_output_dir``.
        can_resume: The command has ``--resume_from_checkpoint``, so that the error may advise it.

    Raises:
        FileExistsError: The folder holds something, and neither resuming nor overwriting was asked for.
    """
    folder = Path(output_dir)
    if folder.is_file():
        raise FileExistsError(f"output_dir: {folder} is a file; expected a folder")
    is_taken = folder.is_dir() and any(not is_scratch(path.name) for path in folder.iterdir())
    if is_taken and resume is None and not overwrite:
        advice = "continue it with --resume_from_checkpoint last, " if can_resume else ""
        raise FileExistsError(
            f"output_dir: {folder} holds a run already; {advice}start anew with --overwrite_output_dir true, "
            "or choose another folder"
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
