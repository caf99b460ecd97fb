# mypy: disable-error-code="no-untyped-def"
"""k-means over wide points as fused kernels: assignment split over the feature axis, update by gathered rows.

    ||x - c_k||^2 = ||x - m||^2 + ||c_k - m||^2 - 2 <x - m, c_k - m>        m the mean centroid

``_kmeans_assign_kernel`` holds a block of rows against up to 384 centroids and walks over F: it loads a slice of the
centroids and one of the points, takes m from the centroids' slice where it holds them all, shifts both by m in
float32 and rounds them for the dot. ||x - m||^2 plays no part in the argmin and is added to the winner alone. The
minimum stays on chip, unless blocks of rows are too few to fill the GPU: then F is split, programs write
||c_k - m||^2 - 2 <x - m, c_k - m> over their part, [parts, K, N], and ``_kmeans_nearest_kernel`` sums the parts in a
fixed order and takes the minimum.

Every block of rows reads the centroids anew, so it is as large as the accumulators allow. With N = 4096 and K = 100,
16 blocks of 256 rows read 16 K F numbers of centroids beside N F = 41 K F of points, and 8 parts of F write and read
16 N K: a third more than reading all once, and 1.19 times the minimum for assignment and update together. Blocks on
the same part of F are launched next to each other and find the centroids in the cache.

``_kmeans_update_kernel`` has one owner per (centroid, slice of F), which walks through the points of its cluster in
their order, found by a stable sort of the labels. It reads every point once whatever K is, and adds it as it is, in
the dtype of the sums; there is nothing for tensor cores. A product with one-hot labels would take 2 N K F operations,
and either round float32 points to tf32 or do without tensor cores too.
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
    operand,
    pick,
    small_shared_memory,
    target_of,
    triton_type,
)

# Centroids of one tile, tiles that a program holds at a time, and centroids of the last of several at least.
_CENTROIDS = 128
_TILES = 3
_LAST = 64

# Programs along the second axis of a grid.
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
    """A tile of points in float32, 0 from column ``width`` on.

    Rows past the last repeat it and nobody stores them: this costs fewer registers than masking them does.
    """
    rows = tl.minimum(rows, N - 1).to(tl.int64)
    pointers = points_ptr + rows[:, None] * stride_xn + columns.to(tl.int64)[None, :] * stride_xf
    return tl.load(pointers, mask=(columns < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _load_tile(centroids_ptr, stride_ck, stride_cf, clusters, columns, K, F):
    """A tile of centroids in float32, 0 outside."""
    inside = (clusters < K)[:, None] & (columns < F)[None, :]
    clusters = clusters.to(tl.int64)
    pointers = centroids_ptr + clusters[:, None] * stride_ck + columns.to(tl.int64)[None, :] * stride_cf
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_centroids(
    centroids_ptr, stride_ck, stride_cf, mean_ptr, clusters_0, clusters_1, clusters_2, columns, K, F, inverse,
    WHOLE: tl.constexpr, CENTROID_TILES: tl.constexpr,
):  # fmt: skip
    """A slice of up to three tiles of centroids (the first stands in for those that are not there), and their mean."""
    c_0 = _load_tile(centroids_ptr, stride_ck, stride_cf, clusters_0, columns, K, F)
    c_1, c_2 = c_0, c_0
    if CENTROID_TILES > 1:
        c_1 = _load_tile(centroids_ptr, stride_ck, stride_cf, clusters_1, columns, K, F)
    if CENTROID_TILES > 2:
        c_2 = _load_tile(centroids_ptr, stride_ck, stride_cf, clusters_2, columns, K, F)
    if WHOLE:
        mean = tl.sum(c_0, axis=0)
        if CENTROID_TILES > 1:
            mean += tl.sum(c_1, axis=0)
        if CENTROID_TILES > 2:
            mean += tl.sum(c_2, axis=0)
        mean *= inverse
    else:
        mean = tl.load(mean_ptr + columns, mask=columns < F, other=0.0)
    return c_0, c_1, c_2, mean


@triton.jit
def _fold(x):
    """Sums of four neighbouring columns, which one thread holds; threads are added up after the loop over F."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 4)), axis=2)


@triton.jit
def _add_product(products, norms, x, c, mean, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Add <c_k - m, x - m> [tile, BLOCK_N] and ||c_k - m||^2 over a slice; x is shifted and rounded already.

    Rows, of which a tile has more than centroids, come second: sm_90 reads that operand from shared memory.
    """
    c -= mean[None, :]
    norms += _fold(c * c)
    return tl.dot(operand(c, DOT_TYPE, PRECISION), tl.trans(x), products, input_precision=PRECISION), norms


@triton.jit
def _add_beyond(norms, c, mean):
    """Add ||c_k - m||^2 - 2 <c_k - m, 0 - m> over a slice in which points are zero."""
    return norms + _fold((c - mean[None, :]) * (c + mean[None, :]))


@triton.jit
def _nearer(best, label, scores, clusters, K):
    """Take the lowest score [clusters, rows] of a tile where it is below the best; earlier clusters win ties.

    NaN is never below: the label stays one that exists.
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
    """Scores of a tile of centroids, the first of which is ``first``: stored to [parts, K, N], or compared."""
    scores = tl.sum(norms, axis=1)[:, None] - 2.0 * products
    clusters = tl.arange(0, scores.shape[0])
    if SPLIT:
        # 32 bits count the places within a tile.
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
    inverse,
    NARROW: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    CENTROID_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_0: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One program per (block of rows, part of F), against GROUP centroids at a time.

    SPLIT: scores over the part to score [parts, K, N], ||x - m||^2 over it to distance [parts, N]; else label [N] and
    squared distance [N]. WHOLE: all centroids are held at once and give their mean (inverse is 1 / K); else mean [F]
    is loaded. NARROW: points have fewer columns than centroids.
    """
    part = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = part * part_f
    last = tl.minimum(first + part_f, width)
    best = tl.full((BLOCK_N,), float("inf"), dtype=tl.float32)
    label = tl.zeros((BLOCK_N,), dtype=tl.int32)
    norm = tl.zeros((BLOCK_N, BLOCK_F // 4), dtype=tl.float32)
    # One group of a known size is no loop, across which values would have to be kept.
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
                K, F, inverse, WHOLE, CENTROID_TILES,
            )  # fmt: skip
            x = _load_points(points_ptr, stride_xn, stride_xf, rows, columns, N, width)
            x -= mean[None, :]
            norm += _fold(x * x)
            x = operand(x, DOT_TYPE, PRECISION)
            products_0, norms_0 = _add_product(products_0, norms_0, x, c_0, mean, DOT_TYPE, PRECISION)
            if CENTROID_TILES > 1:
                products_1, norms_1 = _add_product(products_1, norms_1, x, c_1, mean, DOT_TYPE, PRECISION)
            if CENTROID_TILES > 2:
                products_2, norms_2 = _add_product(products_2, norms_2, x, c_2, mean, DOT_TYPE, PRECISION)

        if NARROW:
            # Slices past the points' width hold centroids alone; the parts share them as they share the others.
            beyond = tl.cdiv(width, BLOCK_F) * BLOCK_F
            share = tl.cdiv(tl.cdiv(tl.maximum(F - beyond, 0), parts), BLOCK_F) * BLOCK_F
            beyond += part * share
            for start in range(beyond, tl.minimum(beyond + share, F), BLOCK_F):
                columns = start + tl.arange(0, BLOCK_F)
                c_0, c_1, c_2, mean = _load_centroids(
                    centroids_ptr, stride_ck, stride_cf, mean_ptr, clusters_0, clusters_1, clusters_2, columns,
                    K, F, inverse, WHOLE, CENTROID_TILES,
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
    """One program per block of rows: scores [parts, K, N] and norms [parts, N] summed over parts, then the minimum.

    In float64: the sum of what the parts say decides between two centroids.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    best = tl.full((BLOCK_N,), float("inf"), dtype=tl.float64)
    label = tl.zeros((BLOCK_N,), dtype=tl.int32)
    for first in range(0, K, BLOCK_K):
        clusters = first + tl.arange(0, BLOCK_K)
        inside = (clusters < K)[:, None] & (rows < N)[None, :]
        part_ptr = score_ptr + clusters.to(tl.int64)[:, None] * N + rows[None, :]
        scores = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float64)
        for _ in range(0, parts):
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

    Points of a tile are added to each other first, then to the sum so far.
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
    """Centroids of the tiles that a program holds at a time: all of them up to 384, without tensor cores up to 128."""
    most = 1 if ieee else _TILES
    if clusters > most * _CENTROIDS:
        return (_CENTROIDS,) * min(2, most)
    full = (clusters - 1) // _CENTROIDS
    least = _LAST if full else MIN_TILE
    return (_CENTROIDS,) * full + (max(least, next_power_of_2(clusters - full * _CENTROIDS)),)


def _rows_held(accumulators: int, blocks: tuple[int, ...]) -> int:
    """Rows, a power of two, whose products with the centroids held take that many accumulators at most."""
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
    """Configuration of the assignment; ``dtype`` is that of the dot, ``parts`` 1 keeps the minimum on chip.

    ``beyond``: centroids are wider than points, which takes a second loop, and its registers.
    """
    ieee = precision == "ieee" and dtype == torch.float32
    small = small_shared_memory(target)
    blocks = _tiles(clusters, ieee)
    # sm_80 keeps the operands of mma.sync in registers; without tensor cores they pass through them too.
    narrow = ieee or target.arch == 80 or (small and dtype == torch.float32)
    # 128 x 256 accumulators take half of a multiprocessor's registers, narrow slices leave room for a quarter more.
    # Where minima are taken, and the best of earlier groups of centroids kept, there is room for fewer.
    most = _rows_held(128 * (192 if target.arch == 80 and len(blocks) > 1 else 320), blocks)
    most_for_split = min(64 if ieee else 128 if beyond and target.arch == 100 else 256, most)
    most_for_minima = min(64 if ieee else 128, _rows_held(128 * 192, blocks))
    if ieee and target.arch == 80 and clusters > sum(blocks):
        most_for_minima = 32
    # Programs at a time: blocks without tensor cores are small enough for two on a multiprocessor.
    slots = target.multiprocessors * (2 if ieee else 1)

    def choice(block_n: int) -> tuple[bool, int, int, int]:
        """(whether half of the GPU idles, bytes that this choice adds, -rows of a block, parts)."""
        count = cdiv(rows, block_n)
        parts = max(1, min(slots // count, cdiv(width, 32 if narrow else 64)))
        added = count * clusters * width * dtype.itemsize + (8 * rows * clusters * parts if parts > 1 else 0)
        return 2 * count * parts < slots, added, -block_n, parts

    choices = [choice(MIN_TILE)]
    for block_n in (32, 64, 128, 256):
        found = choice(block_n)
        split = found[-1] > 1 and clusters <= sum(blocks)
        if block_n <= (most_for_split if split else most_for_minima) and block_n < 2 * rows:
            choices.append(found)
    _, _, negative, parts = min(choices)
    block_n = -negative
    several = len(blocks) > 1 or dtype == torch.float32
    narrow = narrow or (several and block_n * sum(blocks) > 192 * 128)
    num_warps = 8 if max(block_n, sum(blocks)) >= (64 if ieee else 128) else 4
    return AssignConfig(block_n, blocks, 16 if narrow else 32, parts, num_warps, 2 if small or ieee else 3)


def update_config(clusters: int, width: int, dtype: torch.dtype, target: Target) -> UpdateConfig:
    """Configuration of the update: a row of a tile takes each thread one load of 16 bytes."""
    num_warps = 4
    block_f = min(num_warps * target.warp_size * 16 // dtype.itemsize, max(MIN_TILE, next_power_of_2(width)))
    while block_f > 64 and clusters * cdiv(width, block_f) < target.multiprocessors:
        block_f //= 2
    return UpdateConfig(16, block_f, num_warps)


def _neighbours(config: AssignConfig) -> list[AssignConfig]:
    """The configuration and others with the same parts: what FSD_AUTOTUNE=1 times."""
    configs = [config]
    for block_f in (config.block_f // 2, config.block_f, config.block_f * 2):
        for num_warps in (4, 8):
            for num_stages in (2, 3, 4):
                other = config._replace(block_f=block_f, num_warps=num_warps, num_stages=num_stages)
                if block_f >= MIN_TILE and other != config:
                    configs.append(other)
    return configs


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
    dot, precision, target = dot_type(points.dtype, centroids.dtype), dot_precision(), target_of(device)
    default = assign_config(rows, clusters, max(1, width), dot, precision, target, width < features)
    # Parts begin where slices of every configuration do.
    part_f = cdiv(cdiv(max(1, width), default.parts), 2 * default.block_f) * 2 * default.block_f
    parts = cdiv(max(1, width), part_f)
    split = parts > 1
    group = sum(default.blocks)
    whole = clusters <= group
    mean = centroids if whole else centroids.mean(dim=0, dtype=torch.float32)
    score = torch.empty((parts, clusters, rows) if split else 0, dtype=torch.float32, device=device)
    norm = torch.empty((parts, rows), dtype=torch.float32, device=device) if split else squared_distance

    def launch(config: AssignConfig) -> None:
        blocks = (*config.blocks, MIN_TILE, MIN_TILE)
        meta: dict[str, Any] = {
            "NARROW": width < features, "SPLIT": split, "WHOLE": whole, "CENTROID_TILES": len(config.blocks),
            "GROUP": group, "DOT_TYPE": kernel_dot_type(dot), "PRECISION": precision, "BLOCK_N": config.block_n,
            "BLOCK_0": blocks[0], "BLOCK_1": blocks[1], "BLOCK_2": blocks[2], "BLOCK_F": config.block_f,
            "num_warps": config.num_warps, "num_stages": config.num_stages, **LAUNCH_OPTIONS,
        }  # fmt: skip
        _kmeans_assign_kernel[(cdiv(rows, config.block_n), parts)](
            points, centroids, mean, labels, norm, score, *points.stride(), *centroids.stride(),
            rows, clusters, width, features, part_f, parts, 1.0 / clusters, **meta,
        )  # fmt: skip

    with launch_guard(points):
        key = ("kmeans_assign", target, precision, points.dtype, centroids.dtype, width < features, default)
        launch(pick(key, _neighbours(default), launch))
        if split:
            _kmeans_nearest_kernel[(cdiv(rows, 32),)](
                score, norm, labels, squared_distance, rows, clusters, parts,
                BLOCK_N=32, BLOCK_K=64, num_warps=4, **LAUNCH_OPTIONS,
            )  # fmt: skip
    return labels, squared_distance


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid alone; its distance costs the kernel next to nothing."""
    return assign(points, centroids)[0]


def update_(sums: Tensor, counts: Tensor, points: Tensor, labels: Tensor) -> None:
    """Add every point to its cluster's row of ``sums`` and count it.

    Raises:
        TypeError: Points are not float16, bfloat16 or float32.
        RuntimeError: A label is out of range; on a GPU when the device reaches it, without waiting here.
    """
    triton_type("points", points.dtype)
    clusters = sums.shape[0]
    rows, width = points.shape
    ordered, order = labels.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(clusters + 1, device=labels.device))
    known = (bounds[0] == 0) & (bounds[-1] == rows)
    torch._assert_async(known, f"labels: expected values in [0, {clusters})")
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
