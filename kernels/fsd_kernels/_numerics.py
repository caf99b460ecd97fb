"""Constants that the fast implementations share: the dtype of arithmetic, limits of rounding, when to centre first.

The references state the same floor and the same rounding themselves: they import nothing of the code they judge.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CKA_FLOOR = 1e-8
"""-log CKA is constant below this CKA."""

NEG_LOG_FLOORED = math.floor(-math.log(CKA_FLOOR) * 1e5) / 1e5
"""From here on -log CKA is on its floor, whose float32 logarithm may end just below the exact one."""

MAXIMUM_ENERGY_RATIO = 2.0
"""Rows [n, F] are centred before they are multiplied if sum |row|^2 is more than this many times sum |row - mean|^2.
Their common offset would otherwise cost more than about 1e-5 of a float32 gradient. Below it the Gram matrix is
centred instead."""


def compute_dtype(features: Tensor) -> torch.dtype:
    """float64 for float64 features, float32 for all others."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def norm_rounding(dtype: torch.dtype) -> float:
    """A squared norm counts as 0 up to this fraction, 64 eps of ``dtype``, of the terms that it is summed from.

    Nothing but their rounding is left below it, and a division by it would give noise.
    """
    return 64 * torch.finfo(dtype).eps


def maximum_length_ratio(rounding: float) -> float:
    """A cosine counts as 0 if the lengths of its vectors differ by more than this factor, 1024 in float32.

    Cosines are read off squared distances, in which a shorter vector is lost to rounding. ``rounding`` is that of
    ``norm_rounding``.
    """
    return 2.0**-7 / rounding


def rounding_energy(dtype: torch.dtype) -> float:
    """Centred energy below this fraction of n |mean row|^2, (8 eps)^2 of ``dtype``, is the rounding of n equal rows."""
    return (8 * torch.finfo(dtype).eps) ** 2
