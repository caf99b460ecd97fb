"""The gate: a provider whose value or gradient is wrong is not timed.

The truth is the reference in float64. Errors are relative, in the Euclidean norm; among several gradients the largest
error counts. The limits, in float32 and (after the semicolon) with operands of products rounded to fewer bits (16-bit
dtypes, tf32):

- our own ops, on ordinary features and on features with BERT's outlier dimensions: 1e-5, as in the tests; 4 times the
  rounding error of an operand.
- other providers, on ordinary features: 1e-2; 1e-1. This admits a formulation that loses digits, but not a different
  formula.
- our own discrete results (k-means, where a point between two centroids may go to either): 1e-5; 1e-1.

Other providers have no limit on outlier features: where products come before centring, the error there can be as large
as the loss. All errors are reported.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.speed.contenders import Outcome

OURS, OTHERS = 1e-5, 1e-2
OURS_ROUNDINGS, OTHERS_ROUNDED = 4.0, 1e-1
# Largest relative rounding error, to 11 bits (tf32, float16) or 8 (bfloat16).
_ROUNDING = {torch.float32: 2.0**-11, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Errors(NamedTuple):
    """Relative errors."""

    value: float
    gradient: float


class Verdict(NamedTuple):
    """The gate's judgement on one provider and one case."""

    errors: Errors
    reason: str
    """Why it is wrong; empty where it is right."""

    @property
    def passed(self) -> bool:
        """Whether it may be timed."""
        return not self.reason


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth|; the absolute error where the truth is 0; infinite for NaN or another shape."""
    if value.shape != truth.shape:
        return float("inf")
    found, true = value.detach().double(), truth.detach().double().to(value.device)
    size = torch.linalg.vector_norm(true)
    error = float(torch.linalg.vector_norm(found - true) / (size if size > 0 else 1.0))
    return error if error == error else float("inf")


def errors(outcome: Outcome, truth: Outcome) -> Errors:
    """Compare an outcome with the truth."""
    if len(outcome.gradients) != len(truth.gradients):
        return Errors(relative_error(outcome.value, truth.value), float("inf"))
    pairs = zip(outcome.gradients, truth.gradients, strict=True)
    return Errors(
        relative_error(outcome.value, truth.value), max((relative_error(a, b) for a, b in pairs), default=0.0)
    )


def limit(ours: bool, dtype: torch.dtype, rounded: bool, discrete: bool = False) -> float:
    """Return the limit on the errors of value and gradient.

    Args:
        ours: Whether our own limits hold.
        dtype: The inputs' dtype.
        rounded: Whether products have operands narrower than float32.
        discrete: Whether rounding decides between results, as between two equally near centroids.
    """
    if not rounded:
        return OURS if ours else OTHERS
    return OURS_ROUNDINGS * _ROUNDING[dtype] if ours and not discrete else OTHERS_ROUNDED


def judge(outcome: Outcome, truth: Outcome, allowed: float) -> Verdict:
    """Judge an outcome by the limit ``allowed`` on its errors."""
    found = errors(outcome, truth)
    wrong = [
        f"{name} is off by {error:.1e} (limit {allowed:.1e})"
        for name, error in zip(("value", "gradient"), found, strict=True)
        if not error <= allowed
    ]
    return Verdict(found, ", ".join(wrong))
