"""Shared by the tests of the Triton kernels: where they run, inputs that show a wrong read, plain torch in tf32."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor
from triton.runtime.jit import JITFunction

from fsd_kernels import _launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

GPU = not INTERPRETED and torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")

if INTERPRETED:
    from triton.runtime import interpreter


Test = TypeVar("Test", bound=Callable[..., None])


def on_triton(test: Test) -> Test:
    """Mark a test of the Triton kernels: where it runs (see tests/kernels/conftest.py), and on few multiprocessors."""
    return pytest.mark.triton(pytest.mark.usefixtures("few_multiprocessors")(test))


def on_gpu(tolerance: float, in_interpreter: float) -> float:
    """What products on tensor cores may lose; the interpreter multiplies in float32, whatever is asked."""
    return tolerance if GPU else in_interpreter


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
    # A direct launch would not pass here.
    monkeypatch.setattr(_launch, "_direct", False)
    monkeypatch.setattr(_launch, "_bound", {})
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


QUICK = settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def backpropagate(total: Tensor) -> None:
    """Backward, unless nothing the total was made of needs it (the formula of a sample without structure)."""
    if total.requires_grad:
        total.backward()


def normal(*shape: int, seed: int, offset: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator) + offset * torch.randn(shape[-1], generator=generator)
    return values.to(DEVICE)


def transposed(x: Tensor) -> Tensor:
    """The same values with the last two axes swapped in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def kept_mask(kind: str | None, batch: int, rows: int) -> Tensor | None:
    if kind is None:
        return None
    mask = torch.zeros(batch, rows, dtype=torch.bool, device=DEVICE)
    for i in range(batch):
        kept = {"ragged": rows - (5 * i) % rows, "one": 1, "none": 0 if i == 0 else rows}[kind]
        mask[i, :kept] = True
    if kind == "ragged" and rows > 3:
        mask[0, 2] = False
    return mask


def poison(x: Tensor, mask: Tensor | None) -> Tensor:
    """NaN wherever the mask drops."""
    return x if mask is None else x.masked_fill(~mask[:, :, None], float("nan"))


def assert_close(ours: Tensor, truth: Tensor, tolerance: float) -> None:
    """|ours - truth| <= tolerance |truth| in Euclidean norm, and everything finite."""
    assert ours.isfinite().all()
    ours, truth = ours.detach().double(), truth.detach().double()
    assert float((ours - truth).norm()) <= tolerance * float(truth.norm()) + 1e-7


TF32 = 4e-3
"""What products of operands of 10 bits may be off by."""


def outliers(*shape: int, seed: int) -> Tensor:
    """Features like BERT's: a few dimensions with a mean of 30 standard deviations."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., ::16] += 30
    return x.to(DEVICE)


class RoundedProduct(torch.autograd.Function):
    """a @ b on tensor cores: operands rounded to some bits of mantissa, sums in float32, both ways."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bits: int) -> Tensor:
        a, b = (torch.from_numpy(round_like(z.detach().cpu().numpy(), bits)).to(z.device) for z in (a, b))
        ctx.save_for_backward(a, b)
        ctx.bits = bits
        return a @ b

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        gradient = torch.from_numpy(round_like(gradients[0].contiguous().cpu().numpy(), ctx.bits)).to(
            a.device
        )
        return gradient @ b.mT, a.mT @ gradient, None


def plain_gram(x: Tensor, bits: int) -> Tensor:
    """The Gram matrix in plain torch, centred by its means: in bfloat16 throughout, or with tf32 products."""
    gram = x @ x.mT if x.dtype == torch.bfloat16 else RoundedProduct.apply(x, x.mT, bits)
    mean = gram.mean(dim=-1, keepdim=True)
    return gram - mean - mean.mT + mean.mean(dim=-2, keepdim=True)


def error_of(run: Callable[[Tensor], Tensor], x: Tensor, truth: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Relative errors of a value and of the gradient of its sum weighted by w, against (value, gradient)."""
    x = x.detach().clone().requires_grad_()
    value = run(x)
    (value.float() * normal(*value.shape, seed=7)).sum().backward()
    assert x.grad is not None
    pairs = ((value, truth[0]), (x.grad, truth[1]))
    value_error, gradient_error = (float((a.detach().double() - b).norm() / b.norm()) for a, b in pairs)
    return value_error, gradient_error


def truth_of(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().double().requires_grad_()
    value = run(x)
    (value * normal(*value.shape, seed=7)).sum().backward()
    assert x.grad is not None
    return value.detach(), x.grad


TENSOR_CORES = [(10, torch.float32), (7, torch.bfloat16)]
