"""Plain formulas of the measures and the baselines, as their papers write them; any dtype, float64 for truth.

Rows are tokens of a sample, or samples flattened to F features. RKD builds what its fast form avoids: vectors between
all pairs of rows, [B, B, F]. Gradients come from autograd; tests and benchmarks compare the fast forms with these.
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


def unbiased_hsic(gram_x: Tensor, gram_y: Tensor) -> Tensor:
    """HSIC_1 of two Gram matrices [n, n], n >= 4: the unbiased estimator of Song et al. (JMLR 2012, eq. 5).

    HSIC_1 = (tr(K L) + 1^T K 1 1^T L 1 / ((n - 1)(n - 2)) - 2 / (n - 2) 1^T K L 1) / (n (n - 3)), with the diagonals of
    K and L set to 0.
    """
    n = len(gram_x)
    x, y = gram_x - torch.diag(gram_x.diagonal()), gram_y - torch.diag(gram_y.diagonal())
    products = torch.trace(x @ y)
    sums = x.sum() * y.sum() / ((n - 1) * (n - 2))
    chains = 2 / (n - 2) * (x @ y).sum()
    return (products + sums - chains) / (n * (n - 3))


def unbiased_cka_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - CKA of rows [n, F_s] and [n, F_t] with HSIC_1 in place of HSIC; 0 without structure.

    There is none in fewer than four rows, and in rows that are equal or equally far apart, up to rounding.
    """
    n = len(student)
    if n < 4:
        return student.sum() * 0
    # HSIC_1 ignores where the rows' mean lies, and so less is lost to rounding.
    student, teacher = student - student.mean(dim=0), teacher.detach() - teacher.detach().mean(dim=0)
    gram_s, gram_t = student @ student.T, teacher @ teacher.T
    own, given = unbiased_hsic(gram_s, gram_s), unbiased_hsic(gram_t, gram_t)
    for variance, gram in ((own, gram_s), (given, gram_t)):
        rounding = (64 * torch.finfo(gram.dtype).eps) ** 2 * gram.square().sum()
        if bool(variance * n * (n - 3) <= rounding):
            return student.sum() * 0
    return 1 - unbiased_hsic(gram_s, gram_t) / (own * given).sqrt()


def gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """|K / |K| - L / |L||^2 of the Gram matrices of rows [n, F_s] and [n, F_t], Frobenius norms; 0 for zero rows."""
    gram_s, gram_t = student @ student.T, teacher.detach() @ teacher.detach().T
    if not (bool((gram_s != 0).any()) and bool((gram_t != 0).any())):
        return student.sum() * 0
    return (gram_s / gram_s.norm() - gram_t / gram_t.norm()).square().sum()


def scaled_distance(
    student: Tensor,
    student_memory: Tensor,
    teacher: Tensor,
    teacher_memory: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """F^E with each side's distances divided by their mean over samples and centroids.

    Features are [B, S, D] and memories [K, F]; positions where mask [B, S] is 0 count as zeros, and features narrower
    than their memory end in zeros.
    """
    if len(student) == 0:
        return student.sum() * 0
    sides = []
    for features, memory in ((student, student_memory), (teacher.detach(), teacher_memory.detach())):
        if mask is not None:
            features = features.masked_fill((mask == 0)[..., None], 0.0)
        rows = functional.pad(features.flatten(1), (0, memory.shape[1] - features[0].numel()))
        distances = torch.cdist(rows, memory, compute_mode="donot_use_mm_for_euclid_dist")
        sides.append(distances / distances.mean() if bool(distances.mean() > 0) else distances)
    return (sides[1] - sides[0]).square().mean()
