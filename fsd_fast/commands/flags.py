"""The flags that commands share: what is read, and how it is trained."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from fsd_fast.commands.values import Range
from fsd_fast.metrics import MAIN_METRIC


def flag(
    text: str,
    default: Any = dataclasses.MISSING,
    *,
    choices: tuple[str, ...] | None = None,
    numbers: Range | None = None,
    writes: bool = False,
    positional: bool = False,
) -> Any:
    """A dataclass field that is a flag.

    Args:
        text: Its help text.
        default: Its default; without one it must be given.
        choices: The texts it takes, where its annotation does not list them.
        numbers: The numbers it takes.
        writes: Whether it names a folder that the command writes to.
        positional: Whether its value may also stand first, without the flag's name; one flag of a command.
    """
    metadata = {
        "help": text,
        "choices": choices,
        "writes": writes,
        "numbers": numbers,
        "positional": positional,
    }
    return field(default=default, metadata=metadata)


DEFAULT_TASK = "reviews"


@dataclass
class DataArguments:
    """What is read, and how it becomes batches."""

    task_name: str = flag(
        "Task: a GLUE task, 'reviews' or 'reviews-score'. For files of one's own a name for them, by default that of "
        "the file.",
        DEFAULT_TASK,
    )
    data_dir: str | None = flag(
        "Folder of the official GLUE TSV files (or its parent). Default: built-in data for the reviews tasks, "
        "the Hub for GLUE.",
        None,
    )
    train_file: str | None = flag("Training rows of one's own: a CSV, TSV or JSON lines file.", None)
    validation_file: str | None = flag("Evaluation rows of one's own.", None)
    test_file: str | None = flag("Test rows of one's own, for evaluate and predict.", None)
    text_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of one's own files that hold the text: one, or two for pairs. Default: sentence."
        },
    )
    label_column: str = flag("Column of one's own files that holds the label.", "label")
    label_type: Literal["classes", "score"] = flag(
        "Whether labels of one's own files are names of classes, or numbers to predict.", "classes"
    )
    max_seq_length: int = flag(
        "Tokens S of a sample, special tokens included; longer ones are cut.", 128, numbers=Range(minimum=2)
    )
    pad_features: Literal["include", "exclude"] = flag(
        "include: all S positions count in the structures, and every batch is padded to S (the paper). "
        "exclude: padding counts nowhere, and a batch is padded to its own longest sample.",
        "exclude",
    )
    max_train_samples: int | None = flag(
        "Use only the first so many training samples, in the order of --subset_seed; not for evaluate.",
        None,
        numbers=Range(minimum=1),
    )
    subset_seed: int | None = flag(
        "Seed of the order in which training samples are chosen and held out. Default: the order of the data.",
        None,
        numbers=Range(minimum=0, maximum=2**32 - 1),
    )
    heldout_samples: int = flag(
        "Training samples that are not trained on: the last ones of that order become the evaluation split 'heldout', "
        "by which checkpoints are then chosen.",
        0,
        numbers=Range(minimum=0),
    )
    max_eval_samples: int | None = flag(
        "Use only the first so many samples of each evaluation split; not for memory and cache.",
        None,
        numbers=Range(minimum=1),
    )


LEARNING_RATES = Range(minimum=0, maximum=1000)


def _default_report() -> list[str]:
    return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []


@dataclass
class RunArguments(TrainingArguments):
    """Every flag of transformers' ``TrainingArguments``, with the paper's defaults."""

    output_dir: str = flag(
        "Folder of the run: checkpoints, logs, results and the trained model.", writes=True
    )
    per_device_train_batch_size: int = flag(
        "Samples of one training step on each device.", 32, numbers=Range(minimum=1)
    )
    per_device_eval_batch_size: int = flag(
        "Samples of one evaluation step on each device.", 64, numbers=Range(minimum=1)
    )
    learning_rate: float = flag(
        "Initial learning rate of AdamW; it falls linearly to 0.", 2e-5, numbers=LEARNING_RATES
    )
    eval_strategy: str = flag("When to evaluate.", "epoch", choices=("no", "steps", "epoch"))
    save_strategy: str = flag("When to save a checkpoint.", "epoch", choices=("no", "steps", "epoch", "best"))
    save_total_limit: int | None = flag("Checkpoints to keep.", 1, numbers=Range(minimum=1))
    logging_steps: float = flag("Steps between two log entries.", 10, numbers=Range(above=0))
    logging_nan_inf_filter: bool = flag(
        "Log a loss that is not finite as the mean of those before it. Training stops at one here.", False
    )
    report_to: str | list[str] | None = field(
        default_factory=_default_report, metadata={"help": "Where to log to; TensorBoard if it is installed."}
    )
    metric_for_best_model: str | None = flag(
        "Metric by which the best checkpoint is chosen, with or without 'eval_'. Default: the task's main one.",
        None,
    )
    early_stopping_patience: int | None = flag(
        "Stop after so many evaluations in a row without a better metric_for_best_model, and load the best model.",
        None,
        numbers=Range(minimum=1),
    )
    early_stopping_threshold: float = flag(
        "How much better than the best one a metric must be to count for --early_stopping_patience.",
        0.0,
        numbers=Range(minimum=0),
    )
    remove_unused_columns: bool = flag(
        "Drop data columns that the model does not take; grouping by length reads one of them.", False
    )
    train_sampling_strategy: str = flag(
        "Order of the training samples. auto: group_by_length, batches of samples of about one length, under "
        "--pad_features exclude, and random under include, where all batches have one length.",
        "auto",
        choices=("auto", "random", "sequential", "group_by_length", "batch_rebalance"),
    )
    resume_from_checkpoint: str | None = flag(
        "Checkpoint to continue from: its folder, 'last' for the run's newest one, or 'auto' for the newest one "
        "if there is any, else a new start.",
        None,
    )
    allow_changes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Flags that may differ from those that the run was started with when it is resumed. How long it is "
            "and what is logged, saved and evaluated may always differ; what a checkpoint holds never."
        },
    )
    allow_partial_resume: bool = flag(
        "Resume from a checkpoint that lacks the optimizer's, the schedule's or the random numbers' state.",
        False,
    )
    profile: int | None = flag(
        "Print where the time of so many training steps goes, and write a Chrome trace of them.",
        None,
        numbers=Range(minimum=1),
    )
    overwrite_output_dir: bool = flag("Start anew in a folder that holds a run already.", False)

    def __post_init__(self) -> None:
        # TrainingArguments would put "loss" in the place of no metric.
        if self.metric_for_best_model is None:
            self.metric_for_best_model = MAIN_METRIC
        if self.early_stopping_patience is not None:
            self.load_best_model_at_end = True
        super().__post_init__()
