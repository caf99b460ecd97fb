"""Queries, keys and values of a model's last layer, caught as the projections compute them.

Families name the projections differently, and some compute all three in one product. They are caught before they are
split into heads, normalised or rotated by position.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fsd_fast.losses import Projections
from fsd_fast.models.families import layer_stack, outputs_of, sample_inputs

_NAMES = (
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
)
"""Names of the three projections in an attention module."""

_FUSED = ("Wqkv", "c_attn")
"""Names of one projection whose output is queries, keys and values of equal width, in this order."""

_LENGTH = 4


class ProjectionRecorder:
    """Keeps the queries, keys and values that a model's last layer computes in each forward pass.

    Args:
        model: The model; hooks are hung into its last layer, for good.
        name: Its name or path, for messages.

    Raises:
        ValueError: The projections are not found: the family has none of their own, or other ones.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self._caught: dict[str, Tensor] = {}
        stack = layer_stack(model)
        # A family whose layers share their weights has one attention; its last call is that of the last layer.
        last = model if stack is None else stack[1][-1]
        found: list[tuple[str, nn.Module]] = []
        for module in last.modules():
            children = dict(module.named_children())
            for names in _NAMES:
                if all(part in children for part in names):
                    found += zip(Projections._fields, (children[part] for part in names), strict=True)
            found += [("fused", children[part]) for part in _FUSED if part in children]
        kinds = [kind for kind, _ in found]
        if kinds not in (list(Projections._fields), ["fused"]):
            raise ValueError(
                f"{name}: method 'minilm' does not take model family {model.config.model_type!r}: expected the query, "
                f"key and value projections of one attention in its last layer, found {len(found)}"
            )
        for kind, module in found:
            module.register_forward_hook(self._keep(kind))

    def _keep(self, kind: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            self._caught[kind] = output

        return hook

    def take(self) -> Projections:
        """Return what the last forward pass computed, and let go of it.

        Raises:
            RuntimeError: There has been no forward pass since.
        """
        caught, self._caught = self._caught, {}
        if not caught:
            raise RuntimeError("the model has not been run since its projections were taken")
        if "fused" in caught:
            return Projections(*caught["fused"].chunk(3, dim=-1))
        return Projections(**caught)


def record_projections(model: PreTrainedModel, name: str, heads: int) -> ProjectionRecorder:
    """Hang a recorder into a model, and check on a few tokens what it records.

    Args:
        model: The model.
        name: Its name or path, for messages.
        heads: Relation heads, into which every projection is split.

    Raises:
        ValueError: The projections are not found, are not ``[B, S, W]``, or ``heads`` does not divide a width W.
    """
    recorder = ProjectionRecorder(model, name)
    inputs = sample_inputs(model.config, _LENGTH)
    outputs_of(model, {argument: value.to(model.device) for argument, value in inputs.items()})
    for kind, vectors in zip(Projections._fields, recorder.take(), strict=True):
        if vectors.ndim != 3 or vectors.shape[:2] != (1, _LENGTH):
            raise ValueError(
                f"{name}: method 'minilm' does not take model family {model.config.model_type!r}: expected its "
                f"{kind} projection to be [B, S, W] = [1, {_LENGTH}, W], got {list(vectors.shape)}"
            )
        if vectors.shape[2] % heads:
            divisors = [number for number in range(1, vectors.shape[2] + 1) if not vectors.shape[2] % number]
            raise ValueError(
                f"minilm_relation_heads: expected a divisor of {vectors.shape[2]}, the width of the {kind} projection "
                f"of {name} ({', '.join(map(str, divisors))}), got {heads}"
            )
    return recorder
