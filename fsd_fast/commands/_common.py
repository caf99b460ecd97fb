"""What several commands do: read a task, and check a model against it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import EvalPrediction, PreTrainedTokenizerBase

from fsd_fast.commands.flags import DEFAULT_TASK, DataArguments
from fsd_fast.data import PadCollator, Task, choose_rows, get_task, load_task_dataset, tokenize
from fsd_fast.data.own import Columns, read_own_task
from fsd_fast.distributed import Collectives
from fsd_fast.metrics import compute_metrics, hard_label_loss
from fsd_fast.models.inputs import check_inputs
from fsd_fast.models.teacher import Teacher

logger = logging.getLogger(__name__)

Work = Callable[[], dict[str, float]]
"""The work that a command does once its input has been checked; returns its figures."""


@dataclass
class TaskData:
    """A task, tokenized."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    evaluation: dict[str, Dataset]
    collator: PadCollator


def read_task(
    arguments: DataArguments,
    *,
    needs: tuple[str, ...] = ("train", "validation"),
    labels: tuple[str, ...] | None = None,
) -> tuple[Task, DatasetDict]:
    """Read the labelled splits of a task, and choose the rows of its training set.

    Args:
        arguments: Flags of the data.
        needs: Splits without which the command cannot do, where the data is one's own.
        labels: Classes of one's own data where there is no training file to take them from.

    Raises:
        ValueError: The task is unknown, a file is damaged or a setting is out of range.
        FileNotFoundError: A file is missing.
    """
    files = own_files(arguments)
    if not files:
        task = get_task(arguments.task_name)
        splits = load_task_dataset(task, arguments.data_dir)
    else:
        missing = [f"--{split}_file" for split in needs if split not in files]
        if missing:
            given = ", ".join(f"--{split}_file" for split in files)
            raise ValueError(f"{', '.join(missing)}: expected a file for this command beside {given}")
        task, splits = read_own_task(own_name(arguments), files, own_columns(arguments), labels)
    if "train" not in splits:
        return task, splits
    return choose_rows(
        task, splits, arguments.max_train_samples, arguments.subset_seed, arguments.heldout_samples
    )


def own_files(arguments: DataArguments) -> dict[str, str]:
    """Split -> file of one's own data; empty for the tasks there are.

    Raises:
        ValueError: Flags of both kinds of data are given.
    """
    files = {
        split: file
        for split in ("train", "validation", "test")
        if (file := getattr(arguments, f"{split}_file")) is not None
    }
    if files and arguments.data_dir is not None:
        raise ValueError(f"data_dir: expected none with files of one's own, got {arguments.data_dir}")
    if not files and arguments.text_columns is not None:
        raise ValueError(
            "text_columns: expected --train_file, --validation_file or --test_file with it, got none"
        )
    return files


def own_columns(arguments: DataArguments) -> Columns:
    """The columns of one's own data."""
    texts = tuple(arguments.text_columns or ["sentence"])
    return Columns(texts, arguments.label_column, arguments.label_type)


def own_name(arguments: DataArguments) -> str:
    """The name of one's own data: the one given, or that of the first file."""
    if arguments.task_name != DEFAULT_TASK:
        return arguments.task_name
    return Path(next(iter(own_files(arguments).values()))).stem


def load_data(
    arguments: DataArguments,
    task: Task,
    splits: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: bool = True,
) -> TaskData:
    """Tokenize the splits that ``read_task`` returned, and cut those for evaluation; without ``train`` these alone.

    Raises:
        ValueError: ``max_seq_length`` is out of range.
    """

    def split(name: str, maximum: int | None = None) -> Dataset:
        rows = splits[name]
        if maximum is not None:
            rows = rows.select(range(min(maximum, len(rows))))
        return tokenize_split(name, rows, tokenizer, task, arguments.max_seq_length)

    return TaskData(
        task,
        tokenizer,
        split("train") if train else Dataset.from_dict({}),
        {name: split(name, arguments.max_eval_samples) for name in task.eval_splits},
        PadCollator(tokenizer, arguments.pad_features, arguments.max_seq_length),
    )


def tokenize_split(
    name: str,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    max_seq_length: int,
    *,
    labelled: bool = True,
) -> Dataset:
    """Tokenize a split as ``tokenize`` does, and say how many of its samples were cut."""
    tokens, cut = tokenize(rows, tokenizer, task, max_seq_length, labelled=labelled)
    if cut and Collectives().rank == 0:
        logger.warning(
            "max_seq_length: %d of the %d samples of split %r have more than %d tokens and are cut",
            *(cut, len(tokens), name, max_seq_length),
        )
    return tokens


def metrics_of(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """Trainer's function of predictions and labels that scores a task: its metrics and the loss on the hard labels."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        return {"loss": hard_label_loss(task, logits, labels), **compute_metrics(task, logits, labels)}

    return compute


def evaluation_sets(data: TaskData) -> Dataset | dict[str, Dataset]:
    """One split as it is; several (MNLI) under their names, so that one never overwrites the other."""
    return next(iter(data.evaluation.values())) if len(data.evaluation) == 1 else data.evaluation


def check_model(path: str, tokenizer: PreTrainedTokenizerBase, task: Task, max_seq_length: int) -> None:
    """Check that a model takes every sample that its tokenizer makes of a task; see ``check_inputs``."""
    check_inputs(path, tokenizer, max_seq_length, pair=len(task.text_columns) == 2)


def align_outputs(teacher_model: Teacher, task: Task, argument: str = "teacher_model_name_or_path") -> None:
    """Bring a classifier's outputs into the order of a task's classes.

    Raises:
        ValueError: It has other classes.
    """
    logits = teacher_model.model.config.num_labels
    if logits != task.num_labels:
        raise ValueError(
            f"{argument}: {teacher_model.name} has {logits} outputs; task {task.name!r} needs "
            f"{task.num_labels}; fine-tune it with the 'teacher' command"
        )
    teacher_model.follow_labels(task.labels)
