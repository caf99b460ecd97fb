"""What a sweep does: its teachers, caches, memories and runs, each with its flags, checked before anything runs.

Runs that agree in what makes a teacher share one, and likewise its cache and its memory. Every job
has a name made of its task and of a digest of all its settings, so that the same settings find what was done before.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fsd_fast.commands._common import own_files
from fsd_fast.commands.flags import DataArguments
from fsd_fast.commands.parsing import check_values, command_flags
from fsd_fast.data import get_task
from fsd_fast.losses import METHODS
from fsd_fast.sweep.config import Flags, SweepFile, TaskEntry
from fsd_fast.sweep.statistics import TEACHER
from fsd_fast.untrusted import shorten

_SET_BY_SWEEP = {
    "output_dir": "the sweep has a folder for each run",
    "task_name": "tasks are listed under tasks",
    "teacher_model_name_or_path": "the sweep's own teacher, or the one named under teacher, is used",
    "memory_path": "the sweep builds the memory",
    "teacher_logits_dir": "the sweep has one for all runs",
    "fidelity": "a row says how far its student follows the teacher",
    "teacher_cache_dir": "a section cache makes one for all runs that share a teacher",
    "overwrite_output_dir": "finished runs are kept and others are continued",
    "resume_from_checkpoint": "finished runs are kept and others are continued",
    "allow_changes": "runs with other settings are other runs",
    "deepspeed": "a sweep starts one process for each run",
    "use_cpu": "it is a flag of the sweep itself",
}
# Set unless the file says otherwise: many short runs, whose figures go to the results.
_QUIET: Flags = {"save_strategy": "no", "eval_strategy": "no", "report_to": "none", "disable_tqdm": True}
_DATA_FLAGS = frozenset(field.name for field in fields(DataArguments))
EXISTING_TEACHER = "teacher_model_name_or_path"


@dataclass(frozen=True)
class PlannedJob:
    """A folder to fill: a teacher, its cache, its memory or a student.

    Attributes:
        name: Of the folder below its kind's.
        command: The command that fills it.
        flags: Its flags.
        needs: Names of the jobs before it.
    """

    name: str
    command: str
    flags: Flags
    needs: tuple[str, ...]


@dataclass(frozen=True)
class PlannedRun:
    """A student or a teacher, and what its row in the results says about it before it is trained.

    Attributes:
        job: What trains and scores it.
        task: Name of the task.
        method: Its method; "teacher" for a teacher.
        seed: Its seed.
        settings: Section -> flags, see ``fsd_fast.sweep.results.Row``.
    """

    job: PlannedJob
    task: str
    method: str
    seed: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """All of a sweep.

    Attributes:
        teachers: The teachers that the sweep trains.
        shared: Caches, where the file asks for them, and memories; each comes after what it needs.
        runs: The students, task by task and seed by seed: a sweep that is cut off has compared what it can.
        data: Different flags of the data, by name of the task, to look at the files before anything runs.
    """

    teachers: list[PlannedRun]
    shared: list[PlannedJob]
    runs: list[PlannedRun]
    data: list[tuple[str, Flags]]


def make_plan(sweep: SweepFile, folder: Path, *, use_cpu: bool) -> Plan:
    """Plan a sweep.

    Args:
        sweep: Its file.
        folder: Where everything goes.
        use_cpu: Whether to use the CPU even where there is a GPU.

    Raises:
        ValueError: A flag is unknown or its value is refused; the message names the place, and the nearest flag.
    """
    planner = _Planner(sweep, folder, use_cpu)
    runs = [
        planner.run(entry, f"{sweep.path}: tasks: {entry.name}", settings, seed)
        for entry in sweep.tasks
        for seed in entry.seeds
        for settings in sweep.runs
    ]
    named: dict[str, PlannedRun] = {}
    for run in runs:
        if run.job.name in named:
            raise ValueError(f"{sweep.path}: expected different runs, got {shorten(run.settings)} twice")
        named[run.job.name] = run
    return Plan(
        list(planner.teachers.values()), list(planner.shared.values()), runs, list(planner.data.values())
    )


class _Planner:
    def __init__(self, sweep: SweepFile, folder: Path, use_cpu: bool) -> None:
        self._sweep, self._folder = sweep, folder
        self._device: Flags = {"use_cpu": True} if use_cpu else {}
        self.teachers: dict[str, PlannedRun] = {}
        self.shared: dict[str, PlannedJob] = {}
        self.data: dict[str, tuple[str, Flags]] = {}

    def run(self, entry: TaskEntry, where: str, settings: Flags, seed: int) -> PlannedRun:
        """Plan one student, and the teacher and memory it needs unless they are planned already."""
        if "seed" in settings:
            raise ValueError(
                f"{self._sweep.path}: runs: seed: expected it to be left out: seeds are listed under seeds"
            )
        checked = _checked("runs", settings, f"{self._sweep.path}: runs")
        data = {"task_name": entry.name, **self._section("data", entry, where)}
        data |= {name: value for name, value in checked.items() if name in _DATA_FLAGS}
        if not own_files(DataArguments(**data)):
            data["task_name"] = get_task(entry.name).name
        task = str(data["task_name"])
        method = str(checked.pop("method", command_flags("distill")["method"].field.default))
        distill = self._section("distill", entry, where)
        distill |= {name: value for name, value in checked.items() if name not in _DATA_FLAGS}
        teacher, teacher_job, teacher_settings = self._teacher(entry, where, data)
        shown = {"data": data, "teacher": teacher_settings, "distill": distill}
        flags = {**_QUIET, **data, **distill, **self._device, "method": method, "seed": seed}
        teacher_flags = {"teacher_model_name_or_path": teacher}
        flags |= teacher_flags
        needs = [] if teacher_job is None else [teacher_job]
        cache_job, cache = self._cache(entry, where, data, teacher, needs)
        if cache_job is not None and (reads_cache(method) or needs_memory(method)):
            needs = [*needs, cache_job]
        if cache_job is not None and reads_cache(method):
            flags |= cache
            shown["cache"] = self._section("cache", entry, where)
        if needs_memory(method):
            memory_job, shown["memory"] = self._memory(entry, where, data, {**teacher_flags, **cache}, needs)
            flags["memory_path"] = str(self._folder / "memories" / memory_job)
            needs = [*needs, memory_job]
        name = f"{task}-{method}-seed{seed}-{_digest([shown, method, seed])}"
        output = str(self._folder / "runs" / name)
        flags |= {"output_dir": output, "resume_from_checkpoint": "auto"}
        flags["teacher_logits_dir"] = str(self._folder / "teacher_logits")
        self.data[_digest(data)] = (task, data)
        shown["data"] = {key: value for key, value in data.items() if key != "task_name"}
        return PlannedRun(PlannedJob(name, "distill", flags, tuple(needs)), task, method, seed, shown)

    def _teacher(self, entry: TaskEntry, where: str, data: Flags) -> tuple[str, str | None, Flags]:
        """Return the teacher's folder or name, the job that makes it if one does, and its settings."""
        given = {**self._sweep.sections.get("teacher", {}), **entry.sections.get("teacher", {})}
        if EXISTING_TEACHER in given:
            others = sorted(set(given) - {EXISTING_TEACHER})
            if others or not isinstance(given[EXISTING_TEACHER], str):
                raise ValueError(
                    f"{where}: teacher: {EXISTING_TEACHER}: expected an existing teacher and nothing else, got "
                    f"{shorten(others or given[EXISTING_TEACHER])}"
                )
            return given[EXISTING_TEACHER], None, given
        settings = {**_taken("teacher", data), **self._section("teacher", entry, where)}
        settings.setdefault(
            "model_name_or_path", command_flags("teacher")["model_name_or_path"].field.default
        )
        name = f"{data['task_name']}-teacher-{_digest(settings)}"
        output = str(self._folder / "teachers" / name)
        flags = {**_QUIET, **settings, **self._device, "output_dir": output, "resume_from_checkpoint": "auto"}
        seed = int(settings.get("seed", command_flags("teacher")["seed"].field.default))
        shown = {
            "data": {key: settings[key] for key in settings if key in _DATA_FLAGS - {"task_name"}},
            "teacher": {key: settings[key] for key in settings if key not in _DATA_FLAGS | {"seed"}},
        }
        job = PlannedJob(name, "teacher", flags, ())
        self.teachers.setdefault(name, PlannedRun(job, str(data["task_name"]), TEACHER, seed, shown))
        return output, name, settings

    def _cache(
        self, entry: TaskEntry, where: str, data: Flags, teacher: str, needs: list[str]
    ) -> tuple[str | None, Flags]:
        """Return the job that fills the teacher's cache, and the flags of those who read it; neither without one."""
        if "cache" not in self._sweep.sections:
            return None, {}
        settings = {**_taken("cache", data), **self._section("cache", entry, where)}
        name = f"{data['task_name']}-cache-{_digest([settings, teacher])}"
        flags = {**settings, **self._device, "teacher_model_name_or_path": teacher}
        flags["teacher_cache_dir"] = str(self._folder / "caches" / name)
        self.shared.setdefault(name, PlannedJob(name, "cache", flags, tuple(needs)))
        return name, {key: flags[key] for key in ("teacher_cache_dir", "teacher_cache_dtype") if key in flags}

    def _memory(
        self, entry: TaskEntry, where: str, data: Flags, teacher: Flags, needs: list[str]
    ) -> tuple[str, Flags]:
        """Return the job that builds the memory, and its settings."""
        settings = {**_taken("memory", data), **self._section("memory", entry, where)}
        name = f"{data['task_name']}-memory-{_digest([settings, teacher])}"
        flags = {**settings, **self._device, **teacher}
        flags["output_dir"] = str(self._folder / "memories" / name)
        self.shared.setdefault(name, PlannedJob(name, "memory", flags, tuple(needs)))
        return name, self._section("memory", entry, where)

    def _section(self, section: str, entry: TaskEntry, where: str) -> Flags:
        """A section's flags, those of the task before those of the file."""
        return {
            **_checked(section, self._sweep.sections.get(section, {}), f"{self._sweep.path}: {section}"),
            **_checked(section, entry.sections.get(section, {}), f"{where}: {section}"),
        }


def _checked(section: str, flags: Flags, where: str) -> Flags:
    """Check the flags of a section, or of an entry of ``runs``."""
    for name in flags:
        reason = _SET_BY_SWEEP.get(name)
        if section == "distill" and name in ("method", "seed"):
            reason = "methods are listed under runs, seeds under seeds"
        if reason is not None:
            raise ValueError(f"{where}: {name}: expected it to be left out: {reason}")
    values = check_values(section if section in ("teacher", "cache", "memory") else "distill", flags, where)
    other = sorted(set(values) - _DATA_FLAGS)
    if section == "data" and other:
        raise ValueError(f"{where}: expected flags of the data, got {', '.join(other)}")
    return values


def needs_memory(method: str) -> bool:
    """Whether a method reads a teacher memory."""
    return "memory_path" in METHODS[method].settings


def reads_cache(method: str) -> bool:
    """Whether a method reads nothing of the teacher but logits and hidden states, which a cache holds."""
    return METHODS[method].needs_teacher and "minilm_relation_heads" not in METHODS[method].settings


def _taken(command: str, data: Flags) -> Flags:
    """Those flags of the data that a command does not refuse."""
    flags = command_flags(command)
    return {name: value for name, value in data.items() if flags[name].refusal is None}


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
