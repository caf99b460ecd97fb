"""The results of a sweep, ``results.csv``: one row for each finished run, under a fixed header, written atomically."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsd_fast.files import write_atomically
from fsd_fast.untrusted import shorten

RESULTS_FILE = "results.csv"
_MAXIMUM_BYTES = 1 << 30


@dataclass(frozen=True)
class Row:
    """A finished run.

    Attributes:
        task: Name of the task.
        method: What was minimised.
        seed: Of the student.
        train_samples: Rows that it was trained on.
        score: The task's main metric on dev (for MNLI on the matched part).
        heldout_score: The same on held-out training rows; None where none are held out.
        agreement: Share of dev samples that student and teacher predict alike; see ``fsd_fast.metrics.fidelity``.
        kl: Mean KL(teacher || student) on dev; None for a regression.
        seconds: Of its training.
        settings: Section of the sweep's file -> flags; what a run differs in from others, its seed left out.
        scores: Every figure of the evaluation by name.
        record: Arguments and facts of the run, see ``fsd_fast.training.record``.
        versions: Package -> version.
        run: Identifies the run: a digest of all its settings.
    """

    task: str
    method: str
    seed: int
    train_samples: int
    score: float
    heldout_score: float | None
    agreement: float | None
    kl: float | None
    seconds: float
    settings: dict[str, Any]
    scores: dict[str, float]
    record: dict[str, Any]
    versions: dict[str, str]
    run: str


HEADER = tuple(field.name for field in dataclasses.fields(Row))
_TEXT = ("task", "method", "run")
_INTEGERS = ("seed", "train_samples")
_OPTIONAL = ("heldout_score", "agreement", "kl")
_OBJECTS = ("settings", "scores", "record", "versions")


def write_results(path: Path, rows: list[Row]) -> None:
    """Write all rows, atomically.

    Raises:
        OSError: The file cannot be written; it is as it was before.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for row in rows:
        writer.writerow([_to_text(getattr(row, name)) for name in HEADER])
    write_atomically(path, text.getvalue().encode())


def _to_text(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def read_results(path: Path) -> list[Row]:
    """Read the rows of a sweep.

    Raises:
        OSError: The file cannot be read.
        ValueError: It has another header, or a row is damaged; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the {RESULTS_FILE} of a sweep")
    if (size := path.stat().st_size) > _MAXIMUM_BYTES:
        raise ValueError(f"{path}: expected at most {_MAXIMUM_BYTES:,} bytes, got {size:,}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, got byte {error.object[error.start]:#x}") from None
    # A settings object may be longer than what csv takes for a field by default.
    csv.field_size_limit(max(csv.field_size_limit(), size + 1))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = next(reader, [])
        if tuple(header) != HEADER:
            raise ValueError(f"expected the header {','.join(HEADER)}, got {shorten(','.join(header))}")
        rows += [_row(fields) for fields in reader if fields]
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}, line {max(reader.line_num, 1)}: {error}") from None
    return rows


def _row(fields: list[str]) -> Row:
    if len(fields) != len(HEADER):
        raise ValueError(f"expected {len(HEADER)} fields, got {len(fields)}")
    return Row(**{name: _value(name, text) for name, text in zip(HEADER, fields, strict=True)})


def _value(name: str, text: str) -> Any:
    if name in _TEXT:
        return text
    if name in _OBJECTS:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ValueError(f"{name}: expected a JSON object, got {shorten(text)}")
        return value
    if not text and name in _OPTIONAL:
        return None
    try:
        number = int(text) if name in _INTEGERS else float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {shorten(text)}")
    return number
