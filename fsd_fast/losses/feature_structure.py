"""The objective of the paper's methods."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fsd_fast.losses.integrated import FeatureStructureLoss
from fsd_fast.losses.objective import Objective, ObjectiveOutput, Requirements, Signals
from fsd_fast.losses.schedule import StructureSchedule


class FeatureStructureObjective(Objective):
    """The methods of the paper: L_VKD plus the structures that the loss uses [eq. 11].

    Args:
        loss: The integrated loss.
        layer_pairs: (teacher layer, student layer) pairs that L_I and L_L compare.
        penultimate: The pair that L_G compares: the last layer but one on both sides.
        schedule: Of the structures' weight.
    """

    def __init__(
        self,
        loss: FeatureStructureLoss,
        layer_pairs: Sequence[tuple[int, int]],
        penultimate: tuple[int, int],
        schedule: StructureSchedule | None = None,
    ) -> None:
        super().__init__(schedule)
        self.loss = loss
        self._pairs = list(layer_pairs) if loss.uses_intra or loss.uses_local else []
        self._penultimate = penultimate if loss.uses_global else None
        read = [*self._pairs, *([penultimate] if loss.uses_global else [])]
        self.requires = Requirements(
            student_layers=tuple(sorted({student for _, student in read})),
            teacher_layers=tuple(sorted({teacher for teacher, _ in read})),
            memories=loss.uses_global,
            minimum_batch=loss.local.minimum_batch if loss.uses_local else 1,
        )

    def forward(
        self, student: Signals, teacher: Signals, labels: Tensor, attention_mask: Tensor | None
    ) -> ObjectiveOutput:
        """Return the integrated loss and its terms."""
        pair = self._penultimate
        loss, components = self.loss(
            student.logits,
            teacher.logits,
            labels,
            [student.hidden_states[layer] for _, layer in self._pairs],
            [teacher.hidden_states[layer] for layer, _ in self._pairs],
            attention_mask,
            student_penultimate=None if pair is None else student.hidden_states[pair[1]],
            teacher_penultimate=None if pair is None else teacher.hidden_states[pair[0]],
            student_memory=student.memory,
            teacher_memory=teacher.memory,
            structure_weight=self.structure_weight,
        )
        return ObjectiveOutput(loss, components)
