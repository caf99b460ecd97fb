"""Plain formulas of the baselines, as their papers write them; any dtype, float64 for truth.

Rows are samples, flattened to F features. Everything here builds what the fast forms avoid: vectors between all
pairs of rows, [B, B, F]. Gradients come from autograd; tests and benchmarks compare the fast forms with these.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def _distances(rows: Tensor) -> Tensor:
    """|x_i - x_j|, [B, B]; 0 with gradient 0 for equal rows."""
    squares = (rows[:, None] - rows[None]).square().sum(dim=2)
    apart = squares > 0
    return torch.where(apart, torch.where(apart, squares, 1.0).sqrt(), 0.0)


def _relative_distances(rows: Tensor) -> Tensor:
    """Distances divided by their mean over the pairs i != j; 0 where all rows are equal."""
    distances = _distances(rows)
    mean = distances.sum() / (len(rows) * (len(rows) - 1))
    return distances / mean if bool(mean > 0) else distances


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance-wise RKD of rows [B, F_s] and [B, F_t]: Huber's loss of relative distances, mean over i != j."""
    pairs = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    if not bool(pairs.any()):
        return student.sum() * 0
    return functional.smooth_l1_loss(
        _relative_distances(student)[pairs], _relative_distances(teacher.detach())[pairs]
    )


def _cosines(rows: Tensor) -> Tensor:
    """Cosines of the angles at x_j between x_i and x_k, as [j, i, k]; 0 where x_j equals one of them."""
    vectors = rows[None] - rows[:, None]
    lengths = _distances(rows)[..., None]
    units = torch.where(lengths > 0, vectors / torch.where(lengths > 0, lengths, 1.0), 0.0)
    return units @ units.transpose(1, 2)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Angle-wise RKD of rows [B, F_s] and [B, F_t]: Huber's loss of cosines, mean over distinct i, j, k."""
    index = torch.arange(len(student), device=student.device)
    j, i, k = index[:, None, None], index[None, :, None], index
    triplets = (i != j) & (j != k) & (i != k)
    if not bool(triplets.any()):
        return student.sum() * 0
    return functional.smooth_l1_loss(_cosines(student)[triplets], _cosines(teacher.detach())[triplets])
