"""The benchmark of angle-wise RKD: both forms are right, a wrong one is named, and both are measured."""

from __future__ import annotations

import pytest
import torch

from benchmarks.speed.commands import rkd
from benchmarks.speed.inputs import Sizes

CPU = torch.device("cpu")
TINY = Sizes(batch=6, rows=4, width=8, centroids=0, points=0)


def test_both_forms_are_the_plain_formula() -> None:
    rkd.check(TINY, CPU)


def test_a_wrong_form_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rkd.usual_angle
    monkeypatch.setattr(rkd, "usual_angle", lambda student, teacher: right(student, teacher) * 1.01)
    with pytest.raises(
        ValueError, match=r"usual form: expected the plain formula to 0\.001, got an error of 0\.0"
    ):
        rkd.check(TINY, CPU)


def test_time_and_memory_of_both_are_in_the_table() -> None:
    measured, peaks = rkd.measure(TINY, CPU, seconds=0, min_rounds=2)
    header, *lines = rkd.table(measured, peaks)
    assert [line[0] for line in lines] == [rkd.OURS, rkd.USUAL]
    assert lines[0][3] == lines[0][5] == "1.0"
    assert all(len(line) == len(header) for line in lines)
    assert peaks[rkd.USUAL] > 0
