# mypy: disable-error-code="no-untyped-def"
"""The between-sample structures read off two small Gamma matrices, as two launches forward and one backward.

With Gamma as ``fsd_kernels.gram`` returns it, per side: h_c the samples' rows, m_c the centroids' rows, then mu_m
and delta = mu_h - mu_m, so that h_i = h_c + delta + mu_m and m_j = m_c + mu_m; q_ij = |h_i - m_j|^2, a_i = |h_i|,
b_j = |m_j|, r = a - b = (u - v) / (a + b):

    CKA = <S, T> / (|S| |T|),  loss = -log1p(-(1 - CKA)),  S and T the blocks of one kind of row
    1 - cos_ij = (q_ij - r^2) / (2 a b)

First launch (``_structure_stats_kernel``): one program per tile of <S, S>, <T, T> and <S, T>, of the samples and of the
centroids, in float64, where 1 - CKA keeps its digits near CKA = 1; and one per tile of (sample, centroid), which stores
d/dq [B, K] and its share of the sums of d/dq over rows and columns and of d/du and d/dv. Second launch
(``_structure_grad_kernel``): one program per tile of the four gradients [N, N]. Backward (``_structure_bwd_kernel``):
their sum, weighted by the upstream gradient. No two programs add to one number.
"""

from __future__ import annotations

import torch
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
    next_power_of_2,
    triton_type,
)

_BLOCK = 32
# Rows of a tile of a block whose CKA is computed.
_CKA_BLOCK = tl.constexpr(32)
# Sums of such a tile: <S, S>, <T, T>, <S, T> and the traces of S and T.
_SUMS = tl.constexpr(5)
# Tiles whose sums are added at a time: as many as a warp has threads, so that warps need not wait for each other.
_TILES = tl.constexpr(32)
# Numbers that are added at a time.
_ADDED = tl.constexpr(256)

# Sizes take any value without another compilation.
_SIZES = ("N", "K", "B", "head")


@triton.jit
def _tiles_of(rows):
    """Tiles on and below the diagonal of a block."""
    blocks = tl.cdiv(rows, _CKA_BLOCK)
    return blocks * (blocks + 1) // 2


@triton.jit
def _store_sums(student_ptr, teacher_ptr, sum_ptr, N, first, rows, tile):
    """Store what a lower tile of the diagonal block of ``rows`` rows starting at ``first`` adds to its sums."""
    i = 0
    while (i + 1) * (i + 2) // 2 <= tile:
        i += 1
    j = tile - i * (i + 1) // 2
    row = i * _CKA_BLOCK + tl.arange(0, _CKA_BLOCK)
    column = j * _CKA_BLOCK + tl.arange(0, _CKA_BLOCK)
    inside = (row < rows)[:, None] & (column < rows)[None, :]
    offset = (first + row).to(tl.int64)[:, None] * N + (first + column)[None, :]
    s = tl.load(student_ptr + offset, mask=inside, other=0.0).to(tl.float64)
    t = tl.load(teacher_ptr + offset, mask=inside, other=0.0).to(tl.float64)
    diagonal = row[:, None] == column[None, :]
    # Of a tile below the diagonal there are two.
    times = tl.where(i == j, 1.0, 2.0).to(tl.float64)
    sum_ptr += tile * _SUMS
    tl.store(sum_ptr, times * tl.sum(s * s))
    tl.store(sum_ptr + 1, times * tl.sum(t * t))
    tl.store(sum_ptr + 2, times * tl.sum(s * t))
    tl.store(sum_ptr + 3, tl.sum(tl.where(diagonal, s, 0.0)))
    tl.store(sum_ptr + 4, tl.sum(tl.where(diagonal, t, 0.0)))


@triton.jit
def _unit(gamma_ptr, energy, N, first, rows):
    """(True if the block of trace ``energy`` has structure, True if it or its mean row is not finite)."""
    mean = (first + rows).to(tl.int64)
    mean_energy = tl.load(gamma_ptr + mean * (N + 1))
    if first > 0:
        # Beside a memory the row is that of mu_h - mu_m, and the row before the block that of mu_m.
        mu_m = (first - 1).to(tl.int64)
        mean_energy += 2.0 * tl.load(gamma_ptr + mean * N + mu_m)
        mean_energy += tl.load(gamma_ptr + mu_m * (N + 1))
    energy = energy.to(tl.float32)
    infinite = ~(energy + rows * mean_energy < float("inf"))
    return (energy > rows * mean_energy * ROUNDING) & (rows > 1), infinite


@triton.jit
def _cka_of_block(student_ptr, teacher_ptr, sum_ptr, N, first, rows):
    """(-log CKA, 1/|S|, 1/|T|, 1 - CKA, the scale of the gradient) of a diagonal block, float32."""
    ss = tl.zeros((_TILES,), dtype=tl.float64)
    tt, st, energy_s, energy_t = ss, ss, ss, ss
    for start in range(0, _tiles_of(rows), _TILES):
        tile = start + tl.arange(0, _TILES)
        inside = tile < _tiles_of(rows)
        pointers = sum_ptr + tile * _SUMS
        ss += tl.load(pointers, mask=inside, other=0.0)
        tt += tl.load(pointers + 1, mask=inside, other=0.0)
        st += tl.load(pointers + 2, mask=inside, other=0.0)
        energy_s += tl.load(pointers + 3, mask=inside, other=0.0)
        energy_t += tl.load(pointers + 4, mask=inside, other=0.0)
    exists_s, infinite_s = _unit(student_ptr, tl.sum(energy_s), N, first, rows)
    exists_t, infinite_t = _unit(teacher_ptr, tl.sum(energy_t), N, first, rows)
    infinite = infinite_s | infinite_t
    exists = (exists_s & exists_t) | infinite
    # Numbers without structure are replaced, so that nothing is divided by 0.
    norm_s = tl.sqrt(tl.where(exists, tl.sum(ss), 1.0))
    norm_t = tl.sqrt(tl.where(exists, tl.sum(tt), 1.0))
    product = norm_s * norm_t
    delta = (product - tl.sum(st)) / product
    cka = (1.0 - delta).to(tl.float32)
    delta = tl.where(infinite, float("nan"), tl.where(delta < 0.0, 0.0, delta)).to(tl.float32)
    # tl.maximum does not pass on NaN.
    floored = tl.where(cka < CKA_FLOOR, CKA_FLOOR, cka)
    near = delta < 0.5
    # log1p(-d) = log(w) * -d / (w - 1) with w = 1 - d as rounded, or -d if w rounds to 1.
    x = tl.where(near, delta, 0.0)
    w = 1.0 - x
    small = w == 1.0
    log1p = tl.where(small, -x, tl.log(w) * (x / tl.where(small, 1.0, 1.0 - w)))
    value = tl.where(near, -log1p, tl.where(infinite, float("nan"), -tl.log(floored)))
    unit_s = tl.where(infinite, float("nan"), (1.0 / norm_s).to(tl.float32))
    unit_t = tl.where(infinite, float("nan"), (1.0 / norm_t).to(tl.float32))
    scale = tl.where(exists & ~(cka <= CKA_FLOOR), -unit_s / floored, 0.0)
    return tl.where(exists, value, 0.0), unit_s, unit_t, delta, scale


@triton.jit
def _diagonal(gamma_ptr, N, index, inside):
    return tl.load(gamma_ptr + index.to(tl.int64) * (N + 1), mask=inside, other=0.0)


@triton.jit
def _row(gamma_ptr, N, row, index, inside):
    return tl.load(gamma_ptr + row.to(tl.int64) * N + index, mask=inside, other=0.0)


@triton.jit
def _without_rounding(squares, sizes):
    """Set squares to 0 that are nothing but rounding of terms of these sizes; also return which are kept. Keeps NaN."""
    exists = ~((squares <= sizes * NORM_ROUNDING) & (sizes < float("inf")))
    return tl.where(exists, squares, 0.0), exists


@triton.jit
def _distances(gamma_ptr, N, K, h, m, h_inside, m_inside):
    """(|h - m|, True if that is not 0, 1 - cos, cos, a, b, r, 2ab, True if cos is defined) of samples and centroids."""
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
    far = (a[:, None] > b[None, :] * MAXIMUM_LENGTH_RATIO) | (b[None, :] > a[:, None] * MAXIMUM_LENGTH_RATIO)
    defined = exists_h[:, None] & exists_m[None, :] & ~far
    r = tl.where(defined, u_minus_v / tl.where(defined, a[:, None] + b[None, :], 1.0), 0.0)
    double_ab = tl.where(defined, 2.0 * a[:, None] * b[None, :], 1.0)
    inner = hm + h_to_m[:, None] + (m_to_d + m_to_m)[None, :] + (mean_dm + mean_mm)
    # The cosine with the zero vector is 0, and so is that with a vector so short that it counts as zero.
    cosine = tl.where(defined, 2.0 * inner / double_ab, 0.0)
    distance = 1.0 - cosine
    # Of vectors that point the same way the distance keeps the digits that the cosine loses.
    same_way = defined & (tl.abs(cosine) > 0.5)
    distance = tl.where(same_way, (square - r * r) / double_ab, distance)
    cosine = tl.where(same_way, 1.0 - distance, cosine)
    return tl.sqrt(square), apart, distance, cosine, a, b, r, double_ab, defined


@triton.jit
def _pair_terms(student_ptr, teacher_ptr, N, K, pairs, h, m, h_inside, m_inside):
    """Per (sample, centroid): squared errors of both distances, d F^E/dq, d F^C/dq, d F^C/du and d F^C/dv."""
    inside = h_inside[:, None] & m_inside[None, :]
    euclidean, apart, distance, cosine, a, b, r, double_ab, defined = _distances(
        student_ptr, N, K, h, m, h_inside, m_inside
    )
    teacher_euclidean, _, teacher_distance, teacher_cosine, _, _, _, _, _ = _distances(
        teacher_ptr, N, K, h, m, h_inside, m_inside
    )
    error = tl.where(inside, euclidean - teacher_euclidean, 0.0)
    d_q_e = tl.where(apart, error / (tl.where(apart, euclidean, 1.0) * pairs), 0.0)
    wide = (tl.abs(cosine) < 0.5) & (tl.abs(teacher_cosine) < 0.5)
    error_c = tl.where(inside, tl.where(wide, teacher_cosine - cosine, distance - teacher_distance), 0.0)
    d_cosine = tl.where(defined, 2.0 * error_c / pairs, 0.0)
    a = tl.where(defined, a[:, None], 1.0)
    b = tl.where(defined, b[None, :], 1.0)
    d_u = -d_cosine * (r / b + distance) / (2.0 * a * a)
    d_v = d_cosine * (r / a - distance) / (2.0 * b * b)
    return error * error, error_c * error_c, d_q_e, d_cosine / double_ab, d_u, d_v


@triton.jit
def _results(work_ptr, K, B, BLOCK: tl.constexpr):
    """Addresses of what the first launch leaves to the second, float64 and then float32.

    sums [tiles of samples + tiles of centroids, 5]; error [2, tiles of pairs]; row [3, centroid blocks, B]: sums over
    centroids of dE/dq, dC/dq, dC/du; column [3, sample blocks, K]: sums over samples of dE/dq, dC/dq, dC/dv;
    d_q [2, B, K].
    """
    h_blocks, m_blocks = tl.cdiv(B, BLOCK), tl.cdiv(K, BLOCK)
    error_ptr = (work_ptr + (_tiles_of(B) + _tiles_of(K)) * _SUMS).to(tl.pointer_type(tl.float32))
    row_ptr = error_ptr + 2 * h_blocks * m_blocks
    column_ptr = row_ptr + 3 * m_blocks * B
    return work_ptr, error_ptr, row_ptr, column_ptr, column_ptr + 3 * h_blocks * K


@triton.jit(do_not_specialize=_SIZES)
def _structure_stats_kernel(student_ptr, teacher_ptr, work_ptr, N, K, B, head, BLOCK: tl.constexpr):
    """Programs of the tiles of the samples' block; of the centroids' block; of (sample, centroid)."""
    sum_ptr, error_ptr, row_ptr, column_ptr, d_q_ptr = _results(work_ptr, K, B, BLOCK)
    program = tl.program_id(0)
    sample_tiles = _tiles_of(B)
    tiles = sample_tiles + _tiles_of(K)
    if program < sample_tiles:
        _store_sums(student_ptr, teacher_ptr, sum_ptr, N, head, B, program)
    elif program < tiles:
        _store_sums(
            student_ptr,
            teacher_ptr,
            sum_ptr + sample_tiles * _SUMS,
            N,
            head - head,
            K,
            program - sample_tiles,
        )
    else:
        h_blocks, m_blocks = tl.cdiv(B, BLOCK), tl.cdiv(K, BLOCK)
        h_block, m_block = (program - tiles) // m_blocks, (program - tiles) % m_blocks
        i = h_block * BLOCK + tl.arange(0, BLOCK)
        m = m_block * BLOCK + tl.arange(0, BLOCK)
        h_inside, m_inside = i < B, m < K
        pairs = (B * K).to(tl.float32)
        error_e, error_c, d_q_e, d_q_c, d_u, d_v = _pair_terms(
            student_ptr, teacher_ptr, N, K, pairs, head + i, m, h_inside, m_inside
        )
        offset = i[:, None] * K + m[None, :]
        inside = h_inside[:, None] & m_inside[None, :]
        tl.store(d_q_ptr + offset, d_q_e, mask=inside)
        tl.store(d_q_ptr + B * K + offset, d_q_c, mask=inside)
        tl.store(error_ptr + program - tiles, tl.sum(error_e))
        tl.store(error_ptr + h_blocks * m_blocks + program - tiles, tl.sum(error_c))
        pointers = row_ptr + m_block * B + i
        tl.store(pointers, tl.sum(d_q_e, axis=1), mask=h_inside)
        tl.store(pointers + m_blocks * B, tl.sum(d_q_c, axis=1), mask=h_inside)
        tl.store(pointers + 2 * m_blocks * B, tl.sum(d_u, axis=1), mask=h_inside)
        pointers = column_ptr + h_block * K + m
        tl.store(pointers, tl.sum(d_q_e, axis=0), mask=m_inside)
        tl.store(pointers + h_blocks * K, tl.sum(d_q_c, axis=0), mask=m_inside)
        tl.store(pointers + 2 * h_blocks * K, tl.sum(d_v, axis=0), mask=m_inside)


@triton.jit
def _sum_vector(pointer, size):
    total = tl.zeros((_ADDED,), dtype=tl.float32)
    for start in range(0, size, _ADDED):
        index = start + tl.arange(0, _ADDED)
        total += tl.load(pointer + index, mask=index < size, other=0.0)
    return tl.sum(total)


@triton.jit
def _sum_blocks(pointer, index, inside, size, blocks, BLOCKS: tl.constexpr):
    """Sums over the first axis of [blocks, size] at columns ``index``."""
    block = tl.arange(0, BLOCKS)
    pointers = pointer + block[:, None] * size + index[None, :]
    return tl.sum(tl.load(pointers, mask=(block < blocks)[:, None] & inside[None, :], other=0.0), axis=0)


@triton.jit
def _cka_tile(student_ptr, teacher_ptr, unit_s, unit_t, delta, scale, offset, inside):
    """Gradient of -log CKA on the entries ``inside`` its diagonal block, 0 elsewhere."""
    s = tl.load(student_ptr + offset, mask=inside, other=0.0) * unit_s
    t = tl.load(teacher_ptr + offset, mask=inside, other=0.0) * unit_t
    # Where a side is not finite the scalars are NaN, and 0 times NaN is NaN.
    return tl.where(inside, ((t - s) + delta * s) * scale, 0.0)


@triton.jit
def _scatter_tile(
    d_q_ptr, row_ptr, u_ptr, column_ptr, v_ptr, N, K, B, head, r, c, h_blocks, m_blocks,
    HAS_U: tl.constexpr, H_BLOCKS: tl.constexpr, M_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Entries [r, c] of sum_ij dq_ij w w^T + sum_i du_i x x^T + sum_j dv_j y y^T.

    w = e(h_i) + e(delta) - e(m_j), x = e(h_i) + e(delta) + e(mu_m), y = e(m_j) + e(mu_m). HAS_U: du, dv are given.
    """
    delta, mu_m = N - 1, K
    r_h = (r >= head) & (r < head + B)
    c_h = (c >= head) & (c < head + B)
    r_m, c_m = r < K, c < K
    rows_r = _sum_blocks(row_ptr, r - head, r_h, B, m_blocks, M_BLOCKS)
    rows_c = _sum_blocks(row_ptr, c - head, c_h, B, m_blocks, M_BLOCKS)
    columns_r = _sum_blocks(column_ptr, r, r_m, K, h_blocks, H_BLOCKS)
    columns_c = _sum_blocks(column_ptr, c, c_m, K, h_blocks, H_BLOCKS)
    whole = _sum_vector(row_ptr, m_blocks * B)
    u_r, u_c, v_r, v_c = rows_r * 0.0, rows_c * 0.0, columns_r * 0.0, columns_c * 0.0
    whole_u, whole_v = whole * 0.0, whole * 0.0
    if HAS_U:
        u_r = _sum_blocks(u_ptr, r - head, r_h, B, m_blocks, M_BLOCKS)
        u_c = _sum_blocks(u_ptr, c - head, c_h, B, m_blocks, M_BLOCKS)
        v_r = _sum_blocks(v_ptr, r, r_m, K, h_blocks, H_BLOCKS)
        v_c = _sum_blocks(v_ptr, c, c_m, K, h_blocks, H_BLOCKS)
        whole_u = _sum_vector(u_ptr, m_blocks * B)
        whole_v = _sum_vector(v_ptr, h_blocks * K)
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
    student_ptr, teacher_ptr, value_ptr, work_ptr, gradient_ptr, N, K, B, head,
    H_BLOCKS: tl.constexpr, M_BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per tile: the gradients [4, N, N] of L_L, F_MM, F^E, F^C; the first stores their values."""
    sum_ptr, error_ptr, row_ptr, column_ptr, d_q_ptr = _results(work_ptr, K, B, BLOCK)
    h_blocks, m_blocks = tl.cdiv(B, BLOCK), tl.cdiv(K, BLOCK)
    first_program = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset = r.to(tl.int64)[:, None] * N + c[None, :]
    inside = (r < N)[:, None] & (c < N)[None, :]
    size = N.to(tl.int64) * N
    samples = ((r >= head) & (r < head + B))[:, None] & ((c >= head) & (c < head + B))[None, :]
    value, unit_s, unit_t, delta, scale = _cka_of_block(student_ptr, teacher_ptr, sum_ptr, N, head, B)
    tile = _cka_tile(student_ptr, teacher_ptr, unit_s, unit_t, delta, scale, offset, samples)
    tl.store(gradient_ptr + offset, tile, mask=inside)
    if first_program:
        tl.store(value_ptr, value)
    if K > 0:
        centroids = (r < K)[:, None] & (c < K)[None, :]
        sum_ptr += _tiles_of(B) * _SUMS
        value, unit_s, unit_t, delta, scale = _cka_of_block(
            student_ptr, teacher_ptr, sum_ptr, N, head - head, K
        )
        tile = _cka_tile(student_ptr, teacher_ptr, unit_s, unit_t, delta, scale, offset, centroids)
        tl.store(gradient_ptr + size + offset, tile, mask=inside)
        tile = _scatter_tile(
            d_q_ptr, row_ptr, row_ptr, column_ptr, column_ptr,
            N, K, B, head, r, c, h_blocks, m_blocks, False, H_BLOCKS, M_BLOCKS,
        )  # fmt: skip
        tl.store(gradient_ptr + 2 * size + offset, tile, mask=inside)
        rows, columns = m_blocks * B, h_blocks * K
        tile = _scatter_tile(
            d_q_ptr + B * K, row_ptr + rows, row_ptr + 2 * rows, column_ptr + columns, column_ptr + 2 * columns,
            N, K, B, head, r, c, h_blocks, m_blocks, True, H_BLOCKS, M_BLOCKS,
        )  # fmt: skip
        tl.store(gradient_ptr + 3 * size + offset, tile, mask=inside)
        if first_program:
            pairs = tl.maximum(B * K, 1).to(tl.float32)
            tiles = h_blocks * m_blocks
            tl.store(value_ptr + 1, value)
            tl.store(value_ptr + 2, _sum_vector(error_ptr, tiles) / pairs)
            tl.store(value_ptr + 3, _sum_vector(error_ptr + tiles, tiles) / pairs)
    else:
        zero = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for loss in range(1, 4):
            tl.store(gradient_ptr + loss * size + offset, zero, mask=inside)
            if first_program:
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


def _tile_count(rows: int) -> int:
    """Tiles on and below the diagonal of a block whose CKA is computed."""
    blocks = cdiv(rows, _CKA_BLOCK.value)
    return blocks * (blocks + 1) // 2


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
    tiles = _tile_count(batch) + _tile_count(num_centroid)
    floats = (
        2 * h_blocks * m_blocks + 3 * (m_blocks * batch + h_blocks * num_centroid) + 2 * batch * num_centroid
    )
    work = student.new_empty(_SUMS.value * tiles + cdiv(floats, 2), dtype=torch.float64)
    sizes = (total, num_centroid, batch, head)
    programs = tiles + h_blocks * m_blocks
    if programs:
        launch(
            _structure_stats_kernel, (programs,), (student, teacher, work, *sizes), {"BLOCK": _BLOCK},
            device=student.device, num_warps=8,
        )  # fmt: skip
    blocks = cdiv(total, _BLOCK)
    launch(
        _structure_grad_kernel, (blocks, blocks), (student, teacher, values, work, gradients, *sizes),
        {"H_BLOCKS": next_power_of_2(h_blocks), "M_BLOCKS": next_power_of_2(m_blocks), "BLOCK": _BLOCK},
        device=student.device, num_warps=8,
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
