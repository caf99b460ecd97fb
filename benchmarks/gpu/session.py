"""Runs stages one after another, each within its own time, and keeps what they find in one file.

The file is written again whenever a stage has found something new, so that whatever ends the session leaves the figures
that there were. A second session in the same folder runs the stages that have not ended well.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import targets
from benchmarks.gpu.stages import Figures, Plan, Stage
from benchmarks.paths import ROOT
from benchmarks.speed import results
from benchmarks.tables import markdown

SCHEMA = 1
OK, FAILED, OUT_OF_TIME, RUNNING, LEFT_OUT = "ok", "failed", "out of time", "running", "left out"

# A stage with less time than this does not begin: importing torch takes as long.
_SHORTEST = 5.0
_POLL = 1.0
_PATIENCE = 5.0


class Session:
    """The stages, and what they have found so far.

    Args:
        output: Folder of ``session.json``, ``session.md`` and ``session.log``.
        plan: How the stages run.
        environment: Device, commit and versions.

    Raises:
        ValueError: The folder holds a session of another device, commit or plan, or a file that is no session.
    """

    def __init__(self, output: Path, plan: Plan, environment: dict[str, Any]) -> None:
        self.output, self.plan = output, plan
        self.file, self.log = output / "session.json", output / "session.log"
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "environment": environment,
            "quick": plan.quick,
            "stages": {},
            "targets": [],
        }
        if self.file.is_file():
            self.content["stages"] = self._earlier(environment)
        output.mkdir(parents=True, exist_ok=True)

    def _earlier(self, environment: dict[str, Any]) -> dict[str, Any]:
        try:
            earlier = json.loads(self.file.read_text(encoding="utf-8"))
            earlier_environment, stages = earlier["environment"], earlier["stages"]
            if earlier["schema"] != SCHEMA:
                raise KeyError("schema")
            same = earlier["quick"] == self.plan.quick
            for name in ("device", "commit"):
                same = same and earlier_environment[name] == environment[name]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{self.file}: expected a session of schema {SCHEMA} ({error!r})") from error
        if not same:
            raise ValueError(
                f"--output: expected an empty folder or a session of {environment['device']}, commit "
                f"{environment['commit']}, quick {self.plan.quick}; {self.file} is of "
                f"{earlier_environment['device']}, {earlier_environment['commit']}, {earlier['quick']}"
            )
        return dict(stages)

    def ended_well(self, name: str) -> bool:
        """Whether a stage has ended with status 0, in this session or an earlier one."""
        return bool(self.content["stages"].get(name, {}).get("status") == OK)

    def figures(self) -> dict[str, Figures]:
        """What each stage has found."""
        return {name: stage["figures"] for name, stage in self.content["stages"].items()}

    def run(self, stages: Sequence[Stage], minutes: float) -> None:
        """Run stages in order until the time is up; a stage's own time is its share of nine minutes."""
        end = time.monotonic() + 60 * minutes
        for stage in stages:
            left = end - time.monotonic()
            limit = min(stage.seconds * max(1.0, minutes / 9), left)
            reason = stage.missing() or ("no time is left" if left < _SHORTEST else "")
            if reason:
                self._note(stage, LEFT_OUT, reason, {}, 0.0)
            else:
                self._run(stage, limit)
            noted = self.content["stages"][stage.name]
            print(f"{stage.name}: {noted['status']}, {noted['seconds']:.0f} s. {noted['reason']}", flush=True)

    def _run(self, stage: Stage, limit: float) -> None:
        """Run one stage; its figures are kept as they come."""
        with tempfile.TemporaryDirectory() as folder, self.log.open("ab") as log:
            figures = Path(folder) / "figures.json"
            command = list(stage.command(self.plan, figures))
            log.write(f"\n== {stage.name}: {' '.join(command)}\n".encode())
            log.flush()
            begin, seen = self.log.stat().st_size, time.monotonic()
            found: Figures = {}
            process = subprocess.Popen(
                command, cwd=ROOT, env=_environment(), stdout=log, stderr=log, start_new_session=True
            )
            status: int | None = None
            try:
                while status is None and time.monotonic() - seen < limit:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        status = process.wait(min(_POLL, limit))
                    new = self._read(stage, figures, begin)
                    if new != found:
                        found = new
                        self._note(stage, RUNNING, "", found, time.monotonic() - seen)
            finally:
                _end(process)
            found = self._read(stage, figures, begin)
        spent = time.monotonic() - seen
        if status is None:
            self._note(stage, OUT_OF_TIME, f"ended after its {limit:.0f} s", found, spent)
        elif status == 0:
            self._note(stage, OK, "", found, spent)
        else:
            reason = f"exit status {status}: {self._last_line(begin)}"
            self._note(stage, FAILED, reason, found, spent)

    def _output_since(self, begin: int) -> str:
        with self.log.open("rb") as file:
            file.seek(begin)
            return file.read().decode(errors="replace")

    def _read(self, stage: Stage, figures: Path, begin: int) -> Figures:
        return stage.read(figures, self._output_since(begin))

    def _last_line(self, begin: int) -> str:
        lines = [line.strip() for line in self._output_since(begin).splitlines() if line.strip()]
        return lines[-1][:200] if lines else "no output"

    def _note(self, stage: Stage, status: str, reason: str, found: Figures, seconds: float) -> None:
        self.content["stages"][stage.name] = {
            "status": status,
            "reason": reason,
            "seconds": round(seconds, 1),
            "figures": found,
        }
        judged = self.targets()
        self.content["targets"] = [target._asdict() for target in judged]
        results.write_text(self.file, json.dumps(self.content, indent=1) + "\n")
        results.write_text(self.output / "session.md", self.report())

    def targets(self) -> list[targets.Target]:
        """What is wanted beside what was found."""
        return targets.evaluate(self.figures(), self.plan.quick)

    def report(self) -> str:
        """The session in Markdown: the machine, wanted against found, and how each stage ended."""
        environment = self.content["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        changed = " with changes" if environment["modified"] else ""
        quick = "Tiny shapes: a trial, whose times say nothing.\n\n" if self.plan.quick else ""
        ended = [["stage", "status", "seconds", "reason"]]
        for name, stage in self.content["stages"].items():
            reason = stage["reason"].replace("|", "\\|")
            ended.append([name, stage["status"], f"{stage['seconds']:.0f}", reason])
        return (
            f"# {environment['device']}, {environment['date']}, commit {environment['commit']}{changed}\n\n"
            f"{versions}\n\n{quick}{markdown(targets.table(self.targets()))}\n\n{markdown(ended)}\n"
        )


def _environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(each for each in paths if each)
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a stage's process and those that it has started, some of which may outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_PATIENCE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
