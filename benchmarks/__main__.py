"""Runs the command that is named first; without one, measures ops. The package's docstring lists the commands."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "bench": "benchmarks.speed.commands.bench",
    "cost": "benchmarks.speed.commands.cost",
    "report": "benchmarks.speed.commands.report",
    "compare": "benchmarks.speed.commands.compare",
    "kernel-times": "benchmarks.speed.commands.kernel_times",
    "enqueue": "benchmarks.speed.commands.enqueue",
    "capture": "benchmarks.speed.commands.capture",
    "gpu-session": "benchmarks.gpu.command",
    "rkd": "benchmarks.speed.commands.rkd",
    "memory": "benchmarks.memory.command",
    "train": "benchmarks.train.command",
    "load": "benchmarks.load.command",
    "kernels-report": "benchmarks.compiled.kernels_report",
    "traffic": "benchmarks.compiled.traffic",
    "rounding": "benchmarks.compiled.rounding",
    "mutate": "benchmarks.compiled.mutate",
}
"""The module of each command. Its ``main(argv)`` returns the exit status."""

MEASURE = "benchmarks.speed.commands.measure"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 if a check failed, 2 if an argument is wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    module = COMMANDS.get(arguments[0]) if arguments else None
    name, rest = (MEASURE, arguments) if module is None else (module, arguments[1:])
    try:
        return int(importlib.import_module(name).main(rest))
    except (ValueError, FileNotFoundError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
