"""Timing: the order of rounds, what a sample is, ratios, the canary, peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.speed import harness, report
from benchmarks.speed.harness import Canary, Timed
from benchmarks.speed.measure import Machine, measure_op
from benchmarks.speed.registry import OPS
from tests.benchmarks.helpers import CEILINGS, CPU, QUICK, SMALL, make_result


class ScriptedClock:
    """A clock that takes each call's own word for its time, and remembers the order of the calls."""

    canary_flops = 1000
    shortest = 5e-3

    def __init__(self) -> None:
        self.order: list[str] = []

    def time(self, timed: Timed, repeats: int) -> float:
        result = timed.call(None)
        assert isinstance(result, tuple)
        self.order.append(result[0])
        return float(result[1])

    def canary(self) -> tuple[float, float]:
        self.order.append("canary")
        return 1.0, 1.0


class ScriptedCanary(harness.CpuClock):
    """The CPU's clock with made-up canaries."""

    def __init__(self, canary: Iterator[tuple[float, float]]) -> None:
        super().__init__()
        self._scripted = canary

    def canary(self) -> tuple[float, float]:
        return next(self._scripted)


def scripted(name: str, seconds: Callable[[], float]) -> list[Timed]:
    return [Timed(lambda: None, lambda _: (name, seconds()))]


def test_providers_are_timed_in_turn_after_a_warm_up() -> None:
    clock = ScriptedClock()
    contestants = {name: scripted(name, lambda: 1.0) for name in "AB"}
    measured = harness.measure(contestants, clock, seconds=0, min_rounds=3)  # type: ignore[arg-type]
    warm_up = ["A", "B"]
    assert clock.order == [*warm_up, "canary", "A", "B", "canary", "B", "A", "canary", "A", "B"]
    assert {name: len(samples) for name, samples in measured.samples.items()} == {"A": 3, "B": 3}


def test_a_short_call_is_preceded_by_an_untimed_one() -> None:
    times = iter([0.4, 0.4, *[9.0, 0.4] * 3])
    clock = ScriptedClock()
    contestants = {"short": scripted("short", lambda: next(times)), "long": scripted("long", lambda: 0.6)}
    measured = harness.measure(contestants, clock, seconds=0, min_rounds=3)  # type: ignore[arg-type]
    in_turn = ["canary", "short", "short", "long"], ["canary", "long", "short", "short"]
    assert clock.order[:3] == ["short", "short", "long"]
    assert clock.order[3:] == [*in_turn[0], *in_turn[1], *in_turn[0]]
    assert measured.samples == {"short": [0.4] * 3, "long": [0.6] * 3}


def test_the_warm_up_is_not_among_the_samples() -> None:
    times = iter([100.0, 1.0, 1.0, 1.0])
    clock = ScriptedClock()
    measured = harness.measure({"A": scripted("A", lambda: next(times))}, clock, seconds=0, min_rounds=3)  # type: ignore[arg-type]
    assert measured.samples["A"] == [1.0, 1.0, 1.0]


def test_only_the_call_is_timed() -> None:
    clock = harness.CpuClock()
    slow_setup = Timed(lambda: time.sleep(0.05), lambda _: None)
    slow_call = Timed(lambda: None, lambda _: time.sleep(0.05))
    assert clock.time(slow_setup, 1) < 0.04
    assert clock.time(slow_call, 2) >= 0.05


def test_input_sets_are_rotated() -> None:
    clock = ScriptedClock()
    sets = [scripted(name, lambda: 1.0)[0] for name in ("one", "two")]
    harness.measure({"A": sets}, clock, seconds=0, min_rounds=4)  # type: ignore[arg-type]
    assert [name for name in clock.order[3:] if name != "canary"] == ["one", "two", "one", "two"]


def test_ratios_are_taken_round_by_round() -> None:
    # The machine slows down during the run: medians of each list would hide that every round has ratio 2 or 3.
    faster = [1.0, 10.0, 100.0, 1.0, 10.0]
    slower = [2.0, 20.0, 200.0, 3.0, 30.0]
    assert harness.ratio(slower, faster) == (2.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="faster: expected 5 samples"):
        harness.ratio(slower, faster[:3])


def test_spread_is_median_and_quartiles() -> None:
    assert harness.spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0)
    assert harness.spread([7.0]) == (7.0, 7.0, 7.0)
    assert harness.spread([5.0, 1.0, 3.0, 2.0, 4.0]).relative == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least one"):
        harness.spread([])


@pytest.mark.parametrize(
    ("seconds", "shares", "noisy"),
    [
        ([1.0, 1.01, 0.99, 1.0, 1.02], [1.0] * 5, False),
        ([1.0, 1.5, 1.0, 1.4, 1.0], [1.0] * 5, True),
        ([1.0] * 5, [0.6, 0.55, 1.0, 0.5, 0.6], True),
        ([], [], False),
    ],
)
def test_canary_sees_contention(seconds: list[float], shares: list[float], noisy: bool) -> None:
    assert Canary(seconds, shares).noisy is noisy


def test_product_rates_are_compared_round_by_round() -> None:
    # 500 flops in the time of the canary's 1000 are half of its rate, however fast a round is.
    canary = Canary([1.0, 3.0, 2.0], [1.0] * 3, 1000)
    assert canary.percent(500, [1.0, 3.0, 2.0]) == pytest.approx(50)
    assert canary.percent(500, [2.0, 3.0, 1.0]) == pytest.approx(50)
    assert canary.percent(500, [2.0, 6.0, 4.0]) == pytest.approx(25)


@pytest.mark.parametrize(("canary", "noisy"), [([(1.0, 1.0), (2.0, 0.5)], True), ([(1.0, 1.0)] * 2, False)])
def test_a_noisy_run_is_marked(canary: list[tuple[float, float]], noisy: bool) -> None:
    machine = Machine(ScriptedCanary(iter(canary)), CEILINGS)
    rows = measure_op(OPS["intra"], [SMALL], QUICK, machine, providers=["ours"], modes=["full"])
    assert [row.noisy for row in rows] == [noisy, noisy]
    assert ("NOISY" in report.text(make_result(rows), rows)) is noisy


def test_peak_memory_counts_temporaries_and_results() -> None:
    x = torch.ones(1000, 250)  # 1 MB

    def call(_: object) -> Tensor:
        first = x + 1
        second = first + 1
        del first
        return second + 1  # two live at once, three allocated in all

    assert harness.peak_memory(Timed(lambda: None, call), CPU) == pytest.approx(2e6, rel=0.01)


def test_ceilings_are_the_best_rates_of_a_product_and_a_copy() -> None:
    class FiveTimes(harness.CpuClock):
        """Runs each call, and counts its times down from 5 seconds after the warm-up."""

        def time(self, timed: Timed, repeats: int) -> float:
            timed.call(timed.setup())
            return next(times)

    times = iter([9.0, 9.0, *[5.0, 4.0, 3.0, 2.0, 8.0] * 2])
    found = harness.ceilings(CPU, FiveTimes(), size=64)
    # 2 * 64^3 flops, and 64^2 bytes read and written, in 2 seconds.
    assert found == (2 * 64**3 / 2.0, 2 * 64**2 / 2.0)
