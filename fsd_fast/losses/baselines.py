"""The methods that feature structure distillation is compared with, as objectives.

    finetune   L = CE(z_S, labels)                                no teacher
    pkd        L = L_VKD + w L_PT                                 Sun, Cheng, Gan, Liu, EMNLP 2019
    rkd        L = L_VKD + w_D L_D + w_A L_A                      Park, Kim, Lu, Cho, CVPR 2019
    minilm     L = L_VKD + w L_relations                          Wang, Bao, Huang, Dong, Wei, Findings of ACL 2021

L_VKD is that of the paper's own methods, with the same alpha and temperature (``LogitDistillationLoss``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fsd_fast.losses._checks import check_weights
from fsd_fast.losses.attention_relations import attention_relation_loss
from fsd_fast.losses.defaults import DEFAULTS
from fsd_fast.losses.logits import LogitDistillationLoss, hard_label_loss
from fsd_fast.losses.objective import Objective, ObjectiveOutput, Requirements, Signals
from fsd_fast.losses.relational import RelationalLoss
from fsd_fast.losses.schedule import StructureSchedule


class FinetuneObjective(Objective):
    """Hard labels alone: cross-entropy, or the mean squared error of a regression. There is no teacher."""

    requires = Requirements(teacher=False)

    def forward(
        self, student: Signals, teacher: Signals, labels: Tensor, attention_mask: Tensor | None
    ) -> ObjectiveOutput:
        """Return the loss on the labels."""
        loss = hard_label_loss(student.logits, labels)
        return ObjectiveOutput(loss, {"loss_hard": loss.detach()})


class _BesideLogits(Objective):
    """L_VKD plus weighted terms.

    Args:
        logits: L_VKD.
        schedule: Of the added terms' weight.
    """

    def __init__(self, logits: LogitDistillationLoss, schedule: StructureSchedule | None = None) -> None:
        super().__init__(schedule)
        self.logits = logits

    def _combine(
        self, student: Signals, teacher: Signals, labels: Tensor, added: Tensor, terms: Mapping[str, Tensor]
    ) -> ObjectiveOutput:
        """Return L_VKD + ``added``, with the terms of both by name."""
        loss, hard, soft = self.logits.components(student.logits, teacher.logits, labels)
        components = {"loss_vkd": loss, "loss_hard": hard, "loss_soft": soft, **terms}
        return ObjectiveOutput(
            loss + added * self.structure_weight, {name: value.detach() for name, value in components.items()}
        )


class PatientObjective(_BesideLogits):
    """PKD, patient knowledge distillation (Sun et al., 2019): L_VKD + weight L_PT.

    L_PT = mean over samples, layer pairs and the D dimensions of (h_S / |h_S| - h_T / |h_T|)^2, where h is the hidden
    state of [CLS]. The paper's formula sums over layers and dimensions; its weights, 10 to 1000, belong to the mean.
    "PKD-Skip" is --layer_pairs layerwise: every second layer of a teacher twice as deep, without the last.

    Args:
        logits: L_VKD.
        layer_pairs: (teacher layer, student layer) pairs, of the same width.
        weight: Of L_PT.
        schedule: Of that weight over the training.

    Raises:
        ValueError: There is no pair, or the weight is negative.
    """

    def __init__(
        self,
        logits: LogitDistillationLoss,
        layer_pairs: Sequence[tuple[int, int]],
        weight: float = DEFAULTS.pkd_weight,
        schedule: StructureSchedule | None = None,
    ) -> None:
        super().__init__(logits, schedule)
        check_weights(pkd_weight=weight)
        if not layer_pairs:
            raise ValueError("layer_pairs: expected at least one pair of layers, got none")
        self.weight = weight
        self._pairs = list(layer_pairs)
        self.requires = Requirements(
            student_layers=tuple(sorted({student for _, student in layer_pairs})),
            teacher_layers=tuple(sorted({teacher for teacher, _ in layer_pairs})),
            cls_token=True,
        )

    def forward(
        self, student: Signals, teacher: Signals, labels: Tensor, attention_mask: Tensor | None
    ) -> ObjectiveOutput:
        """Return L_VKD + weight L_PT."""
        terms = []
        for teacher_layer, student_layer in self._pairs:
            own = student.hidden_states[student_layer][:, 0].float()
            given = teacher.hidden_states[teacher_layer][:, 0].detach().float()
            terms.append(
                functional.mse_loss(functional.normalize(own, dim=1), functional.normalize(given, dim=1))
            )
        patient = torch.stack(terms).mean()
        return self._combine(student, teacher, labels, self.weight * patient, {"loss_patient": patient})


class RelationalObjective(_BesideLogits):
    """RKD, relational knowledge distillation (Park et al., 2019): L_VKD + w_D L_D + w_A L_A.

    Distances and angles are those between the flattened features of the batch's samples, averaged over the layer pairs;
    see ``fsd_fast.losses.relational``.

    Args:
        logits: L_VKD.
        layer_pairs: (teacher layer, student layer) pairs, of any widths.
        relations: L_D and L_A with their weights. A weight of 0 leaves its term out.
        schedule: Of those weights over the training.

    Raises:
        ValueError: There is no pair.
    """

    def __init__(
        self,
        logits: LogitDistillationLoss,
        layer_pairs: Sequence[tuple[int, int]],
        relations: RelationalLoss,
        schedule: StructureSchedule | None = None,
    ) -> None:
        super().__init__(logits, schedule)
        if not layer_pairs:
            raise ValueError("layer_pairs: expected at least one pair of layers, got none")
        self.relations = relations
        self._pairs = list(layer_pairs)
        self.requires = Requirements(
            student_layers=tuple(sorted({student for _, student in layer_pairs})),
            teacher_layers=tuple(sorted({teacher for teacher, _ in layer_pairs})),
            minimum_batch=3 if relations.angle_weight else 2,
        )

    def forward(
        self, student: Signals, teacher: Signals, labels: Tensor, attention_mask: Tensor | None
    ) -> ObjectiveOutput:
        """Return L_VKD + w_D L_D + w_A L_A."""
        outputs = [
            self.relations(
                student.hidden_states[student_layer], teacher.hidden_states[teacher_layer], attention_mask
            )
            for teacher_layer, student_layer in self._pairs
        ]
        loss, distance, angle = (torch.stack(values).mean() for values in zip(*outputs, strict=True))
        terms = {}
        if self.relations.distance_weight:
            terms["loss_distance"] = distance
        if self.relations.angle_weight:
            terms["loss_angle"] = angle
        return self._combine(student, teacher, labels, loss, terms)


class AttentionRelationObjective(_BesideLogits):
    """MiniLM, second version (Wang et al., 2021): L_VKD + weight L of the last layers' self-attention relations.

    The paper distils before the task is known and has no L_VKD; for a task it is added, as to the other methods. See
    ``fsd_fast.losses.attention_relations``.

    Args:
        logits: L_VKD.
        relation_heads: R; it divides the widths of queries, keys and values of both models.
        weight: Of the relations.
        schedule: Of that weight over the training.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        logits: LogitDistillationLoss,
        relation_heads: int = DEFAULTS.minilm_relation_heads,
        weight: float = DEFAULTS.minilm_weight,
        schedule: StructureSchedule | None = None,
    ) -> None:
        super().__init__(logits, schedule)
        check_weights(minilm_weight=weight)
        if relation_heads < 1:
            raise ValueError(f"minilm_relation_heads: expected at least 1, got {relation_heads}")
        self.weight = weight
        self.requires = Requirements(relation_heads=relation_heads)

    def forward(
        self, student: Signals, teacher: Signals, labels: Tensor, attention_mask: Tensor | None
    ) -> ObjectiveOutput:
        """Return L_VKD + weight L of the relations."""
        if student.projections is None or teacher.projections is None:
            raise ValueError("projections: expected queries, keys and values of both models, got None")
        relations = attention_relation_loss(
            student.projections, teacher.projections, self.requires.relation_heads, attention_mask
        )
        return self._combine(student, teacher, labels, self.weight * relations, {"loss_relations": relations})
