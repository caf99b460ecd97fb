"""The commands ``fetch``, ``teacher``, ``memory``, ``distill`` and ``evaluate``.

Each is a function of its parsed arguments that loads and checks everything, so that bad input is refused before
any work is done, and returns a callable that does the work and gives its figures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.integrations.deepspeed as hf_deepspeed
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedTokenizerBase,
    SchedulerType,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fsd_fast.cache.feature_cache import FeatureCache, FeatureIdentity
from fsd_fast.clustering.checkpoint import discard_state
from fsd_fast.commands.arguments import (
    DataArguments,
    DistillationArguments,
    DistillRunArguments,
    EvaluationArguments,
    MemoryArguments,
    RunArguments,
    TeacherArguments,
)
from fsd_fast.data import (
    LENGTH_COLUMN,
    PadCollator,
    Task,
    builtin,
    get_task,
    load_task_dataset,
    resolve_model,
    tokenize,
)
from fsd_fast.distributed import Collectives
from fsd_fast.files import write_json
from fsd_fast.losses.structures import METHODS, FeatureStructureLoss
from fsd_fast.memory.plot import PLOT_FILE, plot_memory, sample_numbers
from fsd_fast.memory.teacher_memory import (
    STATE_FOLDER,
    FeatureBatch,
    MemoryIdentity,
    StudentMemory,
    TeacherMemory,
    model_fingerprint,
)
from fsd_fast.metrics import compute_metrics
from fsd_fast.models.layers import parse_layer_pairs
from fsd_fast.models.student import DistillationModel, export_state, load_classifier, parameter_count
from fsd_fast.models.teacher import Teacher
from fsd_fast.training.checkpoints import check_output_dir, find_checkpoint
from fsd_fast.training.export import export_student, model_card
from fsd_fast.training.trainer import FSDTrainer
from fsd_kernels import resolve_backend

Work = Callable[[], dict[str, float]]


@dataclass
class TaskData:
    """A task, tokenized."""

    task: Task
    train: Dataset
    evaluation: dict[str, Dataset]
    collator: PadCollator


def load_data(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """Read, cut and tokenize the splits of a task.

    Raises:
        ValueError: The task is unknown, a file is damaged or a setting is out of range.
        FileNotFoundError: A file is missing.
    """
    task = get_task(arguments.task_name)
    splits: DatasetDict = load_task_dataset(task, arguments.data_dir)

    def part(name: str, most: int | None) -> Dataset:
        rows = splits[name]
        if most is not None:
            if most < 1:
                raise ValueError(f"max_train_samples, max_eval_samples: expected at least 1, got {most}")
            rows = rows.select(range(min(most, len(rows))))
        return tokenize(rows, tokenizer, task, arguments.max_seq_length)

    return TaskData(
        task,
        part("train", arguments.max_train_samples),
        {name: part(name, arguments.max_eval_samples) for name in task.eval_splits},
        PadCollator(tokenizer, arguments.pad_features, arguments.max_seq_length),
    )


@contextlib.contextmanager
def _whole_weights() -> Iterator[None]:
    """Load models as plain tensors although ZeRO-3 is configured.

    transformers would partition whatever is loaded, the teacher too, which no engine gathers again. The
    engine partitions the trained module itself when training starts.
    """
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference


def _metrics(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    def compute(prediction: EvalPrediction) -> dict[str, float]:
        return compute_metrics(task, np.asarray(prediction.predictions), np.asarray(prediction.label_ids))

    return compute


def _evaluation_sets(data: TaskData) -> Dataset | dict[str, Dataset]:
    """One split as it is; several (MNLI) under their names, so that one never overwrites the other."""
    return next(iter(data.evaluation.values())) if len(data.evaluation) == 1 else data.evaluation


def _finish(
    trainer: Trainer,
    resume: str | None,
    state: Callable[[], dict[str, torch.Tensor] | None],
    student: Any,
    data: TaskData,
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
    train_metrics = {**result.metrics, "train_samples": len(data.train)}
    weights = state()
    scores = {name: value for name, value in metrics.items() if _is_score(name)}
    if trainer.is_world_process_zero():
        assert weights is not None
        card = model_card(title, data.task.name, settings, scores)
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


def _settings(*groups: Any) -> dict[str, Any]:
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


def teacher(data_arguments: DataArguments, arguments: TeacherArguments, run: RunArguments) -> Work:
    """Fine-tune a classifier on the hard labels."""
    resume = find_checkpoint(str(run.output_dir), run.resume_from_checkpoint)
    task = get_task(data_arguments.task_name)
    set_seed(run.seed)
    path = resolve_model(arguments.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    _check_length(path, data_arguments.max_seq_length)
    with _whole_weights():
        model = load_classifier(path, task.labels, arguments.num_layers)
    data = load_data(data_arguments, tokenizer)
    trainer = Trainer(
        model=model,
        args=run,
        train_dataset=data.train,
        eval_dataset=_evaluation_sets(data),
        data_collator=data.collator,
        processing_class=tokenizer,
        compute_metrics=_metrics(task),
    )

    def state() -> dict[str, torch.Tensor] | None:
        wrapped = trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model
        return trainer.accelerator.get_state_dict(wrapped)

    settings = {**_settings(data_arguments, arguments, run), "parameters": parameter_count(model)}
    title = f"{model.config.num_hidden_layers}-layer classifier for {task.name}"
    return functools.partial(_finish, trainer, resume, state, model, data, tokenizer, title, settings)


def _check_length(path: str, max_seq_length: int) -> None:
    """Check that a model has as many positions as samples have tokens; its tokenizer may know no limit."""
    positions = getattr(AutoConfig.from_pretrained(path), "max_position_embeddings", None)
    if positions is not None and max_seq_length > positions:
        raise ValueError(
            f"max_seq_length: expected at most the {positions} positions of {path}, got {max_seq_length}"
        )


def _check_outputs(teacher_model: Teacher, task: Task, argument: str = "teacher_model_name_or_path") -> None:
    logits = teacher_model.model.config.num_labels
    if logits != task.num_labels:
        raise ValueError(
            f"{argument}: {teacher_model.name} has {logits} outputs; task {task.name!r} needs "
            f"{task.num_labels}; fine-tune it with the 'teacher' command"
        )


def memory_identity(
    teacher_model: Teacher, data_arguments: DataArguments, num_centroid: int | None
) -> MemoryIdentity:
    """What a memory for this teacher, task and padding policy must be; K defaults to the paper's for the task."""
    task = get_task(data_arguments.task_name)
    return MemoryIdentity(
        task_name=task.name,
        teacher=teacher_model.name,
        teacher_fingerprint=model_fingerprint(teacher_model.model),
        layer=teacher_model.num_layers - 1,
        max_seq_length=data_arguments.max_seq_length,
        hidden_size=teacher_model.hidden_size,
        num_centroid=task.default_num_centroid if num_centroid is None else num_centroid,
        pad_features=data_arguments.pad_features,
    )


def _share(data: TaskData) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Numbers of this process's training samples, each sample in exactly one process.

    In order of length, so that a batch padded to its own longest wastes little.
    """
    state = PartialState()
    order = np.argsort(np.asarray(data.train[LENGTH_COLUMN]), kind="stable").astype(np.int64)
    return order[state.process_index :: state.num_processes]


def _feature_batches(
    teacher_model: Teacher,
    data: TaskData,
    samples: np.ndarray[Any, np.dtype[np.int64]],
    batch_size: int,
    device: torch.device,
    first: int = 0,
    cache: FeatureCache | None = None,
) -> Iterator[FeatureBatch]:
    """Features of the given training samples, from batch number ``first`` on: the teacher's, or those it had cached."""
    for index in list(torch.from_numpy(samples).split(batch_size))[first:]:
        stored = None if cache is None else cache.read(index)
        if stored is not None:
            yield FeatureBatch(stored.to(device), None, index, computed=False)
            continue
        inputs = data.collator([data.train[number] for number in index.tolist()])
        inputs = {name: value.to(device) for name, value in inputs.items()}
        batch = FeatureBatch(teacher_model.penultimate(inputs), inputs.get("attention_mask"), index)
        yield batch
        # Not before: who reads refuses features that are not finite.
        if cache is not None:
            cache.write(index, batch.features, batch.attention_mask)


def _feature_cache(
    folder: str,
    teacher_model: Teacher,
    data: TaskData,
    identity: MemoryIdentity,
    samples: np.ndarray[Any, np.dtype[np.int64]],
    batch_size: int,
    tokens: str,
) -> FeatureCache:
    """Open the cache of a training set's features, on all processes together.

    Raises:
        ValueError: The folder holds something else, or its disk has not enough room.
    """
    record = dataclasses.asdict(identity)
    kept = {
        item.name: record[item.name] for item in dataclasses.fields(FeatureIdentity) if item.name in record
    }
    dtype = next(teacher_model.model.parameters()).dtype
    own = FeatureIdentity(
        **kept, dtype=str(dtype).removeprefix("torch."), num_samples=len(data.train), tokens=tokens
    )
    collectives = Collectives()
    cache = collectives.agree(lambda: FeatureCache(folder, own))
    # Short samples take less room only where padding is left out.
    lengths = torch.tensor(data.train[LENGTH_COLUMN])
    if identity.pad_features == "include":
        lengths = torch.full_like(lengths, identity.max_seq_length)
    missing = [index for index in torch.from_numpy(samples).split(batch_size) if not cache.holds(index)]
    positions = sum(collectives.gather_sizes(sum(int(lengths[index].sum()) for index in missing)))
    collectives.agree(lambda: cache.check_room(positions))
    return cache


def _tokens_digest(samples: Dataset) -> str:
    """sha256 over the tokens of all samples in their order."""
    digest = hashlib.sha256()
    for rows in samples.select_columns("input_ids").iter(batch_size=1000):
        digest.update(repr([list(row) for row in rows["input_ids"]]).encode())
    return digest.hexdigest()


def memory(data_arguments: DataArguments, arguments: MemoryArguments) -> Work:
    """Build the teacher memory."""
    folder = Path(arguments.output_dir)
    # An unfinished build is continued where it was killed.
    if not (folder / STATE_FOLDER).is_dir():
        check_output_dir(str(folder), None, arguments.overwrite_output_dir)
    if arguments.per_device_batch_size < 1:
        raise ValueError(f"per_device_batch_size: expected at least 1, got {arguments.per_device_batch_size}")
    task = get_task(data_arguments.task_name)
    path = resolve_model(arguments.teacher_model_name_or_path)
    _check_length(path, data_arguments.max_seq_length)
    teacher_model = Teacher.from_pretrained(path)
    _check_outputs(teacher_model, task)
    data = load_data(data_arguments, AutoTokenizer.from_pretrained(path))
    identity = memory_identity(teacher_model, data_arguments, arguments.num_centroid)
    if len(data.train) < identity.num_centroid:
        raise ValueError(
            f"num_centroid: expected at most the {len(data.train)} training samples, got {identity.num_centroid}"
        )
    state = PartialState(cpu=arguments.use_cpu)
    teacher_model.to(state.device)
    samples = _share(data)

    batch_size = arguments.per_device_batch_size
    tokens = _tokens_digest(data.train)
    layout = {
        "samples": hashlib.sha256(samples.tobytes()).hexdigest(),
        "tokens": tokens,
        "batch_size": batch_size,
        "device": state.device.type,
    }

    cache = None
    if arguments.feature_cache_dir is not None:
        cache = _feature_cache(
            arguments.feature_cache_dir, teacher_model, data, identity, samples, batch_size, tokens
        )

    def features_of(chosen: np.ndarray[Any, np.dtype[np.int64]], first: int = 0) -> Iterator[FeatureBatch]:
        return _feature_batches(teacher_model, data, chosen, batch_size, state.device, first, cache)

    def work() -> dict[str, float]:
        if arguments.overwrite_output_dir:
            discard_state(folder / STATE_FOLDER)
        if cache is not None:
            Collectives().agree(cache.create if state.is_main_process else lambda: None)
        built = TeacherMemory.build(
            functools.partial(features_of, samples),
            identity,
            seed=arguments.seed,
            refine=arguments.memory_refine,
            num_samples=len(samples),
            state_dir=folder / STATE_FOLDER,
            layout=layout,
        )
        if state.is_main_process:
            built.save_pretrained(folder)
            if arguments.plot:
                if cache is not None:
                    cache.scan()
                plot_memory(built, features_of(sample_numbers(len(data.train))), folder / PLOT_FILE)
        discard_state(folder / STATE_FOLDER)
        return {
            "memory_inertia": built.inertia,
            "memory_samples": float(len(data.train)),
            "memory_teacher_passes": built.teacher_passes,
        }

    return work


def distill(
    data_arguments: DataArguments, arguments: DistillationArguments, run: DistillRunArguments
) -> Work:
    """Train a student next to its frozen teacher."""
    resume = find_checkpoint(str(run.output_dir), run.resume_from_checkpoint)
    task = get_task(data_arguments.task_name)
    set_seed(run.seed)
    teacher_path = resolve_model(arguments.teacher_model_name_or_path)
    source = teacher_path if arguments.copy_teacher else arguments.model_name_or_path
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
    for name, value, neutral in (
        ("label_smoothing_factor", run.label_smoothing_factor, 0.0),
        ("push_to_hub", run.push_to_hub, False),
    ):
        if value != neutral:
            raise ValueError(f"{name}: distill does not use it; expected {neutral}, got {value}")
    for op in ("intra_cka", "gram", "structure"):
        resolve_backend(arguments.backend, run.device, op)
    if run.n_gpu > 1:
        # Trainer would cut the batch, and with it the memory, into one part for each GPU.
        raise ValueError(
            f"distill trains on one GPU in each process and sees {run.n_gpu}; start a process for each with "
            f"deepspeed --num_gpus {run.n_gpu} train_ds.py distill ..., or choose one with CUDA_VISIBLE_DEVICES=0"
        )
    if loss.uses_local and run.per_device_train_batch_size < 2:
        raise ValueError(
            f"per_device_train_batch_size: method {arguments.method!r} compares the samples of a batch and needs "
            f"at least 2, got {run.per_device_train_batch_size}"
        )
    teacher_layers = int(AutoConfig.from_pretrained(teacher_path).num_hidden_layers)
    student_layers = (
        max(1, teacher_layers // 2) if arguments.student_layers is None else arguments.student_layers
    )
    layer_pairs = parse_layer_pairs(arguments.layer_pairs, teacher_layers, student_layers)
    _check_length(teacher_path, data_arguments.max_seq_length)
    _check_length(source, data_arguments.max_seq_length)
    with _whole_weights():
        teacher_model = Teacher.from_pretrained(teacher_path)
        _check_outputs(teacher_model, task)
        student = load_classifier(source, task.labels, student_layers)
    teacher_memory, student_memory = _memories(
        data_arguments, arguments, loss, teacher_model, student, run.seed
    )
    data = load_data(data_arguments, tokenizer)
    trainer = FSDTrainer(
        model=DistillationModel(student, loss, layer_pairs, student_memory),
        args=run,
        train_dataset=data.train,
        eval_dataset=_evaluation_sets(data),
        data_collator=data.collator,
        processing_class=tokenizer,
        compute_metrics=_metrics(task),
        teacher=teacher_model,
        teacher_memory=teacher_memory,
    )
    settings = {
        **_settings(data_arguments, arguments, run),
        "student_layers": student_layers,
        "layer_pairs": ",".join(f"{given}:{own}" for given, own in layer_pairs),
        "parameters": parameter_count(student),
        "teacher_parameters": parameter_count(teacher_model.model),
    }
    title = f"{student_layers}-layer student for {task.name}, distilled by {arguments.method}"
    return functools.partial(
        _finish,
        trainer,
        resume,
        lambda: export_state(trainer.gathered_state()),
        student,
        data,
        tokenizer,
        title,
        settings,
    )


def _memories(
    data_arguments: DataArguments,
    arguments: DistillationArguments,
    loss: FeatureStructureLoss,
    teacher_model: Teacher,
    student: Any,
    seed: int,
) -> tuple[torch.Tensor | None, StudentMemory | None]:
    """Load the teacher memory and start the student memory, or (None, None) where the method uses none."""
    if not loss.uses_global:
        return None, None
    if arguments.memory_path is None:
        users = ", ".join(name for name, used in METHODS.items() if used[2])
        raise ValueError(
            f"memory_path: methods {users} need a teacher memory; build one with the 'memory' command, "
            f"got method {arguments.method!r} without --memory_path"
        )
    built = TeacherMemory.from_pretrained(arguments.memory_path)
    expected = memory_identity(teacher_model, data_arguments, built.identity.num_centroid)
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


def evaluate(data_arguments: DataArguments, arguments: EvaluationArguments) -> Work:
    """Score a saved classifier on the evaluation splits of a task."""
    task = get_task(data_arguments.task_name)
    path = resolve_model(arguments.model_name_or_path)
    saved = Teacher.from_pretrained(path)
    _check_outputs(saved, task, "model_name_or_path")
    tokenizer = AutoTokenizer.from_pretrained(path)
    data = load_data(data_arguments, tokenizer)
    run = TrainingArguments(
        # Trainer makes this folder; where nothing is written it must not be one named like a model on the Hub.
        output_dir=arguments.output_dir or tempfile.gettempdir(),
        per_device_eval_batch_size=arguments.per_device_eval_batch_size,
        use_cpu=arguments.use_cpu,
        report_to=[],
    )
    trainer = Trainer(
        model=saved.model,
        args=run,
        eval_dataset=_evaluation_sets(data),
        data_collator=data.collator,
        processing_class=tokenizer,
        compute_metrics=_metrics(task),
    )

    def work() -> dict[str, float]:
        metrics: dict[str, float] = trainer.evaluate()
        if arguments.output_dir is not None and trainer.is_world_process_zero():
            write_json(Path(arguments.output_dir) / "evaluate_results.json", metrics)
        return metrics

    return work


def fetch() -> Work:
    """Get the built-in data and backbone, unless they are there.

    All of it happens here and no work is left: without a network it is refused like any missing input.
    """
    print("fetching the built-in data and backbone (90 MB) unless they are there", flush=True)
    try:
        builtin.fetch()
    except RuntimeError as error:
        raise ConnectionError(str(error)) from error
    return dict
