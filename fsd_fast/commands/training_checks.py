"""Checks of training flags that take more than one value's type and range, made before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_pt_utils import AcceleratorConfig

from fsd_fast.commands.values import shown
from fsd_fast.untrusted import read_json_object

_FILES = ("deepspeed", "accelerator_config")
_OBJECTS = ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")


def check_training(values: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Check flags of ``TrainingArguments`` before they are made into one.

    Args:
        values: The flags that were given.
        names: How messages name them.

    Raises:
        ValueError: A flag wants a JSON object and got none, names an unknown reporter or one that is not installed, or
            a key of Accelerate's configuration is unknown.
        OSError: A file does not exist.
    """
    for name in _OBJECTS:
        if isinstance(values.get(name), str):
            raise ValueError(f"{names[name]}: expected a JSON object, got {shown(values[name])}")
    for name in _FILES:
        if isinstance(values.get(name), str):
            _check_file(names[name], values[name])
    config = values.get("accelerator_config")
    if config is not None:
        content = config if isinstance(config, dict) else read_json_object(Path(config))
        known = [field.name for field in dataclasses.fields(AcceleratorConfig)]
        unknown = sorted(set(content) - set(known))
        if unknown:
            raise ValueError(
                f"{names['accelerator_config']}: expected keys of {', '.join(known)}; got {', '.join(unknown)}"
            )
    if values.get("report_to") is not None:
        _check_reporters(names["report_to"], values["report_to"])


def _check_file(name: str, file: str) -> None:
    if file.startswith("{"):
        raise ValueError(f"{name}: expected a JSON object or file, got {shown(file)}")
    try:
        read_json_object(Path(file))
    except (OSError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _check_reporters(name: str, report_to: str | list[str]) -> None:
    for reporter in [report_to] if isinstance(report_to, str) else report_to:
        if reporter in ("all", "none"):
            continue
        if reporter not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"{name}: expected all, none or one of {', '.join(INTEGRATION_TO_CALLBACK)}; got {shown(reporter)}"
            )
        available = get_available_reporting_integrations()
        if reporter not in available:
            raise ValueError(
                f"{name}: {reporter} is not installed; found {', '.join(available) or 'no reporter'}"
            )


def check_optimisation(run: TrainingArguments) -> None:
    """Make the optimizer and the schedule once, for one weight, so that what they lack shows before the work.

    Raises:
        ValueError: One of them cannot be made; the message says why.
    """
    weight = torch.nn.Linear(1, 1)
    try:
        if run.optim_target_modules is None:
            cls, settings = Trainer.get_optimizer_cls_and_kwargs(run)
            settings = {name: value for name, value in settings.items() if name not in ("params", "model")}
            cls(weight.parameters(), **settings)
    except Exception as error:
        raise ValueError(f"optim, optim_args: {error}") from error
    try:
        get_scheduler(
            run.lr_scheduler_type,
            torch.optim.SGD(weight.parameters(), lr=run.learning_rate),
            num_warmup_steps=run.get_warmup_steps(10),
            num_training_steps=10,
            scheduler_specific_kwargs=cast("dict[str, Any] | None", run.lr_scheduler_kwargs),
        )
    except Exception as error:
        raise ValueError(f"lr_scheduler_type, lr_scheduler_kwargs: {error}") from error
