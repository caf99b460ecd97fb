"""A memory of 400,000 samples: its peak memory against a bound stated beforehand, its time against the cost model.

The bound in bytes, with N samples, F = S D, K centroids, batches of b, w = min(F, 2048) and v = min(w, 1024):

    4 N (w + 2 v) + 256 N     a sketch of each sample, the image for k-means++ and its like; labels, norms, places
    32 K F                    sums in float64, a copy as they are saved and its bytes, centroids
    24 b F                    a batch, and what is made of it
    256 MiB                   libraries and heap

Nothing else grows: no feature is kept. The time of a stage is predicted from bytes and flops at the rates of this
machine (``fsd_kernels.cost``). How many times its prediction it takes at a smaller N gives the time at a larger one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.load.process import measure
from benchmarks.load.synthetic import BATCH
from benchmarks.memory.numbers import Number
from benchmarks.speed import harness
from benchmarks.tables import aligned
from fsd_fast.clustering.seeding import SEEDING_WIDTH
from fsd_fast.clustering.two_pass import SKETCH_WIDTH
from fsd_kernels import cost

STAGES = ("pass_1", "sketch_clustering", "pass_2")
_FLOAT = 4


class Case(NamedTuple):
    """The sizes of a build."""

    samples: int
    length: int
    width: int
    centroids: int

    @property
    def features(self) -> int:
        """F."""
        return self.length * self.width

    def __str__(self) -> str:
        return f"N = {self.samples:,}, S = {self.length}, D = {self.width}, K = {self.centroids}"


def allowed_bytes(case: Case) -> int:
    """The most by which a build may raise the memory of its process."""
    width = min(case.features, SKETCH_WIDTH)
    sample = _FLOAT * (width + 2 * min(width, SEEDING_WIDTH)) + 256
    return (
        sample * case.samples + 32 * case.centroids * case.features + 24 * BATCH * case.features + (256 << 20)
    )


def predicted(case: Case, epochs: Sequence[int], device: cost.Device) -> dict[str, float]:
    """Seconds of each stage at the device's rates: what must be read, written and multiplied, and nothing else.

    Args:
        case: The sizes.
        epochs: Of each restart of k-means.
        device: Its rates.
    """
    width = min(case.features, SKETCH_WIDTH)
    points = case.samples * case.features * _FLOAT
    shape = cost.Shape(rows=1, width=width, centroids=case.centroids, points=case.samples)
    epoch = cost.minimum("kmeans", shape)
    seeding = min(width, SEEDING_WIDTH) * case.samples
    trials = 2 + int(math.log(case.centroids))
    draw = {"draw": cost.Cost(_FLOAT * seeding, 0, 2 * trials * seeding)}
    stages = {
        "pass_1": {"sketch": cost.Cost(points, _FLOAT * width * case.samples, 0)},
        "pass_2": {"sums": cost.Cost(points, 8 * case.centroids * case.features, 0)},
    }
    seconds = {name: device.seconds(stage, torch.float32) for name, stage in stages.items()}
    seconds["sketch_clustering"] = sum(epochs) * device.seconds(epoch, torch.float32) + len(epochs) * (
        case.centroids - 1
    ) * device.seconds(draw, torch.float32)
    return seconds


class Build(NamedTuple):
    """A build that was measured."""

    case: Case
    figures: dict[str, Any]
    """What ``memory_process`` printed."""
    predicted: dict[str, float]
    """Seconds of each stage by the cost model."""

    @classmethod
    def measured(cls, case: Case, device: cost.Device, threads: int) -> Build:
        """Build a memory of this size."""
        figures = measure("memory_process", *case, threads=threads)
        found = cls(case, figures, predicted(case, figures["epochs"], device))
        print(
            f"{case}: {found.seconds:.0f} s, peak memory +{figures['growth'] / 2**20:,.0f} MiB of "
            f"{allowed_bytes(case) / 2**20:,.0f} MiB allowed",
            flush=True,
        )
        return found

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return float(sum(self.figures["seconds"].values()))

    def times(self, stage: str) -> float:
        """How many times its prediction a stage took."""
        return float(self.figures["seconds"][stage]) / self.predicted[stage]

    def numbers(self) -> list[Number]:
        """The limits of every build."""
        return [
            Number.at_most(
                f"{self.case}: peak memory / allowed", self.figures["growth"] / allowed_bytes(self.case), 1
            ),
            Number.at_most(f"{self.case}: files left open", self.figures["files_left_open"], 0),
        ]


def extrapolated(
    case: Case, epochs: Sequence[int], passes: Build, clustering: Build, device: cost.Device
) -> float:
    """Seconds of a build that was not made.

    Args:
        case: Its sizes.
        epochs: Epochs of each restart that it is taken to need.
        passes: The build whose passes took so many times their prediction.
        clustering: The build whose k-means did.
        device: The machine.
    """
    seconds = predicted(case, epochs, device)
    sources = {"pass_1": passes, "sketch_clustering": clustering, "pass_2": passes}
    return sum(source.times(stage) * seconds[stage] for stage, source in sources.items())


def _this_machine() -> cost.Device:
    cpu = torch.device("cpu")
    rates = harness.ceilings(cpu, harness.make_clock(cpu))
    return cost.Device("this machine", rates.copy, {"fp32": rates.matmul})


def _table(builds: Sequence[Build]) -> str:
    table = [["build", *(f"{stage}, s (x predicted)" for stage in STAGES), "the stub, s", "epochs"]]
    for one in builds:
        table.append(
            [
                str(one.case),
                *(f"{one.figures['seconds'][stage]:.1f} ({one.times(stage):.1f})" for stage in STAGES),
                f"{one.figures['teacher_seconds']:.1f}",
                " ".join(map(str, one.figures["epochs"])),
            ]
        )
    return aligned(table)


def memory(options: argparse.Namespace) -> tuple[list[Number], dict[str, Any]]:
    """Build memories of a few sizes, and one of all samples."""
    target = Case(options.samples, options.length, options.width, options.centroids)
    few, more = (target._replace(samples=samples) for samples in options.few)
    # As many samples as the target has, each shorter: what grows with N is the same, and the passes are not.
    many = target._replace(length=options.short_length, width=options.short_width)
    cases = [few, more, many, *([target] if options.full else [])]
    for case in dict.fromkeys([*cases, target]):
        print(f"stated beforehand: {case}: at most +{allowed_bytes(case) / 2**20:,.0f} MiB")
    device = _this_machine()
    builds = [Build.measured(case, device, options.threads) for case in cases]
    first, second, large = builds[:3]
    print(_table(builds))
    numbers = [number for one in builds for number in one.numbers()]
    grown = (second.figures["growth"] - first.figures["growth"]) / (more.samples - few.samples)
    allowed = (allowed_bytes(more) - allowed_bytes(few)) / (more.samples - few.samples)
    numbers.append(Number.at_most("bytes per further sample / allowed", grown / allowed, 1))
    foreseen = extrapolated(more, second.figures["epochs"], first, first, device)
    numbers.append(
        Number.at_most(f"{more}: time / extrapolated from {few.samples:,}", second.seconds / foreseen, 1.5)
    )
    seconds = extrapolated(target, large.figures["epochs"], second, large, device)
    lower = sum(predicted(target, large.figures["epochs"], device).values())
    print(
        f"{target}: {seconds / 60:.0f} minutes by extrapolation, with the stub in place of a teacher; "
        f"{lower / 60:.0f} minutes if every byte and product went at the machine's full rate"
    )
    if options.full:
        ratio = builds[3].seconds / seconds
        numbers.append(Number.at_most(f"{target}: time / extrapolated", ratio, 1.5))
    facts = {
        "builds": [{**one._asdict(), "case": one.case._asdict()} for one in builds],
        "bandwidth": device.bandwidth,
        "flops": device.matmul["fp32"],
        "extrapolated_seconds": seconds,
        "lower_bound_seconds": lower,
    }
    return numbers, facts
