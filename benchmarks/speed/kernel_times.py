"""What each kernel of the losses and of k-means takes on a GPU: ``python -m benchmarks kernel-times``.

At the paper's shape (batch 32, 128 tokens, width 768), forward + backward of L_I and of L_G + L_L with K = 100 and
300, and one assignment and update of 4,096 points by 100 centroids: device time of every kernel by torch's profiler,
mean of ten calls, each after the second-level cache was emptied; and the time that the CPU takes to enqueue a call.
Nothing is judged here: the tests do that, on the same GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.speed import report
from fsd_kernels import assign, frozen_gram, inter_structure, intra_cka, update

_BATCH, _ROWS, _WIDTH, _POINTS = 32, 128, 768, 4096
_CALLS = 10
_FLUSH_BYTES = 1 << 30

Work = Callable[[], object]


def _pair(count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A differentiable tensor [count, S, D] and one that partly follows it."""
    generator = torch.Generator(device).manual_seed(count)
    shape = (2, count, _ROWS, _WIDTH)
    own, noise = torch.randn(shape, generator=generator, device=device)
    return own.to(dtype).requires_grad_(), (own + noise).to(dtype)


def cases(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Work]]:
    """(name, call) of what is profiled."""
    student, teacher = _pair(_BATCH, dtype, device)

    def intra() -> object:
        return torch.autograd.grad(intra_cka(student, teacher).neg_log.mean(), student)

    yield "L_I", intra
    for count in (100, 300):
        memory, given = (x.flatten(1) for x in _pair(count, dtype, device))
        memory = memory.detach().requires_grad_()
        basis = frozen_gram(given)

        def inter(memory: Tensor = memory, basis: object = basis) -> object:
            values = inter_structure(student, teacher, memory, basis)  # type: ignore[arg-type]
            return torch.autograd.grad(torch.stack(values).sum(), (student, memory))

        yield f"L_G + L_L, K={count}", inter
    generator = torch.Generator(device).manual_seed(0)
    points = torch.randn(_POINTS, _ROWS * _WIDTH, generator=generator, device=device).to(dtype)
    centroids = points[:100].clone()
    yield "k-means, K=100", lambda: update(points, assign(points, centroids)[0], 100)


def kernel_times(call: Work, flush: Tensor) -> tuple[dict[str, float], float]:
    """Microseconds by kernel, the flush left out, and those that the CPU takes to enqueue the call."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(_CALLS):
        call()
    host = (time.perf_counter() - begin) / _CALLS
    torch.cuda.synchronize()

    def profiled(work: Work | None) -> dict[str, float]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(_CALLS):
                flush.zero_()
                if work is not None:
                    work()
            torch.cuda.synchronize()
        return {event.key: event.self_device_time_total / _CALLS for event in profiler.key_averages()}

    alone = profiled(None)
    found = {name: spent - alone.get(name, 0.0) for name, spent in profiled(call).items()}
    return {name: spent for name, spent in found.items() if spent > 0.05}, host * 1e6


def main(argv: list[str]) -> int:
    """Print a line for every kernel of the project, and one for all others."""
    parser = argparse.ArgumentParser(prog="kernel-times", description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--precision", choices=("ieee", "tf32"), default="tf32", help="of float32 products")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("kernel-times needs a GPU, and none is to be had here", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("high" if options.precision == "tf32" else "highest")
    device = torch.device("cuda")
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    kind = options.dtype if options.dtype != "float32" else options.precision
    print(f"{torch.cuda.get_device_name(device)}, {kind}, microseconds")
    lines = [["pass", "GPU", "CPU", "kernels"]]
    for name, call in cases(getattr(torch, options.dtype), device):
        times, host = kernel_times(call, flush)
        own = {
            key.strip("_"): spent for key, spent in times.items() if key.endswith("_kernel") and key[0] == "_"
        }
        parts = [f"{key} {spent:.0f}" for key, spent in own.items()]
        others = sum(times.values()) - sum(own.values())
        lines.append(
            [name, f"{sum(times.values()):.0f}", f"{host:.0f}", ", ".join([*parts, f"others {others:.0f}"])]
        )
    print(report.aligned(lines))
    return 0
