"""Feature structure distillation: losses, teacher memory, and training of a small student from a large teacher.

What the package gives is imported when it is first used, so that ``import fsd_fast`` takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fsd_fast.clustering.mini_batch_kmeans import MiniBatchKMeans
    from fsd_fast.losses import (
        FeatureStructureLoss,
        GlobalInterFeatureLoss,
        GlobalInterFeatureOutput,
        IntraFeatureLoss,
        LocalInterFeatureLoss,
        LogitDistillationLoss,
        RelationalLoss,
    )
    from fsd_fast.memory.student_memory import StudentMemory
    from fsd_fast.memory.teacher_memory import TeacherMemory
    from fsd_fast.models.teacher import Teacher
    from fsd_fast.training.distillation import DistillationModel
    from fsd_fast.training.trainer import FSDTrainer

__version__ = "0.2.0"

__all__ = [
    "DistillationModel",
    "FSDTrainer",
    "FeatureStructureLoss",
    "GlobalInterFeatureLoss",
    "GlobalInterFeatureOutput",
    "IntraFeatureLoss",
    "LocalInterFeatureLoss",
    "LogitDistillationLoss",
    "MiniBatchKMeans",
    "RelationalLoss",
    "StudentMemory",
    "Teacher",
    "TeacherMemory",
]

_MODULES = {
    "DistillationModel": "training.distillation",
    "FSDTrainer": "training.trainer",
    "MiniBatchKMeans": "clustering.mini_batch_kmeans",
    "StudentMemory": "memory.student_memory",
    "Teacher": "models.teacher",
    "TeacherMemory": "memory.teacher_memory",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'losses')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
