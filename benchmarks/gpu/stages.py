"""The stages of a session on a GPU, in order of value. Each runs a command that exists by itself."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Figures = dict[str, Any]
"""What a stage found, as JSON."""

# Of each op one test or two; a checker of memory slows kernels down by an order of magnitude.
_CHECKED_TESTS = (
    "test_kernels_of_aligned_rows or test_kernels_copy_a_frozen_block or "
    "test_kernels_of_inter_structure_match_the_formula or test_kernels_same_inputs_give_the_same_bits"
)
_QUICK_TESTS = "test_kernels_copy_a_frozen_block"
_OUTCOME = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<first>[A-Z]+) )?(?P<test>\S+::.*?)(?: (?P<last>[A-Z]{5,7})\b.*)?$"
)
_KINDS = {"PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}
_WORKERS = 8
_KERNEL = re.compile(r"\b_[a-z0-9_]+_kernel\b")


class Plan(NamedTuple):
    """How the stages run."""

    device: str
    """"cuda", or "cpu" for a trial."""
    quick: bool
    """Tiny shapes and few rounds, to try everything."""


@dataclass(frozen=True)
class Stage:
    """One stage."""

    name: str
    seconds: float
    """Its time in a session of nine minutes."""
    command: Callable[[Plan, Path], Sequence[str]]
    """(plan, file for the figures) to the command line."""
    read: Callable[[Path, str], Figures]
    """(file for the figures, output so far) to what the stage has found so far."""
    missing: Callable[[], str] = lambda: ""
    """Why the stage cannot run here; empty where it can."""


def read_json(figures: Path, _: str) -> Figures:
    """The figures that a command has written; empty as long as there are none."""
    return json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else {}


def read_tests(_: Path, output: str) -> Figures:
    """Numbers of passed, failed and skipped tests, and the names of the failed ones, from pytest's verbose output."""
    outcomes: dict[str, str] = {}
    for line in output.splitlines():
        found = _OUTCOME.match(line.rstrip())
        kind = _KINDS.get(found["first"] or found["last"] or "") if found else None
        # A test whose teardown fails is reported twice.
        if found and kind and outcomes.get(found["test"]) != "failed":
            outcomes[found["test"]] = kind
    kinds = list(outcomes.values())
    counts: Figures = {kind: kinds.count(kind) for kind in ("passed", "failed", "skipped")}
    return {**counts, "failures": [test for test, kind in outcomes.items() if kind == "failed"]}


def read_sanitizer(_: Path, output: str) -> Figures:
    """Outcomes of the tests, the number of errors, and in how many of the reports each kernel is named."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    reports = [line for line in output.splitlines() if line.startswith("=========")]
    named = Counter(name for line in reports for name in set(_KERNEL.findall(line)))
    return {
        **read_tests(_, output),
        "errors": sum(map(int, summaries)) if summaries else None,
        "kernels": dict(named),
    }


def _without(*names: str) -> Callable[[], str]:
    """The check that programs and Python packages are there."""

    def missing() -> str:
        absent = [
            name for name in names if shutil.which(name) is None and importlib.util.find_spec(name) is None
        ]
        return f"not installed: {', '.join(absent)}" if absent else ""

    return missing


def _pytest(expression: str | None, workers: int = 0) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-v", "-rN", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-m", "triton", "tests/kernels"]
    if expression is not None:
        command += ["-k", expression]
    if workers and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    return command


def _tests(plan: Plan, _: Path) -> list[str]:
    return _pytest(_QUICK_TESTS) if plan.quick else _pytest(None, _WORKERS)


def _sanitizer(tool: str) -> Stage:
    def command(plan: Plan, _: Path) -> list[str]:
        checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        return [*checker, *_pytest(_QUICK_TESTS if plan.quick else _CHECKED_TESTS)]

    return Stage(tool, 25, command, read_sanitizer, _without("compute-sanitizer", "pytest"))


def _benchmark(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "benchmarks", *arguments]


def _of_device(command: str, *arguments: str) -> Callable[[Plan, Path], list[str]]:
    """A command that has the flags --device, --quick and --json."""

    def line(plan: Plan, figures: Path) -> list[str]:
        quick = ["--quick"] if plan.quick else []
        return _benchmark(command, "--device", plan.device, *arguments, *quick, "--json", str(figures))

    return line


def _enqueue(plan: Plan, figures: Path) -> list[str]:
    return _benchmark("enqueue", "--seconds", "0.5" if plan.quick else "3", "--json", str(figures))


def _measured(
    ops: str, seconds: float, rounds: int, kind: str, *arguments: str
) -> Callable[[Plan, Path], list[str]]:
    """Ops, forward + backward; ``kind`` is bfloat16, or tf32 for float32 with such products."""

    def line(plan: Plan, figures: Path) -> list[str]:
        command = _benchmark(
            ops, "--device", plan.device, "--mode", "full", "--json", str(figures), *arguments
        )
        if kind == "bfloat16":
            command += ["--dtype", kind]
        elif plan.device == "cuda":
            command += ["--precision", kind]
        if plan.quick:
            return [*command, "--shapes", "small", "--seconds", "0", "--min-rounds", "2"]
        return [*command, "--seconds", f"{seconds:g}", "--min-rounds", str(rounds)]

    return line


_NO_PEERS = ("--without", "reference,released,compiled,ours-eager,ours-offset")
_STEPS = ("--providers", "vkd-only,ours,ours-fsd_i,ours-fsd_l,ours-fsd_g")

STAGES: tuple[Stage, ...] = (
    Stage("tests", 140, _tests, read_tests, _without("pytest")),
    Stage("kernels-bf16", 30, _of_device("kernel-times", "--dtype", "bfloat16"), read_json),
    Stage("kernels-ieee", 30, _of_device("kernel-times", "--precision", "ieee"), read_json),
    Stage("kernels-tf32", 30, _of_device("kernel-times", "--precision", "tf32"), read_json),
    Stage("enqueue", 20, _enqueue, read_json),
    Stage("capture", 20, _of_device("capture"), read_json),
    Stage("steps", 80, _measured("step", 20, 20, "tf32", *_STEPS), read_json),
    Stage("peers-bf16", 50, _measured("intra,local,global,kmeans", 1, 5, "bfloat16", *_NO_PEERS), read_json),
    Stage("peers-tf32", 50, _measured("intra,local,global,kmeans", 1, 5, "tf32", *_NO_PEERS), read_json),
    _sanitizer("memcheck"),
    _sanitizer("racecheck"),
    Stage(
        "compiled",
        40,
        _measured("intra,local", 1, 5, "tf32", "--providers", "ours,compiled"),
        read_json,
    ),
)
"""All stages, in order of value."""
