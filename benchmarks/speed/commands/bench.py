"""``python -m benchmarks bench``: measure everything that this machine can, and write the result and its report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.speed import checks, results
from benchmarks.speed.inputs import Sizes
from benchmarks.speed.measure import Settings
from benchmarks.speed.ops import Op
from benchmarks.speed.registry import OPS
from benchmarks.speed.results import WRONG
from benchmarks.speed.run import Run, add_settings

# Time of a case of "step" and of a growth case, in units of --seconds. The time of a step spreads by more than the 5 %
# of its target.
_STEP, _GROWTH = 15, 1 / 4


class Planned(NamedTuple):
    """One case to measure."""

    op: str
    case: Sizes
    providers: tuple[str, ...]
    modes: tuple[str, ...]
    settings: Settings


def plan(ops: Mapping[str, Op], settings: Settings) -> Iterator[Planned]:
    """Yield the paper's shapes of every op with their providers, modes and times.

    The reference needs seconds for the distances to a memory: there it judges and is not timed. torch.compile needs
    half a minute for a shape: it is timed on an op's first shape.
    """
    for op in ops.values():
        seconds = (_STEP if op.name == "step" else 1) * settings.seconds
        left_out = {"reference"} if "centroids" in op.size_names else set()
        modes = tuple(mode for mode in op.modes if mode != "backward")
        for case in op.shapes["paper"]:
            providers = tuple(name for name in op.providers if name not in left_out)
            yield Planned(op.name, case, providers, modes, settings._replace(seconds=seconds))
            left_out.add("compiled")


def growth_plan(ops: Mapping[str, Op], names: Sequence[str], settings: Settings) -> list[Planned]:
    """The growth cases of the named ops: the first case of every op, then the second, and so on."""
    short = settings._replace(seconds=_GROWTH * settings.seconds, memory=False)
    cases = [(place, name, case) for name in names for place, case in enumerate(ops[name].shapes["growth"])]
    return [
        Planned(name, case, ("ours",), ("full",), short)
        for _, name, case in sorted(cases, key=lambda each: each[0])
    ]


def bench(
    run: Run,
    ops: Mapping[str, Op],
    growth_ops: Sequence[str],
    minutes: float,
    targets: Sequence[checks.Check] = checks.CHECKS,
) -> int:
    """Measure, check, save; return 1 if the gate refuses one of our providers, else 0.

    Args:
        run: The run; ``run.options.json`` is where the result goes, None: among the stored results.
        ops: The ops to measure.
        growth_ops: The ops whose growth is measured.
        minutes: Time after which no growth case is begun.
        targets: The checks of the result.
    """
    begin = time.monotonic()
    for planned in plan(ops, run.settings):
        _measure(run, ops, planned)
    growth = growth_plan(ops, growth_ops, run.settings)
    # A case takes up to half a minute, and so does the report.
    end = begin + 60 * (minutes - 1)
    for done, planned in enumerate(growth):
        if time.monotonic() > end:
            print(f"\nthe time is up: {len(growth) - done} of {len(growth)} cases of growth are left out")
            break
        _measure(run, ops, planned)
    run.check(targets)
    run.save(results.default_path(run.result) if run.options.json is None else run.options.json)
    wrong = [row for row in run.result.rows if row.status == WRONG]
    return int(any(ops[row.op].providers[row.provider].ours for row in wrong))


def _measure(run: Run, ops: Mapping[str, Op], planned: Planned) -> None:
    run.measure(ops[planned.op], [planned.case], planned.providers, planned.modes, planned.settings)


def main(argv: Sequence[str]) -> int:
    """Measure everything that this machine can, check the targets, and write the result and its report.

    Forward and whole passes are timed. The reference judges the ops with a memory and is not timed there: its distances
    take seconds. torch.compile takes half a minute for a shape and is timed on the first shape of an op. A case of a
    training step gets 15 times --seconds, a growth case a quarter; growth cases beyond the time limit are skipped and
    counted. Exits with 1 if the gate refuses one of our own providers. Missed targets are in the report; --check is the
    command that exits with 1 for them.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks bench", description=main.__doc__)
    add_settings(parser)
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="begin no growth case after this time (default 20)"
    )
    parser.set_defaults(min_rounds=3, seconds=4.0)
    options = parser.parse_args(argv)
    return bench(Run(options), OPS, checks.GROWTH_OPS, options.minutes)
