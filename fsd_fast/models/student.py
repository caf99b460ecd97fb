"""The student: a classifier with the first layers of a deeper, pre-trained one."""

from __future__ import annotations

import logging

from torch import nn
from transformers import PreTrainedModel

from fsd_fast.models.families import check_shapes, first_layers
from fsd_fast.models.labels import id2label_of, label_order, name_outputs, order_outputs
from fsd_fast.models.loading import load_weights, read_config

logger = logging.getLogger(__name__)


def load_classifier(
    name_or_path: str, labels: tuple[str, ...], num_layers: int | None = None
) -> PreTrainedModel:
    """Load a sequence classifier for a task, with all of its layers or only the first ones.

    Args:
        name_or_path: A pre-trained or fine-tuned model. A head with the task's classes is taken over, its outputs in
            the task's order. A head that does not exist, has another number of outputs or names other classes is
            started afresh.
        labels: Class names in the order of the logits; empty for a regression (one logit).
        num_layers: Layers to keep, counted from the embeddings; None keeps all.

    Returns:
        A plain model of the same family, whose configuration names the classes and the number of layers.

    Raises:
        OSError: There is no such model, or none in safetensors files.
        ValueError: ``num_layers`` is below 1 or above the model's own number; weights other than the head's are
            missing; or the family is none that fsd_fast takes, or cannot be cut.
    """
    config = read_config(name_or_path)
    depth = int(config.num_hidden_layers)
    if num_layers is not None and not 1 <= num_layers <= depth:
        raise ValueError(
            f"number of layers: expected 1 to the {depth} layers of {name_or_path}, got {num_layers}"
        )
    saved = id2label_of(config)
    config.num_labels = len(labels) or 1
    model, has_head = load_weights(name_or_path, config, fresh_head=True)
    if has_head and labels:
        try:
            order = label_order(saved, labels, name_or_path)
        except ValueError as error:
            logger.warning("%s. Its head is started afresh.", error)
            _restart_head(model)
        else:
            order_outputs(model, order, name_or_path)
    name_outputs(model, labels)
    if num_layers is None or num_layers == depth:
        return model
    small = first_layers(model, num_layers, name_or_path)
    check_shapes(small, name_or_path)
    return small


def _restart_head(model: PreTrainedModel) -> None:
    fresh = type(model)(model.config).state_dict()
    head = {key: value for key, value in fresh.items() if not key.startswith(f"{model.base_model_prefix}.")}
    model.load_state_dict(head, strict=False)


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, also where ZeRO-3 has partitioned them."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters())
