"""The commands: ``fsd-fast COMMAND ...`` and ``[deepspeed] train_ds.py COMMAND ...`` are the same.

=============  ====================================================================
``fetch``      get the built-in data and backbone
``teacher``    fine-tune a classifier on the hard labels
``memory``     cluster the teacher's features into its memory
``distill``    train a student next to its teacher
``evaluate``   score a saved classifier
``demo``       all of it on the built-in task, with a table at the end
=============  ====================================================================
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from fsd_fast.commands import COMMANDS, load_command


def _usage() -> str:
    lines = ["usage: fsd-fast COMMAND [flags | FILE.json]", "", "commands:"]
    lines += [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", "fsd-fast COMMAND --help lists a command's flags."])


def run(command: str, arguments: Sequence[str]) -> dict[str, float]:
    """Run one command and return its figures.

    Args:
        command: A key of ``COMMANDS``.
        arguments: Its flags, or one JSON file.

    Raises:
        ValueError, TypeError, OSError: Something is wrong with the input; nothing has been done.
    """
    return _prepared(command, arguments)()


def _prepared(command: str, arguments: Sequence[str]):  # type: ignore[no-untyped-def]
    module = load_command(command)
    from fsd_fast.commands.parsing import parse

    return module.prepare(*parse(command, arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit status: 0, or 2 where the input is refused.

    Args:
        arguments: The command line without the program's name; None takes the process's own.
    """
    from fsd_fast.commands.parsing import split_launcher_rank

    listed = split_launcher_rank(sys.argv[1:] if arguments is None else arguments)
    if not listed or listed[0] in ("-h", "--help"):
        print(_usage())
        return 0 if listed else 2
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        work = _prepared(listed[0], listed[1:])
    except (ValueError, TypeError, OSError) as error:
        print(f"fsd-fast {listed[0]}: error: {error}", file=sys.stderr)
        return 2
    figures = work()
    from fsd_fast.distributed import leave_processes

    leave_processes()
    if os.environ.get("RANK", "0") != "0":
        return 0
    for name, value in figures.items():
        print(f"{name} = {value:.6g}" if isinstance(value, float) else f"{name} = {value}")
    return 0
