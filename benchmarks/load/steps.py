"""A distillation of 10,000 steps: neither its memory nor its open files grow.

Everything that a run does is on: the teacher, all structures, logging to TensorBoard, and every twentieth of the run
an evaluation and a checkpoint, of which two are kept. The models are tiny; what could grow is what is kept for each
step, log entry, evaluation and checkpoint, and that does not depend on their size.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from benchmarks.load.process import measure
from benchmarks.memory.numbers import Number

SAMPLES = 100
"""How often a run is looked at."""
_TENTH = SAMPLES // 10


def growth(resident: list[int]) -> float:
    """Resident memory in the last tenth of a run over that in its second tenth, less 1; by their medians.

    In the first tenth an evaluation and a checkpoint happen for the first time.
    """
    early, late = resident[_TENTH : 2 * _TENTH], resident[-_TENTH:]
    return statistics.median(late) / statistics.median(early) - 1


def steps(options: argparse.Namespace) -> tuple[list[Number], dict[str, Any]]:
    """Train and watch."""
    figures = measure("steps_process", options.steps, SAMPLES, threads=1)
    resident, files = figures["resident"], figures["open_files"]
    print(
        f"{options.steps:,} steps in {figures['seconds']:.0f} s: resident memory "
        f"{resident[_TENTH] / 2**20:.1f} MiB in the second tenth, {resident[-1] / 2**20:.1f} MiB at the end; "
        f"{files[_TENTH]} and {files[-1]} open files",
        flush=True,
    )
    numbers = [
        Number.at_most(f"{options.steps:,} steps: growth of the resident memory", growth(resident), 0.02),
        Number.at_most(
            f"{options.steps:,} steps: further open files", max(files[_TENTH:]) - files[_TENTH], 0
        ),
    ]
    return numbers, figures
