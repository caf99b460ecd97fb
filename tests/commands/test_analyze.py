"""``analyze``: the files it writes, figures that must hold, and input that it refuses."""

import csv
import html
import json
import shutil

import pytest

from fsd_fast import cli
from fsd_fast.commands import run
from tests.tiny import save_backbone, tiny, write_stsb

__all__ = ["tiny"]


def flags(tiny, student, *more):
    models = ["--model_name_or_path", str(student), "--teacher_model_name_or_path", str(tiny.teacher)]
    return [*tiny.data(), *models, "--use_cpu", "--per_device_batch_size", "6", *map(str, more)]


@pytest.fixture(scope="module")
def student(tiny, tmp_path_factory):
    """A student's run, whose name and one of whose settings would be HTML."""
    folder = tmp_path_factory.mktemp("runs") / "<b>run & 'one'"
    run("distill", [*tiny.distillation(folder, steps=4), "--run_name", "<img src=x onerror=alert(1)>"])
    return folder


def test_a_run_gets_a_report_of_its_own(tiny, student):
    figures = run("analyze", flags(tiny, student, "--memory_path", tiny.memory_exclude))
    folder = student / "analysis"
    assert {path.name for path in folder.iterdir()} == {
        *("analysis.json", "cka.csv", "cka.png", "curves.png", "euclid_cosine.png", "report.html", "tsne.png")
    }
    found = json.loads((folder / "analysis.json").read_text())
    assert found["samples"] == 12
    assert found["cka_mean_diagonal"] == figures["cka_mean_diagonal"]
    assert found["cost"]["student"]["parameters"] < found["cost"]["teacher"]["parameters"]
    assert found["cost"]["student"]["disk_bytes"] == (student / "model.safetensors").stat().st_size
    assert found["cost"]["teacher"]["latency_ms"] > 0
    assert found["cost"]["teacher"]["samples_per_second"] > 0
    with (folder / "cka.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 3
    matched = [float(row["cka"]) for row in rows if row["matched"] == "true"]
    assert sum(matched) / len(matched) == pytest.approx(found["cka_mean_diagonal"], rel=1e-6)
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "<b>run" not in page
    assert "onerror=alert(1)>" not in page
    assert html.escape("<b>run & 'one'") in page
    for title in (
        "Evaluation",
        "Training",
        "Size and speed",
        "Layers compared",
        "Structure restored",
        "Settings",
    ):
        assert f"<h2>{title}</h2>" in page


def test_a_model_beside_itself_differs_in_nothing(tiny, tmp_path):
    figures = run("analyze", flags(tiny, tiny.teacher, "--output_dir", tmp_path / "out"))
    assert {value for name, value in figures.items() if name.startswith("restoration_")} == {0.0}
    assert figures["cka_mean_diagonal"] == pytest.approx(1, rel=1e-6)
    assert figures["student_parameters"] == figures["teacher_parameters"]


def test_the_order_of_the_samples_is_seeded(tiny, student, tmp_path):
    def compared(name, *more):
        figures = run(
            "analyze", flags(tiny, student, "--output_dir", tmp_path / name, "--num_samples", "6", *more)
        )
        return figures["restoration_between_distance"], figures["cka_mean_diagonal"]

    assert compared("one") == compared("two")
    assert compared("one") != compared("three", "--seed", "1")


def test_scores_and_models_that_are_no_runs(tiny, tmp_path):
    data = [
        "--task_name",
        "stsb",
        "--data_dir",
        str(write_stsb(tmp_path / "STS-B")),
        "--max_seq_length",
        "24",
    ]
    teacher = save_backbone(tmp_path / "teacher", labels=1)
    narrow = save_backbone(tmp_path / "narrow", labels=1, hidden=16, layers=2, seed=3)
    models = ["--teacher_model_name_or_path", str(teacher), "--model_name_or_path", str(narrow)]
    for policy in ("include", "exclude"):
        out = tmp_path / policy
        run("analyze", [*data, *models, "--use_cpu", "--pad_features", policy, "--output_dir", str(out)])
        names = {path.name for path in out.iterdir()}
        assert "curves.png" not in names
        assert "report.html" in names


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--num_samples", "3"], "--num_samples: expected at least 4, got 3"),
        (["--max_eval_samples", "3"], "num_samples: expected at least 4 evaluation samples, got 3"),
        (["--memory_path", "nowhere"], "nowhere"),
        (["--max_seq_length", "20", "--memory_path", "MEMORY"], "max_seq_length is 24, expected 20"),
    ],
)
def test_what_cannot_be_compared_is_refused(tiny, tmp_path, capsys, more, words):
    more = [str(tiny.memory_exclude) if word == "MEMORY" else word for word in more]
    assert cli.main(["analyze", *flags(tiny, tiny.teacher, "--output_dir", tmp_path / "out", *more)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("fsd-fast analyze: error: ")
    assert words in message
    assert not (tmp_path / "out").exists()


def test_a_damaged_log_is_refused(tiny, student, tmp_path, capsys):
    folder = shutil.copytree(student, tmp_path / "run", ignore=shutil.ignore_patterns("analysis"))
    for content, words in (
        ("{", "not a JSON file"),
        ('{"log_history": [1]}', "log_history: expected a list of objects"),
    ):
        (folder / "trainer_state.json").write_text(content)
        assert cli.main(["analyze", *flags(tiny, folder)]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
        assert not (folder / "analysis").exists()
