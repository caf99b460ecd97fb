"""Flags into dataclasses: from the command line, or from a JSON file and the flags that follow it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from transformers import TrainingArguments

from fsd_fast.commands import load_command
from fsd_fast.commands.deepspeed_config import check_config
from fsd_fast.commands.launcher import check_deepspeed, check_launch
from fsd_fast.commands.training_checks import check_optimisation, check_training
from fsd_fast.commands.training_flags import CHOICES, RANGES, REFUSED_BY, Refusal, refusal_of
from fsd_fast.commands.values import FlagType, shown
from fsd_fast.training.checkpoints import check_output_dir, check_writable
from fsd_fast.training.record import Record
from fsd_fast.untrusted import read_json_object

_METAVARS = {"bool": "BOOL", "int": "N", "float": "X", "object": "JSON"}


@dataclass(frozen=True)
class Flag:
    """A dataclass field as a flag."""

    field: dataclasses.Field[Any]
    values: FlagType
    group: type
    refusal: Refusal | None

    @property
    def required(self) -> bool:
        """Whether the field has no default."""
        return self.field.default is dataclasses.MISSING and self.field.default_factory is dataclasses.MISSING


@dataclass(frozen=True)
class Given:
    """A value, and the name under which its source gave it, as in "--beta" or "run.json: beta"."""

    value: Any
    name: str


def command_flags(command: str) -> dict[str, Flag]:
    """Return the flags of a command by name, also those that it refuses."""
    flags: dict[str, Flag] = {}
    for group in load_command(command).ARGUMENTS:
        inherited = (
            {field.name for field in dataclasses.fields(TrainingArguments)}
            if issubclass(group, TrainingArguments)
            else set()
        )
        types = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            if field.init:
                name, choices = field.name, field.metadata.get("choices")
                flag_type = FlagType.of(
                    types[name],
                    field.metadata.get("numbers") or RANGES.get(name),
                    tuple(choices) if choices else CHOICES.get(name) if name in inherited else None,
                )
                refused = REFUSED_BY.get(command, {}).get(name)
                refusal = refusal_of(name, command) if name in inherited else refused
                flags[name] = Flag(field, flag_type, group, refusal)
    return flags


def parse(command: str, arguments: Sequence[str]) -> tuple[Any, ...]:
    """Parse a command's flags into its dataclasses.

    The first argument may be a JSON file: flags as an object, or the record of a run, which repeats it. Flags that
    follow override the file. Or it may be the value of the command's positional flag.

    Args:
        command: A key of ``COMMANDS``.
        arguments: What follows the command on the command line.

    Returns:
        One instance for each dataclass of the command.

    Raises:
        ValueError: A flag is unknown, missing, or its value is of another type or out of range; the file is no JSON
            object of flags; or ``--deepspeed`` is used without a launcher.
        OSError: The JSON file cannot be read, or the output folder cannot be written or holds a run already.
    """
    flags = command_flags(command)
    listed = list(arguments)
    given: dict[str, Given] = {}
    if listed and listed[0].endswith(".json"):
        given = _from_file(command, listed.pop(0), flags)
    elif listed and not listed[0].startswith("-"):
        given = {name: Given(listed.pop(0), name) for name in _positional(flags)}
    given |= _from_command_line(command, listed, flags)
    missing = [f"--{name}" for name, flag in flags.items() if flag.required and name not in given]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given; see fsd-fast {command} --help")
    values = {name: _checked(flags[name], entry) for name, entry in given.items()}
    groups = load_command(command).ARGUMENTS
    # All of it before the dataclasses are made: making TrainingArguments starts the process group.
    check_launch(command)
    if values.get("deepspeed") is not None:
        check_deepspeed(command)
    _check_folders(values, flags)
    if any(issubclass(group, TrainingArguments) for group in groups):
        check_training(values, {name: entry.name for name, entry in given.items()})
        _check_deepspeed_config(values, flags)
        check_output_dir(
            values["output_dir"],
            values.get("resume_from_checkpoint"),
            bool(values.get("overwrite_output_dir")),
        )
    made = tuple(
        group(**{name: value for name, value in values.items() if flags[name].group is group})
        for group in groups
    )
    for instance in made:
        if isinstance(instance, TrainingArguments):
            check_optimisation(instance)
    return made


def check_values(command: str, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check some flags of a command that come from another kind of file than the command itself reads.

    Args:
        command: A key of ``COMMANDS``.
        values: Flag name -> JSON value, or the text that a command line would have.
        where: What messages begin with: the file, and the place in it.

    Returns:
        The values, converted to the flags' types.

    Raises:
        ValueError: A flag is unknown, and the nearest one is named; or its value is of another type or out of range.
    """
    flags = command_flags(command)
    _refuse_unknown(values, flags, command, where)
    checked = {}
    for name, value in values.items():
        # YAML takes 1e-4 for text.
        typed = flags[name].values.from_text([value]) if isinstance(value, str) else value
        checked[name] = _checked(flags[name], Given(typed, f"{where}: {name}"))
    return checked


def _refuse_unknown(values: Mapping[str, Any], flags: dict[str, Flag], command: str, where: str) -> None:
    unknown = sorted(set(values) - set(flags))
    if unknown:
        raise ValueError(
            f"{where}: unknown keys {', '.join(unknown)}{_nearest(unknown, flags)}; see fsd-fast {command} --help"
        )


def _positional(flags: dict[str, Flag]) -> list[str]:
    return [name for name, flag in flags.items() if flag.field.metadata.get("positional")]


def _from_file(command: str, file: str, flags: dict[str, Flag]) -> dict[str, Given]:
    values = read_json_object(Path(file), wide_integers=True)
    if Record.is_record(values):
        record = Record.from_json(values, file)
        if record.command != command:
            raise ValueError(f"{file}: expected the record of {command!r}, got the one of {record.command!r}")
        values = record.arguments
    _refuse_unknown(values, flags, command, file)
    resume = values.get("resume_from_checkpoint")
    if isinstance(resume, bool):  # what JSON makes of "--resume_from_checkpoint true"
        values["resume_from_checkpoint"] = "last" if resume else None
    return {name: Given(value, f"{file}: {name}") for name, value in values.items()}


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print every flag there is, the error below them, and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _from_command_line(command: str, arguments: list[str], flags: dict[str, Flag]) -> dict[str, Given]:
    known, unknown = _parser(command, flags).parse_known_args([_underscored(word) for word in arguments])
    if unknown:
        names = [word.split("=")[0].lstrip("-") for word in unknown if word.startswith("--")]
        raise ValueError(
            f"unknown arguments {' '.join(unknown)}{_nearest(names, flags, '--')}; see fsd-fast {command} --help"
        )
    return {
        name: Given(flags[name].values.from_text(_listed(words)), f"--{name}")
        for name, words in vars(known).items()
    }


def _listed(words: str | list[str]) -> list[str]:
    # argparse takes the "--" of "--name=--" for the end of the flags.
    return [words] if isinstance(words, str) else words or ["--"]


def _underscored(word: str) -> str:
    """Spell a flag with underscores: ``--learning-rate=1`` becomes ``--learning_rate=1``."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def _nearest(unknown: Sequence[str], flags: dict[str, Flag], dashes: str = "") -> str:
    found = [f"{dashes}{near}" for name in unknown for near in difflib.get_close_matches(name, flags, n=1)]
    return f"; did you mean {', '.join(found)}?" if found else ""


def _parser(command: str, flags: dict[str, Flag]) -> _Parser:
    first = _positional(flags)
    parser = _Parser(
        prog=f"fsd-fast {command}",
        usage=f"fsd-fast {command} [{first[0].upper() if first else 'FILE.json'}] [flags]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    sections: dict[str, Any] = {}
    for name, flag in flags.items():
        title = (flag.group.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        if title not in sections:
            sections[title] = parser.add_argument_group(title)
        switch = flag.values.kinds == ("bool",)
        sections[title].add_argument(
            f"--{name}",
            nargs="?" if switch else "+" if flag.values.takes_several else None,
            metavar=_METAVARS.get(flag.values.kinds[0], "TEXT") if flag.values.kinds else None,
            help=argparse.SUPPRESS if flag.refusal else _help(flag),
            **({"const": "true"} if switch else {}),
        )
        if switch and flag.field.default is True:
            sections[title].add_argument(
                f"--no_{name}", dest=name, action="store_const", const="false", help=argparse.SUPPRESS
            )
    return parser


def _help(flag: Flag) -> str:
    text = str(flag.field.metadata.get("help", ""))
    if flag.values.choices:
        text += f" One of {', '.join(filter(None, flag.values.choices))}."
    if flag.field.default_factory is not dataclasses.MISSING:
        text += f" (default: {flag.field.default_factory()})"
    elif not flag.required and flag.field.default is not None:
        default = flag.field.default
        text += f" (default: {getattr(default, 'value', default)})"
    return text.replace("%%", "%").replace("%", "%%")


def _checked(flag: Flag, given: Given) -> Any:
    if flag.refusal and given.value != flag.refusal.accepted:
        raise ValueError(f"{given.name}: {flag.refusal.reason}; got {shown(given.value)}")
    try:
        return flag.values.check(given.value)
    except ValueError as error:
        raise ValueError(f"{given.name}: {error}") from None


def _check_deepspeed_config(values: dict[str, Any], flags: dict[str, Flag]) -> None:
    given = values.get("deepspeed")
    if given is None:
        return
    content = given if isinstance(given, dict) else read_json_object(Path(given))
    where = "--deepspeed" if isinstance(given, dict) else str(given)
    check_config(content, lambda name: values.get(name, flags[name].field.default), where)


def _check_folders(values: dict[str, Any], flags: dict[str, Flag]) -> None:
    for name, flag in flags.items():
        value = values.get(name, None if flag.required else flag.field.default)
        if value is not None and flag.field.metadata.get("writes"):
            check_writable(name, os.path.expanduser(value))
