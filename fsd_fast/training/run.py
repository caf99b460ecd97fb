"""A training run: its record, its start, and what is written when it ends."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, SchedulerType, Trainer, TrainingArguments

from fsd_fast.files import write_json
from fsd_fast.models.labels import id2label_of
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
            shutil.rmtree(old)
    result = trainer.train(resume_from_checkpoint=resume)
    metrics = _final_metrics(trainer)
    train_metrics = {**result.metrics, "train_samples": train_samples}
    weights = state()
    scores = {name: value for name, value in metrics.items() if _is_score(name)}
    if trainer.is_world_process_zero():
        assert weights is not None
        card = model_card(title, task_name, settings, scores, id2label_of(student.config))
        export_student(student, weights, tokenizer, folder, card)
        write_json(folder / "fsd_arguments.json", settings)
    trainer.save_metrics("train", train_metrics)
    trainer.save_metrics("eval", metrics)
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
