"""Files of predictions: GLUE's form for all nine tasks, and CSV with probabilities."""

import csv
import io

import numpy as np
import pytest

from fsd_fast.data import TASKS, get_task
from fsd_fast.data.glue import read_glue_test
from fsd_fast.data.load import load_task_test
from fsd_fast.data.submission import predictions_csv, submission, submission_name

OFFICIAL = {
    "cola": ("CoLA", {"test": "index\tsentence\n"}, '0\tA "b.\n', {"test": "CoLA.tsv"}, "01"),
    "sst2": ("SST-2", {"test": "index\tsentence\n"}, "0\tgood \n", {"test": "SST-2.tsv"}, "01"),
    "mrpc": (
        "MRPC",
        {"test": "\ufeffindex\t#1 ID\t#2 ID\t#1 String\t#2 String\n"},
        '0\t1\t2\tOne "a\tTwo\n',
        {"test": "MRPC.tsv"},
        "01",
    ),
    "stsb": (
        "STS-B",
        {"test": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\n"},
        "0\tnews\tf\t2012\t1\tn\tn\tOne\tTwo\n",
        {"test": "STS-B.tsv"},
        None,
    ),
    "qqp": ("QQP", {"test": "id\tquestion1\tquestion2\n"}, "0\tWhy?\tHow?\n", {"test": "QQP.tsv"}, "01"),
    "mnli": (
        "MNLI",
        dict.fromkeys(
            ("test_matched", "test_mismatched"),
            "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
            "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\n",
        ),
        "0\t1\t1e\tfiction\t( a )\t( b )\t(S a)\t(S b)\tOne\tTwo\n",
        {"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
        ("entailment", "neutral", "contradiction"),
    ),
    "qnli": (
        "QNLI",
        {"test": "index\tquestion\tsentence\n"},
        "0\tWhy?\tHere\n",
        {"test": "QNLI.tsv"},
        ("entailment", "not_entailment"),
    ),
    "rte": (
        "RTE",
        {"test": "index\tsentence1\tsentence2\n"},
        "0\tOne\tTwo\n",
        {"test": "RTE.tsv"},
        ("entailment", "not_entailment"),
    ),
    "wnli": ("WNLI", {"test": "index\tsentence1\tsentence2\n"}, "0\tOne\tTwo\n", {"test": "WNLI.tsv"}, "01"),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_task_has_its_test_files_and_its_submission(tmp_path, name):
    task = get_task(name)
    folder, headers, row, files, classes = OFFICIAL[name]
    (tmp_path / folder).mkdir()
    for split, header in headers.items():
        (tmp_path / folder / f"{split}.tsv").write_text(header + row * 3, encoding="utf-8")
    splits = read_glue_test(task, tmp_path)
    assert splits.keys() == headers.keys()
    for split, rows in splits.items():
        assert rows.column_names == [*task.text_columns, "idx"]
        assert len(rows) == 3
        assert submission_name(task, split) == files[split]
    if classes is None:
        lines = submission(task, [[-0.3], [2.34567], [7.0]]).splitlines()
        assert lines == ["index\tprediction", "0\t0.000", "1\t2.346", "2\t5.000"]
    else:
        logits = np.eye(task.num_labels)
        lines = submission(task, logits).splitlines()
        assert lines == ["index\tprediction", *(f"{place}\t{each}" for place, each in enumerate(classes))]


def test_no_task_is_left_out():
    assert OFFICIAL.keys() == {name for name, task in TASKS.items() if task.folder}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            ("sentence1", "sentence"),
            r"test\.tsv, line 1: expected a header with sentence1, sentence2; found the header",
        ),
        (("One\tTwo", "One"), r"test\.tsv, line 2: found 2 columns, expected 3"),
        (("0\tOne\tTwo\n", ""), r"test\.tsv: no rows"),
    ],
)
def test_damaged_test_files_are_refused(tmp_path, change, words):
    (tmp_path / "test.tsv").write_text("index\tsentence1\tsentence2\n0\tOne\tTwo\n".replace(*change))
    with pytest.raises(ValueError, match=words):
        read_glue_test(get_task("rte"), tmp_path)


def test_rows_of_a_submission_are_never_skipped(tmp_path):
    # In the labelled files of QQP broken rows are.
    (tmp_path / "test.tsv").write_text("id\tquestion1\tquestion2\n0\tWhy\n?\tHow?\n")
    with pytest.raises(ValueError, match="line 2: found 2 columns, expected 3"):
        read_glue_test(get_task("qqp"), tmp_path)


def test_missing_test_sets_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"test_matched\.tsv"):
        read_glue_test(get_task("mnli"), tmp_path)
    with pytest.raises(ValueError, match="'reviews' has no test set"):
        load_task_test(get_task("reviews"))


def test_probabilities_are_those_of_the_logits():
    logits = np.random.default_rng(0).normal(size=(5, 3))
    rows = list(csv.reader(io.StringIO(predictions_csv(get_task("mnli"), logits))))
    assert rows[0] == ["index", "prediction", *(f"probability_{name}" for name in get_task("mnli").labels)]
    for place, (row, z) in enumerate(zip(rows[1:], logits, strict=True)):
        chances = np.exp(z) / np.exp(z).sum()
        assert row[:2] == [str(place), get_task("mnli").labels[int(chances.argmax())]]
        assert np.array(row[2:], dtype=float) == pytest.approx(chances, abs=1e-6)
    assert predictions_csv(get_task("stsb"), [[1.25], [-7.0]]) == "index,prediction\n0,1.25\n1,-7\n"


def test_outputs_that_are_not_finite_are_refused():
    for write in (submission, predictions_csv):
        with pytest.raises(ValueError, match="NaN or infinite"):
            write(get_task("rte"), [[np.nan, 0.0]])
