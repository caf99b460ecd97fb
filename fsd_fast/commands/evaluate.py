"""``fsd-fast evaluate``: score a saved classifier, and compare it with its teacher."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainingArguments

from fsd_fast.commands._common import (
    TaskData,
    Work,
    align_outputs,
    check_model,
    load_data,
    metrics_of,
    read_task,
)
from fsd_fast.commands.flags import DataArguments, flag
from fsd_fast.commands.values import Range
from fsd_fast.data import Task, resolve_model
from fsd_fast.files import write_json
from fsd_fast.models.labels import saved_labels
from fsd_fast.models.loading import load_tokenizer, read_config
from fsd_fast.models.teacher import Teacher
from fsd_fast.training.checkpoint_models import check_loadable, load_checkpoint
from fsd_fast.training.manifest import checkpoint_folders
from fsd_fast.training.teacher_logits import TeacherLogits, score_splits
from fsd_fast.training.trainer import ClassifierTrainer


@dataclass
class EvaluationArguments:
    """The ``evaluate`` command: metrics of a saved classifier."""

    model_name_or_path: str = flag("The classifier: a folder or a Hub name.")
    teacher_model_name_or_path: str | None = flag(
        "A fine-tuned teacher to compare it with: agreement of their predictions, and mean KL.", None
    )
    teacher_logits_dir: str | None = flag(
        "Folder for the teacher's logits: written as the teacher runs, read instead of running it again.",
        None,
        writes=True,
    )
    all_checkpoints: bool = flag(
        "Score every checkpoint-N in the folder of a finished run, and the run's model itself.", False
    )
    output_dir: str | None = flag(
        "Folder to write evaluate_results.json to. Default: print only.", None, writes=True
    )
    per_device_eval_batch_size: int = flag("Samples of one forward pass.", 64, numbers=Range(minimum=1))
    use_cpu: bool = flag("Use the CPU even where there is a GPU.", False)


ARGUMENTS = (DataArguments, EvaluationArguments)


def prepare(data_arguments: DataArguments, arguments: EvaluationArguments) -> Work:
    """Score a saved classifier on the evaluation splits of a task."""
    if arguments.teacher_logits_dir is not None and arguments.teacher_model_name_or_path is None:
        raise ValueError(
            "teacher_logits_dir: expected --teacher_model_name_or_path with it, whose logits are kept there"
        )
    path = resolve_model(arguments.model_name_or_path)
    tokenizer = load_tokenizer(path)
    labels = None if data_arguments.train_file is not None else saved_labels(read_config(path))
    task, splits = read_task(data_arguments, needs=(), labels=labels)
    if not task.eval_splits:
        raise ValueError("train_file: expected --validation_file or --test_file beside it, got none to score")
    saved = _load(path, tokenizer, task, data_arguments, "model_name_or_path")
    teacher = None
    if arguments.teacher_model_name_or_path is not None:
        teacher_path = resolve_model(arguments.teacher_model_name_or_path)
        if load_tokenizer(teacher_path).get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"teacher_model_name_or_path: {teacher_path} and {path} have different vocabularies"
            )
        teacher = _load(teacher_path, tokenizer, task, data_arguments, "teacher_model_name_or_path")
    data = load_data(data_arguments, task, splits, tokenizer, train=False)
    checkpoints = _checkpoints(path) if arguments.all_checkpoints else []
    process = PartialState(cpu=arguments.use_cpu)
    teacher_logits = None
    if teacher is not None:
        teacher_logits = TeacherLogits.of_loaded(
            teacher,
            data.collator,
            batch_size=arguments.per_device_eval_batch_size,
            device=process.device,
            folder=arguments.teacher_logits_dir,
        )

    def score(model: Teacher) -> dict[str, float]:
        trainer = _trainer(model, data, tokenizer, arguments)
        return score_splits(trainer, data.evaluation, task, teacher_logits)

    def work() -> dict[str, float]:
        metrics = score(saved)
        for checkpoint in checkpoints:
            model = load_checkpoint(checkpoint, Path(path))
            align_outputs(model, task, "model_name_or_path")
            metrics |= {f"{checkpoint.name}_{name}": value for name, value in score(model).items()}
        if arguments.output_dir is not None and process.is_main_process:
            write_json(Path(arguments.output_dir) / "evaluate_results.json", metrics)
        return metrics

    return work


def _checkpoints(path: str) -> list[Path]:
    found = checkpoint_folders(path)
    if not found:
        raise FileNotFoundError(f"all_checkpoints: {path} holds no checkpoint-N folder")
    for folder in found:
        check_loadable(folder, Path(path))
    return found


def _load(
    path: str, tokenizer: PreTrainedTokenizerBase, task: Task, arguments: DataArguments, flag_name: str
) -> Teacher:
    check_model(path, tokenizer, task, arguments.max_seq_length)
    saved = Teacher.from_pretrained(path)
    align_outputs(saved, task, flag_name)
    return saved


def _trainer(
    saved: Teacher, data: TaskData, tokenizer: PreTrainedTokenizerBase, arguments: EvaluationArguments
) -> ClassifierTrainer:
    run = TrainingArguments(
        # Trainer makes this folder; where nothing is written it must not be one named like a model on the Hub.
        output_dir=arguments.output_dir or tempfile.gettempdir(),
        per_device_eval_batch_size=arguments.per_device_eval_batch_size,
        use_cpu=arguments.use_cpu,
        report_to=[],
    )
    return ClassifierTrainer(
        model=saved.model,
        args=run,
        data_collator=data.collator,
        processing_class=tokenizer,
        compute_metrics=metrics_of(data.task),
    )
