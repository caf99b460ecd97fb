"""Clusters random points in a process of its own and prints by how many KiB its memory grew; see ``peak``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fsd_fast.clustering.two_pass import cluster_stream

_BATCH = 50


class RandomPoints:
    """Points [N, F] in batches that are drawn again on every pass, so that they are never in memory together."""

    def __init__(self, rows: int, features: int) -> None:
        self.rows, self.features = rows, features

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.rows, _BATCH):
            generator = torch.Generator().manual_seed(start)
            yield torch.randn(_BATCH, self.features, generator=generator)


def _status_kib(name: str) -> int:
    found = re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise RuntimeError(f"/proc/self/status: expected a line {name}")
    return int(found.group(1))


def main(rows: int, features: int, width: int) -> None:
    """Print the growth in KiB."""
    torch.set_num_threads(1)
    # Load code and buffers that do not depend on the number of samples.
    cluster_stream(torch.randn(200, 600), 20, seed=0, sketch_width=width)
    before = _status_kib("VmRSS")
    cluster_stream(RandomPoints(rows, features), 20, seed=0, sketch_width=width, restarts=2, max_iter=5)
    print(_status_kib("VmHWM") - before)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
