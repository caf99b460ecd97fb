"""The figures of the paper (Jung et al., 2023, tables of GLUE dev sets), and whether a run has the paper's setting.

Means and standard deviations of six runs, in percent. Teacher: BERT-base-uncased; students: its first six layers,
three epochs, batches of 32, 128 tokens, padding included.
"""

from __future__ import annotations

import math
from pathlib import PurePath

from fsd_fast.sweep.results import Row

METRICS: dict[str, tuple[tuple[str, str], ...]] = {
    "wnli": (("validation", "accuracy"),),
    "rte": (("validation", "accuracy"),),
    "stsb": (("validation", "pearson"), ("validation", "spearmanr")),
    "cola": (("validation", "matthews_correlation"),),
    "mrpc": (("validation", "f1"), ("validation", "accuracy")),
    "sst2": (("validation", "accuracy"),),
    "qnli": (("validation", "accuracy"),),
    "qqp": (("validation", "accuracy"), ("validation", "f1")),
    "mnli": (("validation_matched", "accuracy"), ("validation_mismatched", "accuracy")),
}
"""Task, in the paper's order -> (split, metric) of each figure in its column."""

COLUMNS = {
    "wnli": "WNLI",
    "rte": "RTE",
    "stsb": "STS-B P/S",
    "cola": "CoLA",
    "mrpc": "MRPC F1/acc",
    "sst2": "SST-2",
    "qnli": "QNLI",
    "qqp": "QQP acc/F1",
    "mnli": "MNLI m/mm",
}
"""Task -> heading of its column."""

_FIGURES = {
    "teacher": "56.34|66.79|88.78/88.48|55.47|86.00/81.10|92.09|91.60|91.07/88.06|84.70/84.65",
    "vkd": (
        "54.37±.77|65.40±1.56|88.16±.17/87.83±.16|41.46±.89|86.24±.52/80.75±.65|90.92±.62|88.46±.47|"
        "91.03±.08/87.96±.10|82.20±.19/82.85±.12"
    ),
    "pkd": (
        "54.37±2.36|63.90±.79|88.45±.10/88.08±.06|41.87±1.13|86.37±.60/80.98±.81|90.77±.41|88.57±.17|"
        "91.00±.11/87.92±.14|82.27±.10/82.57±.21"
    ),
    "minilm": (
        "48.45±6.19|61.49±.59|87.82±.08/87.49±.09|33.34±.83|84.57±1.36/78.13±2.02|90.23±.39|89.48±.19|"
        "90.53±.02/87.21±.02|82.23±.09/82.58±.13"
    ),
    "rkd": (
        "51.83±5.84|65.22±.90|88.43±.17/88.12±.14|43.07±1.49|86.87±.47/81.84±.35|91.02±.19|88.91±.31|"
        "91.21±.06/88.13±.08|82.39±.19/82.92±.13"
    ),
    "fsd_ilg": (
        "55.49±1.61|66.61±1.01|88.69±.10/88.33±.09|43.03±1.43|87.10±.24/82.20±.33|91.04±.28|88.97±.25|"
        "91.19±.05/88.14±.08|82.42±.13/83.00±.20"
    ),
}
_TRAINING_ROWS = {
    "wnli": 635,
    "rte": 2490,
    "stsb": 5749,
    "cola": 8551,
    "mrpc": 3668,
    "sst2": 67349,
    "qnli": 104743,
    "qqp": 363846,
    "mnli": 392702,
}
_MODEL = "bert-base-uncased"


def paper_figures(method: str, task: str) -> list[tuple[float, float]] | None:
    """The paper's (mean, standard deviation) of each figure in a task's column, in percent.

    The deviation is NaN for the teacher, of which the paper has one run; None where the paper has no such figure.
    """
    if method not in _FIGURES or task not in METRICS:
        return None
    cell = _FIGURES[method].split("|")[list(METRICS).index(task)]
    figures = []
    for text in cell.split("/"):
        mean, _, deviation = text.partition("±")
        figures.append((float(mean), float(deviation) if deviation else math.nan))
    return figures


def has_paper_setting(row: Row) -> bool:
    """Whether a run differs from the paper's in nothing but what the paper chose from a grid, and its seed."""
    arguments, facts = row.record.get("arguments", {}), row.record.get("facts", {})
    batch = arguments.get("per_device_train_batch_size", 0) * arguments.get("gradient_accumulation_steps", 1)
    teacher = row.settings.get("teacher", {}).get("model_name_or_path")
    depth = facts.get("num_layers") == 12 if row.method == "teacher" else facts.get("student_layers") == 6
    return (
        row.train_samples == _TRAINING_ROWS.get(row.task)
        and arguments.get("max_seq_length") == 128
        and (row.method == "teacher" or arguments.get("pad_features") == "include")
        and arguments.get("num_train_epochs") == 3
        and arguments.get("max_steps", -1) == -1
        and batch * facts.get("world_size", 1) == 32
        and depth
        and all(
            isinstance(name, str) and PurePath(name).name.lower() == _MODEL
            for name in (teacher, arguments.get("model_name_or_path"))
        )
    )
