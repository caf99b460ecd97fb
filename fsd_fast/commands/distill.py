"""``fsd-fast distill``: train a student next to its frozen teacher."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoTokenizer, set_seed

from fsd_fast.commands._common import (
    Work,
    check_length,
    check_outputs,
    evaluation_sets,
    load_data,
    metrics_of,
)
from fsd_fast.commands.flags import LEARNING_RATES, DataArguments, RunArguments, flag
from fsd_fast.commands.values import Range
from fsd_fast.data import get_task, resolve_model
from fsd_fast.losses import DEFAULTS, METHODS, FeatureStructureLoss, FeatureStructureObjective, Objective
from fsd_fast.memory.features import memory_identity
from fsd_fast.memory.student_memory import StudentMemory
from fsd_fast.memory.teacher_memory import TeacherMemory
from fsd_fast.models.distillation import DistillationModel, export_state
from fsd_fast.models.layers import parse_layer_pairs, penultimate_pair
from fsd_fast.models.student import load_classifier, parameter_count
from fsd_fast.models.teacher import Teacher
from fsd_fast.models.whole_weights import whole_weights
from fsd_fast.training.checkpoints import find_checkpoint
from fsd_fast.training.record import make_record
from fsd_fast.training.resume import check_resumed
from fsd_fast.training.run import choose_best_metric, finish_run
from fsd_fast.training.trainer import FSDTrainer
from fsd_kernels import resolve_backend

# The squares that Adam keeps of gradients weighted like this stay within float32.
_WEIGHTS = Range(minimum=0, maximum=1e6)


@dataclass
class DistillationArguments:
    """The ``distill`` command: student, memory and loss."""

    teacher_model_name_or_path: str = flag("The fine-tuned teacher.")
    model_name_or_path: str | None = flag(
        "Pre-trained model whose first layers the student starts from: a folder, a Hub name or 'minilm'.",
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
    student_memory_init: Literal["normal", "teacher"] = flag(
        "Start of the student memory: random normal (the paper) or the teacher's centroids (same width only).",
        "normal",
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


ARGUMENTS = (DataArguments, DistillationArguments, DistillRunArguments)


def prepare(
    data_arguments: DataArguments, arguments: DistillationArguments, run: DistillRunArguments
) -> Work:
    """Train a student next to its frozen teacher."""
    resume = find_checkpoint(str(run.output_dir), run.resume_from_checkpoint)
    task = get_task(data_arguments.task_name)
    choose_best_metric(run, task)
    set_seed(run.seed)
    teacher_path = resolve_model(arguments.teacher_model_name_or_path)
    source = teacher_path if arguments.copy_teacher else arguments.model_name_or_path
    if arguments.copy_teacher and arguments.model_name_or_path is not None:
        raise ValueError(
            "model_name_or_path: --copy_teacher true starts the student from the teacher; expected one of the two, got "
            f"both and {arguments.model_name_or_path}"
        )
    if source is None:
        raise ValueError(
            "model_name_or_path: expected the pre-trained model the student starts from, or --copy_teacher true"
        )
    source = resolve_model(source)
    tokenizer = AutoTokenizer.from_pretrained(teacher_path)
    if AutoTokenizer.from_pretrained(source).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"model_name_or_path: {source} and the teacher {teacher_path} have different vocabularies"
        )
    loss = FeatureStructureLoss(
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
    for op in ("intra_cka", "gram", "structure"):
        resolve_backend(arguments.backend, run.device, op)
    if run.n_gpu > 1:
        # Trainer would cut the batch, and with it the memory, into one part for each GPU.
        raise ValueError(
            f"distill trains on one GPU in each process and sees {run.n_gpu}; start a process for each with "
            f"deepspeed --num_gpus {run.n_gpu} train_ds.py distill ..., or choose one with CUDA_VISIBLE_DEVICES=0"
        )
    teacher_layers = int(AutoConfig.from_pretrained(teacher_path).num_hidden_layers)
    student_layers = (
        max(1, teacher_layers // 2) if arguments.student_layers is None else arguments.student_layers
    )
    layer_pairs = parse_layer_pairs(arguments.layer_pairs, teacher_layers, student_layers)
    objective = FeatureStructureObjective(loss, layer_pairs, penultimate_pair(teacher_layers, student_layers))
    if run.per_device_train_batch_size < objective.requires.minimum_batch:
        raise ValueError(
            f"per_device_train_batch_size: method {arguments.method!r} compares the samples of a batch and needs "
            f"at least {objective.requires.minimum_batch}, got {run.per_device_train_batch_size}"
        )
    check_length(teacher_path, data_arguments.max_seq_length)
    check_length(source, data_arguments.max_seq_length)
    with whole_weights():
        teacher_model = Teacher.from_pretrained(teacher_path)
        check_outputs(teacher_model, task)
        student = load_classifier(source, task.labels, student_layers)
    teacher_memory, student_memory = _memories(
        data_arguments, arguments, objective, teacher_model, student, run.seed
    )
    data = load_data(data_arguments, tokenizer)
    trainer = FSDTrainer(
        model=DistillationModel(student, objective, student_memory),
        args=run,
        train_dataset=data.train,
        eval_dataset=evaluation_sets(data),
        data_collator=data.collator,
        processing_class=tokenizer,
        compute_metrics=metrics_of(task),
        teacher=teacher_model,
        teacher_memory=teacher_memory,
    )
    record = make_record(
        "distill",
        data_arguments,
        arguments,
        run,
        student_layers=student_layers,
        layer_pairs=",".join(f"{teacher}:{student}" for teacher, student in layer_pairs),
        parameters=parameter_count(student),
        teacher_parameters=parameter_count(teacher_model.model),
    )
    if resume is not None:
        record = check_resumed(record, resume, run.allow_changes)
    title = f"{student_layers}-layer student for {task.name}, distilled by {arguments.method}"
    return functools.partial(
        finish_run,
        trainer,
        resume,
        lambda: export_state(trainer.gathered_state()),
        student,
        task.name,
        len(data.train),
        tokenizer,
        title,
        record,
    )


def _memories(
    data_arguments: DataArguments,
    arguments: DistillationArguments,
    objective: Objective,
    teacher_model: Teacher,
    student: Any,
    seed: int,
) -> tuple[torch.Tensor | None, StudentMemory | None]:
    """Load the teacher memory and start the student memory, or (None, None) where the method uses none."""
    if not objective.requires.memories:
        return None, None
    if arguments.memory_path is None:
        users = ", ".join(name for name, used in METHODS.items() if used[2])
        raise ValueError(
            f"memory_path: methods {users} need a teacher memory; build one with the 'memory' command, "
            f"got method {arguments.method!r} without --memory_path"
        )
    built = TeacherMemory.from_pretrained(arguments.memory_path)
    expected = memory_identity(
        teacher_model,
        get_task(data_arguments.task_name),
        data_arguments.max_seq_length,
        data_arguments.pad_features,
        built.identity.num_centroid,
    )
    built.identity.check(expected, arguments.memory_path)
    own = StudentMemory(
        built.identity.num_centroid,
        data_arguments.max_seq_length,
        int(student.config.hidden_size),
        init=arguments.student_memory_init,
        teacher_memory=built,
        generator=torch.Generator().manual_seed(seed),
    )
    return built.centroids, own
