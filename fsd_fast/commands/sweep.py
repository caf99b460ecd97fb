"""``fsd-fast sweep``: many runs from one file, and a row of results for each."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fsd_fast.commands._common import Work, read_task
from fsd_fast.commands.flags import DataArguments, flag
from fsd_fast.commands.sweep_plan import Plan, PlannedJob, PlannedRun, make_plan
from fsd_fast.commands.values import Range
from fsd_fast.data import HELDOUT, Task
from fsd_fast.files import FolderLock, exclusive_folder, write_atomically, write_json
from fsd_fast.memory.teacher_memory import METADATA_FILE
from fsd_fast.metrics import main_metric_first
from fsd_fast.sweep.config import read_sweep
from fsd_fast.sweep.results import RESULTS_FILE, Row, read_results, write_results
from fsd_fast.sweep.workers import Job, Outcome, run_jobs
from fsd_fast.training.record import RECORD_FILE, read_record

DONE_FILE = "done.json"
"""Written into the folder of a shared teacher when it is finished; its weights alone may be of an earlier try."""


@dataclass
class SweepArguments:
    """The ``sweep`` command: tasks, seeds and settings from a file, one run for each combination."""

    config_file: str = flag("The YAML file that says what is run.", positional=True)
    output_dir: str = flag(
        "Folder for results.csv, the runs, and the teachers and memories they share.", writes=True
    )
    jobs: int = flag(
        "Runs that go on at the same time, each in a process.", 1, numbers=Range(minimum=1, maximum=256)
    )
    devices: str | None = flag(
        "GPUs that the processes are spread over, as '0,1,2'. Default: all that are there.", None
    )
    use_cpu: bool = flag("Use the CPU even where there is a GPU.", False)
    keep_models: bool = flag("Keep the weights of the students once they have been scored.", True)


ARGUMENTS = (SweepArguments,)


def prepare(arguments: SweepArguments) -> Work:
    """Check the whole file, and return the work that does what is not done yet."""
    environments = _environments(arguments)
    sweep = read_sweep(Path(arguments.config_file))
    # Runs go on in other processes, and by name: their folders must not depend on where this one was started.
    folder = Path(arguments.output_dir).absolute()
    plan = make_plan(sweep, folder, use_cpu=arguments.use_cpu)
    tasks = {name: read_task(DataArguments(**flags))[0] for name, flags in plan.data}
    results = folder / RESULTS_FILE
    rows = read_results(results) if results.exists() else []
    lock = exclusive_folder(folder, "output_dir")
    try:
        # Another sweep may have ended since.
        rows = read_results(results) if results.exists() else rows
        write_atomically(folder / "sweep.yaml", Path(arguments.config_file).read_bytes())
    except BaseException:
        lock.release()
        raise
    return _Sweep(plan, tasks, folder, rows, environments, lock, keep_models=arguments.keep_models).work


def _environments(arguments: SweepArguments) -> list[dict[str, str]]:
    """Environment of each process: its GPU, or its share of the CPU's cores."""
    if arguments.devices is not None:
        devices = arguments.devices.split(",")
        if arguments.use_cpu or not all(device.strip().isdecimal() for device in devices):
            expected = "none with --use_cpu true" if arguments.use_cpu else "numbers of GPUs, as '0,1'"
            raise ValueError(f"devices: expected {expected}, got {arguments.devices!r}")
        count = torch.cuda.device_count()
        beyond = [device for device in devices if int(device) >= count]
        if beyond:
            raise ValueError(
                f"devices: expected numbers below the {count} GPUs of this machine, got {beyond[0]}"
            )
    else:
        devices = [] if arguments.use_cpu else [str(number) for number in range(torch.cuda.device_count())]
    threads = max(1, torch.get_num_threads() // arguments.jobs)
    return [
        {"OMP_NUM_THREADS": str(threads)}
        | ({"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)].strip()} if devices else {})
        for slot in range(arguments.jobs)
    ]


def do_command(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Do the command of a job in a worker.

    Args:
        payload: "command", and "file", a JSON file of its flags.

    Returns:
        "figures" of the command; "seconds" that it took.

    Raises:
        RuntimeError: It was refused or failed; the message is one line.
    """
    from fsd_fast.commands import run
    from fsd_fast.commands.failures import message_of

    start = time.perf_counter()
    command, file = payload["command"], payload["file"]
    print(f"== fsd-fast {command} {file}", flush=True)
    try:
        figures = run(command, [file])
    except Exception as error:
        raise RuntimeError(f"{command}: {message_of(error)}") from error
    return {"figures": figures, "seconds": time.perf_counter() - start}


class _Sweep:
    """A sweep whose file has been checked and whose folder is locked."""

    def __init__(
        self,
        plan: Plan,
        tasks: dict[str, Task],
        folder: Path,
        rows: list[Row],
        environments: list[dict[str, str]],
        lock: FolderLock,
        *,
        keep_models: bool,
    ) -> None:
        self._plan, self._tasks, self._folder, self._rows = plan, tasks, folder, rows
        self._environments, self._lock, self._keep_models = environments, lock, keep_models
        finished = {row.run for row in rows}
        self._runs = {run.job.name: run for run in plan.runs if run.job.name not in finished}

    def work(self) -> dict[str, float]:
        """Do what is not done; return how much there was."""
        with self._lock:
            jobs = self._jobs()
            kept = len(self._plan.runs) - len(self._runs)
            print(f"sweep: {len(self._runs)} runs to do, {kept} finished before", flush=True)
            failures: list[str] = []
            for number, outcome in enumerate(run_jobs(jobs, do_command, self._environments), 1):
                line = self._finish(outcome)
                print(f"[{number}/{len(jobs)}] {outcome.job.name}: {line}", flush=True)
                if outcome.error is not None:
                    failures.append(outcome.job.name)
        if failures:
            raise RuntimeError(
                f"{len(failures)} of {len(jobs)} jobs failed: {', '.join(failures[:5])}"
                f"{', ...' if len(failures) > 5 else ''}; their logs are in {self._folder / 'logs'}, and the same "
                "command does them again"
            )
        return {"sweep_runs": float(len(self._runs)), "sweep_runs_finished_before": float(kept)}

    def _jobs(self) -> list[Job]:
        """The jobs that are left: the runs without a row, each after the unfinished shared jobs that it needs."""
        shared = [*(teacher.job for teacher in self._plan.teachers), *self._plan.shared]
        unfinished = {job.name: job for job in shared if not self._is_done(job)}
        planned: dict[str, PlannedJob] = {}
        for run in self._runs.values():
            planned |= {name: job for name, job in unfinished.items() if name in run.job.needs}
            planned[run.job.name] = run.job
        return [
            Job(
                job.name,
                {"command": job.command, "file": str(self._write(job))},
                self._folder / "logs" / f"{job.name}.log",
                tuple(need for need in job.needs if need in unfinished),
            )
            for job in planned.values()
        ]

    def _write(self, job: PlannedJob) -> Path:
        path = self._folder / "flags" / f"{job.name}.json"
        write_json(path, job.flags)
        return path

    def _is_done(self, job: PlannedJob) -> bool:
        """Whether a teacher or a memory is finished. A memory's own record is written last."""
        if job.command == "cache":  # which looks for itself what is there
            return False
        folder = Path(job.flags["output_dir"])
        return (folder / DONE_FILE).is_file() or (folder / METADATA_FILE).is_file()

    def _finish(self, outcome: Outcome) -> str:
        """Write down what a job came to; return a line about it."""
        if outcome.result is None:
            return f"failed: {outcome.error}"
        seconds = f"{outcome.result['seconds']:.0f} s"
        teachers = {teacher.job.name: teacher for teacher in self._plan.teachers}
        run = self._runs.get(outcome.job.name) or teachers.get(outcome.job.name)
        if run is None:  # a cache or a memory
            return seconds
        row = row_of(run, self._tasks[run.task], outcome.result["figures"])
        self._rows = [*(each for each in self._rows if each.run != row.run), row]
        write_results(self._folder / RESULTS_FILE, self._rows)
        folder = Path(run.job.flags["output_dir"])
        if outcome.job.name in teachers:
            write_json(folder / DONE_FILE, outcome.result)
        elif not self._keep_models:
            _remove_weights(folder)
        return f"{row.score:.4f}, {seconds}"


def row_of(run: PlannedRun, task: Task, figures: Mapping[str, float]) -> Row:
    """Make the row of a finished run.

    Args:
        run: What was planned.
        task: Its task.
        figures: Those of its command.
    """
    metric = main_metric_first(task)[0]
    heldout = figures.get(f"eval_{HELDOUT}_{metric}")
    splits = [split for split in task.eval_splits if split != HELDOUT]
    dev = f"eval_{splits[0]}" if heldout is not None or len(splits) > 1 else "eval"
    output = Path(run.job.flags["output_dir"])
    record = read_record(output / RECORD_FILE)
    facts = {name: value for name, value in record.facts.items() if name != "versions"}
    # Folders of this sweep as seen from its own, so that results can be shown elsewhere.
    folder = output.parents[1]
    arguments = {name: _seen_from(folder, value) for name, value in record.arguments.items()}
    return Row(
        task=run.task,
        method=run.method,
        seed=run.seed,
        train_samples=int(figures["train_samples"]),
        score=figures[f"{dev}_{metric}"],
        heldout_score=heldout,
        agreement=figures.get(f"{dev}_teacher_agreement"),
        kl=figures.get(f"{dev}_teacher_kl"),
        seconds=figures["train_runtime"],
        settings=run.settings,
        scores={name: value for name, value in figures.items() if name.startswith("eval_")},
        record={"arguments": arguments, "facts": facts},
        versions=record.facts["versions"],
        run=run.job.name,
    )


def _seen_from(folder: Path, value: Any) -> Any:
    """A path below a folder as seen from there; everything else as it is."""
    if isinstance(value, str) and value.startswith(f"{folder}/"):
        return str(Path(value).relative_to(folder))
    return value


def _remove_weights(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), *folder.glob("checkpoint-*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
