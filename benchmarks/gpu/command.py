"""``python -m benchmarks gpu-session``: everything that a GPU has to show, in order of value, in nine minutes.

Stages run one after another as commands of their own: the kernel tests, the kernels' times, the CPU's time to enqueue,
capture as CUDA graphs, training steps, other providers, compute-sanitizer. A stage that fails or exceeds its time is
reported, and the next one begins. ``session.json`` holds all figures, ``session.md`` what was wanted beside what was
found, ``session.log`` the output. Where a session ends early, the same command goes on with the stages that have not
ended well.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch

from benchmarks.gpu import targets
from benchmarks.gpu.session import FAILED, OUT_OF_TIME, Session
from benchmarks.gpu.stages import STAGES, Plan, Stage
from benchmarks.speed import results
from benchmarks.tables import aligned


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu-session",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    folder = os.environ.get("OUT")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(folder) if folder else None,
        metavar="DIR",
        help="folder of the figures (default: $OUT)",
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages (default %(default)g)")
    parser.add_argument(
        "--stages",
        default=",".join(stage.name for stage in STAGES),
        help="comma-separated, in this order (default %(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes; without a GPU, the CPU and Triton's interpreter"
    )
    return parser.parse_args(argv)


def _chosen(text: str) -> list[Stage]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = {stage.name: stage for stage in STAGES}
    for name in names:
        if name not in known:
            raise ValueError(f"--stages: expected some of {', '.join(known)}; got {name!r}")
    return [known[name] for name in names]


def _leave(number: int, _: FrameType | None) -> None:
    """End by an exception, so that the running stage ends too."""
    sys.exit(128 + number)


def main(argv: Sequence[str]) -> int:
    """Run the stages; return 1 if a stage failed or exceeded its time, or if a target is missed.

    Raises:
        ValueError: There is no output folder or no GPU, or an argument is wrong.
    """
    options = _options(argv)
    stages = _chosen(options.stages)
    if options.output is None:
        raise ValueError("--output: expected a folder, or its name in $OUT")
    if not options.minutes > 0:
        raise ValueError(f"--minutes: expected more than 0, got {options.minutes:g}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        raise ValueError(
            "gpu-session: expected a GPU, torch finds none; --quick tries the session without one"
        )
    session = Session(options.output, Plan(device, options.quick), results.environment(torch.device(device)))
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        session.run([stage for stage in stages if not session.ended_well(stage.name)], options.minutes)
    finally:
        signal.signal(signal.SIGTERM, before)
    judged = session.targets()
    print(f"\n{aligned(targets.table(judged))}\n\nwrote {session.file} and {session.output / 'session.md'}")
    ended = [stage["status"] for stage in session.content["stages"].values()]
    missed = any(target.passed is False for target in judged)
    return int(missed or FAILED in ended or OUT_OF_TIME in ended)
