"""A short random image of a long vector that keeps squared distances: the count sketch, in blocks.

    y[(p + r_b) mod w] = sum over blocks b of  sigma[b w + p] * x[b w + p],        x [F]  ->  y [w]

The F features are cut into blocks of w. Each feature gets a random sign sigma, each block a random rotation
r_b, and the blocks are added up. The map is linear, E ||y||^2 = ||x||^2, and the relative variance of ||y||^2
is at most 2 / w, like that of a dense Gaussian projection, at F additions a vector instead of F w, and with F
signs to store instead of F w numbers. (Count sketch: Charikar, Chen and Farach-Colton 2002; as a
distance-preserving map: Weinberger et al. 2009.)
"""

from __future__ import annotations

import torch
from torch import Tensor


class CountSketch:
    """The map x ``[N, F]`` -> y ``[N, w]`` float32, drawn from ``seed``; the identity where F <= w.

    A vector that is shorter than F is one whose missing entries are zero. Each row is mapped alone, so its
    image does not depend on the batch it came in.

    Args:
        features: F.
        width: w, the length of a sketch.
        seed: Of the local generator that draws signs and rotations.

    Raises:
        ValueError: ``features`` or ``width`` below 1.
    """

    def __init__(self, features: int, width: int, seed: int) -> None:
        if features < 1 or width < 1:
            raise ValueError(f"features and width: expected at least 1, got {features} and {width}")
        self.features = features
        self.width = min(width, features)
        self.exact = features <= width
        generator = torch.Generator().manual_seed(seed)
        blocks = -(-features // self.width)
        self._signs = torch.randint(0, 2, (features,), generator=generator, dtype=torch.float32) * 2 - 1
        self._rotations: list[int] = torch.randint(0, self.width, (blocks,), generator=generator).tolist()

    def __call__(self, points: Tensor) -> Tensor:
        """Return the sketches ``[N, w]`` float32 of points ``[N, F_p]``, F_p <= F, on the points' device."""
        rows, length = points.shape
        if length > self.features:
            raise ValueError(f"points: {length} features, expected at most {self.features}")
        sketch = torch.zeros(rows, self.width, dtype=torch.float32, device=points.device)
        if self.exact:
            sketch[:, :length] = points
            return sketch
        self._signs = self._signs.to(points.device)
        for block, start in enumerate(range(0, length, self.width)):
            stop = min(start + self.width, length)
            signed = points[:, start:stop] * self._signs[start:stop]
            # The rotation splits the block where it wraps around.
            first = self._rotations[block]
            head = min(self.width - first, stop - start)
            sketch[:, first : first + head] += signed[:, :head]
            sketch[:, : stop - start - head] += signed[:, head:]
        return sketch
