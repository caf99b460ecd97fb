"""The between-sample structures read off two small Gamma matrices, with their gradients, by torch operations.

Gamma = Z Z^T of Z = [centred memory, its mean mu_m, centred features, mu_h - mu_m] (``fsd_kernels.gram``).

L_L and F_MM, from the teacher's and the student's diagonal block K_T and K_S, as in ``fsd_kernels.intra_cka.eager``:

    R = K_T - <K_T, K_S> / |K_S|^2 K_S,   delta = 1 - CKA = (|R| / |K_T|)^2 / (1 + CKA),   loss = -log1p(-delta)
    G = d CKA / d K_S = R / (|K_T| |K_S|)

F^E and F^C, with q_ij = |h_i - m_j|^2, u_i = |h_i|^2, v_j = |m_j|^2 summed from entries of Gamma, a = sqrt(u),
b = sqrt(v), r = a - b = (u - v) / (a + b):

    1 - cos_ij = (q_ij - r^2) / (2 a b)                  no difference of two numbers near 1
    d(1 - cos)/dq = 1 / (2 a b),  d/du = -(r / b + 1 - cos) / (2 u),  d/dv = (r / a - (1 - cos)) / (2 v)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fsd_kernels._numerics import CKA_FLOOR, maximum_length_ratio, rounding_energy


def _mean_energies(gammas: Tensor, num_centroid: int) -> tuple[list[float], list[float]]:
    """Return |mu_h|^2 and |mu_m|^2 of both sides; without a memory both are |mu_h|^2."""
    k, last = num_centroid, gammas[:, -1]
    if not k:
        mean_h = last[:, -1].tolist()
        return mean_h, mean_h
    mean_m = gammas[:, k, k]
    return (last[:, -1] + 2 * last[:, k] + mean_m).tolist(), mean_m.tolist()


def _neg_log_cka(gammas: Tensor, block: slice, mean_energy: list[float]) -> tuple[float, Tensor | None]:
    """-log CKA of a diagonal block of student and teacher [2, N, N], and its gradient in the student's block.

    The gradient is None if a side has no structure or CKA is on its floor. Both are NaN if a side is not finite.
    Scalars are Python's floats: an operation on a tensor takes longer than all of them.
    """
    grams = gammas[:, block, block]
    trace = grams.diagonal(dim1=1, dim2=2).sum(dim=1)
    rows = block.stop - block.start
    floor = rounding_energy(gammas.dtype) * rows
    energies = trace.tolist()
    if not math.isfinite(sum(energies) + sum(mean_energy)):
        return math.nan, torch.full_like(grams[0], math.nan)
    if rows < 2 or not all(energy > floor * mean for energy, mean in zip(energies, mean_energy, strict=True)):
        return 0.0, None
    # Dividing by the trace first keeps fourth powers of the features out of overflow and underflow.
    student, teacher = (grams / trace[:, None, None]).double()
    both = torch.stack((student.flatten(), teacher.flatten()))
    (student_square, product), (_, teacher_square) = torch.mm(both, both.T).tolist()
    # The part of the teacher's block that the student's does not explain; exactly 0 for equal blocks.
    rest = torch.sub(teacher, student, alpha=product / student_square)
    cka = product / math.sqrt(student_square * teacher_square)
    delta = float(torch.linalg.vector_norm(rest)) ** 2 / (teacher_square * (1 + cka))
    value = -math.log1p(-delta) if delta < 0.5 else -math.log(max(cka, CKA_FLOOR))
    if cka <= CKA_FLOOR:
        return value, None
    return value, rest.mul_(-1 / (cka * math.sqrt(student_square * teacher_square) * energies[0])).to(
        gammas.dtype
    )


def _without_rounding(squares: Tensor, sizes: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """Set squares to 0 that are nothing but rounding of terms of these sizes; also return which are kept."""
    exists = ~((squares <= rounding * sizes) & (sizes < math.inf))
    return torch.where(exists, squares, 0.0), exists


class _Distances:
    """Euclidean distances and 1 - cosines between samples and centroids, [B, K], read off one side's Gamma."""

    def __init__(self, gamma: Tensor, num_centroid: int, rounding: float) -> None:
        k, m = num_centroid, slice(0, num_centroid)
        h = slice(k + 1, gamma.shape[0] - 1)
        squares = gamma.diagonal()
        # h_i = h_c + delta + mu_m and m_j = m_c + mu_m, with delta = mu_h - mu_m: mu_m cancels from q.
        to_m, to_d = gamma[k], gamma[-1]
        q = (squares[h] + 2 * to_d[h] + to_d[-1])[:, None] + (squares[m] - 2 * to_d[m]) - 2 * gamma[h, m]
        from_mean_h = squares[h] + 2 * (to_d[h] + to_m[h]) + to_d[-1] + 2 * to_d[k]
        from_mean_m = squares[m] + 2 * to_m[m]
        # Sums of the terms' absolute values: a result that is a small part of its sum is rounding.
        size, size_m, size_d = squares.abs(), to_m.abs(), to_d.abs()
        h_and_d = size[h] + 2 * size_d[h] + size_d[-1]
        size_q = h_and_d[:, None] + (size[m] + 2 * size_d[m]) + 2 * gamma[h, m].abs()
        size_u = h_and_d + 2 * (size_m[h] + size_d[k]) + size_m[k]
        size_v = size[m] + 2 * size_m[m] + size_m[k]
        square, apart = _without_rounding(q, size_q, rounding)
        u, exists_h = _without_rounding(from_mean_h + to_m[k], size_u, rounding)
        v, exists_m = _without_rounding(from_mean_m + to_m[k], size_v, rounding)
        self.u_minus_v = from_mean_h[:, None] - from_mean_m
        self.square, self.apart = square, apart
        self.euclidean = self.square.sqrt()
        self.a, self.b = u.sqrt()[:, None], v.sqrt()[None]
        # q - r^2 is a difference of squares of the longer vector: a much shorter vector is lost in its rounding.
        limit = maximum_length_ratio(rounding)
        far = (self.a > limit * self.b) | (self.b > limit * self.a)
        self.defined = exists_h[:, None] & exists_m[None] & ~far
        self.r = torch.where(self.defined, self.u_minus_v / (self.a + self.b), 0.0)
        self.double_ab = torch.where(self.defined, 2 * self.a * self.b, 1.0)
        # The cosine with the zero vector is 0, and so is that with a vector so short that it counts as zero.
        self.one_minus_cos = torch.where(self.defined, (self.square - self.r.square()) / self.double_ab, 1.0)


def _scatter(d_q: Tensor, d_u: Tensor, d_v: Tensor, num_centroid: int) -> Tensor:
    """Gradient with respect to Gamma of a function of q [B, K], u [B] and v [K], symmetric."""
    batch, k = d_q.shape
    total = batch + num_centroid + 2
    m, h = slice(0, k), slice(k + 1, total - 1)
    half = d_q.new_zeros((total, total))  # the result is half + half^T
    rows, columns, whole = d_q.sum(dim=1), d_q.sum(dim=0), d_q.sum()
    diagonal = half.diagonal()
    diagonal[h] = 0.5 * (rows + d_u)
    diagonal[m] = 0.5 * (columns + d_v)
    half[h, m] = -d_q
    half[-1, h] = rows + d_u
    half[k, h] = d_u
    half[-1, m] = -columns
    half[k, m] = d_v
    half[-1, -1] = 0.5 * (whole + d_u.sum())
    half[-1, k] = d_u.sum()
    half[k, k] = 0.5 * (d_u.sum() + d_v.sum())
    return half + half.T


def forward(student: Tensor, teacher: Tensor, num_centroid: int, rounding: float) -> tuple[Tensor, Tensor]:
    """Return [L_L, F_MM, F^E, F^C] and their gradients [4, N, N] with respect to the student's Gamma.

    A squared norm or distance up to ``rounding`` times the size of its terms is 0.
    """
    values = student.new_zeros(4)
    gradients = student.new_zeros((4, *student.shape))
    head = num_centroid + 1 if num_centroid else 0
    batch = student.shape[0] - head - 1
    samples = slice(head, head + batch)
    gammas = torch.stack((student, teacher))
    mean_h, mean_m = _mean_energies(gammas, num_centroid)
    if batch:
        values[0], gradient = _neg_log_cka(gammas, samples, mean_h)
        if gradient is not None:
            gradients[0, samples, samples] = gradient
    if not num_centroid:
        return values, gradients
    centroids = slice(0, num_centroid)
    values[1], gradient = _neg_log_cka(gammas, centroids, mean_m)
    if gradient is not None:
        gradients[1, centroids, centroids] = gradient
    if batch == 0:
        return values, gradients
    distances, teacher_distances = (_Distances(gamma, num_centroid, rounding) for gamma in (student, teacher))
    pairs = batch * num_centroid

    error = distances.euclidean - teacher_distances.euclidean
    values[2] = error.square().mean()
    d_square = torch.where(distances.apart, error / (distances.euclidean * pairs), 0.0)
    zero_u, zero_v = student.new_zeros(batch), student.new_zeros(num_centroid)
    gradients[2] = _scatter(d_square, zero_u, zero_v, num_centroid)

    error = distances.one_minus_cos - teacher_distances.one_minus_cos
    values[3] = error.square().mean()
    d_cosine = torch.where(distances.defined, 2 * error / pairs, 0.0)
    a, b = torch.where(distances.defined, distances.a, 1.0), torch.where(distances.defined, distances.b, 1.0)
    d_u = (-d_cosine * (distances.r / b + distances.one_minus_cos) / (2 * a.square())).sum(dim=1)
    d_v = (d_cosine * (distances.r / a - distances.one_minus_cos) / (2 * b.square())).sum(dim=0)
    gradients[3] = _scatter(d_cosine / distances.double_ab, d_u, d_v, num_centroid)
    return values, gradients


def backward(gradients: Tensor, d_values: Tensor) -> Tensor:
    """Return dGamma [N, N] of the student: the four gradients weighted by the upstream gradient [4]."""
    return torch.tensordot(d_values.to(gradients.dtype), gradients, dims=1)
