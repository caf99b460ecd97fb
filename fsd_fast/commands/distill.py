"""``fsd-fast distill``: train a student next to its frozen teacher."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from fsd_fast.commands._common import (
    TaskData,
    Work,
    check_model,
    evaluation_sets,
    load_data,
    metrics_of,
)
from fsd_fast.commands._teacher import CacheArguments, OpenedTeacher, open_teacher, writer_lock
from fsd_fast.commands.flags import LEARNING_RATES, DataArguments, RunArguments, flag
from fsd_fast.commands.values import Range
from fsd_fast.data import Task, get_task, resolve_model
from fsd_fast.losses import DEFAULTS, METHODS, FeatureStructureLoss, FeatureStructureObjective, Objective
from fsd_fast.memory.features import memory_identity
from fsd_fast.memory.start import check_training_set, start_from_clusters
from fsd_fast.memory.student_memory import StudentMemory
from fsd_fast.memory.teacher_memory import TeacherMemory
from fsd_fast.models.layers import parse_layer_pairs, penultimate_pair
from fsd_fast.models.loading import load_tokenizer, read_config, skeleton
from fsd_fast.models.student import load_classifier, parameter_count
from fsd_fast.models.whole_weights import whole_weights
from fsd_fast.training.checkpoints import find_checkpoint
from fsd_fast.training.distillation import DistillationModel, export_state
from fsd_fast.training.export import check_export
from fsd_fast.training.record import RECORD_FILE, make_record, read_record
from fsd_fast.training.resume import check_resumed
from fsd_fast.training.run import choose_best_metric, finish_run
from fsd_fast.training.teacher_source import CachedTeacher, CacheScan
from fsd_fast.training.trainer import FSDTrainer
from fsd_kernels import resolve_backend

# The squares that Adam keeps of gradients weighted like this stay within float32.
_WEIGHTS = Range(minimum=0, maximum=1e6)


logger = logging.getLogger(__name__)


@dataclass
class DistillationArguments:
    """The ``distill`` command: student, memory and loss."""

    teacher_model_name_or_path: str = flag("The fine-tuned teacher.")
    model_name_or_path: str | None = flag(
        "Pre-trained model whose first layers the student starts from: a folder, a Hub name or 'minilm'. Default: the "
        "one that the teacher was fine-tuned from, as the record in its folder says.",
        None,
    )
    copy_teacher: bool = flag("Start the student from the fine-tuned teacher's first layers instead.", False)
    student_layers: int | None = flag(
        "Layers of the student. Default: half of the teacher's.", None, numbers=Range(minimum=1)
    )
    method: Literal["vkd", "fsd_i", "fsd_l", "fsd_g", "fsd_il", "fsd_ilg"] = flag(
        "Which structures are matched: letters i, l, g for L_I, L_L, L_G.", "fsd_ilg"
    )
    layer_pairs: str = flag(
        "Hidden states compared by L_I and L_L: 'penultimate', 'layerwise', or a list 'T:S,T:S'. L_G always "
        "uses the penultimate pair.",
        "penultimate",
    )
    alpha: float = flag(
        "Weight of the hard labels in L_VKD.", DEFAULTS.alpha, numbers=Range(minimum=0, maximum=1)
    )
    temperature: float = flag(
        "Temperature tau of L_VKD.", DEFAULTS.temperature, numbers=Range(minimum=1e-3, maximum=1e6)
    )
    beta: float = flag("Weight of the structures against L_VKD.", DEFAULTS.beta, numbers=_WEIGHTS)
    gamma_i: float = flag("Weight of L_I.", DEFAULTS.gamma_i, numbers=_WEIGHTS)
    gamma_l: float = flag("Weight of L_L.", DEFAULTS.gamma_l, numbers=_WEIGHTS)
    gamma_g: float = flag("Weight of L_G.", DEFAULTS.gamma_g, numbers=_WEIGHTS)
    gamma_m: float = flag(
        "Weight of the Euclidean term in L_G against the cosine term.",
        DEFAULTS.gamma_m,
        numbers=Range(minimum=0, maximum=1),
    )
    intra_reduction: Literal["mean_log", "log_mean"] = flag(
        "L_I: mean over samples of -log CKA (the paper), or -log of the mean CKA (the released code).",
        DEFAULTS.reduction,
    )
    memory_path: str | None = flag("Folder that 'memory' wrote; needed by fsd_g and fsd_ilg.", None)
    student_memory_init: Literal["clusters", "normal", "teacher"] = flag(
        "Start of the student memory. clusters: the means of the student's own features over the teacher's clusters. "
        "normal: random numbers (the paper). teacher: the teacher's centroids (same width only).",
        "clusters",
    )
    student_memory_update: Literal["gradient", "ema"] = flag(
        "How the student memory is trained. gradient: by L_G (the paper). ema: each centroid is the running mean of "
        "the student's features in its cluster.",
        "gradient",
    )
    student_memory_decay: float = flag(
        "ema: weight that a centroid keeps for each new sample of its cluster.",
        0.95,
        numbers=Range(above=0, below=1),
    )
    memory_learning_rate: float | None = flag(
        "gradient: initial learning rate of the student memory; it falls linearly to 0. Default: the student's.",
        None,
        numbers=LEARNING_RATES,
    )
    backend: Literal["auto", "triton", "eager", "reference"] = flag(
        "Kernels of the structure losses.", "auto"
    )


@dataclass
class DistillRunArguments(RunArguments):
    """``RunArguments`` with the learning rate of the paper's structure losses."""

    learning_rate: float = flag(
        "Initial learning rate of AdamW; it falls linearly to 0.", 4e-5, numbers=LEARNING_RATES
    )


ARGUMENTS = (DataArguments, CacheArguments, DistillationArguments, DistillRunArguments)


def prepare(
    data_arguments: DataArguments,
    cache_arguments: CacheArguments,
    arguments: DistillationArguments,
    run: DistillRunArguments,
) -> Work:
    """Check the input; return the work that trains a student next to its frozen teacher."""
    resume = find_checkpoint(
        str(run.output_dir), run.resume_from_checkpoint, allow_partial=run.allow_partial_resume
    )
    task = get_task(data_arguments.task_name)
    choose_best_metric(run, task)
    _check_device(arguments, run)
    set_seed(run.seed)
    teacher_path = resolve_model(arguments.teacher_model_name_or_path)
    source = _student_source(arguments, teacher_path)
    teacher_layers = int(read_config(teacher_path).num_hidden_layers)
    student_layers = arguments.student_layers or max(1, teacher_layers // 2)
    layer_pairs = parse_layer_pairs(arguments.layer_pairs, teacher_layers, student_layers)
    penultimate = penultimate_pair(teacher_layers, student_layers)
    objective = FeatureStructureObjective(_loss(data_arguments, arguments), layer_pairs, penultimate)
    _check_batches(objective, arguments, run)
    data = load_data(data_arguments, _load_tokenizer(data_arguments, task, teacher_path, source))
    precision = "bfloat16" if run.bf16 else "float16" if run.fp16 else "float32"
    layers = objective.requires.teacher_layers
    teacher = open_teacher(teacher_path, data, data_arguments, cache_arguments, layers, precision=precision)
    with whole_weights():
        student = load_classifier(source, task.labels, student_layers)
    check_export(student, data.tokenizer)
    trainer = _trainer(data_arguments, arguments, run, data, teacher, student, objective, resume is not None)
    memory = trainer.distillation.student_memory
    record = make_record(
        "distill",
        data_arguments,
        cache_arguments,
        arguments,
        run,
        student_layers=student_layers,
        layer_pairs=",".join(f"{teacher}:{student}" for teacher, student in layer_pairs),
        num_centroid=None if memory is None else len(memory.centroids),
        parameters=parameter_count(student),
        teacher_parameters=parameter_count(skeleton(read_config(teacher_path))),
    )
    if resume is not None:
        record = check_resumed(record, resume, run.allow_changes)
    finish = functools.partial(
        finish_run,
        trainer,
        resume,
        lambda: export_state(trainer.gathered_state()),
        student,
        task.name,
        len(data.train),
        data.tokenizer,
        f"{student_layers}-layer student for {task.name}, distilled by {arguments.method}",
        record,
    )
    return functools.partial(_work, trainer, finish)


def _trainer(
    data_arguments: DataArguments,
    arguments: DistillationArguments,
    run: RunArguments,
    data: TaskData,
    teacher: OpenedTeacher,
    student: PreTrainedModel,
    objective: Objective,
    resumed: bool,
) -> FSDTrainer:
    """Load the memories and make the trainer."""
    teacher_memory, student_memory = _memories(
        data_arguments, arguments, objective, teacher, student, run.seed
    )
    start_memory = None
    if not resumed:
        start_memory = _memory_start(arguments, run, student, data, teacher_memory, student_memory)
    return FSDTrainer(
        model=DistillationModel(student, objective, student_memory),
        args=run,
        train_dataset=data.train,
        eval_dataset=evaluation_sets(data),
        data_collator=data.collator,
        processing_class=data.tokenizer,
        compute_metrics=metrics_of(data.task),
        teacher=teacher.source(objective.requires.teacher_layers),
        teacher_memory=teacher_memory,
        start_memory=start_memory,
        memory_learning_rate=arguments.memory_learning_rate,
    )


def _work(trainer: FSDTrainer, finish: Work) -> dict[str, float]:
    """Train, and write to the teacher's cache where no other run does."""
    source = trainer.teacher
    if not isinstance(source, CachedTeacher):
        return finish()
    trainer.add_callback(CacheScan(source.cache))
    with writer_lock(source.cache, required=False) as source.writes:
        return finish()


def _check_device(arguments: DistillationArguments, run: RunArguments) -> None:
    """Check that the losses' backend runs here, and that the process has one GPU at most."""
    for op in ("intra_cka", "gram", "structure"):
        resolve_backend(arguments.backend, run.device, op)
    if run.n_gpu > 1:
        # Trainer would cut the batch, and with it the memory, into one part for each GPU.
        raise ValueError(
            f"distill trains on one GPU in each process and sees {run.n_gpu}; start a process for each with "
            f"deepspeed --num_gpus {run.n_gpu} train_ds.py distill ..., or choose one with CUDA_VISIBLE_DEVICES=0"
        )


def _student_source(arguments: DistillationArguments, teacher_path: str) -> str:
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
        return teacher_path
    if arguments.model_name_or_path is None:
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


def _loss(data_arguments: DataArguments, arguments: DistillationArguments) -> FeatureStructureLoss:
    return FeatureStructureLoss(
        arguments.method,
        alpha=arguments.alpha,
        temperature=arguments.temperature,
        beta=arguments.beta,
        gamma_i=arguments.gamma_i,
        gamma_l=arguments.gamma_l,
        gamma_g=arguments.gamma_g,
        gamma_m=arguments.gamma_m,
        reduction=arguments.intra_reduction,
        pad_features=data_arguments.pad_features,
        backend=arguments.backend,
    )


def _check_batches(objective: Objective, arguments: DistillationArguments, run: RunArguments) -> None:
    """Check what the objective needs of a batch, of the optimizer, and of the memory flags."""
    if run.per_device_train_batch_size < objective.requires.minimum_batch:
        raise ValueError(
            f"per_device_train_batch_size: method {arguments.method!r} compares the samples of a batch and needs "
            f"at least {objective.requires.minimum_batch}, got {run.per_device_train_batch_size}"
        )
    if not objective.requires.memories:
        if arguments.memory_path is not None:
            raise ValueError(
                f"memory_path: method {arguments.method!r} reads no memory, got {arguments.memory_path}"
            )
        return
    if arguments.memory_path is None:
        users = ", ".join(name for name, used in METHODS.items() if used[2])
        raise ValueError(
            f"memory_path: methods {users} need a teacher memory; build one with the 'memory' command, "
            f"got method {arguments.method!r} without --memory_path"
        )
    # An optimizer of DeepSpeed's configuration takes all parameters as one group; Trainer's own has one without decay.
    deepspeed = getattr(run, "hf_deepspeed_config", None)
    if run.weight_decay and deepspeed is not None and "optimizer" in deepspeed.config:
        raise ValueError(
            f"weight_decay: the optimizer of the DeepSpeed configuration would let the student memory decay too, got "
            f"{run.weight_decay}; take its 'optimizer' out, as in ds_config.json, and Trainer's AdamW is used"
        )


def _load_tokenizer(
    data_arguments: DataArguments, task: Task, teacher_path: str, source: str
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that teacher and student share, and check that both take the task's samples."""
    tokenizer = load_tokenizer(teacher_path)
    if load_tokenizer(source).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"model_name_or_path: {source} and the teacher {teacher_path} have different vocabularies"
        )
    for path in (teacher_path, source):
        check_model(path, tokenizer, task, data_arguments.max_seq_length)
    return tokenizer


def _memories(
    data_arguments: DataArguments,
    arguments: DistillationArguments,
    objective: Objective,
    teacher: OpenedTeacher,
    student: PreTrainedModel,
    seed: int,
) -> tuple[TeacherMemory | None, StudentMemory | None]:
    """Load the teacher memory and start the student memory, or (None, None) where the objective requires none."""
    if not objective.requires.memories or arguments.memory_path is None:
        return None, None
    memory = TeacherMemory.from_pretrained(arguments.memory_path)
    expected = memory_identity(
        teacher.description,
        get_task(data_arguments.task_name),
        data_arguments.max_seq_length,
        data_arguments.pad_features,
        memory.identity.num_centroid,
    )
    memory.identity.check(expected, arguments.memory_path)
    student_memory = StudentMemory(
        memory.identity.num_centroid,
        data_arguments.max_seq_length,
        int(student.config.hidden_size),
        init="normal" if arguments.student_memory_init == "clusters" else arguments.student_memory_init,
        teacher_memory=memory,
        generator=torch.Generator().manual_seed(seed),
        decay=arguments.student_memory_decay if arguments.student_memory_update == "ema" else None,
        pad_features=data_arguments.pad_features,
    )
    return memory, student_memory


def _memory_start(
    arguments: DistillationArguments,
    run: RunArguments,
    student: PreTrainedModel,
    data: TaskData,
    teacher_memory: TeacherMemory | None,
    student_memory: StudentMemory | None,
) -> Callable[[], None] | None:
    """What sets the start of the student memory once training begins, where that needs the student's features."""
    if arguments.student_memory_init != "clusters" or teacher_memory is None or student_memory is None:
        return None
    check_training_set(teacher_memory, data.train, str(arguments.memory_path))
    return functools.partial(
        start_from_clusters,
        student_memory,
        teacher_memory,
        student,
        data.train,
        data.collator,
        batch_size=run.per_device_eval_batch_size,
        device=run.device,
    )
