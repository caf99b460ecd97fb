"""Growth of the process's peak memory with the number of samples, against the bytes of a sketch."""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from typing import Any

from benchmarks.memory.numbers import Number
from benchmarks.paths import ROOT

FEATURES, WIDTH = 16384, 2048
ROWS = (2000, 4000, 8000)


def _peak_bytes(rows: int) -> int:
    """Growth of the resident memory while a new process clusters so many samples."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        # Give freed blocks back to the system at once. Free blocks in the heap would hide a part of the growth.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
    }
    command = [sys.executable, "-m", "benchmarks.memory.peak_process", str(rows), str(FEATURES), str(WIDTH)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def peak(options: argparse.Namespace) -> tuple[list[Number], dict[str, Any]]:
    """Measure how much the peak memory grows from one number of samples to the next."""
    peaks = [_peak_bytes(rows) for rows in ROWS]
    pairs = list(zip(ROWS, peaks, strict=True))
    sketch = 4 * WIDTH
    growth = [
        (after - before) / (more - fewer) / sketch
        for (fewer, before), (more, after) in itertools.pairwise(pairs)
    ]
    print(
        f"peak memory at F = {FEATURES}, w = {WIDTH}: "
        + ", ".join(f"N = {rows}: {peak / 2**20:.0f} MiB" for rows, peak in pairs)
        + f"; growth per sample, in sketches: {', '.join(f'{one:.2f}' for one in growth)} "
        f"(a point: {FEATURES / WIDTH:g})",
        flush=True,
    )
    # A sample has its sketch, an image half as wide for k-means++, and that image's centred copy.
    limit = Number.at_most("peak memory: sketches per sample", max(growth), 2.25)
    return [limit], {"rows": ROWS, "peaks": peaks}
