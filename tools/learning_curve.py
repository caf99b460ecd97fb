"""Draw accuracy and fidelity against the number of training rows.

python -m tools.learning_curve RESULTS PNG

RESULTS is the results.csv of a sweep whose runs differ in ``max_train_samples``. Scores are those on the held-out rows;
a point is the mean over seeds, a bar its standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fsd_fast.sweep.results import Row, read_results
from fsd_fast.sweep.statistics import TEACHER, on_heldout

Curve = list[tuple[int, float, float]]


def curve(rows: Sequence[Row], value: Callable[[Row], float | None]) -> Curve:
    """Return (training rows, mean over seeds, standard error) in order; rows without a value are left out."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (number := value(row)) is not None:
            found.setdefault(row.train_samples, []).append(number)
    return [
        (size, float(np.mean(each)), float(np.std(each, ddof=1) / len(each) ** 0.5) if len(each) > 1 else 0.0)
        for size, each in sorted(found.items())
    ]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a row of panels for each task: accuracy, and agreement with the teacher."""
    matplotlib.use("Agg")
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure = Figure(figsize=(11, 3.6 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 2, squeeze=False)
    for task, (left, right) in zip(tasks, panels, strict=True):
        of_task = [row for row in rows if row.task == task]
        _panel(left, of_task, lambda row: row.score, "accuracy on held-out rows", task)
        _panel(right, of_task, lambda row: row.agreement, "agreement with the teacher", task)
        for teacher in (row for row in of_task if row.method == TEACHER):
            left.axhline(teacher.score, color="black", linestyle=":", label="teacher")
        left.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _panel(
    axes: Axes, rows: Sequence[Row], value: Callable[[Row], float | None], label: str, task: str
) -> None:
    for method in dict.fromkeys(row.method for row in rows if row.method != TEACHER):
        points = curve([row for row in rows if row.method == method], value)
        if points:
            sizes, means, errors = zip(*points, strict=True)
            axes.errorbar(sizes, means, errors, marker="o", markersize=4, capsize=2, label=method)
    axes.set(xscale="log", xlabel="training rows", ylabel=label, title=task)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    results, picture = sys.argv[1:]
    draw(on_heldout(read_results(Path(results))), Path(picture))
    print(f"written: {picture}")
