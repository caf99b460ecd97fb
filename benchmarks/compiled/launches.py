"""Replaces the kernels under their launchers, and records the launches for a GPU that is not here.

A recorder stands in for every kernel and a named target for the GPU. The launchers run on CPU tensors; the recorded
configurations are exactly those that the heuristics choose for the target.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from fsd_kernels._triton import Target

OPS = ("intra_cka", "gram", "structure", "kmeans")
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")

_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.uint8: "*u8", torch.float64: "*fp64",
}  # fmt: skip


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Specialisation(NamedTuple):
    """What Triton's launcher derives from a call's arguments; the compiled code depends on nothing else."""

    signature: dict[str, Any]
    """A type by parameter, a tuple of types for a tuple."""
    constants: dict[tuple[int, ...], Any]
    """A value by its place: the parameter's, and an element's within a tuple."""
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


class _Recorder:
    """Stands in for a kernel: ``recorder[grid](...)`` notes the launch and runs nothing."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **keywords: Any) -> None:
            self.launches.append(Launch(self.kernel, arguments, keywords))

        return launch


@contextmanager
def replaced_kernels(target: Target, replacement: Callable[[Any], Any]) -> Iterator[None]:
    """Replace every kernel by ``replacement(kernel)``, and let the launchers see ``target`` as the GPU."""
    replaced = []
    for op in OPS:
        module = importlib.import_module(f"fsd_kernels.{op}.triton")
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                replaced.append((module, name, value))
                setattr(module, name, replacement(value))
        if hasattr(module, "target_of"):
            replaced.append((module, "target_of", module.target_of))
            module.target_of = lambda device: target  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def record(target: Target, run: Callable[[], None]) -> list[Launch]:
    """Return the launches that ``run`` makes on ``target``; no kernel runs."""
    launches: list[Launch] = []
    with replaced_kernels(target, lambda kernel: _Recorder(kernel, launches)):
        run()
    return launches


def specialise(launch: Launch) -> Specialisation:
    """Specialise a kernel for a call's arguments, as Triton's launcher does."""
    found = Specialisation({}, {}, {}, {})
    found.options.update({name: launch.keywords[name] for name in OPTIONS if name in launch.keywords})
    arguments = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    arguments |= {name: value for name, value in launch.keywords.items() if name not in OPTIONS}
    for index, parameter in enumerate(launch.kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            found.signature[parameter.name], found.constants[(index,)] = "constexpr", value
        else:
            found.signature[parameter.name] = _type((index,), value, found, parameter.do_not_specialize)
    return found


def _type(path: tuple[int, ...], value: Any, found: Specialisation, any_value: bool) -> Any:
    """The type of an argument, or of an element of a tuple; what else the code depends on is added to ``found``."""
    if isinstance(value, tuple):
        return tuple(_type((*path, i), each, found, any_value) for i, each in enumerate(value))
    if isinstance(value, Tensor):
        if value.data_ptr() % 16 == 0:
            found.attributes[path] = [["tt.divisibility", 16]]
        return _TYPES[value.dtype]
    if value is None or (value == 1 and not any_value):
        found.constants[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if value % 16 == 0 and not any_value:
        found.attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"
