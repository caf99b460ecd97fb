"""The one module that is trained: student, student memory and objective.

The loss is computed in its own forward, so that whatever wraps it (DeepSpeed ZeRO, DistributedDataParallel) sees
every use of every parameter.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fsd_fast.losses import Objective, Signals
from fsd_fast.memory.student_memory import StudentMemory
from fsd_fast.models.inputs import input_arguments
from fsd_fast.models.projections import record_projections


class DistillationModel(nn.Module):
    """Student, student memory and objective.

    Args:
        student: The student; exported alone when training ends.
        objective: Says which hidden states it requires and computes the loss.
        student_memory: Trained by the objective and left behind by the export; None where it requires none.

    Raises:
        ValueError: The objective requires a memory and there is none, or the other way round; or it requires queries,
            keys and values that the student does not have.
    """

    def __init__(
        self, student: PreTrainedModel, objective: Objective, student_memory: StudentMemory | None = None
    ) -> None:
        super().__init__()
        if objective.requires.memories != (student_memory is not None):
            wanted = "one" if objective.requires.memories else "none"
            raise ValueError(f"student_memory: the objective requires {wanted}, got {student_memory}")
        self.student = student
        self.objective = objective
        self.student_memory = student_memory
        self.config = student.config
        heads = objective.requires.relation_heads
        self.projections = record_projections(student, "the student", heads) if heads else None

    def gradient_checkpointing_enable(self, *arguments: Any, **keywords: Any) -> None:
        """Pass the request on to the student."""
        self.student.gradient_checkpointing_enable(*arguments, **keywords)

    def get_input_embeddings(self) -> nn.Module:
        """Return the student's token embeddings, to which ``--neftune_noise_alpha`` adds its noise."""
        return self.student.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        teacher: Signals | None = None,
        clusters: Tensor | None = None,
    ) -> dict[str, Any]:
        """Run the student, and the objective where the teacher's signals are given.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 1 = keep.
            token_type_ids: [B, S].
            labels: [B].
            teacher: What the teacher computed for the same batch; None runs the student alone.
            clusters: int64 [B]: the samples' clusters in the teacher memory, for a student memory that follows the
                student's features.

        Returns:
            "logits" [B, C]; with a teacher also "loss", and "components", the loss's terms by name.

        Raises:
            ValueError: There is a teacher and there are no labels.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        inputs = input_arguments({name: value for name, value in given.items() if value is not None})
        if teacher is None:
            return {"logits": self.student(**inputs).logits}
        if labels is None:
            raise ValueError("labels: the hard-label term of the loss needs them")
        layers = self.objective.requires.student_layers
        output = self.student(**inputs, output_hidden_states=bool(layers))
        hidden_states = {layer: output.hidden_states[layer] for layer in layers}
        memory = None if self.student_memory is None else self.student_memory.centroids
        projections = None if self.projections is None else self.projections.take()
        signals = Signals(output.logits, hidden_states, memory, projections)
        result = self.objective(signals, teacher, labels, attention_mask)
        if self.student_memory is not None and clusters is not None and self.training:
            penultimate = output.hidden_states[self.student.config.num_hidden_layers - 1]
            self.student_memory.follow(penultimate, clusters, attention_mask)
        return {"loss": result.loss, "logits": output.logits, "components": result.components}


def export_state(state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Keep the student's own entries of a ``DistillationModel`` state, without their prefix; None stays None."""
    if state is None:
        return None
    prefix = "student."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
