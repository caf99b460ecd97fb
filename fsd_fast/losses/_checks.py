"""Checks of the losses' settings. Every error names the setting, its value and what was expected."""

from __future__ import annotations

from collections.abc import Sequence


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Check that a named setting is one of its choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_unit_interval(name: str, value: float) -> None:
    """Check that a weight lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a weight in [0, 1], got {value}")


def check_weights(**weights: float) -> None:
    """Check that named weights are not negative, nor NaN."""
    for name, weight in weights.items():
        if not weight >= 0:
            raise ValueError(f"{name}: expected a weight >= 0, got {weight}")
