"""The order of a classifier's outputs: logit c belongs to class c of the task, in whatever order it was saved."""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fsd_fast.data.tasks import label_key
from fsd_fast.models.families import outputs_of, same, sample_inputs

logger = logging.getLogger(__name__)


def id2label_of(config: PreTrainedConfig) -> dict[int, str]:
    """A copy of a configuration's names of its outputs, by their numbers."""
    return {int(output): str(label) for output, label in (config.id2label or {}).items()}


def saved_labels(config: PreTrainedConfig) -> tuple[str, ...]:
    """The class names of a classifier's outputs in their order; empty for one output, which is a score."""
    names = id2label_of(config)
    return tuple(names[output] for output in sorted(names)) if len(names) > 1 else ()


def label_order(id2label: dict[int, str], labels: tuple[str, ...], name: str) -> list[int]:
    """Find which output of a classifier is which class of a task.

    Names are compared without regard to case; hyphens, underscores and spaces are alike. Digits ("0", "1") are the
    task's class numbers. So are transformers' default names ("LABEL_0"), with a warning, because they say nothing.

    Args:
        id2label: The classifier's names, by output.
        labels: The task's C class names, in their order.
        name: The classifier's name or path, for messages.

    Returns:
        For each class of the task the number of the output.

    Raises:
        ValueError: The names are not those of the task.
    """
    found = [label_key(id2label[output]) for output in sorted(id2label)]
    numbers = [str(number) for number in range(len(labels))]
    for own in ([label_key(label) for label in labels], numbers, [f"label_{number}" for number in numbers]):
        if sorted(found) == sorted(own):
            if own[0] == "label_0":
                logger.warning(
                    "%s: its outputs are named %s; assumed to be %s",
                    name,
                    ", ".join(id2label[output] for output in sorted(id2label)),
                    ", ".join(f"{label} (LABEL_{number})" for number, label in enumerate(labels)),
                )
            return [found.index(key) for key in own]
    raise ValueError(
        f"{name}: expected outputs named {list(labels)} in any order, got "
        f"{[id2label[output] for output in sorted(id2label)]}; name them in id2label of its config.json, or fine-tune "
        "a classifier with the 'teacher' command"
    )


def name_outputs(model: PreTrainedModel, labels: tuple[str, ...]) -> None:
    """Write a task's class names and kind into a model's configuration; no labels mean a regression."""
    model.config.problem_type = "single_label_classification" if labels else "regression"
    if labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: number for number, label in enumerate(labels)}


def order_outputs(model: PreTrainedModel, order: list[int], name: str) -> None:
    """Permute the head's last linear layer, such that output c is what output ``order[c]`` was.

    Args:
        model: A sequence classifier.
        order: A permutation of its outputs.
        name: Its name or path, for the message.

    Raises:
        ValueError: The layer was not found: the logits did not follow.
    """
    if order == sorted(order):
        return
    inputs = sample_inputs(model.config, 4)
    before = outputs_of(model, inputs)[0]
    inside = {id(module) for module in model.base_model.modules()}
    last = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == len(order) and id(module) not in inside
    ][-1:]
    with torch.no_grad():
        for parameter in (parameter for module in last for parameter in module.parameters()):
            parameter.copy_(parameter[order].clone())
    if not same(outputs_of(model, inputs)[0], before[:, order]):
        raise ValueError(
            f"{name}: its outputs are in another order than the task's and the last layer of its head was not found; "
            f"expected a linear layer with {len(order)} outputs in {type(model).__name__}"
        )
