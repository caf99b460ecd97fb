# mypy: disable-error-code="no-untyped-def"
"""k-means over wide points as fused kernels: assignment split over the feature axis, update by gathered rows.

    ||x - c_k||^2 = ||x - m||^2 + ||c_k - m||^2 - 2 <x - m, c_k - m>        m the mean of a few centroids

A program of ``_kmeans_assign_kernel`` compares a block of points with up to 384 centroids and walks over F. It loads
a slice of the centroids, of the points and of m. float32 numbers are shifted by m before they are multiplied. Points of
16 bits go from memory to the tensor cores as they are, and centroids are shifted and rounded to d_k, which costs no
digits to an offset of points and centroids, because m stands beside x wherever d_k is rounded:

    <x - m, d_k> = <x, d_k> - <m, d_k>

||x - m||^2 does not affect the argmin and is added to the minimum alone. The minimum stays on chip unless blocks of
points are too few to fill the GPU. Then F is split, programs write ||c_k - m||^2 - 2 <x - m, c_k - m> over their part,
[parts, K, N], and ``_kmeans_nearest_kernel`` sums the parts in a fixed order and takes the minimum.

Every block of points reads all centroids, so it is as large as the accumulators allow. With N = 4096 and K = 100, 16
blocks of 256 points read 16 K F numbers of centroids beside N F = 41 K F of points, and 8 parts of F write and read
16 N K. This is a third more than reading all once, and 1.19 times the minimum for assignment and update together.
Blocks on the same part of F are launched next to each other and find the centroids in the cache.

A program of ``_kmeans_update_kernel`` owns a (centroid, slice of F) and adds the points of its cluster in their order,
which a stable sort of the labels gives. Every point is read once for any K and added as it is, in the dtype of the
sums. Tensor cores would not help: a product with one-hot labels takes 2 N K F operations, and they would round float32
points to tf32.
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
    RAW_OPERANDS,
    Target,
    cdiv,
    dot_type,
    launch_guard,
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

# Centroids of a tile.
_CENTROIDS = 128
# Maximum number of tiles that a program holds at a time.
_TILES = 3
# Centroids whose mean is subtracted.
_SHIFTING = 16
# Points of a program that sums partial scores.
_NEAREST = 16
# Minimum centroids of the last of several tiles.
_LAST = 64

# Maximum number of programs along the second axis of a grid.
_GRID = 65_535

# Sizes that take any value without another compilation. Widths and strides are specialised: they align loads.
_SIZES = ("N", "K", "parts")


class AssignConfig(NamedTuple):
    """Tile sizes and launch parameters of the assignment."""

    block_n: int
    blocks: tuple[int, ...]
    """Centroids of the tiles that a program holds at a time."""
    block_f: int
    parts: int
    num_warps: int
    num_stages: int


class UpdateConfig(NamedTuple):
    """Tile sizes and launch parameters of the update."""

    block_n: int
    block_f: int
    num_warps: int


@triton.jit
def _load_points(points_ptr, stride_xn, stride_xf, rows, columns, N, width):
    """A tile of points, 0 from column ``width`` on.

    Rows past the last repeat it and are not stored, which takes fewer registers than masking them.
    """
    rows = tl.minimum(rows, N - 1).to(tl.int64)
    pointers = points_ptr + rows[:, None] * stride_xn + columns.to(tl.int64)[None, :] * stride_xf
    return tl.load(pointers, mask=(columns < width)[None, :], other=0.0)


@triton.jit
def _load_tile(centroids_ptr, stride_ck, stride_cf, clusters, columns, K, F):
    """A tile of centroids in float32, 0 outside."""
    inside = (clusters < K)[:, None] & (columns < F)[None, :]
    clusters = clusters.to(tl.int64)
    pointers = centroids_ptr + clusters[:, None] * stride_ck + columns.to(tl.int64)[None, :] * stride_cf
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_centroids(
    centroids_ptr, stride_ck, stride_cf, mean_ptr, clusters_0, clusters_1, clusters_2, columns, K, F,
    CENTROID_TILES: tl.constexpr,
):  # fmt: skip
    """A slice of up to three tiles of centroids, and of m; tiles that do not exist repeat the first."""
    c_0 = _load_tile(centroids_ptr, stride_ck, stride_cf, clusters_0, columns, K, F)
    c_1, c_2 = c_0, c_0
    if CENTROID_TILES > 1:
        c_1 = _load_tile(centroids_ptr, stride_ck, stride_cf, clusters_1, columns, K, F)
    if CENTROID_TILES > 2:
        c_2 = _load_tile(centroids_ptr, stride_ck, stride_cf, clusters_2, columns, K, F)
    return c_0, c_1, c_2, tl.load(mean_ptr + columns, mask=columns < F, other=0.0)


@triton.jit
def _fold(x):
    """Sums of four neighbouring columns, which one thread holds. Sums over threads follow the loop over F."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 4)), axis=2)


@triton.jit
def _add_product(
    products, norms, x, c, mean, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr, RAW: tl.constexpr
):
    """Add <c_k - m, x> [tile, BLOCK_N] and ||c_k - m||^2 over a slice.

    x is shifted by m and rounded. With RAW it is as it is, and 2 <m, d_k> is added to the norms. Points are the second
    operand because a tile has more points than centroids: sm_90 reads it from shared memory.
    """
    c -= mean[None, :]
    if RAW:
        d = round_to(c, DOT_TYPE)
        norms += _fold(c * c + 2.0 * mean[None, :] * d.to(tl.float32))
        if not RAW_OPERANDS:
            x = x.to(tl.float32)
    else:
        d = operand(c, DOT_TYPE, PRECISION)
        norms += _fold(c * c)
    return tl.dot(d, tl.trans(x), products, input_precision=PRECISION), norms


@triton.jit
def _add_beyond(norms, c, mean):
    """Add ||c_k - m||^2 - 2 <c_k - m, 0 - m> over a slice in which points are zero."""
    return norms + _fold((c - mean[None, :]) * (c + mean[None, :]))


@triton.jit
def _nearer(best, label, scores, clusters, K):
    """Take the lowest score [clusters, rows] of a tile if it is below the best; earlier clusters win ties.

    NaN is never below, so a label always names a centroid.
    """
    scores = tl.where((clusters < K)[:, None] & (scores == scores), scores, float("inf"))
    lowest, place = tl.min(scores, axis=0, return_indices=True, return_indices_tie_break_left=True)
    lower = lowest < best
    label = tl.where(lower, tl.min(clusters, axis=0) + place, label)
    return tl.where(lower, lowest, best), label


@triton.jit
def _positive(x):
    """max(x, 0), and NaN where x is NaN."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def _finish(
    best, label, products, norms, first, score_ptr, N, K, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Store the scores of a tile of centroids from ``first`` on to [parts, K, N], or compare them with the best."""
    scores = tl.sum(norms, axis=1)[:, None] - 2.0 * products
    clusters = tl.arange(0, scores.shape[0])
    if SPLIT:
        # Offsets within a tile fit 32 bits.
        first_row = tl.program_id(0) * BLOCK_N
        rows = tl.arange(0, BLOCK_N)
        inside = (clusters < K - first)[:, None] & (rows < N - first_row)[None, :]
        score_ptr += (tl.program_id(1).to(tl.int64) * K + first) * N + first_row
        tl.store(score_ptr + (clusters[:, None] * N + rows[None, :]), scores, mask=inside)
    else:
        best, label = _nearer(best, label, scores, first + clusters, K)
    return best, label


@triton.jit(do_not_specialize=_SIZES)
def _kmeans_assign_kernel(
    points_ptr,
    centroids_ptr,
    mean_ptr,
    label_ptr,
    distance_ptr,
    score_ptr,
    stride_xn,
    stride_xf,
    stride_ck,
    stride_cf,
    N,
    K,
    width,
    F,
    part_f,
    parts,
    NARROW: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    CENTROID_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_0: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One program per (block of rows, part of F), against GROUP centroids at a time.

    SPLIT: scores over the part go to score [parts, K, N] and ||x - m||^2 to distance [parts, N]; otherwise labels and
    squared distances [N] are stored. WHOLE: all centroids are held at once. NARROW: points have fewer columns than
    centroids. RAW: points are multiplied as they are.
    """
    part = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = part * part_f
    last = tl.minimum(first + part_f, width)
    best = tl.full((BLOCK_N,), float("inf"), dtype=tl.float32)
    label = tl.zeros((BLOCK_N,), dtype=tl.int32)
    norm = tl.zeros((BLOCK_N, BLOCK_F // 4), dtype=tl.float32)
    # With one group of constant size the compiler drops the loop and the values kept across it.
    for group in tl.range(0, GROUP if WHOLE else K, GROUP, disable_licm=True):
        clusters_0 = group + tl.arange(0, BLOCK_0)
        clusters_1 = group + BLOCK_0 + tl.arange(0, BLOCK_1)
        clusters_2 = group + BLOCK_0 + BLOCK_1 + tl.arange(0, BLOCK_2)
        norm = tl.zeros((BLOCK_N, BLOCK_F // 4), dtype=tl.float32)
        norms_0 = tl.zeros((BLOCK_0, BLOCK_F // 4), dtype=tl.float32)
        products_0 = tl.zeros((BLOCK_0, BLOCK_N), dtype=tl.float32)
        if CENTROID_TILES > 1:
            norms_1 = tl.zeros((BLOCK_1, BLOCK_F // 4), dtype=tl.float32)
            products_1 = tl.zeros((BLOCK_1, BLOCK_N), dtype=tl.float32)
        if CENTROID_TILES > 2:
            norms_2 = tl.zeros((BLOCK_2, BLOCK_F // 4), dtype=tl.float32)
            products_2 = tl.zeros((BLOCK_2, BLOCK_N), dtype=tl.float32)

        for start in range(first, last, BLOCK_F):
            columns = start + tl.arange(0, BLOCK_F)
            c_0, c_1, c_2, mean = _load_centroids(
                centroids_ptr, stride_ck, stride_cf, mean_ptr, clusters_0, clusters_1, clusters_2, columns,
                K, F, CENTROID_TILES,
            )  # fmt: skip
            x = _load_points(points_ptr, stride_xn, stride_xf, rows, columns, N, width)
            shifted = x.to(tl.float32) - mean[None, :]
            norm += _fold(shifted * shifted)
            if not RAW:
                x = operand(shifted, DOT_TYPE, PRECISION)
            products_0, norms_0 = _add_product(products_0, norms_0, x, c_0, mean, DOT_TYPE, PRECISION, RAW)
            if CENTROID_TILES > 1:
                products_1, norms_1 = _add_product(
                    products_1, norms_1, x, c_1, mean, DOT_TYPE, PRECISION, RAW
                )
            if CENTROID_TILES > 2:
                products_2, norms_2 = _add_product(
                    products_2, norms_2, x, c_2, mean, DOT_TYPE, PRECISION, RAW
                )

        if NARROW:
            # Slices past the points' width hold centroids alone; they are divided among the parts too.
            beyond = tl.cdiv(width, BLOCK_F) * BLOCK_F
            share = tl.cdiv(tl.cdiv(tl.maximum(F - beyond, 0), parts), BLOCK_F) * BLOCK_F
            beyond += part * share
            for start in range(beyond, tl.minimum(beyond + share, F), BLOCK_F):
                columns = start + tl.arange(0, BLOCK_F)
                c_0, c_1, c_2, mean = _load_centroids(
                    centroids_ptr, stride_ck, stride_cf, mean_ptr, clusters_0, clusters_1, clusters_2, columns,
                    K, F, CENTROID_TILES,
                )  # fmt: skip
                norm += _fold(mean * mean + tl.zeros((BLOCK_N, 1), dtype=tl.float32))
                norms_0 = _add_beyond(norms_0, c_0, mean)
                if CENTROID_TILES > 1:
                    norms_1 = _add_beyond(norms_1, c_1, mean)
                if CENTROID_TILES > 2:
                    norms_2 = _add_beyond(norms_2, c_2, mean)

        best, label = _finish(best, label, products_0, norms_0, group, score_ptr, N, K, SPLIT, BLOCK_N)
        if CENTROID_TILES > 1:
            place = group + BLOCK_0
            best, label = _finish(best, label, products_1, norms_1, place, score_ptr, N, K, SPLIT, BLOCK_N)
        if CENTROID_TILES > 2:
            place = group + BLOCK_0 + BLOCK_1
            best, label = _finish(best, label, products_2, norms_2, place, score_ptr, N, K, SPLIT, BLOCK_N)

    square = tl.sum(norm, axis=1)
    if SPLIT:
        tl.store(distance_ptr + part.to(tl.int64) * N + rows, square, mask=rows < N)
    else:
        tl.store(label_ptr + rows, label.to(tl.int64), mask=rows < N)
        tl.store(distance_ptr + rows, _positive(square + best), mask=rows < N)


@triton.jit(do_not_specialize=_SIZES)
def _kmeans_nearest_kernel(
    score_ptr, norm_ptr, label_ptr, distance_ptr, N, K, parts, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """One program per block of points: sum scores [parts, K, N] and norms [parts, N] over parts, take the minimum.

    Sums are float64, because their rounding could decide between two centroids.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    best = tl.full((BLOCK_N,), float("inf"), dtype=tl.float64)
    label = tl.zeros((BLOCK_N,), dtype=tl.int32)
    for first in range(0, K, BLOCK_K):
        clusters = first + tl.arange(0, BLOCK_K)
        inside = (clusters < K)[:, None] & (rows < N)[None, :]
        part_ptr = score_ptr + clusters.to(tl.int64)[:, None] * N + rows[None, :]
        scores = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float64)
        for _ in tl.range(0, parts, loop_unroll_factor=4):
            scores += tl.load(part_ptr, mask=inside, other=0.0).to(tl.float64)
            part_ptr += K.to(tl.int64) * N
        best, label = _nearer(best, label, scores, clusters, K)
    for _ in range(0, parts):
        best += tl.load(norm_ptr + rows, mask=rows < N, other=0.0).to(tl.float64)
        norm_ptr += N
    tl.store(label_ptr + rows, label.to(tl.int64), mask=rows < N)
    tl.store(distance_ptr + rows, _positive(best).to(tl.float32), mask=rows < N)


@triton.jit
def _kmeans_update_kernel(
    points_ptr,
    order_ptr,
    bound_ptr,
    sum_ptr,
    stride_xn,
    stride_xf,
    stride_sk,
    stride_sf,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One program per (slice of F, centroid): add the cluster's points, order[bound[k] : bound[k + 1]], to sum [K, F].

    The points of a tile are summed first, then added to the sum so far.
    """
    cluster = tl.program_id(1).to(tl.int64)
    first = tl.load(bound_ptr + cluster)
    last = tl.load(bound_ptr + cluster + 1)
    columns = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < width
    if last > first:
        total = tl.zeros((BLOCK_F,), dtype=sum_ptr.dtype.element_ty)
        for start in range(first, last, BLOCK_N):
            places = start + tl.arange(0, BLOCK_N)
            rows = tl.load(order_ptr + places, mask=places < last, other=0)
            pointers = points_ptr + rows[:, None] * stride_xn + columns.to(tl.int64)[None, :] * stride_xf
            x = tl.load(pointers, mask=(places < last)[:, None] & inside[None, :], other=0.0)
            total += tl.sum(x.to(tl.float32).to(total.dtype), axis=0)
        pointers = sum_ptr + cluster * stride_sk + columns.to(tl.int64) * stride_sf
        tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + total, mask=inside)


def _tiles(clusters: int, ieee: bool) -> tuple[int, ...]:
    """Centroids of the tiles that a program holds at a time: all up to 384, or up to 128 without tensor cores."""
    maximum = 1 if ieee else _TILES
    if clusters > maximum * _CENTROIDS:
        return (_CENTROIDS,) * min(2, maximum)
    full = (clusters - 1) // _CENTROIDS
    minimum = _LAST if full else MIN_TILE
    return (_CENTROIDS,) * full + (max(minimum, next_power_of_2(clusters - full * _CENTROIDS)),)


def _rows_held(accumulators: int, blocks: tuple[int, ...]) -> int:
    """The largest power of two of points whose products with the centroids held fit the accumulators."""
    return next_power_of_2(accumulators // sum(blocks) + 1) // 2


def assign_config(
    rows: int,
    clusters: int,
    width: int,
    dtype: torch.dtype,
    precision: str,
    target: Target,
    beyond: bool = False,
) -> AssignConfig:
    """Configuration of the assignment; ``dtype`` is that of the dot. With one part the minimum stays on chip.

    ``beyond``: centroids are wider than points, which takes a second loop and its registers.
    """
    ieee = precision == "ieee" and dtype == torch.float32
    small = small_shared_memory(target)
    blocks = _tiles(clusters, ieee)
    # sm_80 keeps the operands of mma.sync in registers; without tensor cores they pass through registers too.
    narrow = ieee or target.arch == 80 or (small and dtype == torch.float32)
    # 128 x 256 accumulators take half of a multiprocessor's registers; narrow slices leave room for a quarter more.
    # Programs that take minima, and keep the best of earlier groups of centroids, have room for fewer.
    maximum = _rows_held(128 * (192 if target.arch == 80 and len(blocks) > 1 else 320), blocks)
    # The operands of three products pass through registers too.
    three = precision == "tf32x3"
    halved = (three and len(blocks) == 1) or (beyond and target.arch == 100)
    maximum_split = min(64 if ieee or (three and not halved) else 128 if halved else 256, maximum)
    maximum_whole = min(64 if ieee else 128, _rows_held(128 * 192, blocks))
    if ieee and target.arch == 80 and clusters > sum(blocks):
        maximum_whole = 32
    # Programs that run at a time: blocks without tensor cores are small enough for two on a multiprocessor.
    slots = target.multiprocessors * (2 if ieee else 1)

    def choice(block_n: int) -> tuple[bool, int, int, int]:
        """(True if half of the GPU idles, additional bytes, -rows of a block, parts)."""
        count = cdiv(rows, block_n)
        parts = max(1, min(slots // count, cdiv(width, 32 if narrow else 64)))
        added = count * clusters * width * dtype.itemsize + (8 * rows * clusters * parts if parts > 1 else 0)
        return 2 * count * parts < slots, added, -block_n, parts

    choices = [choice(MIN_TILE)]
    for block_n in (32, 64, 128, 256):
        found = choice(block_n)
        split = found[-1] > 1 and clusters <= sum(blocks)
        if block_n <= (maximum_split if split else maximum_whole) and block_n < 2 * rows:
            choices.append(found)
    _, _, negative, parts = min(choices)
    block_n = -negative
    several = len(blocks) > 1 or dtype == torch.float32
    narrow = narrow or (several and block_n * sum(blocks) > 192 * 128)
    num_warps = 8 if max(block_n, sum(blocks)) >= (64 if ieee else 128) else 4
    if dtype != torch.float32 and not small and target.arch != 80:
        # Points do not pass through registers.
        block_f = 32 if several else 64
        num_stages = min(
            4, (target.shared_memory - 8192) // ((block_n + sum(blocks)) * block_f * dtype.itemsize)
        )
        return AssignConfig(block_n, blocks, block_f, parts, num_warps, num_stages)
    return AssignConfig(block_n, blocks, 16 if narrow else 32, parts, num_warps, 2 if small or ieee else 3)


def update_config(clusters: int, width: int, dtype: torch.dtype, target: Target) -> UpdateConfig:
    """Configuration of the update: each thread reads a row of a tile with one load of 16 bytes."""
    num_warps = 4
    block_f = min(num_warps * target.warp_size * 16 // dtype.itemsize, max(MIN_TILE, next_power_of_2(width)))
    while block_f > 64 and clusters * cdiv(width, block_f) < target.multiprocessors:
        block_f //= 2
    return UpdateConfig(16, block_f, num_warps)


def assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid (lowest index on ties) and squared distance to it, float32.

    Raises:
        TypeError: Points or centroids are not float16, bfloat16 or float32.
    """
    triton_type("points", points.dtype)
    triton_type("centroids", centroids.dtype)
    rows, width = points.shape
    clusters, features = centroids.shape
    device = points.device
    labels = torch.empty(rows, dtype=torch.int64, device=device)
    squared_distance = torch.empty(rows, dtype=torch.float32, device=device)
    if rows == 0:
        return labels, squared_distance
    dot, target = dot_type(points.dtype, centroids.dtype), target_of(device)
    precision = product_precision(target, dot)
    default = assign_config(rows, clusters, max(1, width), dot, precision, target, width < features)
    # Parts begin where slices of every configuration do.
    part_f = cdiv(cdiv(max(1, width), default.parts), 2 * default.block_f) * 2 * default.block_f
    parts = cdiv(max(1, width), part_f)
    split = parts > 1
    group = sum(default.blocks)
    whole = clusters <= group
    # Near any offset that all share. In float64 it is the same number for any strides.
    mean = centroids[:_SHIFTING].mean(dim=0, dtype=torch.float64).float()
    score = torch.empty((parts, clusters, rows) if split else 0, dtype=torch.float32, device=device)
    norm = torch.empty((parts, rows), dtype=torch.float32, device=device) if split else squared_distance

    def launch(config: AssignConfig) -> None:
        blocks = (*config.blocks, MIN_TILE, MIN_TILE)
        meta: dict[str, Any] = {
            "NARROW": width < features, "SPLIT": split, "WHOLE": whole, "CENTROID_TILES": len(config.blocks),
            "GROUP": group, "DOT_TYPE": triton_type("points", dot), "PRECISION": precision,
            "RAW": dot != torch.float32, "BLOCK_N": config.block_n,
            "BLOCK_0": blocks[0], "BLOCK_1": blocks[1], "BLOCK_2": blocks[2], "BLOCK_F": config.block_f,
            "num_warps": config.num_warps, "num_stages": config.num_stages, **LAUNCH_OPTIONS,
        }  # fmt: skip
        _kmeans_assign_kernel[(cdiv(rows, config.block_n), parts)](
            points, centroids, mean, labels, norm, score, *points.stride(), *centroids.stride(),
            rows, clusters, width, features, part_f, parts, **meta,
        )  # fmt: skip

    with launch_guard(points):
        key = ("kmeans_assign", target, precision, points.dtype, centroids.dtype, width < features, default)
        launch(pick(key, default, lambda: neighbours(default, "block_f"), launch))
        if split:
            _kmeans_nearest_kernel[(cdiv(rows, _NEAREST),)](
                score, norm, labels, squared_distance, rows, clusters, parts,
                BLOCK_N=_NEAREST, BLOCK_K=64, num_warps=4, **LAUNCH_OPTIONS,
            )  # fmt: skip
    return labels, squared_distance


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid alone; its distance costs the kernel next to nothing."""
    return assign(points, centroids)[0]


def update_(sums: Tensor, counts: Tensor, points: Tensor, labels: Tensor) -> None:
    """Add every point to its cluster's row of ``sums`` and count it.

    Raises:
        TypeError: Points are not float16, bfloat16 or float32.
        RuntimeError: A label is out of range. On a GPU it is raised once the device reaches the check, not here.
    """
    triton_type("points", points.dtype)
    clusters = sums.shape[0]
    rows, width = points.shape
    ordered, order = labels.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(clusters + 1, device=labels.device))
    in_range = (bounds[0] == 0) & (bounds[-1] == rows)
    torch._assert_async(in_range, f"labels: expected values in [0, {clusters})")
    counts += bounds.diff()
    if rows == 0 or width == 0:
        return
    config = update_config(clusters, width, points.dtype, target_of(points.device))
    with launch_guard(points):
        for first in range(0, clusters, _GRID):
            grid = (cdiv(width, config.block_f), min(_GRID, clusters - first))
            _kmeans_update_kernel[grid](
                points, order, bounds[first:], sums[first:], *points.stride(), *sums.stride(), width,
                BLOCK_N=config.block_n, BLOCK_F=config.block_f, num_warps=config.num_warps, **LAUNCH_OPTIONS,
            )  # fmt: skip
