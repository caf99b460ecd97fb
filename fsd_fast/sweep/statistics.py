"""What the rows of a sweep say: mean and deviation of each cell, and paired differences over seeds.

A cell holds the runs that differ in their seed alone. It belongs to a task, a condition (settings of the data, such as
the number of training rows), and a label (the method, and the settings in which its runs differ).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fsd_fast.data import HELDOUT
from fsd_fast.sweep.results import Row

_RESAMPLES = 10_000
_LEVEL = 0.95
TEACHER = "teacher"
"""Stands for a method in the rows of teachers."""

Settings = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seed alone.

    Attributes:
        task: Their task.
        condition: Settings of the data in which cells differ, as (name, value).
        label: Their method, and the settings in which runs of that method differ.
        method: Their method.
        rows: One row for each seed.
    """

    task: str
    condition: Settings
    label: str
    method: str
    rows: tuple[Row, ...]

    @property
    def heldout(self) -> float:
        """Mean score on held-out rows; NaN where a run has none."""
        scores = [math.nan if row.heldout_score is None else row.heldout_score for row in self.rows]
        return float(np.mean(scores))


@dataclass(frozen=True)
class Difference:
    """A mean paired difference with its interval.

    Attributes:
        mean: Mean over the pairs.
        low: Lower end of the 95 % interval; NaN where there are fewer than two pairs.
        high: Its upper end.
        pairs: Number of pairs; over several tasks the smallest.
    """

    mean: float
    low: float
    high: float
    pairs: int


def _flat(settings: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"{section}.{name}": value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for section, flags in settings.items()
        if isinstance(flags, dict)
        for name, value in flags.items()
    }


def _varying(rows: Sequence[Row]) -> set[str]:
    """Settings that differ between runs of one task."""
    values: dict[str, set[str | None]] = {}
    flat = [_flat(row.settings) for row in rows]
    for name in {name for each in flat for name in each}:
        values[name] = {each.get(name) for each in flat}
    return {name for name, seen in values.items() if len(seen) > 1}


def make_cells(rows: Sequence[Row]) -> list[Cell]:
    """Sort rows into cells, in the order in which they come.

    A teacher that no student's condition is the condition of, because it was trained on other rows than they were,
    stands in every condition.

    Raises:
        ValueError: Two rows differ in nothing.
    """
    conditions = _conditions(rows)
    data = {name.partition(".")[2] for name in conditions}
    grouped: dict[tuple[str, Settings], list[Row]] = {}
    for row in rows:
        flat = _flat(row.settings)
        condition = tuple((name.partition(".")[2], flat[name]) for name in sorted(conditions) if name in flat)
        grouped.setdefault((row.task, condition), []).append(row)
    by_method = _varying_by_method(grouped)
    found: dict[tuple[str, Settings, str], list[Row]] = {}
    for (task, condition), group in grouped.items():
        for row in group:
            flat = _flat(row.settings)
            own = [
                f"{name.partition('.')[2]}={flat[name]}"
                for name in sorted(by_method[condition, row.method])
                if name in flat and name.partition(".")[2] not in data
            ]
            found.setdefault((task, condition, " ".join([row.method, *own])), []).append(row)
    cells = []
    for (task, condition, label), cell in found.items():
        seeds = [row.seed for row in cell]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"expected one row for each seed, got several of {task}, {label}")
        cells.append(Cell(task, condition, label, cell[0].method, tuple(cell)))
    students = {cell.condition: None for cell in cells if cell.method != TEACHER}
    return [
        replace(cell, condition=condition)
        for cell in cells
        for condition in ([cell.condition] if cell.condition in students or not students else students)
    ]


def _conditions(rows: Sequence[Row]) -> set[str]:
    """Settings of the data that differ between students of a task."""
    names: set[str] = set()
    for task in {row.task for row in rows}:
        students = [row for row in rows if row.task == task and row.method != TEACHER]
        names |= {name for name in _varying(students) if name.startswith("data.")}
    return names


def _varying_by_method(
    grouped: Mapping[tuple[str, Settings], Sequence[Row]],
) -> dict[tuple[Settings, str], set[str]]:
    """(condition, method) -> settings in which runs of one task differ there."""
    found: dict[tuple[Settings, str], set[str]] = {}
    for (_, condition), rows in grouped.items():
        for method in {row.method for row in rows}:
            varying = _varying([row for row in rows if row.method == method])
            found.setdefault((condition, method), set()).update(varying)
    return found


def on_heldout(rows: Sequence[Row]) -> list[Row]:
    """Rows whose scores and fidelity are those on the held-out rows.

    Raises:
        ValueError: A row has none.
    """
    prefix = f"eval_{HELDOUT}_"
    found = []
    for row in rows:
        if row.heldout_score is None:
            raise ValueError(f"expected a score on held-out rows of every run, got none of {row.run}")
        scores = {
            f"eval_{name.removeprefix(prefix)}": value
            for name, value in row.scores.items()
            if name.startswith(prefix)
        }
        agreement, kl = (scores.get(f"eval_teacher_{name}") for name in ("agreement", "kl"))
        found.append(replace(row, score=row.heldout_score, scores=scores, agreement=agreement, kl=kl))
    return found


def best_on_heldout(cells: Sequence[Cell]) -> list[Cell]:
    """Keep, for each task, condition and method, the settings with the best mean score on held-out rows.

    Raises:
        ValueError: Settings are to be chosen between, and a run has no score on held-out rows.
    """
    groups: dict[tuple[str, Settings, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.task, cell.condition, cell.method), []).append(cell)
    kept = []
    for (task, _, method), group in groups.items():
        if len(group) > 1 and any(math.isnan(cell.heldout) for cell in group):
            raise ValueError(
                f"expected a score on held-out rows of every run, got none of {task}, {method}; set heldout_samples"
            )
        best = max(group, key=lambda cell: cell.heldout) if len(group) > 1 else group[0]
        kept.append(replace(best, label=method))
    return kept


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation with n - 1 in its denominator; NaN for one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def paired_scores(cell: Cell, baseline: Cell) -> npt.NDArray[np.float64]:
    """Differences of the scores of two cells, one for each seed that both have."""
    other = {row.seed: row.score for row in baseline.rows}
    return np.asarray(
        [row.score - other[row.seed] for row in cell.rows if row.seed in other], dtype=np.float64
    )


def bootstrap(differences: Sequence[npt.NDArray[np.float64]], seed: int = 0) -> Difference:
    """Mean paired difference over tasks, with a percentile bootstrap interval.

    Each resample draws, for each task on its own, as many pairs as it has, with replacement, and takes the mean over
    tasks of the means over pairs.

    Args:
        differences: For each task the differences [n] of its pairs, n >= 1.
        seed: Of the resampling.

    Raises:
        ValueError: There is no task, or a task has no pair.
    """
    if not differences or any(not len(each) for each in differences):
        raise ValueError("differences: expected at least one pair of each task, got none")
    mean = float(np.mean([each.mean() for each in differences]))
    pairs = min(len(each) for each in differences)
    if pairs < 2:
        return Difference(mean, math.nan, math.nan, pairs)
    generator = np.random.default_rng(seed)
    drawn = [
        each[generator.integers(0, len(each), size=(_RESAMPLES, len(each)))].mean(axis=1)
        for each in differences
    ]
    low, high = np.quantile(np.mean(drawn, axis=0), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Difference(mean, float(low), float(high), pairs)
