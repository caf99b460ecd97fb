"""The frozen teacher: logits and hidden states of a fine-tuned sequence classifier, never with gradients."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fsd_fast.data import SAMPLE_COLUMN


def input_arguments(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pick what a model's forward takes from a batch: everything but the labels and the samples' places."""
    return {name: value for name, value in inputs.items() if name not in ("labels", SAMPLE_COLUMN)}


def layer_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the encoder's stack of layers and its name: the one module list as long as the configuration says.

    Raises:
        ValueError: There is none, or more than one.
    """
    depth = model.config.num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if len(found) != 1:
        raise ValueError(
            f"model: expected one stack of {depth} layers in {type(model).__name__}, found {len(found)}"
        )
    return found[0]


class _Reached(Exception):
    """The forward pass has come to the layer whose input is wanted."""


class Teacher:
    """A sequence classifier that is frozen, in evaluation mode, and run without gradients.

    It is not an ``nn.Module``: nothing that walks the modules of a trained model (optimizer, DeepSpeed,
    checkpoints, ``train()``) can reach it.

    Args:
        model: The fine-tuned classifier. Its parameters' ``requires_grad`` is switched off.
        name: Its name or path, for messages and files.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model = model.requires_grad_(False).eval()
        self.name = name

    @classmethod
    def from_pretrained(cls, name_or_path: str) -> Teacher:
        """Load a teacher from a folder or the Hub.

        Raises:
            OSError: There is no such model.
        """
        return cls(AutoModelForSequenceClassification.from_pretrained(name_or_path), name_or_path)

    @property
    def num_layers(self) -> int:
        """Number of encoder layers."""
        return int(self.model.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width D_t of the hidden states."""
        return int(self.model.config.hidden_size)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Teacher:
        """Move the model; returns self."""
        module: nn.Module = self.model
        module.to(device=device, dtype=dtype)
        return self

    def check_frozen(self) -> None:
        """Check that the teacher cannot learn.

        Raises:
            RuntimeError: It is in training mode, or a parameter requires or holds a gradient.
        """
        if self.model.training:
            raise RuntimeError("the teacher is in training mode; its dropout would disturb the features")
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad or parameter.grad is not None:
                raise RuntimeError(
                    f"the teacher's parameter {name} requires or holds a gradient; it must be frozen"
                )

    def hidden_states(self, inputs: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return (logits [B, C], hidden states, one [B, S, D_t] per layer plus the embeddings)."""
        self.check_frozen()
        with torch.no_grad():
            output = self.model(**input_arguments(inputs), output_hidden_states=True)
        return output.logits, output.hidden_states

    def penultimate(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the hidden state [B, S, D_t] that the memory is built on, the input of the last layer.

        The last layer itself is not run.
        """
        self.check_frozen()
        caught: list[Tensor] = []

        def stop(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            caught.append(arguments[0] if arguments else keywords["hidden_states"])
            raise _Reached

        layers = layer_list(self.model)[1]
        handle = layers[-1].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad(), contextlib.suppress(_Reached):
                self.model.base_model(**input_arguments(inputs))
        finally:
            handle.remove()
        return caught[0]
