"""``fsd-fast table``: tables of a sweep's results."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fsd_fast.commands._common import Work
from fsd_fast.commands.flags import flag
from fsd_fast.files import write_atomically
from fsd_fast.sweep.results import read_results
from fsd_fast.sweep.statistics import TEACHER, Cell, best_on_heldout, make_cells, on_heldout
from fsd_fast.sweep.table import (
    Table,
    as_csv,
    as_latex,
    as_markdown,
    as_text,
    conditions_of,
    differences_table,
    fidelity_table,
    means_table,
)


@dataclass
class TableArguments:
    """The ``table`` command: means, deviations and paired differences of a sweep."""

    results_file: str = flag("The results.csv of a sweep.", positional=True)
    format: Literal["text", "markdown", "latex", "csv"] = flag("How the tables are written.", "text")
    baseline: str | None = flag(
        "The method that the others are compared with, as the tables name it. Default: the first one of vkd.",
        None,
    )
    best_on_heldout: bool = flag(
        "Keep of each method the settings with the best mean score on held-out rows, for each task.", False
    )
    scored_on: Literal["dev", "heldout"] = flag("The rows whose scores and fidelity the tables hold.", "dev")
    output_file: str | None = flag("File to write the tables to. Default: print them.", None)


ARGUMENTS = (TableArguments,)


def prepare(arguments: TableArguments) -> Work:
    """Read the results; return the work that writes their tables."""
    path = Path(arguments.results_file)
    rows = read_results(path)
    if not rows:
        raise ValueError(f"{path}: expected at least one finished run, got none")
    try:
        cells = make_cells(rows if arguments.scored_on == "dev" else on_heldout(rows))
        if arguments.best_on_heldout:
            cells = best_on_heldout(cells)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    baseline = _baseline(cells, arguments.baseline)
    text = _render(cells, arguments.format, baseline)

    def work() -> dict[str, float]:
        if arguments.output_file is None:
            sys.stdout.write(text)
        else:
            write_atomically(Path(arguments.output_file), text.encode())
        return {}

    return work


def _baseline(cells: list[Cell], asked: str | None) -> str:
    labels = list(dict.fromkeys(cell.label for cell in cells))
    if asked is not None and asked not in labels:
        raise ValueError(f"baseline: expected one of {', '.join(labels)}; got {asked!r}")
    students = [cell for cell in cells if cell.method != TEACHER] or cells
    return asked or next((cell.label for cell in students if cell.method == "vkd"), students[0].label)


def _render(cells: list[Cell], form: str, baseline: str) -> str:
    if form == "csv":
        return as_csv(cells, baseline)
    tables: list[Table] = []
    for condition in conditions_of(cells):
        compared = differences_table(cells, condition, baseline)
        tables += [means_table(cells, condition), *([] if compared is None else [compared])]
        tables.append(fidelity_table(cells, condition))
    writer = {"text": as_text, "markdown": as_markdown, "latex": as_latex}[form]
    return "\n".join(writer(table) for table in tables if table.rows)
