"""Flags into dataclasses: from the command line or from one JSON file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from fsd_fast.commands import load_command
from fsd_fast.training.checkpoints import check_output_dir


def launched() -> bool:
    """Whether a launcher started this process and told it its place."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def check_deepspeed(wants_deepspeed: bool, command: str) -> None:
    """Check that ``--deepspeed`` is used under a launcher.

    Raises:
        ValueError: It is not; the message says what to run instead.
    """
    if wants_deepspeed and not launched():
        raise ValueError(
            "deepspeed: --deepspeed works only under its launcher; run\n"
            f"    deepspeed --num_gpus N train_ds.py {command} --deepspeed ds_config.json ...\n"
            "or, without a GPU,\n"
            f"    DS_ACCELERATOR=cpu deepspeed --num_accelerators N train_ds.py {command} "
            "--deepspeed ds_config.json --use_cpu true ..."
        )


def parse(command: str, arguments: Sequence[str]) -> tuple[Any, ...]:
    """Parse a command's flags, or the one JSON file that holds them, into its dataclasses.

    Args:
        command: A key of ``COMMANDS``.
        arguments: What follows the command on the command line.

    Returns:
        One instance for each dataclass of the command.

    Raises:
        ValueError: The file is no JSON object or holds an unknown key, ``--deepspeed`` is used without a
            launcher, or a flag's value is refused.
        FileNotFoundError: The JSON file does not exist.
        FileExistsError: The output folder holds a run already.
    """
    classes = load_command(command).ARGUMENTS
    # Checked before the dataclasses are made: making TrainingArguments starts the process group.
    values = (
        _read_json(Path(arguments[0])) if len(arguments) == 1 and arguments[0].endswith(".json") else None
    )
    listed = list(arguments) if values is None else [f"--{name}" for name in values]
    if any(entry.split("=")[0] == "--deepspeed" for entry in listed):
        check_deepspeed(True, command)
    parser = _Parser(classes, prog=f"fsd-fast {command}")
    if values is None:
        _check_flags_first(parser, classes, list(arguments), command)
        return tuple(parser.parse_args_into_dataclasses(list(arguments)))
    known = {f.name for cls in classes for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{arguments[0]}: unknown keys {', '.join(unknown)}; see fsd-fast {command} --help")
    _check_run_folder(values)
    return tuple(parser.parse_dict(values))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got line {error.lineno}: {error.msg}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object of flags, got {type(values).__name__}")
    resume = values.get("resume_from_checkpoint")
    if isinstance(resume, bool):  # what JSON makes of "--resume_from_checkpoint true"
        values["resume_from_checkpoint"] = "last" if resume else None
    return values


class _Parser(HfArgumentParser):
    """Raises where argparse would print every flag there is, the error below them, and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _check_flags_first(
    parser: HfArgumentParser, classes: tuple[type, ...], arguments: list[str], command: str
) -> None:
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ValueError(f"unknown arguments {' '.join(unknown)}; see fsd-fast {command} --help")
    if any(issubclass(cls, TrainingArguments) for cls in classes):
        _check_run_folder(vars(namespace))


def _check_run_folder(values: dict[str, Any]) -> None:
    if values.get("output_dir") is not None:
        check_output_dir(
            values["output_dir"],
            values.get("resume_from_checkpoint"),
            bool(values.get("overwrite_output_dir")),
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
