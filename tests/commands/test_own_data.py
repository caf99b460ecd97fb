"""Data of one's own through every command, and predictions for test sets."""

import csv
import json

import numpy as np
import pytest

from fsd_fast import cli
from fsd_fast.commands import run
from fsd_fast.memory.teacher_memory import TeacherMemory
from tests.tiny import TRAINING, save_backbone, tiny

__all__ = ["tiny"]

LENGTH = ["--max_seq_length", "24"]


def write_csv(path, rows, header=("review", "verdict")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Three files of one's own: a sentence is 'thumbs up' where it is good."""
    folder = tmp_path_factory.mktemp("own")
    generator = np.random.default_rng(0)
    words = "one two three four five six seven".split()

    def rows(size):
        for place in range(size):
            good = place % 2 == 0
            text = " ".join([*generator.choice(words, 3), "good" if good else "bad"])
            yield text, "thumbs up" if good else "thumbs down"

    for name, size in (("train", 32), ("dev", 12), ("test", 10)):
        write_csv(folder / f"{name}.csv", rows(size))
    return folder


def data(own, *splits):
    flags = ["--text_columns", "review", "--label_column", "verdict", *LENGTH]
    names = {"train": "train", "validation": "dev", "test": "test"}
    for split in splits or ("train", "validation"):
        flags += [f"--{split}_file", str(own / f"{names[split]}.csv")]
    return flags


@pytest.fixture(scope="module")
def trained(own, tiny, tmp_path_factory):
    """A teacher, a memory and a student on data of one's own."""
    folder = tmp_path_factory.mktemp("runs")
    training = [*TRAINING, "--learning_rate", "2e-3", "--per_device_train_batch_size", "8"]
    run(
        "teacher",
        [
            *(*data(own), *training, "--model_name_or_path", str(tiny.backbone), "--max_steps", "60"),
            *("--output_dir", str(folder / "teacher")),
        ],
    )
    teacher = ["--teacher_model_name_or_path", str(folder / "teacher")]
    run(
        "memory",
        [
            *(*data(own, "train"), *teacher, "--num_centroid", "4", "--use_cpu"),
            *("--output_dir", str(folder / "memory")),
        ],
    )
    figures = run(
        "distill",
        [
            *(
                *data(own),
                *training,
                *teacher,
                "--student_layers",
                "2",
                "--method",
                "fsd_g",
                "--max_steps",
                "60",
            ),
            *("--memory_path", str(folder / "memory"), "--output_dir", str(folder / "student")),
        ],
    )
    return folder, figures


def test_a_student_learns_from_files_of_ones_own(trained, own, tiny):
    folder, figures = trained
    assert figures["eval_accuracy"] == 1
    config = json.loads((folder / "student" / "config.json").read_text())
    assert config["id2label"] == {"0": "thumbs down", "1": "thumbs up"}
    assert TeacherMemory.from_pretrained(folder / "memory").identity.task_name == "train"


def test_evaluate_takes_the_classes_from_the_classifier(trained, own):
    folder, figures = trained
    asked = ["--model_name_or_path", str(folder / "student"), "--use_cpu"]
    found = run("evaluate", [*data(own, "validation"), *asked])
    assert found["eval_loss"] == pytest.approx(figures["eval_loss"], rel=1e-6)
    both = run("evaluate", [*data(own, "validation", "test"), *asked])
    assert {"eval_validation_accuracy", "eval_test_accuracy"} <= both.keys()
    assert both["eval_validation_accuracy"] == found["eval_accuracy"]


def test_predict_writes_classes_and_probabilities(trained, own, tmp_path):
    folder, _ = trained
    with (own / "test.csv").open() as file:
        texts = list(csv.DictReader(file))
    bare = write_csv(tmp_path / "bare.csv", [[row["review"]] for row in texts], header=["review"])
    asked = [
        "--model_name_or_path",
        str(folder / "student"),
        "--use_cpu",
        "--text_columns",
        "review",
        *LENGTH,
    ]
    run("predict", [*asked, "--test_file", str(bare), "--output_dir", str(tmp_path / "out")])
    with (tmp_path / "out" / "predictions.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [row["prediction"] for row in found] == [row["verdict"] for row in texts]
    assert [row["index"] for row in found] == [str(place) for place in range(len(texts))]
    for row in found:
        chances = {name: float(row[f"probability_{name}"]) for name in ("thumbs up", "thumbs down")}
        assert sum(chances.values()) == pytest.approx(1, abs=2e-6)
        assert max(chances, key=chances.get) == row["prediction"]


def test_predict_writes_a_submission(tiny, tmp_path):
    lines = (tiny.rte / "dev.tsv").read_text().splitlines()
    test = ["\t".join(line.split("\t")[:3]) for line in lines]
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "test.tsv").write_text("\n".join(test) + "\n")
    flags = ["--task_name", "rte", "--data_dir", str(tmp_path), *LENGTH, "--use_cpu"]
    flags += ["--model_name_or_path", str(tiny.teacher), "--output_dir", str(tmp_path / "out")]
    # Batches are sorted by length, and the rows must come back in their order.
    assert run("predict", [*flags, "--per_device_eval_batch_size", "3"]) == {"predicted_samples": 12.0}
    found = [line.split("\t") for line in (tmp_path / "out" / "RTE.tsv").read_text().splitlines()]
    assert found[0] == ["index", "prediction"]
    scores = run("evaluate", [*tiny.data(), "--model_name_or_path", str(tiny.teacher), "--use_cpu"])
    right = sum(row[1] == line.split("\t")[3] for row, line in zip(found[1:], lines[1:], strict=True))
    assert right / 12 == pytest.approx(scores["eval_accuracy"])
    assert len({row[1] for row in found[1:]}) == 2


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        ("teacher", ["train"], "--validation_file: expected a file for this command beside --train_file"),
        (
            "teacher",
            ["train", "validation", "test"],
            "--test_file: test rows are for 'evaluate' and 'predict'",
        ),
        ("teacher", ["train", "validation", "--task_name", "rte"], "task_name: expected a name of its own"),
        (
            "teacher",
            ["train", "validation", "--data_dir", "."],
            "data_dir: expected none with files of one's own",
        ),
        (
            "teacher",
            ["train", "validation", "--text_columns", "text"],
            "train.csv, line 2: expected a column 'text'",
        ),
        ("teacher", ["train", "validation", "--label_type", "score"], "train.csv, line 2: score 'thumbs up'"),
        ("teacher", ["--text_columns", "text"], "text_columns: expected --train_file"),
        ("evaluate", ["train"], "train_file: expected --validation_file or --test_file beside it"),
        ("evaluate", ["validation", "--label_type", "score"], "score 'thumbs up'"),
        ("predict", ["validation"], "--validation_file: test sets alone are read"),
        (
            "predict",
            ["test", "--label_type", "score"],
            "label_type: expected classes for this classifier, got score",
        ),
        (
            "predict",
            ["test", "--max_eval_samples", "3"],
            "--max_eval_samples: a test set is predicted as a whole",
        ),
        (
            "predict",
            ["--task_name", "reviews"],
            "'reviews' has no test set; expected a GLUE task, or --test_file",
        ),
    ],
)
def test_what_does_not_fit_is_refused(trained, own, tiny, tmp_path, capsys, command, flags, words):
    folder, _ = trained
    model = tiny.backbone if command == "teacher" else folder / "teacher"
    splits = [name for name in flags if name in ("train", "validation", "test")]
    given = [*(data(own, *splits) if splits else LENGTH), *flags[len(splits) :]]
    given += ["--model_name_or_path", str(model), "--use_cpu", "--output_dir", str(tmp_path / "out")]
    assert cli.main([command, *given]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"fsd-fast {command}: error: ")
    assert words in message
    assert not (tmp_path / "out").exists()


def test_a_classifier_of_other_classes_is_refused(own, tmp_path, capsys):
    model = save_backbone(tmp_path / "model", labels=2)
    asked = ["--model_name_or_path", str(model), "--use_cpu", *data(own, "validation")]
    assert cli.main(["evaluate", *asked]) == 2
    assert (
        "dev.csv, line 2: unknown label 'thumbs up'; expected one of LABEL_0, LABEL_1"
        in capsys.readouterr().err
    )
