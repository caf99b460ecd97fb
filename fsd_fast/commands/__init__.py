"""The commands of ``fsd-fast``, a module each.

A command's module holds ``ARGUMENTS``, the dataclasses of its flags, and ``prepare``, which takes one instance of each,
loads and checks everything, so that bad input is refused before any work is done, and returns the work: a callable
that does it and gives its figures.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

COMMANDS = {
    "fetch": "get the built-in data and backbone",
    "teacher": "fine-tune a classifier on the hard labels",
    "memory": "cluster the teacher's features into its memory",
    "cache": "keep the teacher's logits and hidden states of the training set",
    "distill": "train a student next to its teacher",
    "evaluate": "score a saved classifier",
    "predict": "write a classifier's predictions for a test set",
    "sweep": "many runs from one file, and a table of results",
    "table": "mean, deviation and differences of a sweep's results",
    "analyze": "compare a student with its teacher, layer by layer, in a report",
    "demo": "all of it on the built-in task, with a table at the end",
    "env": "versions, devices and backends of this machine",
}
"""Command name -> what it does. Modules are imported when their command is run: --help should not load torch."""


def load_command(name: str) -> ModuleType:
    """Import the module of a command.

    Raises:
        ValueError: There is no such command.
    """
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown command {name!r}; {hint}expected one of {', '.join(COMMANDS)}")
    return importlib.import_module(f"fsd_fast.commands.{name}")


def prepare(command: str, arguments: Sequence[str]) -> Callable[[], dict[str, float]]:
    """Parse and check a command's arguments, and return its work, which gives its figures.

    Args:
        command: A key of ``COMMANDS``.
        arguments: Its flags, or a JSON file of them and flags that override it.

    Raises:
        ValueError, TypeError, OSError: Something is wrong with the input; nothing has been done.
    """
    module = load_command(command)
    if not module.ARGUMENTS and not arguments:
        return module.prepare()  # nothing to parse, so transformers need not be imported
    from fsd_fast.commands.parsing import parse

    return module.prepare(*parse(command, arguments))


def run(command: str, arguments: Sequence[str]) -> dict[str, float]:
    """Prepare a command, do its work, and return its figures; arguments and errors as for ``prepare``."""
    return prepare(command, arguments)()
