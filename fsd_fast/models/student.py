"""The student: a shallower copy of a pre-trained classifier, and the module that is trained with it.

``build_student`` copies the first layers of a pre-trained model. ``DistillationModel`` holds the student and
the student memory and computes the losses in its own forward, so that whatever wraps it (DeepSpeed ZeRO,
DistributedDataParallel) sees every use of every parameter.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from fsd_fast.losses.structures import FeatureStructureLoss
from fsd_fast.memory.student_memory import StudentMemory
from fsd_fast.models.layers import LayerPair
from fsd_fast.models.teacher import TeacherSignals, input_arguments, layer_list


def load_classifier(
    name_or_path: str, labels: tuple[str, ...], num_layers: int | None = None
) -> PreTrainedModel:
    """Load a sequence classifier for a task, with all of its layers or only the first ones.

    Args:
        name_or_path: A pre-trained or fine-tuned model. A head that does not exist or has another number of
            outputs is started afresh.
        labels: Class names in the order of the logits; empty for a regression (one logit).
        num_layers: Layers to keep, counted from the embeddings; None keeps all.

    Returns:
        A plain model of the same family, whose configuration names the classes and the number of layers.

    Raises:
        OSError: There is no such model.
        ValueError: ``num_layers`` is below 1 or above the model's own number.
    """
    config = AutoConfig.from_pretrained(name_or_path)
    depth = int(config.num_hidden_layers)
    if num_layers is not None and not 1 <= num_layers <= depth:
        raise ValueError(
            f"number of layers: expected 1 to the {depth} layers of {name_or_path}, got {num_layers}"
        )
    config.num_labels = len(labels) or 1
    config.problem_type = "single_label_classification" if labels else "regression"
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    # Trained weights are float32, whatever precision they were saved in.
    model = AutoModelForSequenceClassification.from_pretrained(
        name_or_path, config=config, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    if num_layers is None or num_layers == depth:
        return model
    prefix, _ = layer_list(model)
    small_config = copy.deepcopy(model.config)
    small_config.num_hidden_layers = num_layers
    small = type(model)(small_config)
    kept = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(f"{prefix}.") or int(name[len(prefix) + 1 :].split(".")[0]) < num_layers
    }
    small.load_state_dict(kept)
    return small


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


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, also where ZeRO-3 has partitioned them."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters())
