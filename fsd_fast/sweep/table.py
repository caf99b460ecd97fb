"""Tables of a sweep: mean and deviation in the paper's layout, and differences from a baseline.

Figures are in percent. The paper's stand in a row of their own below a method, in the columns of those tasks alone
whose runs have the paper's setting.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fsd_fast.data import TASKS
from fsd_fast.sweep.paper import COLUMNS, METRICS, has_paper_setting, paper_figures
from fsd_fast.sweep.statistics import (
    TEACHER,
    Cell,
    Difference,
    Settings,
    bootstrap,
    mean_and_deviation,
    paired_scores,
)

FORMATS = ("text", "markdown", "latex", "csv")
_CSV_HEADER = (
    "kind",
    "condition",
    "task",
    "label",
    "metric",
    "runs",
    "mean",
    "std",
    "low",
    "high",
    "paper_mean",
)
_TASK_ORDER = (*METRICS, *(name for name in TASKS if name not in METRICS))
_METHOD_ORDER = (TEACHER, "finetune", "vkd", "pkd", "minilm", "rkd")


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title: What stands above it.
        header: Headings of the columns.
        rows: Its rows, each as long as the header.
    """

    title: str
    header: list[str]
    rows: list[list[str]]


def figures_of(cell: Cell) -> list[tuple[str, list[float]]]:
    """Each metric of a cell's column with its value in every run, in percent.

    Returns:
        (metric, values); a metric of a split other than the first has the split's name before it.
    """
    task = TASKS.get(cell.task)
    metrics = METRICS.get(cell.task)
    if metrics is None and task is not None:
        metrics = tuple((task.eval_splits[0], metric) for metric in task.metrics)
    if metrics is None:
        return [("score", [100 * row.score for row in cell.rows])]
    several = len({split for split, _ in metrics}) > 1
    figures = []
    for split, metric in metrics:
        values = [
            row.scores.get(f"eval_{split}_{metric}", row.scores.get(f"eval_{metric}", math.nan))
            for row in cell.rows
        ]
        figures.append((f"{split}_{metric}" if several else metric, [100 * value for value in values]))
    return figures


def _spread(mean: float, deviation: float) -> str:
    return f"{mean:.2f}" if math.isnan(deviation) else f"{mean:.2f} ± {deviation:.2f}"


def _cell_text(cell: Cell) -> str:
    return " / ".join(_spread(*mean_and_deviation(values)) for _, values in figures_of(cell))


def _order(names: Sequence[str], first: Sequence[str]) -> list[str]:
    known = [name for name in first if name in names]
    return [*known, *(name for name in dict.fromkeys(names) if name not in known)]


def _columns(cells: Sequence[Cell]) -> list[str]:
    return _order([cell.task for cell in cells], _TASK_ORDER)


def _labels(cells: Sequence[Cell]) -> list[str]:
    methods = _order([cell.method for cell in cells], _METHOD_ORDER)
    return [
        label
        for method in methods
        for label in dict.fromkeys(cell.label for cell in cells if cell.method == method)
    ]


def conditions_of(cells: Sequence[Cell]) -> list[Settings]:
    """The conditions of cells, numbers in their order."""

    def key(condition: Settings) -> list[tuple[str, float, str]]:
        return [
            (name, float(text) if text.replace(".", "", 1).isdecimal() else math.inf, text)
            for name, text in condition
        ]

    return sorted({cell.condition for cell in cells}, key=key)


def _title(text: str, condition: Settings) -> str:
    return ", ".join([text, *(f"{name} = {value}" for name, value in condition)])


def means_table(cells: Sequence[Cell], condition: Settings) -> Table:
    """Mean and deviation of each task and method under a condition, with the paper's figures where they compare."""
    chosen = [cell for cell in cells if cell.condition == condition]
    tasks, rows = _columns(chosen), []
    for label in _labels(chosen):
        of_label = {cell.task: cell for cell in chosen if cell.label == label}
        runs = [len(cell.rows) for cell in of_label.values()]
        count = str(runs[0]) if len(set(runs)) == 1 else f"{min(runs)} to {max(runs)}"
        texts = [_cell_text(of_label[task]) if task in of_label else "" for task in tasks]
        rows.append([label, count, *texts])
        paper = [_paper_text(of_label[task]) if task in of_label else "" for task in tasks]
        if any(paper):
            rows.append([f"{label} (paper)", "", *paper])
    header = ["method", "runs", *(COLUMNS.get(task, task) for task in tasks)]
    return Table(_title("Mean ± standard deviation over seeds, in percent", condition), header, rows)


def _paper_text(cell: Cell) -> str:
    figures = paper_figures(cell.method, cell.task)
    if figures is None or not all(has_paper_setting(row) for row in cell.rows):
        return ""
    return " / ".join(_spread(*figure) for figure in figures)


def differences(
    cells: Sequence[Cell], condition: Settings, baseline: str
) -> dict[str, dict[str, Difference]]:
    """Label -> task -> mean paired difference from a baseline, in percent; "all" is the mean over tasks."""
    chosen = [cell for cell in cells if cell.condition == condition]
    base = {cell.task: cell for cell in chosen if cell.label == baseline}
    found: dict[str, dict[str, Difference]] = {}
    for label in _labels(chosen):
        pairs = {
            cell.task: 100 * paired_scores(cell, base[cell.task])
            for cell in chosen
            if cell.label == label and label != baseline and cell.task in base
        }
        pairs = {task: each for task, each in pairs.items() if len(each)}
        if not pairs or label.split()[0] == TEACHER:
            continue
        found[label] = {task: bootstrap([each]) for task, each in pairs.items()}
        if len(pairs) > 1:
            found[label]["all"] = bootstrap(list(pairs.values()))
    return found


def _difference_text(difference: Difference) -> str:
    mean = f"{difference.mean:+.2f}"
    if math.isnan(difference.low):
        return mean
    return f"{mean} [{difference.low:+.2f}, {difference.high:+.2f}]"


def differences_table(cells: Sequence[Cell], condition: Settings, baseline: str) -> Table | None:
    """Differences of the main metric from a baseline; None where no method has a seed in common with it."""
    found = differences(cells, condition, baseline)
    if not found:
        return None
    tasks = [task for task in _columns(cells) if any(task in row for row in found.values())]
    tasks += ["all"] if any("all" in row for row in found.values()) else []
    rows = [
        [label, str(min(each.pairs for each in row.values()))]
        + [_difference_text(row[task]) if task in row else "" for task in tasks]
        for label, row in found.items()
    ]
    header = ["method", "pairs", *(COLUMNS.get(task, task).split()[0] for task in tasks)]
    title = f"Score minus that of {baseline} with the same seed: mean and 95 % bootstrap interval"
    return Table(_title(title, condition), header, rows)


def fidelity_table(cells: Sequence[Cell], condition: Settings) -> Table:
    """Agreement with the teacher in percent, and KL divergence where the task has one."""
    chosen = [cell for cell in cells if cell.condition == condition and cell.method != TEACHER]
    tasks, rows = _columns(chosen), []
    for label in _labels(chosen):
        texts = []
        for task in tasks:
            of_cell = [cell for cell in chosen if cell.label == label and cell.task == task]
            runs = [row for cell in of_cell for row in cell.rows if row.agreement is not None]
            text = f"{np.mean([100 * (row.agreement or 0) for row in runs]):.2f}" if runs else ""
            divergences = [row.kl for row in runs if row.kl is not None]
            texts.append(f"{text} / {np.mean(divergences):.4f}" if divergences else text)
        rows.append([label, *texts])
    header = ["method", *(COLUMNS.get(task, task).split()[0] for task in tasks)]
    return Table(
        _title("Agreement with the teacher in percent / KL(teacher || student)", condition), header, rows
    )


# --------------------------------------------------------------------------------------------- formats


def as_text(table: Table) -> str:
    """Columns aligned with blanks."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(table.header))]
    body = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([table.title, *body]) + "\n"


def as_markdown(table: Table) -> str:
    """A table of GitHub's Markdown."""

    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    rule = "|" + "---|" * len(table.header)
    return "\n".join([f"{table.title}:", "", line(table.header), rule, *map(line, table.rows)]) + "\n"


def as_latex(table: Table) -> str:
    """A tabular of LaTeX, for the package booktabs, with its title as a comment."""
    special = {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "±": "$\\pm$",
        "|": "$\\mid$",
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        "\\": "\\textbackslash{}",
    }

    def line(texts: Sequence[str]) -> str:
        return " & ".join("".join(special.get(c, c) for c in text) for text in texts) + r" \\"

    columns = "l" + "r" * (len(table.header) - 1)
    rows = [r"\toprule", line(table.header), r"\midrule", *map(line, table.rows), r"\bottomrule"]
    return "\n".join([f"% {table.title}", rf"\begin{{tabular}}{{{columns}}}", *rows, r"\end{tabular}"]) + "\n"


def as_csv(cells: Sequence[Cell], baseline: str) -> str:
    """Every figure in a row of its own, unrounded: means of each metric, then differences from the baseline."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_HEADER)
    for cell in cells:
        paper = paper_figures(cell.method, cell.task) if all(map(has_paper_setting, cell.rows)) else None
        for place, (metric, values) in enumerate(figures_of(cell)):
            mean, deviation = mean_and_deviation(values)
            theirs = "" if paper is None else paper[place][0]
            condition = " ".join(f"{name}={value}" for name, value in cell.condition)
            row = ["mean", condition, cell.task, cell.label, metric, len(values), mean]
            writer.writerow([*row, "" if math.isnan(deviation) else deviation, "", "", theirs])
    for settings in conditions_of(cells):
        named = " ".join(f"{name}={value}" for name, value in settings)
        for label, row_of in differences(cells, settings, baseline).items():
            for task, found in row_of.items():
                interval = ["", ""] if math.isnan(found.low) else [found.low, found.high]
                row = ["difference", named, task, label, "score", found.pairs, found.mean, "", *interval, ""]
                writer.writerow(row)
    return text.getvalue()
