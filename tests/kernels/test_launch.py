"""Launches without Triton's binder, on a driver that launches nothing; kernels are compiled for real.

The driver notes what reaches the lowest level, which a GPU's driver would give to CUDA: a direct launch has to bring
the very same there as ``kernel[grid](...)``.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fsd_kernels import _launch
from fsd_kernels._launch import launch

CPU = torch.device("cpu")


@triton.jit
def sum_kernel(layers, y_ptr, size, stride_y, FLAG: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy one of several layers, each an address and a stride."""
    x_ptr, stride_x = layers[0]
    for i in tl.static_range(1, len(layers)):
        x_ptr = tl.where(tl.program_id(0) == i, layers[i][0], x_ptr)
        stride_x = tl.where(tl.program_id(0) == i, layers[i][1], stride_x)
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets * stride_x, mask=offsets < size, other=0.0)
    tl.store(y_ptr + offsets * stride_y, x, mask=offsets < size)


class _Driver:
    """What Triton asks a driver for."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.refused = False
        self.utils = self
        self.loaded = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def load_binary(self, *arguments: Any) -> tuple[object, int, int, int, int]:
        self.loaded += 1
        return object(), self.loaded, 32, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def run(*arguments: Any) -> None:
            if self.refused:
                raise TypeError("expected 9 arguments")
            self.launched.append(arguments)

        return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Driver]:
    """A GPU that does nothing, and no launches kept from before."""
    found = _Driver()
    monkeypatch.setattr(driver, "_active", found)
    monkeypatch.setattr(_launch, "_bound", {})
    monkeypatch.setattr(_launch, "_direct", True)
    yield found
    # What was compiled asks this driver to unload it.
    found.launched.clear()
    _launch._bound.clear()
    sum_kernel.device_caches.clear()
    gc.collect()


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that went through Triton's binder."""
    names: list[str] = []
    original = JITFunction.run

    def noted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        names.append(self.fn.__name__)
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(JITFunction, "run", noted)
    return names


def run(layers: tuple[tuple[Tensor, int], ...], y: Tensor, size: int = 48, flag: bool = True) -> None:
    # Constants in another order than the kernel's.
    constants = {"BLOCK": 64, "FLAG": flag}
    launch(sum_kernel, (len(layers), 2), (layers, y, size, 1), constants, device=CPU, num_warps=2)


def same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Numbers that are equal, and the very same tensors."""
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if isinstance(a, tuple):
            if not (isinstance(b, tuple) and same(a, b)):
                return False
        # The kernel's metadata is made anew for each launch.
        elif a is not b and type(a).__name__ != "LazyDict" and a != b:
            return False
    return True


def test_a_second_launch_skips_the_binder_and_launches_the_same(fake: _Driver, bindings: list[str]) -> None:
    x, y = torch.zeros(64), torch.zeros(64)
    for layers in (((x, 1),), ((x, 1), (y, 16))):
        fake.launched.clear()
        bindings.clear()
        for _ in range(3):
            run(layers, y)
        assert bindings == ["sum_kernel"]
        first, *others = fake.launched
        assert first[:4] == (len(layers), 2, 1, 7)
        assert all(same(first, other) for other in others)
        assert len(others) == 2


def test_every_call_gets_the_kernel_that_the_binder_would_choose(
    fake: _Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer, y = torch.zeros(65), torch.zeros(64)
    calls: list[dict[str, Any]] = [
        {"layers": ((buffer[:64], 1),)},
        {"layers": ((buffer[1:], 1),)},  # its address is no multiple of 16
        {"layers": ((buffer[:64], 16),)},
        {"layers": ((buffer[:64], 3),)},
        {"layers": ((buffer[:64].bfloat16(), 1),)},
        {"layers": ((buffer[:64], 1),), "size": 47},
        {"layers": ((buffer[:64], 1),), "size": 1},
        {"layers": ((buffer[:64], 1),), "flag": False},
    ]
    for call in calls + calls:
        run(y=y, **call)
    direct = fake.launched[len(calls) :]
    assert len(_launch._bound) == len(calls)
    monkeypatch.setattr(_launch, "_direct", False)
    _launch._bound.clear()
    fake.launched.clear()
    for call in calls:
        run(y=y, **call)
    assert all(same(*pair) for pair in zip(direct, fake.launched, strict=True))
    # Addresses, strides and sizes that Triton compiles apart; 3 and 47 share kernels with none of the others.
    assert len({launched[4] for launched in direct}) >= 7


def test_a_refused_launch_goes_through_the_binder_from_then_on(fake: _Driver, bindings: list[str]) -> None:
    x = torch.zeros(64)
    run(((x, 1),), x)
    fake.refused = True
    # The binder's launch is refused too: the error is not hidden.
    with pytest.warns(UserWarning, match="launches will take longer: expected 9"), pytest.raises(TypeError):
        run(((x, 1),), x)
    fake.refused = False
    bindings.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(((x, 1),), x)
        run(((x, 1),), x)
    assert bindings == ["sum_kernel"] * 2
    assert not _launch._bound


def test_launches_kept_are_bounded(fake: _Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_MAXIMUM", 3)
    x = torch.zeros(64)
    for size in range(20, 30):
        run(((x, 1),), x, size)
        assert len(_launch._bound) <= 3


def test_nothing_is_kept_of_a_kernel_that_returns_no_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_bound", {})
    calls: list[Any] = []

    class Interpreted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **keywords: calls.append((grid, arguments, keywords))

    for _ in range(2):
        launch(Interpreted(), (3,), (1, None), {"BLOCK": 16}, device=CPU, num_warps=4, num_stages=2)
    options = {"enable_fp_fusion": True, "num_warps": 4, "num_stages": 2}
    assert calls == [((3,), (1, None), {"BLOCK": 16, **options})] * 2
    assert not _launch._bound
