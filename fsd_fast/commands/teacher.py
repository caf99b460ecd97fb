"""``fsd-fast teacher``: fine-tune a classifier on the hard labels."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from transformers import set_seed

from fsd_fast.commands._common import Work, check_model, evaluation_sets, load_data, metrics_of, read_task
from fsd_fast.commands.flags import DataArguments, RunArguments, flag
from fsd_fast.commands.values import Range
from fsd_fast.data import resolve_model, samples_digest
from fsd_fast.models.loading import load_tokenizer
from fsd_fast.models.student import load_classifier, parameter_count
from fsd_fast.models.whole_weights import whole_weights
from fsd_fast.training.checkpoints import find_checkpoint
from fsd_fast.training.early_stopping import early_stopping
from fsd_fast.training.export import check_export
from fsd_fast.training.record import make_record
from fsd_fast.training.resume import check_resumed
from fsd_fast.training.run import choose_best_metric, choose_sampling, finish_run
from fsd_fast.training.trainer import ClassifierTrainer


@dataclass
class TeacherArguments:
    """The ``teacher`` command: fine-tune a classifier on the hard labels."""

    model_name_or_path: str = flag(
        "Pre-trained model to fine-tune: a folder, a Hub name, or 'minilm', the built-in backbone.", "minilm"
    )
    num_layers: int | None = flag(
        "Keep only the first so many layers: trains a shallow model without a teacher.",
        None,
        numbers=Range(minimum=1),
    )


ARGUMENTS = (DataArguments, TeacherArguments, RunArguments)


def prepare(data_arguments: DataArguments, arguments: TeacherArguments, run: RunArguments) -> Work:
    """Fine-tune a classifier on the hard labels."""
    resume = find_checkpoint(
        str(run.output_dir), run.resume_from_checkpoint, allow_partial=run.allow_partial_resume
    )
    task, splits = read_task(data_arguments)
    choose_best_metric(run, task)
    choose_sampling(run, data_arguments.pad_features)
    if run.label_smoothing_factor and task.is_regression:
        raise ValueError(
            f"label_smoothing_factor: expected 0 for a regression, as {task.name!r} is, "
            f"got {run.label_smoothing_factor}"
        )
    set_seed(run.seed)
    path = resolve_model(arguments.model_name_or_path)
    tokenizer = load_tokenizer(path)
    check_model(path, tokenizer, task, data_arguments.max_seq_length)
    with whole_weights():
        model = load_classifier(path, task.labels, arguments.num_layers)
    check_export(model, tokenizer)
    data = load_data(data_arguments, task, splits, tokenizer)
    trainer = ClassifierTrainer(
        model=model,
        args=run,
        train_dataset=data.train,
        eval_dataset=evaluation_sets(data),
        data_collator=data.collator,
        processing_class=tokenizer,
        compute_metrics=metrics_of(task),
        callbacks=early_stopping(run.early_stopping_patience, run.early_stopping_threshold),
        profile_steps=run.profile,
    )

    def state() -> dict[str, torch.Tensor] | None:
        wrapped = trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model
        return trainer.accelerator.get_state_dict(wrapped)

    record = make_record(
        "teacher",
        data_arguments,
        arguments,
        run,
        num_layers=int(model.config.num_hidden_layers),
        parameters=parameter_count(model),
        train_data=samples_digest(data.train),
    )
    if resume is not None:
        record = check_resumed(record, resume, run.allow_changes)
    title = f"{model.config.num_hidden_layers}-layer classifier for {task.name}"
    return functools.partial(
        finish_run, trainer, resume, state, model, task.name, len(data.train), tokenizer, title, record
    )
