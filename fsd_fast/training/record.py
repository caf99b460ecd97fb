"""The record of a run, ``fsd_arguments.json``: what repeats it, and the circumstances that its bits depend on.

    {"command": "distill", "arguments": {"beta": 4.0, ...}, "facts": {"world_size": 1, "versions": {...}, ...}}

``fsd-fast COMMAND RUN/fsd_arguments.json --output_dir NEW`` repeats the run. The record is written when the run starts.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

import fsd_fast
from fsd_fast.files import write_json
from fsd_fast.untrusted import read_json_object
from fsd_fast.versions import installed_versions

RECORD_FILE = "fsd_arguments.json"

# They say how a run starts and not what it computes, so repeating it must not take them over.
_START = frozenset(
    {"allow_changes", "allow_partial_resume", "overwrite_output_dir", "resume_from_checkpoint"}
)
# What shapes the optimisation is recorded even where it has its default, which another release may change.
_ALWAYS = frozenset(
    {
        "accelerator_config", "activation_checkpointing", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16",
        "data_seed", "dataloader_drop_last", "fp16", "gradient_accumulation_steps", "learning_rate",
        "lr_scheduler_type", "max_grad_norm", "max_steps", "num_train_epochs", "optim",
        "per_device_train_batch_size", "seed", "torch_compile", "train_sampling_strategy", "warmup_steps",
        "weight_decay",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """The record of a run.

    Args:
        command: The command that ran.
        arguments: Its flags by name, as JSON values that ``fsd_fast.commands.parsing`` accepts.
        facts: What is known about the run beside its flags: versions, processes, device, sizes.
    """

    command: str
    arguments: dict[str, Any]
    facts: dict[str, Any]

    @staticmethod
    def is_record(values: Mapping[str, Any]) -> bool:
        """Whether a JSON object has the three keys of a record."""
        return values.keys() == {"command", "arguments", "facts"}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], file: str) -> Record:
        """Make a record from its JSON object.

        Raises:
            ValueError: It is no record; the message names ``file``.
        """
        if not (
            cls.is_record(values)
            and isinstance(values["command"], str)
            and isinstance(values["arguments"], dict)
            and isinstance(values["facts"], dict)
        ):
            raise ValueError(f"{file}: expected the record of a run, with command, arguments and facts")
        return cls(**values)

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments, and facts over them, in one mapping: what a model card lists."""
        facts = {name: value for name, value in self.facts.items() if not isinstance(value, dict | list)}
        versions = {f"{name}_version": version for name, version in self.facts.get("versions", {}).items()}
        return {**self.arguments, **facts, **versions}


def make_record(command: str, *groups: Any, **facts: Any) -> Record:
    """Make the record of a run that is about to start.

    Args:
        command: The command.
        *groups: Its dataclasses of flags.
        **facts: JSON values that belong to this command, such as the number of parameters.

    Returns:
        Of our own flags all are recorded; of ``TrainingArguments`` those that shape the optimisation and those that
        differ from their defaults.
    """
    arguments: dict[str, Any] = {}
    for group in groups:
        own = not isinstance(group, TrainingArguments)
        for field in dataclasses.fields(group):
            if not field.init or field.name in _START:
                continue
            value = _json_value(getattr(group, field.name))
            if field.name == "debug" and not own:
                value = " ".join(value)  # TrainingArguments splits its text
            if own or field.name in _ALWAYS or value != _default(field):
                arguments[field.name] = value
        if not own:
            facts |= {"world_size": group.world_size, "n_gpu": group.n_gpu, "device": group.device.type}
            if isinstance(group.deepspeed, str):
                facts["deepspeed_config"] = read_json_object(Path(group.deepspeed))
    facts |= {
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "backend_from_environment": os.environ.get("FSD_BACKEND"),
        "versions": {"fsd_fast": fsd_fast.__version__, **installed_versions()},
    }
    return Record(command, arguments, facts)


def write_record(path: Path, record: Record) -> None:
    """Write a record as JSON.

    Raises:
        OSError: It cannot be written.
    """
    write_json(path, dataclasses.asdict(record))


def read_record(path: Path) -> Record:
    """Read the record of a run.

    Raises:
        OSError: There is none.
        ValueError: The file is damaged or no record.
    """
    return Record.from_json(read_json_object(path), str(path))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return _json_value(field.default_factory())
    return None if field.default is dataclasses.MISSING else _json_value(field.default)


def _json_value(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # accelerate's configuration
        return dataclasses.asdict(value)
    if isinstance(value, list | tuple):
        return [_json_value(entry) for entry in value]
    if isinstance(value, dict):
        return {str(name): _json_value(entry) for name, entry in value.items()}
    return value
