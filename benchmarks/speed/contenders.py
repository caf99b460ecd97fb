"""Contenders: providers on one set of inputs. The gate judges their ``outcome``, the harness times ``timed(mode)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.speed.harness import Timed
from benchmarks.speed.inputs import Inputs

MODES = ("forward", "backward", "full")
"""The value without gradients; the gradients of a value already computed; both."""


class Outcome(NamedTuple):
    """What a contender computes."""

    value: Tensor
    """The loss, or the new centroids of k-means."""
    gradients: tuple[Tensor, ...]
    """One for each differentiable input, in their order."""


class Contender(Protocol):
    """A provider on one set of inputs."""

    def outcome(self) -> Outcome:
        """Compute value and gradients once."""

    def timed(self, mode: str) -> Timed:
        """Return the call to time in a mode."""


class LossContender:
    """A loss of named tensors.

    Args:
        loss: Maps the inputs to a scalar.
        inputs: Tensors by name.
        differentiable: Names of the inputs with a gradient; names that are not among the inputs are ignored.
    """

    def __init__(
        self, loss: Callable[[Inputs], Tensor], inputs: Inputs, differentiable: tuple[str, ...]
    ) -> None:
        self.loss = loss
        self.inputs = {name: tensor.detach() for name, tensor in inputs.items()}
        self.leaves = [
            self.inputs[name].clone().requires_grad_() for name in differentiable if name in self.inputs
        ]
        names = [name for name in differentiable if name in self.inputs]
        self.tracked = {**self.inputs, **dict(zip(names, self.leaves, strict=True))}

    def _full(self, _: None) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.loss(self.tracked), self.leaves)

    def outcome(self) -> Outcome:
        """Compute value and gradients once.

        Raises:
            ValueError: The loss passes no gradient.
        """
        value = self.loss(self.tracked)
        if not value.requires_grad:
            raise ValueError("passes no gradient")
        return Outcome(value.detach(), torch.autograd.grad(value, self.leaves))

    def timed(self, mode: str) -> Timed:
        """Return the call to time in "forward", "backward" or "full"."""
        if mode == "forward":
            return Timed(lambda: None, lambda _: self.loss(self.inputs))
        if mode == "backward":
            return Timed(
                lambda: self.loss(self.tracked), lambda value: torch.autograd.grad(value, self.leaves)
            )
        return Timed(lambda: None, self._full)


class ValueContender:
    """A function of named tensors, without gradients; "full" is its only mode."""

    def __init__(self, function: Callable[[Inputs], Tensor], inputs: Inputs) -> None:
        self.function, self.inputs = function, inputs

    def outcome(self) -> Outcome:
        """Compute the value once."""
        return Outcome(self.function(self.inputs), ())

    def timed(self, mode: str) -> Timed:
        """Return the call to time."""
        return Timed(lambda: None, lambda _: self.function(self.inputs))
