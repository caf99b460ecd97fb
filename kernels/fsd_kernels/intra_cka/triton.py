# mypy: disable-error-code="no-untyped-def"
"""Intra-feature CKA as fused kernels: per layer pair and sample, two S x S Gram matrices that stay on chip.

    K = H X X^T H,  A = K_T / |K_T|,  B = K_S / |K_S|,  1 - CKA = 1/2 |A - B|^2
    G = ((A - B) + (1 - CKA) B) / |K_S|,  dY = 2 c G Y,  c = -d loss / d(1 - CKA) - CKA^-1 d loss / d(-log CKA)

H subtracts the mean over the kept rows. Rows are multiplied as they are and H is applied to the small matrix. The rows
of G sum to 0, once the backward has taken out what rounding left of their sums, so that Y need not be centred.
Features of 16 bits go from memory to the tensor cores unchanged: their products are exact in float32. G is two terms of
their type, its rounding and what that leaves. float32 features pass through registers, where the mean of a few rows is
subtracted: products of rounded terms would lose digits to a common offset.

Forward, S <= 128: ``_intra_cka_fwd_kernel``, one program per (pair, sample); it writes no Gram matrix. Longer samples:
``_intra_cka_tile_kernel`` writes the Gram matrices of one side, tile by tile, ``_intra_cka_mean_kernel`` the means of
their rows, and ``_intra_cka_finish_kernel`` the values and G. Backward: one launch, ``_intra_cka_bwd_kernel``
(S <= 128) or ``_intra_cka_bwd_tile_kernel``.

Layers are separate tensors. A launch takes up to 12 pairs, each as a tuple: address, strides, width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsd_kernels._launch import launch
from fsd_kernels._triton import (
    CKA_FLOOR,
    FLOORED,
    MIN_TILE,
    NORM_ROUNDING,
    RAW_OPERANDS,
    ROUNDING,
    Target,
    cdiv,
    neighbours,
    next_power_of_2,
    operand,
    pick,
    product_precision,
    round_to,
    small_shared_memory,
    target_of,
    triton_type,
)

# Rows of the largest Gram matrix that one program holds.
_WHOLE = 128
# Layer pairs of one launch.
_PAIRS = 12
# Rows whose mean is subtracted from float32 features.
_SHIFT_ROWS = tl.constexpr(4)


class Config(NamedTuple):
    """Tile sizes and launch parameters of one kernel."""

    block_s: int
    block_d: int
    parts: int
    """Number of programs that share the features of a sample; 1 in the forward."""
    num_warps: int
    num_stages: int


@triton.jit
def _sample_of(layers, pair, sample):
    """A sample of one of several layers: its address, strides of rows and features, and width."""
    x_ptr, stride_xb, stride_xs, stride_xd, width = layers[0]
    for i in tl.static_range(1, len(layers)):
        chosen = pair == i
        x_ptr = tl.where(chosen, layers[i][0], x_ptr)
        stride_xb = tl.where(chosen, layers[i][1], stride_xb)
        stride_xs = tl.where(chosen, layers[i][2], stride_xs)
        stride_xd = tl.where(chosen, layers[i][3], stride_xd)
        width = tl.where(chosen, layers[i][4], width)
    return x_ptr + sample.to(tl.int64) * stride_xb, stride_xs, stride_xd, width


@triton.jit
def _kept_rows(mask_ptr, stride_mb, stride_ms, sample, rows, S):
    """True for those of ``rows`` that exist and that the mask keeps."""
    kept = rows < S
    if mask_ptr is not None:
        offsets = sample.to(tl.int64) * stride_mb + rows.to(tl.int64) * stride_ms
        kept = kept & (tl.load(mask_ptr + offsets, mask=kept, other=0) != 0)
    return kept


@triton.jit
def _kept_count(mask_ptr, stride_mb, stride_ms, sample, S, BLOCK_S: tl.constexpr):
    """The number of kept rows of a sample, at least 1; the rows of the shift, and True for those that are kept."""
    count = S
    first = 0
    if mask_ptr is not None:
        counts = tl.zeros((BLOCK_S,), dtype=tl.int32)
        firsts = tl.zeros((BLOCK_S,), dtype=tl.int32) + S
        for start in range(0, S, BLOCK_S):
            rows = start + tl.arange(0, BLOCK_S)
            kept = _kept_rows(mask_ptr, stride_mb, stride_ms, sample, rows, S)
            counts += kept.to(tl.int32)
            firsts = tl.minimum(firsts, tl.where(kept, rows, S))
        count = tl.sum(counts)
        first = tl.min(firsts)
    shift_rows = first + tl.arange(0, _SHIFT_ROWS)
    shift_kept = _kept_rows(mask_ptr, stride_mb, stride_ms, sample, shift_rows, S)
    return tl.maximum(count, 1).to(tl.float32), shift_rows, shift_kept


@triton.jit
def _load(x_ptr, stride_xs, stride_xd, rows, kept, columns, width):
    """Load [rows, columns]. Dropped rows and columns past the width are not read: they are 0."""
    pointers = x_ptr + rows.to(tl.int64)[:, None] * stride_xs + columns.to(tl.int64)[None, :] * stride_xd
    return tl.load(pointers, mask=kept[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def _shift(x_ptr, stride_xs, stride_xd, shift_rows, shift_kept, columns, width):
    """The mean of a few kept rows of float32 features, [columns]."""
    x = _load(x_ptr, stride_xs, stride_xd, shift_rows, shift_kept, columns, width)
    return tl.sum(x, axis=0) / tl.maximum(tl.sum(shift_kept.to(tl.float32)), 1.0)


@triton.jit
def _operand(x_ptr, stride_xs, stride_xd, rows, kept, columns, width, shift, PRECISION: tl.constexpr):
    """[rows, columns] for the tensor cores: features of 16 bits as they are, float32 less ``shift``."""
    x = _load(x_ptr, stride_xs, stride_xd, rows, kept, columns, width)
    if x_ptr.dtype.element_ty == tl.float32:
        x = operand(tl.where(kept[:, None], x - shift[None, :], 0.0), tl.float32, PRECISION)
    elif not RAW_OPERANDS:
        x = x.to(tl.float32)
    return x


@triton.jit
def _gram(
    x_ptr, stride_xs, stride_xd, rows_i, kept_i, rows_j, kept_j, shift_rows, shift_kept, width,
    SAME: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X_i X_j^T [rows_i, rows_j] of the rows less a shift, and |shift|^2. SAME: i is j."""
    gram = tl.zeros((rows_i.shape[0], rows_j.shape[0]), dtype=tl.float32)
    squares = tl.zeros((BLOCK_D,), dtype=tl.float32)
    shift = squares
    for start in range(0, width, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        if x_ptr.dtype.element_ty == tl.float32:
            shift = _shift(x_ptr, stride_xs, stride_xd, shift_rows, shift_kept, columns, width)
            squares += shift * shift
        x_i = _operand(x_ptr, stride_xs, stride_xd, rows_i, kept_i, columns, width, shift, PRECISION)
        x_j = x_i
        if not SAME:
            x_j = _operand(x_ptr, stride_xs, stride_xd, rows_j, kept_j, columns, width, shift, PRECISION)
        gram = tl.dot(x_i, tl.trans(x_j), gram, input_precision=PRECISION)
    return gram, tl.sum(squares)


@triton.jit
def _centred(gram, kept, count):
    """A symmetric matrix whose dropped rows are 0, centred over the kept ones, and the mean of its entries."""
    means = tl.sum(gram, axis=1) / count
    mean = tl.sum(means) / count
    centred = gram - means[:, None] - means[None, :] + mean
    return tl.where(kept[:, None] & kept[None, :], centred, 0.0), mean


@triton.jit
def _unit(energy, mean_energy, shift_energy, count, X_TYPE: tl.constexpr):
    """True if a centred Gram matrix of trace ``energy`` has structure or is not finite, and its inverse trace.

    The inverse is NaN if the trace is not finite, 0 without structure. ``mean_energy`` is |mean row - shift|^2. Rows of
    16 bits that are nearly equal leave the rounding of their products in the trace, float32 rows that of themselves.
    """
    offset_energy = count * (mean_energy + shift_energy)
    infinite = ~(energy + offset_energy < float("inf"))
    exists = (energy > offset_energy * (ROUNDING if X_TYPE == tl.float32 else NORM_ROUNDING)) | infinite
    return exists, tl.where(infinite, float("nan"), tl.where(exists, 1.0 / energy, 0.0))


@triton.jit
def _losses(delta, product, exists):
    """(1 - CKA, -log CKA); near CKA = 1 the logarithm is log1p."""
    near = delta < 0.5
    # log1p(-d) = log(w) * -d / (w - 1) with w = 1 - d as rounded, or -d if w rounds to 1.
    x = tl.where(near, delta, 0.0)
    w = 1.0 - x
    small = w == 1.0
    log1p = tl.where(small, -x, tl.log(w) * (x / tl.where(small, 1.0, 1.0 - w)))
    # tl.maximum does not pass on NaN.
    logs = tl.where(near, -log1p, -tl.log(tl.where(product < CKA_FLOOR, CKA_FLOOR, product)))
    return tl.where(exists, delta, 0.0), tl.where(exists, logs, 0.0)


@triton.jit
def _intra_cka_fwd_kernel(
    students, teachers, mask_ptr, one_minus_cka_ptr, neg_log_ptr, g_ptr, stride_mb, stride_ms, B, S,
    PRECISION: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per (pair, sample): both Gram matrices, the losses and G."""
    item = tl.program_id(0)
    pair, sample = item // B, item % B
    rows = tl.arange(0, BLOCK_S)
    kept = _kept_rows(mask_ptr, stride_mb, stride_ms, sample, rows, S)
    count, shift_rows, shift_kept = _kept_count(mask_ptr, stride_mb, stride_ms, sample, S, BLOCK_S)

    x_ptr, stride_xs, stride_xd, width = _sample_of(teachers, pair, sample)
    unit_t, shift_t = _gram(
        x_ptr, stride_xs, stride_xd, rows, kept, rows, kept, shift_rows, shift_kept, width, True, BLOCK_D, PRECISION
    )  # fmt: skip
    y_ptr, stride_ys, stride_yd, width = _sample_of(students, pair, sample)
    unit_s, shift_s = _gram(
        y_ptr, stride_ys, stride_yd, rows, kept, rows, kept, shift_rows, shift_kept, width, True, BLOCK_D, PRECISION
    )  # fmt: skip
    unit_t, mean_t = _centred(unit_t, kept, count)
    unit_s, mean_s = _centred(unit_s, kept, count)

    diagonal = rows[:, None] == rows[None, :]
    energy_s = tl.sum(tl.where(diagonal, unit_s, 0.0))
    energy_t = tl.sum(tl.where(diagonal, unit_t, 0.0))
    exists_t, inverse_t = _unit(energy_t, mean_t, shift_t, count, x_ptr.dtype.element_ty)
    exists_s, inverse_s = _unit(energy_s, mean_s, shift_s, count, y_ptr.dtype.element_ty)
    exists = (exists_t & exists_s) | (inverse_t != inverse_t) | (inverse_s != inverse_s)
    # Dividing by the trace first keeps the fourth powers of the features out of overflow and underflow.
    unit_t *= inverse_t
    unit_s *= inverse_s
    norm_s = tl.sqrt(tl.sum(unit_s * unit_s))
    unit_t *= tl.where(exists_t, 1.0 / tl.sqrt(tl.sum(unit_t * unit_t)), 0.0)
    unit_s *= tl.where(exists_s, 1.0 / norm_s, 0.0)
    product = tl.sum(unit_t * unit_s)
    difference = unit_t - unit_s
    delta = 0.5 * tl.sum(difference * difference)
    one_minus_cka, neg_log = _losses(delta, product, exists)
    tl.store(one_minus_cka_ptr + item, one_minus_cka)
    tl.store(neg_log_ptr + item, neg_log)

    g = (difference + delta * unit_s) * tl.where(exists, 1.0 / (norm_s * energy_s), 0.0)
    g_ptr += item.to(tl.int64) * S * S
    inside = (rows < S)[:, None] & (rows < S)[None, :]
    tl.store(g_ptr + rows[:, None] * S + rows[None, :], g, mask=inside)


@triton.jit
def _intra_cka_tile_kernel(
    layers, mask_ptr, gram_ptr, shift_ptr, stride_mb, stride_ms, B, S,
    PRECISION: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per (lower-triangle tile, pair and sample) of one side: that tile, and its mirror image."""
    tile = tl.program_id(0)
    item = tl.program_id(1)
    pair, sample = item // B, item % B
    block_i = 0
    while (block_i + 1) * (block_i + 2) // 2 <= tile:
        block_i += 1
    block_j = tile - block_i * (block_i + 1) // 2
    rows_i = block_i * BLOCK_S + tl.arange(0, BLOCK_S)
    rows_j = block_j * BLOCK_S + tl.arange(0, BLOCK_S)
    kept_i = _kept_rows(mask_ptr, stride_mb, stride_ms, sample, rows_i, S)
    kept_j = _kept_rows(mask_ptr, stride_mb, stride_ms, sample, rows_j, S)
    _, shift_rows, shift_kept = _kept_count(mask_ptr, stride_mb, stride_ms, sample, S, BLOCK_S)
    x_ptr, stride_xs, stride_xd, width = _sample_of(layers, pair, sample)
    gram, shift = _gram(
        x_ptr, stride_xs, stride_xd, rows_i, kept_i, rows_j, kept_j, shift_rows, shift_kept, width,
        False, BLOCK_D, PRECISION,
    )  # fmt: skip
    if tile == 0:
        tl.store(shift_ptr + item, shift)
    gram_ptr += item.to(tl.int64) * S * S
    lower = (rows_i < S)[:, None] & (rows_j[None, :] <= rows_i[:, None])
    tl.store(gram_ptr + rows_i[:, None] * S + rows_j[None, :], gram, mask=lower)
    upper = (rows_i < S)[None, :] & (rows_j[:, None] < rows_i[None, :])
    tl.store(gram_ptr + rows_j[:, None] * S + rows_i[None, :], tl.trans(gram), mask=upper)


@triton.jit
def _intra_cka_mean_kernel(gram_ptr, mask_ptr, mean_ptr, stride_mb, stride_ms, B, S, BLOCK_S: tl.constexpr):
    """One program per (block of rows, side, pair and sample): means of a Gram matrix's rows over the kept columns."""
    item = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    count, _, _ = _kept_count(mask_ptr, stride_mb, stride_ms, item % B, S, BLOCK_S)
    gram_ptr += item.to(tl.int64) * S * S
    total = tl.zeros((BLOCK_S, BLOCK_S), dtype=tl.float32)
    for start in range(0, S, BLOCK_S):
        columns = start + tl.arange(0, BLOCK_S)
        inside = (rows < S)[:, None] & (columns < S)[None, :]
        total += tl.load(gram_ptr + rows[:, None] * S + columns[None, :], mask=inside, other=0.0)
    tl.store(mean_ptr + item.to(tl.int64) * S + rows, tl.sum(total, axis=1) / count, mask=rows < S)


@triton.jit
def _totals(gram_ptr, mean_ptr, S, count, BLOCK_S: tl.constexpr):
    """The trace of a Gram matrix once it is centred, and the mean of its entries as it is."""
    traces = tl.zeros((BLOCK_S,), dtype=tl.float32)
    sums = tl.zeros((BLOCK_S,), dtype=tl.float32)
    for start in range(0, S, BLOCK_S):
        rows = start + tl.arange(0, BLOCK_S)
        traces += tl.load(gram_ptr + rows.to(tl.int64) * S + rows, mask=rows < S, other=0.0)
        sums += tl.load(mean_ptr + rows, mask=rows < S, other=0.0)
    mean = tl.sum(sums) / count
    return tl.sum(traces) - count * mean, mean


@triton.jit
def _centred_tile(gram_ptr, mean_ptr, mean, rows, kept_rows, columns, kept_columns, S):
    """One tile of a Gram matrix, centred."""
    inside = kept_rows[:, None] & kept_columns[None, :]
    tile = tl.load(gram_ptr + rows[:, None] * S + columns[None, :], mask=inside, other=0.0)
    means_i = tl.load(mean_ptr + rows, mask=kept_rows, other=0.0)
    means_j = tl.load(mean_ptr + columns, mask=kept_columns, other=0.0)
    return tl.where(inside, tile - means_i[:, None] - means_j[None, :] + mean, 0.0)


@triton.jit
def _intra_cka_finish_kernel(
    gram_ptr, mean_ptr, shift_ptr, mask_ptr, one_minus_cka_ptr, neg_log_ptr, g_ptr, stride_mb, stride_ms, B, S,
    items, STUDENT_TYPE: tl.constexpr, TEACHER_TYPE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per (pair, sample): centre both Gram matrices tile by tile, the student's first; losses and G."""
    item = tl.program_id(0)
    sample = item % B
    count, _, _ = _kept_count(mask_ptr, stride_mb, stride_ms, sample, S, BLOCK_S)
    s_ptr, t_ptr = gram_ptr + item.to(tl.int64) * S * S, gram_ptr + (items + item).to(tl.int64) * S * S
    mean_s_ptr, mean_t_ptr = mean_ptr + item.to(tl.int64) * S, mean_ptr + (items + item).to(tl.int64) * S
    energy_s, mean_s = _totals(s_ptr, mean_s_ptr, S, count, BLOCK_S)
    energy_t, mean_t = _totals(t_ptr, mean_t_ptr, S, count, BLOCK_S)
    exists_s, inverse_s = _unit(energy_s, mean_s, tl.load(shift_ptr + item), count, STUDENT_TYPE)
    exists_t, inverse_t = _unit(energy_t, mean_t, tl.load(shift_ptr + items + item), count, TEACHER_TYPE)
    exists = (exists_s & exists_t) | (inverse_s != inverse_s) | (inverse_t != inverse_t)

    # The Frobenius norms, then 1 - CKA and CKA: an entry below the diagonal counts twice. G comes last.
    offsets = tl.arange(0, BLOCK_S)
    scale_s = inverse_s
    scale_t = inverse_t
    delta = 0.0
    scale = 0.0
    for step in tl.static_range(3):
        first = tl.zeros((BLOCK_S,), dtype=tl.float32)
        second = tl.zeros((BLOCK_S,), dtype=tl.float32)
        for i in range(0, tl.cdiv(S, BLOCK_S)):
            for j in range(0, i + 1):
                rows, columns = i * BLOCK_S + offsets, j * BLOCK_S + offsets
                kept_i = _kept_rows(mask_ptr, stride_mb, stride_ms, sample, rows, S)
                kept_j = _kept_rows(mask_ptr, stride_mb, stride_ms, sample, columns, S)
                s = _centred_tile(s_ptr, mean_s_ptr, mean_s, rows, kept_i, columns, kept_j, S) * scale_s
                t = _centred_tile(t_ptr, mean_t_ptr, mean_t, rows, kept_i, columns, kept_j, S) * scale_t
                weight = tl.where(columns[None, :] == rows[:, None], 1.0, 2.0)
                weight = tl.where(columns[None, :] > rows[:, None], 0.0, weight)
                if step == 0:
                    first += tl.sum(weight * s * s, axis=0)
                    second += tl.sum(weight * t * t, axis=0)
                elif step == 1:
                    first += tl.sum(weight * (t - s) * (t - s), axis=0)
                    second += tl.sum(weight * s * t, axis=0)
                else:
                    g = (t - s + delta * s) * scale
                    target_ptr = g_ptr + item.to(tl.int64) * S * S
                    lower = (rows < S)[:, None] & (columns[None, :] <= rows[:, None])
                    tl.store(target_ptr + rows[:, None] * S + columns[None, :], g, mask=lower)
                    upper = (rows < S)[None, :] & (columns[:, None] < rows[None, :])
                    tl.store(target_ptr + columns[:, None] * S + rows[None, :], tl.trans(g), mask=upper)
        if step == 0:
            norm_s = tl.sqrt(tl.sum(first))
            scale_s *= tl.where(exists_s, 1.0 / norm_s, 0.0)
            scale_t *= tl.where(exists_t, 1.0 / tl.sqrt(tl.sum(second)), 0.0)
            scale = tl.where(exists, inverse_s / norm_s, 0.0)
        elif step == 1:
            delta = 0.5 * tl.sum(first)
            one_minus_cka, neg_log = _losses(delta, tl.sum(second), exists)
            tl.store(one_minus_cka_ptr + item, one_minus_cka)
            tl.store(neg_log_ptr + item, neg_log)


@triton.jit
def _coefficient(d_one_minus_cka_ptr, d_neg_log_ptr, neg_log_ptr, strides, pair, sample, B):
    """2 c of a sample: minus the losses' derivatives by CKA. On its floor -log CKA is constant."""
    coefficient = 0.0
    if d_one_minus_cka_ptr is not None:
        coefficient -= tl.load(d_one_minus_cka_ptr + pair * strides[0][0] + sample * strides[0][1])
    if d_neg_log_ptr is not None:
        neg_log = tl.load(neg_log_ptr + pair * B + sample)
        derivative = tl.load(d_neg_log_ptr + pair * strides[1][0] + sample * strides[1][1]) * tl.exp(neg_log)
        coefficient -= tl.where(neg_log >= FLOORED, 0.0, derivative)
    return 2.0 * coefficient


@triton.jit
def _terms(g, X_TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Columns of G divided by their largest entry, as two terms of the features' type, and these entries.

    G itself underflows in float16. float32 is one term, given twice.
    """
    scale = tl.max(tl.abs(g), axis=0)
    g *= tl.where(scale > 0.0, 1.0 / scale, 0.0)[None, :]
    if X_TYPE == tl.float32:
        high = operand(g, tl.float32, PRECISION)
        low = high
    else:
        high = round_to(g, X_TYPE)
        low = round_to(g - high.to(tl.float32), X_TYPE)
    return high, low, scale


@triton.jit
def _product(y, high, low, scale, X_TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """(G Y)^T = Y^T G^T for G^T as ``_terms`` gives it: on sm_90 only the left operand would pass through registers."""
    product = tl.dot(tl.trans(y), high, input_precision=PRECISION) * scale[None, :]
    if X_TYPE != tl.float32:
        # Not added in the tensor cores: two products in a row into one sum have been compiled wrongly.
        product += tl.dot(tl.trans(y), low, input_precision=PRECISION) * scale[None, :]
    return product


@triton.jit
def _intra_cka_bwd_kernel(
    students, gradients, mask_ptr, g_ptr, neg_log_ptr, d_one_minus_cka_ptr, d_neg_log_ptr, strides,
    stride_mb, stride_ms, B, S, part_d,
    PRECISION: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per (pair, sample, part of D): dY = 2 c G Y. G is read once and stays on chip."""
    item = tl.program_id(0)
    pair, sample = item // B, item % B
    rows = tl.arange(0, BLOCK_S)
    kept = _kept_rows(mask_ptr, stride_mb, stride_ms, sample, rows, S)
    count, shift_rows, shift_kept = _kept_count(mask_ptr, stride_mb, stride_ms, sample, S, BLOCK_S)
    y_ptr, stride_ys, stride_yd, width = _sample_of(students, pair, sample)
    dy_ptr, stride_ds, _, width = _sample_of(gradients, pair, sample)
    X_TYPE: tl.constexpr = y_ptr.dtype.element_ty

    inside = kept[:, None] & kept[None, :]
    g_ptr += item.to(tl.int64) * S * S
    g = tl.load(g_ptr + rows[:, None] * S + rows[None, :], mask=inside, other=0.0)
    # G is symmetric: this is the transpose of G with rows that sum to 0.
    g = tl.where(inside, g - (tl.sum(g, axis=0) / count)[None, :], 0.0)
    high, low, scale = _terms(g, X_TYPE, PRECISION)
    scale *= _coefficient(d_one_minus_cka_ptr, d_neg_log_ptr, neg_log_ptr, strides, pair, sample, B)
    first = tl.program_id(1) * part_d
    shift = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(first, tl.minimum(first + part_d, width), BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        if X_TYPE == tl.float32:
            shift = _shift(y_ptr, stride_ys, stride_yd, shift_rows, shift_kept, columns, width)
        y = _operand(y_ptr, stride_ys, stride_yd, rows, kept, columns, width, shift, PRECISION)
        dy = tl.trans(_product(y, high, low, scale, X_TYPE, PRECISION).to(dy_ptr.dtype.element_ty))
        pointers = dy_ptr + rows.to(tl.int64)[:, None] * stride_ds + columns[None, :]
        stored = (rows < S)[:, None] & (columns < width)[None, :]
        tl.store(pointers, tl.where(kept[:, None], dy, 0.0), mask=stored)


@triton.jit
def _intra_cka_bwd_tile_kernel(
    students, gradients, mask_ptr, g_ptr, neg_log_ptr, d_one_minus_cka_ptr, d_neg_log_ptr, strides,
    stride_mb, stride_ms, B, S,
    PRECISION: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per (block of rows, slice of D, pair and sample): one tile of dY = 2 c G Y."""
    item = tl.program_id(2)
    pair, sample = item // B, item % B
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    kept = _kept_rows(mask_ptr, stride_mb, stride_ms, sample, rows, S)
    count, shift_rows, shift_kept = _kept_count(mask_ptr, stride_mb, stride_ms, sample, S, BLOCK_S)
    y_ptr, stride_ys, stride_yd, width = _sample_of(students, pair, sample)
    dy_ptr, stride_ds, _, width = _sample_of(gradients, pair, sample)
    X_TYPE: tl.constexpr = y_ptr.dtype.element_ty
    shift = tl.zeros((BLOCK_D,), dtype=tl.float32)
    if X_TYPE == tl.float32:
        shift = _shift(y_ptr, stride_ys, stride_yd, shift_rows, shift_kept, columns, width)

    g_ptr += item.to(tl.int64) * S * S
    sums = tl.zeros((BLOCK_S,), dtype=tl.float32)
    for start in range(0, S, BLOCK_S):
        others = start + tl.arange(0, BLOCK_S)
        inside = (others < S)[:, None] & kept[None, :]
        g = tl.load(g_ptr + others.to(tl.int64)[:, None] * S + rows[None, :], mask=inside, other=0.0)
        sums += tl.sum(g, axis=0)
    dy = tl.zeros((BLOCK_D, BLOCK_S), dtype=tl.float32)
    for start in range(0, S, BLOCK_S):
        others = start + tl.arange(0, BLOCK_S)
        kept_others = _kept_rows(mask_ptr, stride_mb, stride_ms, sample, others, S)
        y = _operand(y_ptr, stride_ys, stride_yd, others, kept_others, columns, width, shift, PRECISION)
        inside = kept_others[:, None] & kept[None, :]
        g = tl.load(g_ptr + others.to(tl.int64)[:, None] * S + rows[None, :], mask=inside, other=0.0)
        g = tl.where(inside, g - (sums / count)[None, :], 0.0)
        high, low, scale = _terms(g, X_TYPE, PRECISION)
        dy += _product(y, high, low, scale, X_TYPE, PRECISION)
    dy *= _coefficient(d_one_minus_cka_ptr, d_neg_log_ptr, neg_log_ptr, strides, pair, sample, B)
    pointers = dy_ptr + rows.to(tl.int64)[:, None] * stride_ds + columns[None, :]
    stored = (rows < S)[:, None] & (columns < width)[None, :]
    tl.store(pointers, tl.where(kept[:, None], tl.trans(dy.to(dy_ptr.dtype.element_ty)), 0.0), mask=stored)


@functools.lru_cache(maxsize=256)
def forward_config(rows: int, dtype: torch.dtype, target: Target) -> Config:
    """Configuration of the forward; ``dtype`` is the wider of both sides."""
    small = small_shared_memory(target)
    block_s = max(MIN_TILE, min(_WHOLE, next_power_of_2(rows)))
    # sm_80 keeps the operands of mma.sync in registers, next to two Gram matrices.
    crowded = small or (target.arch == 80 and dtype == torch.float32)
    block_d = (16 if crowded else 64) if dtype == torch.float32 else 64 if crowded else 128
    if rows > _WHOLE:
        # A tile has two operands.
        block_d //= 2
    num_stages = 2 if small else 3 if dtype == torch.float32 else 4
    return Config(block_s, block_d, 1, 8 if block_s == 128 else 4, num_stages)


@functools.lru_cache(maxsize=256)
def backward_config(rows: int, width: int, items: int, dtype: torch.dtype, target: Target) -> Config:
    """Configuration of the backward for ``items`` = pairs x samples."""
    small = small_shared_memory(target)
    # G with 128 rows leaves a small shared memory no room. With more rows than one tile, G comes in tiles.
    whole = min(_WHOLE, 64) if small else _WHOLE
    # On sm_80 float32's G takes most of it: 155,904 of 166,912 bytes with 16 columns and 2 stages.
    crowded = small or (target.arch == 80 and dtype == torch.float32)
    block_s = max(MIN_TILE, next_power_of_2(rows)) if rows <= whole else min(64, whole)
    block_d = (32 if dtype == torch.float32 else 64) // (2 if crowded else 1)
    num_stages = 2 if crowded or rows > whole else 3
    # Every part reads G again, from the cache: at most half of the bytes of Y and dY.
    affordable = 1 + 2 * width * dtype.itemsize // (2 * 4 * rows)
    parts = max(1, min(4, affordable, cdiv(target.multiprocessors, items), cdiv(width, block_d)))
    return Config(block_s, block_d, parts, 8 if block_s == 128 else 4, num_stages)


def _arguments(layers: Sequence[Tensor]) -> tuple[tuple[Any, ...], ...]:
    """What kernels are told of each layer: address, strides and width."""
    return tuple([(layer, *layer.stride(), layer.shape[2]) for layer in layers])


def _mask_arguments(mask: Tensor | None) -> tuple[Tensor | None, int, int]:
    """The mask's address and strides."""
    return (None, 0, 0) if mask is None else (mask.view(torch.uint8), mask.stride(0), mask.stride(1))


def _in_launches(
    run: Callable[..., None], mask: Tensor | None, *values: Sequence[Tensor] | Tensor | None
) -> None:
    """Call ``run`` with the mask and the values, each of P layer pairs, or with 12 pairs of them after the others."""
    first = values[0]
    pairs = 0 if first is None else len(first)
    if pairs <= _PAIRS:
        run(mask, *values)
        return
    for start in range(0, pairs, _PAIRS):
        run(mask, *(None if each is None else each[start : start + _PAIRS] for each in values))


def forward(
    students: Sequence[Tensor], teachers: Sequence[Tensor], mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (1 - CKA [P, B], -log CKA [P, B], G [P, B, S, S]), float32.

    Raises:
        TypeError: Features are not float16, bfloat16 or float32.
    """
    first = students[0]
    triton_type("student", first.dtype)
    triton_type("teacher", teachers[0].dtype)
    pairs, (batch, rows, _), device = len(students), first.shape, first.device
    one_minus_cka = torch.empty((pairs, batch), dtype=torch.float32, device=device)
    neg_log = torch.empty((pairs, batch), dtype=torch.float32, device=device)
    g = torch.empty((pairs, batch, rows, rows), dtype=torch.float32, device=device)
    if batch == 0 or rows == 0:
        return one_minus_cka.zero_(), neg_log.zero_(), g
    run = _forward_whole if rows <= _WHOLE else _forward_tiled
    _in_launches(run, mask, students, teachers, one_minus_cka, neg_log, g)
    return one_minus_cka, neg_log, g


def _forward_whole(
    mask: Tensor | None, students: Sequence[Tensor], teachers: Sequence[Tensor], *outputs: Tensor
) -> None:
    """Fill (1 - CKA, -log CKA, G); a program holds all rows of a sample."""
    pairs, batch, rows, _ = outputs[-1].shape
    student, teacher, device = students[0].dtype, teachers[0].dtype, students[0].device
    target = target_of(device)
    precision = product_precision(target, student, teacher)
    mask_ptr, *strides = _mask_arguments(mask)
    arguments = (_arguments(students), _arguments(teachers), mask_ptr, *outputs, *strides, batch, rows)

    def run(config: Config) -> None:
        constants = {"PRECISION": precision, "BLOCK_S": config.block_s, "BLOCK_D": config.block_d}
        launch(
            _intra_cka_fwd_kernel, (pairs * batch,), arguments, constants,
            device=device, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    config = forward_config(rows, student if student == torch.float32 else teacher, target)
    key = ("intra_cka_fwd", target, precision, student, teacher, config)
    run(pick(key, config, lambda: neighbours(config, "block_d"), run))


def _forward_tiled(
    mask: Tensor | None, students: Sequence[Tensor], teachers: Sequence[Tensor], *outputs: Tensor
) -> None:
    """Fill (1 - CKA, -log CKA, G); a program holds a tile of a Gram matrix."""
    pairs, batch, rows, _ = outputs[-1].shape
    items, device = pairs * batch, students[0].device
    target = target_of(device)
    grams = torch.empty((2, items, rows, rows), dtype=torch.float32, device=device)
    means = torch.empty((2, items, rows), dtype=torch.float32, device=device)
    shifts = torch.empty((2, items), dtype=torch.float32, device=device)
    mask_ptr, *strides = _mask_arguments(mask)
    for side, layers in enumerate((students, teachers)):
        config = forward_config(rows, layers[0].dtype, target)
        blocks, precision = cdiv(rows, config.block_s), product_precision(target, layers[0].dtype)
        launch(
            _intra_cka_tile_kernel, (blocks * (blocks + 1) // 2, items),
            (_arguments(layers), mask_ptr, grams[side], shifts[side], *strides, batch, rows),
            {"PRECISION": precision, "BLOCK_S": config.block_s, "BLOCK_D": config.block_d},
            device=device, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    block_s = min(64, _WHOLE)
    launch(
        _intra_cka_mean_kernel, (cdiv(rows, block_s), 2 * items),
        (grams, mask_ptr, means, *strides, batch, rows), {"BLOCK_S": block_s}, device=device, num_warps=4,
    )  # fmt: skip
    types = [triton_type("features", layers[0].dtype) for layers in (students, teachers)]
    launch(
        _intra_cka_finish_kernel, (items,),
        (grams, means, shifts, mask_ptr, *outputs, *strides, batch, rows, items),
        {"STUDENT_TYPE": types[0], "TEACHER_TYPE": types[1], "BLOCK_S": block_s}, device=device, num_warps=8,
    )  # fmt: skip


def backward(
    students: Sequence[Tensor], mask: Tensor | None, gradient: Tensor, neg_log: Tensor,
    d_one_minus_cka: Tensor | None, d_neg_log: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Return dY [B, S, D] per layer pair, given G, -log CKA and the losses' derivatives [P, B], None for none.

    Raises:
        TypeError: Features are not float16, bfloat16 or float32.
    """
    triton_type("student", students[0].dtype)
    results = [torch.empty_like(layer, memory_format=torch.contiguous_format) for layer in students]
    if gradient.numel() > 0 and max([layer.shape[2] for layer in students]) > 0:
        _in_launches(_backward, mask, students, results, gradient, neg_log, d_one_minus_cka, d_neg_log)
    return results


def _backward(
    mask: Tensor | None, students: Sequence[Tensor], results: Sequence[Tensor], gradient: Tensor, neg_log: Tensor,
    d_one_minus_cka: Tensor | None, d_neg_log: Tensor | None,
) -> None:  # fmt: skip
    """Fill the results."""
    pairs, batch, rows, _ = gradient.shape
    dtype, device, width = students[0].dtype, gradient.device, max([layer.shape[2] for layer in students])
    target = target_of(device)
    precision = product_precision(target, dtype)
    derivatives = (d_one_minus_cka, d_neg_log)
    strides = tuple([(0, 0) if each is None else each.stride() for each in derivatives])
    mask_ptr, *mask_strides = _mask_arguments(mask)
    arguments = (
        _arguments(students), _arguments(results), mask_ptr, gradient, neg_log, *derivatives, strides,
        *mask_strides, batch, rows,
    )  # fmt: skip

    def run(config: Config) -> None:
        constants = {"PRECISION": precision, "BLOCK_S": config.block_s, "BLOCK_D": config.block_d}
        if rows <= config.block_s:
            sizes: tuple[int, ...]
            part_d = cdiv(cdiv(width, config.parts), config.block_d) * config.block_d
            kernel, sizes = _intra_cka_bwd_kernel, (part_d,)
            grid: tuple[int, ...] = (pairs * batch, cdiv(width, part_d))
        else:
            tiles = cdiv(rows, config.block_s), cdiv(width, config.block_d)
            kernel, sizes = _intra_cka_bwd_tile_kernel, ()
            grid = (*tiles, pairs * batch)
        launch(
            kernel, grid, (*arguments, *sizes), constants,
            device=device, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    config = backward_config(rows, width, pairs * batch, dtype, target)
    key = ("intra_cka_bwd", target, precision, dtype, config)
    run(pick(key, config, lambda: neighbours(config, "block_d"), run))
