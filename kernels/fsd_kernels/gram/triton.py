# mypy: disable-error-code="no-untyped-def, assignment"
"""The Gram matrix of stacked, centred rows as fused kernels, split over the feature axis.

    Z' = [m - s_m, s_m, h - s_h, s_h - s_m],   Gamma' = Z' Z'^T,   Gamma = Z Z^T = C Gamma' C^T
    d[memory; features] = C^T (dGamma + dGamma^T) C Z'     in the rows of memory and features

C takes Z' to Z of ``fsd_kernels.gram``, whatever the shifts s_m and s_h: the small matrix is centred, not the rows.
16-bit features are multiplied as they are (s = 0, and no row of Z' for it), straight from memory: their products are
exact in float32. float32 features lose digits to an offset that they share, so s_m and s_h are the means of the first
rows of memory and features, taken slice by slice (docs/gpu.md has the errors of both).

``_gram_fwd_kernel`` multiplies the rows over a part of F: all of them in one program up to 192 rows, else one tile of
the triangle. ``_gram_sum_kernel`` sums the parts in a fixed order, in float64, with sums over rows;
``_gram_centre_kernel`` reads Gamma off them. Student and teacher share these launches.

Backward: ``_gram_symmetric_kernel`` adds up dGamma + dGamma^T, ``_gram_rows_kernel`` centres it on both sides and
splits it into two 16-bit terms, and ``_gram_bwd_kernel`` multiplies it with Z' slice by slice, straight into the
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsd_kernels._launch import launch
from fsd_kernels._triton import (
    dot_type,
    neighbours,
    operand,
    pick,
    product_precision,
    target_of,
    triton_type,
)
from fsd_kernels.gram.plan import SUMMED, SYMMETRIC, Config, LaunchShape, backward_plan, forward_plan

# Rows and columns of a tile in the sum over parts.
_SUMMED = tl.constexpr(SUMMED)
# Rows whose mean is subtracted from float32 rows before they are multiplied.
_SHIFTING = tl.constexpr(8)
# Centred energy of 16-bit rows below this fraction of their mean's, 16 eps of float32, is rounding of the sums.
_RAW_ROUNDING = tl.constexpr(2.0**-19)

# Sizes that take any value without another compilation. Widths and strides are specialised: they align loads.
_SIZES = ("K", "B", "head", "N", "token", "other_token", "parts", "other_parts", "blocks", "sixteenths")


@triton.jit
def _load_tile(
    side, shared, rows, start, columns,
    MEMORY: tl.constexpr, FEATURES: tl.constexpr, HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr,
):  # fmt: skip
    """Rows of [memory; -; features; -], 0 in the rows between, in dropped tokens and outside.

    ``side`` holds addresses, strides and widths of memory and features, ``shared`` the mask and the numbers of rows.
    """
    (
        memory_ptr,
        features_ptr,
        stride_mk,
        stride_mf,
        stride_hb,
        stride_hf,
        memory_width,
        features_width,
        token,
    ) = side
    mask_ptr, stride_kb, stride_ks, K, B, head, _ = shared
    in_memory = (rows < K)[:, None] & (columns < memory_width)[None, :]
    memory = memory_ptr + rows.to(tl.int64)[:, None] * stride_mk + columns[None, :] * stride_mf
    samples = rows - head
    exists = (samples >= 0) & (samples < B)
    in_features = exists[:, None] & (columns < features_width)[None, :]
    features = features_ptr + samples.to(tl.int64)[:, None] * stride_hb + columns[None, :] * stride_hf
    if FEATURES and HAS_MASK:
        in_features = in_features & _kept(
            mask_ptr, stride_kb, stride_ks, samples, exists, start, columns, features_width, token, ONE_TOKEN
        )  # fmt: skip
    if not FEATURES:
        x = tl.load(memory, mask=in_memory, other=0.0)
    elif not MEMORY:
        x = tl.load(features, mask=in_features, other=0.0)
    elif memory_ptr.dtype == features_ptr.dtype:
        # A row has one address: one load.
        x = tl.load(tl.where(exists[:, None], features, memory), mask=in_memory | in_features, other=0.0)
    else:
        x = tl.load(memory, mask=in_memory, other=0.0).to(tl.float32)
        x += tl.load(features, mask=in_features, other=0.0).to(tl.float32)
    return x


@triton.jit
def _kept(
    mask_ptr, stride_kb, stride_ks, samples, exists, start, columns, features_width, token, ONE_TOKEN: tl.constexpr
):  # fmt: skip
    """True for entries of tokens that the mask keeps. ONE_TOKEN: all columns belong to one token."""
    row_ptr = mask_ptr + samples.to(tl.int64) * stride_kb
    if ONE_TOKEN:
        # Past the end of the features no value is read, so any position will do.
        position = tl.minimum(start // token, features_width // token - 1)
        kept = (tl.load(row_ptr + position * stride_ks, mask=exists, other=0) != 0)[:, None]
    else:
        inside = exists[:, None] & (columns < features_width)[None, :]
        pointers = row_ptr[:, None] + (columns // token)[None, :] * stride_ks
        kept = tl.load(pointers, mask=inside, other=0) != 0
    return kept


@triton.jit
def _shifts(side, shared, start, columns, HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr):
    """(s_m, s_h): means of the first _SHIFTING rows of the memory and of the features, or of all if there are fewer."""
    _, _, _, K, B, head, _ = shared
    index = tl.arange(0, _SHIFTING)
    memory = tl.where(index < K, index, -1)
    rows = tl.where(memory >= 0, memory, head + B)
    m = _load_tile(side, shared, rows, start, columns, True, False, False, True).to(tl.float32)
    h = _load_tile(side, shared, head + index, start, columns, False, True, HAS_MASK, ONE_TOKEN).to(
        tl.float32
    )
    s_m = tl.sum(m, axis=0) / tl.maximum(tl.minimum(K, _SHIFTING), 1)
    return s_m, tl.sum(h, axis=0) / tl.maximum(tl.minimum(B, _SHIFTING), 1)


@triton.jit
def _tile(
    side, shared, shifts, rows, start, columns,
    MEMORY: tl.constexpr, FEATURES: tl.constexpr, HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr,
    RAW: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of Z' over a slice of F, as operand of a dot."""
    x = _load_tile(side, shared, rows, start, columns, MEMORY, FEATURES, HAS_MASK, ONE_TOKEN)
    if not RAW:
        s_m, s_h = shifts
        _, _, _, K, B, head, N = shared
        is_row = ((rows < K) | ((rows >= head) & (rows < head + B)))[:, None]
        shift = tl.where((rows < head)[:, None], s_m[None, :], s_h[None, :])
        # The last row is s_h - s_m; without a memory s_m is 0.
        between = tl.where((rows < head)[:, None], s_m[None, :], (s_h - s_m)[None, :])
        is_shift = ((rows == head - 1) | (rows == N - 1))[:, None]
        x = tl.where(is_row, x.to(tl.float32) - shift, tl.where(is_shift, between, 0.0))
    return operand(x, DOT_TYPE, PRECISION)


@triton.constexpr_function
def _tile_size(t, tiles, block, last):
    """Rows of tile t: ``last`` in the last one, else ``block``."""
    return last if t == tiles - 1 else block


@triton.jit
def _tile_rows(t: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr):
    """The row numbers of tile t."""
    return t * BLOCK + tl.arange(0, _tile_size(t, TILES, BLOCK, LAST))


@triton.jit
def _all_tiles(
    side, shared, start, columns,
    TILES: tl.constexpr, MEMORY_TILES: tl.constexpr, FIRST_FEATURES: tl.constexpr,
    HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr, RAW: tl.constexpr, DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """All rows of Z' over a slice of F, tile by tile; each input is read once.

    Tiles below MEMORY_TILES hold memory rows, tiles from FIRST_FEATURES on hold features.
    """
    shifts = ()
    if not RAW:
        shifts = _shifts(side, shared, start, columns, HAS_MASK, ONE_TOKEN)
    z = ()
    for t in tl.static_range(TILES):
        z += (
            _tile(
                side, shared, shifts, _tile_rows(t, TILES, BLOCK, LAST), start, columns,
                t < MEMORY_TILES, t >= FIRST_FEATURES, HAS_MASK, ONE_TOKEN, RAW, DOT_TYPE, PRECISION,
            ),
        )  # fmt: skip
    return z


@triton.jit
def _lower_tile(tile):
    """(i, j), j <= i, of a number in the order (0, 0), (1, 0), (1, 1), (2, 0), ..."""
    i = 0
    while (i + 1) * (i + 2) // 2 <= tile:
        i += 1
    return i, tile - i * (i + 1) // 2


@triton.jit
def _stored(rows, columns, N, head, RAW: tl.constexpr, GIVEN: tl.constexpr):
    """True for entries of Gamma' that the parts hold: tiles on and below the diagonal.

    RAW: the rows of the shifts are 0. GIVEN: the memory's own block is not needed.
    """
    limit = N - 1 if RAW else N
    stored = ((rows < limit)[:, None] & (columns < limit)[None, :]) & (
        (columns // _SUMMED)[None, :] <= (rows // _SUMMED)[:, None]
    )
    if GIVEN:
        stored = stored & ((rows >= head)[:, None] | (columns >= head)[None, :])
    return stored


@triton.constexpr_function
def _pairs(tiles, first):
    """The tiles (i, j), j <= i, i >= ``first``, of Gamma'."""
    return tuple((i, j) for i in range(first, tiles) for j in range(i + 1))


@triton.jit
def _gram_of_part(
    side, shared, partial_ptr, part, part_f,
    HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr, HAS_MEMORY: tl.constexpr, GIVEN: tl.constexpr,
    FIRST: tl.constexpr, TILES: tl.constexpr, MEMORY_TILES: tl.constexpr, FIRST_FEATURES: tl.constexpr,
    RAW: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, LAST: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Gamma' of one side over a part of F, from tile row FIRST on: all tiles if TILES, else one."""
    _, _, _, _, _, head, N = shared
    first = part * part_f
    last = tl.minimum(first + part_f, tl.maximum(side[6], side[7]))
    if TILES:
        PAIRS: tl.constexpr = _pairs(TILES, FIRST)
        # Tiles above the diagonal, transposed when stored: their many rows and few columns suit the tensor cores.
        grams = ()
        for p in tl.static_range(len(PAIRS)):
            grams += (
                tl.zeros(
                    (
                        _tile_size(PAIRS[p][1], TILES, BLOCK, LAST),
                        _tile_size(PAIRS[p][0], TILES, BLOCK, LAST),
                    ),
                    dtype=tl.float32,
                ),
            )
        for start in range(first, last, BLOCK_F):
            z = _all_tiles(
                side, shared, start, start + tl.arange(0, BLOCK_F), TILES, MEMORY_TILES, FIRST_FEATURES,
                HAS_MASK, ONE_TOKEN, RAW, DOT_TYPE, PRECISION, BLOCK, LAST,
            )  # fmt: skip
            sums = ()
            for p in tl.static_range(len(PAIRS)):
                product = tl.dot(
                    z[PAIRS[p][1]], tl.trans(z[PAIRS[p][0]]), grams[p], input_precision=PRECISION
                )
                sums += (product,)
            grams = sums
        for p in tl.static_range(len(PAIRS)):
            rows = _tile_rows(PAIRS[p][0], TILES, BLOCK, LAST)
            columns = _tile_rows(PAIRS[p][1], TILES, BLOCK, LAST)
            _store_partial(partial_ptr, tl.trans(grams[p]), rows, columns, N, head, RAW, GIVEN)
    else:
        block_i, block_j = _lower_tile(tl.program_id(0))
        rows_i = block_i * BLOCK + tl.arange(0, BLOCK)
        rows_j = block_j * BLOCK + tl.arange(0, BLOCK)
        # Tiles of given entries alone are not computed.
        last = tl.where(block_i < FIRST, first, last)
        gram = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for start in range(first, last, BLOCK_F):
            columns = start + tl.arange(0, BLOCK_F)
            shifts = ()
            if not RAW:
                shifts = _shifts(side, shared, start, columns, HAS_MASK, ONE_TOKEN)
            z_i = _tile(
                side, shared, shifts, rows_i, start, columns,
                HAS_MEMORY, True, HAS_MASK, ONE_TOKEN, RAW, DOT_TYPE, PRECISION,
            )  # fmt: skip
            z_j = _tile(
                side, shared, shifts, rows_j, start, columns,
                HAS_MEMORY, True, HAS_MASK, ONE_TOKEN, RAW, DOT_TYPE, PRECISION,
            )  # fmt: skip
            gram = tl.dot(z_i, tl.trans(z_j), gram, input_precision=PRECISION)
        _store_partial(partial_ptr, gram, rows_i, rows_j, N, head, RAW, GIVEN)


@triton.jit
def _store_partial(partial_ptr, gram, rows, columns, N, head, RAW: tl.constexpr, GIVEN: tl.constexpr):
    stored = _stored(rows, columns, N, head, RAW, GIVEN)
    tl.store(partial_ptr + rows[:, None] * N + columns[None, :], gram, mask=stored)


@triton.jit(do_not_specialize=_SIZES)
def _gram_fwd_kernel(
    memory_ptr, features_ptr,
    stride_mk, stride_mf, stride_hb, stride_hf, memory_width, features_width, token, part_f, parts,
    other_memory_ptr, other_features_ptr,
    other_stride_mk, other_stride_mf, other_stride_hb, other_stride_hf,
    other_memory_width, other_features_width, other_token, other_part_f, other_parts,
    mask_ptr, partial_ptr, stride_kb, stride_ks, K, B, head, N,
    BOTH: tl.constexpr, GIVEN: tl.constexpr, OTHER_GIVEN: tl.constexpr,
    HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr, HAS_MEMORY: tl.constexpr,
    FIRST: tl.constexpr, OTHER_FIRST: tl.constexpr,
    TILES: tl.constexpr, MEMORY_TILES: tl.constexpr, FIRST_FEATURES: tl.constexpr,
    RAW: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, LAST: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program per (all tiles or one, part of F): Gamma' over that part, to partial [parts, N, N].

    With BOTH the parts of another side follow, with the same numbers of rows.
    """
    shared = (mask_ptr, stride_kb, stride_ks, K, B, head, N)
    program = tl.program_id(1)
    partial_ptr += program.to(tl.int64) * N * N
    side = (
        memory_ptr, features_ptr, stride_mk, stride_mf, stride_hb, stride_hf, memory_width, features_width, token,
    )  # fmt: skip
    if BOTH:
        other = (
            other_memory_ptr, other_features_ptr, other_stride_mk, other_stride_mf, other_stride_hb,
            other_stride_hf, other_memory_width, other_features_width, other_token,
        )  # fmt: skip
        if program < parts:
            _gram_of_part(
                side, shared, partial_ptr, program, part_f, HAS_MASK, ONE_TOKEN, HAS_MEMORY, GIVEN, FIRST,
                TILES, MEMORY_TILES, FIRST_FEATURES, RAW, DOT_TYPE, PRECISION, BLOCK, LAST, BLOCK_F,
            )  # fmt: skip
        else:
            _gram_of_part(
                other, shared, partial_ptr, program - parts, other_part_f, HAS_MASK, ONE_TOKEN, HAS_MEMORY,
                OTHER_GIVEN, OTHER_FIRST, TILES, MEMORY_TILES, FIRST_FEATURES, RAW, DOT_TYPE, PRECISION,
                BLOCK, LAST, BLOCK_F,
            )  # fmt: skip
    else:
        _gram_of_part(
            side, shared, partial_ptr, program, part_f, HAS_MASK, ONE_TOKEN, HAS_MEMORY, GIVEN, FIRST,
            TILES, MEMORY_TILES, FIRST_FEATURES, RAW, DOT_TYPE, PRECISION, BLOCK, LAST, BLOCK_F,
        )  # fmt: skip


@triton.jit
def _in_groups(index, K, B, head):
    """(True for rows of the memory, True for rows of the features)."""
    return index < K, (index >= head) & (index < head + B)


@triton.jit
def _work(work_ptr, side, N, blocks):
    """Addresses in a side's float64 work space: Gamma' [N, N], sums over rows [blocks, 2, N], totals [tiles, 5]."""
    tiles = blocks * (blocks + 1) // 2
    sums = N.to(tl.int64) * N
    totals = sums + 2 * blocks * N
    work_ptr += side * (totals + 5 * tiles)
    return work_ptr, work_ptr + sums, work_ptr + totals


@triton.jit(do_not_specialize=_SIZES)
def _gram_sum_kernel(
    partial_ptr, work_ptr, K, B, head, N, parts, other_parts, blocks,
    GIVEN_SIDE: tl.constexpr, RAW: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program per (tile of the triangle, side): sum the parts, PARTS at a time, with the sums that centring needs.

    Sums are float64, because centring takes differences of them, and the losses near CKA = 1 depend on their last bits.
    """
    side = tl.program_id(1)
    i, j = _lower_tile(tl.program_id(0))
    rows = i * _SUMMED + tl.arange(0, _SUMMED)
    columns = j * _SUMMED + tl.arange(0, _SUMMED)
    stored = _stored(rows, columns, N, head, RAW, False)
    if RAW and GIVEN_SIDE >= 0:
        given_rows = tl.where(side == GIVEN_SIDE, head, 0)
        stored = stored & ((rows >= given_rows)[:, None] | (columns >= given_rows)[None, :])
    partial_ptr += (side * parts).to(tl.int64) * N * N
    offsets = rows[:, None] * N + columns[None, :]
    count = tl.where(side == 0, parts, other_parts)
    totals = tl.zeros((PARTS, _SUMMED, _SUMMED), dtype=tl.float64)
    for first in range(0, count, PARTS):
        some = first + tl.arange(0, PARTS)
        pointers = partial_ptr + some.to(tl.int64)[:, None, None] * N * N + offsets[None, :, :]
        share = tl.load(pointers, mask=(some < count)[:, None, None] & stored[None, :, :], other=0.0)
        totals += share.to(tl.float64)
    total = tl.sum(totals, axis=0)
    # A product of three terms is not symmetric to the last bit.
    total = tl.where((rows[:, None] >= columns[None, :]), total, tl.trans(total)) if i == j else total
    raw_ptr, sums_ptr, totals_ptr = _work(work_ptr, side, N, blocks)
    inside = (rows < N)[:, None] & (columns < N)[None, :]
    tl.store(raw_ptr + offsets, total, mask=inside)
    rows_m, rows_h = _in_groups(rows, K, B, head)
    columns_m, columns_h = _in_groups(columns, K, B, head)
    of_rows_m = tl.sum(tl.where(columns_m[None, :], total, 0.0), axis=1)
    of_rows_h = tl.sum(tl.where(columns_h[None, :], total, 0.0), axis=1)
    pointers = sums_ptr + j * 2 * N + rows
    tl.store(pointers, of_rows_m, mask=rows < N)
    tl.store(pointers + N, of_rows_h, mask=rows < N)
    times = 1.0
    energies = tl.zeros((_SUMMED,), dtype=tl.float64)
    if i == j:
        energies = tl.sum(tl.where(rows[:, None] == columns[None, :], total, 0.0), axis=1)
    else:
        times = 2.0
        tl.store(raw_ptr + columns[None, :] * N + rows[:, None], total, mask=inside)
        pointers = sums_ptr + i * 2 * N + columns
        tl.store(pointers, tl.sum(tl.where(rows_m[:, None], total, 0.0), axis=0), mask=columns < N)
        tl.store(pointers + N, tl.sum(tl.where(rows_h[:, None], total, 0.0), axis=0), mask=columns < N)
    totals_ptr += tl.program_id(0) * 5
    tl.store(totals_ptr, times * tl.sum(tl.where(rows_m, of_rows_m, 0.0)))
    tl.store(totals_ptr + 1, tl.sum(tl.where(rows_h, of_rows_m, 0.0)))
    tl.store(totals_ptr + 2, times * tl.sum(tl.where(rows_h, of_rows_h, 0.0)))
    tl.store(totals_ptr + 3, tl.sum(tl.where(rows_m, energies, 0.0)))
    tl.store(totals_ptr + 4, tl.sum(tl.where(rows_h, energies, 0.0)))


@triton.jit
def _signs(index, K, B, head, N):
    """(alpha, beta) of rows of C = 1 + alpha w_m^T + beta w_h^T; w_m, w_h take means of memory and features."""
    of_memory, of_features = _in_groups(index, K, B, head)
    alpha = tl.where(of_memory | ((index == N - 1) & (head > 0)), -1.0, tl.where(index == head - 1, 1.0, 0.0))
    return alpha, tl.where(of_features, -1.0, tl.where(index == N - 1, 1.0, 0.0))


@triton.jit
def _means_of_rows(sums_ptr, index, K, B, N, blocks, BLOCKS: tl.constexpr):
    """Products of rows of Z' with the means of the rows of the memory and of the features."""
    block = tl.arange(0, BLOCKS)
    pointers = sums_ptr + block[:, None] * 2 * N + index[None, :]
    inside = (block < blocks)[:, None] & (index < N)[None, :]
    mean_m = tl.sum(tl.load(pointers, mask=inside, other=0.0), axis=0) / tl.maximum(K, 1)
    return mean_m, tl.sum(tl.load(pointers + N, mask=inside, other=0.0), axis=0) / tl.maximum(B, 1)


@triton.jit(do_not_specialize=_SIZES)
def _gram_centre_kernel(
    work_ptr, given_ptr, gram_ptr, stride_nr, stride_nc, K, B, head, N, blocks,
    GIVEN_SIDE: tl.constexpr, RAW: tl.constexpr, BLOCKS: tl.constexpr, TOTALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per (tile, side): Gamma = C Gamma' C^T in float64, stored as float32 [sides, N, N].

    The block of a memory that is given is copied. With RAW its rows were not multiplied with each other; its products
    with their mean are then read off the given block.
    """
    side = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    raw_ptr, sums_ptr, totals_ptr = _work(work_ptr, side, N, blocks)
    tile = tl.arange(0, TOTALS)
    in_tiles = tile < blocks * (blocks + 1) // 2
    totals_ptr += tile * 5
    k, b = tl.maximum(K, 1).to(tl.float64), tl.maximum(B, 1).to(tl.float64)
    mean_mm = tl.sum(tl.load(totals_ptr, mask=in_tiles, other=0.0)) / (k * k)
    mean_mh = tl.sum(tl.load(totals_ptr + 1, mask=in_tiles, other=0.0)) / (k * b)
    mean_hh = tl.sum(tl.load(totals_ptr + 2, mask=in_tiles, other=0.0)) / (b * b)
    energy_m = tl.sum(tl.load(totals_ptr + 3, mask=in_tiles, other=0.0))
    energy_h = tl.sum(tl.load(totals_ptr + 4, mask=in_tiles, other=0.0))
    rows_m, rows_h = _means_of_rows(sums_ptr, rows, K, B, N, blocks, BLOCKS)
    columns_m, columns_h = _means_of_rows(sums_ptr, columns, K, B, N, blocks, BLOCKS)
    if RAW and GIVEN_SIDE >= 0:  # noqa: SIM102 (the first is decided when the kernel is compiled)
        if side == GIVEN_SIDE:
            mean_mm = tl.load(given_ptr + K * stride_nr + K * stride_nc).to(tl.float64)
            given_r = tl.load(given_ptr + K * stride_nr + rows * stride_nc, mask=rows < K, other=0.0)
            given_c = tl.load(given_ptr + K * stride_nr + columns * stride_nc, mask=columns < K, other=0.0)
            rows_m = tl.where(rows < K, given_r.to(tl.float64) + mean_mm, rows_m)
            columns_m = tl.where(columns < K, given_c.to(tl.float64) + mean_mm, columns_m)
    inside = (rows < N)[:, None] & (columns < N)[None, :]
    offsets = rows[:, None] * N + columns[None, :]
    gamma = tl.load(raw_ptr + offsets, mask=inside, other=0.0)
    alpha_r, beta_r = _signs(rows, K, B, head, N)
    alpha_c, beta_c = _signs(columns, K, B, head, N)
    gamma += alpha_r[:, None] * columns_m[None, :] + rows_m[:, None] * alpha_c[None, :]
    gamma += beta_r[:, None] * columns_h[None, :] + rows_h[:, None] * beta_c[None, :]
    gamma += (alpha_r[:, None] * alpha_c[None, :]) * mean_mm + (beta_r[:, None] * beta_c[None, :]) * mean_hh
    gamma += (alpha_r[:, None] * beta_c[None, :] + beta_r[:, None] * alpha_c[None, :]) * mean_mh
    in_rows_m, in_rows_h = _in_groups(rows, K, B, head)
    in_columns_m, in_columns_h = _in_groups(columns, K, B, head)
    if RAW:
        # Rows that are equal up to the rounding of their products have no structure.
        keep_m = tl.where(energy_m - k * mean_mm <= k * mean_mm * _RAW_ROUNDING, 0.0, 1.0)
        keep_h = tl.where(energy_h - b * mean_hh <= b * mean_hh * _RAW_ROUNDING, 0.0, 1.0)
        gamma *= tl.where(in_rows_m[:, None] & in_columns_m[None, :], keep_m, 1.0)
        gamma *= tl.where(in_rows_h[:, None] & in_columns_h[None, :], keep_h, 1.0)
    result = gamma.to(tl.float32)
    if GIVEN_SIDE >= 0:
        given_rows = tl.where(side == GIVEN_SIDE, head, 0)
        in_block = (rows < given_rows)[:, None] & (columns < given_rows)[None, :]
        row = tl.maximum(rows[:, None], columns[None, :])
        column = tl.minimum(rows[:, None], columns[None, :])
        given = tl.load(given_ptr + row * stride_nr + column * stride_nc, mask=in_block, other=0.0)
        result = tl.where(in_block, given.to(tl.float32), result)
    tl.store(gram_ptr + side.to(tl.int64) * N * N + offsets, result, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _gram_symmetric_kernel(
    d_gram_ptr, weight_ptr, small_ptr, stride_dl, stride_dr, stride_dc, K, B, head, N,
    COUNT: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per tile of S = sum_l w_l (D_l + D_l^T), with the tile's share of alpha^T S and beta^T S.

    small: S [N, N], shares [blocks, 2, N].
    """
    block = tl.program_id(0)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, column = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    inside = (rows < N)[:, None] & (columns < N)[None, :]
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for each in tl.static_range(COUNT):
        d_ptr = d_gram_ptr + each * stride_dl
        d = tl.load(d_ptr + row * stride_dr + column * stride_dc, mask=inside, other=0.0)
        d += tl.load(d_ptr + column * stride_dr + row * stride_dc, mask=inside, other=0.0)
        if HAS_WEIGHTS:
            d *= tl.load(weight_ptr + each).to(tl.float32)
        total += d
    tl.store(small_ptr + row * N + column, total, mask=inside)
    alpha, beta = _signs(rows, K, B, head, N)
    shares_ptr = small_ptr + N * N + block * 2 * N + columns
    tl.store(shares_ptr, tl.sum(alpha[:, None] * total, axis=0), mask=columns < N)
    tl.store(shares_ptr + N, tl.sum(beta[:, None] * total, axis=0), mask=columns < N)


@triton.jit
def _signed_sums(sums_ptr, index, N, blocks, BLOCKS: tl.constexpr):
    """(alpha^T S, beta^T S) at columns ``index``."""
    block = tl.arange(0, BLOCKS)
    pointers = sums_ptr + block[:, None] * 2 * N + index[None, :]
    inside = (block < blocks)[:, None] & (index < N)[None, :]
    sums_m = tl.sum(tl.load(pointers, mask=inside, other=0.0), axis=0)
    return sums_m, tl.sum(tl.load(pointers + N, mask=inside, other=0.0), axis=0)


@triton.jit
def _weights_of_means(index, K, B, head):
    """(w_m, w_h): what a row weighs in the means of the memory and of the features."""
    of_memory, of_features = _in_groups(index, K, B, head)
    w_m = tl.where(of_memory, 1.0 / tl.maximum(K, 1), 0.0)
    return w_m, tl.where(of_features, 1.0 / tl.maximum(B, 1), 0.0)


@triton.jit(do_not_specialize=_SIZES)
def _gram_rows_kernel(
    small_ptr, term_ptr, scale_ptr, K, B, head, N, sixteenths, blocks,
    TERMS: tl.constexpr, BLOCK: tl.constexpr, ALL: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK rows of A = C^T S C, divided by their largest entries: terms [TERMS, padded, padded].

    The first term is A rounded, the second what that leaves. Entries of A itself would underflow in float16.
    """
    # Rows of the terms are a multiple of 16 apart, which the compiler sees.
    padded = sixteenths * 16
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, ALL)
    sums_ptr = small_ptr + N * N
    sums_m, sums_h = _signed_sums(sums_ptr, columns, N, blocks, BLOCKS)
    alpha, beta = _signs(columns, K, B, head, N)
    w_m, w_h = _weights_of_means(columns, K, B, head)
    of_row_m, of_row_h = _weights_of_means(rows, K, B, head)
    row_m, row_h = _signed_sums(sums_ptr, rows, N, blocks, BLOCKS)
    total_mh = tl.sum(alpha * sums_h)
    row_m += of_row_m * tl.sum(alpha * sums_m) + of_row_h * total_mh
    row_h += of_row_m * total_mh + of_row_h * tl.sum(beta * sums_h)
    inside = (rows < N)[:, None] & (columns < N)[None, :]
    a = tl.load(small_ptr + rows[:, None] * N + columns[None, :], mask=inside, other=0.0)
    a += of_row_m[:, None] * sums_m[None, :] + of_row_h[:, None] * sums_h[None, :]
    a += row_m[:, None] * w_m[None, :] + row_h[:, None] * w_h[None, :]
    # Rows of the means have no gradient, and their own would not be finite everywhere that the others are.
    a = tl.where((of_row_m + of_row_h > 0.0)[:, None], a, 0.0)
    scale = tl.max(tl.abs(a), axis=1)
    a /= tl.where(scale == 0.0, 1.0, scale)[:, None]
    stored = (rows < padded)[:, None] & (columns < padded)[None, :]
    offsets = rows[:, None] * padded + columns[None, :]
    term = a.to(term_ptr.dtype.element_ty)
    tl.store(term_ptr + offsets, term, mask=stored)
    if TERMS == 2:
        rest = (a - term.to(tl.float32)).to(term_ptr.dtype.element_ty)
        tl.store(term_ptr + padded * padded + offsets, rest, mask=stored)
    tl.store(scale_ptr + rows, scale, mask=rows < padded)


@triton.jit
def _load_term(term_ptr, rows, columns, padded, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr):
    inside = (rows < padded)[:, None] & (columns < padded)[None, :]
    term = tl.load(term_ptr + rows[:, None] * padded + columns[None, :], mask=inside, other=0.0)
    return operand(term, DOT_TYPE, PRECISION)


@triton.jit
def _store_gradient(
    outputs, side, shared, d_z, rows, start, columns,
    NEED_MEMORY: tl.constexpr, NEED_FEATURES: tl.constexpr, HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr,
):  # fmt: skip
    """Write the memory's and the features' rows of a tile to their gradients; dropped tokens get 0."""
    d_memory_ptr, d_features_ptr, stride_dk, stride_df, stride_gb, stride_gf = outputs
    _, _, _, _, _, _, memory_width, features_width, token = side
    mask_ptr, stride_kb, stride_ks, K, B, head, _ = shared
    if NEED_MEMORY:
        inside = (rows < K)[:, None] & (columns < memory_width)[None, :]
        pointers = d_memory_ptr + rows.to(tl.int64)[:, None] * stride_dk + columns[None, :] * stride_df
        tl.store(pointers, d_z.to(d_memory_ptr.dtype.element_ty), mask=inside)
    if NEED_FEATURES:
        samples = rows - head
        exists = (samples >= 0) & (samples < B)
        if HAS_MASK:
            kept = _kept(
                mask_ptr, stride_kb, stride_ks, samples, exists, start, columns, features_width, token, ONE_TOKEN
            )  # fmt: skip
            d_z = tl.where(kept, d_z, 0.0)
        inside = exists[:, None] & (columns < features_width)[None, :]
        pointers = d_features_ptr + samples.to(tl.int64)[:, None] * stride_gb + columns[None, :] * stride_gf
        tl.store(pointers, d_z.to(d_features_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _gram_bwd_kernel(
    memory_ptr, features_ptr, mask_ptr, term_ptr, scale_ptr, d_memory_ptr, d_features_ptr,
    stride_mk, stride_mf, stride_hb, stride_hf, stride_kb, stride_ks, stride_dk, stride_df, stride_gb, stride_gf,
    K, B, head, N, memory_width, features_width, token, part_f, sixteenths,
    HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr, NEED_MEMORY: tl.constexpr, NEED_FEATURES: tl.constexpr,
    HAS_MEMORY: tl.constexpr, TERMS: tl.constexpr,
    TILES: tl.constexpr, MEMORY_TILES: tl.constexpr, FIRST_FEATURES: tl.constexpr,
    RAW: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, LAST: tl.constexpr, INNER: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Rows of A Z'.

    With TILES one program per part of F: A is read once and stays on chip. Else one per (tile of rows, slice of F),
    INNER rows of Z' at a time.
    No two products enter one accumulator in a loop, which some targets get wrong.
    """
    side = (
        memory_ptr, features_ptr, stride_mk, stride_mf, stride_hb, stride_hf, memory_width, features_width, token,
    )  # fmt: skip
    shared = (mask_ptr, stride_kb, stride_ks, K, B, head, N)
    outputs = (d_memory_ptr, d_features_ptr, stride_dk, stride_df, stride_gb, stride_gf)
    first = tl.program_id(1) * part_f
    padded = sixteenths * 16
    second_ptr = term_ptr + padded * padded
    if TILES:
        terms = ()
        scales = ()
        for p in tl.static_range(TILES * TILES):
            rows = _tile_rows(p // TILES, TILES, BLOCK, LAST)
            others = _tile_rows(p % TILES, TILES, BLOCK, LAST)
            terms += (_load_term(term_ptr, rows, others, padded, DOT_TYPE, PRECISION),)
            if TERMS == 2:
                terms += (_load_term(second_ptr, rows, others, padded, DOT_TYPE, PRECISION),)
        for i in tl.static_range(TILES):
            rows = _tile_rows(i, TILES, BLOCK, LAST)
            scales += (tl.load(scale_ptr + rows, mask=rows < padded, other=0.0)[:, None],)
        last = tl.minimum(first + part_f, tl.maximum(memory_width, features_width))
        for start in range(first, last, BLOCK_F):
            columns = start + tl.arange(0, BLOCK_F)
            z = _all_tiles(
                side, shared, start, columns, TILES, MEMORY_TILES, FIRST_FEATURES,
                HAS_MASK, ONE_TOKEN, RAW, DOT_TYPE, PRECISION, BLOCK, LAST,
            )  # fmt: skip
            for i in tl.static_range(TILES):
                d_z = tl.dot(terms[i * TILES * TERMS], z[0], input_precision=PRECISION) * scales[i]
                for j in tl.static_range(1, TILES * TERMS):
                    product = tl.dot(terms[i * TILES * TERMS + j], z[j // TERMS], input_precision=PRECISION)
                    # The factor keeps the compiler from chaining the products.
                    d_z += product * scales[i]
                _store_gradient(
                    outputs, side, shared, d_z, _tile_rows(i, TILES, BLOCK, LAST), start, columns,
                    NEED_MEMORY and i < MEMORY_TILES, NEED_FEATURES and i >= FIRST_FEATURES, HAS_MASK, ONE_TOKEN,
                )  # fmt: skip
    else:
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        columns = first + tl.arange(0, BLOCK_F)
        shifts = ()
        if not RAW:
            shifts = _shifts(side, shared, first, columns, HAS_MASK, ONE_TOKEN)
        d_z = tl.zeros((BLOCK, BLOCK_F), dtype=tl.float32)
        rest = tl.zeros((BLOCK, BLOCK_F), dtype=tl.float32)
        for start in range(0, N, INNER):
            others = start + tl.arange(0, INNER)
            z = _tile(
                side, shared, shifts, others, first, columns,
                HAS_MEMORY, True, HAS_MASK, ONE_TOKEN, RAW, DOT_TYPE, PRECISION,
            )  # fmt: skip
            term = _load_term(term_ptr, rows, others, padded, DOT_TYPE, PRECISION)
            d_z = tl.dot(term, z, d_z, input_precision=PRECISION)
            if TERMS == 2:
                term = _load_term(second_ptr, rows, others, padded, DOT_TYPE, PRECISION)
                rest = tl.dot(term, z, rest, input_precision=PRECISION)
        scale = tl.load(scale_ptr + rows, mask=rows < padded, other=0.0)[:, None]
        _store_gradient(
            outputs, side, shared, (d_z + rest) * scale, rows, first, columns,
            NEED_MEMORY, NEED_FEATURES, HAS_MASK, ONE_TOKEN,
        )  # fmt: skip


Side = tuple[Tensor, Tensor | None, Tensor | None]
"""Features [B, F], memory [K, F'] or None, and the memory's own block of Gamma if it is given."""


def _dot_of(side: Side) -> torch.dtype:
    features, memory, _ = side
    triton_type("features", features.dtype)
    if memory is None:
        return features.dtype
    triton_type("memory", memory.dtype)
    return dot_type(features.dtype, memory.dtype)


def _shape_of(sides: Sequence[Side], mask: Tensor | None, dot: torch.dtype) -> LaunchShape:
    features, memory, _ = sides[0]
    target = target_of(features.device)
    return LaunchShape(
        0 if memory is None else memory.shape[0],
        features.shape[0],
        tuple((0 if m is None else m.shape[1], x.shape[1]) for x, m, _ in sides),
        0 if mask is None or features.shape[1] == 0 else mask.shape[1],
        dot,
        product_precision(target, dot),
        next((number for number, side in enumerate(sides) if side[2] is not None), -1),
        target,
    )


def _rows_of(features: Tensor, memory: Tensor | None) -> tuple[tuple[Tensor, Tensor], tuple[int, ...]]:
    """Tensors and strides of memory and features; those of the features stand for a memory that is missing."""
    rows = features if memory is None else memory
    return (rows, features), (*rows.stride(), *features.stride())


def forward(sides: Sequence[Side], mask: Tensor | None) -> Sequence[Tensor]:
    """Gamma [N, N], float32, of one or two sides with the same numbers of rows.

    Raises:
        TypeError: Features or memory are not float16, bfloat16 or float32.
    """
    kinds = [(_dot_of(side), side[0].shape[1] > 0) for side in sides]
    if kinds[0] != kinds[-1]:
        return [forward([side], mask)[0] for side in sides]
    shape = _shape_of(sides, mask, kinds[0][0])
    default, plan = forward_plan(shape)
    device, total = sides[0][0].device, shape.total
    partial = torch.empty((plan.grid[1], total, total), dtype=torch.float32, device=device)
    gram = torch.empty((len(sides), total, total), dtype=torch.float32, device=device)
    work = torch.empty(plan.work, dtype=torch.float64, device=device)
    arguments: list[Any] = []
    for number in (0, len(sides) - 1):
        tensors, strides = _rows_of(*sides[number][:2])
        widths, part_f, parts = shape.widths[number], plan.part_f[number], plan.parts[number]
        arguments += (*tensors, *strides, *widths, shape.token(number), part_f, parts)
    flags, flag_strides = (partial, (0, 0)) if mask is None else (mask.view(torch.uint8), mask.stride())
    rows = (shape.num_centroid, shape.batch, shape.head, total)

    def multiply(config: Config) -> None:
        chosen = plan if config is default else forward_plan(shape, config)[1]
        launch(
            _gram_fwd_kernel, chosen.grid, (*arguments, flags, partial, *flag_strides, *rows), chosen.constants,
            device=device, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    multiply(pick(("gram_fwd", shape), default, lambda: neighbours(default, "block_f"), multiply))
    launch(
        _gram_sum_kernel, plan.sum_grid,
        (partial, work, *rows, plan.parts[0], plan.parts[-1], plan.blocks), plan.sum_constants,
        device=device, num_warps=plan.sum_warps,
    )  # fmt: skip
    given = gram if shape.given_side < 0 else sides[shape.given_side][2]
    given_strides = (0, 0) if given is None or given is gram else given.stride()
    launch(
        _gram_centre_kernel, plan.centre_grid, (work, given, gram, *given_strides, *rows, plan.blocks),
        plan.centre_constants, device=device, num_warps=8,
    )  # fmt: skip
    return gram.unbind()


def backward(
    features: Tensor, memory: Tensor | None, mask: Tensor | None, d_gram: Tensor, weights: Tensor | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (d features, d memory); one that is not needed has no elements.

    ``d_gram`` [L, N, N] are derivatives by Gamma, to be added with ``weights`` [L] or, with None, as they are.

    Raises:
        TypeError: Features or memory are not float16, bfloat16 or float32.
    """
    needs = needs[0], needs[1] and memory is not None
    d_features = torch.empty_like(features) if needs[0] else features.new_empty(0)
    d_memory = torch.empty_like(memory) if memory is not None and needs[1] else features.new_empty(0)
    shape = _shape_of([(features, memory, None)], mask, _dot_of((features, memory, None)))
    if shape.width(0) == 0 or not any(needs):
        return d_features, d_memory
    default, plan = backward_plan(shape, needs)
    device, blocks, sixteenths, padded = features.device, plan.blocks, plan.sixteenths, 16 * plan.sixteenths
    rows = (shape.num_centroid, shape.batch, shape.head, shape.total)
    small = torch.empty((shape.total + 2 * blocks, shape.total), dtype=torch.float32, device=device)
    terms = torch.empty((1 + shape.raw, padded, padded), dtype=shape.dot, device=device)
    scale = torch.empty(padded, dtype=torch.float32, device=device)
    launch(
        _gram_symmetric_kernel, (blocks, blocks),
        (d_gram, small if weights is None else weights, small, *d_gram.stride(), *rows),
        {"COUNT": d_gram.shape[0], "HAS_WEIGHTS": weights is not None, "BLOCK": SYMMETRIC},
        device=device, num_warps=4,
    )  # fmt: skip
    launch(
        _gram_rows_kernel, plan.rows_grid, (small, terms, scale, *rows, sixteenths, blocks), plan.rows_constants,
        device=device, num_warps=4,
    )  # fmt: skip
    outputs = d_memory if needs[1] else small, d_features if needs[0] else small
    tensors, strides = _rows_of(features, memory)
    flags, flag_strides = (small, (0, 0)) if mask is None else (mask.view(torch.uint8), mask.stride())
    arguments = (
        *tensors, flags, terms, scale, *outputs, *strides, *flag_strides, *outputs[0].stride(), *outputs[1].stride(),
        *rows, *shape.widths[0], shape.token(0),
    )  # fmt: skip

    def multiply(config: Config) -> None:
        chosen = plan if config is default else backward_plan(shape, needs, config)[1]
        launch(
            _gram_bwd_kernel, chosen.grid, (*arguments, chosen.part_f, sixteenths), chosen.constants,
            device=device, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    multiply(pick(("gram_bwd", shape, needs), default, lambda: neighbours(default, "block_f"), multiply))
    return d_features, d_memory
