"""The between-sample structures, written as the paper's formulas read; any dtype, float64 for truth.

With h the flattened features of B samples [B, F], m the K centroids of a memory [K, F], T teacher, S student:

    L_L  = -log CKA(h_S, h_T)                                  local inter-feature, rows are samples
    F_MM = -log CKA(m_S, m_T)                                  rows are centroids
    F^E  = mean_ij (d(h_S_i, m_S_j) - d(h_T_i, m_T_j))^2       d: Euclidean distance
    F^C  = the same with d: cosine similarity

Gradients come from autograd. ``structure`` states the same four on Gamma matrices (see ``fsd_kernels.gram``).
"""

from __future__ import annotations

import torch
from torch import Tensor

CKA_FLOOR = 1e-8


def hsic(gram_x: Tensor, gram_y: Tensor) -> Tensor:
    """HSIC = tr(C G_X C C G_Y C) / (n - 1)^2 of two Gram matrices G_X and G_Y [n, n], C = I - 1 1^T / n."""
    rows = gram_x.shape[0]
    identity = torch.eye(rows, dtype=gram_x.dtype, device=gram_x.device)
    centering = identity - torch.ones_like(identity) / rows
    return torch.trace(centering @ gram_x @ centering @ gram_y) / (rows - 1) ** 2


def has_structure(rows: Tensor) -> bool:
    """True for at least two rows [n, F] that are not equal up to rounding."""
    if rows.shape[0] < 2 or rows.shape[1] == 0:
        return False
    mean = rows.mean(dim=0, keepdim=True)
    energy = (rows - mean).square().sum()
    return bool(energy > (8 * torch.finfo(rows.dtype).eps) ** 2 * rows.shape[0] * mean.square().sum())


def neg_log_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """-log CKA of [n, F_S] and [n, F_T]; 0 if one of them has no structure, NaN if one is not finite."""
    if not all(bool(rows.square().sum().square().isfinite()) for rows in (student, teacher)):
        return (student * torch.nan).sum() + (teacher * torch.nan).sum()
    if not (has_structure(student) and has_structure(teacher)):
        return student.new_zeros(())
    gram_s, gram_t = student @ student.T, teacher @ teacher.T
    cka = hsic(gram_t, gram_s) / torch.sqrt(hsic(gram_t, gram_t) * hsic(gram_s, gram_s))
    return -torch.log(cka.clamp(min=CKA_FLOOR))


def cosine_similarity(rows: Tensor, others: Tensor) -> Tensor:
    """cos(x_i, y_j), [n, m]; 0 if one of the two is the zero vector, NaN if a norm is not finite."""
    lengths = torch.linalg.vector_norm(rows, dim=1)[:, None] * torch.linalg.vector_norm(others, dim=1)
    if not bool(lengths.isfinite().all()):
        return (rows * torch.nan).sum(dim=1)[:, None] + (others * torch.nan).sum(dim=1)
    defined = lengths > 0
    return torch.where(defined, (rows @ others.T) / torch.where(defined, lengths, 1.0), 0.0)


def euclidean_distance(rows: Tensor, others: Tensor) -> Tensor:
    """|x_i - y_j|, [n, m]."""
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")


def inter_structure(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor | None,
    teacher_memory: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Return [L_L, F_MM, F^E, F^C] of features [B, F]; without memories the last three are 0."""
    if mask is not None:
        student = student.masked_fill(~mask.repeat_interleave(student.shape[1] // mask.shape[1], dim=1), 0.0)
        teacher = teacher.masked_fill(~mask.repeat_interleave(teacher.shape[1] // mask.shape[1], dim=1), 0.0)
    teacher = teacher.to(student.dtype)
    local = neg_log_cka(student, teacher)
    if student_memory is None or teacher_memory is None:
        return torch.stack([local, *torch.zeros_like(local).expand(3)])
    student_memory, teacher_memory = student_memory.to(student.dtype), teacher_memory.to(student.dtype)
    student = torch.nn.functional.pad(student, (0, student_memory.shape[1] - student.shape[1]))
    teacher = torch.nn.functional.pad(teacher, (0, teacher_memory.shape[1] - teacher.shape[1]))
    memory = neg_log_cka(student_memory, teacher_memory)
    if student.shape[0] == 0:
        return torch.stack([local, memory, *torch.zeros_like(local).expand(2)])
    distance = (
        euclidean_distance(teacher, teacher_memory) - euclidean_distance(student, student_memory)
    ).square()
    cosine = (
        cosine_similarity(teacher, teacher_memory) - cosine_similarity(student, student_memory)
    ).square()
    return torch.stack([local, memory, distance.mean(), cosine.mean()])


def forward(student: Tensor, teacher: Tensor, num_centroid: int) -> Tensor:
    """Return [L_L, F_MM, F^E, F^C] read off two Gamma matrices [N, N] in their own dtype."""
    head = num_centroid + 1 if num_centroid else 0
    batch = student.shape[0] - head - 1
    samples = slice(head, head + batch)
    local = _neg_log_cka_of_centred(student, teacher, samples, num_centroid)
    if not num_centroid:
        return torch.stack([local, *torch.zeros_like(local).expand(3)])
    memory = _neg_log_cka_of_centred(student, teacher, slice(0, num_centroid), num_centroid)
    if batch == 0:
        return torch.stack([local, memory, *torch.zeros_like(local).expand(2)])
    raw_s, raw_t = _raw_products(student, num_centroid), _raw_products(teacher, num_centroid)
    distance, cosine = [], []
    for gamma, raw in ((student, raw_s), (teacher, raw_t)):
        squares = raw.diagonal()
        product = raw[num_centroid:, :num_centroid]
        both = squares[num_centroid:, None] + squares[None, :num_centroid] - 2 * product
        apart = ~_is_rounding(both, _distance_sizes(gamma, num_centroid))
        distance.append(torch.where(apart, torch.where(apart, both, 1.0).sqrt(), 0.0))
        vanishes = _is_rounding(squares, _raw_products(gamma.abs(), num_centroid).diagonal())
        defined = ~(vanishes[num_centroid:, None] | vanishes[None, :num_centroid])
        lengths = torch.where(defined, squares[num_centroid:, None] * squares[None, :num_centroid], 1.0)
        cosine.append(torch.where(defined, product / lengths.sqrt(), 0.0))
    return torch.stack(
        [
            local,
            memory,
            (distance[1] - distance[0]).square().mean(),
            (cosine[1] - cosine[0]).square().mean(),
        ]
    )


def _raw_products(gamma: Tensor, num_centroid: int) -> Tensor:
    """<m_i, m_j>, <h_i, m_j>, <h_i, h_j> as one [K + B, K + B] matrix: the centred rows plus their means.

    m_i = (m_i - mu_m) + mu_m and h_i = (h_i - mu_h) + (mu_h - mu_m) + mu_m.
    """
    total = gamma.shape[0]
    samples = total - num_centroid - 2
    lift = gamma.new_zeros((num_centroid + samples, total))
    lift[:num_centroid, :num_centroid] = torch.eye(num_centroid, dtype=gamma.dtype)
    lift[:num_centroid, num_centroid] = 1
    lift[num_centroid:, num_centroid + 1 : -1] = torch.eye(samples, dtype=gamma.dtype)
    lift[num_centroid:, num_centroid] = 1
    lift[num_centroid:, -1] = 1
    return lift @ gamma @ lift.T


def _distance_sizes(gamma: Tensor, num_centroid: int) -> Tensor:
    """The sums of the absolute terms of |h_i - m_j|^2, [B, K], of which rounding is a small fraction."""
    size, k = gamma.abs(), num_centroid
    size_h = size.diagonal()[k + 1 : -1] + 2 * size[-1, k + 1 : -1] + size[-1, -1]
    return size_h[:, None] + size.diagonal()[:k] + 2 * size[-1, :k] + 2 * size[k + 1 : -1, :k]


def _is_rounding(squares: Tensor, sizes: Tensor) -> Tensor:
    """True if a sum of terms cannot be told from 0: it is at most 64 eps of the sum of their absolute values."""
    return (squares <= 64 * torch.finfo(squares.dtype).eps * sizes) & sizes.isfinite()


def _mean_energy(gamma: Tensor, block: slice, num_centroid: int) -> Tensor:
    """|mu|^2 of the block's rows; mu_h = (mu_h - mu_m) + mu_m."""
    k = num_centroid
    if block.start == 0:
        return gamma[block.stop, block.stop]
    return gamma[-1, -1] + 2 * gamma[-1, k] + gamma[k, k]


def _neg_log_cka_of_centred(student: Tensor, teacher: Tensor, block: slice, num_centroid: int) -> Tensor:
    """-log CKA of one diagonal block of two Gamma matrices: <K_T, K_S> / (|K_T| |K_S|)."""
    rows = block.stop - block.start
    sides = [
        (gamma, gamma[block, block].diagonal().sum(), _mean_energy(gamma, block, num_centroid))
        for gamma in (student, teacher)
    ]
    if not all(bool((energy + mean_energy).isfinite()) for _, energy, mean_energy in sides):
        return (student[block, block] * torch.nan).sum()
    for gamma, energy, mean_energy in sides:
        if rows < 2 or not bool(energy > (8 * torch.finfo(gamma.dtype).eps) ** 2 * rows * mean_energy):
            return student.new_zeros(())
    centred_s, centred_t = student[block, block], teacher[block, block]
    cka = (centred_t * centred_s).sum() / torch.sqrt(centred_t.square().sum() * centred_s.square().sum())
    return -torch.log(cka.clamp(min=CKA_FLOOR))
