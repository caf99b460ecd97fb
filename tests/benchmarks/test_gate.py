"""The gate: a wrong provider is refused and not timed, and the limits are those that it states."""

from __future__ import annotations

import pytest
import torch

from benchmarks.speed import gate, report
from benchmarks.speed.contenders import LossContender, Outcome
from benchmarks.speed.inputs import Inputs, Sizes
from benchmarks.speed.measure import measure_op
from benchmarks.speed.ops import Provider
from benchmarks.speed.peers import Unavailable
from benchmarks.speed.results import BOUND, OK, UNAVAILABLE, WRONG
from tests.benchmarks.helpers import QUICK, SMALL, intra_with, machine, make_result, wrong


@pytest.mark.parametrize(
    ("provider", "word"),
    [
        (wrong(gradient=1.05), "gradient"),
        (wrong(gradient=-1.0), "gradient"),
        (wrong(value=0.98), "value"),
        (wrong(gradient=float("nan")), "gradient"),
        (wrong(gradient=1 + 5e-4, ours=True), "gradient"),
    ],
)
def test_a_wrong_provider_is_refused_and_not_timed(provider: Provider, word: str) -> None:
    op = intra_with(broken=provider)
    rows = measure_op(op, [SMALL], QUICK, machine(), providers=["ours", "broken"], modes=["full"])
    ours, broken, bound = rows
    assert (bound.provider, bound.status, len(bound.samples)) == ("products", BOUND, 2)
    assert (ours.status, len(ours.samples)) == (OK, 2)
    assert (broken.status, broken.samples) == (WRONG, [])
    assert word in broken.reason
    assert "wrong:" in report.text(make_result(rows), rows)


def test_others_may_lose_digits_that_ours_may_not() -> None:
    truth = Outcome(torch.tensor(1.0), (torch.ones(3),))
    slightly_off = Outcome(torch.tensor(1.0), (torch.ones(3) * (1 + 5e-5),))
    float32 = torch.float32
    assert not gate.judge(slightly_off, truth, gate.limit(True, float32, False)).passed
    assert gate.judge(slightly_off, truth, gate.limit(False, float32, False)).passed
    assert gate.limit(True, float32, True) == gate.limit(True, torch.float16, True) == 2.0**-9
    assert gate.limit(True, torch.bfloat16, True) == 2.0**-6
    # A point between two centroids may go to either if operands are rounded.
    assert gate.limit(True, float32, False, discrete=True) == 1e-5
    assert gate.limit(True, float32, True, discrete=True) == gate.limit(False, float32, True) == 0.1


def test_a_missing_gradient_or_another_shape_is_wrong() -> None:
    truth = Outcome(torch.tensor(1.0), (torch.ones(3),))
    for outcome in (Outcome(torch.tensor(1.0), ()), Outcome(torch.tensor(1.0), (torch.ones(4),))):
        assert not gate.judge(outcome, truth, 1e-2).passed


def test_a_loss_that_passes_no_gradient_is_wrong() -> None:
    detached = Provider(
        lambda inputs, _: LossContender(lambda t: t["student"].detach().sum(), inputs, ("student",))
    )
    (row,) = measure_op(
        intra_with(detached=detached), [SMALL], QUICK, machine(), providers=["detached"], modes=["full"]
    )
    assert (row.status, row.samples) == (WRONG, [])
    assert "passes no gradient" in row.reason


def test_a_peer_that_cannot_run_gives_its_reason() -> None:
    def build(inputs: Inputs, sizes: Sizes) -> LossContender:
        raise Unavailable("needs a flux capacitor")

    op = intra_with(peer=Provider(build))
    rows = measure_op(op, [SMALL], QUICK, machine(), providers=["peer"], modes=["full"])
    assert [(row.status, row.reason) for row in rows] == [(UNAVAILABLE, "needs a flux capacitor")]
    assert "needs a flux capacitor" in report.text(make_result(rows), rows)
