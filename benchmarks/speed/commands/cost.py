"""``python -m benchmarks cost``: predict bytes, flops, launches and times on a device that is not here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks.speed import harness, results
from benchmarks.speed.run import DTYPES
from benchmarks.tables import Table, aligned
from fsd_kernels import cost


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cost")
    parser.add_argument("--device", default="h100", help=f"{', '.join(cost.DEVICES)} or cpu (measured)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rows", type=int, default=128, help="tokens per sample")
    parser.add_argument("--width", type=int, default=768, help="hidden size")
    parser.add_argument("--teacher-width", type=int, default=0, help="0: as the student's")
    parser.add_argument("--centroids", type=int, default=100)
    parser.add_argument("--points", type=int, default=4096)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument(
        "--precision", choices=("tf32", "ieee"), default="tf32", help="precision of float32 products"
    )
    return parser


def _device(name: str) -> cost.Device:
    if name in cost.DEVICES:
        return cost.DEVICES[name]
    if name != "cpu":
        raise ValueError(f"--device: expected {', '.join(cost.DEVICES)} or cpu, got {name!r}")
    cpu = torch.device("cpu")
    measured = harness.ceilings(cpu, harness.make_clock(cpu))
    return cost.Device(
        f"{results.device_name(cpu)}, {torch.get_num_threads()} threads, measured now",
        measured.copy,
        {"fp32": measured.matmul},
    )


def _lines(
    op: str, stages: dict[str, cost.Cost], device: cost.Device, dtype: torch.dtype, precision: str
) -> Table:
    """One line for each stage and one for their total."""
    lines = []
    for name, stage in {**stages, "total": cost.total(stages)}.items():
        timed = stages if name == "total" else {name: stage}
        lines.append(
            [
                op,
                name,
                f"{stage.bytes / 1e6:.1f}",
                f"{stage.flops / 1e9:.2f}",
                str(stage.launches),
                f"{device.memory_seconds(timed) * 1e6:.1f}",
                f"{device.matmul_seconds(timed, dtype, precision) * 1e6:.1f}",
                f"{device.seconds(timed, dtype, precision) * 1e6:.1f}",
            ]
        )
    return lines


def main(argv: Sequence[str]) -> int:
    """Print the prediction."""
    options = _parser().parse_args(argv)
    device = _device(options.device)
    dtype, precision = DTYPES[options.dtype], options.precision
    shape = cost.Shape(
        options.batch,
        options.rows,
        options.width,
        options.teacher_width,
        options.centroids,
        options.points,
        dtype=dtype,
    )
    print(
        f"Prediction for {device.name}: nothing was run on it. Times are a lower bound from its peak rates, without "
        "launch overhead."
    )
    table = [["op", "stage", "MB", "GFLOP", "launches", "memory us", "matmul us", "roofline us"]]
    for op in cost.OPS:
        table += _lines(f"{op}, minimum", cost.minimum(op, shape), device, dtype, precision)
        if device.target is not None:
            stages = cost.triton(op, shape, device.target, precision)
            table += _lines(f"{op}, kernels", stages, device, dtype, precision)
    print(aligned(table))
    return 0
