"""``fsd-fast distill``: train a student, by most methods next to its frozen teacher."""

from __future__ import annotations

import contextlib
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from fsd_fast.cache.teacher_cache import EVALUATION_FOLDER
from fsd_fast.commands._common import (
    TaskData,
    Work,
    check_model,
    evaluation_sets,
    load_data,
    metrics_of,
    read_task,
)
from fsd_fast.commands._teacher import CacheArguments, OpenedTeacher, open_teacher, writer_lock
from fsd_fast.commands.flags import LEARNING_RATES, DataArguments, RunArguments, flag
from fsd_fast.commands.loss_flags import LossArguments, check_settings
from fsd_fast.commands.memory_flags import Memories, StudentMemoryArguments, check_memory_flags, open_memories
from fsd_fast.commands.values import Range
from fsd_fast.data import Task, resolve_model, samples_digest
from fsd_fast.losses import METHODS, Objective, Setup
from fsd_fast.losses.gather import gathers
from fsd_fast.models.layers import parse_layer_pairs, penultimate_pair
from fsd_fast.models.loading import load_tokenizer, read_config
from fsd_fast.models.student import load_classifier, parameter_count
from fsd_fast.models.whole_weights import whole_weights
from fsd_fast.training.checkpoints import find_checkpoint
from fsd_fast.training.distillation import DistillationModel, export_state
from fsd_fast.training.early_stopping import early_stopping
from fsd_fast.training.export import check_export
from fsd_fast.training.record import RECORD_FILE, Record, make_record, read_record
from fsd_fast.training.resume import check_resumed
from fsd_fast.training.run import choose_best_metric, choose_sampling, finish_run
from fsd_fast.training.teacher_logits import TeacherLogits, score_splits
from fsd_fast.training.teacher_source import CachedTeacher, CacheScan
from fsd_fast.training.trainer import FSDTrainer
from fsd_kernels import resolve_backend

logger = logging.getLogger(__name__)


@dataclass
class DistillationArguments:
    """The ``distill`` command: student and teacher."""

    teacher_model_name_or_path: str | None = flag(
        "The fine-tuned teacher. Method 'finetune' needs none and is only compared with it.",
        None,
    )
    model_name_or_path: str | None = flag(
        "Pre-trained model whose first layers the student starts from: a folder, a Hub name or 'minilm'. Default: the "
        "one that the teacher was fine-tuned from, as the record in its folder says.",
        None,
    )
    copy_teacher: bool = flag("Start the student from the fine-tuned teacher's first layers instead.", False)
    student_layers: int | None = flag(
        "Layers of the student. Default: half of the teacher's.", None, numbers=Range(minimum=1)
    )
    fidelity: bool = flag(
        "Compare the student's predictions with the teacher's on the evaluation splits when training ends.",
        True,
    )
    teacher_logits_dir: str | None = flag(
        "Folder for the teacher's logits on those splits: written once, read by other runs with the same teacher.",
        None,
        writes=True,
    )


@dataclass
class DistillRunArguments(RunArguments):
    """``RunArguments`` with the learning rate of the paper's structure losses."""

    learning_rate: float = flag(
        "Initial learning rate of AdamW; it falls linearly to 0.", 4e-5, numbers=LEARNING_RATES
    )


ARGUMENTS = (
    *(DataArguments, DistillationArguments, CacheArguments),
    *(StudentMemoryArguments, LossArguments, DistillRunArguments),
)


def prepare(
    data_arguments: DataArguments,
    arguments: DistillationArguments,
    cache: CacheArguments,
    memory: StudentMemoryArguments,
    loss: LossArguments,
    run: DistillRunArguments,
) -> Work:
    """Check the input; return the work that trains a student."""
    resume = find_checkpoint(
        str(run.output_dir), run.resume_from_checkpoint, allow_partial=run.allow_partial_resume
    )
    task, splits = read_task(data_arguments)
    choose_best_metric(run, task)
    choose_sampling(run, data_arguments.pad_features)
    method = loss.method
    check_settings(method, memory, loss)
    _check_device(loss.backend, run)
    set_seed(run.seed)
    teacher_path = _teacher_path(arguments, method)
    source = _student_source(arguments, teacher_path)
    setup, student_layers = _setup(data_arguments, arguments, loss, teacher_path or source, source)
    objective = METHODS[method].build(loss.settings(), setup)
    _check_batches(objective, method, run)
    if objective.requires.memories:
        check_memory_flags(memory, method, run)
    _check_cacheable(objective, method, cache)
    if not objective.requires.teacher and not arguments.fidelity:
        teacher_path = None
    tokenizer = _load_tokenizer(data_arguments, task, teacher_path, source)
    _check_cls_token(objective, method, tokenizer, source)
    data = load_data(data_arguments, task, splits, tokenizer)
    teacher = None
    if teacher_path is not None:
        layers = objective.requires.teacher_layers
        teacher = open_teacher(teacher_path, data, data_arguments, cache, layers, precision=_precision(run))
    student = _load_student(source, task, student_layers, tokenizer)
    memories = None
    if objective.requires.memories and teacher is not None:
        memories = open_memories(
            memory, data_arguments, data, run, teacher.description, student, resume is None
        )
    trainer = _trainer(objective, student, teacher, memories, data, run, memory.memory_learning_rate)
    facts = _facts(setup, student, teacher, memories, data)
    record = make_record("distill", data_arguments, arguments, cache, memory, loss, run, **facts)
    if resume is not None:
        record = check_resumed(record, resume, run.allow_changes)
    title = f"{student_layers}-layer student for {task.name}, "
    title += f"distilled by {method}" if objective.requires.teacher else "trained without a teacher"
    logits = _teacher_logits(arguments, teacher, run, data)
    return functools.partial(_work, trainer, resume, student, data, title, record, logits)


def _trainer(
    objective: Objective,
    student: PreTrainedModel,
    teacher: OpenedTeacher | None,
    memories: Memories | None,
    data: TaskData,
    run: DistillRunArguments,
    memory_learning_rate: float | None,
) -> FSDTrainer:
    return FSDTrainer(
        model=DistillationModel(student, objective, None if memories is None else memories.student),
        args=run,
        train_dataset=data.train,
        eval_dataset=evaluation_sets(data),
        data_collator=data.collator,
        processing_class=data.tokenizer,
        compute_metrics=metrics_of(data.task),
        callbacks=early_stopping(run.early_stopping_patience, run.early_stopping_threshold),
        teacher=teacher.source(objective.requires) if teacher and objective.requires.teacher else None,
        teacher_memory=None if memories is None else memories.teacher,
        start_memory=None if memories is None else memories.start,
        memory_learning_rate=memory_learning_rate,
        profile_steps=run.profile,
    )


def _work(
    trainer: FSDTrainer,
    resume: str | None,
    student: PreTrainedModel,
    data: TaskData,
    title: str,
    record: Record,
    logits: TeacherLogits | None,
) -> dict[str, float]:
    """Train, and write to the teacher's cache where no other run does."""
    source = trainer.teacher
    with contextlib.ExitStack() as locks:
        if isinstance(source, CachedTeacher):
            trainer.add_callback(CacheScan(source.cache))
            source.writes = locks.enter_context(writer_lock(source.cache, required=False))
        return finish_run(
            trainer,
            resume,
            lambda: export_state(trainer.gathered_state()),
            student,
            data.task.name,
            len(data.train),
            data.tokenizer,
            title,
            record,
            functools.partial(score_splits, trainer, data.evaluation, data.task, logits),
        )


def _teacher_logits(
    arguments: DistillationArguments, teacher: OpenedTeacher | None, run: RunArguments, data: TaskData
) -> TeacherLogits | None:
    """The teacher's logits that the student's are compared with when training ends.

    With a cache they are kept in it, so that later runs need not load the teacher for them.
    """
    if not arguments.fidelity or teacher is None:
        return None
    kept = None if teacher.cache is None else str(teacher.cache.folder / EVALUATION_FOLDER)
    return TeacherLogits(
        teacher.load,
        teacher.description,
        data.collator,
        precision={"bfloat16": torch.bfloat16, "float16": torch.float16}.get(_precision(run)),
        batch_size=run.per_device_eval_batch_size,
        device=run.device,
        folder=arguments.teacher_logits_dir or kept,
    )


def _precision(run: RunArguments) -> str:
    """The precision of the teacher's matrix products."""
    return "bfloat16" if run.bf16 else "float16" if run.fp16 else "float32"


def _check_cacheable(objective: Objective, method: str, cache: CacheArguments) -> None:
    """Check that a cache holds what the objective reads of a teacher."""
    if cache.teacher_cache_dir is None or (
        objective.requires.teacher and not objective.requires.relation_heads
    ):
        return
    reason = "reads queries, keys and values" if objective.requires.teacher else "reads no teacher"
    raise ValueError(
        f"teacher_cache_dir: method {method!r} {reason}; a cache holds logits and hidden states, got "
        f"{cache.teacher_cache_dir}"
    )


def _setup(
    data_arguments: DataArguments,
    arguments: DistillationArguments,
    loss: LossArguments,
    teacher_path: str,
    source: str,
) -> tuple[Setup, int]:
    """What the method is built for, and the number of the student's layers."""
    teacher, student = read_config(teacher_path), read_config(source)
    teacher_layers = int(teacher.num_hidden_layers)
    student_layers = arguments.student_layers or max(1, teacher_layers // 2)
    pairs = parse_layer_pairs(
        loss.layer_pairs or METHODS[loss.method].layer_pairs, teacher_layers, student_layers
    )
    setup = Setup(
        tuple(pairs),
        penultimate_pair(teacher_layers, student_layers),
        int(teacher.hidden_size),
        int(student.hidden_size),
        data_arguments.pad_features,
        loss.backend,
    )
    return setup, student_layers


def _facts(
    setup: Setup,
    student: PreTrainedModel,
    teacher: OpenedTeacher | None,
    memories: Memories | None,
    data: TaskData,
) -> dict[str, Any]:
    """What the record of the run says beside its flags."""
    return {
        "student_layers": int(student.config.num_hidden_layers),
        "layer_pairs": ",".join(f"{of_teacher}:{of_student}" for of_teacher, of_student in setup.layer_pairs),
        "num_centroid": None if memories is None else memories.teacher.identity.num_centroid,
        "parameters": parameter_count(student),
        "teacher_parameters": None if teacher is None else teacher.parameters(),
        "teacher_fingerprint": None if teacher is None else teacher.description.fingerprint[:16],
        "train_data": samples_digest(data.train),
    }


def _check_device(backend: str, run: RunArguments) -> None:
    """Check that the losses' backend runs here, and that the process has one GPU at most."""
    for op in ("intra_cka", "gram", "structure"):
        resolve_backend(backend, run.device, op)
    if run.n_gpu > 1:
        # Trainer would cut the batch, and with it the memory, into one part for each GPU.
        raise ValueError(
            f"distill trains on one GPU in each process and sees {run.n_gpu}; start a process for each with "
            f"deepspeed --num_gpus {run.n_gpu} train_ds.py distill ..., or choose one with CUDA_VISIBLE_DEVICES=0"
        )


def _teacher_path(arguments: DistillationArguments, method: str) -> str | None:
    """The teacher's folder or Hub name; None without a teacher, which only some methods allow."""
    name = arguments.teacher_model_name_or_path
    if name is not None:
        return resolve_model(name)
    if METHODS[method].needs_teacher:
        free = ", ".join(name for name, entry in METHODS.items() if not entry.needs_teacher)
        raise ValueError(
            f"--teacher_model_name_or_path must be given for method {method!r}; method {free} needs no teacher"
        )
    return None


def _student_source(arguments: DistillationArguments, teacher_path: str | None) -> str:
    """Find the model whose first layers the student starts from, and put its name into the arguments.

    Without ``--model_name_or_path`` and ``--copy_teacher`` it is the model that the teacher was fine-tuned from, as the
    record in the teacher's folder says.
    """
    if arguments.copy_teacher:
        if arguments.model_name_or_path is not None:
            raise ValueError(
                "model_name_or_path: --copy_teacher true starts the student from the teacher; expected one of the "
                f"two, got both and {arguments.model_name_or_path}"
            )
        if teacher_path is None:
            raise ValueError("copy_teacher: expected a --teacher_model_name_or_path to start from, got none")
        return teacher_path
    if arguments.model_name_or_path is None:
        if teacher_path is None:
            raise ValueError(
                "model_name_or_path: expected the pre-trained model the student starts from, got none, and no teacher"
            )
        path = Path(teacher_path) / RECORD_FILE
        origin = read_record(path).arguments.get("model_name_or_path") if path.is_file() else None
        if not isinstance(origin, str):
            raise ValueError(
                "model_name_or_path: expected the pre-trained model the student starts from, or --copy_teacher true; "
                f"{path} does not say what the teacher was fine-tuned from"
            )
        logger.warning("the student starts from %s, which the teacher was fine-tuned from", origin)
        arguments.model_name_or_path = origin
    return resolve_model(arguments.model_name_or_path)


def _check_batches(objective: Objective, method: str, run: RunArguments) -> None:
    """Check that a batch has as many samples as the objective compares."""
    joined = run.per_device_train_batch_size * (run.world_size if gathers(objective) else 1)
    if joined < objective.requires.minimum_batch:
        raise ValueError(
            f"per_device_train_batch_size: method {method!r} compares the samples of a batch and needs "
            f"at least {objective.requires.minimum_batch}, got {run.per_device_train_batch_size}"
        )


def _check_cls_token(
    objective: Objective, method: str, tokenizer: PreTrainedTokenizerBase, source: str
) -> None:
    """Check that samples begin with [CLS] where the objective reads its hidden state."""
    if objective.requires.cls_token and tokenizer("a")["input_ids"][0] != tokenizer.cls_token_id:
        raise ValueError(
            f"method: {method!r} reads the hidden state of [CLS], the first token; expected a tokenizer that puts it "
            f"there, got that of {source}"
        )


def _load_tokenizer(
    data_arguments: DataArguments, task: Task, teacher_path: str | None, source: str
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of both models, and check that they take the task's samples."""
    tokenizer = load_tokenizer(teacher_path or source)
    if load_tokenizer(source).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"model_name_or_path: {source} and the teacher {teacher_path} have different vocabularies"
        )
    for path in filter(None, (teacher_path, source)):
        check_model(path, tokenizer, task, data_arguments.max_seq_length)
    return tokenizer


def _load_student(
    source: str, task: Task, student_layers: int, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Load the student, and check that it can be exported."""
    with whole_weights():
        student = load_classifier(source, task.labels, student_layers)
    check_export(student, tokenizer)
    return student
