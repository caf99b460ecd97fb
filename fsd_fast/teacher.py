"""The frozen teacher: logits and hidden states of a fine-tuned sequence classifier, never with gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel


class TeacherSignals(NamedTuple):
    """What the student learns from in one batch; constants."""

    logits: Tensor
    """[B, C]."""
    features: tuple[Tensor, ...]
    """[B, S, D_t] for each layer pair, in their order."""
    penultimate: Tensor | None
    """[B, S, D_t] of the last layer but one; None where no memory is used."""
    memory: Tensor | None
    """[K, S * D_t], the teacher memory's centroids; None where none is used."""


def input_arguments(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pick what a model's forward takes from a batch: everything but the labels."""
    return {name: value for name, value in inputs.items() if name != "labels"}


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
        """Return the hidden state [B, S, D_t] that the memory is built on."""
        self.check_frozen()
        with torch.no_grad():
            output = self.model.base_model(**input_arguments(inputs), output_hidden_states=True)
        return output.hidden_states[self.num_layers - 1]
