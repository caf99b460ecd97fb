"""A training run: its start, and what is written when it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from fsd_fast.data import Task
from fsd_fast.distributed import Collectives
from fsd_fast.files import exclusive_folder, named_write_errors, write_json
from fsd_fast.metrics import MAIN_METRIC, main_metric_first
from fsd_fast.models.labels import id2label_of
from fsd_fast.shutdown import stoppable
from fsd_fast.training.export import export_student, model_card
from fsd_fast.training.manifest import checkpoint_folders, remove_checkpoint
from fsd_fast.training.record import RECORD_FILE, Record, write_record


def finish_run(
    trainer: Trainer,
    resume: str | None,
    state: Callable[[], dict[str, torch.Tensor] | None],
    student: Any,
    task_name: str,
    train_samples: int,
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    record: Record,
    score: Callable[[], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Train, evaluate and export; every process takes part, the first one writes.

    ``state`` gathers the weights, on all processes together; ZeRO-3 leaves them on the first one alone. The record is
    written before the first step, so that a run that is cut off can be told from other files, and repeated. ``score``
    evaluates the trained model; without it Trainer does, with the metrics alone.

    Raises:
        BlockingIOError: Another run is writing the folder.
        RuntimeError: There was no batch to train on. Nothing is exported.
        Stopped: By a signal, with a checkpoint. Nothing is exported. After the last step signals come too late.
    """
    folder = Path(str(trainer.args.output_dir))
    with _locked(folder, trainer), stoppable():
        if trainer.is_world_process_zero():
            if resume is None:
                # A run that starts anew must not be continued from the checkpoints of the one before.
                for old in checkpoint_folders(folder):
                    remove_checkpoint(old)
            write_record(folder / RECORD_FILE, record)
        result = trainer.train(resume_from_checkpoint=resume)
        if trainer.state.global_step == 0:
            raise RuntimeError(
                f"no step was made, so nothing is exported: the {train_samples} training samples are less than a batch"
            )
        metrics = _final_metrics(trainer, score)
        train_metrics = {**result.metrics, "train_samples": train_samples}
        # Trainer counts operations by the model's own formula, which a distillation has none of.
        if not train_metrics.get("total_flos"):
            train_metrics.pop("total_flos", None)
        weights = state()
        if trainer.is_world_process_zero():
            assert weights is not None
            scores = {name: value for name, value in metrics.items() if _is_score(name)}
            card = model_card(title, task_name, record.settings, scores, id2label_of(student.config))
            with named_write_errors(folder):
                export_student(student, weights, tokenizer, folder, card)
        # Not combined by Trainer, which would read what an earlier run may have left half-written.
        trainer.save_metrics("train", train_metrics, combined=False)
        trainer.save_metrics("eval", metrics, combined=False)
        if trainer.is_world_process_zero():
            write_json(folder / "all_results.json", {**train_metrics, **metrics})
        trainer.save_state()
        trainer.accelerator.wait_for_everyone()
    return {**train_metrics, **metrics}


@contextlib.contextmanager
def _locked(folder: Path, trainer: Trainer) -> Iterator[None]:
    """Keep other runs out of a folder while this one writes it; all processes raise if the first cannot."""
    locks = contextlib.ExitStack()

    def lock() -> None:
        if trainer.is_world_process_zero():
            locks.enter_context(exclusive_folder(folder, "output_dir"))

    Collectives().run_on_all_ranks(lock)
    with locks:
        yield


def _final_metrics(trainer: Trainer, score: Callable[[], dict[str, float]] | None) -> dict[str, float]:
    """Evaluate the trained model, unless Trainer is to and the loop has just done so after its last step."""
    last = [
        entry
        for entry in trainer.state.log_history
        if entry["step"] == trainer.state.global_step and any(name.startswith("eval_") for name in entry)
    ]
    if score is not None:
        metrics = {**score(), "epoch": trainer.state.epoch or 0.0}
        if not last:
            trainer.log(metrics)
        return metrics
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


def choose_sampling(run: TrainingArguments, pad_features: str) -> None:
    """Replace the sampling strategy "auto": by length where that makes batches shorter."""
    if run.train_sampling_strategy == "auto":
        run.train_sampling_strategy = "group_by_length" if pad_features == "exclude" else "random"


def _is_score(name: str) -> bool:
    return name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_loss"))
