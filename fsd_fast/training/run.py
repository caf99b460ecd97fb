"""A training run: its record, its start, and what is written when it ends."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, SchedulerType, Trainer, TrainingArguments

from fsd_fast.data import Task
from fsd_fast.files import write_json
from fsd_fast.metrics import MAIN_METRIC, main_metric_first
from fsd_fast.training.export import export_student, model_card


def finish_run(
    trainer: Trainer,
    resume: str | None,
    state: Callable[[], dict[str, torch.Tensor] | None],
    student: Any,
    task_name: str,
    train_samples: int,
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    settings: dict[str, Any],
) -> dict[str, float]:
    """Train, evaluate and export; every process takes part, the first one writes.

    ``state`` gathers the weights, on all processes together; ZeRO-3 leaves them on the first one alone.
    """
    folder = Path(str(trainer.args.output_dir))
    if resume is None and trainer.is_world_process_zero():
        # A run that starts anew must not be continued from the checkpoints of the one before.
        for old in folder.glob("checkpoint-*"):
            if re.fullmatch(r"checkpoint-\d+", old.name):
                shutil.rmtree(old)
    result = trainer.train(resume_from_checkpoint=resume)
    metrics = _final_metrics(trainer)
    train_metrics = {**result.metrics, "train_samples": train_samples}
    weights = state()
    scores = {name: value for name, value in metrics.items() if _is_score(name)}
    if trainer.is_world_process_zero():
        assert weights is not None
        card = model_card(title, task_name, settings, scores)
        export_student(student, weights, tokenizer, folder, card)
        write_json(folder / "fsd_arguments.json", settings)
    # Not combined by Trainer, which would read what an earlier run may have left half-written.
    trainer.save_metrics("train", train_metrics, combined=False)
    trainer.save_metrics("eval", metrics, combined=False)
    if trainer.is_world_process_zero():
        write_json(folder / "all_results.json", {**train_metrics, **metrics})
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()
    return {**train_metrics, **metrics}


def _final_metrics(trainer: Trainer) -> dict[str, float]:
    """Evaluate the trained model, unless the loop has just done so after its last step."""
    last = [
        entry
        for entry in trainer.state.log_history
        if entry["step"] == trainer.state.global_step and any(name.startswith("eval_") for name in entry)
    ]
    if not last or trainer.args.load_best_model_at_end:
        return trainer.evaluate()
    return {name: value for entry in last for name, value in entry.items() if name != "step"}


def choose_best_metric(run: TrainingArguments, task: Task) -> None:
    """Set ``metric_for_best_model`` to a metric that evaluation reports.

    "main" is the task's main metric. Where a task has several evaluation splits (MNLI), a metric without the name of
    its split is the first one's.

    Raises:
        ValueError: The task's evaluation reports no such metric; the known ones are listed.
    """
    metrics = [*main_metric_first(task), "loss"]
    prefixes = [f"{split}_" for split in task.eval_splits] if len(task.eval_splits) > 1 else [""]
    known = [prefix + metric for prefix in prefixes for metric in metrics]
    asked = str(run.metric_for_best_model).removeprefix("eval_")
    found = metrics[0] if asked == MAIN_METRIC else asked
    if found in metrics:
        found = prefixes[0] + found
    if found not in known:
        raise ValueError(
            f"metric_for_best_model: task {task.name!r} reports {', '.join(known)}; got {run.metric_for_best_model!r}"
        )
    run.metric_for_best_model = found


def _is_score(name: str) -> bool:
    return name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_loss"))


def run_settings(*groups: Any) -> dict[str, Any]:
    """The flags that describe a run; of TrainingArguments those that shape the optimisation."""
    names = (
        "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "lr_scheduler_type",
        "gradient_accumulation_steps", "weight_decay", "warmup_steps", "max_grad_norm", "seed", "bf16", "fp16",
    )  # fmt: skip
    settings: dict[str, Any] = {}
    for group in groups:
        if isinstance(group, TrainingArguments):
            settings |= {name: getattr(group, name) for name in names}
            settings |= {
                "world_size": group.world_size,
                "lr_scheduler_type": SchedulerType(group.lr_scheduler_type).value,
            }
        else:
            settings |= dataclasses.asdict(group)
    return settings
