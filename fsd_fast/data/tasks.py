"""The tasks: the nine of GLUE and the two built-in movie-review tasks.

A task says which columns hold its text, what its labels are and in which order, which metrics score it and
which splits it is evaluated on. Column names and label order are those of GLUE on the Hugging Face Hub, so
that a checkpoint fine-tuned there and one fine-tuned here agree on what logit 0 means.
"""

import re
from dataclasses import dataclass

_LARGE_TASKS = ("mnli", "qqp")


@dataclass(frozen=True)
class Task:
    """What has to be known about a task.

    Attributes:
        name: Name on the command line and on the Hub.
        folder: Name of the folder in the official GLUE download; None for a built-in task.
        text_keys: Columns that hold the first and the second sentence; the second is None for a
            single-sentence task.
        labels: Class names in the order of the logits; empty for a regression.
        metrics: Names of the metrics, as `fsd_fast.metrics.compute_metrics` returns them.
        eval_splits: Labelled splits for evaluation. MNLI has two, which are never mixed.
        score_range: Smallest and largest score a regression label can take; None for a classification.
    """

    name: str
    folder: str | None
    text_keys: tuple[str, str | None]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    eval_splits: tuple[str, ...] = ("validation",)
    score_range: tuple[float, float] | None = None

    @property
    def is_regression(self) -> bool:
        """Whether the label is a score and not a class."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Number of logits C: the number of classes, or 1 for a regression."""
        return len(self.labels) or 1

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that hold text: one or two names."""
        first, second = self.text_keys
        return (first,) if second is None else (first, second)

    @property
    def default_num_centroid(self) -> int:
        """Number K of memory centroids the paper uses: 300 for MNLI and QQP, 100 for the others."""
        return 300 if self.name in _LARGE_TASKS else 100


_ENTAILMENT = ("entailment", "not_entailment")
_CORRELATIONS = ("pearson", "spearmanr")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", "CoLA", ("sentence", None), ("unacceptable", "acceptable"), ("matthews_correlation",)),
        Task("sst2", "SST-2", ("sentence", None), ("negative", "positive"), ("accuracy",)),
        Task(
            "mrpc",
            "MRPC",
            ("sentence1", "sentence2"),
            ("not_equivalent", "equivalent"),
            ("accuracy", "f1"),
        ),
        Task("stsb", "STS-B", ("sentence1", "sentence2"), (), _CORRELATIONS, score_range=(0.0, 5.0)),
        Task("qqp", "QQP", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        Task(
            "mnli",
            "MNLI",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            ("validation_matched", "validation_mismatched"),
        ),
        Task("qnli", "QNLI", ("question", "sentence"), _ENTAILMENT, ("accuracy",)),
        Task("rte", "RTE", ("sentence1", "sentence2"), _ENTAILMENT, ("accuracy",)),
        Task("wnli", "WNLI", ("sentence1", "sentence2"), ("not_entailment", "entailment"), ("accuracy",)),
        Task("reviews", None, ("sentence", None), ("negative", "positive"), ("accuracy",)),
        Task("reviews-score", None, ("sentence", None), (), _CORRELATIONS, score_range=(-4.0, 4.0)),
    )
}


def label_key(label: str) -> str:
    """What two spellings of a class name have in common: case, hyphens, underscores and spaces make no difference."""
    return re.sub(r"[\s_-]+", "_", label.strip().lower())


def _key(name: str) -> str:
    return name.strip().lower().replace("-", "").replace("_", "")


_BY_KEY = {_key(name): task for name, task in TASKS.items()}


def get_task(name: str) -> Task:
    """Find a task by name.

    Args:
        name: The name in any case, with or without hyphens and underscores, so that the official spellings
            ("SST-2", "STS-B", "CoLA") are understood.

    Returns:
        The task.

    Raises:
        ValueError: If there is no such task; the message lists those there are.
    """
    task = _BY_KEY.get(_key(name))
    if task is None:
        raise ValueError(f"task_name: unknown task {name!r}; expected one of: {', '.join(TASKS)}")
    return task
