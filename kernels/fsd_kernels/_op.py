"""How an op is made known to torch: registration, fake tensors, gradients, and a short cut past the dispatcher.

Every op is registered with ``torch.library``, so that compilers and exporters can trace it. A custom op written in
Python costs each call about 0.1 ms in the dispatcher, and twice that if the processor's caches are cold: as much as a
fused kernel takes. Plain tensors outside of a trace therefore skip the dispatcher: the same forward and backward then
run as an ``autograd.Function``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fsd_kernels._backend import implementation

_PLAIN_TYPES = (Tensor, nn.Parameter)

# Takes the place of a tensor among the values that are kept for the backward.
_SAVED_TENSOR = object()


def _flat(values: Iterable[Any]) -> list[Any]:
    """The values, with those of a list or tuple one by one."""
    found: list[Any] = []
    for value in values:
        if type(value) is list or type(value) is tuple:
            found += value
        else:
            found.append(value)
    return found


def _no_gradient(needs: Any) -> Any:
    """None for an input, or a list of them for a list of tensors."""
    return [None] * len(needs) if isinstance(needs, list | tuple) else None


def _without_autocast(function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """Call a function and keep autocast out of its arithmetic; where it is off, its context would only cost time."""
    first = inputs[0]
    while not isinstance(first, Tensor):
        first = first[0]
    if torch.is_autocast_enabled(first.device.type):
        with torch.autocast(first.device.type, enabled=False):
            return function(*inputs)
    return function(*inputs)


def run_reference(op: str, function: str, *inputs: Any) -> Any:
    """Run a function of ``fsd_kernels.<op>.reference`` as it is: autograd differentiates through it."""
    return _without_autocast(getattr(implementation(op, "reference"), function), inputs)


class Op:
    """A function registered with torch as ``fsd_kernels::<name>``; ``differentiable`` gives it a backward.

    Args:
        name: The name in ``torch.ops.fsd_kernels``.
        function: Tensors, lists of tensors, None and plain values to tensors, none of which is an input. Its
            annotations give the schema. Autocast is off while it runs.
        fake: The same from fake tensors: outputs of the right shapes and dtypes.
        mutates: Names of the inputs that the function changes in place.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], fake: Callable[..., Any], mutates: Sequence[str] = ()
    ) -> None:
        self._function = function
        self._gradients: Callable[..., Sequence[Any]] | None = None
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        self._registered = torch.library.custom_op(
            f"fsd_kernels::{name}", self.run, mutates_args=mutates, schema=schema
        )
        self._registered.register_fake(fake)

    def run(self, *inputs: Any) -> Any:
        """Run the function without the dispatcher and without gradients."""
        return _without_autocast(self._function, inputs)

    def __call__(self, *inputs: Any) -> Any:
        """Run the op: past the dispatcher if no compiler and no subclass of Tensor has to see it."""
        if torch.compiler.is_compiling():
            return self._registered(*inputs)
        tensors = [value for value in _flat(inputs) if isinstance(value, Tensor)]
        for tensor in tensors:
            if type(tensor) not in _PLAIN_TYPES:
                return self._registered(*inputs)
        if self._gradients is not None:
            return _Direct.apply(self, inputs, *_flat(inputs[: self._leaves]))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            # The registered op has no gradient and says so: a second derivative ends here.
            return self._registered(*inputs)
        return self.run(*inputs)

    def differentiable(
        self,
        keep: Callable[[Sequence[Any], Sequence[Tensor]], Sequence[Any]],
        gradients: Callable[..., Sequence[Any]],
        *,
        leaves: int = 1,
        outputs: int = 1,
    ) -> None:
        """Give the op a backward.

        Args:
            keep: (inputs, outputs) to the values that the backward needs: tensors, None or plain values.
            gradients: (kept values, which leaves need a gradient, gradients of the outputs) to the gradients of the
                leaves. A gradient of an output is None if nothing depends on it.
            leaves: Number of differentiable inputs, which come first. A list of tensors is one input.
            outputs: Number of differentiable outputs, which come first. The others serve the backward alone.
        """
        self._keep, self._gradients, self._leaves, self._outputs = keep, gradients, leaves, outputs
        self._registered.register_autograd(self._backward, setup_context=self.set_up_context)

    def set_up_context(self, ctx: Any, inputs: Sequence[Any], output: Tensor | tuple[Tensor, ...]) -> None:
        """Keep in an autograd context what the backward needs."""
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*outputs[self._outputs :])
        # The backward would otherwise be given zeros for the outputs that are not differentiable.
        ctx.set_materialize_grads(False)
        kept = self._keep(inputs, outputs)
        ctx.kept = [_SAVED_TENSOR if isinstance(value, Tensor) else value for value in kept]
        ctx.save_for_backward(*(value for value in kept if isinstance(value, Tensor)))

    def gradients(self, ctx: Any, needs: Sequence[Any], d_outputs: Sequence[Tensor | None]) -> Sequence[Any]:
        """The gradients of the leaves, None for those that ``needs`` does not ask for."""
        d_outputs = d_outputs[: self._outputs]
        if self._gradients is None or all(each is None for each in d_outputs):
            return [_no_gradient(need) for need in needs]
        saved = iter(ctx.saved_tensors)
        kept = [next(saved) if value is _SAVED_TENSOR else value for value in ctx.kept]
        return self._gradients(kept, needs, *d_outputs)

    def _backward(self, ctx: Any, *d_outputs: Tensor | None) -> tuple[Any, ...]:
        """The backward of the registered op: a gradient per input, a list of them for a list of tensors."""
        needs, constants = ctx.needs_input_grad[: self._leaves], ctx.needs_input_grad[self._leaves :]
        found = self.gradients(ctx, needs, d_outputs)
        pairs = zip(found, needs, strict=True)
        return *(gradient if need else None for gradient, need in pairs), *map(_no_gradient, constants)


class _Direct(torch.autograd.Function):
    """A differentiable op past the dispatcher. Its leaves are arguments of their own, so that autograd sees them."""

    @staticmethod
    def forward(ctx: Any, op: Op, inputs: Sequence[Any], *leaves: Tensor | None) -> Any:
        output = op.run(*inputs)
        op.set_up_context(ctx, inputs, output)
        ctx.op = op
        return output

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        found = _flat(ctx.op.gradients(ctx, needs, d_outputs))
        return None, None, *(gradient if need else None for gradient, need in zip(found, needs, strict=True))


def op(
    name: str, *, fake: Callable[..., Any], mutates: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Op]:
    """Decorate a function to make it an ``Op``."""
    return lambda function: Op(name, function, fake, mutates)
