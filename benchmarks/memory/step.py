"""One assignment and update of k-means against scikit-learn's inner kernel, faiss-cpu and plain torch."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.memory.features import CLUSTERS, LENGTH
from benchmarks.memory.numbers import Number
from benchmarks.speed import harness
from benchmarks.speed.inputs import Sizes
from benchmarks.speed.measure import Machine, Settings, measure_op
from benchmarks.speed.registry import OPS
from benchmarks.speed.results import Row

_OTHERS = ("plain", "scikit-learn", "faiss-cpu")


def step(options: argparse.Namespace) -> tuple[list[Number], dict[str, Any]]:
    """Time one assignment and update at F = 98,304 and K = 100."""
    sizes = Sizes(rows=LENGTH, width=768, centroids=CLUSTERS, points=options.points)
    device = torch.device("cpu")
    clock = harness.make_clock(device)
    rows = measure_op(
        OPS["kmeans"],
        [sizes],
        Settings(device, torch.float32, seconds=options.seconds, min_rounds=3),
        Machine(clock, harness.ceilings(device, clock)),
        providers=("ours", *_OTHERS),
    )
    for row in rows:
        seconds = f"{row.time.median:.3f} s" if row.samples else row.status
        print(f"N={options.points} {row.provider}: {seconds} {row.reason}", flush=True)
    found = {row.provider: row for row in rows}
    facts = {row.provider: row.samples for row in rows if row.samples}
    return _numbers(found, sizes), facts


def _numbers(found: dict[str, Row], sizes: Sizes) -> list[Number]:
    ours = found["ours"]
    if not ours.samples:
        return [Number("one step: ours", float("nan"), "runs", False)]
    print("the machine was busy: times are not to be trusted" if ours.noisy else "the machine was quiet")
    numbers = [
        Number.at_least(
            f"one step: {name} / ours", harness.ratio(found[name].samples, ours.samples).median, 1
        )
        for name in _OTHERS
        if found[name].samples
    ]
    points = 4 * sizes.points * sizes.rows * sizes.width
    extra = (ours.peak_bytes or 0) / points
    numbers.append(Number.at_most("one step: peak memory / points", 1 + extra, 1.3))
    return numbers
