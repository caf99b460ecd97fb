"""Bytes that the Triton kernels load and store, counted while they run: ``python -m benchmarks.traffic``.

Every load and store of a program is counted with the lanes that its mask lets through, in Triton's interpreter,
at the paper's shapes (batch 32, 128 tokens, width 768) for forward + backward, partial sums included. Where all
programs along one axis of the grid do the same work on slices of equal size, one of them is run and counted for
all (the last slice may be smaller: the count is then too high by less than one slice).

"issued" counts every access of every program. "distinct" counts an address that programs on the same slice read
repeatedly once per slice; what they share beyond that (the matrix A of the backward) is still counted per slice.
The two differ where a kernel computes one tile of Gamma per program (K = 300). Minimum: every input read once
per pass, every output written once.

Ends with 1 if "issued" is above 1.15 times the minimum for L_I or for L_G + L_L with K = 100, in float32 (tf32
products) or bfloat16. Nothing is timed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from fsd_kernels import inter_structure, intra_cka
from fsd_kernels._triton import INTERPRETED
from fsd_kernels.gram import triton as gram
from fsd_kernels.intra_cka import triton as intra
from fsd_kernels.structure import triton as structure

LIMIT = 1.15
BATCH, TOKENS, WIDTH = 32, 128, 768
F = TOKENS * WIDTH

# The axis of the grid along which programs do equal work.
UNIFORM = {
    "_intra_cka_fwd_kernel": 0, "_intra_cka_bwd_kernel": 0, "_gram_fwd_kernel": 0, "_gram_bwd_kernel": 0,
    "_gram_tile_kernel": 1, "_gram_bwd_tile_kernel": 1,
}  # fmt: skip


class Traffic(NamedTuple):
    """Bytes moved."""

    issued: int
    distinct: int

    def __add__(self, other: Traffic) -> Traffic:  # type: ignore[override]
        """Both together."""
        return Traffic(self.issued + other.issued, self.distinct + other.distinct)


class _Counter:
    """Counts the accesses of the programs run since it was last emptied."""

    def __init__(self) -> None:
        self.issued = 0
        self.addresses: list[np.ndarray[Any, Any]] = []
        self.size: list[int] = []

    def note(self, pointers: Any, mask: Any) -> None:
        chosen = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)]
        width = pointers.get_element_ty().primitive_bitwidth // 8
        self.issued += chosen.size * width
        self.addresses.append(chosen.ravel())
        self.size.append(width)

    def take(self) -> Traffic:
        distinct = 0
        for width in set(self.size):
            same = [a for a, size in zip(self.addresses, self.size, strict=True) if size == width]
            distinct += np.unique(np.concatenate(same)).size * width
        result = Traffic(self.issued, distinct)
        self.__init__()  # type: ignore[misc]
        return result


@contextmanager
def counting() -> Iterator[dict[str, Traffic]]:
    """Count per kernel. Values are not computed where only one program of many runs."""
    counter, totals = _Counter(), dict[str, Traffic]()
    builder = interpreter.InterpreterBuilder
    load, store, call = (
        builder.create_masked_load,
        builder.create_masked_store,
        interpreter.GridExecutor.__call__,
    )

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        counter.note(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counter.note(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_call(self: Any, *args: Any, **kwargs: Any) -> None:
        name = self.fn.__name__
        times = 1
        if name in UNIFORM:
            grid = [*self.grid]
            times, grid[UNIFORM[name]] = grid[UNIFORM[name]], 1
            self.grid = tuple(grid)
        call(self, *args, **kwargs)
        one = counter.take()
        totals[name] = totals.get(name, Traffic(0, 0)) + Traffic(one.issued * times, one.distinct * times)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    interpreter.GridExecutor.__call__ = counted_call
    try:
        yield totals
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        interpreter.GridExecutor.__call__ = call


def _features(dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def intra_traffic(dtype: torch.dtype) -> dict[str, Traffic]:
    """L_I, forward and backward."""
    x, y = _features(dtype, 0), _features(dtype, 1)
    with counting() as totals:
        _, _, g = intra.forward([x], [y], None)
        intra.backward([x], None, g, torch.ones(1, BATCH))
    return totals


def inter_traffic(dtype: torch.dtype, num_centroid: int) -> dict[str, Traffic]:
    """L_G + L_L, forward and backward; the teacher's memory has a known block."""
    x, y = _features(dtype, 0).flatten(1), _features(dtype, 1).flatten(1)
    memories = [torch.empty(num_centroid, F, dtype=dtype).fill_(i) for i in range(2)]
    known = torch.zeros(num_centroid + 1, num_centroid + 1)
    with counting() as totals:
        own = gram.forward(x, memories[0], None, None)
        given = gram.forward(y, memories[1], known, None)
        _, gradients = structure.forward(own, given, num_centroid)
        d_gamma = structure.backward(gradients, torch.ones(4))
        gram.backward(x, memories[0], None, d_gamma, (True, True))
    return totals


class _PlainTorch(TorchDispatchMode):
    """Counts the bytes of inputs and outputs of every torch operation that is not a view."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.total += sum(x.numel() * x.element_size() for x in tensors)
        return result


def plain_torch(run: Callable[[], Tensor]) -> int:
    """Bytes of the formula in plain torch with autograd, forward and backward."""
    with _PlainTorch() as counter:
        run().backward()
    return counter.total


def _plain_intra() -> Tensor:
    x = _features(torch.float32, 0).requires_grad_()
    return intra_cka(x, _features(torch.float32, 1), backend="reference").neg_log.sum()


def _plain_inter(num_centroid: int) -> Tensor:
    memories = [torch.ones(num_centroid, F).mul_(i + 1) for i in range(2)]
    x = _features(torch.float32, 0).requires_grad_()
    values = inter_structure(
        x, _features(torch.float32, 1), memories[0].requires_grad_(), memories[1], backend="reference"
    )
    return torch.stack(values).sum()


def main(argv: list[str]) -> int:
    """Print the table; 1 if a limit is passed. ``--plain`` adds plain torch's bytes."""
    if not INTERPRETED:
        # Triton was imported before this module could choose the interpreter.
        command = [sys.executable, "-m", "benchmarks.traffic", *argv]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    torch.set_num_threads(1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    worst = 0
    print("| pass | dtype | minimum MB | issued MB | ratio | distinct MB | ratio | by kernel |")
    print("|---|---|---|---|---|---|---|---|")
    try:
        for dtype in (torch.float32, torch.bfloat16):
            size = dtype.itemsize
            block = BATCH * F * size
            minimum = 4 * block + 2 * BATCH * TOKENS * TOKENS * 4
            worst |= _line("L_I", dtype, minimum, intra_traffic(dtype), LIMIT)
            for num_centroid in (100, 300):
                minimum = 4 * block + 4 * num_centroid * F * size
                limit = LIMIT if num_centroid == 100 else None
                totals = inter_traffic(dtype, num_centroid)
                worst |= _line(f"L_G + L_L, K={num_centroid}", dtype, minimum, totals, limit)
        if "--plain" in argv:
            print(f"plain torch with autograd, float32: L_I {plain_torch(_plain_intra) / 1e6:.0f} MB")
            print(f"plain torch, L_G + L_L, K=100: {plain_torch(lambda: _plain_inter(100)) / 1e6:.0f} MB")
    finally:
        torch.set_float32_matmul_precision(before)
    return worst


def _line(
    name: str, dtype: torch.dtype, minimum: int, totals: dict[str, Traffic], limit: float | None
) -> int:
    total = sum(totals.values(), start=Traffic(0, 0))
    kernels = ", ".join(f"{kernel.strip('_')} {part.issued / 1e6:.1f}" for kernel, part in totals.items())
    kind = str(dtype).removeprefix("torch.")
    print(
        f"| {name} | {kind} | {minimum / 1e6:.1f} | {total.issued / 1e6:.1f} | {total.issued / minimum:.3f} "
        f"| {total.distinct / 1e6:.1f} | {total.distinct / minimum:.3f} | {kernels} |",
        flush=True,
    )
    return int(limit is not None and total.issued > limit * minimum)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
