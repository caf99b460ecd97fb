"""The benchmark of the teacher memory: what it counts, what it needs, and its limits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.memory import command
from benchmarks.memory.build import build_once, minimum_speedup
from benchmarks.memory.features import TaskFeatures
from benchmarks.memory.numbers import Number, numbers_table
from benchmarks.memory.peak_process import RandomPoints
from benchmarks.memory.released import released_procedure
from fsd_fast.memory.features import flatten_features
from tests.tiny import save_backbone, write_rte

LENGTH, CENTROIDS, SAMPLES = 24, 5, 40


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> TaskFeatures:
    folder = tmp_path_factory.mktemp("memory_benchmark")
    write_rte(folder / "glue" / "RTE", train=SAMPLES)
    backbone = save_backbone(folder / "backbone")
    return TaskFeatures("rte", folder / "glue", model=str(backbone), length=LENGTH, num_centroid=CENTROIDS)


@pytest.mark.parametrize(("cached", "passes"), [(False, 2), (True, 1)])
def test_a_build_counts_what_the_teacher_runs_on(features: TaskFeatures, cached: bool, passes: int) -> None:
    memory, seconds = build_once(features, "exclude", cached)
    assert features.teacher.samples == passes * SAMPLES
    assert memory.teacher_passes == passes
    assert 0 < features.teacher.seconds < seconds
    assert memory.centroids.shape == (CENTROIDS, LENGTH * 32)
    assert int(torch.tensor(memory.cluster_sizes).sum()) == SAMPLES


def test_the_released_procedure_runs_the_whole_teacher_six_times(features: TaskFeatures) -> None:
    features.teacher.reset()
    centroids = released_procedure(features, torch.Generator().manual_seed(0))
    assert features.teacher.samples == 6 * SAMPLES
    assert not features.teacher.all_layers
    assert centroids.shape == (CENTROIDS, LENGTH * 32)
    assert torch.isfinite(centroids).all()


def test_points_are_the_teachers_features_in_order_of_length(features: TaskFeatures) -> None:
    points = features.points()
    assert points.shape == (SAMPLES, features.longest * 32)
    widths = []
    for batch in features.batches("exclude"):
        flat = flatten_features(batch, features.identity("exclude"))
        width = min(flat.shape[1], points.shape[1])
        torch.testing.assert_close(points[batch.sample_index, :width], flat[:, :width])
        widths.append(flat.shape[1])
    assert widths == sorted(widths)


def test_all_layers_give_the_features_that_stopping_early_gives(features: TaskFeatures) -> None:
    short = next(features.batches("include")).features
    features.teacher.all_layers = True
    try:
        whole = next(features.batches("include")).features
    finally:
        features.teacher.all_layers = False
    torch.testing.assert_close(short, whole)


def test_samples_are_spread_over_the_training_set(features: TaskFeatures, tmp_path: Path) -> None:
    write_rte(tmp_path / "RTE", train=SAMPLES)
    some = TaskFeatures("rte", tmp_path, 10, model=features.teacher.name, length=LENGTH)
    assert len(some) == 10
    with pytest.raises(ValueError, match="glue: expected the folder"):
        TaskFeatures("rte", None, model=features.teacher.name)


@pytest.mark.parametrize(("bound", "minimum"), [(16.0, 8.0), (9.5, 8.0), (8.0, 6.8)])
def test_a_build_need_not_outrun_its_own_forward(bound: float, minimum: float) -> None:
    assert minimum_speedup(bound) == pytest.approx(minimum)


def test_a_missed_limit_is_marked() -> None:
    numbers = [Number.at_most("a", 2.0, 2), Number.at_most("b", 2.1, 2), Number.at_least("c", 0.9, 1)]
    assert [one.passed for one in numbers] == [True, False, False]
    _, *lines = numbers_table(numbers)
    assert lines == [
        ["a", "2", "<= 2", "holds"],
        ["b", "2.1", "<= 2", "MISSED"],
        ["c", "0.9", ">= 1", "MISSED"],
    ]


def test_random_points_are_the_same_on_every_pass() -> None:
    points = RandomPoints(150, 3)
    first, second = (torch.cat(list(points)) for _ in range(2))
    assert first.shape == (150, 3)
    assert torch.equal(first, second)


# ------------------------------------------------------------------------------------------------ the command


def test_tasks_without_data_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ["--part", "build", "--part", "quality", "--tasks", "rte,cola", "--check"]
    monkeypatch.delenv(command.GLUE_VARIABLE, raising=False)
    assert command.main(parts) == 0
    printed = capsys.readouterr().out
    assert "not measured, expected --glue DIR or FSD_GLUE_DIR: rte, cola" in printed
    assert "build: not measured, expected --glue DIR or FSD_GLUE_DIR: rte" in printed
    monkeypatch.setenv(command.GLUE_VARIABLE, str(tmp_path))
    assert command.main(parts) == 0
    assert f"not measured, no data in {tmp_path}: rte, cola" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "99"], "--samples: expected at least the 100 clusters, got 99"),
        (["--tasks", "rte,mnli"], "--tasks: expected some of rte, cola, reviews, got mnli"),
        (["--glue", "no/such/folder"], "--glue: expected the folder"),
    ],
)
def test_bad_flags_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        command.main(flags)
