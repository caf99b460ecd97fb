# mypy: disable-error-code="no-untyped-def"
"""The between-sample structures read off two small Gamma matrices, as two launches forward and one backward.

With Gamma as ``fsd_kernels.gram`` returns it, per side: h_c the samples' rows, m_c the centroids' rows, then mu_m
and delta = mu_h - mu_m, so that h_i = h_c + delta + mu_m and m_j = m_c + mu_m; q_ij = |h_i - m_j|^2, a_i = |h_i|,
b_j = |m_j|, r = a - b = (u - v) / (a + b):

    1 - CKA = 1/2 |K_T/|K_T| - K_S/|K_S||^2,  loss = -log1p(-(1 - CKA))
    1 - cos_ij = (q_ij - r^2) / (2 a b)

First launch (``_structure_stats_kernel``): one program for the CKA of the samples, one for that of the centroids, and
programs over blocks of samples and of centroids. These store d/dq [B, K], its sums over rows and columns, and the sums
of d/du and d/dv. Second launch (``_structure_grad_kernel``): one program per tile of the four gradients [N, N].
Backward (``_structure_bwd_kernel``): their sum, weighted by the upstream gradient. No two programs add to one number.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fsd_kernels._launch import launch
from fsd_kernels._triton import (
    CKA_FLOOR,
    MAXIMUM_LENGTH_RATIO,
    NORM_ROUNDING,
    ROUNDING,
    cdiv,
    triton_type,
)

_BLOCK = 32
# Rows of a tile in the programs that compute a CKA.
_CKA_BLOCK = 64

# Scalars that a CKA program stores: the scale of the student's and of the teacher's block, 1 - CKA, the scale of the
# gradient.
_SCALARS = tl.constexpr(4)

# Sizes take any value without another compilation.
_SIZES = ("N", "K", "B", "head")


@triton.jit
def _trace(gamma_ptr, N, first, rows, BLOCK: tl.constexpr):
    """Trace of the diagonal block of ``rows`` rows starting at ``first``."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, rows, BLOCK):
        index = start + tl.arange(0, BLOCK)
        offset = (first + index).to(tl.int64) * (N + 1)
        total += tl.load(gamma_ptr + offset, mask=index < rows, other=0.0)
    return tl.sum(total)


@triton.jit
def _block_tile(gamma_ptr, N, first, rows, i, j, BLOCK: tl.constexpr):
    """Tile (i, j) of the diagonal block of ``rows`` rows starting at ``first``; 0 outside."""
    row = i + tl.arange(0, BLOCK)
    column = j + tl.arange(0, BLOCK)
    offset = (first + row).to(tl.int64)[:, None] * N + (first + column)[None, :]
    return tl.load(gamma_ptr + offset, mask=(row < rows)[:, None] & (column < rows)[None, :], other=0.0)


@triton.jit
def _inverse_energy(gamma_ptr, N, first, rows, mean, BLOCK: tl.constexpr):
    """(trace, True if the block has structure or is not finite, 1 / trace; NaN if not finite, 0 without structure)."""
    energy = _trace(gamma_ptr, N, first, rows, BLOCK)
    mean_energy = tl.load(gamma_ptr + mean.to(tl.int64) * (N + 1))
    if first > 0:
        # Beside a memory the row is that of mu_h - mu_m, and the row before the block that of mu_m.
        mu_m = (first - 1).to(tl.int64)
        mean_energy += 2.0 * tl.load(gamma_ptr + mean.to(tl.int64) * N + mu_m)
        mean_energy += tl.load(gamma_ptr + mu_m * (N + 1))
    infinite = ~(energy + rows * mean_energy < float("inf"))
    exists = ((energy > rows * mean_energy * ROUNDING) & (rows > 1)) | infinite
    return energy, exists, tl.where(infinite, float("nan"), tl.where(exists, 1.0 / energy, 0.0))


@triton.jit
def _cka_of_block(student_ptr, teacher_ptr, scalar_ptr, value_ptr, N, first, rows, BLOCK: tl.constexpr):
    """Store -log CKA of a diagonal block and the scalars of its gradient."""
    mean = first + rows
    energy_s, exists_s, inverse_s = _inverse_energy(student_ptr, N, first, rows, mean, BLOCK)
    _, exists_t, inverse_t = _inverse_energy(teacher_ptr, N, first, rows, mean, BLOCK)
    exists = (exists_s & exists_t) | (inverse_s != inverse_s) | (inverse_t != inverse_t)
    # Dividing by the trace first keeps the fourth powers of the features out of overflow and underflow.
    square_s = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    square_t = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for i in range(0, rows, BLOCK):
        for j in range(0, rows, BLOCK):
            s = _block_tile(student_ptr, N, first, rows, i, j, BLOCK) * inverse_s
            t = _block_tile(teacher_ptr, N, first, rows, i, j, BLOCK) * inverse_t
            square_s += s * s
            square_t += t * t
    norm_s = tl.sqrt(tl.sum(square_s))
    scale_s = inverse_s * tl.where(exists_s, 1.0 / norm_s, 0.0)
    scale_t = inverse_t * tl.where(exists_t, 1.0 / tl.sqrt(tl.sum(square_t)), 0.0)
    deltas = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    products = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for i in range(0, rows, BLOCK):
        for j in range(0, rows, BLOCK):
            s = _block_tile(student_ptr, N, first, rows, i, j, BLOCK) * scale_s
            t = _block_tile(teacher_ptr, N, first, rows, i, j, BLOCK) * scale_t
            deltas += (t - s) * (t - s)
            products += t * s
    delta = 0.5 * tl.sum(deltas)
    cka = tl.sum(products)
    # tl.maximum does not pass on NaN.
    floored = tl.where(cka < CKA_FLOOR, CKA_FLOOR, cka)
    near = delta < 0.5
    # log1p(-d) = log(w) * -d / (w - 1) with w = 1 - d as rounded, or -d if w rounds to 1.
    x = tl.where(near, delta, 0.0)
    w = 1.0 - x
    small = w == 1.0
    log1p = tl.where(small, -x, tl.log(w) * (x / tl.where(small, 1.0, 1.0 - w)))
    value = tl.where(near, -log1p, -tl.log(floored))
    tl.store(value_ptr, tl.where(exists, value, 0.0))
    scale = tl.where(exists & ~(cka <= CKA_FLOOR), -1.0 / (floored * norm_s * energy_s), 0.0)
    tl.store(scalar_ptr, scale_s)
    tl.store(scalar_ptr + 1, scale_t)
    tl.store(scalar_ptr + 2, delta)
    tl.store(scalar_ptr + 3, scale)


@triton.jit
def _diagonal(gamma_ptr, N, index, inside):
    return tl.load(gamma_ptr + index.to(tl.int64) * (N + 1), mask=inside, other=0.0)


@triton.jit
def _row(gamma_ptr, N, row, index, inside):
    return tl.load(gamma_ptr + row.to(tl.int64) * N + index, mask=inside, other=0.0)


@triton.jit
def _without_rounding(squares, sizes):
    """Set squares to 0 that are nothing but rounding of terms of these sizes; also return which are kept. Keeps NaN."""
    exists = ~((squares <= NORM_ROUNDING * sizes) & (sizes < float("inf")))
    return tl.where(exists, squares, 0.0), exists


@triton.jit
def _distances(gamma_ptr, N, K, h, m, h_inside, m_inside):
    """(|h - m|, True if that is not 0, 1 - cos, a, b, r, 2ab, True if cos is defined) of samples h and centroids m."""
    delta, mu_m = N - 1, K
    hh = _diagonal(gamma_ptr, N, h, h_inside)
    mm = _diagonal(gamma_ptr, N, m, m_inside)
    h_to_d = _row(gamma_ptr, N, delta, h, h_inside)
    h_to_m = _row(gamma_ptr, N, mu_m, h, h_inside)
    m_to_d = _row(gamma_ptr, N, delta, m, m_inside)
    m_to_m = _row(gamma_ptr, N, mu_m, m, m_inside)
    mean_dd = tl.load(gamma_ptr + delta.to(tl.int64) * (N + 1))
    mean_mm = tl.load(gamma_ptr + mu_m.to(tl.int64) * (N + 1))
    mean_dm = tl.load(gamma_ptr + delta.to(tl.int64) * N + mu_m)
    inside = h_inside[:, None] & m_inside[None, :]
    hm = tl.load(gamma_ptr + h.to(tl.int64)[:, None] * N + m[None, :], mask=inside, other=0.0)
    # q = |h_c + delta - m_c|^2: mu_m cancels.
    q = (hh + 2.0 * h_to_d + mean_dd)[:, None] + (mm - 2.0 * m_to_d)[None, :] - 2.0 * hm
    h_and_d = tl.abs(hh) + 2.0 * tl.abs(h_to_d) + tl.abs(mean_dd)
    size_q = h_and_d[:, None] + (tl.abs(mm) + 2.0 * tl.abs(m_to_d))[None, :] + 2.0 * tl.abs(hm)
    square, apart = _without_rounding(q, size_q)
    from_mean_h = hh + 2.0 * (h_to_d + h_to_m) + mean_dd + 2.0 * mean_dm
    from_mean_m = mm + 2.0 * m_to_m
    size_u = h_and_d + 2.0 * (tl.abs(h_to_m) + tl.abs(mean_dm)) + tl.abs(mean_mm)
    size_v = tl.abs(mm) + 2.0 * tl.abs(m_to_m) + tl.abs(mean_mm)
    u, exists_h = _without_rounding(from_mean_h + mean_mm, size_u)
    v, exists_m = _without_rounding(from_mean_m + mean_mm, size_v)
    a, b = tl.sqrt(u), tl.sqrt(v)
    u_minus_v = from_mean_h[:, None] - from_mean_m[None, :]
    far = (a[:, None] > MAXIMUM_LENGTH_RATIO * b[None, :]) | (b[None, :] > MAXIMUM_LENGTH_RATIO * a[:, None])
    defined = exists_h[:, None] & exists_m[None, :] & ~far
    r = tl.where(defined, u_minus_v / tl.where(defined, a[:, None] + b[None, :], 1.0), 0.0)
    double_ab = tl.where(defined, 2.0 * a[:, None] * b[None, :], 1.0)
    # The cosine with the zero vector is 0, and so is that with a vector so short that it counts as zero.
    cosine = tl.where(defined, (square - r * r) / double_ab, 1.0)
    return tl.sqrt(square), apart, cosine, a, b, r, double_ab, defined


@triton.jit
def _pair_terms(student_ptr, teacher_ptr, N, K, pairs, h, m, h_inside, m_inside):
    """Per (sample, centroid): squared errors of both distances, d F^E/dq, d F^C/dq, d F^C/du and d F^C/dv."""
    inside = h_inside[:, None] & m_inside[None, :]
    euclidean, apart, cosine, a, b, r, double_ab, defined = _distances(
        student_ptr, N, K, h, m, h_inside, m_inside
    )
    teacher_euclidean, _, teacher_cosine, _, _, _, _, _ = _distances(
        teacher_ptr, N, K, h, m, h_inside, m_inside
    )
    error = tl.where(inside, euclidean - teacher_euclidean, 0.0)
    d_q_e = tl.where(apart, error / (tl.where(apart, euclidean, 1.0) * pairs), 0.0)
    error_c = tl.where(inside, cosine - teacher_cosine, 0.0)
    d_cosine = tl.where(defined, 2.0 * error_c / pairs, 0.0)
    a = tl.where(defined, a[:, None], 1.0)
    b = tl.where(defined, b[None, :], 1.0)
    d_u = -d_cosine * (r / b + cosine) / (2.0 * a * a)
    d_v = d_cosine * (r / a - cosine) / (2.0 * b * b)
    return error * error, error_c * error_c, d_q_e, d_cosine / double_ab, d_u, d_v


@triton.jit
def _results(work_ptr, K, B, BLOCK: tl.constexpr):
    """Addresses of what the first launch leaves to the second.

    scalar [2, 4]; error [2, sample blocks]; row [3, B]: sums over centroids of dE/dq, dC/dq, dC/du; column [3, K]:
    sums over samples of dE/dq, dC/dq, dC/dv; d_q [2, B, K].
    """
    error_ptr = work_ptr + 2 * _SCALARS
    row_ptr = error_ptr + 2 * tl.cdiv(B, BLOCK)
    column_ptr = row_ptr + 3 * B
    return work_ptr, error_ptr, row_ptr, column_ptr, column_ptr + 3 * K


@triton.jit(do_not_specialize=_SIZES)
def _structure_stats_kernel(
    student_ptr, teacher_ptr, value_ptr, work_ptr, N, K, B, head, BLOCK: tl.constexpr, CKA_BLOCK: tl.constexpr
):  # fmt: skip
    """Program 0: CKA of the samples; 1: of the centroids; then blocks of samples; then blocks of centroids."""
    scalar_ptr, error_ptr, row_ptr, column_ptr, d_q_ptr = _results(work_ptr, K, B, BLOCK)
    program = tl.program_id(0)
    h_blocks = tl.cdiv(B, BLOCK)
    pairs = (B * K).to(tl.float32)
    if program == 0:
        _cka_of_block(student_ptr, teacher_ptr, scalar_ptr, value_ptr, N, head, B, CKA_BLOCK)
    elif program == 1:
        _cka_of_block(
            student_ptr, teacher_ptr, scalar_ptr + _SCALARS, value_ptr + 1, N, head - head, K, CKA_BLOCK
        )
    elif program < 2 + h_blocks:
        block = program - 2
        i = block * BLOCK + tl.arange(0, BLOCK)
        h_inside = i < B
        errors_e = tl.zeros((BLOCK,), dtype=tl.float32)
        errors_c = tl.zeros((BLOCK,), dtype=tl.float32)
        rows_e = tl.zeros((BLOCK,), dtype=tl.float32)
        rows_c = tl.zeros((BLOCK,), dtype=tl.float32)
        rows_u = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, K, BLOCK):
            m = start + tl.arange(0, BLOCK)
            m_inside = m < K
            error_e, error_c, d_q_e, d_q_c, d_u, _ = _pair_terms(
                student_ptr, teacher_ptr, N, K, pairs, head + i, m, h_inside, m_inside
            )
            errors_e += tl.sum(error_e, axis=1)
            errors_c += tl.sum(error_c, axis=1)
            rows_e += tl.sum(d_q_e, axis=1)
            rows_c += tl.sum(d_q_c, axis=1)
            rows_u += tl.sum(d_u, axis=1)
            offset = i[:, None] * K + m[None, :]
            inside = h_inside[:, None] & m_inside[None, :]
            tl.store(d_q_ptr + offset, d_q_e, mask=inside)
            tl.store(d_q_ptr + B * K + offset, d_q_c, mask=inside)
        tl.store(error_ptr + block, tl.sum(errors_e))
        tl.store(error_ptr + h_blocks + block, tl.sum(errors_c))
        tl.store(row_ptr + i, rows_e, mask=h_inside)
        tl.store(row_ptr + B + i, rows_c, mask=h_inside)
        tl.store(row_ptr + 2 * B + i, rows_u, mask=h_inside)
    else:
        m = (program - 2 - h_blocks) * BLOCK + tl.arange(0, BLOCK)
        m_inside = m < K
        columns_e = tl.zeros((BLOCK,), dtype=tl.float32)
        columns_c = tl.zeros((BLOCK,), dtype=tl.float32)
        columns_v = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, B, BLOCK):
            i = start + tl.arange(0, BLOCK)
            _, _, d_q_e, d_q_c, _, d_v = _pair_terms(
                student_ptr, teacher_ptr, N, K, pairs, head + i, m, i < B, m_inside
            )
            columns_e += tl.sum(d_q_e, axis=0)
            columns_c += tl.sum(d_q_c, axis=0)
            columns_v += tl.sum(d_v, axis=0)
        tl.store(column_ptr + m, columns_e, mask=m_inside)
        tl.store(column_ptr + K + m, columns_c, mask=m_inside)
        tl.store(column_ptr + 2 * K + m, columns_v, mask=m_inside)


@triton.jit
def _sum_vector(pointer, size, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(pointer + index, mask=index < size, other=0.0)
    return tl.sum(total)


@triton.jit
def _cka_tile(student_ptr, teacher_ptr, scalar_ptr, offset, inside):
    """Gradient of -log CKA on the entries ``inside`` its diagonal block, 0 elsewhere."""
    s = tl.load(student_ptr + offset, mask=inside, other=0.0) * tl.load(scalar_ptr)
    t = tl.load(teacher_ptr + offset, mask=inside, other=0.0) * tl.load(scalar_ptr + 1)
    gradient = ((t - s) + tl.load(scalar_ptr + 2) * s) * tl.load(scalar_ptr + 3)
    # Where a side is not finite the scalars are NaN, and 0 times NaN is NaN.
    return tl.where(inside, gradient, 0.0)


@triton.jit
def _scatter_tile(
    d_q_ptr, row_ptr, u_ptr, column_ptr, v_ptr, N, K, B, head, r, c, HAS_U: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Entries [r, c] of sum_ij dq_ij w w^T + sum_i du_i x x^T + sum_j dv_j y y^T.

    w = e(h_i) + e(delta) - e(m_j), x = e(h_i) + e(delta) + e(mu_m), y = e(m_j) + e(mu_m). HAS_U: du, dv are given.
    """
    delta, mu_m = N - 1, K
    r_h = (r >= head) & (r < head + B)
    c_h = (c >= head) & (c < head + B)
    r_m, c_m = r < K, c < K
    rows_r = tl.load(row_ptr + r - head, mask=r_h, other=0.0)
    rows_c = tl.load(row_ptr + c - head, mask=c_h, other=0.0)
    columns_r = tl.load(column_ptr + r, mask=r_m, other=0.0)
    columns_c = tl.load(column_ptr + c, mask=c_m, other=0.0)
    whole = _sum_vector(row_ptr, B, BLOCK)
    u_r, u_c, v_r, v_c = rows_r * 0.0, rows_c * 0.0, columns_r * 0.0, columns_c * 0.0
    whole_u, whole_v = whole * 0.0, whole * 0.0
    if HAS_U:
        u_r = tl.load(u_ptr + r - head, mask=r_h, other=0.0)
        u_c = tl.load(u_ptr + c - head, mask=c_h, other=0.0)
        v_r = tl.load(v_ptr + r, mask=r_m, other=0.0)
        v_c = tl.load(v_ptr + c, mask=c_m, other=0.0)
        whole_u = _sum_vector(u_ptr, B, BLOCK)
        whole_v = _sum_vector(v_ptr, K, BLOCK)
    h_m = r_h[:, None] & c_m[None, :]
    m_h = r_m[:, None] & c_h[None, :]
    result = -tl.load(d_q_ptr + (r - head)[:, None] * K + c[None, :], mask=h_m, other=0.0)
    result -= tl.load(d_q_ptr + (c - head)[None, :] * K + r[:, None], mask=m_h, other=0.0)
    diagonal = r[:, None] == c[None, :]
    result = tl.where(diagonal, (rows_r + u_r + columns_r + v_r)[:, None], result)
    r_delta, c_delta = (r == delta)[:, None], (c == delta)[None, :]
    r_mu_m, c_mu_m = (r == mu_m)[:, None], (c == mu_m)[None, :]
    result = tl.where(r_delta, (rows_c + u_c - columns_c)[None, :], result)
    result = tl.where(c_delta, (rows_r + u_r - columns_r)[:, None], result)
    result = tl.where(r_mu_m, (u_c + v_c)[None, :], result)
    result = tl.where(c_mu_m, (u_r + v_r)[:, None], result)
    result = tl.where(r_delta & c_delta, whole + whole_u, result)
    result = tl.where(r_mu_m & c_mu_m, whole_u + whole_v, result)
    return tl.where((r_delta & c_mu_m) | (r_mu_m & c_delta), whole_u, result)


@triton.jit(do_not_specialize=_SIZES)
def _structure_grad_kernel(
    student_ptr, teacher_ptr, value_ptr, work_ptr, gradient_ptr, N, K, B, head, BLOCK: tl.constexpr
):
    """One program per tile: the gradients [4, N, N] of L_L, F_MM, F^E, F^C; the first also ends F^E and F^C."""
    scalar_ptr, error_ptr, row_ptr, column_ptr, d_q_ptr = _results(work_ptr, K, B, BLOCK)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset = r.to(tl.int64)[:, None] * N + c[None, :]
    inside = (r < N)[:, None] & (c < N)[None, :]
    size = N.to(tl.int64) * N
    samples = ((r >= head) & (r < head + B))[:, None] & ((c >= head) & (c < head + B))[None, :]
    tile = _cka_tile(student_ptr, teacher_ptr, scalar_ptr, offset, samples)
    tl.store(gradient_ptr + offset, tile, mask=inside)
    if K > 0:
        centroids = (r < K)[:, None] & (c < K)[None, :]
        tile = _cka_tile(student_ptr, teacher_ptr, scalar_ptr + _SCALARS, offset, centroids)
        tl.store(gradient_ptr + size + offset, tile, mask=inside)
        tile = _scatter_tile(
            d_q_ptr, row_ptr, row_ptr, column_ptr, column_ptr, N, K, B, head, r, c, False, BLOCK
        )
        tl.store(gradient_ptr + 2 * size + offset, tile, mask=inside)
        tile = _scatter_tile(
            d_q_ptr + B * K, row_ptr + B, row_ptr + 2 * B, column_ptr + K, column_ptr + 2 * K,
            N, K, B, head, r, c, True, BLOCK,
        )  # fmt: skip
        tl.store(gradient_ptr + 3 * size + offset, tile, mask=inside)
    else:
        zero = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for loss in range(1, 4):
            tl.store(gradient_ptr + loss * size + offset, zero, mask=inside)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        h_blocks = tl.cdiv(B, BLOCK)
        pairs = tl.maximum(B * K, 1).to(tl.float32)
        if K > 0:
            tl.store(value_ptr + 2, _sum_vector(error_ptr, h_blocks, BLOCK) / pairs)
            tl.store(value_ptr + 3, _sum_vector(error_ptr + h_blocks, h_blocks, BLOCK) / pairs)
        else:
            for loss in range(1, 4):
                tl.store(value_ptr + loss, 0.0)


@triton.jit
def _structure_bwd_kernel(gradient_ptr, d_value_ptr, d_gamma_ptr, size, BLOCK: tl.constexpr):
    """Sum the four gradients, weighted by the upstream gradient, in a fixed order."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for loss in range(0, 4):
        weight = tl.load(d_value_ptr + loss)
        total += weight * tl.load(gradient_ptr + loss * size + index, mask=inside, other=0.0)
    tl.store(d_gamma_ptr + index, total, mask=inside)


def forward(student: Tensor, teacher: Tensor, num_centroid: int, rounding: float) -> tuple[Tensor, Tensor]:
    """Return [L_L, F_MM, F^E, F^C] and their gradients [4, N, N] with respect to the student's Gamma.

    Raises:
        TypeError: The matrices are not float32.
        ValueError: ``rounding`` is not float32's, which the kernels hold as a constant.
    """
    _check_float32("student", student)
    if rounding != NORM_ROUNDING.value:
        raise ValueError(f"rounding: expected {NORM_ROUNDING.value} of float32, got {rounding}")
    total = student.shape[0]
    head = num_centroid + 1 if num_centroid else 0
    batch = total - head - 1
    student, teacher = student.contiguous(), teacher.contiguous()
    values = student.new_empty(4)
    gradients = student.new_empty((4, total, total))
    h_blocks, m_blocks = cdiv(batch, _BLOCK), cdiv(num_centroid, _BLOCK)
    work = student.new_empty(
        2 * _SCALARS.value + 2 * h_blocks + 3 * (batch + num_centroid) + 2 * batch * num_centroid
    )
    # Without centroids the samples' CKA is all there is.
    programs = 2 + h_blocks + m_blocks if num_centroid else 1
    sizes = (total, num_centroid, batch, head)
    launch(
        _structure_stats_kernel, (programs,), (student, teacher, values, work, *sizes),
        {"BLOCK": _BLOCK, "CKA_BLOCK": _CKA_BLOCK}, device=student.device, num_warps=8,
    )  # fmt: skip
    blocks = cdiv(total, _BLOCK)
    launch(
        _structure_grad_kernel, (blocks, blocks), (student, teacher, values, work, gradients, *sizes),
        {"BLOCK": _BLOCK}, device=student.device, num_warps=4,
    )  # fmt: skip
    return values, gradients


def backward(gradients: Tensor, d_values: Tensor) -> Tensor:
    """Return dGamma [N, N] of the student: the four gradients weighted by the upstream gradient [4].

    Raises:
        TypeError: The gradients are not float32.
    """
    _check_float32("gradients", gradients)
    gradients = gradients.contiguous()
    d_values = d_values.to(gradients.dtype).contiguous()
    d_gamma = gradients.new_empty(gradients.shape[1:])
    size = d_gamma.numel()
    launch(
        _structure_bwd_kernel, (cdiv(size, 1024),), (gradients, d_values, d_gamma, size),
        {"BLOCK": 1024}, device=gradients.device, num_warps=4,
    )  # fmt: skip
    return d_gamma


def _check_float32(name: str, tensor: Tensor) -> None:
    if triton_type(name, tensor.dtype) != tl.float32:
        raise TypeError(f"{name}: expected float32 as gram returns it, got {tensor.dtype}")
