"""``fsd-fast evaluate``: score a saved classifier."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments

from fsd_fast.commands._common import Work, check_model, check_outputs, evaluation_sets, load_data, metrics_of
from fsd_fast.commands.flags import DataArguments, flag
from fsd_fast.commands.values import Range
from fsd_fast.data import get_task, resolve_model
from fsd_fast.files import write_json
from fsd_fast.models.loading import load_tokenizer
from fsd_fast.models.teacher import Teacher
from fsd_fast.training.trainer import ClassifierTrainer


@dataclass
class EvaluationArguments:
    """The ``evaluate`` command: metrics of a saved classifier."""

    model_name_or_path: str = flag("The classifier: a folder or a Hub name.")
    output_dir: str | None = flag(
        "Folder to write evaluate_results.json to. Default: print only.", None, writes=True
    )
    per_device_eval_batch_size: int = flag("Samples of one forward pass.", 64, numbers=Range(minimum=1))
    use_cpu: bool = flag("Use the CPU even where there is a GPU.", False)


ARGUMENTS = (DataArguments, EvaluationArguments)


def prepare(data_arguments: DataArguments, arguments: EvaluationArguments) -> Work:
    """Score a saved classifier on the evaluation splits of a task."""
    task = get_task(data_arguments.task_name)
    path = resolve_model(arguments.model_name_or_path)
    tokenizer = load_tokenizer(path)
    check_model(path, tokenizer, task, data_arguments.max_seq_length)
    saved = Teacher.from_pretrained(path)
    check_outputs(saved, task, "model_name_or_path")
    data = load_data(data_arguments, tokenizer)
    run = TrainingArguments(
        # Trainer makes this folder; where nothing is written it must not be one named like a model on the Hub.
        output_dir=arguments.output_dir or tempfile.gettempdir(),
        per_device_eval_batch_size=arguments.per_device_eval_batch_size,
        use_cpu=arguments.use_cpu,
        report_to=[],
    )
    trainer = ClassifierTrainer(
        model=saved.model,
        args=run,
        eval_dataset=evaluation_sets(data),
        data_collator=data.collator,
        processing_class=tokenizer,
        compute_metrics=metrics_of(task),
    )

    def work() -> dict[str, float]:
        metrics: dict[str, float] = trainer.evaluate()
        if arguments.output_dir is not None and trainer.is_world_process_zero():
            write_json(Path(arguments.output_dir) / "evaluate_results.json", metrics)
        return metrics

    return work
