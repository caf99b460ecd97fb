"""The CPU's time to enqueue a loss: what is timed, and that kernels and environment are put back."""

from __future__ import annotations

import os

import pytest
import torch
from triton.runtime.jit import JITFunction

from benchmarks.speed.commands import enqueue
from benchmarks.speed.harness import Measurement
from benchmarks.speed.inputs import Sizes
from fsd_kernels.intra_cka import triton as intra_triton

TINY = Sizes(batch=4, rows=16, width=32, centroids=5)


def _kernels() -> dict[str, object]:
    return {name: value for name, value in vars(intra_triton).items() if name.endswith("_kernel")}


def test_launches_are_counted_and_not_made() -> None:
    kernels, environment = _kernels(), dict(os.environ)
    # On a CPU a launch that is made fails: there is no driver.
    measured, launches = enqueue.measure(TINY, torch.bfloat16, seconds=0, min_rounds=2)
    assert {name: len(samples) for name, samples in measured.samples.items()} == {
        "L_I": 2,
        "L_G + L_L": 2,
        "Python": 2,
    }
    # A forward and a backward, of one side and of two.
    assert launches["L_I"] >= 2
    assert launches["L_G + L_L"] >= 5
    assert _kernels() == kernels
    assert all(isinstance(kernel, JITFunction) for kernel in kernels.values())
    assert dict(os.environ) == environment


def test_kernels_are_put_back_where_a_call_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = _kernels()
    monkeypatch.setenv("FSD_BACKEND", "eager")
    with pytest.raises(RuntimeError, match="negative dimension"):
        enqueue.measure(TINY._replace(batch=-1), torch.float32, seconds=0)
    assert _kernels() == kernels
    assert os.environ["FSD_BACKEND"] == "eager"


def test_times_are_relative_to_python_round_by_round() -> None:
    samples = {"L_I": [2e-4, 6e-4], "L_G + L_L": [4e-4, 4e-4], "Python": [1e-4, 2e-4]}
    header, intra, inter = enqueue.table(Measurement(samples), {"L_I": 3, "L_G + L_L": 9})
    assert header[:3] == ["pass", "launches", "us"]
    assert intra[:5] == ["L_I", "3", "400", "300 to 500", "2.50 (2.25 to 2.75)"]
    assert inter[:5] == ["L_G + L_L", "9", "400", "400 to 400", "3.00 (2.50 to 3.50)"]
