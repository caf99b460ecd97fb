"""``python -m benchmarks load``: its bounds, its extrapolation, and what it makes of growth."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.load import memory_process
from benchmarks.load.memory import STAGES, Build, Case, allowed_bytes, extrapolated, predicted
from benchmarks.load.process import measure
from benchmarks.load.steps import growth
from benchmarks.load.synthetic import SyntheticFeatures
from benchmarks.resident import open_files
from fsd_kernels import cost
from tests.tiny import memory_identity

MNLI = Case(400_000, 128, 768, 300)
DEVICE = cost.Device("a test", 1e10, {"fp32": 1e11})


def test_the_bound_of_a_memory_holds_no_features() -> None:
    per_sample = allowed_bytes(MNLI._replace(samples=2)) - allowed_bytes(MNLI._replace(samples=1))
    # A sketch of 2,048 numbers and an image of 1,024 twice; a sample's features have 393,216 bytes.
    assert per_sample == 4 * 2048 + 2 * 4 * 1024 + 256
    assert allowed_bytes(MNLI) == 400_000 * per_sample + (32 * 300 + 24 * 32) * 128 * 768 + 2**28
    # Narrow features are their own sketches.
    narrow = MNLI._replace(length=4, width=8)
    assert allowed_bytes(narrow._replace(samples=2)) - allowed_bytes(narrow._replace(samples=1)) == 640


def test_the_prediction_counts_what_each_stage_reads_and_multiplies() -> None:
    seconds = predicted(MNLI, [10, 20], DEVICE)
    features, sketches, centroids = 400_000 * 128 * 768, 400_000 * 2048, 300 * 2048
    assert seconds["pass_1"] == pytest.approx(4 * (features + sketches) / 1e10)
    assert seconds["pass_2"] == pytest.approx((4 * features + 8 * 300 * 128 * 768) / 1e10)
    products = 2 * sketches * 300 / 1e11
    sums = 4 * (sketches + 2 * centroids) / 1e10
    draws = 4 * 400_000 * 1024 / 1e10  # more than the seven products of a draw take
    assert seconds["sketch_clustering"] == pytest.approx(30 * (products + sums) + 2 * 299 * draws)


def build(case: Case, epochs: list[int], times: float) -> Build:
    """A build that took so many times its prediction."""
    of = predicted(case, epochs, DEVICE)
    figures = {
        "growth": allowed_bytes(case),
        "seconds": {stage: times * of[stage] for stage in STAGES},
        "files_left_open": 0,
        "epochs": epochs,
        "teacher_seconds": 0.0,
    }
    return Build(case, figures, of)


def test_the_time_of_a_larger_build_is_so_many_times_its_prediction() -> None:
    passes, clustering = build(MNLI._replace(samples=4000), [3], 2), build(MNLI, [9], 5)
    of = predicted(MNLI, [9, 9], DEVICE)
    seconds = extrapolated(MNLI, [9, 9], passes, clustering, DEVICE)
    assert seconds == pytest.approx(2 * (of["pass_1"] + of["pass_2"]) + 5 * of["sketch_clustering"])


@pytest.mark.parametrize(
    ("resident", "grown"),
    [
        ([100] * 100, 0),
        ([*range(10), *[100] * 90], 0),  # what a run loads at its start
        ([100 + step for step in range(100)], (194.5 / 114.5) - 1),
        ([100] * 50 + [500] + [100] * 49, 0),  # a checkpoint that was just being written
    ],
)
def test_growth_is_that_between_the_second_and_the_last_tenth(resident: list[int], grown: float) -> None:
    assert growth(resident) == pytest.approx(grown)


def test_synthetic_features_are_the_same_on_every_pass_and_from_the_middle() -> None:
    features = SyntheticFeatures(memory_identity(3, 5, 4), 70)
    first, again = list(features.batches(0)), list(features.batches(0))
    assert [batch.features.shape[0] for batch in first] == [32, 32, 6]
    assert all(torch.equal(one.features, two.features) for one, two in zip(first, again, strict=True))
    (last,) = features.batches(2)
    assert torch.equal(last.features, first[2].features)
    assert torch.equal(last.sample_index, torch.arange(64, 70))
    points = torch.cat([batch.features.flatten(1) for batch in first])
    assert points.unique(dim=0).shape[0] == 70
    assert features.seconds > 0


def test_a_build_prints_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    memory_process.main(100, 4, 8, 5)
    figures = json.loads(capsys.readouterr().out)
    assert figures["samples"] == 100
    assert figures["growth"] >= 0
    assert figures["files_left_open"] == 0
    assert len(figures["epochs"]) == 4
    assert figures["seconds"].keys() == set(STAGES)


def test_open_files_are_counted(tmp_path: Any) -> None:
    before = open_files()
    with (tmp_path / "file").open("w"):
        assert open_files() == before + 1
    assert open_files() == before


def test_a_run_is_watched_to_its_end() -> None:
    figures = measure("steps_process", 40, 20, threads=1)
    assert len(figures["resident"]) == len(figures["open_files"]) == 20
    assert min(figures["resident"]) > 10 << 20
    assert figures["seconds"] > 0


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Measures nothing; what ``changes`` holds replaces what every process would print."""
    changes: dict[str, Any] = {}

    def printed(module: str, *sizes: int, threads: int) -> dict[str, Any]:
        if module == "steps_process":
            return {"resident": [100] * 100, "open_files": [5] * 100, "seconds": 1.0} | changes
        case = Case(*sizes)
        return build(case, [3], 2).figures | {"growth": allowed_bytes(case) // 2} | changes

    monkeypatch.setattr("benchmarks.load.memory.measure", printed)
    monkeypatch.setattr("benchmarks.load.steps.measure", printed)
    monkeypatch.setattr("benchmarks.load.memory._this_machine", lambda: DEVICE)
    return changes


def test_all_limits_hold(measured: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    path = tmp_path / "figures.json"
    assert main(["load", "--check", "--full", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"{MNLI}: at most +{allowed_bytes(MNLI) / 2**20:,.0f} MiB" in printed
    assert printed.index("stated beforehand") < printed.index("peak memory +")
    facts = json.loads(path.read_text(encoding="utf-8"))
    assert facts["memory"]["extrapolated_seconds"] == pytest.approx(
        2 * facts["memory"]["lower_bound_seconds"]
    )
    assert len(facts["numbers"]) == 13
    assert all(one["passed"] for one in facts["numbers"])


@pytest.mark.parametrize(
    ("part", "change", "missed"),
    [
        ("memory", {"growth": 10**11}, "peak memory / allowed"),
        ("memory", {"files_left_open": 1}, "files left open"),
        ("steps", {"resident": [*[100] * 90, *[103] * 10]}, "growth of the resident memory"),
        ("steps", {"open_files": [*[5] * 99, 6]}, "further open files"),
    ],
)
def test_a_missed_limit_fails_the_check(
    measured: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    part: str,
    change: dict[str, Any],
    missed: str,
) -> None:
    measured |= change
    assert main(["load", "--part", part]) == 0
    capsys.readouterr()
    assert main(["load", "--check", "--part", part]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("MISSED")]
    assert lines
    assert all(missed in line for line in lines)


def test_a_build_that_is_slower_than_foreseen_fails_the_check(
    measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(module: str, *sizes: int, threads: int) -> dict[str, Any]:
        case = Case(*sizes)
        return build(case, [3], 2 if case.samples < 16_000 else 3.1).figures | {"growth": case.samples}

    monkeypatch.setattr("benchmarks.load.memory.measure", printed)
    assert main(["load", "--check", "--part", "memory"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.endswith("MISSED")]
    assert line.startswith("N = 16,000, S = 128, D = 768, K = 300: time / extrapolated from 4,000  1.55 ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "15999"], "--samples: expected at least 16,000, got 15999"),
        (["--steps", "99"], "--steps: expected at least 100, got 99"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
    ],
)
def test_bad_flags_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", *flags]) == 2
    assert message in capsys.readouterr().err
