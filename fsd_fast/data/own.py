"""Data of one's own: CSV, TSV and JSON lines, with columns for one or two texts and for the label.

    .csv     comma-separated with a header; fields may be quoted
    .tsv     tab-separated with a header; never quoted: a double quote is a character like any other
    .jsonl   one JSON object a line (also .json)

A label is the name of a class or a score. The classes are those of the training file, in the order of their names (of
their numbers, where all are whole numbers). Files are UTF-8.
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict

from fsd_fast.data.glue import to_dataset
from fsd_fast.data.tasks import TASKS, Task, label_key

MAXIMUM_LINE = 1_000_000
"""Characters of a line; a longer one is most likely a file that has lost its line breaks."""
MAXIMUM_CLASSES = 1000
_FORMATS = (".csv", ".tsv", ".jsonl", ".json")

LabelType = Literal["classes", "score"]


@dataclass(frozen=True)
class Columns:
    """Which columns hold what.

    Attributes:
        texts: One or two columns of text.
        label: The column of the label.
        kind: Whether labels are names of classes or scores.
    """

    texts: tuple[str, ...]
    label: str
    kind: LabelType

    def __post_init__(self) -> None:
        if not 1 <= len(self.texts) <= 2 or len({*self.texts, self.label}) <= len(self.texts):
            raise ValueError(
                f"text_columns: expected one or two columns other than the label's, {self.label!r}; got "
                f"{', '.join(map(repr, self.texts)) or 'none'}"
            )


@dataclass(frozen=True)
class _Rows:
    """A file's rows: texts of each column, labels as they stand there, and where each row begins."""

    path: Path
    texts: dict[str, list[str]]
    labels: list[str] | None
    lines: list[int]


def read_own_task(
    name: str, files: Mapping[str, str], columns: Columns, labels: tuple[str, ...] | None = None
) -> tuple[Task, DatasetDict]:
    """Read a task from files of one's own.

    Args:
        name: Of the task; not one of the tasks there are.
        files: Split ("train", "validation", "test") -> file.
        columns: Their columns.
        labels: The classes in the order of the logits; None: those of the training file, which is then needed.

    Returns:
        The task, whose evaluation splits are the files other than the training file; and the splits, with the columns
        of text, `label` and `idx`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file has another format or encoding, lacks a column, or has a label that is no class or no
            score; the message names file and line.
    """
    check_own_name(name)
    rows = {split: _read(Path(file), columns, labelled=True) for split, file in files.items()}
    if columns.kind == "classes" and labels is None:
        labels = _classes(rows["train"])
    task = _task(name, columns, labels or (), tuple(split for split in files if split != "train"))
    return task, DatasetDict({split: _dataset(task, each) for split, each in rows.items()})


def read_own_texts(name: str, file: str, columns: Columns, labels: tuple[str, ...]) -> tuple[Task, Dataset]:
    """Read a file of which the labels are not read and need not be there.

    Args:
        name: Of the task.
        file: The file.
        columns: Its columns.
        labels: The classes in the order of the logits; empty for scores.

    Returns:
        The task, and the rows with the columns of text and `idx`.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It has another format or encoding, or lacks a column of text.
    """
    check_own_name(name)
    rows = _read(Path(file), columns, labelled=False)
    task = _task(name, columns, labels, ("test",))
    return task, Dataset.from_dict({**rows.texts, "idx": list(range(len(rows.lines)))})


def check_own_name(name: str) -> None:
    """Check that a name is none of a task that exists.

    Raises:
        ValueError: It is.
    """
    if name in TASKS:
        raise ValueError(
            f"task_name: expected a name of its own for files of one's own, got that of the task {name!r}"
        )


def _task(name: str, columns: Columns, labels: tuple[str, ...], eval_splits: tuple[str, ...]) -> Task:
    first, *second = columns.texts
    keys = (first, second[0] if second else None)
    metrics = ("accuracy",) if columns.kind == "classes" else ("pearson", "spearmanr")
    return Task(name, None, keys, labels if columns.kind == "classes" else (), metrics, eval_splits)


def _classes(rows: _Rows) -> tuple[str, ...]:
    assert rows.labels is not None
    found = set(rows.labels)
    if not 2 <= len(found) <= MAXIMUM_CLASSES:
        raise ValueError(
            f"{rows.path}: expected 2 to {MAXIMUM_CLASSES} classes, got {len(found):,}; scores need --label_type score"
        )
    by_key: dict[str, str] = {}
    for label in sorted(found):
        other = by_key.setdefault(label_key(label), label)
        if other != label:
            raise ValueError(f"{rows.path}: expected one spelling of a label, got {other!r} and {label!r}")
    whole = all(label.lstrip("-").isdecimal() for label in found)
    return tuple(sorted(found, key=int) if whole else sorted(found))


def _dataset(task: Task, rows: _Rows) -> Dataset:
    assert rows.labels is not None
    numbers = {label: number for number, label in enumerate(task.labels)}
    values: list[int | float] = []
    for line, label in zip(rows.lines, rows.labels, strict=True):
        if task.is_regression:
            values.append(_score(label, f"{rows.path}, line {line}"))
        elif label in numbers:
            values.append(numbers[label])
        else:
            shown = ", ".join(task.labels[:10]) + (", ..." if len(task.labels) > 10 else "")
            raise ValueError(
                f"{rows.path}, line {line}: unknown label {label[:60]!r}; expected one of {shown}"
            )
    return to_dataset(task, rows.texts, values)


def _score(text: str, where: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{where}: score {text[:60]!r}; expected a finite number")
    return score


# ------------------------------------------------------------------------------------------------- files


def _read(path: Path, columns: Columns, *, labelled: bool) -> _Rows:
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(
            f"{path}: expected a file ending in {', '.join(_FORMATS)}, got {path.suffix or 'no ending'}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a CSV, TSV or JSON lines file")
    records = _json_records(path) if path.suffix.lower().startswith(".json") else _csv_records(path)
    wanted = [*columns.texts, *([columns.label] if labelled else [])]
    texts: dict[str, list[str]] = {name: [] for name in columns.texts}
    labels: list[str] = []
    lines: list[int] = []
    for line, record in records:
        for name in wanted:
            if name not in record:
                hint = "; 'predict' takes a file without labels" if name == columns.label else ""
                found = ", ".join(map(str, record))[:200]
                raise ValueError(f"{path}, line {line}: expected a column {name!r}, found {found}{hint}")
        for name, column in texts.items():
            if not isinstance(record[name], str):
                raise ValueError(
                    f"{path}, line {line}: {name}: expected text, got {str(record[name])[:60]!r}"
                )
            column.append(record[name])
        if labelled:
            labels.append(_label(record[columns.label], f"{path}, line {line}: {columns.label}"))
        lines.append(line)
    if not lines:
        raise ValueError(f"{path}: expected at least one row, found none")
    return _Rows(path, texts, labels if labelled else None, lines)


def _label(value: Any, where: str) -> str:
    if isinstance(value, bool):
        value = str(value).lower()
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    if not text:
        raise ValueError(
            f"{where}: expected a label, got {'nothing' if value in (None, '') else repr(value)[:60]}"
        )
    return text


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file with their ends."""
    number = 0
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            while line := file.readline(MAXIMUM_LINE + 1):
                number += 1
                if len(line) > MAXIMUM_LINE:
                    raise ValueError(
                        f"{path}, line {number}: expected at most {MAXIMUM_LINE:,} characters in a line, got more; the "
                        "file may have lost its line breaks"
                    )
                yield line
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: expected UTF-8, got byte {error.object[error.start]:#x} after line {number}; save the file "
                "as UTF-8"
            ) from None


def _csv_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(max(csv.field_size_limit(), MAXIMUM_LINE))
    if path.suffix.lower() == ".tsv":
        reader = csv.reader(_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(_lines(path), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise ValueError(f"{path}, line 1: expected columns of different names, got {twice[0]!r} twice")
        if not header:
            raise ValueError(
                f"{path}, line 1: expected a header with the names of the columns, found an empty line"
            )
        end = reader.line_num
        for fields in reader:
            begin, end = end + 1, reader.line_num
            if not fields:
                continue
            if len(fields) != len(header):
                raise ValueError(f"{path}, line {begin}: found {len(fields)} columns, expected {len(header)}")
            yield begin, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: expected CSV: {error}") from None


def _json_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(record).__name__}")
        yield number, record
