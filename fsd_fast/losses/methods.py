"""The table of the training methods: what ``--method`` takes, which settings a method reads, and what builds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fsd_fast.losses.baselines import (
    AttentionRelationObjective,
    FinetuneObjective,
    PatientObjective,
    RelationalObjective,
)
from fsd_fast.losses.defaults import BACKEND, LossSettings
from fsd_fast.losses.feature_structure import FeatureStructureObjective
from fsd_fast.losses.gather import gather_features
from fsd_fast.losses.integrated import STRUCTURES, FeatureStructureLoss
from fsd_fast.losses.logits import LogitDistillationLoss
from fsd_fast.losses.objective import Objective
from fsd_fast.losses.relational import RelationalLoss
from fsd_fast.losses.schedule import StructureSchedule
from fsd_fast.losses.structures import PadFeatures


class Setup(NamedTuple):
    """What a method is built for, beside its settings."""

    layer_pairs: tuple[tuple[int, int], ...]
    """(teacher layer, student layer) pairs that its terms compare."""
    penultimate: tuple[int, int]
    """The last layer but one on both sides."""
    teacher_width: int
    """Hidden size of the teacher."""
    student_width: int
    """Hidden size of the student."""
    pad_features: PadFeatures = "exclude"
    """Whether padding counts in the features."""
    backend: str = BACKEND
    """Kernels of the Gram matrices."""


class Method(NamedTuple):
    """A training method."""

    summary: str
    """Its loss, in one line."""
    settings: frozenset[str]
    """The settings that it reads: fields of ``LossSettings``, and others under the names of their flags."""
    build: Callable[[LossSettings, Setup], Objective]
    """Builds its objective.

    Raises:
        ValueError: A setting is out of range, or the method cannot take these models.
    """
    layer_pairs: str = "penultimate"
    """The layer pairs that it compares by default: "penultimate" or "layerwise"."""
    needs_teacher: bool = True
    """Whether there must be a teacher."""


_LOGITS = frozenset({"alpha", "temperature"})
_SCHEDULE = frozenset({"structure_schedule", "structure_warmup_ratio"})
_MEMORY = frozenset(
    {
        "memory_path",
        "student_memory_init",
        "student_memory_update",
        "student_memory_decay",
        "memory_learning_rate",
    }
)


def _logits(settings: LossSettings) -> LogitDistillationLoss:
    return LogitDistillationLoss(settings.alpha, settings.temperature)


def _schedule(settings: LossSettings) -> StructureSchedule:
    return StructureSchedule(settings.structure_schedule, settings.structure_warmup_ratio)


def _feature_structure(name: str) -> Method:
    """The entry of a method of the paper, from the structures that it uses."""
    intra, local, global_ = STRUCTURES[name]
    settings = set(_LOGITS)
    terms = ["L_VKD"]
    if intra or local or global_:
        settings |= {"beta", "backend", "gather_features", *_SCHEDULE}
    if intra or local:
        settings |= {"layer_pairs", "measure", "estimator"}
    if intra:
        settings |= {"gamma_i", "intra_reduction"}
        terms.append("L_I")
    if local:
        settings |= {"gamma_l"}
        terms.append("L_L")
    if global_:
        settings |= {"gamma_g", "gamma_m", "distance_scale", *_MEMORY}
        terms.append("L_G")

    def build(given: LossSettings, setup: Setup) -> Objective:
        loss = FeatureStructureLoss(
            name,
            alpha=given.alpha,
            temperature=given.temperature,
            beta=given.beta,
            gamma_i=given.gamma_i,
            gamma_l=given.gamma_l,
            gamma_g=given.gamma_g,
            gamma_m=given.gamma_m,
            reduction=given.intra_reduction,
            pad_features=setup.pad_features,
            backend=setup.backend,
            measure=given.measure,
            estimator=given.estimator,
            distance_scale=given.distance_scale,
        )
        if given.gather_features:
            gather_features(loss)
        return FeatureStructureObjective(loss, setup.layer_pairs, setup.penultimate, _schedule(given))

    return Method(", ".join(terms), frozenset(settings), build)


def _patient(settings: LossSettings, setup: Setup) -> Objective:
    if setup.teacher_width != setup.student_width:
        raise ValueError(
            f"method: 'pkd' compares hidden states number by number; expected a student as wide as its teacher, "
            f"{setup.teacher_width}, got {setup.student_width}; rkd, minilm and the fsd methods take any widths"
        )
    return PatientObjective(_logits(settings), setup.layer_pairs, settings.pkd_weight, _schedule(settings))


def _relational(settings: LossSettings, setup: Setup) -> Objective:
    if not settings.rkd_distance_weight and not settings.rkd_angle_weight:
        raise ValueError(
            "rkd_distance_weight, rkd_angle_weight: expected a weight above 0, got 0 for both; that is method 'vkd'"
        )
    relations = RelationalLoss(
        settings.rkd_distance_weight, settings.rkd_angle_weight, setup.pad_features, setup.backend
    )
    return RelationalObjective(_logits(settings), setup.layer_pairs, relations, _schedule(settings))


def _attention_relations(settings: LossSettings, setup: Setup) -> Objective:
    return AttentionRelationObjective(
        _logits(settings), settings.minilm_relation_heads, settings.minilm_weight, _schedule(settings)
    )


METHODS: dict[str, Method] = {
    "finetune": Method("hard labels alone", frozenset(), lambda *_: FinetuneObjective(), needs_teacher=False),
    **{name: _feature_structure(name) for name in STRUCTURES},
    "pkd": Method(
        "L_VKD, normalised states of [CLS]",
        _LOGITS | _SCHEDULE | {"layer_pairs", "pkd_weight"},
        _patient,
        layer_pairs="layerwise",
    ),
    "rkd": Method(
        "L_VKD, distances and angles between samples",
        _LOGITS | _SCHEDULE | {"layer_pairs", "backend", "rkd_distance_weight", "rkd_angle_weight"},
        _relational,
    ),
    "minilm": Method(
        "L_VKD, self-attention relations of the last layer",
        _LOGITS | _SCHEDULE | {"minilm_weight", "minilm_relation_heads"},
        _attention_relations,
    ),
}
"""Method name -> what it is."""
