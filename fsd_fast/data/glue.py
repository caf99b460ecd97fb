"""GLUE tasks read from the folders of the official download.

Each task is a folder of tab-separated files, one example per line. The files are not quoted: a double quote
is a character of the sentence like any other, and a reader that takes it for a quote joins lines and loses
rows. Fields are therefore found by splitting at tabs alone. Columns are found by the names in the header
(CoLA, which has none, by position), and every row must have as many columns as its header.

Every split becomes a `datasets.Dataset` with the text columns and the label order of GLUE on the Hub, plus
`idx`, the position of the row in its split.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from fsd_fast.data.tasks import Task

logger = logging.getLogger(__name__)

# Column of the file -> column of the dataset, in the order of Task.text_columns, then the label column.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "cola": ("sentence", "label"),
    "sst2": ("sentence", "label"),
    "mrpc": ("#1 String", "#2 String", "Quality"),
    "stsb": ("sentence1", "sentence2", "score"),
    "qqp": ("question1", "question2", "is_duplicate"),
    "mnli": ("sentence1", "sentence2", "gold_label"),
    "qnli": ("question", "sentence", "label"),
    "rte": ("sentence1", "sentence2", "label"),
    "wnli": ("sentence1", "sentence2", "label"),
}
_COLA_COLUMNS = ("source", "label", "note", "sentence")
# In these tasks the files hold class names; in the other classifications they hold class numbers.
_NAMED_LABELS = ("mnli", "qnli", "rte")
# Rows of the official files per split, to notice a file that was cut off exactly at the end of a line.
_OFFICIAL_ROWS: dict[str, dict[str, int]] = {
    "cola": {"train": 8551, "validation": 1043},
    "sst2": {"train": 67349, "validation": 872},
    "mrpc": {"train": 3668, "validation": 408},
    "stsb": {"train": 5749, "validation": 1500},
    "qqp": {"train": 363846, "validation": 40430},
    "mnli": {"train": 392702, "validation_matched": 9815, "validation_mismatched": 9832},
    "qnli": {"train": 104743, "validation": 5463},
    "rte": {"train": 2490, "validation": 277},
    "wnli": {"train": 635, "validation": 71},
}
_OFFICIAL_TEST_ROWS: dict[str, dict[str, int]] = {
    "cola": {"test": 1063},
    "sst2": {"test": 1821},
    "mrpc": {"test": 1725},
    "stsb": {"test": 1379},
    "qqp": {"test": 390965},
    "mnli": {"test_matched": 9796, "test_mismatched": 9847},
    "qnli": {"test": 5463},
    "rte": {"test": 3000},
    "wnli": {"test": 146},
}


def _file_names(task: Task) -> dict[str, str]:
    """Split name -> file name."""
    files = {"train": "train.tsv"}
    for split in task.eval_splits:
        files[split] = split.replace("validation", "dev") + ".tsv"
    return files


def _test_file_names(task: Task) -> dict[str, str]:
    """Name of a test split -> file name."""
    return {
        split.replace("validation", "test"): split.replace("validation", "test") + ".tsv"
        for split in task.eval_splits
    }


def _task_folder(task: Task, data_dir: Path, files: dict[str, str]) -> Path:
    """The folder of the task: below `data_dir`, or `data_dir` itself."""
    wanted = ", ".join(files.values())
    if not data_dir.is_dir():
        raise FileNotFoundError(
            f"data_dir {data_dir} is not a folder; expected the {task.folder} folder of the GLUE download, "
            f"or its parent, with the files {wanted}"
        )
    folder = data_dir / str(task.folder)
    if not folder.is_dir():
        folder = data_dir
    missing = [name for name in files.values() if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{', '.join(str(folder / name) for name in missing)} not found; task {task.name!r} expects the "
            f"files {wanted} in {data_dir / str(task.folder)} or in {data_dir} itself"
        )
    return folder


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number (from 1) and fields of every line that is not blank."""
    # newline="\n": a lone carriage return inside a sentence does not end a line; one before the line feed
    # (CRLF) is dropped below.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                line = line.rstrip("\r\n")
                if line:
                    yield number, line.split("\t")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text after line {number} ({error})") from error


def _parse_label(task: Task, text: str, where: str) -> int | float:
    text = text.strip()
    if task.score_range is not None:
        low, high = task.score_range
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        # Written so that NaN fails it.
        if not low <= score <= high:
            raise ValueError(f"{where}: score {text!r}; expected a number from {low:g} to {high:g}")
        return score
    known = task.labels if task.name in _NAMED_LABELS else tuple(str(i) for i in range(task.num_labels))
    if text not in known:
        raise ValueError(f"{where}: unknown label {text!r}; expected one of {', '.join(known)}")
    return known.index(text)


def _read_header(
    path: Path, lines: Iterator[tuple[int, list[str]]], wanted: tuple[str, ...]
) -> tuple[str, ...]:
    header = tuple(name.strip() for name in next(lines, (1, []))[1])
    if any(name not in header for name in wanted):
        found = f"the header {', '.join(header)}" if header else "an empty file"
        raise ValueError(f"{path}, line 1: expected a header with {', '.join(wanted)}; found {found}")
    return header


def _wrong_columns(path: Path, number: int, fields: list[str], header: tuple[str, ...]) -> ValueError:
    return ValueError(
        f"{path}, line {number}: found {len(fields)} columns, expected {len(header)} "
        f"({', '.join(header)}); the file may be damaged or not completely downloaded"
    )


def _read_tsv(task: Task, path: Path, split: str) -> Dataset:
    wanted = _COLUMNS[task.name]
    lines = _lines(path)
    header = _COLA_COLUMNS if task.name == "cola" else _read_header(path, lines, wanted)
    *text_at, label_at = (header.index(name) for name in wanted)

    columns: dict[str, list[str]] = {name: [] for name in task.text_columns}
    labels: list[int | float] = []
    skipped = 0
    for number, fields in lines:
        if len(fields) != len(header):
            # Some questions in the official QQP files hold a line break and so break a row in two.
            if task.name == "qqp":
                skipped += 1
                continue
            raise _wrong_columns(path, number, fields, header)
        labels.append(_parse_label(task, fields[label_at], f"{path}, line {number}"))
        for name, at in zip(columns, text_at, strict=True):
            columns[name].append(fields[at])

    if skipped:
        logger.warning("%s: skipped %d rows that do not have %d columns", path, skipped, len(header))
    if not labels:
        raise ValueError(f"{path}: no rows; the file is empty or was not completely downloaded")
    official = _OFFICIAL_ROWS[task.name][split]
    if len(labels) != official:
        logger.warning("%s: %d rows, where the official file has %d", path, len(labels), official)
    return to_dataset(task, columns, labels)


def to_dataset(task: Task, columns: dict[str, list[str]], labels: list[int | float]) -> Dataset:
    """Put columns together as a dataset typed like GLUE on the Hub.

    Args:
        task: The task, which names the classes.
        columns: The text columns, each with N strings.
        labels: N class numbers, or N scores for a regression.

    Returns:
        N rows: the text columns, `label` (`ClassLabel`, or float32 for a regression) and `idx` (int32), the
        position of the row.
    """
    label = Value("float32") if task.is_regression else ClassLabel(names=list(task.labels))
    features = Features(
        {**{name: Value("string") for name in columns}, "label": label, "idx": Value("int32")}
    )
    return Dataset.from_dict({**columns, "label": labels, "idx": list(range(len(labels)))}, features=features)


def read_glue_folder(task: Task, data_dir: str | Path) -> DatasetDict:
    """Read a GLUE task from the official TSV files.

    A file with another number of rows than the official one is read, with a warning: it may be a chosen
    subset, or a download that broke off at the end of a line.

    Args:
        task: One of the nine GLUE tasks.
        data_dir: The folder of the task, or the folder that holds it under its official name ("SST-2").

    Returns:
        `train` and the task's evaluation splits, with the text columns, `label` and `idx`.

    Raises:
        FileNotFoundError: If a file is missing; the message names it and those that are expected.
        ValueError: If a file is empty, not UTF-8, has another header, a row with another number of columns
            (in QQP such rows are skipped, counted and reported by a warning), or a label that the task does
            not have. The message names the file, the line, what was found and what was expected.
    """
    if task.folder is None:
        raise ValueError(f"task {task.name!r} is built in; only GLUE tasks are read from a folder")
    folder = _task_folder(task, Path(data_dir), _file_names(task))
    return DatasetDict(
        {split: _read_tsv(task, folder / name, split) for split, name in _file_names(task).items()}
    )


def read_glue_test(task: Task, data_dir: str | Path) -> DatasetDict:
    """Read the test files of a GLUE task, which have no labels.

    Args:
        task: One of the nine GLUE tasks.
        data_dir: The folder of the task, or the folder that holds it under its official name.

    Returns:
        "test", or for MNLI "test_matched" and "test_mismatched", with the text columns and `idx`.

    Raises:
        FileNotFoundError: If a file is missing; the message names it.
        ValueError: If a file is empty, not UTF-8, has another header, or a row with another number of columns: none is
            skipped here, since a submission has a line for each.
    """
    files = _test_file_names(task)
    folder = _task_folder(task, Path(data_dir), files)
    return DatasetDict({split: _read_test_tsv(task, folder / name, split) for split, name in files.items()})


def _read_test_tsv(task: Task, path: Path, split: str) -> Dataset:
    wanted = _COLUMNS[task.name][:-1]
    if task.name == "cola":  # whose test file alone has a header
        wanted = ("sentence",)
    lines = _lines(path)
    header = _read_header(path, lines, wanted)
    columns: dict[str, list[str]] = {name: [] for name in task.text_columns}
    for number, fields in lines:
        if len(fields) != len(header):
            raise _wrong_columns(path, number, fields, header)
        for name, source in zip(columns, wanted, strict=True):
            columns[name].append(fields[header.index(source)])
    rows = len(next(iter(columns.values())))
    if not rows:
        raise ValueError(f"{path}: no rows; the file is empty or was not completely downloaded")
    official = _OFFICIAL_TEST_ROWS[task.name][split]
    if rows != official:
        logger.warning("%s: %d rows, where the official file has %d", path, rows, official)
    return Dataset.from_dict({**columns, "idx": list(range(rows))})
