"""Clusters random points in a process of its own and prints by how many bytes its memory grew; see ``peak``."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.resident import peak_resident_bytes, resident_bytes
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


def main(rows: int, features: int, width: int) -> None:
    """Print the growth in bytes."""
    torch.set_num_threads(1)
    # Load code and buffers that do not depend on the number of samples.
    cluster_stream(torch.randn(200, 600), 20, seed=0, sketch_width=width)
    before = resident_bytes()
    cluster_stream(RandomPoints(rows, features), 20, seed=0, sketch_width=width, restarts=2, max_iter=5)
    print(peak_resident_bytes() - before)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
