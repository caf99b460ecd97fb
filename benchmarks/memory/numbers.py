"""Measured numbers and their limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.tables import Table


class Number(NamedTuple):
    """A measured number and its limit."""

    name: str
    value: float
    limit: str
    passed: bool

    @classmethod
    def at_most(cls, name: str, value: float, maximum: float) -> Number:
        """A number with an upper limit."""
        return cls(name, value, f"<= {maximum:g}", value <= maximum)

    @classmethod
    def at_least(cls, name: str, value: float, minimum: float) -> Number:
        """A number with a lower limit."""
        return cls(name, value, f">= {minimum:g}", value >= minimum)


def numbers_table(numbers: Sequence[Number]) -> Table:
    """Table of the numbers, their limits, and whether they hold."""
    lines = [
        [one.name, f"{one.value:.4g}", one.limit, "holds" if one.passed else "MISSED"] for one in numbers
    ]
    return [["number", "measured", "must be", ""], *lines]
