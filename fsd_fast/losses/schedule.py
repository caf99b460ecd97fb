"""How much the structures weigh over the training."""

from __future__ import annotations

import math
from typing import NamedTuple, get_args

from fsd_fast.losses._checks import check_choice, check_unit_interval
from fsd_fast.losses.defaults import DEFAULTS, ScheduleKind


class StructureSchedule(NamedTuple):
    """The weight of all terms beside L_VKD, from the progress p of the training.

    w(p) = p / r for p < r, the warm-up. After it, with q = (p - r) / (1 - r):

        constant   w = 1
        linear     w = 1 - q
        cosine     w = (1 + cos(pi q)) / 2
    """

    kind: ScheduleKind = DEFAULTS.structure_schedule
    """"constant", "linear" or "cosine"."""
    warmup_ratio: float = DEFAULTS.structure_warmup_ratio
    """r, the part of the training in which the weight rises from 0 to 1."""

    def check(self) -> StructureSchedule:
        """Return the schedule itself.

        Raises:
            ValueError: ``kind`` is unknown or ``warmup_ratio`` is outside of [0, 1].
        """
        check_choice("structure_schedule", self.kind, get_args(ScheduleKind))
        check_unit_interval("structure_warmup_ratio", self.warmup_ratio)
        return self

    def weight(self, progress: float) -> float:
        """Return w, in [0, 1].

        Args:
            progress: p, the part of the training that is done: 0 at its first step.
        """
        if progress < self.warmup_ratio:
            return progress / self.warmup_ratio
        if self.kind == "constant" or self.warmup_ratio == 1:
            return 1.0
        faded = min(1.0, (progress - self.warmup_ratio) / (1 - self.warmup_ratio))
        return 1 - faded if self.kind == "linear" else (1 + math.cos(math.pi * faded)) / 2
