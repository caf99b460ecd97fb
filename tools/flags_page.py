"""The page of flags, docs/flags.md, from the dataclasses of the commands: ``python -m tools.flags_page`` writes it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from fsd_fast.commands import COMMANDS
from fsd_fast.commands._teacher import CacheArguments
from fsd_fast.commands.flags import DataArguments
from fsd_fast.commands.parsing import Flag, command_flags
from fsd_fast.commands.training_flags import REFUSED, REFUSED_BY

PAGE = Path(__file__).resolve().parents[1] / "docs" / "flags.md"

_TYPES = {"bool": "true or false", "int": "integer", "float": "number", "text": "text", "object": "JSON"}
_REQUIRED = "**required**"

_INTRODUCTION = """# Flags

Every command prints its flags with `--help`. Dashes and underscores in a flag's name mean the same. A flag that is
true or false may stand without a value for true.

The first argument may be a JSON file of flags, keys without the dashes; flags that follow override it:

```
fsd-fast distill run.json --beta 2
fsd-fast distill runs/rte/student/fsd_arguments.json --output_dir runs/rte/again
```

The second line repeats a run from its own record. A flag of the wrong type or out of its range is refused before any
work, in one line that names the flag, the value and what was expected.

The tables are written by `python -m tools.flags_page`; a test compares them with the code."""

_TRAINING = """`teacher` and `distill` also take the flags of transformers'
[TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer). The flags below are our own, or have
another default than there. The learning rate of `distill` is {rate:g} by default. The optimizer is AdamW without
warm-up or weight decay, and gradients are clipped to norm 1."""

_VARIABLES = {
    "FSD_BACKEND": "`auto`, `triton`, `eager` or `reference`, where no backend is asked for",
    "FSD_CACHE_DIR": "folder of the built-in data and backbone; `~/.cache/fsd_fast` by default",
    "FSD_AUTOTUNE": "`1` times the neighbouring tile sizes of a Triton kernel at its first call",
    "FSD_DIRECT_LAUNCH": "`0` sends every launch of a Triton kernel through Triton's binder; see [GPU](gpu.md)",
    "FSD_DEBUG": "`1` prints the traceback of every error",
}


def is_inherited(flag: Flag) -> bool:
    """Whether a flag is one of ``TrainingArguments`` as transformers has it: same help text, same default."""
    theirs = {field.name: field for field in dataclasses.fields(TrainingArguments)}.get(flag.field.name)
    return (
        theirs is not None
        and theirs.default == flag.field.default
        and flag.field.metadata.get("help") == theirs.metadata.get("help")
    )


def listed_flags(command: str) -> list[Flag]:
    """The flags of a command that the page has a line for: all but those inherited as they are."""
    return [flag for flag in command_flags(command).values() if not is_inherited(flag)]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _default(flag: Flag) -> str:
    if flag.required:
        return _REQUIRED
    if flag.field.default_factory is not dataclasses.MISSING:
        return "see text"
    value: Any = flag.field.default
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _values(flag: Flag) -> str:
    values = flag.values
    if values.choices:
        return ", ".join(f"`{choice}`" for choice in values.choices if choice)
    words = " or ".join(_TYPES[kind] for kind in values.kinds if kind in _TYPES)
    if "list" in values.kinds:
        words = "one or more texts"
    bounds = str(values.numbers)
    return f"{words}, {bounds}" if bounds else words


def table(flags: list[Flag]) -> str:
    """A table of flags as Markdown."""
    lines = ["| flag | values | default | meaning |", "|---|---|---|---|"]
    for flag in flags:
        text = _cell(str(flag.field.metadata.get("help", "")))
        lines.append(f"| `--{flag.field.name}` | {_cell(_values(flag))} | {_default(flag)} | {text} |")
    return "\n".join(lines)


def _refusals() -> str:
    """The refused flags as Markdown, those with the same reason in one line."""
    flags_by_reason: dict[tuple[str, str], list[str]] = {}
    groups = [("`teacher`, `distill`", REFUSED), *((f"`{name}`", each) for name, each in REFUSED_BY.items())]
    for commands, refused in groups:
        for name, refusal in refused.items():
            flags_by_reason.setdefault((commands, refusal.reason), []).append(f"`--{name}`")
    lines = ["| flags | command | reason |", "|---|---|---|"]
    lines += [
        f"| {', '.join(names)} | {commands} | {_cell(reason)} |"
        for (commands, reason), names in flags_by_reason.items()
    ]
    return "\n".join(lines)


def page() -> str:
    """Return docs/flags.md."""
    data = [flag for flag in listed_flags("memory") if flag.group is DataArguments]
    parts = [
        _INTRODUCTION,
        "## Data",
        "For `teacher`, `memory`, `cache`, `distill` and `evaluate`.",
        table(data),
    ]
    cache = [flag for flag in listed_flags("memory") if flag.group is CacheArguments]
    parts += ["## Teacher cache", "For `memory` and `distill`.", table(cache)]
    shared = (DataArguments, CacheArguments)
    for command, text in COMMANDS.items():
        own = [
            flag
            for flag in listed_flags(command)
            if flag.group not in shared and not issubclass(flag.group, TrainingArguments)
        ]
        parts += [f"## {command}", f"{text[0].upper()}{text[1:]}.", table(own) if own else "It has no flags."]
    training = [flag for flag in listed_flags("teacher") if issubclass(flag.group, TrainingArguments)]
    rate = command_flags("distill")["learning_rate"].field.default
    parts += [
        "## Training",
        _TRAINING.format(rate=rate),
        table(training),
        "## Refused flags of TrainingArguments",
        "A flag that a command would not use is refused, with the reason.",
        _refusals(),
        "## Environment variables",
        "\n".join(
            [
                "| variable | meaning |",
                "|---|---|",
                *(f"| `{name}` | {text} |" for name, text in _VARIABLES.items()),
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"written: {PAGE}\n")


if __name__ == "__main__":
    main()
