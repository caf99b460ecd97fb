"""``python -m benchmarks enqueue``: the CPU's own time to enqueue a loss, measured without a GPU.

Every launch of a Triton kernel is replaced by a function that does nothing, and the losses run on CPU tensors of the
paper's shape (batch 32, 128 tokens, width 768), forward + backward. The time left is that of our Python and of torch:
checks, heuristics, allocation, autograd. Triton's launcher and the CUDA runtime are not part of it.

Machines differ, so each time is also given relative to a fixed piece of Python that is timed in the same rounds. The
targets hold for two threads of an AMD EPYC.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.compiled.launches import record, replaced_kernels
from benchmarks.speed import harness, results
from benchmarks.speed.commands.kernel_times import PAPER, Call, inter_call, intra_call
from benchmarks.speed.harness import Measurement, Timed
from benchmarks.speed.inputs import Sizes
from benchmarks.speed.run import DTYPES
from benchmarks.tables import Table, aligned
from fsd_kernels._triton import INTERPRETED, TARGETS

TARGET = "sm_90"
# Microseconds that a loss may take, forward + backward.
TARGETS_US = {"L_I": 70, "L_G + L_L": 100}
_PYTHON = "Python"


def fixed_python() -> int:
    """The piece of Python that other times are relative to: 500 calls, formatted numbers and dictionary entries."""
    lengths: dict[int, int] = {}
    for number in range(500):
        lengths[number] = len(str(number))
    return sum(lengths.values())


class _NoLaunch:
    """Stands in for a kernel, and for the compiled kernel that a launch returns: launching it does nothing."""

    def __init__(self, kernel: Any) -> None:
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: Any) -> Callable[..., _NoLaunch]:
        return self._launch

    def _launch(self, *arguments: Any, **keywords: Any) -> _NoLaunch:
        return self


@contextmanager
def _triton_backend() -> Iterator[None]:
    """Let the ops take their Triton path on CPU tensors; the kernels themselves must be replaced."""
    wanted = {"FSD_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def calls(sizes: Sizes, dtype: torch.dtype) -> dict[str, Call]:
    """The losses, forward + backward, as calls on CPU tensors."""
    cpu = torch.device("cpu")
    return {"L_I": intra_call(sizes, dtype, cpu), "L_G + L_L": inter_call(sizes, dtype, cpu)}


def measure(
    sizes: Sizes, dtype: torch.dtype, seconds: float, min_rounds: int = 5
) -> tuple[Measurement, dict[str, int]]:
    """Time the losses without their launches; return the measurement and the launches of each loss.

    Raises:
        ValueError: Triton was imported with its interpreter, which takes other paths than a GPU.
    """
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET: expected it unset, since the interpreter takes other paths")
    target = TARGETS[TARGET]
    # In this order: kernels that are imported under TRITON_INTERPRET=1 are interpreted ones.
    with replaced_kernels(target, _NoLaunch), _triton_backend():
        found = calls(sizes, dtype)
        contestants = {name: [Timed(lambda: None, _ignoring(call))] for name, call in found.items()}
        contestants[_PYTHON] = [Timed(lambda: None, _ignoring(fixed_python))]
        measured = harness.measure(
            contestants, harness.CpuClock(), seconds=seconds, min_rounds=min_rounds, max_rounds=200
        )
    with _triton_backend():
        launches = {name: len(record(target, _returning_none(call))) for name, call in found.items()}
    return measured, launches


def _ignoring(call: Callable[[], object]) -> Callable[[object], object]:
    return lambda _: call()


def _returning_none(call: Call) -> Callable[[], None]:
    def run() -> None:
        call()

    return run


def table(measured: Measurement, launches: dict[str, int]) -> Table:
    """Table of the losses' times, in microseconds and relative to the fixed piece of Python."""
    python = measured.samples[_PYTHON]
    lines = [["pass", "launches", "us", "quartiles", "x Python", "target, us"]]
    for name, number in launches.items():
        time = harness.spread(measured.samples[name])
        ratio = harness.ratio(measured.samples[name], python)
        lines.append(
            [
                name,
                str(number),
                f"{time.median * 1e6:.0f}",
                f"{time.low * 1e6:.0f} to {time.high * 1e6:.0f}",
                f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
                str(TARGETS_US[name]),
            ]
        )
    return lines


def figures(measured: Measurement, launches: dict[str, int]) -> dict[str, dict[str, float]]:
    """Each loss's launches, median microseconds, and median ratio to the fixed piece of Python."""
    python = measured.samples[_PYTHON]
    return {
        name: {
            "launches": number,
            "us": harness.spread(measured.samples[name]).median * 1e6,
            "ratio": harness.ratio(measured.samples[name], python).median,
        }
        for name, number in launches.items()
    }


def main(argv: Sequence[str]) -> int:
    """Print the time of each loss."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks enqueue",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="time for all rounds (default %(default)g)"
    )
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    measured, launches = measure(PAPER, DTYPES[options.dtype], options.seconds)
    python = harness.spread(measured.samples[_PYTHON]).median
    busy = ", the machine was busy" if measured.canary.noisy else ""
    print(
        f"{results.device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, {options.dtype}, kernels of "
        f"{TARGET} not launched; the fixed piece of Python takes {python * 1e6:.0f} us; "
        f"{len(measured.samples[_PYTHON])} rounds{busy}"
    )
    print(aligned(table(measured, launches)))
    if options.json is not None:
        content = {"losses": figures(measured, launches), "python_us": python * 1e6, "dtype": options.dtype}
        results.write_text(options.json, json.dumps(content, indent=1) + "\n")
    return 0
