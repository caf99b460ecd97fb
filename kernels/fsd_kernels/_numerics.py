"""What the fast implementations agree on: the dtype of arithmetic, what is rounding, when rows are centred first.

The references hold the same floor and the same rounding on their own: they import nothing of what they judge.
"""

from __future__ import annotations

import torch
from torch import Tensor

CKA_FLOOR = 1e-8
"""-log CKA stays where it is below this CKA."""

MOST_ENERGY = 2.0
"""Rows [n, F] are centred before they are multiplied where sum |row|^2 is more than so many times sum |row - mean|^2:
their common offset would otherwise cost more than about 1e-5 of a float32 gradient. Below it the Gram is centred."""


def compute_dtype(features: Tensor) -> torch.dtype:
    """float64 for float64 features, float32 for all others."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def norm_rounding(dtype: torch.dtype) -> float:
    """A squared norm that is a sum of terms of size s counts as 0 up to this part of s: 64 eps of ``dtype``.

    Below it nothing but the rounding of the terms is left, and what divides by it would be noise.
    """
    return 64 * torch.finfo(dtype).eps


LONGEST = 2.0**-7
"""A cosine of vectors whose lengths differ by more than this over ``norm_rounding`` (1024 times in float32) is 0: read
off squared distances, it would be rounding."""


def rounding_energy(dtype: torch.dtype) -> float:
    """What the centred energy of equal rows may be of their mean's, per row: (8 eps)^2 of the dtype."""
    return (8 * torch.finfo(dtype).eps) ** 2
