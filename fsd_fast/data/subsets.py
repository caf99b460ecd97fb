"""A seeded subset of a training set, and rows of it that are held out.

The rows of the training set are put into an order that ``subset_seed`` fixes: row i comes at the place of
sha256("seed:i") among the others, on every machine and in every version of every library. Without a seed the order is
the file's. Training takes rows from the front and the held-out rows are the last ones, so that subsets of any size
share their held-out rows, and a smaller subset is part of a larger one.
"""

import hashlib
from dataclasses import replace

from datasets import DatasetDict

from fsd_fast.data.tasks import Task

HELDOUT = "heldout"
"""Name of the evaluation split that is made of training rows."""


def row_order(rows: int, seed: int | None) -> list[int]:
    """The order in which rows are chosen.

    Args:
        rows: Number N of rows.
        seed: Of the order; None keeps that of the file.

    Returns:
        A permutation of 0..N-1.
    """
    if seed is None:
        return list(range(rows))
    return sorted(range(rows), key=lambda row: hashlib.sha256(f"{seed}:{row}".encode()).digest())


def choose_rows(
    task: Task, splits: DatasetDict, maximum: int | None, seed: int | None, heldout: int
) -> tuple[Task, DatasetDict]:
    """Cut the training set to a subset, and set rows of it apart for evaluation.

    Args:
        task: The task.
        splits: Its splits; "train" is cut, the others stay as they are.
        maximum: Largest number of training rows; None: all that are not held out.
        seed: Of the order in which rows are chosen; None: that of the file.
        heldout: Number of rows held out.

    Returns:
        The task, with "heldout" before its other evaluation splits where rows are held out: what chooses a
        checkpoint looks at the first one. And the splits.

    Raises:
        ValueError: So many rows are held out that none is left to train on.
    """
    if maximum is None and not heldout:
        return task, splits
    rows = splits["train"]
    if heldout >= len(rows):
        raise ValueError(
            f"heldout_samples: expected fewer than the {len(rows)} training rows of {task.name!r}, got {heldout}"
        )
    order = row_order(len(rows), seed)
    left = len(rows) - heldout
    chosen = DatasetDict(splits)
    chosen["train"] = rows.select(order[: left if maximum is None else min(maximum, left)])
    if not heldout:
        return task, chosen
    chosen[HELDOUT] = rows.select(order[left:])
    return replace(task, eval_splits=(HELDOUT, *task.eval_splits)), chosen
