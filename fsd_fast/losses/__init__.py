"""The losses of feature structure distillation."""

from fsd_fast.losses.logits import LogitDistillationLoss
from fsd_fast.losses.objective import METHODS, FeatureStructureLoss, FeatureStructureOutput
from fsd_fast.losses.structures import (
    GlobalInterFeatureLoss,
    GlobalInterFeatureOutput,
    IntraFeatureLoss,
    LocalInterFeatureLoss,
)

__all__ = [
    "METHODS",
    "FeatureStructureLoss",
    "FeatureStructureOutput",
    "GlobalInterFeatureLoss",
    "GlobalInterFeatureOutput",
    "IntraFeatureLoss",
    "LocalInterFeatureLoss",
    "LogitDistillationLoss",
]
