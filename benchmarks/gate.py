"""The gate: nothing is timed whose value or gradient is wrong.

The truth is the reference in float64. Errors are relative, in the Euclidean norm; of several gradients the worst
counts. The limits in float32 (in narrower dtypes, and where float32 products are rounded to tf32, at least twice, or
ten times, the reference's own error there):

- ours, on ordinary features and on features with BERT's outlier dimensions: 1e-5, the promise that the tests hold.
- others, on ordinary features: 1e-2. It leaves room for a formulation that loses digits, not for another formula.

Others are not held to anything on outlier features, where the errors of those that multiply before they centre reach
the size of the loss itself. All errors are reported.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.contenders import Outcome

OURS = 1e-5
OTHERS = 1e-2
OURS_TIMES, OTHERS_TIMES = 2.0, 10.0


class Errors(NamedTuple):
    """Relative errors."""

    value: float
    gradient: float


class Verdict(NamedTuple):
    """What the gate says of one provider on one case."""

    errors: Errors
    limits: Errors
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
    given, true = value.detach().double(), truth.detach().double().to(value.device)
    size = torch.linalg.vector_norm(true)
    error = float(torch.linalg.vector_norm(given - true) / (size if size > 0 else 1.0))
    return error if error == error else float("inf")


def errors(outcome: Outcome, truth: Outcome) -> Errors:
    """Compare an outcome with the truth."""
    if len(outcome.gradients) != len(truth.gradients):
        return Errors(relative_error(outcome.value, truth.value), float("inf"))
    pairs = zip(outcome.gradients, truth.gradients, strict=True)
    return Errors(
        relative_error(outcome.value, truth.value), max((relative_error(a, b) for a, b in pairs), default=0.0)
    )


def limits(baseline: Errors, ours: bool, rounded: bool) -> Errors:
    """Return the limits, given the errors that the reference makes on the same inputs and with the same ``rounded``.

    Args:
        baseline: The reference's errors.
        ours: Whether the project's own limits hold.
        rounded: Whether products have operands narrower than float32.
    """
    floor, times = (OURS, OURS_TIMES) if ours else (OTHERS, OTHERS_TIMES)
    if not rounded:
        return Errors(floor, floor)
    return Errors(*(max(floor, times * error) if math.isfinite(error) else floor for error in baseline))


def judge(outcome: Outcome, truth: Outcome, baseline: Errors, ours: bool, rounded: bool) -> Verdict:
    """Judge one outcome."""
    found, allowed = errors(outcome, truth), limits(baseline, ours, rounded)
    wrong = [
        f"{name} is off by {error:.1e} (limit {limit:.1e})"
        for name, error, limit in zip(("value", "gradient"), found, allowed, strict=True)
        if not error <= limit
    ]
    return Verdict(found, allowed, ", ".join(wrong))
