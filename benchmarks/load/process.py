"""A measurement in a process of its own, whose memory holds nothing of others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.paths import ROOT


def measure(module: str, *arguments: object, threads: int) -> dict[str, Any]:
    """Run a module of this package and return the figures that it prints last.

    Raises:
        RuntimeError: It failed; what it said last is the message.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": str(threads),
        # Give freed blocks back to the system at once. Free blocks in the heap would hide a part of the growth.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
    }
    command = [sys.executable, "-m", f"benchmarks.load.{module}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)}: exit status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
        )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures
