"""The performance targets as checks, and the growth of time with each size."""

from __future__ import annotations

import pytest

from benchmarks.speed import checks
from benchmarks.speed.growth import fitted_exponent, growth
from benchmarks.speed.inputs import Sizes
from benchmarks.speed.results import BOUND, WRONG, CheckResult, Row
from tests.benchmarks.helpers import make_result, make_row


def _check(rows: list[Row], name: str) -> CheckResult:
    return next(check for check in checks.evaluate(make_result(rows)) if check.name == name)


def test_fitted_exponent() -> None:
    assert fitted_exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="two different"):
        fitted_exponent([2, 2], [1.0, 1.0])


@pytest.mark.parametrize(("power", "passed"), [(1.0, True), (1.08, True), (1.3, False), (0.4, True)])
def test_growth_is_held_against_the_minimal_flops(power: float, passed: bool) -> None:
    rows = []
    # The machine runs at another speed for every case, and so does its canary.
    for batch, speed in zip((8, 16, 32, 64), (1.0, 0.7, 1.4, 0.5), strict=True):
        flops = batch * 10**6
        rows.append(
            make_row(
                "ours",
                [batch**power / speed],
                case=f"B={batch}",
                sizes=Sizes(batch, 128, 768, 100)._asdict(),
                minimal_flops=flops,
                matmul_percent=flops / batch**power,
            )
        )
    (found,) = growth(rows)
    assert (found.size, found.values, found.passed) == ("batch", [8, 16, 32, 64], passed)
    assert found.exponent == pytest.approx(power)
    check = _check(rows, "growth of intra")
    assert check.passed is passed
    assert check.measured == f"B {power:.3f} (flops 1.000)"


def test_a_ratio_check_compares_with_the_required_factor() -> None:
    name = "L_I against the released formulation"
    ours = make_row("ours", [1.0, 1.0, 1.0], noisy=True)
    good = _check([ours, make_row("released", [5.6, 5.5, 5.7])], name)
    assert (good.passed, good.measured, good.noisy) == (True, "5.600x (5.55 to 5.65; 3 rounds)", True)
    missed = _check([ours, make_row("released", [5.4, 5.498, 5.6])], name)
    assert (missed.passed, missed.measured.split()[0]) == (False, "5.498x")
    missing = _check([ours], name)
    assert missing.passed is None
    assert "not measured" in missing.reason


def test_the_best_peer_is_the_fastest_one_that_the_gate_accepted() -> None:
    rows = [
        make_row("ours", [1.0, 1.0]),
        make_row("pytorch-cka", [2.0, 2.0]),
        make_row("cka-pytorch", [1.3, 1.3]),
        make_row("ckatorch", [], status=WRONG, reason="off"),
    ]
    check = _check(rows, "L_I against the best peer")
    assert (check.passed, check.reason) == (False, "against cka-pytorch")
    assert _check([rows[0], rows[1], rows[3]], "L_I against the best peer").passed is True


def test_the_rate_check_names_the_rate_of_the_products_alone() -> None:
    name = "L_I against the machine"
    assert _check([make_row("ours", [1.0], matmul_percent=84.0)], name).passed is False
    bound = make_row("products", [0.9], status=BOUND, matmul_percent=93.0)
    check = _check([make_row("ours", [1.0], matmul_percent=86.0), bound], name)
    assert (check.passed, check.reason) == (True, "its products alone: 93 %")


@pytest.mark.parametrize(("peak", "passed"), [(129, True), (131, False)])
def test_the_memory_check_compares_with_the_gradients(peak: int, passed: bool) -> None:
    case = {"op": "fsd_ilg", "case": "B=32 S=128 D=768 K=100"}
    row = make_row("ours", [1.0], peak_bytes=peak, returned_bytes=100, **case)
    assert _check([row], "extra memory of FSD_ILG, K=100").passed is passed


@pytest.mark.parametrize(("times", "passed"), [([1.04, 1.05], True), ([1.06, 1.06], False)])
def test_the_step_check_compares_with_a_step_without_structures(times: list[float], passed: bool) -> None:
    case = {"op": "step", "case": "B=32 S=128 D=384 K=100"}
    rows = [make_row("ours", times, **case), make_row("vkd-only", [1.0, 1.0], **case)]
    assert _check(rows, "whole step, MiniLM, against VKD alone").passed is passed


def test_a_refused_provider_is_a_failed_check() -> None:
    rows = [make_row("pytorch-cka", [], status=WRONG, reason="value is off")]
    found = checks.evaluate(make_result(rows))
    assert (found[0].passed, found[0].reason) == (False, "value is off")
