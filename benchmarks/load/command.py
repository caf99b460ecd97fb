"""Load: what a large training set and a long run take, and that nothing grows which should not.

python -m benchmarks load                print the figures
python -m benchmarks load --check        exit 1 if one is beyond its limit
python -m benchmarks load --full         also build the memory of 400,000 samples at S = 128, D = 768

memory    memories of synthetic features from a stub teacher, each in a process of its own: the growth of its memory
          against a bound that is printed beforehand, and the time against the cost model. Few samples at the full
          S x D, and all 400,000 (MNLI has 393,000) at a smaller one; together they give the time of the whole
steps     a distillation of 10,000 steps of tiny models: resident memory and open files along the way
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.load.memory import memory
from benchmarks.load.steps import SAMPLES, steps
from benchmarks.memory.numbers import Number, numbers_table
from benchmarks.tables import aligned

Part = Callable[[argparse.Namespace], tuple[list[Number], dict[str, Any]]]
PARTS: dict[str, Part] = {"memory": memory, "steps": steps}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure is beyond its limit")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--full", action="store_true", help="also all samples at the full S x D")
    parser.add_argument("--part", action="append", choices=tuple(PARTS), help="only this; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--samples", type=int, default=400_000, help="N")
    parser.add_argument("--steps", type=int, default=10_000, help="steps of the training run")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads while a memory is built")
    return parser


def _options(argv: Sequence[str]) -> argparse.Namespace:
    options = _parser().parse_args(argv)
    options.length, options.width, options.centroids = 128, 768, 300
    options.short_length, options.short_width = 32, 128
    options.few = (4_000, 16_000)
    if options.quick:
        options.length, options.width, options.centroids = 32, 128, 8
        options.short_length, options.short_width = 4, 32
        options.few = (200, 400)
        options.samples, options.steps = min(options.samples, 1_000), min(options.steps, SAMPLES)
    for name, minimum in (("samples", max(options.few)), ("steps", SAMPLES), ("threads", 1)):
        if getattr(options, name) < minimum:
            raise ValueError(f"--{name}: expected at least {minimum:,}, got {getattr(options, name)}")
    return options


def main(argv: Sequence[str]) -> int:
    """Measure; return 1 if ``--check`` finds a figure beyond its limit, else 0."""
    options = _options(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return _measure(options)
    finally:
        torch.set_num_threads(threads)


def _measure(options: argparse.Namespace) -> int:
    numbers: list[Number] = []
    facts: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": options.threads,
    }
    for part in options.part or PARTS:
        found, facts[part] = PARTS[part](options)
        numbers += found
    print(aligned(numbers_table(numbers)))
    if options.json is not None:
        facts["numbers"] = [one._asdict() for one in numbers]
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return int(options.check and not all(one.passed for one in numbers))
