"""What the tests of the Triton kernels share: where they run, and inputs in which a wrong read shows.

They run in Triton's interpreter (TRITON_INTERPRET=1) on the CPU, and without it on a GPU where there is one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

GPU = not INTERPRETED and torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
RUNS_KERNELS = INTERPRETED or GPU

if INTERPRETED:
    from triton.runtime import interpreter

interpreter_only = pytest.mark.skipif(GPU, reason="looks into the interpreter")


def on_gpu(tolerance: float, in_interpreter: float) -> float:
    """What products on tensor cores may lose; the interpreter multiplies in float32, whatever is asked."""
    return tolerance if GPU else in_interpreter


def run_in_interpreter(path: str) -> None:
    """Run the tests of a file in a process of their own, with TRITON_INTERPRET=1."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(path).resolve())],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def poison_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every new buffer with NaN: an element that no kernel writes shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args: Any, _original: Callable[..., Tensor] = original, **kwargs: Any) -> Tensor:
            result = _original(*args, **kwargs)
            if result.is_floating_point() and not isinstance(result, torch._subclasses.FakeTensor):
                result.fill_(float("nan"))
            return result

        monkeypatch.setattr(owner, name, poisoned)


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that receives the names of the kernels launched."""
    names: list[str] = []
    owner, method = (interpreter.GridExecutor, "__call__") if INTERPRETED else (JITFunction, "run")
    original = getattr(owner, method)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, counted)
    return names


def forbid_stray_accesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on a load or store outside the tensors that its kernel was given."""
    extents: list[tuple[int, int]] = []
    call = interpreter.GridExecutor.__call__

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor) and x.numel()]
        last = [sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) for x in tensors]
        extents[:] = [
            (x.data_ptr(), x.data_ptr() + (end + 1) * x.element_size())
            for x, end in zip(tensors, last, strict=True)
        ]
        return call(self, *args, **kwargs)

    def checked(name: str) -> Callable[..., Any]:
        access = getattr(interpreter.InterpreterBuilder, name)

        def check(self: Any, pointers: Any, *rest: Any) -> Any:
            mask = rest[0] if name == "create_masked_load" else rest[1]
            addresses = pointers.data[mask.data.astype(bool)].astype("int64")
            inside = [(addresses >= first) & (addresses < last) for first, last in extents]
            assert sum(inside).all(), f"{name} outside every tensor"  # type: ignore[attr-defined]
            return access(self, pointers, *rest)

        return check

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", noted)
    for name in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, checked(name))


def framed(x: Tensor) -> Tensor:
    """The same values inside a larger buffer of NaN: a read outside the tensor shows."""
    buffer = torch.full([size + 2 for size in x.shape], float("nan"), dtype=x.dtype, device=x.device)
    inner = buffer[tuple(slice(1, -1) for _ in x.shape)]
    return inner.copy_(x)


def round_like(x: Any, bits: int) -> Any:
    """Round float32 values to ``bits`` bits of mantissa, to nearest even."""
    drop = 23 - bits
    raw = torch.from_numpy(x.astype("float32")).view(torch.int32)
    raw = (raw + ((1 << (drop - 1)) - 1) + ((raw >> drop) & 1)) & ~((1 << drop) - 1)
    return raw.view(torch.float32).numpy()


def round_dots(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """Round the operands of every dot in the interpreter, which ignores the precision asked for."""
    original = interpreter.InterpreterBuilder.create_dot

    def rounded(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        operands = [
            interpreter.TensorHandle(round_like(x.data, bits), x.dtype) if x.data.dtype.kind == "f" else x
            for x in (a, b)
        ]
        return original(self, *operands, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", rounded)
