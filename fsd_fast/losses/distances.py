"""F^E with distances on a common scale, read off two Gamma matrices (see ``fsd_kernels.gram``).

    F^E = mean over samples i and centroids j of (d_T,ij / mu_T - d_S,ij / mu_S)^2,   d_ij = |h_i - m_j|

mu is the mean of d over samples and centroids, on each side, as in RKD. The distances of a narrow student and of a wide
teacher then are of the same size, and so are F^E and F^C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fsd_fast.losses import reference
from fsd_fast.losses.gather import gammas
from fsd_kernels import GramBasis, InterStructure, inter_structure, resolve_backend, structure


def _distances(gamma: Tensor, num_centroid: int, rounding: float) -> Tensor:
    """|h_i - m_j|, [B, K]; 0, without a gradient, where it is only the rounding of the terms it is a sum of."""
    k = num_centroid
    m, h = slice(0, k), slice(k + 1, len(gamma) - 1)
    squares, shift = gamma.diagonal(), gamma[-1]
    # h_i - m_j = (h_i - mu_h) + (mu_h - mu_m) - (m_j - mu_m)
    of_h, of_m = squares[h] + 2 * shift[h] + shift[-1], squares[m] - 2 * shift[m]
    raw = of_h[:, None] + of_m - 2 * gamma[h, m]
    size, size_shift = squares.abs(), shift.abs()
    sizes = (size[h] + 2 * size_shift[h] + size_shift[-1])[:, None] + (size[m] + 2 * size_shift[m])
    # A comparison with NaN is false: what is not finite stays.
    apart = ~(raw <= rounding * (sizes + 2 * gamma[h, m].abs()))
    return torch.where(apart, torch.where(apart, raw, 1.0).sqrt(), 0.0)


def _relative(distances: Tensor) -> Tensor:
    mean = distances.mean()
    return distances / torch.where(mean == 0, 1.0, mean)


def _scaled_distance(student: Tensor, teacher: Tensor, num_centroid: int, rounding: float) -> Tensor:
    """F^E of two Gamma matrices; a squared distance up to ``rounding`` of its terms' size is 0."""
    if len(student) == num_centroid + 2:  # no samples
        return student.sum() * 0
    own = _relative(_distances(student, num_centroid, rounding))
    given = _relative(_distances(teacher, num_centroid, rounding))
    return (given - own).square().mean()


def scaled_structures(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor,
    teacher_memory: GramBasis,
    mask: Tensor | None,
    backend: str,
    gather: bool,
) -> InterStructure:
    """As ``fsd_kernels.inter_structure``, with F^E of distances that are divided by their mean.

    Args:
        student: [B, S, D_s], differentiable.
        teacher: [B, S, D_t]; a constant.
        student_memory: [K, F] with F >= S * D_s, differentiable.
        teacher_memory: [K, F] with F >= S * D_t; a constant.
        mask: [B, S], 1 = keep; dropped positions count as zeros.
        backend: "auto", "triton", "eager" or "reference" (the formulas on the features themselves).
        gather: Whether the batch is that of all processes together; ``teacher_memory`` then is the basis of
            ``own_positions``.
    """
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    if not gather and resolve_backend(backend, student.device, "gram") == "reference":
        read = inter_structure(student, teacher, student_memory, teacher_memory, mask, backend="reference")
        memories = student_memory.to(dtype), teacher_memory.memory.to(dtype)
        distance = reference.scaled_distance(
            student.to(dtype), memories[0], teacher.to(dtype), memories[1], mask
        )
        return read._replace(distance=distance)
    own, given = gammas(
        student, teacher, student_memory, teacher_memory, mask, backend=backend, gather=gather
    )
    centroids = len(student_memory)
    # What counts as rounding follows from the dtype: that of the features, though sums are float64 on a CPU.
    read = structure(own.to(dtype), given.to(dtype), centroids, backend=backend)
    distance = _scaled_distance(own, given, centroids, 64 * torch.finfo(dtype).eps)
    return read._replace(distance=distance.to(dtype))
