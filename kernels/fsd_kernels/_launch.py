"""Launches of Triton kernels that cost the CPU little: a compiled kernel is bound once and its handle kept.

``kernel[grid](...)`` binds some 25 arguments at every call: it works out each argument's type and alignment, and looks
for the compiled kernel that fits them. The first launch here goes that way too and keeps the compiled kernel that it
returns, under a key that holds everything the choice depends on. A later launch with the same key calls
``compiled[grid](...)``, Triton's own launcher.

The key holds the grid, constants and plain numbers by value, and of a tensor its dtype and whether its address is a
multiple of 16. Nothing is copied to the device and nothing waits for it, so that a launch can be captured in a CUDA
graph once the kernel is compiled.

Launches go through ``kernel[grid](...)`` every time where it returns no handle (Triton's interpreter), on AMD GPUs
(their kernels depend on the size of a tensor's memory as well), with ``FSD_DIRECT_LAUNCH=0``, and after Triton's
launcher has once refused the arguments, which is reported by a warning.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsd_kernels._triton import LAUNCH_OPTIONS

_MAXIMUM = 4096
"""Launches that are kept. Batches of many lengths make many keys; the kernels behind them stay compiled."""


class _Bound(NamedTuple):
    """A kernel bound to a grid and constants."""

    kernel: Any
    """Kept so that no other kernel takes its identity."""
    run: Callable[..., Any]
    constants: tuple[Any, ...]


_bound: dict[Hashable, _Bound] = {}
_direct = torch.version.hip is None and os.environ.get("FSD_DIRECT_LAUNCH") != "0"


def _traits(values: tuple[Any, ...]) -> tuple[Hashable, ...]:
    """What the choice of a compiled kernel sees of its arguments, or more: of a tensor its dtype and alignment."""
    traits: list[Hashable] = []
    for value in values:
        if isinstance(value, Tensor):
            traits += (value.dtype, value.data_ptr() & 15)
        else:
            traits.append(_traits(value) if type(value) is tuple else value)
    return tuple(traits)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    *,
    device: torch.device,
    num_warps: int,
    num_stages: int = 3,
) -> None:
    """Launch a Triton kernel on ``device``, whichever GPU is current.

    Args:
        kernel: A function decorated with ``triton.jit``.
        grid: Numbers of programs along up to three axes.
        arguments: The kernel's first arguments in order: tensors, numbers, None, or tuples of these. A number that
            changes from step to step belongs in a tensor: kept launches are found by the numbers' values.
        constants: All other arguments by name, ``tl.constexpr`` in the kernel; hashable.
        device: The device of the tensors.
        num_warps: Warps of a program.
        num_stages: Stages of its loops.
    """
    global _direct
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            launch(
                kernel, grid, arguments, constants, device=device, num_warps=num_warps, num_stages=num_stages
            )
        return
    # A kernel's own hash is written in Python and slow.
    key = (
        id(kernel), grid, device.index, num_warps, num_stages, *constants.values(), *_traits(arguments)
    )  # fmt: skip
    found = _bound.get(key)
    if found is not None:
        try:
            found.run(*arguments, *found.constants)
        except TypeError as error:
            _direct = False
            _bound.clear()
            warnings.warn(
                f"fsd_kernels: Triton refused the direct launch of a kernel, launches will take longer: {error}",
                stacklevel=2,
            )
        else:
            return
    options = {**LAUNCH_OPTIONS, "num_warps": num_warps, "num_stages": num_stages}
    compiled = kernel[grid](*arguments, **constants, **options)
    if compiled is None or not _direct:
        return
    if len(_bound) >= _MAXIMUM:
        _bound.clear()
    rest = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
    _bound[key] = _Bound(kernel, compiled[(*grid, 1, 1)[:3]], rest)
