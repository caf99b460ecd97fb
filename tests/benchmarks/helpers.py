"""What the tests of the benchmarks share: tiny cases, made-up rows and results, and providers that are wrong."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.speed import harness
from benchmarks.speed.contenders import LossContender, Outcome
from benchmarks.speed.harness import Timed
from benchmarks.speed.inputs import Inputs, Sizes
from benchmarks.speed.measure import Machine, Settings
from benchmarks.speed.ops import Op, Provider
from benchmarks.speed.registry import OPS
from benchmarks.speed.results import OK, Result, Row
from fsd_fast.losses import IntraFeatureLoss

CPU = torch.device("cpu")
SMALL = Sizes(8, 16, 32, 6)
QUICK = Settings(CPU, seconds=0.0, min_rounds=2)
CEILINGS = harness.Ceilings(1e11, 1e10)


def machine() -> Machine:
    """The CPU's clock, with made-up rates."""
    return Machine(harness.CpuClock(), CEILINGS)


class Wrong:
    """Our own contender for L_I with its value and its gradient scaled; it may not be timed."""

    def __init__(self, inputs: Inputs, value: float, gradient: float) -> None:
        module = IntraFeatureLoss()
        self._inner = LossContender(lambda t: module(t["student"], t["teacher"]), inputs, ("student",))
        self._value, self._gradient = value, gradient

    def outcome(self) -> Outcome:
        value, gradients = self._inner.outcome()
        return Outcome(value * self._value, tuple(g * self._gradient for g in gradients))

    def timed(self, mode: str) -> Timed:
        raise AssertionError("a wrong provider was timed")


def wrong(value: float = 1.0, gradient: float = 1.0, ours: bool = False) -> Provider:
    return Provider(lambda inputs, _: Wrong(inputs, value, gradient), ours=ours)


def intra_with(**providers: Provider) -> Op:
    """The op "intra" with further providers."""
    op = OPS["intra"]
    return dataclasses.replace(op, providers={**op.providers, **providers})


def make_row(provider: str, samples: list[float], **changes: object) -> Row:
    sizes = Sizes(32, 128, 768, 100)
    label = sizes.label(OPS["intra"].size_names)
    row = Row("intra", label, sizes._asdict(), provider, "full", OK, samples=samples)
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


def make_result(rows: list[Row]) -> Result:
    environment = {
        "device": "A Processor",
        "device_type": "cpu",
        "threads": 2,
        "versions": {"torch": "2"},
        "commit": "abc1234",
        "modified": False,
        "date": "2030-01-02",
    }
    return Result(environment, {"matmul": 1e11, "copy": 1e10}, rows)
