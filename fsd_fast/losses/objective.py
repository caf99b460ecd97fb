"""What a training method is: an objective that says what it requires of teacher and student, and its loss.

A new method is one subclass of ``Objective``: the trainer runs both models, keeps what ``requires`` names, and
calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fsd_fast.losses.schedule import StructureSchedule


class Projections(NamedTuple):
    """The inputs of a layer's self-attention, before they are split into heads."""

    query: Tensor
    """[B, S, W], W the width of the queries: heads times the width of a head."""
    key: Tensor
    """[B, S, W']. Narrower than the queries where several of their heads share one of the keys."""
    value: Tensor
    """[B, S, W']."""


class Signals(NamedTuple):
    """What one model computed for a batch, as far as an objective requires it."""

    logits: Tensor
    """[B, C]; [B, 0] in place of a teacher that the objective does not require."""
    hidden_states: Mapping[int, Tensor]
    """Layer index (0 = embeddings) -> [B, S, D]."""
    memory: Tensor | None = None
    """[K, S * D], the centroids of the model's memory; None where none is required."""
    projections: Projections | None = None
    """Queries, keys and values of the last layer; None where they are not required."""


class Requirements(NamedTuple):
    """What an objective reads."""

    student_layers: tuple[int, ...] = ()
    """Indices of the student's hidden states."""
    teacher_layers: tuple[int, ...] = ()
    """Indices of the teacher's hidden states."""
    memories: bool = False
    """Whether it reads a teacher memory and trains a student memory."""
    minimum_batch: int = 1
    """Samples that a batch must have; the last batch of an epoch may have fewer."""
    teacher: bool = True
    """Whether it reads anything of a teacher."""
    relation_heads: int = 0
    """Into how many equal parts it splits the queries, keys and values of both last layers; 0: it reads none."""
    cls_token: bool = False
    """Whether the first token of a sample must be the tokenizer's [CLS]."""


class ObjectiveOutput(NamedTuple):
    """What an objective returns."""

    loss: Tensor
    """The scalar that is minimised."""
    components: dict[str, Tensor]
    """Its terms by name, detached scalars, for the log."""


class Objective(nn.Module):
    """The loss of a training method.

    Args:
        schedule: Of the weight of all terms beside L_VKD; constant by default.

    Attributes:
        requires: What ``forward`` reads of the two models.
        structure_weight: The weight at the present step, a float32 scalar. It follows the module from device to device
            and stays float32; a buffer would be rounded with a model that is cast to bfloat16.

    Raises:
        ValueError: The schedule is out of range.
    """

    requires: Requirements

    def __init__(self, schedule: StructureSchedule | None = None) -> None:
        super().__init__()
        self.schedule = (schedule or StructureSchedule()).check()
        self.structure_weight = torch.ones(())
        self.set_progress(0.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Objective:
        super()._apply(fn, recurse)
        self.structure_weight = self.structure_weight.to(fn(self.structure_weight).device)
        return self

    def set_progress(self, progress: float) -> None:
        """Set the weight for the next step.

        Args:
            progress: The part of the training that is done, in [0, 1].
        """
        self.structure_weight.fill_(self.schedule.weight(progress))

    def forward(
        self, student: Signals, teacher: Signals, labels: Tensor, attention_mask: Tensor | None
    ) -> ObjectiveOutput:
        """Return the loss of a batch.

        Args:
            student: Of the trained model; differentiable.
            teacher: Of the frozen model; constants.
            labels: [B].
            attention_mask: [B, S], 1 = keep.
        """
        raise NotImplementedError
