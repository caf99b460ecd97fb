# mypy: disable-error-code="no-untyped-def"
"""Intra-feature CKA as fused kernels: per layer pair and sample, two centred S x S Grams that stay on chip.

    A = K_T / |K_T|,  B = K_S / |K_S|,  1 - CKA = 1/2 |A - B|^2,  G = ((A - B) + (1 - CKA) B) / |K_S|
    dY = 2 c G Y_c

Forward, S <= 128: ``_intra_cka_fwd_kernel``, one program per (pair, sample). It reads each feature once and writes no
Gram matrix. If S is larger, or pairs x samples are too few to fill the GPU, ``_intra_cka_tile_kernel`` computes
lower-triangle tiles of both Gram matrices over parts of D, and ``_intra_cka_finish_kernel`` sums the parts in a fixed
order. With S > 128 a tile does not hold all rows, so ``_intra_cka_mean_kernel`` computes the means first. Backward: one
launch, ``_intra_cka_bwd_kernel`` (S <= 128) or ``_intra_cka_bwd_tile_kernel``.

A tile holds rows of a slice of D. It is centred in float32 over the kept rows before it is rounded for the dot. Layers
are separate tensors: kernels find them through a table of addresses, strides and widths.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsd_kernels._triton import (
    CKA_FLOOR,
    LAUNCH_OPTIONS,
    MIN_TILE,
    ROUNDING,
    Target,
    cdiv,
    dot_precision,
    kernel_dot_type,
    launch_guard,
    neighbours,
    next_power_of_2,
    operand,
    pick,
    small_shared_memory,
    target_of,
    triton_type,
)

# Rows of the largest Gram matrix that one program holds.
_WHOLE = 128

# Columns of the table of layers: address, strides of samples, rows and features in elements, width.
_FIELDS = tl.constexpr(5)


class Config(NamedTuple):
    """Tile sizes and launch parameters of one kernel."""

    block_s: int
    block_d: int
    splits: int
    num_warps: int
    num_stages: int


@triton.jit
def _layer(table_ptr, layer, ALIGNED: tl.constexpr, X_TYPE: tl.constexpr):
    """Look up a layer: its address, strides and width. ALIGNED: all are multiples of 16, features adjacent."""
    row = table_ptr + layer * _FIELDS
    x_ptr = tl.load(row).to(tl.pointer_type(X_TYPE))
    stride_xb = tl.load(row + 1)
    stride_xs = tl.load(row + 2)
    stride_xd = tl.load(row + 3)
    width = tl.load(row + 4)
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
        stride_xb = tl.multiple_of(stride_xb, 16)
        stride_xs = tl.multiple_of(stride_xs, 16)
        width = tl.multiple_of(width, 16)
    return x_ptr, stride_xb, stride_xs, stride_xd, width


@triton.jit
def _load_rows(x_ptr, stride_xs, stride_xd, rows, kept, columns, width, ALIGNED: tl.constexpr):
    """Load [rows, columns] in float32. Dropped rows and columns past the width are not read: they are 0."""
    if ALIGNED:
        pointers = x_ptr + rows.to(tl.int64)[:, None] * stride_xs + columns[None, :]
    else:
        pointers = x_ptr + rows.to(tl.int64)[:, None] * stride_xs + columns.to(tl.int64)[None, :] * stride_xd
    return tl.load(pointers, mask=kept[:, None] & (columns < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _kept_rows(mask_ptr, stride_mb, stride_ms, sample, rows, S, HAS_MASK: tl.constexpr):
    """True for those of ``rows`` that exist and that the mask keeps."""
    kept = rows < S
    if HAS_MASK:
        flags = tl.load(
            mask_ptr + sample.to(tl.int64) * stride_mb + rows.to(tl.int64) * stride_ms, mask=kept, other=0
        )
        kept = kept & (flags != 0)
    return kept


@triton.jit
def _kept_count(mask_ptr, stride_mb, stride_ms, sample, S, HAS_MASK: tl.constexpr, BLOCK_S: tl.constexpr):
    """The number of kept rows of a sample, at least 1."""
    count = tl.maximum(S, 1).to(tl.float32)
    if HAS_MASK:
        counts = tl.zeros((BLOCK_S,), dtype=tl.int32)
        for start in range(0, S, BLOCK_S):
            rows = start + tl.arange(0, BLOCK_S)
            counts += _kept_rows(mask_ptr, stride_mb, stride_ms, sample, rows, S, HAS_MASK).to(tl.int32)
        count = tl.maximum(tl.sum(counts), 1).to(tl.float32)
    return count


@triton.jit
def _centred_gram(
    x_ptr,
    stride_xs,
    stride_xd,
    rows,
    kept,
    count,
    first,
    last,
    width,
    ALIGNED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gram matrix [BLOCK_S, BLOCK_S] of all rows, centred, over features [first, last), and |mean|^2 over these."""
    gram = tl.zeros((BLOCK_S, BLOCK_S), dtype=tl.float32)
    squares = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(first, last, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        x = _load_rows(x_ptr, stride_xs, stride_xd, rows, kept, columns, width, ALIGNED)
        mean = tl.sum(x, axis=0) / count
        squares += mean * mean
        centred = operand(tl.where(kept[:, None], x - mean[None, :], 0.0), DOT_TYPE, PRECISION)
        gram = tl.dot(centred, tl.trans(centred), gram, input_precision=PRECISION)
    return gram, tl.sum(squares)


@triton.jit
def _unit(energy, mean_energy, count):
    """True if a Gram matrix of trace ``energy`` has structure or is not finite, and its inverse trace.

    The inverse is NaN if the trace is not finite, 0 without structure.
    """
    infinite = ~(energy + count * mean_energy < float("inf"))
    exists = (energy > count * mean_energy * ROUNDING) | infinite
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
    student_table_ptr,
    teacher_table_ptr,
    mask_ptr,
    one_minus_cka_ptr,
    neg_log_ptr,
    g_ptr,
    stride_mb,
    stride_ms,
    B,
    S,
    HAS_MASK: tl.constexpr,
    STUDENT_TYPE: tl.constexpr,
    TEACHER_TYPE: tl.constexpr,
    STUDENT_DOT: tl.constexpr,
    TEACHER_DOT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (pair, sample): both Gram matrices, the losses and G."""
    item = tl.program_id(0)
    layer, sample = item // B, item % B
    rows = tl.arange(0, BLOCK_S)
    kept = _kept_rows(mask_ptr, stride_mb, stride_ms, sample, rows, S, HAS_MASK)
    count = tl.maximum(tl.sum(kept.to(tl.float32)), 1.0)

    x_ptr, stride_xb, stride_xs, stride_xd, width = _layer(teacher_table_ptr, layer, ALIGNED, TEACHER_TYPE)
    x_ptr += sample.to(tl.int64) * stride_xb
    unit_t, mean_t = _centred_gram(
        x_ptr, stride_xs, stride_xd, rows, kept, count, 0, width, width,
        ALIGNED, BLOCK_S, BLOCK_D, TEACHER_DOT, PRECISION,
    )  # fmt: skip
    y_ptr, stride_yb, stride_ys, stride_yd, width = _layer(student_table_ptr, layer, ALIGNED, STUDENT_TYPE)
    y_ptr += sample.to(tl.int64) * stride_yb
    unit_s, mean_s = _centred_gram(
        y_ptr, stride_ys, stride_yd, rows, kept, count, 0, width, width,
        ALIGNED, BLOCK_S, BLOCK_D, STUDENT_DOT, PRECISION,
    )  # fmt: skip

    diagonal = rows[:, None] == rows[None, :]
    energy_s = tl.sum(tl.where(diagonal, unit_s, 0.0))
    exists_t, inverse_t = _unit(tl.sum(tl.where(diagonal, unit_t, 0.0)), mean_t, count)
    exists_s, inverse_s = _unit(energy_s, mean_s, count)
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
def _intra_cka_mean_kernel(
    table_ptr,
    mask_ptr,
    mean_ptr,
    stride_mb,
    stride_ms,
    stride_mean,
    B,
    S,
    HAS_MASK: tl.constexpr,
    X_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (pair, sample, slice of D): the means over kept rows, to [P * B, stride_mean]."""
    item = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    layer, sample = item // B, item % B
    x_ptr, stride_xb, stride_xs, stride_xd, width = _layer(table_ptr, layer, ALIGNED, X_TYPE)
    x_ptr += sample.to(tl.int64) * stride_xb
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, S, BLOCK_S):
        rows = start + tl.arange(0, BLOCK_S)
        kept = _kept_rows(mask_ptr, stride_mb, stride_ms, sample, rows, S, HAS_MASK)
        total += tl.sum(_load_rows(x_ptr, stride_xs, stride_xd, rows, kept, columns, width, ALIGNED), axis=0)
    count = _kept_count(mask_ptr, stride_mb, stride_ms, sample, S, HAS_MASK, BLOCK_S)
    tl.store(mean_ptr + item.to(tl.int64) * stride_mean + columns, total / count, mask=columns < width)


@triton.jit
def _intra_cka_tile_kernel(
    table_ptr,
    mask_ptr,
    mean_ptr,
    partial_ptr,
    energy_ptr,
    stride_mb,
    stride_ms,
    stride_mean,
    B,
    S,
    items,
    part_d,
    HAS_MASK: tl.constexpr,
    X_TYPE: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (lower-triangle tile, part of D, pair and sample) of one side: that tile over that part.

    The lower triangle goes to partial [splits, P * B, S, S], |mean|^2 over the part to energy [splits, P * B]. WHOLE:
    the tile is the whole Gram matrix and computes the means itself.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    item = tl.program_id(2)
    layer, sample = item // B, item % B
    block_i = 0
    while (block_i + 1) * (block_i + 2) // 2 <= tile:
        block_i += 1
    block_j = tile - block_i * (block_i + 1) // 2
    rows_i = block_i * BLOCK_S + tl.arange(0, BLOCK_S)
    rows_j = block_j * BLOCK_S + tl.arange(0, BLOCK_S)
    kept_i = _kept_rows(mask_ptr, stride_mb, stride_ms, sample, rows_i, S, HAS_MASK)
    x_ptr, stride_xb, stride_xs, stride_xd, width = _layer(table_ptr, layer, ALIGNED, X_TYPE)
    x_ptr += sample.to(tl.int64) * stride_xb
    first = part * part_d
    last = tl.minimum(first + part_d, width)
    if WHOLE:
        count = tl.maximum(tl.sum(kept_i.to(tl.float32)), 1.0)
        gram, mean_energy = _centred_gram(
            x_ptr, stride_xs, stride_xd, rows_i, kept_i, count, first, last, width,
            ALIGNED, BLOCK_S, BLOCK_D, DOT_TYPE, PRECISION,
        )  # fmt: skip
    else:
        kept_j = _kept_rows(mask_ptr, stride_mb, stride_ms, sample, rows_j, S, HAS_MASK)
        mean_ptr += item.to(tl.int64) * stride_mean
        gram = tl.zeros((BLOCK_S, BLOCK_S), dtype=tl.float32)
        squares = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for start in range(first, last, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            mean = tl.load(mean_ptr + columns, mask=columns < width, other=0.0)
            squares += mean * mean
            x_i = _load_rows(x_ptr, stride_xs, stride_xd, rows_i, kept_i, columns, width, ALIGNED)
            x_j = _load_rows(x_ptr, stride_xs, stride_xd, rows_j, kept_j, columns, width, ALIGNED)
            x_i = operand(tl.where(kept_i[:, None], x_i - mean[None, :], 0.0), DOT_TYPE, PRECISION)
            x_j = operand(tl.where(kept_j[:, None], x_j - mean[None, :], 0.0), DOT_TYPE, PRECISION)
            gram = tl.dot(x_i, tl.trans(x_j), gram, input_precision=PRECISION)
        mean_energy = tl.sum(squares)
    slot = (part * items + item).to(tl.int64)
    if tile == 0:
        tl.store(energy_ptr + slot, mean_energy)
    lower = (rows_i < S)[:, None] & (rows_j[None, :] <= rows_i[:, None])
    tl.store(partial_ptr + slot * S * S + rows_i[:, None] * S + rows_j[None, :], gram, mask=lower)


@triton.jit
def _sum_parts(partial_ptr, item, items, splits: tl.constexpr, S, rows, columns, BLOCK_S: tl.constexpr):
    """Sum the parts of one lower-triangle tile in order; entries above the diagonal are 0.

    The number of parts is a constant, so that the compiler loads all parts without waiting for the first.
    """
    total = tl.zeros((BLOCK_S, BLOCK_S), dtype=tl.float32)
    lower = (rows < S)[:, None] & (columns[None, :] <= rows[:, None])
    offsets = rows[:, None] * S + columns[None, :]
    for part in tl.static_range(splits):
        base = partial_ptr + (part * items + item).to(tl.int64) * S * S
        total += tl.load(base + offsets, mask=lower, other=0.0)
    return total


@triton.jit
def _intra_cka_finish_kernel(
    student_partial_ptr,
    teacher_partial_ptr,
    student_energy_ptr,
    teacher_energy_ptr,
    mask_ptr,
    one_minus_cka_ptr,
    neg_log_ptr,
    g_ptr,
    stride_mb,
    stride_ms,
    B,
    S,
    student_items,
    teacher_items,
    student_splits: tl.constexpr,
    teacher_splits: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program per (pair, sample): sum the parts of both Gram matrices tile by tile, then the losses and G."""
    item = tl.program_id(0)
    count = _kept_count(mask_ptr, stride_mb, stride_ms, item % B, S, HAS_MASK, BLOCK_S)
    mean_s = 0.0
    for part in tl.static_range(student_splits):
        mean_s += tl.load(student_energy_ptr + part * student_items + item)
    mean_t = 0.0
    for part in tl.static_range(teacher_splits):
        mean_t += tl.load(teacher_energy_ptr + part * teacher_items + item)
    blocks = tl.cdiv(S, BLOCK_S)
    offsets = tl.arange(0, BLOCK_S)

    # The traces.
    sums_s = tl.zeros((BLOCK_S,), dtype=tl.float32)
    sums_t = tl.zeros((BLOCK_S,), dtype=tl.float32)
    for i in range(0, blocks):
        rows = i * BLOCK_S + offsets
        entries = rows.to(tl.int64) * S + rows
        for part in tl.static_range(student_splits):
            base = student_partial_ptr + (part * student_items + item).to(tl.int64) * S * S
            sums_s += tl.load(base + entries, mask=rows < S, other=0.0)
        for part in tl.static_range(teacher_splits):
            base = teacher_partial_ptr + (part * teacher_items + item).to(tl.int64) * S * S
            sums_t += tl.load(base + entries, mask=rows < S, other=0.0)
    energy_s = tl.sum(sums_s)
    exists_s, inverse_s = _unit(energy_s, mean_s, count)
    exists_t, inverse_t = _unit(tl.sum(sums_t), mean_t, count)
    exists = (exists_s & exists_t) | (inverse_s != inverse_s) | (inverse_t != inverse_t)

    # The Frobenius norms. An entry below the diagonal counts twice.
    sums_s = tl.zeros((BLOCK_S,), dtype=tl.float32)
    sums_t = tl.zeros((BLOCK_S,), dtype=tl.float32)
    for i in range(0, blocks):
        for j in range(0, i + 1):
            rows, columns = i * BLOCK_S + offsets, j * BLOCK_S + offsets
            weight = tl.where(rows[:, None] == columns[None, :], 1.0, 2.0)
            s = _sum_parts(
                student_partial_ptr, item, student_items, student_splits, S, rows, columns, BLOCK_S
            )
            t = _sum_parts(
                teacher_partial_ptr, item, teacher_items, teacher_splits, S, rows, columns, BLOCK_S
            )
            s *= inverse_s
            t *= inverse_t
            sums_s += tl.sum(weight * s * s, axis=0)
            sums_t += tl.sum(weight * t * t, axis=0)
    norm_s = tl.sqrt(tl.sum(sums_s))
    scale_s = inverse_s * tl.where(exists_s, 1.0 / norm_s, 0.0)
    scale_t = inverse_t * tl.where(exists_t, 1.0 / tl.sqrt(tl.sum(sums_t)), 0.0)

    # 1 - CKA and CKA.
    deltas = tl.zeros((BLOCK_S,), dtype=tl.float32)
    products = tl.zeros((BLOCK_S,), dtype=tl.float32)
    for i in range(0, blocks):
        for j in range(0, i + 1):
            rows, columns = i * BLOCK_S + offsets, j * BLOCK_S + offsets
            weight = tl.where(rows[:, None] == columns[None, :], 1.0, 2.0)
            s = _sum_parts(
                student_partial_ptr, item, student_items, student_splits, S, rows, columns, BLOCK_S
            )
            t = _sum_parts(
                teacher_partial_ptr, item, teacher_items, teacher_splits, S, rows, columns, BLOCK_S
            )
            s *= scale_s
            t *= scale_t
            deltas += tl.sum(weight * (t - s) * (t - s), axis=0)
            products += tl.sum(weight * s * t, axis=0)
    delta = 0.5 * tl.sum(deltas)
    one_minus_cka, neg_log = _losses(delta, tl.sum(products), exists)
    tl.store(one_minus_cka_ptr + item, one_minus_cka)
    tl.store(neg_log_ptr + item, neg_log)

    g_ptr += item.to(tl.int64) * S * S
    scale = tl.where(exists, 1.0 / (norm_s * energy_s), 0.0)
    for i in range(0, blocks):
        for j in range(0, i + 1):
            rows, columns = i * BLOCK_S + offsets, j * BLOCK_S + offsets
            s = _sum_parts(
                student_partial_ptr, item, student_items, student_splits, S, rows, columns, BLOCK_S
            )
            t = _sum_parts(
                teacher_partial_ptr, item, teacher_items, teacher_splits, S, rows, columns, BLOCK_S
            )
            s *= scale_s
            g = (t * scale_t - s + delta * s) * scale
            lower = (rows < S)[:, None] & (columns[None, :] <= rows[:, None])
            tl.store(g_ptr + rows[:, None] * S + columns[None, :], g, mask=lower)
            upper = (rows < S)[None, :] & (columns[:, None] < rows[None, :])
            tl.store(g_ptr + columns[:, None] * S + rows[None, :], tl.trans(g), mask=upper)


@triton.jit
def _scaled(g, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Split G into (rows divided by their largest entry, in the dot's type; these entries): G underflows in float16."""
    scale = tl.max(tl.abs(g), axis=1)
    inverse = tl.where(scale > 0.0, 1.0 / scale, 0.0)
    return operand(g * inverse[:, None], DOT_TYPE, PRECISION), scale


@triton.jit
def _intra_cka_bwd_kernel(
    student_table_ptr,
    gradient_table_ptr,
    mask_ptr,
    g_ptr,
    coefficient_ptr,
    stride_mb,
    stride_ms,
    B,
    S,
    part_d,
    HAS_MASK: tl.constexpr,
    X_TYPE: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (pair, sample, part of D): dY = 2 c G Y_c. G is read once and stays on chip."""
    item = tl.program_id(0)
    layer, sample = item // B, item % B
    rows = tl.arange(0, BLOCK_S)
    kept = _kept_rows(mask_ptr, stride_mb, stride_ms, sample, rows, S, HAS_MASK)
    count = tl.maximum(tl.sum(kept.to(tl.float32)), 1.0)
    inside = kept[:, None] & kept[None, :]
    g_ptr += item.to(tl.int64) * S * S
    g = tl.load(g_ptr + rows[:, None] * S + rows[None, :], mask=inside, other=0.0)
    g, scale = _scaled(g, DOT_TYPE, PRECISION)
    scale *= 2.0 * tl.load(coefficient_ptr + item)
    y_ptr, stride_yb, stride_ys, stride_yd, width = _layer(student_table_ptr, layer, ALIGNED, X_TYPE)
    y_ptr += sample.to(tl.int64) * stride_yb
    dy_ptr, stride_db, stride_ds, _, width = _layer(gradient_table_ptr, layer, ALIGNED, X_TYPE)
    dy_ptr += sample.to(tl.int64) * stride_db
    first = tl.program_id(1) * part_d
    for start in range(first, tl.minimum(first + part_d, width), BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        y = _load_rows(y_ptr, stride_ys, stride_yd, rows, kept, columns, width, ALIGNED)
        mean = tl.sum(y, axis=0) / count
        centred = operand(tl.where(kept[:, None], y - mean[None, :], 0.0), DOT_TYPE, PRECISION)
        dy = tl.dot(g, centred, input_precision=PRECISION) * scale[:, None]
        dy = tl.where(kept[:, None], dy, 0.0)
        pointers = dy_ptr + rows.to(tl.int64)[:, None] * stride_ds + columns[None, :]
        tl.store(pointers, dy.to(X_TYPE), mask=(rows < S)[:, None] & (columns < width)[None, :])


@triton.jit
def _intra_cka_bwd_tile_kernel(
    student_table_ptr,
    gradient_table_ptr,
    mask_ptr,
    g_ptr,
    coefficient_ptr,
    stride_mb,
    stride_ms,
    B,
    S,
    HAS_MASK: tl.constexpr,
    X_TYPE: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (block of rows, slice of D, pair and sample): one tile of dY = 2 c G Y_c."""
    item = tl.program_id(2)
    layer, sample = item // B, item % B
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    kept = _kept_rows(mask_ptr, stride_mb, stride_ms, sample, rows, S, HAS_MASK)
    y_ptr, stride_yb, stride_ys, stride_yd, width = _layer(student_table_ptr, layer, ALIGNED, X_TYPE)
    y_ptr += sample.to(tl.int64) * stride_yb
    mean = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, S, BLOCK_S):
        others = start + tl.arange(0, BLOCK_S)
        kept_others = _kept_rows(mask_ptr, stride_mb, stride_ms, sample, others, S, HAS_MASK)
        y = _load_rows(y_ptr, stride_ys, stride_yd, others, kept_others, columns, width, ALIGNED)
        mean += tl.sum(y, axis=0)
    mean /= _kept_count(mask_ptr, stride_mb, stride_ms, sample, S, HAS_MASK, BLOCK_S)
    g_ptr += item.to(tl.int64) * S * S
    dy = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
    for start in range(0, S, BLOCK_S):
        others = start + tl.arange(0, BLOCK_S)
        kept_others = _kept_rows(mask_ptr, stride_mb, stride_ms, sample, others, S, HAS_MASK)
        y = _load_rows(y_ptr, stride_ys, stride_yd, others, kept_others, columns, width, ALIGNED)
        centred = operand(tl.where(kept_others[:, None], y - mean[None, :], 0.0), DOT_TYPE, PRECISION)
        inside = kept[:, None] & kept_others[None, :]
        g = tl.load(g_ptr + rows.to(tl.int64)[:, None] * S + others[None, :], mask=inside, other=0.0)
        g, scale = _scaled(g, DOT_TYPE, PRECISION)
        dy += tl.dot(g, centred, input_precision=PRECISION) * scale[:, None]
    dy = tl.where(kept[:, None], dy * (2.0 * tl.load(coefficient_ptr + item)), 0.0)
    dy_ptr, stride_db, stride_ds, _, width = _layer(gradient_table_ptr, layer, ALIGNED, X_TYPE)
    dy_ptr += sample.to(tl.int64) * stride_db
    pointers = dy_ptr + rows.to(tl.int64)[:, None] * stride_ds + columns[None, :]
    tl.store(pointers, dy.to(X_TYPE), mask=(rows < S)[:, None] & (columns < width)[None, :])


def forward_config(rows: int, items: int, dtype: torch.dtype, precision: str, target: Target) -> Config:
    """Configuration of the forward for ``items`` = pairs x samples; ``splits`` 0 asks for the fused kernel."""
    block_s = max(MIN_TILE, min(_WHOLE, next_power_of_2(rows)))
    ieee = precision == "ieee" and dtype == torch.float32
    block_d = 32 if dtype == torch.float32 else 64
    # sm_80 keeps the operands of mma.sync in registers, next to two Gram matrices.
    crowded = target.arch == 80 and block_s == _WHOLE and dtype == torch.float32
    if small_shared_memory(target) or ieee or crowded:
        block_d //= 2
    # Without tensor cores the operands of a product pass through registers, which takes more warps.
    num_warps = 8 if block_s == _WHOLE or (ieee and block_s > MIN_TILE) else 4
    num_stages = 2 if small_shared_memory(target) or ieee else 3
    blocks = cdiv(rows, block_s)
    programs = items * blocks * (blocks + 1)
    # One program per sample if these fill the GPU. Without tensor cores two Gram matrices of 128 x 128 leave registers
    # for 8 columns, fewer than triton before 3.8 accepts in a product.
    fused = rows <= _WHOLE and items >= target.multiprocessors and not (ieee and block_s == _WHOLE)
    # Parts of D are written and read again. If memory is the limit, there are just enough for the multiprocessors.
    splits = (
        0 if fused else max(1, min(4, target.multiprocessors // max(1, programs if ieee else 2 * programs)))
    )
    if not fused and block_s == _WHOLE and rows <= _WHOLE and target.arch == 90 and not ieee:
        block_d = 64
    return Config(block_s, block_d, splits, num_warps, num_stages)


def backward_config(
    rows: int, width: int, items: int, dtype: torch.dtype, precision: str, target: Target
) -> Config:
    """Configuration of the backward; ``splits`` is the number of parts of D, each of which reads G."""
    ieee = precision == "ieee" and dtype == torch.float32
    whole = min(32, _WHOLE) if ieee else _WHOLE
    narrow = dtype != torch.float32
    # With more rows than one tile, G comes in tiles too, and its stages share the memory with those of Y.
    block_s = max(MIN_TILE, next_power_of_2(rows)) if rows <= whole else min(64, whole)
    block_d = 64 if narrow else 32
    if small_shared_memory(target):
        block_d //= 2
    num_warps = 8 if block_s == 128 else 4
    num_stages = 2 if small_shared_memory(target) or rows > whole else 3
    # Every part reads G again, from the cache: at most half of the bytes of Y and dY.
    affordable = 1 + 2 * width * (2 if narrow else 4) // (2 * 4 * max(1, rows))
    splits = max(1, min(4, affordable, cdiv(target.multiprocessors, max(1, items)), cdiv(width, block_d)))
    return Config(block_s, block_d, splits, num_warps, num_stages)


@functools.lru_cache(maxsize=512)
def _copied(fields: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """A table on the device, and the pinned memory that it was copied from."""
    host = torch.tensor(fields, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True), host


def _table(layers: Sequence[Tensor]) -> Tensor:
    """[P, 5] int64 on the layers' device: address, strides of samples, rows and features, width.

    Tables are cached, because the allocator gives a training step the addresses of the step before. Each stream has its
    own, because another stream would not wait for the copy.
    """
    fields = tuple((layer.data_ptr(), *layer.stride(), layer.shape[2]) for layer in layers)
    device = layers[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _copied(fields, device, stream)[0]


def _aligned(layers: Sequence[Tensor]) -> bool:
    """True if addresses, strides and widths allow rows to be read in vectors of 16 bytes."""
    return all(
        layer.stride(2) == 1
        and layer.data_ptr() % 16 == 0
        and all(size % 16 == 0 for size in (layer.stride(0), layer.stride(1), layer.shape[2]))
        for layer in layers
    )


def _mask_arguments(mask: Tensor | None, placeholder: Tensor) -> tuple[Tensor, int, int, bool]:
    if mask is None:
        return placeholder, 0, 0, False
    return mask.view(torch.uint8), mask.stride(0), mask.stride(1), True


def forward(
    students: Sequence[Tensor], teachers: Sequence[Tensor], mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (1 - CKA [P, B], -log CKA [P, B], G [P, B, S, S]), float32.

    Raises:
        TypeError: Features are not float16, bfloat16 or float32.
    """
    first = students[0]
    batch, rows = first.shape[:2]
    student_type = triton_type("student", first.dtype)
    teacher_type = triton_type("teacher", teachers[0].dtype)
    items = len(students) * batch
    one_minus_cka = torch.empty((len(students), batch), dtype=torch.float32, device=first.device)
    neg_log = torch.empty_like(one_minus_cka)
    g = torch.empty((len(students), batch, rows, rows), dtype=torch.float32, device=first.device)
    if items == 0 or rows == 0:
        return one_minus_cka.zero_(), neg_log.zero_(), g
    precision = dot_precision()
    target = target_of(first.device)
    wider = max(first.dtype, teachers[0].dtype, key=lambda dtype: dtype.itemsize)
    config = forward_config(rows, items, wider, precision, target)
    aligned = _aligned(students) and _aligned(teachers)
    sides = ((students, student_type), (teachers, teacher_type))
    mask_ptr, stride_mb, stride_ms, has_mask = _mask_arguments(mask, one_minus_cka)
    with launch_guard(first):
        tables = [_table(layers) for layers, _ in sides]

        def fused(config: Config) -> None:
            _intra_cka_fwd_kernel[(items,)](
                *tables, mask_ptr, one_minus_cka, neg_log, g, stride_mb, stride_ms, batch, rows,
                HAS_MASK=has_mask, STUDENT_TYPE=student_type, TEACHER_TYPE=teacher_type,
                STUDENT_DOT=kernel_dot_type(first.dtype), TEACHER_DOT=kernel_dot_type(teachers[0].dtype),
                ALIGNED=aligned, PRECISION=precision, BLOCK_S=config.block_s, BLOCK_D=config.block_d,
                num_warps=config.num_warps, num_stages=config.num_stages, **LAUNCH_OPTIONS,
            )  # fmt: skip

        if config.splits == 0:
            key = ("intra_cka_fwd", target, precision, student_type, teacher_type, config)
            fused(pick(key, config, lambda: neighbours(config, "block_d"), fused))
            return one_minus_cka, neg_log, g

        # One launch for both sides if their types agree; the teacher's layers follow the student's.
        if student_type == teacher_type:
            groups: list[tuple[Tensor, Sequence[Tensor], tl.dtype]] = [
                (torch.cat(tables), [*students, *teachers], student_type)
            ]
        else:
            groups = [(table, layers, kind) for table, (layers, kind) in zip(tables, sides, strict=True)]
        whole = rows <= config.block_s
        blocks = cdiv(rows, config.block_s)
        partials: list[Tensor] = []
        energies: list[Tensor] = []
        for table, layers, x_type in groups:
            width = max(1, *(layer.shape[2] for layer in layers))
            part_d = cdiv(cdiv(width, config.splits), config.block_d) * config.block_d
            splits, slots = cdiv(width, part_d), len(layers) * batch
            partial = torch.empty((splits, slots, rows, rows), dtype=torch.float32, device=first.device)
            energy = torch.empty((splits, slots), dtype=torch.float32, device=first.device)
            mean = partial
            if not whole:
                mean = torch.empty((slots, width), dtype=torch.float32, device=first.device)
                _intra_cka_mean_kernel[(slots, cdiv(width, config.block_d))](
                    table, mask_ptr, mean, stride_mb, stride_ms, width, batch, rows,
                    HAS_MASK=has_mask, X_TYPE=x_type, ALIGNED=aligned,
                    BLOCK_S=config.block_s, BLOCK_D=config.block_d, num_warps=4, **LAUNCH_OPTIONS,
                )  # fmt: skip
            _intra_cka_tile_kernel[(blocks * (blocks + 1) // 2, splits, slots)](
                table, mask_ptr, mean, partial, energy, stride_mb, stride_ms, width, batch, rows, slots, part_d,
                HAS_MASK=has_mask, X_TYPE=x_type, DOT_TYPE=kernel_dot_type(layers[0].dtype),
                ALIGNED=aligned, PRECISION=precision, WHOLE=whole,
                BLOCK_S=config.block_s, BLOCK_D=config.block_d,
                num_warps=config.num_warps, num_stages=config.num_stages, **LAUNCH_OPTIONS,
            )  # fmt: skip
            starts = list(range(0, slots, items))
            partials += [partial[:, start : start + items] for start in starts]
            energies += [energy[:, start : start + items] for start in starts]
        _intra_cka_finish_kernel[(items,)](
            *partials, *energies, mask_ptr, one_minus_cka, neg_log, g, stride_mb, stride_ms,
            batch, rows, *(energy.stride(0) for energy in energies), *(len(energy) for energy in energies),
            HAS_MASK=has_mask, BLOCK_S=min(64, config.block_s), num_warps=8, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return one_minus_cka, neg_log, g


def backward(
    students: Sequence[Tensor], mask: Tensor | None, gradient: Tensor, coefficient: Tensor
) -> list[Tensor]:
    """Return dY [B, S, D] per layer pair: 2 c G Y_c, with c = ``coefficient`` [P, B].

    Raises:
        TypeError: Features are not float16, bfloat16 or float32.
    """
    first = students[0]
    batch, rows = first.shape[:2]
    x_type = triton_type("student", first.dtype)
    items = len(students) * batch
    results = [torch.empty_like(layer, memory_format=torch.contiguous_format) for layer in students]
    width = max(layer.shape[2] for layer in students)
    if items == 0 or rows == 0 or width == 0:
        return results
    gradient, coefficient = gradient.contiguous(), coefficient.contiguous()
    precision = dot_precision()
    target = target_of(first.device)
    config = backward_config(rows, width, items, first.dtype, precision, target)
    aligned = _aligned(students) and _aligned(results)
    mask_ptr, stride_mb, stride_ms, has_mask = _mask_arguments(mask, gradient)
    with launch_guard(first):
        tables = [_table(students), _table(results)]

        def launch(config: Config) -> None:
            meta = {
                "HAS_MASK": has_mask, "X_TYPE": x_type, "DOT_TYPE": kernel_dot_type(first.dtype),
                "ALIGNED": aligned, "PRECISION": precision, "BLOCK_S": config.block_s, "BLOCK_D": config.block_d,
                "num_warps": config.num_warps, "num_stages": config.num_stages, **LAUNCH_OPTIONS,
            }  # fmt: skip
            arguments = (*tables, mask_ptr, gradient, coefficient, stride_mb, stride_ms, batch, rows)
            if rows <= config.block_s:
                part_d = cdiv(cdiv(width, config.splits), config.block_d) * config.block_d
                _intra_cka_bwd_kernel[(items, cdiv(width, part_d))](*arguments, part_d, **meta)
            else:
                grid = (cdiv(rows, config.block_s), cdiv(width, config.block_d), items)
                _intra_cka_bwd_tile_kernel[grid](*arguments, **meta)

        key = ("intra_cka_bwd", target, precision, x_type, config)
        launch(pick(key, config, lambda: neighbours(config, "block_d"), launch))
    return results
