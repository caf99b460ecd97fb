"""k-means++: starting centroids are points, drawn in proportion to their squared distances.

    P(next seed = i)  ~  min over seeds s of ||x_i - x_s||^2

and, as scikit-learn does, the best of a few draws is kept (Arthur and Vassilvitskii 2007, section 5: greedy).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A squared distance below this fraction of the two squared norms is rounding: the points count as duplicates.
_ROUNDING = 1e-5


# Points are drawn by distances in a sketch this wide, or by their own where they are narrower.
SEEDING_WIDTH = 1024


def new_generator(seed: int | None) -> torch.Generator:
    """A generator of its own on the CPU; None seeds it differently every time."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def draw_sketch_seed(generator: torch.Generator) -> int:
    """A seed for the sketch by which the start is drawn."""
    return int(torch.randint(1 << 62, (1,), generator=generator))


def sort_centred_(sketches: Tensor, order: Tensor) -> None:
    """Put the rows in ``order`` and the origin at their mean, in place.

    Distances do not change with the origin, and rounding is least around the mean. Columns a few at a time: the
    sketches are the largest thing in memory.
    """
    for columns in sketches.split(64, dim=1):
        ordered = columns[order]
        columns.copy_(ordered.sub_(ordered.mean(dim=0)))


def draw_seeds(sketches: Tensor, n_clusters: int, init: str, generator: torch.Generator) -> Tensor:
    """Draw the points that k-means starts from.

    Args:
        sketches: ``[N, w]`` of all points, sorted and centred.
        n_clusters: K <= N.
        init: "k-means++" or "random" (uniformly).
        generator: On the CPU.

    Returns:
        K different row numbers, int64 on the CPU.
    """
    if init == "random":
        return torch.randperm(sketches.shape[0], generator=generator)[:n_clusters]
    return k_means_plus_plus(sketches, n_clusters, generator)


def k_means_plus_plus(points: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Draw the rows that k-means starts from.

    Args:
        points: ``[N, w]`` float32, centred: squared distances are read off inner products.
        n_clusters: K <= N.
        generator: On the CPU; the only source of randomness.

    Returns:
        K different row numbers, int64 ``[K]`` on the CPU. Where there are fewer than K distinct points, the
        last rows are drawn uniformly from those not yet chosen.
    """
    rows = points.shape[0]
    squared_norms = torch.linalg.vector_norm(points, dim=1).square_()

    def squared_distances(candidates: Tensor) -> Tensor:  # [N, candidates]
        scale = squared_norms[:, None] + squared_norms[candidates]
        distances = torch.addmm(scale, points, points[candidates].t(), alpha=-2)
        return distances.masked_fill_(distances <= _ROUNDING * scale, 0)

    trials = 2 + int(math.log(n_clusters))
    first = torch.randint(rows, (1,), generator=generator).to(points.device)
    chosen = [int(first)]
    closest = squared_distances(first).squeeze(1)
    while len(chosen) < n_clusters:
        cumulative = closest.cumsum(0, dtype=torch.float64)
        potential = float(cumulative[-1])
        draws = torch.rand(trials, generator=generator, dtype=torch.float64)
        if potential == 0:
            break
        # Right of the draw: a point at distance zero adds nothing to the sum and is never hit.
        candidates = torch.searchsorted(cumulative, (draws * potential).to(points.device), right=True)
        candidates.clamp_(max=rows - 1)
        distances = torch.minimum(squared_distances(candidates), closest[:, None])
        best = int(distances.sum(dim=0, dtype=torch.float64).argmin())
        chosen.append(int(candidates[best]))
        closest = distances[:, best].contiguous()
    if len(chosen) < n_clusters:
        unused = torch.ones(rows, dtype=torch.bool)
        unused[chosen] = False
        left = unused.nonzero().flatten()
        picks = torch.randperm(left.shape[0], generator=generator)[: n_clusters - len(chosen)]
        chosen.extend(left[picks].tolist())
    return torch.tensor(chosen, dtype=torch.int64)
