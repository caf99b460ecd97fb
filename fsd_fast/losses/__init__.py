"""The losses of feature structure distillation."""

from fsd_fast.losses.defaults import DEFAULTS
from fsd_fast.losses.integrated import METHODS, FeatureStructureLoss, FeatureStructureOutput
from fsd_fast.losses.logits import LogitDistillationLoss
from fsd_fast.losses.objective import FeatureStructureObjective, Objective, Requirements, Signals
from fsd_fast.losses.structures import (
    GlobalInterFeatureLoss,
    GlobalInterFeatureOutput,
    IntraFeatureLoss,
    LocalInterFeatureLoss,
)

__all__ = [
    "DEFAULTS",
    "METHODS",
    "FeatureStructureLoss",
    "FeatureStructureObjective",
    "FeatureStructureOutput",
    "GlobalInterFeatureLoss",
    "GlobalInterFeatureOutput",
    "IntraFeatureLoss",
    "LocalInterFeatureLoss",
    "LogitDistillationLoss",
    "Objective",
    "Requirements",
    "Signals",
]
