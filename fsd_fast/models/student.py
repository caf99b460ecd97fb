"""The student: a classifier with the first layers of a deeper, pre-trained one."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from fsd_fast.models.teacher import layer_list


def load_classifier(
    name_or_path: str, labels: tuple[str, ...], num_layers: int | None = None
) -> PreTrainedModel:
    """Load a sequence classifier for a task, with all of its layers or only the first ones.

    Args:
        name_or_path: A pre-trained or fine-tuned model. A head that does not exist or has another number of
            outputs is started afresh.
        labels: Class names in the order of the logits; empty for a regression (one logit).
        num_layers: Layers to keep, counted from the embeddings; None keeps all.

    Returns:
        A plain model of the same family, whose configuration names the classes and the number of layers.

    Raises:
        OSError: There is no such model.
        ValueError: ``num_layers`` is below 1 or above the model's own number.
    """
    config = AutoConfig.from_pretrained(name_or_path)
    depth = int(config.num_hidden_layers)
    if num_layers is not None and not 1 <= num_layers <= depth:
        raise ValueError(
            f"number of layers: expected 1 to the {depth} layers of {name_or_path}, got {num_layers}"
        )
    config.num_labels = len(labels) or 1
    config.problem_type = "single_label_classification" if labels else "regression"
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    # Trained weights are float32, whatever precision they were saved in.
    model = AutoModelForSequenceClassification.from_pretrained(
        name_or_path, config=config, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    if num_layers is None or num_layers == depth:
        return model
    prefix, _ = layer_list(model)
    small_config = copy.deepcopy(model.config)
    small_config.num_hidden_layers = num_layers
    small = type(model)(small_config)
    kept = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(f"{prefix}.") or int(name[len(prefix) + 1 :].split(".")[0]) < num_layers
    }
    small.load_state_dict(kept)
    return small


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, also where ZeRO-3 has partitioned them."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters())
