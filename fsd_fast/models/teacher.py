"""The frozen teacher: logits and hidden states of a fine-tuned sequence classifier, never with gradients."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fsd_fast.models.families import STOPS_EARLY, layer_stack
from fsd_fast.models.fingerprint import model_fingerprint
from fsd_fast.models.inputs import input_arguments
from fsd_fast.models.labels import id2label_of, label_order, name_outputs, order_outputs
from fsd_fast.models.loading import load_weights, read_config
from fsd_fast.models.projections import ProjectionRecorder, record_projections


class _Reached(Exception):
    """The forward pass has come to the layer whose input is wanted."""


@dataclass(frozen=True)
class TeacherDescription:
    """What is known of a teacher, also where it is not loaded.

    Attributes:
        name: Its name or path, for messages and files.
        fingerprint: sha256 of its parameters, see ``model_fingerprint``.
        num_layers: Number of encoder layers.
        hidden_size: Width D_t of the hidden states.
        num_labels: C, the number of its outputs.
    """

    name: str
    fingerprint: str
    num_layers: int
    hidden_size: int
    num_labels: int


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
        # Keys and values of earlier tokens are for generating text.
        self.model.config.use_cache = False
        self.name = name
        self.autocast_dtype: torch.dtype | None = None
        self.projections: ProjectionRecorder | None = None

    @classmethod
    def from_pretrained(cls, name_or_path: str) -> Teacher:
        """Load a fine-tuned classifier from a folder or the Hub, in float32.

        Raises:
            OSError: There is no such model, or none in safetensors files.
            ValueError: A weight is missing, the head's too, or its family is none that fsd_fast takes.
        """
        model, _ = load_weights(name_or_path, read_config(name_or_path), fresh_head=False)
        return cls(model, name_or_path)

    def follow_labels(self, labels: tuple[str, ...]) -> None:
        """Bring the outputs into a task's order, and name them so.

        Args:
            labels: The task's class names, as many as there are outputs; empty for a regression.

        Raises:
            ValueError: The outputs have other names; see ``label_order``.
        """
        if labels:
            order = label_order(id2label_of(self.model.config), labels, self.name)
            order_outputs(self.model, order, self.name)
        name_outputs(self.model, labels)

    def record_projections(self, relation_heads: int) -> None:
        """Let ``projections`` record the last layer's queries, keys and values from now on.

        Args:
            relation_heads: Into how many equal parts each will be split.

        Raises:
            ValueError: The family has no such projections, or they cannot be split so; see ``record_projections``.
        """
        self.projections = record_projections(self.model, self.name, relation_heads)

    @property
    def num_layers(self) -> int:
        """Number of encoder layers."""
        return int(self.model.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width D_t of the hidden states."""
        return int(self.model.config.hidden_size)

    def describe(self) -> TeacherDescription:
        """What a memory or a cache records of this teacher; reads every parameter."""
        return TeacherDescription(
            self.name,
            model_fingerprint(self.model),
            self.num_layers,
            self.hidden_size,
            int(self.model.config.num_labels),
        )

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Teacher:
        """Move the model and choose the precision of its matrix products; returns self.

        Args:
            device: Where it runs.
            dtype: bfloat16 or float16 for products under autocast; None for float32. The weights stay float32, and
                with them embeddings, LayerNorms and the sums between layers: rounding those too doubles the error of
                the features.
        """
        self.model.to(device=device)
        self.autocast_dtype = dtype
        return self

    def compile(self, **options: Any) -> Teacher:
        """Compile ``hidden_states``; the arguments are ``torch.compile``'s. Returns self."""
        self.model.compile(**options)
        return self

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.model.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None
        )

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
        """Return (logits [B, C] in float32, hidden states, one [B, S, D_t] per layer plus the embeddings)."""
        self.check_frozen()
        with torch.no_grad(), self._autocast():
            output = self.model(**input_arguments(inputs), output_hidden_states=True)
        return output.logits.float(), output.hidden_states

    def penultimate(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the hidden state [B, S, D_t] that the memory is built on, ``hidden_states[L - 1]``.

        The last layer is not run, in the families where its input is that hidden state.
        """
        if self.model.config.model_type not in STOPS_EARLY:
            return self.hidden_states(inputs)[1][self.num_layers - 1]
        self.check_frozen()
        caught: list[Tensor] = []

        def stop(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            caught.append(arguments[0] if arguments else keywords["hidden_states"])
            raise _Reached

        stack = layer_stack(self.model)
        assert stack is not None
        handle = stack[1][-1].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad(), self._autocast(), contextlib.suppress(_Reached):
                # Not called as a module: a compiled one could not be left in its midst.
                self.model.forward(**input_arguments(inputs))
        finally:
            handle.remove()
        return caught[0]
