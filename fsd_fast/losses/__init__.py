"""The losses of feature structure distillation, and of the methods that it is compared with."""

from fsd_fast.losses.attention_relations import attention_relation_loss
from fsd_fast.losses.baselines import (
    AttentionRelationObjective,
    FinetuneObjective,
    PatientObjective,
    RelationalObjective,
)
from fsd_fast.losses.defaults import DEFAULTS, LossSettings
from fsd_fast.losses.feature_structure import FeatureStructureObjective
from fsd_fast.losses.integrated import STRUCTURES, FeatureStructureLoss, FeatureStructureOutput
from fsd_fast.losses.logits import LogitDistillationLoss, hard_label_loss
from fsd_fast.losses.methods import METHODS, Method, Setup
from fsd_fast.losses.objective import Objective, ObjectiveOutput, Projections, Requirements, Signals
from fsd_fast.losses.relational import RelationalLoss, RelationalOutput
from fsd_fast.losses.schedule import StructureSchedule
from fsd_fast.losses.structures import (
    GlobalInterFeatureLoss,
    GlobalInterFeatureOutput,
    IntraFeatureLoss,
    LocalInterFeatureLoss,
)

__all__ = [
    "DEFAULTS",
    "METHODS",
    "STRUCTURES",
    "AttentionRelationObjective",
    "FeatureStructureLoss",
    "FeatureStructureObjective",
    "FeatureStructureOutput",
    "FinetuneObjective",
    "GlobalInterFeatureLoss",
    "GlobalInterFeatureOutput",
    "IntraFeatureLoss",
    "LocalInterFeatureLoss",
    "LogitDistillationLoss",
    "LossSettings",
    "Method",
    "Objective",
    "ObjectiveOutput",
    "PatientObjective",
    "Projections",
    "RelationalLoss",
    "RelationalObjective",
    "RelationalOutput",
    "Requirements",
    "Setup",
    "Signals",
    "StructureSchedule",
    "attention_relation_loss",
    "hard_label_loss",
]
