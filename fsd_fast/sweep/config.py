"""The file of a sweep: tasks, seeds, settings of each command, and the runs to compare.

    tasks: [reviews, {task_name: rte, data_dir: glue/RTE, teacher: {learning_rate: 5e-5}}]
    seeds: [0, 1, 2]
    data: {max_seq_length: 64}
    teacher: {num_train_epochs: 3}
    cache: {layers: all}
    memory: {num_centroid: 100}
    distill: {student_layers: 3}
    runs:
      - method: [vkd, fsd_il]
      - {method: fsd_ilg, gamma_g: [1e-4, 1e-5]}

Every run is done for every task and seed; a task may have ``seeds`` of its own. A list inside an entry of ``runs``
stands for several runs, one for each combination of the entry's lists. What a flag takes is not known here; see
``fsd_fast.commands.sweep_plan``.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fsd_fast.untrusted import shorten

SECTIONS = ("data", "teacher", "cache", "memory", "distill")
"""Flags of every command that reads data, and those of one command each."""
_KEYS = ("tasks", "seeds", *SECTIONS, "runs")
_MAXIMUM_BYTES = 1 << 20
_MAXIMUM_RUNS = 10_000

Flags = dict[str, Any]


@dataclass(frozen=True)
class TaskEntry:
    """A task of a sweep.

    Attributes:
        name: Its name, as ``--task_name`` takes it.
        seeds: Seeds of the students.
        sections: Section -> flags, which go before those of the whole file.
    """

    name: str
    seeds: tuple[int, ...]
    sections: dict[str, Flags] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepFile:
    """What the file of a sweep says.

    Attributes:
        path: The file, for messages.
        tasks: The tasks.
        sections: Section -> flags; those that the file has.
        runs: Flags of each run, lists expanded.
    """

    path: str
    tasks: tuple[TaskEntry, ...]
    sections: dict[str, Flags]
    runs: tuple[Flags, ...]


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice in one mapping, where YAML's own loader takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {shorten(key)} occurs more than once",
                    problem_mark=node.value[place][0].start_mark,
                )
        return super().construct_mapping(node, deep)


def read_sweep(path: Path) -> SweepFile:
    """Read the file of a sweep.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no YAML, lacks a key, or holds an unknown one, which is named with the nearest one there is.
    """
    content = _load(path)
    _check_keys(content, _KEYS, str(path))
    for needed in ("tasks", "runs"):
        if not content.get(needed):
            raise ValueError(f"{path}: {needed}: expected a list with at least one entry, got none")
    seeds = _seeds(content.get("seeds", [42]), f"{path}: seeds")
    sweep = SweepFile(
        str(path),
        tuple(
            _task(entry, seeds, f"{path}: tasks[{place}]")
            for place, entry in enumerate(_list(content["tasks"], f"{path}: tasks"))
        ),
        {name: _mapping(content[name] or {}, f"{path}: {name}") for name in SECTIONS if name in content},
        _runs(_list(content["runs"], f"{path}: runs"), f"{path}: runs"),
    )
    total = sum(len(task.seeds) for task in sweep.tasks) * len(sweep.runs)
    if total > _MAXIMUM_RUNS:
        raise ValueError(f"{path}: expected at most {_MAXIMUM_RUNS:,} runs, got {total:,} or more")
    _check_different(sweep.runs, f"{path}: runs")
    return sweep


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    seeds = _list(value, where)
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"{where}: expected whole numbers from 0 to {2**32 - 1}, got {shorten(seed)}")
    _check_different(seeds, where)
    return tuple(seeds)


def _check_different(entries: Iterable[Any], where: str) -> None:
    seen = set()
    for entry in entries:
        text = json.dumps(entry, sort_keys=True, default=str)
        if text in seen:
            raise ValueError(f"{where}: expected different entries, got {shorten(entry)} twice")
        seen.add(text)


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the YAML file of a sweep")
    if (size := path.stat().st_size) > _MAXIMUM_BYTES:
        raise ValueError(f"{path}: expected a YAML file of at most {_MAXIMUM_BYTES:,} bytes, got {size:,}")
    try:
        content = yaml.load(path.read_bytes().decode("utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, got byte {error.object[error.start]:#x}") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise ValueError(f"{path}: expected YAML, got {line}{error.problem}") from None
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected YAML ({' '.join(str(error).split())})") from None
    return _mapping(content, str(path))


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where}: expected names with values, got {shorten(value)}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: expected a list with at least one entry, got {shorten(value)}")
    return value


def _check_keys(content: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where}: unknown key {shorten(key)}; expected {', '.join(known)}{hint}")


def _task(entry: Any, seeds: tuple[int, ...], where: str) -> TaskEntry:
    if isinstance(entry, str):
        return TaskEntry(entry, seeds)
    flags = dict(_mapping(entry, where))
    name = flags.pop("task_name", None)
    if not isinstance(name, str):
        raise ValueError(f"{where}: task_name: expected the name of a task, got {shorten(name)}")
    sections = {
        section: _mapping(flags.pop(section), f"{where}: {section}")
        for section in SECTIONS[1:]
        if section in flags
    }
    if "seeds" in flags:
        seeds = _seeds(flags.pop("seeds"), f"{where}: seeds")
    return TaskEntry(name, seeds, {**sections, "data": flags})


def _runs(entries: list[Any], where: str) -> tuple[Flags, ...]:
    """Every combination of the lists in each entry of ``runs``; one beyond the maximum is enough to refuse them."""
    combinations = itertools.chain.from_iterable(
        _combinations(_mapping(entry, f"{where}[{place}]"), f"{where}[{place}]")
        for place, entry in enumerate(entries)
    )
    return tuple(itertools.islice(combinations, _MAXIMUM_RUNS + 1))


def _combinations(entry: Flags, where: str) -> Iterator[Flags]:
    choices = [value if isinstance(value, list) else [value] for value in entry.values()]
    for name, values in zip(entry, choices, strict=True):
        if not values:
            raise ValueError(f"{where}: {name}: expected a value or a list of values, got an empty list")
    for chosen in itertools.product(*choices):
        yield dict(zip(entry, chosen, strict=True))
