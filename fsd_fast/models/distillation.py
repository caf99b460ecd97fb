"""The one module that is trained: student, student memory and losses.

The losses are computed in its own forward, so that whatever wraps it (DeepSpeed ZeRO, DistributedDataParallel) sees
every use of every parameter.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fsd_fast.losses import FeatureStructureLoss
from fsd_fast.memory.student_memory import StudentMemory
from fsd_fast.models.layers import LayerPair
from fsd_fast.models.teacher import TeacherSignals, input_arguments


class DistillationModel(nn.Module):
    """Student, student memory and losses: the one module that is trained.

    Args:
        student: The student; exported alone when training ends.
        loss: The integrated loss.
        layer_pairs: (teacher, student) hidden-state indices for L_I and L_L.
        student_memory: Trained by L_G and left behind by the export; None where the method uses none.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        loss: FeatureStructureLoss,
        layer_pairs: list[LayerPair],
        student_memory: StudentMemory | None = None,
    ) -> None:
        super().__init__()
        if loss.uses_global != (student_memory is not None):
            raise ValueError(
                f"student_memory: method {loss.method!r} {'needs' if loss.uses_global else 'does not use'} one"
            )
        self.student = student
        self.loss = loss
        self.layer_pairs = layer_pairs
        self.student_memory = student_memory
        self.config = student.config

    @property
    def student_layers(self) -> list[int]:
        """The student's hidden states that the losses read."""
        return [student for _, student in self.layer_pairs]

    def gradient_checkpointing_enable(self, *arguments: Any, **keywords: Any) -> None:
        """Pass the request on to the student."""
        self.student.gradient_checkpointing_enable(*arguments, **keywords)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        teacher: TeacherSignals | None = None,
    ) -> dict[str, Any]:
        """Run the student, and the losses where the teacher's signals are given.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 1 = keep.
            token_type_ids: [B, S].
            labels: [B].
            teacher: What the teacher made of the same batch; None evaluates the student alone.

        Returns:
            "logits" [B, C], and "loss" where labels are given: the integrated loss with a teacher, the
            hard-label loss without. With a teacher also "components", every term by name.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        inputs = input_arguments({name: value for name, value in given.items() if value is not None})
        if teacher is None:
            output = self.student(**inputs, labels=labels)
            return (
                {"logits": output.logits}
                if labels is None
                else {"loss": output.loss, "logits": output.logits}
            )
        if labels is None:
            raise ValueError("labels: the hard-label term of the loss needs them")
        wants_features = self.loss.uses_intra or self.loss.uses_local or self.loss.uses_global
        output = self.student(**inputs, output_hidden_states=wants_features)
        hidden = output.hidden_states if wants_features else ()
        result = self.loss(
            output.logits,
            teacher.logits,
            labels,
            [hidden[layer] for layer in self.student_layers] if wants_features else (),
            teacher.features,
            attention_mask,
            student_penultimate=hidden[self.config.num_hidden_layers - 1] if self.loss.uses_global else None,
            teacher_penultimate=teacher.penultimate,
            student_memory=None if self.student_memory is None else self.student_memory.centroids,
            teacher_memory=teacher.memory,
        )
        return {"loss": result.loss, "logits": output.logits, "components": result.components}


def export_state(state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Keep the student's own entries of a ``DistillationModel`` state, without their prefix; None stays None."""
    if state is None:
        return None
    prefix = "student."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
