"""What a training method is: an objective that says what it requires of teacher and student, and its loss.

A new method is one subclass of ``Objective``: the trainer runs both models, keeps what ``requires`` names, and
calls it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from fsd_fast.losses.integrated import FeatureStructureLoss


class Signals(NamedTuple):
    """What one model computed for a batch, as far as an objective requires it."""

    logits: Tensor
    """[B, C]."""
    hidden_states: Mapping[int, Tensor]
    """Layer index (0 = embeddings) -> [B, S, D]."""
    memory: Tensor | None = None
    """[K, S * D], the centroids of the model's memory; None where none is required."""


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


class ObjectiveOutput(NamedTuple):
    """What an objective returns."""

    loss: Tensor
    """The scalar that is minimised."""
    components: dict[str, Tensor]
    """Its terms by name, detached scalars, for the log."""


class Objective(nn.Module):
    """The loss of a training method.

    Attributes:
        requires: What ``forward`` reads of the two models.
    """

    requires: Requirements

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


class FeatureStructureObjective(Objective):
    """The methods of the paper: L_VKD plus the structures that the loss uses [eq. 11].

    Args:
        loss: The integrated loss.
        layer_pairs: (teacher layer, student layer) pairs that L_I and L_L compare.
        penultimate: The pair that L_G compares: the last layer but one on both sides.
    """

    def __init__(
        self,
        loss: FeatureStructureLoss,
        layer_pairs: Sequence[tuple[int, int]],
        penultimate: tuple[int, int],
    ) -> None:
        super().__init__()
        self.loss = loss
        self._pairs = list(layer_pairs) if loss.uses_intra or loss.uses_local else []
        self._penultimate = penultimate if loss.uses_global else None
        read = [*self._pairs, *([penultimate] if loss.uses_global else [])]
        self.requires = Requirements(
            student_layers=tuple(sorted({student for _, student in read})),
            teacher_layers=tuple(sorted({teacher for teacher, _ in read})),
            memories=loss.uses_global,
            minimum_batch=2 if loss.uses_local else 1,
        )

    def forward(
        self, student: Signals, teacher: Signals, labels: Tensor, attention_mask: Tensor | None
    ) -> ObjectiveOutput:
        """Return the integrated loss and its terms."""
        last = self._penultimate
        loss, components = self.loss(
            student.logits,
            teacher.logits,
            labels,
            [student.hidden_states[layer] for _, layer in self._pairs],
            [teacher.hidden_states[layer] for layer, _ in self._pairs],
            attention_mask,
            student_penultimate=None if last is None else student.hidden_states[last[1]],
            teacher_penultimate=None if last is None else teacher.hidden_states[last[0]],
            student_memory=student.memory,
            teacher_memory=teacher.memory,
        )
        return ObjectiveOutput(loss, components)
