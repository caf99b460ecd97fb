"""``python -m benchmarks kernel-times``: time every kernel of the losses and of k-means on a GPU.

At the paper's shape (batch 32, 128 tokens, width 768) it runs forward + backward of L_I, of L_G + L_L with K = 100 and
K = 300, and one assignment and update of 4,096 points by 100 centroids. Each kernel's device time is from torch's
profiler: the mean of ten calls with an empty second-level cache. The CPU's time to enqueue a call is printed beside
them. The results are not checked here; the kernel tests do that on the same GPU.

With ``--quick`` the shape is a tiny one. On a CPU, for a trial of the command, the profiler times torch's operators.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.speed import results
from benchmarks.speed.inputs import Sizes
from benchmarks.tables import aligned
from fsd_kernels import assign, frozen_gram, inter_structure, intra_cka, update

PAPER = Sizes(batch=32, rows=128, width=768, centroids=100, points=4096)
TINY = Sizes(batch=4, rows=16, width=32, centroids=100, points=120)
_CALLS = 10
_FLUSH_BYTES = {"cuda": 1 << 30, "cpu": 1 << 20}

Call = Callable[[], Sequence[Tensor]]


class Times(NamedTuple):
    """Microseconds of one pass."""

    device: float
    """All kernels."""
    host: float
    """The CPU's time to enqueue the pass."""
    kernels: dict[str, float]
    """Each kernel of ours."""


def _pair(count: int, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A differentiable student [count, S, D], and a teacher that partly follows it."""
    generator = torch.Generator(device).manual_seed(count)
    shape = (2, count, sizes.rows, sizes.width)
    student, noise = torch.randn(shape, generator=generator, device=device)
    return student.to(dtype).requires_grad_(), (student + noise).to(dtype)


def intra_call(sizes: Sizes, dtype: torch.dtype, device: torch.device, backward: bool = True) -> Call:
    """L_I, forward + backward, or the forward alone."""
    student, teacher = _pair(sizes.batch, sizes, dtype, device)

    def call() -> Sequence[Tensor]:
        values = intra_cka(student, teacher)
        return torch.autograd.grad(values.neg_log.mean(), student) if backward else values

    return call


def inter_call(sizes: Sizes, dtype: torch.dtype, device: torch.device, backward: bool = True) -> Call:
    """L_G + L_L, forward + backward, or the forward alone."""
    student, teacher = _pair(sizes.batch, sizes, dtype, device)
    student_memory, teacher_memory = (x.flatten(1) for x in _pair(sizes.centroids, sizes, dtype, device))
    student_memory = student_memory.detach().requires_grad_()
    basis = frozen_gram(teacher_memory)

    def call() -> Sequence[Tensor]:
        values = inter_structure(student, teacher, student_memory, basis)
        if not backward:
            return values
        return torch.autograd.grad(torch.stack(values).sum(), (student, student_memory))

    return call


def kmeans_call(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Call:
    """One assignment and update."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (sizes.points, sizes.rows * sizes.width)
    points = torch.randn(shape, generator=generator, device=device).to(dtype)
    centroids = points[: sizes.centroids].clone()
    return lambda: update(points, assign(points, centroids)[0], sizes.centroids)


def cases(dtype: torch.dtype, device: torch.device, sizes: Sizes = PAPER) -> Iterator[tuple[str, Call]]:
    """Yield the name and the call of every profiled pass."""
    yield "L_I, forward", intra_call(sizes, dtype, device, backward=False)
    yield "L_I", intra_call(sizes, dtype, device)
    few, many = sizes.centroids, 3 * sizes.centroids
    yield f"L_G + L_L, K={few}, forward", inter_call(sizes, dtype, device, backward=False)
    for centroids in (few, many):
        yield (
            f"L_G + L_L, K={centroids}",
            inter_call(sizes._replace(centroids=centroids), dtype, device),
        )
    yield f"k-means, K={sizes.centroids}", kmeans_call(sizes, dtype, device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _host_microseconds(call: Call, device: torch.device) -> float:
    """Mean time in which the CPU enqueues a call."""
    call()
    _wait(device)
    begin = time.perf_counter()
    for _ in range(_CALLS):
        call()
    host = (time.perf_counter() - begin) / _CALLS
    _wait(device)
    return host * 1e6


def _profiled(call: Call | None, flush: Tensor) -> dict[str, float]:
    """Mean microseconds of every kernel in a call, and of those that write ``flush`` before it."""
    on_gpu = flush.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        for _ in range(_CALLS):
            flush.zero_()
            if call is not None:
                call()
        _wait(flush.device)
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return {event.key: getattr(event, name) / _CALLS for event in profiler.key_averages()}


def kernel_times(call: Call, flush: Tensor) -> dict[str, float]:
    """Mean microseconds of every kernel in a call; kernels that write ``flush`` alone are left out."""
    flush_alone = _profiled(None, flush)
    found = {name: spent - flush_alone.get(name, 0.0) for name, spent in _profiled(call, flush).items()}
    return {name: spent for name, spent in found.items() if spent > 0.05}


def measure(call: Call, flush: Tensor) -> Times:
    """Time one pass on ``flush``'s device; ``flush`` fills the second-level cache before each call."""
    host = _host_microseconds(call, flush.device)
    times = kernel_times(call, flush)
    ours = {
        name.strip("_"): spent
        for name, spent in times.items()
        if name.endswith("_kernel") and name.startswith("_")
    }
    return Times(sum(times.values()), host, ours)


def _line(name: str, found: Times) -> list[str]:
    parts = [f"{kernel} {spent:.0f}" for kernel, spent in found.kernels.items()]
    parts.append(f"others {found.device - sum(found.kernels.values()):.0f}")
    return [name, f"{found.device:.0f}", f"{found.host:.0f}", ", ".join(parts)]


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks kernel-times",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--precision", choices=("ieee", "tf32"), default="tf32", help="precision of float32 products"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to try the command")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times, again after each pass")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Print one line for each pass: its time on the GPU and on the CPU, and that of each of our kernels."""
    options = _options(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("kernel-times needs a GPU, and none is to be had here", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("high" if options.precision == "tf32" else "highest")
    device = torch.device(options.device)
    flush = torch.empty(_FLUSH_BYTES[options.device], dtype=torch.uint8, device=device)
    kind = options.dtype if options.dtype != "float32" else options.precision
    content = {"device": results.device_name(device), "kind": kind, "passes": {}}
    table = [["pass", "device", "CPU", "kernels"]]
    for name, call in cases(getattr(torch, options.dtype), device, TINY if options.quick else PAPER):
        found = measure(call, flush)
        table.append(_line(name, found))
        content["passes"][name] = found._asdict()
        if options.json is not None:
            results.write_text(options.json, json.dumps(content, indent=1) + "\n")
    print(f"{content['device']}, {kind}, microseconds")
    print(aligned(table))
    return 0
