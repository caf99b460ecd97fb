"""The flags that commands share: what is read, and how it is trained."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from fsd_fast.metrics import MAIN_METRIC


def flag(text: str, default: Any = dataclasses.MISSING, **keywords: Any) -> Any:
    """A dataclass field that is a flag, with its help text."""
    return field(default=default, metadata={"help": text}, **keywords)


@dataclass
class DataArguments:
    """What is read, and how it becomes batches."""

    task_name: str = flag("Task: a GLUE task, 'reviews' or 'reviews-score'.", "reviews")
    data_dir: str | None = flag(
        "Folder of the official GLUE TSV files (or its parent). Default: built-in data for the reviews tasks, "
        "the Hub for GLUE.",
        None,
    )
    max_seq_length: int = flag("Tokens S of a sample, special tokens included; longer ones are cut.", 128)
    pad_features: Literal["include", "exclude"] = flag(
        "include: all S positions count in the structures, and every batch is padded to S (the paper). "
        "exclude: padding counts nowhere, and a batch is padded to its own longest sample.",
        "exclude",
    )
    max_train_samples: int | None = flag("Use only the first so many training samples.", None)
    max_eval_samples: int | None = flag("Use only the first so many samples of each evaluation split.", None)


def _default_report() -> list[str]:
    return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []


@dataclass
class RunArguments(TrainingArguments):
    """Every flag of transformers' ``TrainingArguments``, with the paper's defaults."""

    output_dir: str = flag("Folder of the run: checkpoints, logs, results and the trained model.")
    per_device_train_batch_size: int = flag("Samples of one training step on each device.", 32)
    per_device_eval_batch_size: int = flag("Samples of one evaluation step on each device.", 64)
    learning_rate: float = flag("Initial learning rate of AdamW; it falls linearly to 0.", 2e-5)
    eval_strategy: str = flag("When to evaluate: no, steps or epoch.", "epoch")
    save_strategy: str = flag("When to save a checkpoint: no, steps or epoch.", "epoch")
    save_total_limit: int | None = flag("Checkpoints to keep.", 1)
    logging_steps: float = flag("Steps between two log entries.", 10)
    logging_nan_inf_filter: bool = flag(
        "Log a loss that is not finite as the mean of those before it. Training stops at one here.", False
    )
    # HfArgumentParser understands this annotation in transformers' own order only.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default_factory=_default_report,
        metadata={"help": "Where to log to. Default: TensorBoard if installed."},
    )
    metric_for_best_model: str | None = flag(
        "Metric by which the best checkpoint is chosen, with or without 'eval_'. Default: the task's main one.",
        None,
    )
    remove_unused_columns: bool = flag(
        "Drop data columns that the model does not take; grouping by length reads one of them.", False
    )
    overwrite_output_dir: bool = flag("Start anew in a folder that holds a run already.", False)

    def __post_init__(self) -> None:
        # TrainingArguments would put "loss" in the place of no metric.
        if self.metric_for_best_model is None:
            self.metric_for_best_model = MAIN_METRIC
        super().__post_init__()
