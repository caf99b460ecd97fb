"""The commands of ``fsd-fast``, a module each.

A command's module holds ``ARGUMENTS``, the dataclasses of its flags, and ``prepare``, which takes one instance of each,
loads and checks everything, so that bad input is refused before any work is done, and returns the work: a callable
that does it and gives its figures.
"""

from __future__ import annotations

import difflib
import importlib
from types import ModuleType

COMMANDS = {
    "fetch": "get the built-in data and backbone",
    "teacher": "fine-tune a classifier on the hard labels",
    "memory": "cluster the teacher's features into its memory",
    "distill": "train a student next to its teacher",
    "evaluate": "score a saved classifier",
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
