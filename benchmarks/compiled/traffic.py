"""Bytes that the Triton kernels load and store, counted in Triton's interpreter: ``python -m benchmarks traffic``.

The interpreter counts every load and store of a program, with the lanes that its mask lets through. The shapes are
the paper's (batch 32, 128 tokens, width 768), forward + backward with partial sums; for k-means, one assignment and
update of 4,096 points by 100 centroids. If all programs along one axis of the grid do the same work on slices of
equal size, two of them run and stand for all. The last slice may be smaller, so the count can be too high by less
than one slice.

"issued" counts every access of every program: the requests to the caches. "device" estimates the bytes that device
memory moves. An address that programs on one slice read repeatedly counts once for the slice, since these programs
run side by side. An address that every slice reads (the matrix A of the backward, at most 0.5 MB) counts once for the
launch. The minimum reads every input once per pass and writes every output once.

The command exits with 1 if "device" exceeds 1.3 times the minimum where one program holds all rows or all centroids,
or 2 times the minimum where a program holds a tile of Gamma (more than 192 rows; IEEE float32 backward): such kernels
read all inputs once for the means and once for the products. The limit was 1.15 before the kernels ran on a GPU.
There, fewer bytes took more time: 81 parts instead of 132 (K = 100, bfloat16) 86 us instead of 61; Gamma of K = 300
held on chip by three programs 1,040 us instead of 270. Nothing is timed here. Counting everything takes about half an
hour; the counts are kept in ``.cache`` until a kernel changes.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import language
from triton.runtime import interpreter

from benchmarks.compiled.cases import BATCH, KINDS, TOKENS, WIDTH, Kind
from benchmarks.compiled.json_cache import JsonCache
from benchmarks.paths import CACHE as CACHE_FOLDER
from benchmarks.speed import baselines
from fsd_kernels import _triton, cost
from fsd_kernels._numerics import norm_rounding
from fsd_kernels.gram import triton as gram
from fsd_kernels.intra_cka import triton as intra
from fsd_kernels.kmeans import triton as kmeans
from fsd_kernels.structure import triton as structure

# False if triton was imported before this module chose the interpreter.
INTERPRETED = isinstance(language.sum, interpreter.InterpretedFunction)

CACHE = JsonCache(CACHE_FOLDER / "traffic.json")
# Version of the counting below; another one makes the cache start anew.
COUNTER = 2

LIMIT, TILED_LIMIT = 1.3, 2.0
POINTS, CENTROIDS = 4096, 100
F = TOKENS * WIDTH

# The axis of each kernel's grid along which programs do equal work. Those of ``_gram_fwd_kernel`` hold unequal tiles of
# two sides: all of them run.
UNIFORM = {
    "_intra_cka_fwd_kernel": 0,
    "_intra_cka_bwd_kernel": 0,
    "_intra_cka_mean_kernel": 0,
    "_intra_cka_tile_kernel": 2,
    "_intra_cka_finish_kernel": 0,
    "_intra_cka_bwd_tile_kernel": 2,
    "_gram_bwd_kernel": 1,
    "_kmeans_assign_kernel": 0,
    "_kmeans_nearest_kernel": 0,
    "_kmeans_update_kernel": 0,
}

Array = np.ndarray[Any, Any]


class Traffic(NamedTuple):
    """Bytes moved."""

    issued: int
    device: int

    def __add__(self, other: Traffic) -> Traffic:  # type: ignore[override]
        """Add the bytes of both."""
        return Traffic(self.issued + other.issued, self.device + other.device)


def _runs(addresses: Array, width: int) -> Array:
    """Runs [start, stop) of consecutive bytes, [2, n], for elements of ``width`` bytes at rising ``addresses``."""
    if addresses.size == 0:
        return np.empty((2, 0), dtype=np.int64)
    breaks = np.flatnonzero(np.diff(addresses) != width)
    starts = addresses[np.concatenate(([0], breaks + 1))]
    return np.stack([starts, addresses[np.concatenate((breaks, [-1]))] + width])


def _covered(runs: list[Array]) -> int:
    """Number of bytes in the union of the runs."""
    if not runs:
        return 0
    starts, stops = np.concatenate(runs, axis=1)
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], stops[order]
    # Bytes before the furthest end so far are counted already.
    reached = np.concatenate((starts[:1], np.maximum.accumulate(stops)[:-1]))
    return int(np.maximum(stops - np.maximum(starts, reached), 0).sum())


class _Counter:
    """Counts the accesses of one launch, slice by slice."""

    def __init__(self, axis: int | None) -> None:
        self.axis = axis
        self.slice = 0
        self.issued: dict[int, int] = defaultdict(int)
        # Loads and stores apart: bytes that are read and written move twice.
        self.runs: dict[tuple[str, int], list[Array]] = defaultdict(list)

    def note(self, kind: str, pointers: Any, mask: Any) -> None:
        chosen = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)].ravel().astype(np.int64)
        width = pointers.get_element_ty().primitive_bitwidth // 8
        self.issued[self.slice] += chosen.size * width
        self.runs[kind, self.slice].append(_runs(chosen, width))

    def take(self, slices: int) -> Traffic:
        """Return the traffic of ``slices`` slices, all like the first two."""
        device = 0
        for kind in ("load", "store"):
            first, second = self.runs[kind, 0], self.runs[kind, 1]
            covered = _covered(first)
            shared = covered + _covered(second) - _covered(first + second) if slices > 1 else 0
            device += shared + (covered - shared) * slices
        return Traffic(self.issued[0] * slices, device)


@contextmanager
def counting() -> Iterator[dict[str, Traffic]]:
    """Count the traffic of every kernel. Where two slices stand for all, the kernel's results are not complete."""
    counter, totals = _Counter(None), dict[str, Traffic]()
    builder = interpreter.InterpreterBuilder
    load, store, move = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx
    call = interpreter.GridExecutor.__call__

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        counter.note("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counter.note("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_move(self: Any, *index: int) -> None:
        counter.slice = 0 if counter.axis is None else index[counter.axis]
        move(self, *index)

    def counted_call(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal counter
        name = self.fn.__name__
        axis = UNIFORM.get(name)
        counter = _Counter(axis)
        slices = 1
        if axis is not None:
            grid = [*self.grid]
            slices, grid[axis] = grid[axis], min(2, grid[axis])
            self.grid = tuple(grid)
        call(self, *args, **kwargs)
        totals[name] = totals.get(name, Traffic(0, 0)) + counter.take(slices)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    builder.set_grid_idx = counted_move
    interpreter.GridExecutor.__call__ = counted_call
    try:
        yield totals
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.set_grid_idx = move
        interpreter.GridExecutor.__call__ = call


def _features(dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def intra_traffic(dtype: torch.dtype) -> dict[str, Traffic]:
    """Traffic of L_I, forward and backward."""
    x, y = _features(dtype, 0), _features(dtype, 1)
    with counting() as totals:
        _, _, g = intra.forward([x], [y], None)
        intra.backward([x], None, g, torch.ones(1, BATCH), torch.ones(1, BATCH), None)
    return totals


def inter_traffic(dtype: torch.dtype, num_centroid: int) -> dict[str, Traffic]:
    """Traffic of L_G + L_L, forward and backward; the Gram of the teacher's memory is given."""
    x, y = _features(dtype, 0).flatten(1), _features(dtype, 1).flatten(1)
    memories = [torch.empty(num_centroid, F, dtype=dtype).fill_(i) for i in range(2)]
    frozen = torch.zeros(num_centroid + 1, num_centroid + 1)
    with counting() as totals:
        student, teacher = gram.forward([(x, memories[0], None), (y, memories[1], frozen)], None)
        rounding = norm_rounding(torch.float32)
        _, gradients = structure.forward(student, teacher, num_centroid, rounding)
        gram.backward(x, memories[0], None, gradients, torch.ones(4), (True, True))
    return totals


def kmeans_traffic(dtype: torch.dtype) -> dict[str, Traffic]:
    """Traffic of one assignment and one update of k-means, without sorting the labels (8 bytes a point)."""
    points = torch.empty(POINTS, F, dtype=dtype)
    labels = torch.arange(POINTS) % CENTROIDS
    centroids = torch.empty(CENTROIDS, F, dtype=dtype)
    sums, counts = torch.empty(CENTROIDS, F), torch.zeros(CENTROIDS, dtype=torch.int64)
    with counting() as totals:
        kmeans.assign(points, centroids)
        kmeans.update_(sums, counts, points, labels)
    return totals


class _TorchBytes(TorchDispatchMode):
    """Counts the bytes of inputs and outputs of every torch operation, views excepted."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.total += sum(x.numel() * x.element_size() for x in tensors)
        return result


def torch_bytes(
    loss: Callable[[dict[str, Tensor]], Tensor], dtype: torch.dtype, num_centroid: int = 0
) -> int:
    """Bytes that a loss in torch moves with autograd, forward and backward; its tensors hold no data."""
    with torch.device("meta"):
        features = {name: torch.empty(BATCH, TOKENS, WIDTH, dtype=dtype) for name in ("student", "teacher")}
        names = ("student_memory", "teacher_memory") if num_centroid else ()
        features |= {name: torch.empty(num_centroid, F, dtype=dtype) for name in names}
        for name in ("student", "student_memory"):
            if name in features:
                features[name].requires_grad_()
        with _TorchBytes() as counter:
            loss(features).backward()
    return counter.total


def _inter(cka: baselines.Cka) -> Callable[[dict[str, Tensor]], Tensor]:
    parts = baselines.local(cka), baselines.global_(cka)
    return lambda inputs: parts[0](inputs) + parts[1](inputs)


def counted(name: str, kind: Kind, count: Callable[[], dict[str, Traffic]]) -> dict[str, Traffic]:
    """Return ``count()``, or the cached counts if neither the launches nor the way of counting have changed."""
    folder = Path(_triton.__file__).parent
    sources = [*folder.rglob("triton.py"), *folder.rglob("plan.py"), Path(_triton.__file__)]
    digest = hashlib.sha256(
        repr((COUNTER, [path.read_bytes() for path in sorted(sources)])).encode()
    ).hexdigest()
    key = f"{name}, {kind.name}, {digest}"
    found = CACHE.read().get(key)
    if found is None:
        found = {kernel: list(part) for kernel, part in count().items()}
        CACHE.keep(key, found)
    return {kernel: Traffic(*part) for kernel, part in found.items()}


def main(argv: Sequence[str]) -> int:
    """Print the table; return 1 if a pass exceeds its limit."""
    if argv:
        raise SystemExit(f"traffic takes no arguments, got {' '.join(argv)}")
    if not INTERPRETED:
        return subprocess.run([sys.executable, "-m", "benchmarks", "traffic"]).returncode
    torch.set_num_threads(1)
    before = torch.get_float32_matmul_precision()
    worst = 0
    print(
        "| pass | dtype | minimum MB | device MB | ratio | issued MB | ratio | plain torch | released | by kernel |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    try:
        for kind in KINDS:
            torch.set_float32_matmul_precision(kind.precision)
            worst |= _intra_line(kind)
            for num_centroid in (100, 300):
                worst |= _inter_line(kind, num_centroid)
            worst |= _kmeans_line(kind)
    finally:
        torch.set_float32_matmul_precision(before)
    return worst


def _intra_line(kind: Kind) -> int:
    others = [torch_bytes(baselines.intra(cka), kind.dtype) for cka in _BASELINES]
    minimum = BATCH * (4 * F * kind.dtype.itemsize + 2 * TOKENS * TOKENS * 4)
    totals = counted("L_I", kind, lambda: intra_traffic(kind.dtype))
    return _line("L_I", kind, minimum, totals, others)


def _inter_line(kind: Kind, num_centroid: int) -> int:
    others = [torch_bytes(_inter(cka), kind.dtype, num_centroid) for cka in _BASELINES]
    minimum = 4 * (BATCH + num_centroid) * F * kind.dtype.itemsize
    name = f"L_G + L_L, K={num_centroid}"
    totals = counted(name, kind, lambda: inter_traffic(kind.dtype, num_centroid))
    tiled = num_centroid > 100 or kind.name == "fp32"
    return _line(name, kind, minimum, totals, others, TILED_LIMIT if tiled else LIMIT)


def _kmeans_line(kind: Kind) -> int:
    shape = cost.Shape(rows=TOKENS, width=WIDTH, centroids=CENTROIDS, points=POINTS, dtype=kind.dtype)
    minimum = cost.total(cost.minimum("kmeans", shape)).bytes
    name = f"k-means, N={POINTS}, K={CENTROIDS}"
    totals = counted(name, kind, lambda: kmeans_traffic(kind.dtype))
    return _line(name, kind, minimum, totals, [])


_BASELINES = (baselines.plain_cka, baselines.released_cka)


def _line(
    name: str,
    kind: Kind,
    minimum: int,
    totals: dict[str, Traffic],
    others: list[int],
    limit: float = LIMIT,
) -> int:
    total = sum(totals.values(), start=Traffic(0, 0))
    kernels = ", ".join(f"{kernel.strip('_')} {part.issued / 1e6:.1f}" for kernel, part in totals.items())
    numbers = (
        f"{minimum / 1e6:.1f}",
        *(
            part
            for moved in (total.device, total.issued)
            for part in (f"{moved / 1e6:.1f}", f"{moved / minimum:.3f}")
        ),
        *(f"{moved / 1e6:.0f} MB" for moved in others),
        *["-"] * (len(_BASELINES) - len(others)),
    )
    print(f"| {name} | {kind.name} | {' | '.join(numbers)} | {kernels} |", flush=True)
    return int(total.device > limit * minimum)
