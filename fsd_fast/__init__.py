"""Feature structure distillation: losses, teacher memory, and training of a small student from a large teacher."""

from fsd_fast.losses import (
    FeatureStructureLoss,
    GlobalInterFeatureLoss,
    GlobalInterFeatureOutput,
    IntraFeatureLoss,
    LocalInterFeatureLoss,
    LogitDistillationLoss,
)

__version__ = "0.1.0"

__all__ = [
    "FeatureStructureLoss",
    "GlobalInterFeatureLoss",
    "GlobalInterFeatureOutput",
    "IntraFeatureLoss",
    "LocalInterFeatureLoss",
    "LogitDistillationLoss",
]
