"""Jobs that need each other, done by processes that may die.

A worker is a fresh interpreter that does one job after the other, so that the libraries are imported once. What a job
prints goes to its log. A job that raises fails alone. A worker that dies takes its job with it and is replaced. Workers
end with the process that started them, however that one ends.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

_SPAWN = multiprocessing.get_context("spawn")
_SECONDS_TO_END = 30.0

Work = Callable[[Any], dict[str, Any]]
"""Does a job: takes its payload and returns its result, both made of what JSON can hold."""


@dataclass(frozen=True)
class Job:
    """Something to do.

    Attributes:
        name: Its name; names are unique.
        payload: What it is done with; made of what JSON can hold.
        log: File that what it prints is appended to.
        needs: Names of the jobs that must have ended well before it starts.
    """

    name: str
    payload: Any
    log: Path
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a job ended: with a result, or with an error's message."""

    job: Job
    result: dict[str, Any] | None
    error: str | None


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    slot: int
    job: Job | None = None


@dataclass
class _Waiting:
    """The jobs that have not started."""

    jobs: list[Job]
    ended_well: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)

    def take_ready(self) -> Job | None:
        for job in self.jobs:
            if all(need in self.ended_well for need in job.needs):
                self.jobs.remove(job)
                return job
        return None

    def take_hopeless(self) -> tuple[Job, str] | None:
        for job in self.jobs:
            for need in job.needs:
                if need in self.failed:
                    self.jobs.remove(job)
                    self.failed.add(job.name)
                    return job, need
        return None


def run_jobs(jobs: Sequence[Job], work: Work, environments: Sequence[Mapping[str, str]]) -> Iterator[Outcome]:
    """Do jobs, several at a time, each after those that it needs.

    Args:
        jobs: In the order in which they are preferred.
        work: A function at the top level of a module: workers import it.
        environments: Environment variables of each worker, one mapping for each.

    Yields:
        How each job ended, as it ends. A job that needs one that failed fails too, without being started.

    Raises:
        ValueError: A job needs one that is not there, or jobs need each other in a circle.
    """
    known = {job.name for job in jobs}
    for job in jobs:
        if missing := [need for need in job.needs if need not in known]:
            raise ValueError(f"{job.name}: expected jobs of this list in needs, got {missing[0]}")
    waiting, workers = _Waiting(list(jobs)), []
    try:
        for slot in range(min(len(environments), len(jobs))):
            workers.append(_start(work, slot, environments[slot]))
        while waiting.jobs or any(worker.job for worker in workers):
            while (hopeless := waiting.take_hopeless()) is not None:
                job, need = hopeless
                yield Outcome(job, None, f"not started: it needs {need}, which failed")
            for worker in workers:
                if worker.job is None and (ready := waiting.take_ready()) is not None:
                    worker.job = ready
                    worker.connection.send_bytes(
                        json.dumps({"payload": ready.payload, "log": str(ready.log)}).encode()
                    )
            busy = [worker for worker in workers if worker.job is not None]
            if not busy:
                if waiting.jobs:
                    raise ValueError(f"needs: {', '.join(job.name for job in waiting.jobs)} need each other")
                return
            wait([worker.connection for worker in busy])
            for place, worker in enumerate(workers):
                if worker.job is None or not worker.connection.poll():
                    continue
                outcome = _outcome(worker)
                (waiting.failed if outcome.result is None else waiting.ended_well).add(outcome.job.name)
                if not worker.process.is_alive():
                    workers[place] = _start(work, worker.slot, environments[worker.slot])
                yield outcome
    finally:
        _stop(workers)


def _start(work: Work, slot: int, environment: Mapping[str, str]) -> _Worker:
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(theirs, work), daemon=False)
    before = {name: os.environ.get(name) for name in environment}
    # Here and not in the worker: libraries read it when they are imported, which the worker does before it serves.
    os.environ.update(environment)
    try:
        process.start()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    theirs.close()
    return _Worker(process, ours, slot)


def _outcome(worker: _Worker) -> Outcome:
    job = worker.job
    assert job is not None
    worker.job = None
    try:
        answer = json.loads(worker.connection.recv_bytes())
    except (EOFError, OSError):
        worker.process.join(_SECONDS_TO_END)
        status = worker.process.exitcode
        how = f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"
        reason = "; the system may have run out of memory" if status == -signal.SIGKILL else ""
        return Outcome(job, None, f"its process ended with {how}{reason}; see {job.log}")
    return Outcome(job, answer.get("result"), answer.get("error"))


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
        if worker.job is not None and worker.process.is_alive():
            worker.process.terminate()
    end = time.monotonic() + _SECONDS_TO_END
    for worker in workers:
        worker.process.join(max(0.0, end - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _serve(connection: Connection, work: Work) -> None:
    """Do the jobs that come through a connection until it is closed."""
    # An interrupt reaches every process of the terminal; the one that started this one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        _print_to(Path(job["log"]))
        try:
            answer: dict[str, Any] = {"result": work(job["payload"])}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(BrokenPipeError):
            connection.send_bytes(json.dumps(answer).encode())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _print_to(log: Path) -> None:
    """Let everything this process prints, also what C libraries print, go to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
