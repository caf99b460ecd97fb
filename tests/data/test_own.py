"""Files of one's own: what is read, and one clear line for everything that is wrong with them."""

import json

import pytest

from fsd_fast.data.own import MAXIMUM_LINE, Columns, read_own_task, read_own_texts

ROWS = [("a, b", 'she said "no"', "yes"), ("c\td", "two\nlines", "no"), ("ü", "", "yes")]
PAIR = Columns(("first", "second"), "label", "classes")
ONE = Columns(("text",), "label", "classes")
SCORE = Columns(("text",), "label", "score")


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


def csv_text(rows, separator=","):
    return "first,second,more,label\n" + "".join(
        separator.join([quoted(first), quoted(second), "x", label]) + "\n" for first, second, label in rows
    )


def jsonl_text(rows):
    return "".join(
        json.dumps({"label": label, "second": second, "first": first}) + "\n\n"
        for first, second, label in rows
    )


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        (".csv", csv_text(ROWS)),
        (".csv", "\ufeff" + csv_text(ROWS).replace("\n", "\r\n").replace("two\r\nlines", "two\nlines")),
        (".CSV", csv_text(ROWS)),
        (".jsonl", jsonl_text(ROWS)),
        (".json", jsonl_text(ROWS)),
    ],
)
def test_pairs_come_back_as_they_are(tmp_path, ending, content):
    train = tmp_path / f"mine{ending}"
    train.write_bytes(content.encode())
    dev = tmp_path / "dev.jsonl"
    dev.write_text(jsonl_text(ROWS[:1]))
    task, splits = read_own_task("mine", {"train": str(train), "validation": str(dev)}, PAIR)
    assert (task.name, task.labels, task.metrics, task.eval_splits) == (
        "mine",
        ("no", "yes"),
        ("accuracy",),
        ("validation",),
    )
    assert task.text_columns == ("first", "second")
    found = splits["train"]
    assert list(zip(found["first"], found["second"], found["label"], strict=True)) == [
        (first, second, int(label == "yes")) for first, second, label in ROWS
    ]
    assert found.features["label"].names == ["no", "yes"]
    assert list(splits["validation"]["idx"]) == [0]


def test_quotes_of_a_tsv_are_characters(tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_text('text\tlabel\n"open\t1\nclosed"\t0\n')
    _, splits = read_own_task("mine", {"train": str(path)}, ONE)
    assert list(splits["train"]["text"]) == ['"open', 'closed"']


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["10", "9", "2"], ("2", "9", "10")),
        (["b", "a", "10"], ("10", "a", "b")),
        ([True, False], ("false", "true")),
    ],
)
def test_classes_have_an_order(tmp_path, labels, expected):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels))
    task, _ = read_own_task("mine", {"train": str(path)}, ONE)
    assert task.labels == expected


def test_scores(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("text,label\na,1.5\nb,-2\n")
    task, splits = read_own_task("mine", {"train": str(path)}, SCORE)
    assert task.is_regression
    assert task.metrics == ("pearson", "spearmanr")
    assert list(splits["train"]["label"]) == [1.5, -2.0]


def test_texts_need_no_labels(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("text\na\nb\n")
    task, rows = read_own_texts("mine", str(path), ONE, ("no", "yes"))
    assert rows.column_names == ["text", "idx"]
    assert task.labels == ("no", "yes")
    with pytest.raises(
        ValueError, match=r"mine\.csv, line 2: expected a column 'label', found text; 'predict' takes"
    ):
        read_own_task("mine", {"test": str(path)}, ONE, ("no", "yes"))


GOOD = "text,label\nx,yes\ny,no\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.csv",
            GOOD.replace("text", "texts"),
            "a.csv, line 2: expected a column 'text', found texts, label",
        ),
        (
            "a.csv",
            GOOD.replace("text,", "text,text,"),
            "line 1: expected columns of different names, got 'text' twice",
        ),
        ("a.csv", GOOD + "z\n", "line 4: found 1 columns, expected 2"),
        ("a.csv", GOOD + "z,yes,\n", "line 4: found 3 columns, expected 2"),
        ("a.csv", GOOD + "z,\n", "line 4: label: expected a label, got nothing"),
        ("a.csv", GOOD + '"z,yes\n', "expected CSV: unexpected end of data"),
        ("a.csv", GOOD + '"z"x,yes\n', "line 4: expected CSV: "),
        ("a.csv", "text,label\n", "expected at least one row, found none"),
        ("a.csv", "", "line 1: expected a header"),
        ("a.csv", "text,label\nx,yes\ny,yes\n", "expected 2 to 1000 classes, got 1"),
        (
            "a.csv",
            "text,label\nx,not good\ny,Not_Good\n",
            "expected one spelling of a label, got 'Not_Good' and",
        ),
        (
            "a.csv",
            GOOD + "x" * (10 << 20) + ",yes\n",
            "line 4: expected at most 1,000,000 characters in a line, got more",
        ),
        (
            "a.csv",
            GOOD + '"' + "x\n" * MAXIMUM_LINE + '",yes\n',
            "expected CSV: field larger than field limit",
        ),
        ("a.csv", GOOD.encode("utf-16"), "a.csv: expected UTF-8, got byte 0xff after line 0"),
        ("a.csv", GOOD.encode() + "ü,yes\n".encode("latin-1"), "expected UTF-8, got byte 0xfc after line"),
        ("a.txt", GOOD, "expected a file ending in .csv, .tsv, .jsonl, .json, got .txt"),
        ("a", GOOD, "got no ending"),
        ("a.jsonl", '{"text": "x"', "a.jsonl, line 1: expected a JSON object, got "),
        ("a.jsonl", "[1]\n", "line 1: expected a JSON object, got list"),
        ("a.jsonl", '{"text": 3, "label": "a"}\n', "line 1: text: expected text, got '3'"),
        ("a.jsonl", '{"text": "x", "label": null}\n', "line 1: label: expected a label, got nothing"),
        ("a.jsonl", '{"text": "x", "label": [1]}\n', "line 1: label: expected a label, got [1]"),
        ("a.jsonl", "[" * 100_000, "line 1: expected a JSON object"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as caught:
        read_own_task("mine", {"train": str(path)}, ONE)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert words in message
    assert "\n" not in message
    assert len(message) < 400


def test_an_unknown_label_is_named(tmp_path):
    train, dev = tmp_path / "train.csv", tmp_path / "dev.csv"
    train.write_text(GOOD)
    dev.write_text("text,label\nx,yes\ny,maybe\n")
    with pytest.raises(ValueError, match=r"dev\.csv, line 3: unknown label 'maybe'; expected one of no, yes"):
        read_own_task("mine", {"train": str(train), "validation": str(dev)}, ONE)
    for text in ("high", "nan", "inf"):
        train.write_text(f"text,label\nx,{text}\n")
        with pytest.raises(ValueError, match=rf"line 2: score '{text}'; expected a finite number"):
            read_own_task("mine", {"train": str(train)}, SCORE)


def test_a_row_over_several_lines_is_named_by_its_first(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"x\nx\nx",yes\n"y\ny",\n')
    with pytest.raises(ValueError, match=r"a\.csv, line 5: label: expected a label, got nothing"):
        read_own_task("mine", {"train": str(path)}, ONE)


def test_names_and_columns_must_make_sense(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(GOOD)
    with pytest.raises(ValueError, match="task_name: expected a name of its own"):
        read_own_task("rte", {"train": str(path)}, ONE)
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such file"):
        read_own_task("mine", {"train": str(tmp_path / "none.csv")}, ONE)
    for texts in ((), ("a", "b", "c"), ("label",), ("a", "a")):
        with pytest.raises(
            ValueError, match="text_columns: expected one or two columns other than the label's"
        ):
            Columns(texts, "label", "classes")
