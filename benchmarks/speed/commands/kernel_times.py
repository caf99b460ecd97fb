"""``python -m benchmarks kernel-times``: time every kernel of the losses and of k-means on a GPU.

At the paper's shape (batch 32, 128 tokens, width 768) it runs forward + backward of L_I, of L_G + L_L with K = 100 and
K = 300, and one assignment and update of 4,096 points by 100 centroids. Each kernel's device time is from torch's
profiler: the mean of ten calls with an empty second-level cache. The CPU's time to enqueue a call is printed beside
them. The results are not checked here; the kernel tests do that on the same GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.speed.inputs import Sizes
from benchmarks.tables import aligned
from fsd_kernels import assign, frozen_gram, inter_structure, intra_cka, update

PAPER = Sizes(batch=32, rows=128, width=768, centroids=100, points=4096)
_CALLS = 10
_FLUSH_BYTES = 1 << 30

Call = Callable[[], object]


def _pair(count: int, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A differentiable student [count, S, D], and a teacher that partly follows it."""
    generator = torch.Generator(device).manual_seed(count)
    shape = (2, count, sizes.rows, sizes.width)
    student, noise = torch.randn(shape, generator=generator, device=device)
    return student.to(dtype).requires_grad_(), (student + noise).to(dtype)


def intra_call(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Call:
    """L_I, forward + backward."""
    student, teacher = _pair(sizes.batch, sizes, dtype, device)
    return lambda: torch.autograd.grad(intra_cka(student, teacher).neg_log.mean(), student)


def inter_call(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Call:
    """L_G + L_L, forward + backward."""
    student, teacher = _pair(sizes.batch, sizes, dtype, device)
    student_memory, teacher_memory = (x.flatten(1) for x in _pair(sizes.centroids, sizes, dtype, device))
    student_memory = student_memory.detach().requires_grad_()
    basis = frozen_gram(teacher_memory)

    def call() -> object:
        values = inter_structure(student, teacher, student_memory, basis)
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
    yield "L_I", intra_call(sizes, dtype, device)
    for centroids in (100, 300):
        yield (
            f"L_G + L_L, K={centroids}",
            inter_call(sizes._replace(centroids=centroids), dtype, device),
        )
    yield f"k-means, K={sizes.centroids}", kmeans_call(sizes, dtype, device)


def _host_microseconds(call: Call) -> float:
    """Mean time in which the CPU enqueues a call."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(_CALLS):
        call()
    host = (time.perf_counter() - begin) / _CALLS
    torch.cuda.synchronize()
    return host * 1e6


def _profiled(call: Call | None, flush: Tensor) -> dict[str, float]:
    """Mean microseconds of every kernel in a call, and of those that write ``flush`` before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(_CALLS):
            flush.zero_()
            if call is not None:
                call()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / _CALLS for event in profiler.key_averages()}


def kernel_times(call: Call, flush: Tensor) -> dict[str, float]:
    """Mean microseconds of every kernel in a call; kernels that write ``flush`` alone are left out."""
    flush_alone = _profiled(None, flush)
    found = {name: spent - flush_alone.get(name, 0.0) for name, spent in _profiled(call, flush).items()}
    return {name: spent for name, spent in found.items() if spent > 0.05}


def main(argv: Sequence[str]) -> int:
    """Print one line for each pass: its time on the GPU and on the CPU, and that of each of our kernels."""
    parser = argparse.ArgumentParser(prog="kernel-times", description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--precision", choices=("ieee", "tf32"), default="tf32", help="precision of float32 products"
    )
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("kernel-times needs a GPU, and none is to be had here", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("high" if options.precision == "tf32" else "highest")
    device = torch.device("cuda")
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    kind = options.dtype if options.dtype != "float32" else options.precision
    print(f"{torch.cuda.get_device_name(device)}, {kind}, microseconds")
    table = [["pass", "GPU", "CPU", "kernels"]]
    for name, call in cases(getattr(torch, options.dtype), device):
        host = _host_microseconds(call)
        times = kernel_times(call, flush)
        ours = {
            key.strip("_"): spent for key, spent in times.items() if key.endswith("_kernel") and key[0] == "_"
        }
        total = sum(times.values())
        parts = [f"{key} {spent:.0f}" for key, spent in ours.items()]
        parts.append(f"others {total - sum(ours.values()):.0f}")
        table.append([name, f"{total:.0f}", f"{host:.0f}", ", ".join(parts)])
    print(aligned(table))
    return 0
