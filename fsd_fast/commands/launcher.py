"""What a launcher tells its processes, and what it puts on their command lines."""

from __future__ import annotations

import os
from collections.abc import Sequence


def launched() -> bool:
    """Whether a launcher started this process and told it its place."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Return this process's number among those that the launcher started; 0 without a launcher."""
    return _number("RANK")


def local_rank() -> int:
    """Return this process's number on its machine; 0 without a launcher."""
    return _number("LOCAL_RANK")


def _number(name: str) -> int:
    text = os.environ.get(name, "0")
    return int(text) if text.isdecimal() else 0


# What MPI's launchers, which accelerate can start, tell their processes.
_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_launch(command: str) -> None:
    """Check that ``accelerate launch`` has started as many processes as it was asked for.

    With ``--cpu`` it starts one, whatever ``--num_processes`` says, and tells it where the others would meet.

    Raises:
        ValueError: It has not; the message says what to run instead.
    """
    told = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if told and not launched() and not any(name in os.environ for name in _MPI):
        raise ValueError(
            "accelerate launch was asked for several processes and started one, as it does with --cpu; run "
            f"`torchrun --nproc_per_node N train_ds.py {command} ...`"
        )


def check_deepspeed(command: str) -> None:
    """Check that ``--deepspeed``, which was given, is used under a launcher.

    Raises:
        ValueError: It is not; the message says what to run instead.
    """
    if not launched():
        raise ValueError(
            "--deepspeed works only under its launcher; run "
            f"`deepspeed --num_gpus N train_ds.py {command} --deepspeed ds_config.json ...` or, without a GPU, "
            f"`DS_ACCELERATOR=cpu deepspeed --num_accelerators N train_ds.py {command} "
            "--deepspeed ds_config.json --use_cpu true ...`"
        )


def split_launcher_rank(arguments: Sequence[str]) -> list[str]:
    """Drop ``--local_rank=N`` (also spelt ``--local-rank``, also as two words): LOCAL_RANK says the same.

    The deepspeed launcher puts it before the script's own arguments.
    """
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept
