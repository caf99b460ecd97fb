"""The flags of every command, parsed by ``HfArgumentParser`` from the command line or from one JSON file."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from fsd_fast.training.checkpoints import check_output_dir


def _help(text: str, default: Any = dataclasses.MISSING, **keywords: Any) -> Any:
    return field(default=default, metadata={"help": text}, **keywords)


@dataclass
class DataArguments:
    """What is read, and how it becomes batches."""

    task_name: str = _help("Task: a GLUE task, 'reviews' or 'reviews-score'.", "reviews")
    data_dir: str | None = _help(
        "Folder of the official GLUE TSV files (or its parent). Default: built-in data for the reviews tasks, "
        "the Hub for GLUE.",
        None,
    )
    max_seq_length: int = _help("Tokens S of a sample, special tokens included; longer ones are cut.", 128)
    pad_features: Literal["include", "exclude"] = _help(
        "include: all S positions count in the structures, and every batch is padded to S (the paper). "
        "exclude: padding counts nowhere, and a batch is padded to its own longest sample.",
        "exclude",
    )
    max_train_samples: int | None = _help("Use only the first so many training samples.", None)
    max_eval_samples: int | None = _help("Use only the first so many samples of each evaluation split.", None)


@dataclass
class TeacherArguments:
    """The ``teacher`` command: fine-tune a classifier on the hard labels."""

    model_name_or_path: str = _help(
        "Pre-trained model to fine-tune: a folder, a Hub name, or 'minilm', the built-in backbone.", "minilm"
    )
    num_layers: int | None = _help(
        "Keep only the first so many layers: trains a shallow model without a teacher.", None
    )


@dataclass
class MemoryArguments:
    """The ``memory`` command: cluster the teacher's penultimate features of the training set."""

    teacher_model_name_or_path: str = _help("The fine-tuned teacher.")
    output_dir: str = _help("Folder for memory.safetensors and memory.json.")
    num_centroid: int | None = _help("Centroids K. Default: 300 for MNLI and QQP, 100 for the others.", None)
    per_device_batch_size: int = _help("Samples of one teacher pass.", 32)
    memory_refine: int = _help("Exact Lloyd epochs after the two passes; each is one more pass.", 0)
    feature_cache_dir: str | None = _help(
        "Folder for the teacher's features: written as the teacher runs, read instead of running it again, now and "
        "in later builds.",
        None,
    )
    plot: bool = _help("Draw cluster sizes and a t-SNE of the memory into memory_plot.png.", False)
    seed: int = _help("Seed of the sketch and of the first centroids.", 42)
    use_cpu: bool = _help("Use the CPU even where there is a GPU.", False)
    overwrite_output_dir: bool = _help("Replace a memory that is already there.", False)


@dataclass
class DistillationArguments:
    """The ``distill`` command: student, memory and loss."""

    teacher_model_name_or_path: str = _help("The fine-tuned teacher.")
    model_name_or_path: str | None = _help(
        "Pre-trained model whose first layers the student starts from: a folder, a Hub name or 'minilm'.",
        None,
    )
    copy_teacher: bool = _help("Start the student from the fine-tuned teacher's first layers instead.", False)
    student_layers: int | None = _help("Layers of the student. Default: half of the teacher's.", None)
    method: Literal["vkd", "fsd_i", "fsd_l", "fsd_g", "fsd_il", "fsd_ilg"] = _help(
        "Which structures are matched: letters i, l, g for L_I, L_L, L_G.", "fsd_ilg"
    )
    layer_pairs: str = _help(
        "Hidden states compared by L_I and L_L: 'penultimate', 'layerwise', or a list 'T:S,T:S'. L_G always "
        "uses the penultimate pair.",
        "penultimate",
    )
    alpha: float = _help("Weight of the hard labels in L_VKD, in [0, 1].", 0.5)
    temperature: float = _help("Temperature tau of L_VKD.", 10.0)
    beta: float = _help("Weight of the structures against L_VKD.", 4.0)
    gamma_i: float = _help("Weight of L_I.", 1.0)
    gamma_l: float = _help("Weight of L_L.", 1.0)
    gamma_g: float = _help("Weight of L_G.", 1e-4)
    gamma_m: float = _help("Weight of the Euclidean term in L_G against the cosine term, in [0, 1].", 0.5)
    intra_reduction: Literal["mean_log", "log_mean"] = _help(
        "L_I: mean over samples of -log CKA (the paper), or -log of the mean CKA (the released code).",
        "mean_log",
    )
    memory_path: str | None = _help("Folder that 'memory' wrote; needed by fsd_g and fsd_ilg.", None)
    student_memory_init: Literal["normal", "teacher"] = _help(
        "Start of the student memory: random normal (the paper) or the teacher's centroids (same width only).",
        "normal",
    )
    backend: Literal["auto", "triton", "eager", "reference"] = _help(
        "Kernels of the structure losses.", "auto"
    )


@dataclass
class EvaluationArguments:
    """The ``evaluate`` command: metrics of a saved classifier."""

    model_name_or_path: str = _help("The classifier: a folder or a Hub name.")
    output_dir: str | None = _help("Folder to write evaluate_results.json to. Default: print only.", None)
    per_device_eval_batch_size: int = _help("Samples of one forward pass.", 64)
    use_cpu: bool = _help("Use the CPU even where there is a GPU.", False)


@dataclass
class DemoArguments:
    """The ``demo`` command: teacher, memory and students on the built-in task."""

    output_dir: str = _help("Folder for everything the demo makes.", "runs/demo")
    overwrite_output_dir: bool = _help("Run every stage anew, also those that are finished.", False)


def _default_report() -> list[str]:
    return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []


@dataclass
class RunArguments(TrainingArguments):
    """Every flag of transformers' ``TrainingArguments``, with the paper's defaults."""

    output_dir: str = _help("Folder of the run: checkpoints, logs, results and the trained model.")
    per_device_train_batch_size: int = _help("Samples of one training step on each device.", 32)
    per_device_eval_batch_size: int = _help("Samples of one evaluation step on each device.", 64)
    learning_rate: float = _help("Initial learning rate of AdamW; it falls linearly to 0.", 2e-5)
    eval_strategy: str = _help("When to evaluate: no, steps or epoch.", "epoch")
    save_strategy: str = _help("When to save a checkpoint: no, steps or epoch.", "epoch")
    save_total_limit: int | None = _help("Checkpoints to keep.", 1)
    logging_steps: float = _help("Steps between two log entries.", 10)
    # HfArgumentParser understands this annotation in transformers' own order only.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default_factory=_default_report,
        metadata={"help": "Where to log to. Default: TensorBoard if installed."},
    )
    remove_unused_columns: bool = _help(
        "Drop data columns that the model does not take; grouping by length reads one of them.", False
    )
    overwrite_output_dir: bool = _help("Start anew in a folder that holds a run already.", False)


@dataclass
class DistillRunArguments(RunArguments):
    """``RunArguments`` with the learning rate of the paper's structure losses."""

    learning_rate: float = _help("Initial learning rate of AdamW; it falls linearly to 0.", 4e-5)


ARGUMENTS: dict[str, tuple[type, ...]] = {
    "teacher": (DataArguments, TeacherArguments, RunArguments),
    "memory": (DataArguments, MemoryArguments),
    "distill": (DataArguments, DistillationArguments, DistillRunArguments),
    "evaluate": (DataArguments, EvaluationArguments),
    "demo": (DemoArguments,),
    "fetch": (),
}


def launched() -> bool:
    """Whether a launcher started this process and told it its place."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def check_deepspeed(wants_deepspeed: bool, command: str) -> None:
    """Check that ``--deepspeed`` is used under a launcher.

    Raises:
        ValueError: It is not; the message says what to run instead.
    """
    if wants_deepspeed and not launched():
        raise ValueError(
            "deepspeed: --deepspeed works only under its launcher; run\n"
            f"    deepspeed --num_gpus N train_ds.py {command} --deepspeed ds_config.json ...\n"
            "or, without a GPU,\n"
            f"    DS_ACCELERATOR=cpu deepspeed --num_accelerators N train_ds.py {command} "
            "--deepspeed ds_config.json --use_cpu true ..."
        )


def parse(command: str, arguments: Sequence[str]) -> tuple[Any, ...]:
    """Parse a command's flags, or the one JSON file that holds them, into its dataclasses.

    Args:
        command: A key of ``ARGUMENTS``.
        arguments: What follows the command on the command line.

    Returns:
        One instance for each dataclass of the command.

    Raises:
        ValueError: The file is no JSON object or holds an unknown key, ``--deepspeed`` is used without a
            launcher, or a flag's value is refused.
        FileNotFoundError: The JSON file does not exist.
        FileExistsError: The output folder holds a run already.
    """
    classes = ARGUMENTS[command]
    # Checked before the dataclasses are made: making TrainingArguments starts the process group.
    values = (
        _read_json(Path(arguments[0])) if len(arguments) == 1 and arguments[0].endswith(".json") else None
    )
    listed = list(arguments) if values is None else [f"--{name}" for name in values]
    if any(entry.split("=")[0] == "--deepspeed" for entry in listed):
        check_deepspeed(True, command)
    parser = _Parser(classes, prog=f"fsd-fast {command}")  # type: ignore[arg-type]
    if values is None:
        _check_flags_first(parser, classes, list(arguments), command)
        return tuple(parser.parse_args_into_dataclasses(list(arguments)))
    known = {f.name for cls in classes for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{arguments[0]}: unknown keys {', '.join(unknown)}; see fsd-fast {command} --help")
    _check_run_folder(values)
    return tuple(parser.parse_dict(values))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got line {error.lineno}: {error.msg}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object of flags, got {type(values).__name__}")
    resume = values.get("resume_from_checkpoint")
    if isinstance(resume, bool):  # what JSON makes of "--resume_from_checkpoint true"
        values["resume_from_checkpoint"] = "last" if resume else None
    return values


class _Parser(HfArgumentParser):
    """Raises where argparse would print every flag there is, the error below them, and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _check_flags_first(
    parser: HfArgumentParser, classes: tuple[type, ...], arguments: list[str], command: str
) -> None:
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ValueError(f"unknown arguments {' '.join(unknown)}; see fsd-fast {command} --help")
    if any(issubclass(cls, TrainingArguments) for cls in classes):
        _check_run_folder(vars(namespace))


def _check_run_folder(values: dict[str, Any]) -> None:
    if values.get("output_dir") is not None:
        check_output_dir(
            values["output_dir"],
            values.get("resume_from_checkpoint"),
            bool(values.get("overwrite_output_dir")),
        )


def split_launcher_rank(arguments: Sequence[str]) -> list[str]:
    """Drop ``--local_rank=N`` (also spelt ``--local-rank``, also as two words): LOCAL_RANK says the same.

    The deepspeed launcher puts it before the script's own arguments.
    """
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept
