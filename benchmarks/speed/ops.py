"""What the registry holds: an op, its providers, and the bounds on its time.

A provider turns a set of inputs into a contender, or raises ``Unavailable`` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.speed.contenders import MODES, Contender, ValueContender
from benchmarks.speed.harness import Timed
from benchmarks.speed.inputs import Inputs, Sizes
from benchmarks.speed.peers import Unavailable
from fsd_kernels import cost

Build = Callable[[Inputs, Sizes], Contender]


class Timeable(Protocol):
    """Work that can be timed."""

    def timed(self, mode: str) -> Timed:
        """Return the call to time in a mode."""


@dataclass(frozen=True)
class Provider:
    """An implementation under test."""

    build: Build
    truth: str = "biased"
    """Name of the truth that judges it, a key of the op's ``truths``."""
    ours: bool = False
    """Whether our own, stricter limits hold."""
    note: str = ""
    memory: bool = True
    """Whether torch allocates its memory, so that the harness can measure it."""


@dataclass(frozen=True)
class Bound:
    """A part of an op's work, timed in the same rounds as the op's providers."""

    build: Callable[[Inputs, Sizes], Timeable]
    note: str


def _same_sizes(sizes: Sizes) -> Sizes:
    return sizes


@dataclass(frozen=True)
class Op:
    """One thing to measure."""

    name: str
    title: str
    size_names: tuple[str, ...]
    """The sizes that its cases have."""
    make_inputs: Callable[[Sizes, int, bool], Inputs]
    """Takes sizes, a seed, and whether features have outlier dimensions."""
    truths: dict[str, Build]
    """What providers are compared with, by name; runs on float64 inputs."""
    providers: dict[str, Provider]
    shapes: dict[str, list[Sizes]]
    cost_name: str | None
    """Its name in ``fsd_kernels.cost``; None: no minimum is stated."""
    modes: tuple[str, ...] = MODES
    bounds: dict[str, Bound] = field(default_factory=dict)
    """Parts of the CPU path's work, timed on a CPU. They compute no loss, so the gate does not judge them."""
    discrete: bool = False
    """Whether rounding decides between results, as between two equally near centroids."""
    gate_sizes: Callable[[Sizes], Sizes] = field(default=_same_sizes)
    """The sizes at which the gate judges a case; smaller where float64 would take too long."""

    def minimum(self, sizes: Sizes, mode: str, dtype: torch.dtype) -> cost.Cost | None:
        """Minimal bytes and flops of a mode."""
        if self.cost_name is None:
            return None
        stages = cost.minimum(self.cost_name, cost_shape(sizes, dtype))
        return stages[mode] if mode in stages else cost.total(stages)


def cost_shape(sizes: Sizes, dtype: torch.dtype = torch.float32) -> cost.Shape:
    """The shape by which the cost model knows a case."""
    return cost.Shape(
        batch=sizes.batch,
        rows=sizes.rows,
        width=sizes.width,
        centroids=sizes.centroids,
        points=sizes.points,
        dtype=dtype,
    )


def on_gpu(build: Build, reason: str) -> Build:
    """``build`` where the inputs are on a GPU; elsewhere unavailable for ``reason``."""

    def checked(tensors: Inputs, sizes: Sizes) -> Contender:
        if next(iter(tensors.values())).device.type != "cuda":
            raise Unavailable(reason)
        return build(tensors, sizes)

    return checked


def value_of(function: Callable[[Inputs], Tensor]) -> Build:
    """A contender without gradients."""
    return lambda tensors, _: ValueContender(function, tensors)
