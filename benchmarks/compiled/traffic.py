"""Bytes that the Triton kernels load and store, counted while they run: ``python -m benchmarks traffic``.

Every load and store of a program is counted with the lanes that its mask lets through, in Triton's interpreter,
at the paper's shapes (batch 32, 128 tokens, width 768) for forward + backward, partial sums included, and for one
assignment and update of 4,096 points by 100 centroids of k-means. Where all programs along one axis of the grid do
the same work on slices of equal size, two of them are run and counted for all (the last slice may be smaller: the
count is then too high by less than one slice).

"issued" counts every access of every program: what the multiprocessors ask their caches for. "device" counts what
device memory has to move: an address that programs on one slice read repeatedly counts once for the slice, since
they are launched side by side, and an address that every slice reads (the matrix A of the backward, at most 0.5 MB)
counts once for the launch. Minimum: every input read once per pass, every output written once.

Ends with 1 if "device" is above 1.3 times the minimum where one program holds all rows or all centroids, and above 2
times where a program holds a tile of Gamma (more than 192 rows; IEEE float32 backward): all inputs are then read once
for the means and once more for the products. Until the kernels ran on a GPU the limit was 1.15 everywhere; there it
turned out that fewer bytes cost more time: 81 parts instead of 132 (K = 100, bfloat16) 86 us instead of 61, Gamma of
K = 300 held on chip by three programs 1,040 us instead of 270. Nothing is timed here. Counts are kept in ``.cache``
until a kernel changes: all of them take about half an hour.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
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

from benchmarks.compiled.json_cache import JsonCache
from benchmarks.paths import CACHE as CACHE_FOLDER
from benchmarks.speed import baselines
from fsd_kernels import _triton, cost
from fsd_kernels.gram import triton as gram
from fsd_kernels.intra_cka import triton as intra
from fsd_kernels.kmeans import triton as kmeans
from fsd_kernels.structure import triton as structure

# The interpreter is chosen when triton is first imported.
IN_TIME = isinstance(language.sum, interpreter.InterpretedFunction)

CACHE = JsonCache(CACHE_FOLDER / "traffic.json")
# Changes when the way of counting does, and so makes the cache start anew.
COUNTER = 1

LIMIT, TILED_LIMIT = 1.3, 2.0
BATCH, TOKENS, WIDTH = 32, 128, 768
POINTS, CENTROIDS = 4096, 100
F = TOKENS * WIDTH

# The axis of the grid along which programs do equal work.
UNIFORM = {
    "_intra_cka_fwd_kernel": 0,
    "_intra_cka_bwd_kernel": 0,
    "_intra_cka_mean_kernel": 0,
    "_intra_cka_tile_kernel": 2,
    "_intra_cka_finish_kernel": 0,
    "_intra_cka_bwd_tile_kernel": 2,
    "_gram_fwd_kernel": 0,
    "_gram_mean_kernel": 0,
    "_gram_tile_kernel": 1,
    "_gram_bwd_kernel": 1,
    "_gram_bwd_tile_kernel": 1,
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
        """Both together."""
        return Traffic(self.issued + other.issued, self.device + other.device)


def _runs(addresses: Array, width: int) -> Array:
    """Runs [start, stop) of bytes, [2, n], of elements of ``width`` bytes at ``addresses`` in rising order."""
    if addresses.size == 0:
        return np.empty((2, 0), dtype=np.int64)
    breaks = np.flatnonzero(np.diff(addresses) != width)
    starts = addresses[np.concatenate(([0], breaks + 1))]
    return np.stack([starts, addresses[np.concatenate((breaks, [-1]))] + width])


def _covered(runs: list[Array]) -> int:
    """Bytes that lie in at least one of the runs."""
    if not runs:
        return 0
    starts, stops = np.concatenate(runs, axis=1)
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], stops[order]
    # What lies before the furthest end so far is counted already.
    reached = np.concatenate((starts[:1], np.maximum.accumulate(stops)[:-1]))
    return int(np.maximum(stops - np.maximum(starts, reached), 0).sum())


class _Counter:
    """Counts the accesses of the programs run since it was made, slice by slice."""

    def __init__(self, axis: int | None) -> None:
        self.axis = axis
        self.slice = 0
        self.issued: dict[int, int] = defaultdict(int)
        # Loads and stores apart: what is read and written again moves twice.
        self.runs: dict[tuple[str, int], list[Array]] = defaultdict(list)

    def note(self, kind: str, pointers: Any, mask: Any) -> None:
        chosen = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)].ravel().astype(np.int64)
        width = pointers.get_element_ty().primitive_bitwidth // 8
        self.issued[self.slice] += chosen.size * width
        self.runs[kind, self.slice].append(_runs(chosen, width))

    def take(self, slices: int) -> Traffic:
        """What ``slices`` slices like the first one and the second one move."""
        device = 0
        for kind in ("load", "store"):
            first, second = self.runs[kind, 0], self.runs[kind, 1]
            own = _covered(first)
            shared = own + _covered(second) - _covered(first + second) if slices > 1 else 0
            device += shared + (own - shared) * slices
        return Traffic(self.issued[0] * slices, device)


@contextmanager
def counting() -> Iterator[dict[str, Traffic]]:
    """Count per kernel. Values are not computed where only two slices of many run."""
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


def kmeans_traffic(dtype: torch.dtype) -> dict[str, Traffic]:
    """One assignment and one update of k-means; sorting the labels, 8 bytes a point, is not counted."""
    points = torch.empty(POINTS, F, dtype=dtype)
    labels = torch.arange(POINTS) % CENTROIDS
    centroids = torch.empty(CENTROIDS, F, dtype=dtype)
    sums, counts = torch.empty(CENTROIDS, F), torch.zeros(CENTROIDS, dtype=torch.int64)
    with counting() as totals:
        kmeans.assign(points, centroids)
        kmeans.update_(sums, counts, points, labels)
    return totals


class _TorchBytes(TorchDispatchMode):
    """Counts the bytes of inputs and outputs of every torch operation that is not a view."""

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
    """Bytes that a loss in torch with autograd moves, forward and backward; nothing is computed."""
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
    """What ``count`` returns, from the cache where neither the kernels nor the way of counting have changed."""
    sources = [*Path(gram.__file__).parents[1].rglob("triton.py"), Path(_triton.__file__)]
    digest = hashlib.sha256(
        repr((COUNTER, [path.read_bytes() for path in sorted(sources)])).encode()
    ).hexdigest()
    key = f"{name}, {kind.name}, {digest}"
    found = CACHE.read().get(key)
    if found is None:
        found = {kernel: list(part) for kernel, part in count().items()}
        CACHE.keep(key, found)
    return {kernel: Traffic(*part) for kernel, part in found.items()}


class Kind(NamedTuple):
    """A dtype and a precision of products."""

    name: str
    dtype: torch.dtype
    precision: str
    """What ``torch.set_float32_matmul_precision`` is given."""


KINDS = (
    Kind("fp32", torch.float32, "highest"),
    Kind("tf32", torch.float32, "high"),
    Kind("bf16", torch.bfloat16, "highest"),
    Kind("fp16", torch.float16, "highest"),
)


def main(argv: list[str]) -> int:
    """Print the table; 1 if a limit is passed."""
    if argv:
        raise SystemExit(f"traffic takes no arguments, got {' '.join(argv)}")
    if not IN_TIME:
        return subprocess.run([sys.executable, "-m", "benchmarks.compiled.traffic"]).returncode
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
