"""Whole training runs on two cores: samples and tokens per second of our loop with and without each of its switches.

python -m benchmarks train                     print the figures
python -m benchmarks train --check             exit 1 if a ratio is beyond its limit
python -m benchmarks train --part cache        only this part; may be repeated

released    CoLA: every switch on (dynamic length, cached teacher) against the released loop, padded to 128
dynamic     CoLA and RTE: batches padded to their longest sample against batches padded to 128, equal losses
cache       RTE: an epoch whose teacher comes from the cache against one that runs it, and the memory of both
bf16        RTE: bfloat16 against float32, on a CPU that has instructions for it
structures  RTE: FSD_ILG against VKD, both from the cache
peers       RTE: method finetune against transformers' Trainer on the same student, and FSD_ILG against TextBrewer's
            loop with logits and hidden states; all run the teacher, none sorts by length

MiniLM backbone, 6 -> 3 layers, batch 32. Every run is a process of its own; the two sides of a ratio take turns.
The official GLUE folders are read from --glue or from the folder named by FSD_GLUE_DIR.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory.command import GLUE_VARIABLE
from benchmarks.memory.numbers import Number, numbers_table
from benchmarks.tables import aligned
from benchmarks.train.runs import Run, Workshop

_LENGTH = 128
# A padded step always takes the same time, so that few of them tell it.
_PADDED_STEPS = 8

Part = Callable[["Measurement"], list[Number]]


class Measurement:
    """The options of a measurement, and all runs that it made.

    Attributes:
        workshop: Makes teachers, memories and runs.
        rounds: How often the two sides of a ratio take turns.
        steps: Steps of a run with batches of its own lengths; None: an epoch.
        runs: Case -> the figures of its runs.
    """

    def __init__(self, workshop: Workshop, rounds: int, steps: int | None) -> None:
        self.workshop, self.rounds, self.steps = workshop, rounds, steps
        self.runs: dict[str, list[dict[str, Any]]] = {}

    def padded_steps(self) -> int:
        """Steps of a run whose batches are all of one length."""
        return _PADDED_STEPS if self.steps is None else min(self.steps, _PADDED_STEPS)

    def note(self, case: str, run: Run | dict[str, float]) -> float:
        """Keep the figures of a run; return its samples per second."""
        figures = run._asdict() if isinstance(run, Run) else run
        self.runs.setdefault(case, []).append(figures)
        print(f"{case}: {figures['samples_per_second']:.1f} samples/s", flush=True)
        return float(figures["samples_per_second"])

    def ratio(self, fast: Callable[[], float], slow: Callable[[], float]) -> float:
        """Median over the rounds of how many times as many samples per second ``fast`` takes."""
        ratios = []
        for turn in range(self.rounds):
            first, second = (fast, slow) if turn % 2 == 0 else (slow, fast)
            rates = {first: first(), second: second()}
            ratios.append(rates[fast] / rates[slow])
        return statistics.median(ratios)

    def outside(self, module: str, task: str, *arguments: str) -> dict[str, float]:
        """Run another loop, a module of ``benchmarks.train`` that is started as a program."""
        shop = self.workshop
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.train.{module}", task, shop.data(task)[3], str(shop.teacher(task)),
             *arguments],
            env={**os.environ, "OMP_NUM_THREADS": str(shop.threads)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{module} loop on {task}: {done.stderr.strip().splitlines()[-1:]}")
        figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return figures

    def cache(self, task: str) -> list[str]:
        """The flags of a teacher cache that holds all that FSD_ILG and VKD read."""
        shop = self.workshop
        folder = shop.folder / f"{task}-cache"
        if not folder.exists():
            flags = ["--teacher_model_name_or_path", str(shop.teacher(task)), "--use_cpu", "true"]
            shop.command(["cache", *shop.data(task), *flags, "--teacher_cache_dir", str(folder)])
        return ["--teacher_cache_dir", str(folder)]


def _released(measured: Measurement) -> list[Number]:
    shop, cache = measured.workshop, measured.cache("cola")
    value = measured.ratio(
        lambda: measured.note(
            "cola, all switches", shop.distill("cola", "fsd_ilg", *cache, steps=measured.steps)
        ),
        lambda: measured.note(
            "cola, released loop",
            measured.outside("released", "cola", str(shop.memory("cola")), str(measured.padded_steps())),
        ),
    )
    return [Number.at_least("CoLA, FSD_ILG: all switches / the released loop", value, 8)]


def _dynamic(measured: Measurement) -> list[Number]:
    numbers = []
    for task, limit in (("cola", 5.0), ("rte", 1.4)):

        def run(case: str, steps: int | None, padded_to: int | None, task: str = task) -> float:
            run = measured.workshop.distill(task, "fsd_ilg", steps=steps, padded_to=padded_to)
            return measured.note(f"{task}, {case}", run)

        value = measured.ratio(
            lambda run=run: run("dynamic", measured.steps, None),  # type: ignore[misc]
            lambda run=run: run("padded", measured.padded_steps(), _LENGTH),  # type: ignore[misc]
        )
        numbers.append(Number.at_least(f"{task}, FSD_ILG: dynamic / padded to {_LENGTH}", value, limit))
    return numbers


def _cache(measured: Measurement) -> list[Number]:
    shop, cache = measured.workshop, measured.cache("rte")

    def run(case: str, *flags: str) -> float:
        return measured.note(f"rte, {case}", shop.distill("rte", "fsd_ilg", *flags, steps=measured.steps))

    value = measured.ratio(lambda: run("cached teacher", *cache), lambda: run("teacher runs"))
    peaks = {name: max(run["peak_bytes"] for run in measured.runs[f"rte, {name}"])
             for name in ("cached teacher", "teacher runs")}  # fmt: skip
    teacher = sum(path.stat().st_size for path in shop.teacher("rte").glob("*.safetensors"))
    allowed = peaks["teacher runs"] - teacher
    return [
        Number.at_least("RTE, FSD_ILG: teacher from the cache / teacher runs", value, 1.4),
        Number.at_most(
            "RTE: peak memory with the cache / without, less the teacher",
            peaks["cached teacher"] / allowed,
            1,
        ),
    ]


def has_bf16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 numbers."""
    return bool(torch.backends.cpu.get_cpu_capability().startswith("AVX512")) and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ) and any(flag in _cpu_flags() for flag in ("avx512_bf16", "amx_bf16"))  # fmt: skip


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def _bf16(measured: Measurement) -> list[Number]:
    if not has_bf16_instructions():
        print("bf16: not measured, this CPU has no bfloat16 instructions")
        return []

    def run(case: str, *flags: str) -> float:
        return measured.note(
            f"rte, {case}", measured.workshop.distill("rte", "fsd_ilg", *flags, steps=measured.steps)
        )

    value = measured.ratio(lambda: run("bf16", "--bf16", "true"), lambda: run("float32"))
    return [Number.at_least("RTE, FSD_ILG: bfloat16 / float32", value, 1.5)]


def _structures(measured: Measurement) -> list[Number]:
    cache = measured.cache("rte")

    def run(method: str) -> float:
        run = measured.workshop.distill("rte", method, *cache, steps=measured.steps)
        return measured.note(f"rte, {method}, cached", run)

    value = measured.ratio(lambda: run("vkd"), lambda: run("fsd_ilg"))
    return [Number.at_most("RTE, cached: a step of FSD_ILG / of VKD", value, 1.12)]


def _peers(measured: Measurement) -> list[Number]:
    steps = 40 if measured.steps is None else measured.steps

    def ours() -> float:
        run = measured.workshop.distill("rte", "finetune", "--train_sampling_strategy", "random", steps=steps)
        return measured.note("rte, finetune", run)

    def theirs() -> float:
        figures = measured.outside("released", "rte", "finetune", str(steps))
        return measured.note("rte, transformers' Trainer", figures)

    ratio = measured.ratio(ours, theirs)
    numbers = [Number.at_least("RTE, hard labels: ours / transformers' Trainer", ratio, 0.95)]
    if importlib.util.find_spec("textbrewer") is None:
        print("TextBrewer: not measured, it is not installed; see benchmarks/requirements.txt")
        return numbers

    def distilled() -> float:
        flags = ("--train_sampling_strategy", "random")
        return measured.note("rte, fsd_ilg", measured.workshop.distill("rte", "fsd_ilg", *flags, steps=steps))

    def textbrewer() -> float:
        return measured.note("rte, TextBrewer", measured.outside("textbrewer", "rte", str(steps)))

    ratio = measured.ratio(distilled, textbrewer)
    name = "RTE: ours with FSD_ILG / TextBrewer with logits and hidden states"
    return [*numbers, Number.at_least(name, ratio, 0.9)]


PARTS: dict[str, Part] = {
    "released": _released,
    "dynamic": _dynamic,
    "cache": _cache,
    "bf16": _bf16,
    "structures": _structures,
    "peers": _peers,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    glue = os.environ.get(GLUE_VARIABLE)
    parser.add_argument("--check", action="store_true", help="exit 1 if a ratio is beyond its limit")
    parser.add_argument("--part", action="append", choices=tuple(PARTS), help="only this; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of all runs")
    parser.add_argument("--rounds", type=int, default=2, help="how often the two sides take turns")
    parser.add_argument("--steps", type=int, help="steps of a run (default: an epoch)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument(
        "--work", type=Path, help="folder that keeps teachers, memories and caches (default: none)"
    )
    parser.add_argument(
        "--glue",
        type=Path,
        default=None if not glue else Path(glue),
        metavar="DIR",
        help=f"folder of the official GLUE folders (default: ${GLUE_VARIABLE})",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Measure; return 1 if ``--check`` finds a ratio beyond its limit, else 0."""
    options = _parser().parse_args(argv)
    if options.glue is None or not (options.glue / "RTE").is_dir() or not (options.glue / "CoLA").is_dir():
        raise ValueError(f"--glue: expected a folder with RTE and CoLA, got {options.glue}")
    for name in ("rounds", "threads", "steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        measured = Measurement(Workshop(folder, options.glue, options.threads), options.rounds, options.steps)
        numbers = [number for part in options.part or PARTS for number in PARTS[part](measured)]
    print(aligned(numbers_table(numbers)))
    if options.json is not None:
        facts = {
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "threads": options.threads,
            "runs": measured.runs,
            "numbers": [one._asdict() for one in numbers],
        }
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return int(options.check and not all(one.passed for one in numbers))
