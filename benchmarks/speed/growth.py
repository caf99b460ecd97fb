"""How time grows with each size: the slope of log time over log size, compared with that of the minimal flops.

    t(x) = c x^e,   e by least squares over the cases that differ in x alone

A case's time t is in units of the canary (``benchmarks.speed.harness``) timed in the same rounds: between two cases,
minutes apart, the machine may change its speed.

If e exceeds the exponent of the minimal flops by more than 0.1, the op does more work than the mathematics asks for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.speed.results import OK, Row

TOLERANCE = 0.1


class Growth(NamedTuple):
    """Growth of one op's time with one size."""

    op: str
    provider: str
    size: str
    values: list[int]
    seconds: list[float]
    exponent: float
    flops_exponent: float

    @property
    def passed(self) -> bool:
        """Whether time grows no faster than the minimal flops."""
        return self.exponent <= self.flops_exponent + TOLERANCE


def fitted_exponent(values: Sequence[float], times: Sequence[float]) -> float:
    """Slope of log times over log values, by least squares.

    Raises:
        ValueError: Fewer than two different values.
    """
    if len(set(values)) < 2:
        raise ValueError(f"values: expected at least two different ones, got {list(values)}")
    x, y = [math.log(value) for value in values], [math.log(time) for time in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def growth(rows: Sequence[Row], mode: str = "full") -> list[Growth]:
    """Fit every size in which at least three timed cases of one op and provider differ, around a common base."""
    found: list[Growth] = []
    timed = [
        row
        for row in rows
        if row.status == OK and row.mode == mode and row.minimal_flops and row.matmul_percent
    ]
    for op, provider in dict.fromkeys((row.op, row.provider) for row in timed):
        by_case = {row.case: row for row in timed if (row.op, row.provider) == (op, provider)}
        cases = list(by_case.values())
        base = {size: _most_common([row.sizes[size] for row in cases]) for size in cases[0].sizes}
        for size in base:
            line = [
                row
                for row in cases
                if all(row.sizes[other] == base[other] for other in base if other != size)
            ]
            line.sort(key=lambda row: row.sizes[size])
            values = [row.sizes[size] for row in line]
            if len(set(values)) >= 3:
                found.append(_fit(op, provider, size, values, line))
    return found


def _fit(op: str, provider: str, size: str, values: list[int], rows: Sequence[Row]) -> Growth:
    flops = [float(row.minimal_flops or 0) for row in rows]
    # matmul_percent is flops / time in percent of the canary's rate, so this is the time in canaries, up to a constant.
    canaries = [each / (row.matmul_percent or 1) for each, row in zip(flops, rows, strict=True)]
    seconds = [row.time.median for row in rows]
    return Growth(
        op, provider, size, values, seconds, fitted_exponent(values, canaries), fitted_exponent(values, flops)
    )


def _most_common(values: Sequence[int]) -> int:
    return Counter(values).most_common(1)[0][0]
