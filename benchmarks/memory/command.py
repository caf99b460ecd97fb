"""The teacher memory: inertia, teacher passes, memory and time, against the released procedure and k-means libraries.

python -m benchmarks memory                 print the figures
python -m benchmarks memory --check         exit 1 if a figure is beyond its limit
python -m benchmarks memory --part widths   print the table of sketch width against inertia

quality   inertia of ``cluster_stream`` over the mean inertia of scikit-learn's KMeans (k-means++, n_init=1) on the same
          teacher features, K = 100, three seeds each
build     a memory of RTE at S = 128 with the MiniLM backbone: teacher passes, and time beside the teacher's forward;
          then, on some of the samples and in the same run, its time against the released procedure, with the limit
          that the teacher's forward alone would set
peak      growth of the process's peak memory with N, per sample, against the bytes of a sketch
step      one assignment and update against scikit-learn's inner kernel, faiss-cpu and plain torch

The official GLUE folders (RTE, CoLA) are read from --glue or from the folder named by FSD_GLUE_DIR. A task without its
folder is skipped and reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from benchmarks.memory.build import build
from benchmarks.memory.features import CLUSTERS, TASKS
from benchmarks.memory.numbers import Number, numbers_table
from benchmarks.memory.peak import peak
from benchmarks.memory.quality import quality, widths
from benchmarks.memory.step import step
from benchmarks.tables import aligned

GLUE_VARIABLE = "FSD_GLUE_DIR"

Part = Callable[[argparse.Namespace], tuple[list[Number], dict[str, Any]]]
PARTS: dict[str, Part] = {"quality": quality, "widths": widths, "build": build, "peak": peak, "step": step}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    glue = os.environ.get(GLUE_VARIABLE)
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure is beyond its limit")
    parser.add_argument("--quick", action="store_true", help="few samples and points, to see that it runs")
    parser.add_argument("--part", action="append", choices=tuple(PARTS), help="only this; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument(
        "--glue",
        type=Path,
        default=None if not glue else Path(glue),
        metavar="DIR",
        help=f"folder of the official GLUE folders (default: ${GLUE_VARIABLE})",
    )
    parser.add_argument("--tasks", default=",".join(TASKS), help="for quality and widths, comma-separated")
    parser.add_argument("--samples", type=int, help="largest number of training samples (default: all)")
    parser.add_argument(
        "--released-samples",
        type=int,
        default=160,
        help="samples in the comparison with the released procedure",
    )
    parser.add_argument("--points", type=int, default=4096, help="N of one step")
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds of the comparison with the released procedure"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="time for one step's rounds")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's choice)")
    return parser


def _options(argv: Sequence[str]) -> argparse.Namespace:
    options = _parser().parse_args(argv)
    if options.quick:
        options.samples = min(options.samples or 200, 200)
        options.released_samples = min(options.released_samples, CLUSTERS)
        options.points = min(options.points, 256)
        options.rounds, options.seconds = 1, 1.0
    if options.samples is not None and options.samples < CLUSTERS:
        raise SystemExit(f"--samples: expected at least the {CLUSTERS} clusters, got {options.samples}")
    options.tasks = options.tasks.split(",")
    unknown = set(options.tasks) - set(TASKS)
    if unknown:
        raise SystemExit(f"--tasks: expected some of {', '.join(TASKS)}, got {', '.join(sorted(unknown))}")
    if options.glue is not None and not options.glue.is_dir():
        raise SystemExit(f"--glue: expected the folder of the official GLUE folders, got {options.glue}")
    return options


def _has_data(task: str, glue: Path | None) -> bool:
    folder = TASKS[task]
    return folder is None or (glue is not None and (glue / folder).is_dir())


def _where(glue: Path | None) -> str:
    return f"no data in {glue}" if glue is not None else f"expected --glue DIR or {GLUE_VARIABLE}"


def _chosen_parts(options: argparse.Namespace) -> list[str]:
    """The parts to run; prints which tasks and parts lack their data and leaves them out."""
    # The table of widths serves the documentation and has no limits.
    chosen = options.part or [part for part in PARTS if part != "widths"]
    if {"quality", "widths"} & set(chosen):
        missing = [task for task in options.tasks if not _has_data(task, options.glue)]
        if missing:
            print(f"not measured, {_where(options.glue)}: {', '.join(missing)}")
            options.tasks = [task for task in options.tasks if task not in missing]
    if "build" in chosen and not _has_data("rte", options.glue):
        print(f"build: not measured, {_where(options.glue)}: rte")
        chosen = [part for part in chosen if part != "build"]
    return chosen


def main(argv: Sequence[str]) -> int:
    """Measure; return 1 if ``--check`` finds a figure beyond its limit, else 0."""
    options = _options(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    numbers: list[Number] = []
    facts: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    for part in _chosen_parts(options):
        found, facts[part] = PARTS[part](options)
        numbers += found
    if numbers:
        print(aligned(numbers_table(numbers)))
    if options.json is not None:
        facts["numbers"] = [one._asdict() for one in numbers]
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return int(options.check and not all(one.passed for one in numbers))
