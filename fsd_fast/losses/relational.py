"""Relational knowledge distillation, RKD (Park, Kim, Lu, Cho, CVPR 2019), read off B x B Gram matrices.

    psi_D(x_i, x_j)      = |x_i - x_j| / mu,   mu = mean over i != j of |x_i - x_j|
    psi_A(x_i, x_j, x_k) = cos of the angle at x_j = <x_i - x_j, x_k - x_j> / (|x_i - x_j| |x_k - x_j|)
    L_D = mean over i != j of         l(psi_D of the student, psi_D of the teacher)
    L_A = mean over distinct i, j, k of l(psi_A of the student, psi_A of the teacher)
    l(a, b) = (a - b)^2 / 2 where |a - b| <= 1, else |a - b| - 1/2        (Huber)

Both need inner products alone, with g the Gram matrix of the samples:

    |x_i - x_j|^2 = g_ii + g_jj - 2 g_ij,     <x_i - x_j, x_k - x_j> = g_ik - g_ij - g_jk + g_jj

so L_A costs B^3 numbers where the usual form costs B^2 F or B^3 F. Neither changes when all samples are shifted, so
the centred Gram matrix serves. The paper sums over pairs and triplets; means keep the weights free of B.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fsd_fast.losses._checks import check_choice, check_weights
from fsd_fast.losses.defaults import BACKEND, DEFAULTS
from fsd_fast.losses.gather import Gathers, gammas
from fsd_fast.losses.structures import PadFeatures, pair_layers

# Cosines that are in memory at once: more than that, and the backward computes them again.
_MOST_COSINES = 2**24


class RelationalOutput(NamedTuple):
    """What ``RelationalLoss`` returns; scalars."""

    loss: Tensor
    """distance_weight L_D + angle_weight L_A."""
    distance: Tensor
    """L_D."""
    angle: Tensor
    """L_A."""


def _distances(samples: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """|x_i - x_j| of a Gram matrix, and 1 / |x_i - x_j|; both are 0, without a gradient, for equal samples.

    Samples count as equal where |x_i - x_j|^2 is no more than the rounding of the terms that it is a sum of.
    """
    squares = samples.diagonal()
    both = squares[:, None] + squares
    raw = both - 2 * samples
    # A comparison with NaN is false, so samples that are not finite are apart and the loss is NaN.
    apart = ~(raw <= rounding * (both + 2 * samples.abs()))
    apart.fill_diagonal_(False)
    distances = torch.where(apart, raw, 1.0).sqrt()
    return torch.where(apart, distances, 0.0), torch.where(apart, 1 / distances, 0.0)


def _relative(distances: Tensor) -> Tensor:
    """Distances divided by their mean over the pairs i != j; 0 where all samples are equal."""
    mean = distances.sum() / (len(distances) * (len(distances) - 1))
    return distances / torch.where(mean == 0, 1.0, mean)


def _cosines(samples: Tensor, inverse: Tensor, vertices: Tensor) -> Tensor:
    """psi_A at some vertices j, as [j, i, k]; 0 where j equals i or k."""
    to_vertex, scale = samples[vertices], inverse[vertices]
    own = samples.diagonal()[vertices]
    products = samples - to_vertex[:, :, None] - to_vertex[:, None] + own[:, None, None]
    return products * scale[:, :, None] * scale[:, None]


def _angle_sum(
    student: Tensor, student_inverse: Tensor, teacher: Tensor, teacher_inverse: Tensor, vertices: Tensor
) -> Tensor:
    """Sum of l over the triplets with some vertices j."""
    distinct = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    # Entries with i = j or k = j are 0 on both sides.
    return functional.smooth_l1_loss(
        torch.where(distinct, _cosines(student, student_inverse, vertices), 0.0),
        torch.where(distinct, _cosines(teacher, teacher_inverse, vertices), 0.0),
        reduction="sum",
    )


class RelationalLoss(Gathers, nn.Module):
    """Distance-wise and angle-wise RKD: which samples are far apart, and at what angles they see each other.

    Args:
        distance_weight: Weight of L_D; with 0 it is not computed.
        angle_weight: Weight of L_A; with 0 it is not computed.
        pad_features: "include": all S positions count. "exclude": positions with attention mask 0 count as zeros.
        backend: Of the Gram matrices: "auto", "triton", "eager" or "reference".

    Raises:
        ValueError: A weight is negative, or ``pad_features`` is none of the named values.
    """

    def __init__(
        self,
        distance_weight: float = DEFAULTS.rkd_distance_weight,
        angle_weight: float = DEFAULTS.rkd_angle_weight,
        pad_features: PadFeatures = "include",
        backend: str = BACKEND,
    ) -> None:
        super().__init__()
        check_weights(distance_weight=distance_weight, angle_weight=angle_weight)
        check_choice("pad_features", pad_features, get_args(PadFeatures))
        self.distance_weight, self.angle_weight = distance_weight, angle_weight
        self.pad_features, self.backend = pad_features, backend

    def extra_repr(self) -> str:
        """Show the settings in repr."""
        return (
            f"distance_weight={self.distance_weight}, angle_weight={self.angle_weight}, "
            f"pad_features={self.pad_features!r}, backend={self.backend!r}, gather={self.gather}"
        )

    def forward(
        self, student: Tensor, teacher: Tensor, attention_mask: Tensor | None = None
    ) -> RelationalOutput:
        """Return the weighted sum and both terms, float32 scalars (float64 for float64 features).

        Equal samples have distance 0, and 0 in place of the cosines at them, without a gradient. L_D is 0 for fewer
        than two samples, L_A for fewer than three.

        Args:
            student: [B, S, D_s], differentiable.
            teacher: [B, S, D_t]; a constant.
            attention_mask: [B, S], 1 = keep; used under pad_features="exclude".

        Raises:
            TypeError: Features are not floating tensors.
            ValueError: Shapes or devices do not fit.
        """
        ((student, teacher),) = pair_layers(student, teacher)
        mask = attention_mask if self.pad_features == "exclude" else None
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        rounding = 64 * torch.finfo(dtype).eps
        both = gammas(student, teacher, mask=mask, backend=self.backend, gather=self.gather)
        # The last row belongs to the samples' mean.
        own, given = (gamma[:-1, :-1] for gamma in both)
        own_distances, own_inverse = _distances(own, rounding)
        given_distances, given_inverse = _distances(given, rounding)
        distance = angle = own.sum() * 0
        batch = len(own)
        if self.distance_weight and batch > 1:
            total = functional.smooth_l1_loss(
                _relative(own_distances), _relative(given_distances), reduction="sum"
            )
            distance = total / (batch * (batch - 1))
        if self.angle_weight and batch > 2:
            vertices = torch.arange(batch, device=own.device).split(max(1, _MOST_COSINES // batch**2))
            sides = own, own_inverse, given, given_inverse
            if len(vertices) == 1:
                total = _angle_sum(*sides, vertices[0])
            else:
                parts = [checkpoint(_angle_sum, *sides, part, use_reentrant=False) for part in vertices]
                total = torch.stack(parts).sum()
            angle = total / (batch * (batch - 1) * (batch - 2))
        loss = self.distance_weight * distance + self.angle_weight * angle
        return RelationalOutput(loss.to(dtype), distance.to(dtype), angle.to(dtype))
