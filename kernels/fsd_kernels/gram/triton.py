# mypy: disable-error-code="no-untyped-def, assignment"
"""The Gram matrix of stacked, centred rows as fused kernels, split over the feature axis.

    Z = [m_1 - mu_m, ..., m_K - mu_m, mu_m,  h_1 - mu_h, ..., h_B - mu_h, mu_h - mu_m],   Gamma = Z Z^T
    d[memory; features] = T^T (dGamma + dGamma^T) Z        with the constant T that takes [memory; features] to Z

The rows of a tile are rows of Z: memory, features and both means are put together on chip, centred in float32 and then
rounded for the dot. The inputs are never concatenated. With N <= 192 rows a program of ``_gram_fwd_kernel`` holds all
rows of its part of F and reads each input once. With more rows ``_gram_mean_kernel`` computes the means first, and a
program of ``_gram_tile_kernel`` computes one tile of the triangle. The inputs are then read twice from memory and more
often from the cache, which takes a third of the time of holding six tiles and their sums on chip (docs/gpu.md).
``_gram_sum_kernel`` sums the parts of F in a fixed order, in float64, and mirrors the triangle.

Backward: ``_gram_rows_kernel`` forms A = T^T (dGamma + dGamma^T) once. ``_gram_bwd_kernel``, or ``_gram_mean_kernel``
and ``_gram_bwd_tile_kernel``, multiply it with Z slice by slice, straight into the gradients.
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
    neighbours,
    next_power_of_2,
    operand,
    pick,
    small_shared_memory,
    target_of,
    triton_type,
)

# Maximum rows of Z that one program of the fused kernels holds, in up to three tiles.
_FUSED_ROWS = 192

# Entries of Gamma per program of the sum over parts.
_SUMMED = 128
# Maximum columns of a part of F in IEEE float32.
_CHAIN = 384

# Sizes that take any value without another compilation. Widths and strides are specialised: they align loads.
_SIZES = ("K", "B", "head", "N", "token", "parts")


class Config(NamedTuple):
    """Tile sizes and launch parameters of one kernel."""

    block: int
    """Rows of a tile."""
    last: int
    """Rows of the last tile of a program that holds all rows."""
    tiles: int
    """Tiles of a program that holds all rows; 0 if each program holds one tile of Gamma, or of the gradient."""
    inner: int
    """Backward by tiles: rows of Z that are multiplied at a time."""
    panel: int
    """Backward: tiles of rows of A that a program holds."""
    block_f: int
    parts: int
    num_warps: int
    num_stages: int


@triton.jit
def _load_tile(
    inputs, sizes, rows, start, columns,
    MEMORY: tl.constexpr, FEATURES: tl.constexpr, HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr,
):  # fmt: skip
    """Rows of [memory; -; features; -] in float32, 0 in the rows of the means, in dropped tokens and outside.

    ``inputs`` are the addresses and strides of memory, features and mask, ``sizes`` what ``_Stack.sizes`` holds.
    """
    memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf, mask_ptr, stride_kb, stride_ks = (
        inputs
    )
    K, B, head, _, memory_width, features_width, token = sizes
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
        x = tl.load(memory, mask=in_memory, other=0.0).to(tl.float32)
    elif not MEMORY:
        x = tl.load(features, mask=in_features, other=0.0).to(tl.float32)
    elif memory_ptr.dtype == features_ptr.dtype:
        # A row has one address: one load.
        x = tl.load(tl.where(exists[:, None], features, memory), mask=in_memory | in_features, other=0.0).to(
            tl.float32
        )
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
def _sums(x, rows, K, MEMORY: tl.constexpr, FEATURES: tl.constexpr):
    """Sums over the memory's rows and over the features' rows of a tile. MEMORY, FEATURES: it holds such rows."""
    if not FEATURES:
        sums_m = tl.sum(x, axis=0)
        sums_h = tl.zeros_like(sums_m)
    elif not MEMORY:
        sums_h = tl.sum(x, axis=0)
        sums_m = tl.zeros_like(sums_h)
    else:
        from_memory = (rows < K)[:, None]
        sums_m = tl.sum(tl.where(from_memory, x, 0.0), axis=0)
        sums_h = tl.sum(tl.where(from_memory, 0.0, x), axis=0)
    return sums_m, sums_h


@triton.jit
def _centre(x, mean_m, mean_h, rows, sizes, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Rows of Z from rows of [memory; -; features; -]."""
    K, B, head, N, _, _, _ = sizes
    is_memory = (rows < K)[:, None]
    is_features = ((rows >= head) & (rows < head + B))[:, None]
    mean = tl.where((rows < head)[:, None], mean_m[None, :], mean_h[None, :])
    is_mean = ((rows == head - 1) | (rows == N - 1))[:, None]
    # The last row is mu_h - mu_m; without a memory mu_m is 0.
    kept = tl.where((rows < head)[:, None], mean_m[None, :], (mean_h - mean_m)[None, :])
    z = tl.where(is_memory | is_features, x - mean, tl.where(is_mean, kept, 0.0))
    return operand(z, DOT_TYPE, PRECISION)


@triton.jit
def _store_lower(partial_ptr, gram, rows, columns, N, head, HAS_MEMORY_GRAM: tl.constexpr):
    """Store a tile's entries on and below the diagonal, without the memory's own block if that is given."""
    lower = (rows < N)[:, None] & (columns[None, :] <= rows[:, None])
    if HAS_MEMORY_GRAM:
        lower = lower & ((rows >= head)[:, None] | (columns >= head)[None, :])
    tl.store(partial_ptr + rows[:, None] * N + columns[None, :], gram, mask=lower)


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
    inputs, sizes, start, columns,
    TILES: tl.constexpr, MEMORY_TILES: tl.constexpr, FIRST_FEATURES: tl.constexpr,
    HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, LAST: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """All rows of Z over a slice of F, tile by tile; each input is read once.

    Tiles below MEMORY_TILES hold memory rows, tiles from FIRST_FEATURES on hold features.
    """
    K, B, _, _, _, _, _ = sizes
    mean_m = tl.zeros((BLOCK_F,), dtype=tl.float32)
    mean_h = tl.zeros((BLOCK_F,), dtype=tl.float32)
    loaded = ()
    for t in tl.static_range(TILES):
        rows = _tile_rows(t, TILES, BLOCK, LAST)
        x = _load_tile(
            inputs, sizes, rows, start, columns, t < MEMORY_TILES, t >= FIRST_FEATURES, HAS_MASK, ONE_TOKEN
        )
        sums_m, sums_h = _sums(x, rows, K, t < MEMORY_TILES, t >= FIRST_FEATURES)
        mean_m += sums_m
        mean_h += sums_h
        loaded += (x,)
    mean_m /= tl.maximum(K, 1)
    mean_h /= tl.maximum(B, 1)
    centred = ()
    for t in tl.static_range(TILES):
        rows = _tile_rows(t, TILES, BLOCK, LAST)
        centred += (_centre(loaded[t], mean_m, mean_h, rows, sizes, DOT_TYPE, PRECISION),)
    return centred


@triton.constexpr_function
def _pairs(tiles, first):
    """The tiles (i, j), j <= i, i >= ``first``, of Gamma."""
    return tuple((i, j) for i in range(first, tiles) for j in range(i + 1))


@triton.jit(do_not_specialize=_SIZES)
def _gram_fwd_kernel(
    memory_ptr, features_ptr, mask_ptr, partial_ptr,
    stride_mk, stride_mf, stride_hb, stride_hf, stride_kb, stride_ks,
    K, B, head, N, memory_width, features_width, token, part_f,
    HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr, HAS_MEMORY_GRAM: tl.constexpr, FIRST: tl.constexpr,
    TILES: tl.constexpr, MEMORY_TILES: tl.constexpr, FIRST_FEATURES: tl.constexpr,
    DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, LAST: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program per part of F: Gamma over that part, from tile row FIRST on, to partial [parts, N, N]."""
    inputs = (
        memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf, mask_ptr, stride_kb, stride_ks,
    )  # fmt: skip
    sizes = (K, B, head, N, memory_width, features_width, token)
    part = tl.program_id(0)
    first = part * part_f
    last = tl.minimum(first + part_f, tl.maximum(memory_width, features_width))
    partial_ptr += part.to(tl.int64) * N * N
    PAIRS: tl.constexpr = _pairs(TILES, FIRST)
    # Tiles above the diagonal, transposed when stored: their many rows and few columns suit the tensor cores.
    grams = ()
    for p in tl.static_range(len(PAIRS)):
        grams += (
            tl.zeros(
                (_tile_size(PAIRS[p][1], TILES, BLOCK, LAST), _tile_size(PAIRS[p][0], TILES, BLOCK, LAST)),
                dtype=tl.float32,
            ),
        )
    for start in range(first, last, BLOCK_F):
        z = _all_tiles(
            inputs, sizes, start, start + tl.arange(0, BLOCK_F),
            TILES, MEMORY_TILES, FIRST_FEATURES, HAS_MASK, ONE_TOKEN, DOT_TYPE, PRECISION, BLOCK, LAST, BLOCK_F,
        )  # fmt: skip
        sums = ()
        for p in tl.static_range(len(PAIRS)):
            product = tl.dot(z[PAIRS[p][1]], tl.trans(z[PAIRS[p][0]]), grams[p], input_precision=PRECISION)
            sums += (product,)
        grams = sums
    for p in tl.static_range(len(PAIRS)):
        rows = _tile_rows(PAIRS[p][0], TILES, BLOCK, LAST)
        columns = _tile_rows(PAIRS[p][1], TILES, BLOCK, LAST)
        _store_lower(partial_ptr, tl.trans(grams[p]), rows, columns, N, head, HAS_MEMORY_GRAM)


@triton.jit
def _means(
    inputs, sizes, start, columns, HAS_MEMORY: tl.constexpr, HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The means of the memory and of the features over a slice of F, from all rows."""
    K, B, _, N, _, _, _ = sizes
    mean_m = tl.zeros((BLOCK_F,), dtype=tl.float32)
    mean_h = tl.zeros((BLOCK_F,), dtype=tl.float32)
    for first in range(0, N, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        x = _load_tile(inputs, sizes, rows, start, columns, HAS_MEMORY, True, HAS_MASK, ONE_TOKEN)
        sums_m, sums_h = _sums(x, rows, K, HAS_MEMORY, True)
        mean_m += sums_m
        mean_h += sums_h
    return mean_m / tl.maximum(K, 1), mean_h / tl.maximum(B, 1)


@triton.jit(do_not_specialize=_SIZES)
def _gram_mean_kernel(
    memory_ptr, features_ptr, mask_ptr, mean_ptr,
    stride_mk, stride_mf, stride_hb, stride_hf, stride_kb, stride_ks,
    K, B, head, N, memory_width, features_width, token,
    HAS_MEMORY: tl.constexpr, HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program per slice of F: the means of the memory and of the features, to mean [2, F]."""
    inputs = (
        memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf, mask_ptr, stride_kb, stride_ks,
    )  # fmt: skip
    sizes = (K, B, head, N, memory_width, features_width, token)
    start = tl.program_id(0) * BLOCK_F
    columns = start + tl.arange(0, BLOCK_F)
    mean_m, mean_h = _means(inputs, sizes, start, columns, HAS_MEMORY, HAS_MASK, ONE_TOKEN, BLOCK_N, BLOCK_F)
    width = tl.maximum(memory_width, features_width)
    tl.store(mean_ptr + columns, mean_m, mask=columns < width)
    tl.store(mean_ptr + width + columns, mean_h, mask=columns < width)


@triton.jit
def _load_means(mean_ptr, columns, memory_width, features_width):
    """A slice of what ``_gram_mean_kernel`` stored."""
    width = tl.maximum(memory_width, features_width)
    mean_m = tl.load(mean_ptr + columns, mask=columns < width, other=0.0)
    return mean_m, tl.load(mean_ptr + width + columns, mask=columns < width, other=0.0)


@triton.jit(do_not_specialize=_SIZES)
def _gram_tile_kernel(
    memory_ptr, features_ptr, mask_ptr, mean_ptr, partial_ptr,
    stride_mk, stride_mf, stride_hb, stride_hf, stride_kb, stride_ks,
    K, B, head, N, memory_width, features_width, token, part_f,
    HAS_MEMORY: tl.constexpr, HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr, HAS_MEMORY_GRAM: tl.constexpr,
    DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program per (lower-triangle tile, part of F): that tile of Gamma over that part."""
    inputs = (
        memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf, mask_ptr, stride_kb, stride_ks,
    )  # fmt: skip
    sizes = (K, B, head, N, memory_width, features_width, token)
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
    if HAS_MEMORY_GRAM:
        # A tile within the memory's own block is not computed.
        last = tl.where((block_i + 1) * BLOCK_N <= head, first, last)
    gram = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
    for start in range(first, last, BLOCK_F):
        columns = start + tl.arange(0, BLOCK_F)
        mean_m, mean_h = _load_means(mean_ptr, columns, memory_width, features_width)
        z_i = _load_tile(inputs, sizes, rows_i, start, columns, HAS_MEMORY, True, HAS_MASK, ONE_TOKEN)
        z_j = _load_tile(inputs, sizes, rows_j, start, columns, HAS_MEMORY, True, HAS_MASK, ONE_TOKEN)
        z_i = _centre(z_i, mean_m, mean_h, rows_i, sizes, DOT_TYPE, PRECISION)
        z_j = _centre(z_j, mean_m, mean_h, rows_j, sizes, DOT_TYPE, PRECISION)
        gram = tl.dot(z_i, tl.trans(z_j), gram, input_precision=PRECISION)
    partial_ptr += part.to(tl.int64) * N * N
    _store_lower(partial_ptr, gram, rows_i, rows_j, N, head, HAS_MEMORY_GRAM)


@triton.jit(do_not_specialize=_SIZES)
def _gram_sum_kernel(
    partial_ptr, memory_gram_ptr, gram_ptr, stride_nr, stride_nc, N, head, parts,
    HAS_MEMORY_GRAM: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK entries of Gamma: sum the parts, PARTS at a time, write the entries and their mirror image.

    Sums are float64, because the losses near CKA = 1 depend on the last bits of Gamma.
    """
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows, columns = entries // N, entries % N
    lower = (rows < N) & (columns <= rows)
    read = lower
    if HAS_MEMORY_GRAM:
        in_block = (rows < head) & (columns < head)
        read = lower & ((rows >= head) | (columns >= head))
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, parts, PARTS):
        some = first + tl.arange(0, PARTS)
        pointers = partial_ptr + some.to(tl.int64)[:, None] * N * N + entries[None, :]
        share = tl.load(pointers, mask=(some < parts)[:, None] & read[None, :], other=0.0)
        total += tl.sum(share.to(tl.float64), axis=0)
    gram = total.to(tl.float32)
    if HAS_MEMORY_GRAM:
        memory_gram = tl.load(
            memory_gram_ptr + rows * stride_nr + columns * stride_nc, mask=in_block & lower, other=0.0
        )
        gram = tl.where(in_block, memory_gram.to(tl.float32), gram)
    tl.store(gram_ptr + entries, gram, mask=lower)
    tl.store(gram_ptr + columns * N + rows, gram, mask=lower & (columns < rows))


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
    """One program per (tile of rows, tile of columns) of A = T^T (dGamma + dGamma^T), [N, N]; rows of means are 0.

    A row of the memory or of the features is its row of dGamma + dGamma^T, less the mean of all such rows, plus the row
    of their mean divided by their number. The last row of Z, mu_h - mu_m, counts with a minus for the memory's rows.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    shift_m = tl.zeros((BLOCK,), dtype=tl.float32)
    shift_h = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        others = start + tl.arange(0, BLOCK)
        inside = (others < N)[:, None] & (columns < N)[None, :]
        tile = _symmetric_tile(d_gram_ptr, stride_dr, stride_dc, others, columns, inside)
        # The row of a mean enters the shift of its rows with a minus.
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
def _load_scaled(a_ptr, rows, columns, N, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Split a tile of A into (rows divided by their largest entry, in the dot's type; these largest entries).

    Entries of A would underflow in float16. Scaling a product before it is added also keeps the compiler from chaining
    two dots into one accumulator, which some targets get wrong.
    """
    inside = (rows < N)[:, None] & (columns < N)[None, :]
    a = tl.load(a_ptr + rows[:, None] * N + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(a), axis=1)
    a *= tl.where(scale > 0.0, 1.0 / scale, 0.0)[:, None]
    return operand(a, DOT_TYPE, PRECISION), scale[:, None]


@triton.jit
def _store_gradient(
    outputs, inputs, sizes, d_z, rows, start, columns,
    NEED_MEMORY: tl.constexpr, NEED_FEATURES: tl.constexpr, HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr,
):  # fmt: skip
    """Write the memory's and the features' rows of a tile to their gradients; dropped tokens get 0."""
    d_memory_ptr, stride_dk, stride_df, d_features_ptr, stride_gb, stride_gf = outputs
    _, _, _, _, _, _, mask_ptr, stride_kb, stride_ks = inputs
    K, B, head, _, memory_width, features_width, token = sizes
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
    memory_ptr, features_ptr, mask_ptr, a_ptr, d_memory_ptr, d_features_ptr,
    stride_mk, stride_mf, stride_hb, stride_hf, stride_kb, stride_ks, stride_dk, stride_df, stride_gb, stride_gf,
    K, B, head, N, memory_width, features_width, token, part_f,
    HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr, NEED_MEMORY: tl.constexpr, NEED_FEATURES: tl.constexpr,
    PANEL: tl.constexpr,
    TILES: tl.constexpr, MEMORY_TILES: tl.constexpr, FIRST_FEATURES: tl.constexpr,
    DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, LAST: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program per (panel of rows, part of F): its rows of A Z. The panel of A is read once and stays on chip.

    A panel is PANEL tiles of rows of A, all tiles if they fit. A program reads all rows of Z over its part; programs of
    one part are launched side by side.
    """
    inputs = (
        memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf, mask_ptr, stride_kb, stride_ks,
    )  # fmt: skip
    outputs = (d_memory_ptr, stride_dk, stride_df, d_features_ptr, stride_gb, stride_gf)
    sizes = (K, B, head, N, memory_width, features_width, token)
    first = tl.program_id(1) * part_f
    last = tl.minimum(first + part_f, tl.maximum(memory_width, features_width))
    top = tl.program_id(0) * PANEL * BLOCK
    PANEL_LAST: tl.constexpr = LAST if PANEL == TILES else BLOCK
    tiles_of_a = ()
    scales = ()
    for p in tl.static_range(PANEL * TILES):
        rows = top + _tile_rows(p // TILES, PANEL, BLOCK, PANEL_LAST)
        others = _tile_rows(p % TILES, TILES, BLOCK, LAST)
        a, scale = _load_scaled(a_ptr, rows, others, N, DOT_TYPE, PRECISION)
        tiles_of_a += (a,)
        scales += (scale,)
    for start in range(first, last, BLOCK_F):
        columns = start + tl.arange(0, BLOCK_F)
        z = _all_tiles(
            inputs, sizes, start, columns,
            TILES, MEMORY_TILES, FIRST_FEATURES, HAS_MASK, ONE_TOKEN, DOT_TYPE, PRECISION, BLOCK, LAST, BLOCK_F,
        )  # fmt: skip
        for i in tl.static_range(PANEL):
            d_z = tl.dot(tiles_of_a[i * TILES], z[0], input_precision=PRECISION) * scales[i * TILES]
            for j in tl.static_range(1, TILES):
                product = tl.dot(tiles_of_a[i * TILES + j], z[j], input_precision=PRECISION)
                d_z += product * scales[i * TILES + j]
            _store_gradient(
                outputs, inputs, sizes, d_z, top + _tile_rows(i, PANEL, BLOCK, PANEL_LAST), start, columns,
                NEED_MEMORY and (PANEL < TILES or i < MEMORY_TILES),
                NEED_FEATURES and (PANEL < TILES or i >= FIRST_FEATURES), HAS_MASK, ONE_TOKEN,
            )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _gram_bwd_tile_kernel(
    memory_ptr, features_ptr, mask_ptr, mean_ptr, a_ptr, d_memory_ptr, d_features_ptr,
    stride_mk, stride_mf, stride_hb, stride_hf, stride_kb, stride_ks, stride_dk, stride_df, stride_gb, stride_gf,
    K, B, head, N, memory_width, features_width, token,
    HAS_MEMORY: tl.constexpr, HAS_MASK: tl.constexpr, ONE_TOKEN: tl.constexpr,
    NEED_MEMORY: tl.constexpr, NEED_FEATURES: tl.constexpr,
    DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, INNER: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program per (tile of rows, slice of F): that tile of A Z, INNER rows of Z at a time."""
    inputs = (
        memory_ptr, stride_mk, stride_mf, features_ptr, stride_hb, stride_hf, mask_ptr, stride_kb, stride_ks,
    )  # fmt: skip
    outputs = (d_memory_ptr, stride_dk, stride_df, d_features_ptr, stride_gb, stride_gf)
    sizes = (K, B, head, N, memory_width, features_width, token)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_F
    columns = start + tl.arange(0, BLOCK_F)
    mean_m, mean_h = _load_means(mean_ptr, columns, memory_width, features_width)
    d_z = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    for first in range(0, N, INNER):
        others = first + tl.arange(0, INNER)
        z = _load_tile(inputs, sizes, others, start, columns, HAS_MEMORY, True, HAS_MASK, ONE_TOKEN)
        z = _centre(z, mean_m, mean_h, others, sizes, DOT_TYPE, PRECISION)
        if DOT_TYPE == tl.float16:
            a, scale = _load_scaled(a_ptr, rows, others, N, DOT_TYPE, PRECISION)
            d_z += tl.dot(a, z, input_precision=PRECISION) * scale
        else:
            inside = (rows < N)[:, None] & (others < N)[None, :]
            a = tl.load(a_ptr + rows[:, None] * N + others[None, :], mask=inside, other=0.0).to(tl.float32)
            d_z = tl.dot(operand(a, DOT_TYPE, PRECISION), z, d_z, input_precision=PRECISION)
    _store_gradient(
        outputs, inputs, sizes, d_z, rows, start, columns, NEED_MEMORY, NEED_FEATURES, HAS_MASK, ONE_TOKEN
    )


def _tiles(total: int) -> tuple[int, int, int]:
    """(rows of a tile, rows of the last tile, tiles) of a program that holds N = ``total`` rows; 0 tiles: too many."""
    if total > _FUSED_ROWS:
        return 128, 128, 0
    block = 64 if total > 64 else 32 if total > 32 else MIN_TILE
    tiles = cdiv(total, block)
    return block, max(MIN_TILE, next_power_of_2(total - (tiles - 1) * block)), tiles


def held_tiles(config: Config, skipped: int) -> list[tuple[int, int]]:
    """Sizes of the tiles of Gamma that a program of the fused forward holds."""
    sizes = [config.block] * (config.tiles - 1) + [config.last]
    return [(sizes[i], sizes[j]) for i, j in _pairs(config.tiles, skipped // config.block)]


def forward_config(
    total: int, width: int, dtype: torch.dtype, precision: str, target: Target, skipped: int = 0
) -> Config:
    """Configuration of the forward for N = ``total`` rows and F = ``width``.

    ``dtype`` is that of the dot; the block of the first ``skipped`` rows is given and not computed.
    """
    block, last, tiles = _tiles(total)
    ieee = precision == "ieee" and dtype == torch.float32
    small = small_shared_memory(target)
    num_stages = 2 if small or ieee else 3
    programs = 1 if tiles else cdiv(total, block) * (cdiv(total, block) + 1) // 2
    # Two tiles of 128 rows and their Gram matrix leave registers for 32 columns.
    block_f = 64 if dtype != torch.float32 and tiles else 32
    num_warps = 8 if ieee or block >= 64 else 4
    # Targets that hold the operands of a product in registers, next to the accumulators: sm_80's mma.sync, and sm_100
    # for the small tile.
    crowded = tiles >= 2 and target.arch == 100 and dtype != torch.float32
    crowded = crowded or (target.arch == 80 and (tiles >= 3 or (not tiles and dtype == torch.float32)))
    if small or ieee or crowded:
        block_f //= 2
    elif target.arch == 90:
        # Measured: with fewer warps less time goes into waiting at the sums over rows.
        block_f, num_warps = 64, 4 if tiles else 8
    # Every part writes its entries in float32, and they are read again: at most a fifth of the bytes of the inputs, a
    # tenth if a given block leaves few entries and so would allow many parts.
    affordable = total * width * dtype.itemsize // ((10 if skipped else 5) * 2 * (total**2 - skipped**2))
    parts = min(target.multiprocessors // programs, affordable)
    if ieee:
        # A part is summed product by product, so short parts lose less. Arithmetic is the limit here, not memory.
        parts = max(parts, cdiv(width, _CHAIN))
    parts = max(1, min(parts, cdiv(width, block_f)))
    return Config(block, last, tiles, 0, tiles, block_f, parts, num_warps, num_stages)


def backward_config(
    total: int, width: int, dtype: torch.dtype, precision: str, target: Target, masked: bool = False
) -> Config:
    """Configuration of the backward; ``parts`` matters only if one program holds all rows."""
    block, last, tiles = _tiles(total)
    ieee = precision == "ieee" and dtype == torch.float32
    small = small_shared_memory(target)
    if not tiles or (ieee and total > 64):
        # Tiles as for any product; without tensor cores their operands pass through registers.
        block, inner = (64, 16) if ieee else (64, 32) if small else (128, 32)
        block_f, num_warps, num_stages = 64, 8, 2 if small or ieee else 3
        if target.arch == 90 and not ieee:
            # Measured.
            block_f, num_warps = (64, 4) if dtype == torch.float32 else (128, 8)
        return Config(block, block, 0, inner, 0, block_f, 1, num_warps, num_stages)
    block_f, num_stages = 64 if dtype != torch.float32 or target.arch == 90 else 32, 2
    if small or ieee:
        block_f //= 2
    panel = tiles
    if tiles > 1 and (small or (dtype == torch.float32 and masked and tiles == 3)):
        # All of A stays on chip only with much shared memory and, for three tiles in float32, without a mask.
        panel, block_f, num_stages = 1, 16 if dtype == torch.float32 else 32, 1
    # Every part reads A: at most an eighth of the bytes of rows and gradients, a fourteenth for float16, whose A is
    # float32.
    a_size, share = (2 if dtype == torch.bfloat16 else 4), (14 if dtype == torch.float16 else 8)
    affordable = 2 * width * dtype.itemsize // (share * a_size * total)
    parts = max(1, min(cdiv(target.multiprocessors, cdiv(tiles, panel)), affordable, cdiv(width, block_f)))
    num_warps = 8 if block >= 64 else 4
    return Config(block, last, tiles, 0, panel, block_f, parts, num_warps, num_stages)


def small_block(total: int) -> int:
    """Rows of a tile in the kernels over [N, N]: small enough to fill a GPU, large enough for many rows."""
    return 64 if total > 192 else 32


class _Stack(NamedTuple):
    """The arguments of every kernel that reads the stacked rows."""

    pointers: tuple[Tensor, ...]
    strides: tuple[int, ...]
    sizes: tuple[int, ...]
    total: int
    width: int
    token: int
    dot: torch.dtype
    meta: dict[str, Any]

    def tiles(self, config: Config) -> dict[str, Any]:
        """Arguments of a kernel that holds all tiles: how many hold memory, and the first that holds features."""
        num_centroid, _, head = self.sizes[:3]
        return {
            "TILES": config.tiles,
            "MEMORY_TILES": min(config.tiles, cdiv(num_centroid, config.block)),
            "FIRST_FEATURES": min(config.tiles - 1, head // config.block),
            "BLOCK": config.block,
            "LAST": config.last,
        }

    def means(self) -> Tensor:
        """The means of the memory's and of the features' rows, [2, F], for programs that do not read all rows."""
        features = self.pointers[1]
        mean = torch.empty((2, self.width), dtype=torch.float32, device=features.device)
        # 512 bytes of a row.
        columns = 512 // features.dtype.itemsize
        _gram_mean_kernel[(cdiv(self.width, columns),)](
            *self.pointers, mean, *self.strides, *self.sizes, HAS_MEMORY=self.sizes[0] > 0,
            HAS_MASK=self.meta["HAS_MASK"], ONE_TOKEN=self.token % columns == 0,
            BLOCK_N=64, BLOCK_F=columns, num_warps=4, **LAUNCH_OPTIONS,
        )  # fmt: skip
        return mean

    def options(self, config: Config) -> dict[str, Any]:
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


def _stacked(features: Tensor, memory: Tensor | None, mask: Tensor | None) -> _Stack:
    triton_type("features", features.dtype)
    batch, features_width = features.shape
    mask = mask if features_width else None
    num_centroid, width, head = 0, features_width, 0
    if memory is not None:
        triton_type("memory", memory.dtype)
        num_centroid, width = memory.shape
        head = num_centroid + 1
    total = head + batch + 1
    token = features_width // mask.shape[1] if mask is not None else 1
    memory_rows = features if memory is None else memory
    mask_bytes = features if mask is None else mask.view(torch.uint8)
    return _Stack(
        pointers=(memory_rows, features, mask_bytes),
        strides=(*memory_rows.stride(), *features.stride(), *mask_bytes.stride()),
        sizes=(num_centroid, batch, head, total, 0 if memory is None else width, features_width, token),
        total=total,
        width=max(width, features_width),
        token=token,
        dot=dot_type(features.dtype, memory_rows.dtype),
        meta={"HAS_MASK": mask is not None, "PRECISION": dot_precision()},
    )


def forward(
    features: Tensor, memory: Tensor | None, memory_gram: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Gamma, float32, of features [B, F] and memory [K, F'] or None; ``memory_gram``: the memory's own block.

    Raises:
        TypeError: Features or memory are not float16, bfloat16 or float32.
    """
    stack = _stacked(features, memory, mask)
    total = stack.total
    gram = torch.empty((total, total), dtype=torch.float32, device=features.device)
    if stack.width == 0:
        return gram.zero_()
    target = target_of(features.device)
    has_memory_gram = memory_gram is not None
    skipped = stack.sizes[2] if has_memory_gram else 0
    default = forward_config(total, stack.width, stack.dot, stack.meta["PRECISION"], target, skipped)
    # Parts begin where slices of every configuration do, and where tokens do if a slice is within one.
    part_f = cdiv(cdiv(stack.width, default.parts), 2 * default.block_f) * 2 * default.block_f
    parts = cdiv(stack.width, part_f)
    partial = torch.empty((parts, total, total), dtype=torch.float32, device=features.device)

    def launch(config: Config) -> None:
        sizes = (*stack.strides, *stack.sizes, part_f)
        meta = {**stack.options(config), "HAS_MEMORY_GRAM": has_memory_gram}
        if config.tiles:
            tiles = stack.tiles(config)
            _gram_fwd_kernel[(parts,)](
                *stack.pointers, partial, *sizes, FIRST=skipped // config.block, **tiles, **meta
            )
        else:
            blocks = cdiv(total, config.block)
            _gram_tile_kernel[(blocks * (blocks + 1) // 2, parts)](
                *stack.pointers, stack.means(), partial, *sizes,
                HAS_MEMORY=memory is not None, BLOCK_N=config.block, **meta,
            )  # fmt: skip

    with launch_guard(features):
        key = ("gram_fwd", target, stack.meta["PRECISION"], stack.dot, total, default)
        launch(pick(key, default, lambda: neighbours(default, "block_f"), launch))
        # A block from "eager" is float64.
        block = gram if memory_gram is None else memory_gram.to(gram.dtype)
        _gram_sum_kernel[(cdiv(total**2, _SUMMED),)](
            partial, block, gram, *block.stride(), total, stack.sizes[2], parts,
            HAS_MEMORY_GRAM=has_memory_gram, PARTS=16, BLOCK=_SUMMED, num_warps=4, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return gram


def backward(
    features: Tensor, memory: Tensor | None, mask: Tensor | None, d_gram: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return (d features, d memory); one that is not needed has no elements.

    Raises:
        TypeError: Features or memory are not float16, bfloat16 or float32.
    """
    stack = _stacked(features, memory, mask)
    total = stack.total
    need_features, need_memory = needs[0], needs[1] and memory is not None
    d_features = torch.empty_like(features) if need_features else features.new_empty(0)
    d_memory = torch.empty_like(memory) if memory is not None and need_memory else features.new_empty(0)
    if stack.width == 0 or not (need_features or need_memory):
        return d_features, d_memory
    target = target_of(features.device)
    a_type = torch.bfloat16 if stack.dot == torch.bfloat16 else torch.float32
    a = torch.empty((total, total), dtype=a_type, device=features.device)
    default = backward_config(
        total, stack.width, stack.dot, stack.meta["PRECISION"], target, masked=mask is not None
    )
    outputs = (d_memory if need_memory else a, d_features if need_features else a)
    strides = tuple(stride for output in outputs for stride in output.stride())

    def launch(config: Config) -> None:
        sizes = (*stack.strides, *strides, *stack.sizes)
        meta = {**stack.options(config), "NEED_MEMORY": need_memory, "NEED_FEATURES": need_features}
        if config.tiles:
            part_f = cdiv(cdiv(stack.width, config.parts), config.block_f) * config.block_f
            _gram_bwd_kernel[(cdiv(config.tiles, config.panel), cdiv(stack.width, part_f))](
                *stack.pointers, a, *outputs, *sizes, part_f, PANEL=config.panel, **stack.tiles(config), **meta
            )  # fmt: skip
        else:
            grid = (cdiv(total, config.block), cdiv(stack.width, config.block_f))
            _gram_bwd_tile_kernel[grid](
                *stack.pointers, stack.means(), a, *outputs, *sizes,
                HAS_MEMORY=memory is not None, BLOCK_N=config.block, INNER=config.inner, **meta,
            )  # fmt: skip

    with launch_guard(features):
        block = small_block(total)
        tiles = cdiv(total, block)
        _gram_rows_kernel[(tiles, tiles)](
            d_gram, a, *d_gram.stride(), *stack.sizes[:4], BLOCK=block, num_warps=block // 8, **LAUNCH_OPTIONS
        )
        key = ("gram_bwd", target, stack.meta["PRECISION"], stack.dot, total, default)
        launch(pick(key, default, lambda: neighbours(default, "block_f"), launch))
    return d_features, d_memory
