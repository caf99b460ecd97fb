# mypy: disable-error-code="no-untyped-def"
"""The Gram matrix of stacked, centred rows as fused kernels, split over the feature axis.

    Z = [m_1 - mu_m, ..., m_K - mu_m, mu_m,  h_1 - mu_h, ..., h_B - mu_h, mu_h - mu_m],   Gamma = Z Z^T
    d[memory; features] = T^T (dGamma + dGamma^T) Z        with the constant T that takes [memory; features] to Z

Rows of a tile are rows of Z: memory, features and both means are put together on chip, centred in float32 and
then rounded for the dot; the inputs are never concatenated. With N <= 192 rows (``_gram_fwd_kernel``) a program
holds all of them for its part of F, and each input is read once; above (``_gram_tile_kernel``) a program
computes one tile of the lower triangle and walks all rows for the means. Parts of F are summed by
``_gram_sum_kernel`` in a fixed order, in float64, which also mirrors the triangle. Backward:
``_gram_rows_kernel`` forms T^T (dGamma + dGamma^T) once, then ``_gram_bwd_kernel`` or ``_gram_bwd_tile_kernel``
multiply it with Z slice by slice, straight into the gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsd_kernels._triton import (
    LAUNCH_OPTIONS,
    MIN_TILE,
    Target,
    cdiv,
    dot_precision,
    dot_type,
    kernel_dot_type,
    launch_guard,
    next_power_of_2,
    pick,
    small_shared_memory,
    target_of,
    triton_type,
)

# Rows of Z that one program of the fused kernels holds at most, in up to three tiles.
_FUSED_ROWS = 192


# Sizes that take any value without another compilation. Widths and strides are specialised: they align loads.
_SIZES = ("K", "B", "head", "N", "token", "parts")


class Config(NamedTuple):
    """Tile sizes and launch parameters of one kernel."""

    blocks: tuple[int, ...]
    """Rows of the tiles held by one program; a single one if programs hold one tile of Gamma each."""
    fused: bool
    """Whether one program holds all rows."""
    block_f: int
    parts: int
    num_warps: int
    num_stages: int


@triton.jit
def _load_tile(
    memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf,
    mask_ptr, stride_kb, stride_ks,
    rows, start, columns, K, B, head, memory_width, features_width, token,
    MEMORY: tl.constexpr, FEATURES: tl.constexpr, HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr,
):  # fmt: skip
    """Rows of [memory; -; features; -] in float32, 0 in the rows of the means, in dropped tokens and outside."""
    x = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    if MEMORY:
        inside = (rows < K)[:, None] & (columns < memory_width)[None, :]
        pointers = memory_ptr + rows.to(tl.int64)[:, None] * stride_mk + columns[None, :] * stride_mf
        x += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if FEATURES:
        samples = rows - head
        exists = (samples >= 0) & (samples < B)
        inside = exists[:, None] & (columns < features_width)[None, :]
        if HAS_MASK:
            inside = inside & _kept(
                mask_ptr,
                stride_kb,
                stride_ks,
                samples,
                exists,
                start,
                columns,
                features_width,
                token,
                ONE_TOKEN,
            )
        pointers = features_ptr + samples.to(tl.int64)[:, None] * stride_hb + columns[None, :] * stride_hf
        x += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _kept(
    mask_ptr,
    stride_kb,
    stride_ks,
    samples,
    exists,
    start,
    columns,
    features_width,
    token,
    ONE_TOKEN: tl.constexpr,
):
    """Which entries belong to tokens the mask keeps. ONE_TOKEN: all columns belong to one token."""
    row_ptr = mask_ptr + samples.to(tl.int64) * stride_kb
    if ONE_TOKEN:
        # Past the end of the features any position will do: nothing is read there.
        position = tl.minimum(start // token, features_width // token - 1)
        kept = (tl.load(row_ptr + position * stride_ks, mask=exists, other=0) != 0)[:, None]
    else:
        inside = exists[:, None] & (columns < features_width)[None, :]
        pointers = row_ptr[:, None] + (columns // token)[None, :] * stride_ks
        kept = tl.load(pointers, mask=inside, other=0) != 0
    return kept


@triton.jit
def _sums(x, rows, K):
    """Sums over the memory's rows and over the features' rows of a tile."""
    from_memory = (rows < K)[:, None]
    return tl.sum(tl.where(from_memory, x, 0.0), axis=0), tl.sum(tl.where(from_memory, 0.0, x), axis=0)


@triton.jit
def _centre(x, mean_m, mean_h, rows, K, B, head, N, DOT_TYPE: tl.constexpr):
    """Rows of Z from rows of [memory; -; features; -]."""
    is_memory = (rows < K)[:, None]
    is_features = ((rows >= head) & (rows < head + B))[:, None]
    mean = tl.where((rows < head)[:, None], mean_m[None, :], mean_h[None, :])
    is_mean = ((rows == head - 1) | (rows == N - 1))[:, None]
    # The last row is mu_h - mu_m; without a memory mu_m is 0.
    kept = tl.where((rows < head)[:, None], mean_m[None, :], (mean_h - mean_m)[None, :])
    return tl.where(is_memory | is_features, x - mean, tl.where(is_mean, kept, 0.0)).to(DOT_TYPE)


@triton.jit
def _store_lower(partial_ptr, gram, rows, columns, N, head, KNOWN: tl.constexpr):
    """Store a tile's entries on and below the diagonal, without the memory's own block where that is known."""
    lower = (rows < N)[:, None] & (columns[None, :] <= rows[:, None])
    if KNOWN:
        lower = lower & ((rows >= head)[:, None] | (columns >= head)[None, :])
    tl.store(partial_ptr + rows[:, None] * N + columns[None, :], gram, mask=lower)


@triton.jit(do_not_specialize=_SIZES)
def _gram_fwd_kernel(
    memory_ptr,
    features_ptr,
    mask_ptr,
    partial_ptr,
    stride_mk,
    stride_mf,
    stride_hb,
    stride_hf,
    stride_kb,
    stride_ks,
    K,
    B,
    head,
    N,
    memory_width,
    features_width,
    token,
    part_f,
    HAS_MASK: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    KNOWN: tl.constexpr,
    TILES: tl.constexpr,
    MEMORY_TILES: tl.constexpr,
    FIRST_FEATURES: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_0: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One program per part of F: the lower triangle of all of Gamma over that part, to partial [parts, N, N].

    Tiles below MEMORY_TILES hold memory rows, tiles from FIRST_FEATURES on hold features.
    """
    part = tl.program_id(0)
    first = part * part_f
    width = tl.maximum(memory_width, features_width)
    rows_0 = tl.arange(0, BLOCK_0)
    rows_1 = BLOCK_0 + tl.arange(0, BLOCK_1)
    rows_2 = BLOCK_0 + BLOCK_1 + tl.arange(0, BLOCK_2)
    gram_00 = tl.zeros((BLOCK_0, BLOCK_0), dtype=tl.float32)
    if TILES > 1:
        gram_01 = tl.zeros((BLOCK_0, BLOCK_1), dtype=tl.float32)
        gram_11 = tl.zeros((BLOCK_1, BLOCK_1), dtype=tl.float32)
    if TILES > 2:
        gram_02 = tl.zeros((BLOCK_0, BLOCK_2), dtype=tl.float32)
        gram_12 = tl.zeros((BLOCK_1, BLOCK_2), dtype=tl.float32)
        gram_22 = tl.zeros((BLOCK_2, BLOCK_2), dtype=tl.float32)
    for start in range(first, tl.minimum(first + part_f, width), BLOCK_F):
        columns = start + tl.arange(0, BLOCK_F)
        z_0 = _load_tile(
            memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf,
            mask_ptr, stride_kb, stride_ks,
            rows_0, start, columns, K, B, head, memory_width, features_width, token,
            MEMORY_TILES > 0, FIRST_FEATURES == 0, HAS_MASK, ONE_TOKEN,
        )  # fmt: skip
        mean_m, mean_h = _sums(z_0, rows_0, K)
        if TILES > 1:
            z_1 = _load_tile(
                memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf,
                mask_ptr, stride_kb, stride_ks,
                rows_1, start, columns, K, B, head, memory_width, features_width, token,
                MEMORY_TILES > 1, FIRST_FEATURES <= 1, HAS_MASK, ONE_TOKEN,
            )  # fmt: skip
            sums_m, sums_h = _sums(z_1, rows_1, K)
            mean_m += sums_m
            mean_h += sums_h
        if TILES > 2:
            z_2 = _load_tile(
                memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf,
                mask_ptr, stride_kb, stride_ks,
                rows_2, start, columns, K, B, head, memory_width, features_width, token,
                MEMORY_TILES > 2, FIRST_FEATURES <= 2, HAS_MASK, ONE_TOKEN,
            )  # fmt: skip
            sums_m, sums_h = _sums(z_2, rows_2, K)
            mean_m += sums_m
            mean_h += sums_h
        mean_m /= tl.maximum(K, 1)
        mean_h /= tl.maximum(B, 1)
        # Tiles above the diagonal, transposed when stored: their many rows and few columns suit the tensor cores.
        z_0 = _centre(z_0, mean_m, mean_h, rows_0, K, B, head, N, DOT_TYPE)
        gram_00 = tl.dot(z_0, tl.trans(z_0), gram_00, input_precision=PRECISION)
        if TILES > 1:
            z_1 = _centre(z_1, mean_m, mean_h, rows_1, K, B, head, N, DOT_TYPE)
            gram_01 = tl.dot(z_0, tl.trans(z_1), gram_01, input_precision=PRECISION)
            gram_11 = tl.dot(z_1, tl.trans(z_1), gram_11, input_precision=PRECISION)
        if TILES > 2:
            z_2 = _centre(z_2, mean_m, mean_h, rows_2, K, B, head, N, DOT_TYPE)
            gram_02 = tl.dot(z_0, tl.trans(z_2), gram_02, input_precision=PRECISION)
            gram_12 = tl.dot(z_1, tl.trans(z_2), gram_12, input_precision=PRECISION)
            gram_22 = tl.dot(z_2, tl.trans(z_2), gram_22, input_precision=PRECISION)
    partial_ptr += part.to(tl.int64) * N * N
    _store_lower(partial_ptr, gram_00, rows_0, rows_0, N, head, KNOWN)
    if TILES > 1:
        _store_lower(partial_ptr, tl.trans(gram_01), rows_1, rows_0, N, head, KNOWN)
        _store_lower(partial_ptr, gram_11, rows_1, rows_1, N, head, KNOWN)
    if TILES > 2:
        _store_lower(partial_ptr, tl.trans(gram_02), rows_2, rows_0, N, head, KNOWN)
        _store_lower(partial_ptr, tl.trans(gram_12), rows_2, rows_1, N, head, KNOWN)
        _store_lower(partial_ptr, gram_22, rows_2, rows_2, N, head, KNOWN)


@triton.jit
def _means(
    memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf,
    mask_ptr, stride_kb, stride_ks,
    start, columns, K, B, head, N, memory_width, features_width, token,
    HAS_MEMORY: tl.constexpr, HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The means of the memory and of the features over a slice of F, from all rows."""
    mean_m = tl.zeros((BLOCK_F,), dtype=tl.float32)
    mean_h = tl.zeros((BLOCK_F,), dtype=tl.float32)
    for first in range(0, N, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        x = _load_tile(
            memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf,
            mask_ptr, stride_kb, stride_ks,
            rows, start, columns, K, B, head, memory_width, features_width, token,
            HAS_MEMORY, True, HAS_MASK, ONE_TOKEN,
        )  # fmt: skip
        sums_m, sums_h = _sums(x, rows, K)
        mean_m += sums_m
        mean_h += sums_h
    return mean_m / tl.maximum(K, 1), mean_h / tl.maximum(B, 1)


@triton.jit(do_not_specialize=_SIZES)
def _gram_tile_kernel(
    memory_ptr,
    features_ptr,
    mask_ptr,
    partial_ptr,
    stride_mk,
    stride_mf,
    stride_hb,
    stride_hf,
    stride_kb,
    stride_ks,
    K,
    B,
    head,
    N,
    memory_width,
    features_width,
    token,
    part_f,
    HAS_MEMORY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    KNOWN: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One program per (lower-triangle tile, part of F): that tile of Gamma over that part."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    block_i = 0
    while (block_i + 1) * (block_i + 2) // 2 <= tile:
        block_i += 1
    block_j = tile - block_i * (block_i + 1) // 2
    rows_i = block_i * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_j = block_j * BLOCK_N + tl.arange(0, BLOCK_N)
    first = part * part_f
    last = tl.minimum(first + part_f, tl.maximum(memory_width, features_width))
    if KNOWN:
        # Nothing to do for a tile within the memory's own block.
        last = tl.where((block_i + 1) * BLOCK_N <= head, first, last)
    gram = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
    for start in range(first, last, BLOCK_F):
        columns = start + tl.arange(0, BLOCK_F)
        mean_m, mean_h = _means(
            memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf,
            mask_ptr, stride_kb, stride_ks,
            start, columns, K, B, head, N, memory_width, features_width, token,
            HAS_MEMORY, HAS_MASK, ONE_TOKEN, BLOCK_N, BLOCK_F,
        )  # fmt: skip
        z_i = _load_tile(
            memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf,
            mask_ptr, stride_kb, stride_ks,
            rows_i, start, columns, K, B, head, memory_width, features_width, token,
            HAS_MEMORY, True, HAS_MASK, ONE_TOKEN,
        )  # fmt: skip
        z_j = _load_tile(
            memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf,
            mask_ptr, stride_kb, stride_ks,
            rows_j, start, columns, K, B, head, memory_width, features_width, token,
            HAS_MEMORY, True, HAS_MASK, ONE_TOKEN,
        )  # fmt: skip
        z_i = _centre(z_i, mean_m, mean_h, rows_i, K, B, head, N, DOT_TYPE)
        z_j = _centre(z_j, mean_m, mean_h, rows_j, K, B, head, N, DOT_TYPE)
        gram = tl.dot(z_i, tl.trans(z_j), gram, input_precision=PRECISION)
    partial_ptr += part.to(tl.int64) * N * N
    _store_lower(partial_ptr, gram, rows_i, rows_j, N, head, KNOWN)


@triton.jit(do_not_specialize=_SIZES)
def _gram_sum_kernel(
    partial_ptr, known_ptr, gram_ptr, stride_nr, stride_nc, N, head, parts, KNOWN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per tile of the lower triangle: sum the parts in order, write the tile and its mirror image.

    In float64: near CKA = 1 the losses live in the last bits of Gamma.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lower = (rows < N)[:, None] & (columns[None, :] <= rows[:, None])
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float64)
    offsets = rows[:, None] * N + columns[None, :]
    read = lower
    if KNOWN:
        own = (rows < head)[:, None] & (columns < head)[None, :]
        read = lower & ((rows >= head)[:, None] | (columns >= head)[None, :])
    # Tiles above the diagonal are the mirror images of others.
    parts = tl.where(tl.program_id(0) >= tl.program_id(1), parts, 0)
    for _ in range(0, parts):
        total += tl.load(partial_ptr + offsets, mask=read, other=0.0)
        partial_ptr += N.to(tl.int64) * N
    gram = total.to(tl.float32)
    if KNOWN:
        known = known_ptr + rows[:, None] * stride_nr + columns[None, :] * stride_nc
        gram = tl.where(own, tl.load(known, mask=own & lower, other=0.0).to(tl.float32), gram)
    tl.store(gram_ptr + offsets, gram, mask=lower)
    upper = (rows < N)[None, :] & (columns[:, None] < rows[None, :])
    tl.store(gram_ptr + columns[:, None] * N + rows[None, :], tl.trans(gram), mask=upper)


@triton.jit
def _symmetric_tile(d_gram_ptr, stride_dr, stride_dc, rows, columns, inside):
    """Entries of dGamma + dGamma^T."""
    row, column = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    straight = tl.load(d_gram_ptr + row * stride_dr + column * stride_dc, mask=inside, other=0.0)
    return straight + tl.load(d_gram_ptr + column * stride_dr + row * stride_dc, mask=inside, other=0.0)


@triton.jit(do_not_specialize=_SIZES)
def _gram_rows_kernel(
    d_gram_ptr, a_ptr, stride_dr, stride_dc, K, B, head, N, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per (tile of rows, tile of columns) of A = T^T (dGamma + dGamma^T), [N, N]; means' rows are 0.

    A row of a block is its own row of the sum, less the block's mean row, plus the row of the mean divided by n; the
    last row of Z, mu_h - mu_m, counts against the memory's rows.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    shift_m = tl.zeros((BLOCK,), dtype=tl.float32)
    shift_h = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        others = start + tl.arange(0, BLOCK)
        inside = (others < N)[:, None] & (columns < N)[None, :]
        tile = _symmetric_tile(d_gram_ptr, stride_dr, stride_dc, others, columns, inside)
        # The row of a mean counts against the rows it is the mean of.
        signed = tl.where(((others == head - 1) | (others == N - 1))[:, None], -tile, tile)
        in_memory = (others < head)[:, None]
        last = (others == N - 1)[:, None]
        shift_m += tl.sum(tl.where(in_memory, signed, tl.where(last, tile, 0.0)), axis=0)
        shift_h += tl.sum(tl.where(in_memory, 0.0, signed), axis=0)
    shift_m /= tl.maximum(K, 1)
    shift_h /= tl.maximum(B, 1)
    inside = (rows < N)[:, None] & (columns < N)[None, :]
    a = _symmetric_tile(d_gram_ptr, stride_dr, stride_dc, rows, columns, inside)
    a -= tl.where((rows < head)[:, None], shift_m[None, :], shift_h[None, :])
    a = tl.where(((rows == head - 1) | (rows == N - 1))[:, None], 0.0, a)
    tl.store(a_ptr + rows[:, None] * N + columns[None, :], a.to(a_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_scaled(a_ptr, rows, columns, N, DOT_TYPE: tl.constexpr):
    """Split a tile of A into (rows in the dot's type, row scales): entries of A underflow in float16.

    bfloat16 has the range of float32; there A is stored in it, and the scales are 1.
    """
    inside = (rows < N)[:, None] & (columns < N)[None, :]
    a = tl.load(a_ptr + rows[:, None] * N + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.full((rows.shape[0],), 1.0, dtype=tl.float32)
    if a_ptr.dtype.element_ty == tl.float32:
        scale = tl.max(tl.abs(a), axis=1)
        a *= tl.where(scale > 0.0, 1.0 / scale, 0.0)[:, None]
    return a.to(DOT_TYPE), scale[:, None]


@triton.jit
def _store_gradient(
    d_memory_ptr, stride_dk, stride_df, d_features_ptr, stride_gb, stride_gf,
    mask_ptr, stride_kb, stride_ks,
    d_z, rows, start, columns, K, B, head, memory_width, features_width, token,
    NEED_MEMORY: tl.constexpr, NEED_FEATURES: tl.constexpr, HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr,
):  # fmt: skip
    """Write the memory's and the features' rows of a tile to their own gradients; dropped tokens get 0."""
    if NEED_MEMORY:
        inside = (rows < K)[:, None] & (columns < memory_width)[None, :]
        pointers = d_memory_ptr + rows.to(tl.int64)[:, None] * stride_dk + columns[None, :] * stride_df
        tl.store(pointers, d_z.to(d_memory_ptr.dtype.element_ty), mask=inside)
    if NEED_FEATURES:
        samples = rows - head
        exists = (samples >= 0) & (samples < B)
        if HAS_MASK:
            kept = _kept(
                mask_ptr,
                stride_kb,
                stride_ks,
                samples,
                exists,
                start,
                columns,
                features_width,
                token,
                ONE_TOKEN,
            )
            d_z = tl.where(kept, d_z, 0.0)
        inside = exists[:, None] & (columns < features_width)[None, :]
        pointers = d_features_ptr + samples.to(tl.int64)[:, None] * stride_gb + columns[None, :] * stride_gf
        tl.store(pointers, d_z.to(d_features_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _gram_bwd_kernel(
    memory_ptr,
    features_ptr,
    mask_ptr,
    a_ptr,
    d_memory_ptr,
    d_features_ptr,
    stride_mk,
    stride_mf,
    stride_hb,
    stride_hf,
    stride_kb,
    stride_ks,
    stride_dk,
    stride_df,
    stride_gb,
    stride_gf,
    K,
    B,
    head,
    N,
    memory_width,
    features_width,
    token,
    part_f,
    HAS_MASK: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    NEED_MEMORY: tl.constexpr,
    NEED_FEATURES: tl.constexpr,
    TILES: tl.constexpr,
    MEMORY_TILES: tl.constexpr,
    FIRST_FEATURES: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_0: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One program per part of F: A Z, all rows; A is read once and stays on chip, each input is read once."""
    first = tl.program_id(0) * part_f
    width = tl.maximum(memory_width, features_width)
    rows_0 = tl.arange(0, BLOCK_0)
    rows_1 = BLOCK_0 + tl.arange(0, BLOCK_1)
    rows_2 = BLOCK_0 + BLOCK_1 + tl.arange(0, BLOCK_2)
    a_00, scale_00 = _load_scaled(a_ptr, rows_0, rows_0, N, DOT_TYPE)
    if TILES > 1:
        a_01, scale_01 = _load_scaled(a_ptr, rows_0, rows_1, N, DOT_TYPE)
        a_10, scale_10 = _load_scaled(a_ptr, rows_1, rows_0, N, DOT_TYPE)
        a_11, scale_11 = _load_scaled(a_ptr, rows_1, rows_1, N, DOT_TYPE)
    if TILES > 2:
        a_02, scale_02 = _load_scaled(a_ptr, rows_0, rows_2, N, DOT_TYPE)
        a_12, scale_12 = _load_scaled(a_ptr, rows_1, rows_2, N, DOT_TYPE)
        a_20, scale_20 = _load_scaled(a_ptr, rows_2, rows_0, N, DOT_TYPE)
        a_21, scale_21 = _load_scaled(a_ptr, rows_2, rows_1, N, DOT_TYPE)
        a_22, scale_22 = _load_scaled(a_ptr, rows_2, rows_2, N, DOT_TYPE)
    for start in range(first, tl.minimum(first + part_f, width), BLOCK_F):
        columns = start + tl.arange(0, BLOCK_F)
        z_0 = _load_tile(
            memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf,
            mask_ptr, stride_kb, stride_ks,
            rows_0, start, columns, K, B, head, memory_width, features_width, token,
            MEMORY_TILES > 0, FIRST_FEATURES == 0, HAS_MASK, ONE_TOKEN,
        )  # fmt: skip
        mean_m, mean_h = _sums(z_0, rows_0, K)
        if TILES > 1:
            z_1 = _load_tile(
                memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf,
                mask_ptr, stride_kb, stride_ks,
                rows_1, start, columns, K, B, head, memory_width, features_width, token,
                MEMORY_TILES > 1, FIRST_FEATURES <= 1, HAS_MASK, ONE_TOKEN,
            )  # fmt: skip
            sums_m, sums_h = _sums(z_1, rows_1, K)
            mean_m += sums_m
            mean_h += sums_h
        if TILES > 2:
            z_2 = _load_tile(
                memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf,
                mask_ptr, stride_kb, stride_ks,
                rows_2, start, columns, K, B, head, memory_width, features_width, token,
                MEMORY_TILES > 2, FIRST_FEATURES <= 2, HAS_MASK, ONE_TOKEN,
            )  # fmt: skip
            sums_m, sums_h = _sums(z_2, rows_2, K)
            mean_m += sums_m
            mean_h += sums_h
        mean_m /= tl.maximum(K, 1)
        mean_h /= tl.maximum(B, 1)
        # Each product has an accumulator of its own: two dots into one are miscompiled on some targets.
        z_0 = _centre(z_0, mean_m, mean_h, rows_0, K, B, head, N, DOT_TYPE)
        d_0 = tl.dot(a_00, z_0, input_precision=PRECISION) * scale_00
        if TILES > 1:
            z_1 = _centre(z_1, mean_m, mean_h, rows_1, K, B, head, N, DOT_TYPE)
            d_0 += tl.dot(a_01, z_1, input_precision=PRECISION) * scale_01
            d_1 = tl.dot(a_10, z_0, input_precision=PRECISION) * scale_10
            d_1 += tl.dot(a_11, z_1, input_precision=PRECISION) * scale_11
        if TILES > 2:
            z_2 = _centre(z_2, mean_m, mean_h, rows_2, K, B, head, N, DOT_TYPE)
            d_0 += tl.dot(a_02, z_2, input_precision=PRECISION) * scale_02
            d_1 += tl.dot(a_12, z_2, input_precision=PRECISION) * scale_12
            d_2 = tl.dot(a_20, z_0, input_precision=PRECISION) * scale_20
            d_2 += tl.dot(a_21, z_1, input_precision=PRECISION) * scale_21
            d_2 += tl.dot(a_22, z_2, input_precision=PRECISION) * scale_22
        _store_gradient(
            d_memory_ptr, stride_dk, stride_df, d_features_ptr, stride_gb, stride_gf,
            mask_ptr, stride_kb, stride_ks,
            d_0, rows_0, start, columns, K, B, head, memory_width, features_width, token,
            NEED_MEMORY and MEMORY_TILES > 0, NEED_FEATURES and FIRST_FEATURES == 0, HAS_MASK, ONE_TOKEN,
        )  # fmt: skip
        if TILES > 1:
            _store_gradient(
                d_memory_ptr, stride_dk, stride_df, d_features_ptr, stride_gb, stride_gf,
                mask_ptr, stride_kb, stride_ks,
                d_1, rows_1, start, columns, K, B, head, memory_width, features_width, token,
                NEED_MEMORY and MEMORY_TILES > 1, NEED_FEATURES and FIRST_FEATURES <= 1, HAS_MASK, ONE_TOKEN,
            )  # fmt: skip
        if TILES > 2:
            _store_gradient(
                d_memory_ptr, stride_dk, stride_df, d_features_ptr, stride_gb, stride_gf,
                mask_ptr, stride_kb, stride_ks,
                d_2, rows_2, start, columns, K, B, head, memory_width, features_width, token,
                NEED_MEMORY and MEMORY_TILES > 2, NEED_FEATURES and FIRST_FEATURES <= 2, HAS_MASK, ONE_TOKEN,
            )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _gram_bwd_tile_kernel(
    memory_ptr,
    features_ptr,
    mask_ptr,
    a_ptr,
    d_memory_ptr,
    d_features_ptr,
    stride_mk,
    stride_mf,
    stride_hb,
    stride_hf,
    stride_kb,
    stride_ks,
    stride_dk,
    stride_df,
    stride_gb,
    stride_gf,
    K,
    B,
    head,
    N,
    memory_width,
    features_width,
    token,
    HAS_MEMORY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    NEED_MEMORY: tl.constexpr,
    NEED_FEATURES: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One program per (tile of rows, slice of F): that tile of A Z."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_F
    columns = start + tl.arange(0, BLOCK_F)
    mean_m, mean_h = _means(
        memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf,
        mask_ptr, stride_kb, stride_ks,
        start, columns, K, B, head, N, memory_width, features_width, token,
        HAS_MEMORY, HAS_MASK, ONE_TOKEN, BLOCK_N, BLOCK_F,
    )  # fmt: skip
    d_z = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    for first in range(0, N, BLOCK_N):
        others = first + tl.arange(0, BLOCK_N)
        z = _load_tile(
            memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf,
            mask_ptr, stride_kb, stride_ks,
            others, start, columns, K, B, head, memory_width, features_width, token,
            HAS_MEMORY, True, HAS_MASK, ONE_TOKEN,
        )  # fmt: skip
        z = _centre(z, mean_m, mean_h, others, K, B, head, N, DOT_TYPE)
        a, scale = _load_scaled(a_ptr, rows, others, N, DOT_TYPE)
        d_z += tl.dot(a, z, input_precision=PRECISION) * scale
    _store_gradient(
        d_memory_ptr, stride_dk, stride_df, d_features_ptr, stride_gb, stride_gf,
        mask_ptr, stride_kb, stride_ks,
        d_z, rows, start, columns, K, B, head, memory_width, features_width, token,
        NEED_MEMORY, NEED_FEATURES, HAS_MASK, ONE_TOKEN,
    )  # fmt: skip


def _tiles(total: int) -> tuple[tuple[int, ...], bool]:
    """Rows of each tile for Gamma [N, N], and whether one program holds them all."""
    if total > _FUSED_ROWS:
        return (128,), False
    block = 64 if total > 64 else 32 if total > 32 else MIN_TILE
    full = (total - 1) // block
    return (block,) * full + (max(MIN_TILE, next_power_of_2(total - full * block)),), True


def forward_config(total: int, width: int, dtype: torch.dtype, precision: str, target: Target) -> Config:
    """Configuration of the forward for N = ``total`` rows and F = ``width``; ``dtype`` is that of the dot."""
    blocks, fused = _tiles(total)
    ieee = precision == "ieee" and dtype == torch.float32
    if ieee and blocks[0] >= 32:
        # Without tensor cores the operands of a product pass through registers: one product at a time.
        blocks, fused = (blocks[0],), False
    # A tile of 128 rows twice, beside its Gram, leaves registers for 32 columns.
    block_f = 64 if dtype != torch.float32 and fused else 32
    small = small_shared_memory(target)
    # sm_80 keeps the operands of mma.sync in registers, next to the accumulators; so does sm_100 for the small tile.
    crowded = len(blocks) == 3 and (target.arch == 80 or (target.arch == 100 and dtype != torch.float32))
    crowded = crowded or (target.arch == 80 and not fused and dtype == torch.float32)
    if small or ieee or crowded:
        block_f //= 2
    tiles = cdiv(total, blocks[0])
    programs = 1 if fused else tiles * (tiles + 1) // 2
    # Every part writes a triangle in float32, which is read again: writing at most a ninth of what is read.
    affordable = width * dtype.itemsize // (9 * 2 * total)
    parts = max(1, min(target.multiprocessors // programs, affordable, cdiv(width, block_f)))
    num_warps = 8 if ieee or blocks[0] >= 64 else 4
    return Config(blocks, fused, block_f, parts, num_warps, 2 if small else 3)


def backward_config(
    total: int, width: int, dtype: torch.dtype, precision: str, target: Target, masked: bool = False
) -> Config:
    """Configuration of the backward; parts count only where one program holds all rows."""
    blocks, fused = _tiles(total)
    ieee = precision == "ieee" and dtype == torch.float32
    small = small_shared_memory(target)
    block_f = 64 if dtype != torch.float32 else 32
    if small or ieee:
        block_f //= 2
    # A [N, N] in float32 stays on chip only with tensor cores, much shared memory and no mask to carry along.
    crowded = len(blocks) > 1 and dtype == torch.float32
    if not fused or (crowded and (small or ieee)) or (crowded and masked and len(blocks) == 3):
        blocks, fused = (min(64, blocks[0]),), False
    # Every part reads A: at most an eighth of reading the rows and writing their gradients.
    affordable = 2 * width * dtype.itemsize // (8 * (2 if dtype == torch.bfloat16 else 4) * total)
    parts = max(1, min(target.multiprocessors, affordable, cdiv(width, block_f)))
    return Config(blocks, fused, block_f, parts, 8 if blocks[0] >= 64 else 4, 2)


def _neighbours(config: Config, token: int) -> list[Config]:
    """The configuration and others with the same parts: what FSD_AUTOTUNE=1 times."""
    configs = [config]
    for block_f in (config.block_f // 2, config.block_f, config.block_f * 2):
        for num_warps in (4, 8):
            for num_stages in (2, 3, 4):
                other = config._replace(block_f=block_f, num_warps=num_warps, num_stages=num_stages)
                if block_f >= MIN_TILE and other != config:
                    configs.append(other)
    return configs


class _Rows(NamedTuple):
    """What every kernel is told about the stacked rows."""

    pointers: tuple[Tensor, ...]
    strides: tuple[int, ...]
    sizes: tuple[int, ...]
    total: int
    width: int
    token: int
    dot: torch.dtype
    meta: dict[str, Any]

    def tiles(self, config: Config) -> dict[str, Any]:
        """The tiles of a kernel that holds all of them: which hold memory and from which on they hold features."""
        num_centroid, _, head = self.sizes[:3]
        block = config.blocks[0]
        tiles = len(config.blocks)
        return {
            "TILES": tiles,
            "MEMORY_TILES": min(tiles, cdiv(num_centroid, block)),
            "FIRST_FEATURES": min(tiles - 1, head // block),
            **{f"BLOCK_{i}": (*config.blocks, MIN_TILE, MIN_TILE)[i] for i in range(3)},
        }

    def launch(self, config: Config) -> dict[str, Any]:
        """Compile-time arguments and launch options."""
        return {
            **self.meta,
            "ONE_TOKEN": self.token % config.block_f == 0,
            "DOT_TYPE": kernel_dot_type(self.dot),
            "BLOCK_F": config.block_f,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            **LAUNCH_OPTIONS,
        }


def _stacked(features: Tensor, memory: Tensor | None, mask: Tensor | None) -> _Rows:
    triton_type("features", features.dtype)
    batch, own = features.shape
    mask = mask if own else None
    num_centroid, width, head = 0, own, 0
    if memory is not None:
        triton_type("memory", memory.dtype)
        num_centroid, width = memory.shape
        head = num_centroid + 1
    token = own // mask.shape[1] if mask is not None else 1
    rows = features if memory is None else memory
    kept = features if mask is None else mask.view(torch.uint8)
    return _Rows(
        pointers=(rows, features, kept),
        strides=(*rows.stride(), *features.stride(), *kept.stride()),
        sizes=(num_centroid, batch, head, head + batch + 1, 0 if memory is None else width, own, token),
        total=head + batch + 1,
        width=max(width, own),
        token=token,
        dot=dot_type(features.dtype, rows.dtype),
        meta={"HAS_MASK": mask is not None, "PRECISION": dot_precision()},
    )


def forward(
    features: Tensor, memory: Tensor | None, memory_gram: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Gamma of features [B, F] and memory [K, F'] or None, whose own block may be known already; float32.

    Raises:
        TypeError: Features or memory are not float16, bfloat16 or float32.
    """
    rows = _stacked(features, memory, mask)
    total = rows.total
    gram = torch.empty((total, total), dtype=torch.float32, device=features.device)
    if rows.width == 0:
        return gram.zero_()
    target = target_of(features.device)
    known = memory_gram is not None
    default = forward_config(total, rows.width, rows.dot, rows.meta["PRECISION"], target)
    # Parts begin where slices of every configuration do, and where tokens do if a slice is within one.
    part_f = cdiv(cdiv(rows.width, default.parts), 2 * default.block_f) * 2 * default.block_f
    parts = cdiv(rows.width, part_f)
    partial = torch.empty((parts, total, total), dtype=torch.float32, device=features.device)
    blocks = cdiv(total, default.blocks[0])

    def launch(config: Config) -> None:
        arguments = (*rows.pointers, partial, *rows.strides, *rows.sizes, part_f)
        meta = {**rows.launch(config), "KNOWN": known}
        if config.fused:
            _gram_fwd_kernel[(parts,)](*arguments, **rows.tiles(config), **meta)
        else:
            _gram_tile_kernel[(blocks * (blocks + 1) // 2, parts)](
                *arguments, HAS_MEMORY=memory is not None, BLOCK_N=config.blocks[0], **meta
            )

    with launch_guard(features):
        key = ("gram_fwd", target, rows.meta["PRECISION"], rows.dot, total, default)
        launch(pick(key, _neighbours(default, rows.token), launch))
        block = 64 if total > _FUSED_ROWS else 32
        tiles = cdiv(total, block)
        given = gram if memory_gram is None else memory_gram
        _gram_sum_kernel[(tiles, tiles)](
            partial, given, gram, *given.stride(), total, rows.sizes[2], parts,
            KNOWN=known, BLOCK=block, num_warps=block // 8, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return gram


def backward(
    features: Tensor, memory: Tensor | None, mask: Tensor | None, d_gram: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return (d features, d memory); one that is not needed is empty.

    Raises:
        TypeError: Features or memory are not float16, bfloat16 or float32.
    """
    rows = _stacked(features, memory, mask)
    total = rows.total
    need_features, need_memory = needs[0], needs[1] and memory is not None
    d_features = torch.empty_like(features) if need_features else features.new_empty(0)
    d_memory = torch.empty_like(memory) if memory is not None and need_memory else features.new_empty(0)
    if rows.width == 0 or not (need_features or need_memory):
        return d_features, d_memory
    target = target_of(features.device)
    a_type = torch.bfloat16 if rows.dot == torch.bfloat16 else torch.float32
    a = torch.empty((total, total), dtype=a_type, device=features.device)
    default = backward_config(
        total, rows.width, rows.dot, rows.meta["PRECISION"], target, masked=mask is not None
    )
    outputs = (d_memory if need_memory else a, d_features if need_features else a)
    strides = tuple(stride for output in outputs for stride in output.stride())

    def launch(config: Config) -> None:
        arguments = (*rows.pointers, a, *outputs, *rows.strides, *strides, *rows.sizes)
        meta = {**rows.launch(config), "NEED_MEMORY": need_memory, "NEED_FEATURES": need_features}
        if config.fused:
            part_f = cdiv(cdiv(rows.width, config.parts), config.block_f) * config.block_f
            _gram_bwd_kernel[(cdiv(rows.width, part_f),)](*arguments, part_f, **rows.tiles(config), **meta)
        else:
            grid = (cdiv(total, config.blocks[0]), cdiv(rows.width, config.block_f))
            _gram_bwd_tile_kernel[grid](
                *arguments, HAS_MEMORY=memory is not None, BLOCK_N=config.blocks[0], **meta
            )

    with launch_guard(features):
        block = 64 if total > _FUSED_ROWS else 32
        tiles = cdiv(total, block)
        _gram_rows_kernel[(tiles, tiles)](
            d_gram, a, *d_gram.stride(), *rows.sizes[:4], BLOCK=block, num_warps=block // 8, **LAUNCH_OPTIONS
        )
        key = ("gram_bwd", target, rows.meta["PRECISION"], rows.dot, total, default)
        launch(pick(key, _neighbours(default, rows.token), launch))
    return d_features, d_memory
