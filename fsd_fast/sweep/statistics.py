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
    conditions, by_method = _what_varies(rows)
    data = {name.partition(".")[2] for name in conditions}
    found: dict[tuple[str, Settings, str], list[Row]] = {}
    for row in rows:
        flat = _flat(row.settings)
        condition = tuple((name.partition(".")[2], flat[name]) for name in sorted(conditions) if name in flat)
        own = [
            f"{name.partition('.')[2]}={flat[name]}"
            for name in sorted(by_method[row.method])
            if name in flat and name.partition(".")[2] not in data
        ]
        found.setdefault((row.task, condition, " ".join([row.method, *own])), []).append(row)
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


def _what_varies(rows: Sequence[Row]) -> tuple[set[str], dict[str, set[str]]]:
    """Settings of the data that differ between students of a task, and settings that differ within a method."""
    conditions: set[str] = set()
    by_method: dict[str, set[str]] = {}
    for task in {row.task for row in rows}:
        of_task = [row for row in rows if row.task == task]
        students = [row for row in of_task if row.method != TEACHER]
        conditions |= {name for name in _varying(students) if name.startswith("data.")}
        for method in {row.method for row in of_task}:
            varying = _varying([row for row in of_task if row.method == method])
            by_method.setdefault(method, set()).update(varying)
    return conditions, by_method


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
