"""How ``gram`` is launched: tile sizes, parts and constants of its kernels, as functions of shape, dtype and target."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fsd_kernels._triton import (
    MIN_TILE,
    Target,
    cdiv,
    kernel_dot_type,
    next_power_of_2,
    small_shared_memory,
)

# Maximum rows of Z' that one program of the fused kernels holds, in up to three tiles.
_FUSED_ROWS = 192
SUMMED = 16
"""Rows and columns of a tile in the sum over parts."""
SYMMETRIC = 32
"""Rows and columns of a tile of dGamma + dGamma^T."""
# Rows and columns of a tile that is centred.
_CENTRED = 32
# Maximum columns of a part of F under "highest": short sums lose little to rounding.
_CHAIN = 384
# Entries that a program of ``_gram_rows_kernel`` holds.
_HELD = 8192


class Config(NamedTuple):
    """Tile sizes and launch parameters of one kernel."""

    block: int
    """Rows of a tile."""
    last: int
    """Rows of the last tile of a program that holds all rows."""
    tiles: int
    """Tiles of a program that holds all rows; 0 if each program holds one tile of Gamma', or of the gradient."""
    inner: int
    """Backward by tiles: rows of Z' that are multiplied at a time."""
    block_f: int
    parts: int
    num_warps: int
    num_stages: int


def held_tiles(config: Config, skipped: int) -> list[tuple[int, int]]:
    """Sizes of the tiles of Gamma' that a program of the fused forward holds."""
    sizes = [config.block] * (config.tiles - 1) + [config.last]
    return [(sizes[i], sizes[j]) for i in range(skipped // config.block, config.tiles) for j in range(i + 1)]


def _tiles(rows: int) -> tuple[int, int, int]:
    """(rows of a tile, rows of the last tile, tiles) of a program that holds ``rows`` rows; 0 tiles: too many."""
    if rows > _FUSED_ROWS:
        return 128, 128, 0
    if rows > 128:
        return 128, max(MIN_TILE, next_power_of_2(rows - 128)), 2
    block = max(MIN_TILE, next_power_of_2(rows))
    return block, block, 1


def forward_config(
    rows: int,
    width: int,
    dtype: torch.dtype,
    precision: str,
    target: Target,
    skipped: int = 0,
    sides: int = 1,
) -> Config:
    """Configuration of the forward for that many rows of Z', at most ``width`` = F columns, in each of ``sides``.

    ``dtype`` is that of the dot; the block of the first ``skipped`` rows is given and not computed.
    """
    raw, small = dtype != torch.float32, small_shared_memory(target)
    block, last, tiles = _tiles(rows)
    block_f = 64 if raw and not small else 32
    num_warps = 8 if block >= 64 else 4
    # sm_80 has room for four slices of two tiles.
    num_stages = 2 if small else 3 if not raw else 4 if target.arch == 80 else 5
    programs = 1 if tiles else cdiv(rows, block) * (cdiv(rows, block) + 1) // 2
    # Every part writes its entries in float32, and they are read again: at most a fifth of the bytes of the inputs, a
    # tenth if a given block leaves few entries and so would allow many parts.
    affordable = rows * width * dtype.itemsize // ((10 if skipped else 5) * 2 * (rows**2 - skipped**2))
    parts = min(target.multiprocessors // (programs * sides), affordable)
    if precision in ("ieee", "tf32x3") and not raw:
        # A part is summed product by product, so short parts lose less.
        parts = max(parts, cdiv(width, _CHAIN))
    parts = max(1, min(parts, cdiv(width, block_f)))
    return Config(block, last, tiles, 0, block_f, parts, num_warps, num_stages)


def backward_config(rows: int, width: int, dtype: torch.dtype, precision: str, target: Target) -> Config:
    """Configuration of the backward; ``parts`` matters only if one program holds all rows."""
    raw, small = dtype != torch.float32, small_shared_memory(target)
    block, last, tiles = _tiles(rows)
    block_f, num_stages = 64 if raw else 32, 3 if raw and not small else 2
    # A, in two terms or one, and all stages of Z'.
    edge = last if tiles == 1 else block + last
    held = edge * (edge + num_stages * block_f) * 4 - raw * edge * num_stages * block_f * 2
    if not tiles or held > target.shared_memory - 8192 or (precision != "tf32" and not raw and rows > 64):
        large, three_products = raw and not small, precision == "tf32x3" and not raw
        if three_products:
            # Few warps, so that each takes a long slice of both operands through registers.
            return (
                Config(128, 128, 0, 32, 64, 1, 4, 2)
                if rows > _FUSED_ROWS
                else Config(64, 128, 0, 32, 32, 1, 4, 2)
            )
        return Config(128 if large else 64, 128, 0, 32, 128 if large else 64, 1, 8, num_stages + large)
    # Every part reads A, from the cache: at most a quarter of the bytes of rows and gradients.
    affordable = 2 * width * dtype.itemsize // (4 * 4 * rows)
    parts = max(1, min(target.multiprocessors, affordable, cdiv(width, block_f)))
    return Config(block, last, tiles, 0, block_f, parts, 8 if block >= 64 else 4, num_stages)


class LaunchShape(NamedTuple):
    """What the launches of sides with the same numbers of rows depend on."""

    num_centroid: int
    batch: int
    widths: tuple[tuple[int, int], ...]
    """Of memory and features, per side; 0 for no memory."""
    tokens: int
    """S; 0 without a mask."""
    dot: torch.dtype
    precision: str
    given_side: int
    """The side whose memory's block is given; -1: none."""
    target: Target

    @property
    def head(self) -> int:
        """The rows of the memory and its shift."""
        return self.num_centroid + 1 if self.num_centroid else 0

    @property
    def total(self) -> int:
        """N."""
        return self.head + self.batch + 1

    @property
    def raw(self) -> bool:
        """True if rows are multiplied as they are. The last row of Z' is then 0 and not multiplied."""
        return self.dot != torch.float32

    def width(self, side: int) -> int:
        """The columns of Z'."""
        return max(self.widths[side])

    def token(self, side: int) -> int:
        """Columns of a token; 1 without a mask."""
        return self.widths[side][1] // self.tokens if self.tokens else 1

    def constants(self, config: Config) -> dict[str, Any]:
        """Compile-time arguments of the kernels that read the stacked rows."""
        block, tiles = config.block, config.tiles
        return {
            "HAS_MASK": self.tokens > 0,
            "ONE_TOKEN": all(self.token(side) % config.block_f == 0 for side in range(len(self.widths))),
            "HAS_MEMORY": self.num_centroid > 0,
            "TILES": tiles,
            "MEMORY_TILES": min(tiles, cdiv(self.num_centroid, block)),
            "FIRST_FEATURES": max(0, min(tiles - 1, self.head // block)),
            "RAW": self.raw,
            "DOT_TYPE": kernel_dot_type(self.dot),
            "PRECISION": self.precision,
            "BLOCK": block,
            "LAST": config.last,
            "BLOCK_F": config.block_f,
        }


def stored_entries(shape: LaunchShape, given: bool) -> int:
    """The entries of Gamma' that a part holds; ``given``: without the memory's own block."""
    limit, head, tile = shape.total - shape.raw, shape.head, SUMMED
    entries = sum(min(limit, (row // tile + 1) * tile) for row in range(limit))
    if given and shape.raw:
        entries -= sum(min(head, (row // tile + 1) * tile) for row in range(head))
    return entries


class ForwardPlan(NamedTuple):
    """What the launches of a forward need, for a configuration."""

    constants: dict[str, Any]
    grid: tuple[int, int]
    part_f: tuple[int, ...]
    """Columns of a part, of each side."""
    parts: tuple[int, ...]
    blocks: int
    """Tiles along an edge of Gamma' in the sum over parts."""
    work: int
    """Numbers that the sum leaves to the centring."""
    sum_grid: tuple[int, int]
    sum_constants: dict[str, Any]
    sum_warps: int
    centre_grid: tuple[int, int, int]
    centre_constants: dict[str, Any]


@functools.lru_cache(maxsize=512)
def forward_plan(shape: LaunchShape, config: Config | None = None) -> tuple[Config, ForwardPlan]:
    """``config``, or the heuristic's, and what the launches of a forward need with it."""
    sides = range(len(shape.widths))
    skipped = shape.head if shape.raw and shape.given_side >= 0 else 0
    width = max(shape.width(side) for side in sides)
    rows = shape.total - shape.raw
    default = forward_config(rows, width, shape.dot, shape.precision, shape.target, skipped, len(sides))
    config = config or default
    # Parts begin where slices of every configuration do, and where tokens do if a slice is within one.
    step = 2 * default.block_f
    part_f = tuple(max(step, cdiv(cdiv(shape.width(side), default.parts), step) * step) for side in sides)
    parts = tuple(max(1, cdiv(shape.width(side), part_f[side])) for side in sides)
    tiles_of_rows = cdiv(rows, config.block)
    first = shape.head // config.block if shape.raw else 0
    constants = {
        "BOTH": len(sides) == 2,
        "GIVEN": shape.raw and shape.given_side == 0,
        "OTHER_GIVEN": shape.raw and shape.given_side == 1,
        "FIRST": first if shape.given_side == 0 else 0,
        "OTHER_FIRST": first if shape.given_side == 1 else 0,
        **shape.constants(config),
    }
    programs = 1 if config.tiles else tiles_of_rows * (tiles_of_rows + 1) // 2
    blocks, edge = cdiv(shape.total, SUMMED), cdiv(shape.total, _CENTRED)
    tiles = blocks * (blocks + 1) // 2
    meta = {"GIVEN_SIDE": shape.given_side, "RAW": shape.raw}
    # Few parts go with many tiles, whose programs then run side by side.
    warps = 1 if max(parts) <= 16 else 4 if max(parts) <= 128 else 8
    return config, ForwardPlan(
        constants,
        (programs, sum(parts)),
        part_f,
        parts,
        blocks,
        len(sides) * (shape.total * (shape.total + 2 * blocks) + 5 * tiles),
        (tiles, len(sides)),
        {**meta, "PARTS": max(8, 4 * warps)},
        warps,
        (edge, edge, len(sides)),
        {**meta, "BLOCKS": next_power_of_2(blocks), "TOTALS": next_power_of_2(tiles), "BLOCK": _CENTRED},
    )


class BackwardPlan(NamedTuple):
    """What the launches of a backward need, for a configuration."""

    constants: dict[str, Any]
    grid: tuple[int, int]
    part_f: int
    blocks: int
    """Tiles along an edge of dGamma + dGamma^T."""
    sixteenths: int
    """Rows of the terms of A, divided by 16."""
    rows_grid: tuple[int]
    rows_constants: dict[str, Any]


@functools.lru_cache(maxsize=512)
def backward_plan(
    shape: LaunchShape, needs: tuple[bool, bool], config: Config | None = None
) -> tuple[Config, BackwardPlan]:
    """``config``, or the heuristic's, and what the launches of a backward need with it."""
    rows, width = shape.total - shape.raw, shape.width(0)
    config = config or backward_config(rows, width, shape.dot, shape.precision, shape.target)
    part_f = config.block_f
    if config.tiles:
        part_f *= cdiv(cdiv(width, config.parts), config.block_f)
    constants = {
        "NEED_FEATURES": needs[0],
        "NEED_MEMORY": needs[1],
        "TERMS": 1 + shape.raw,
        "INNER": config.inner,
        **shape.constants(config),
    }
    row_tiles = 1 if config.tiles else cdiv(rows, config.block)
    blocks, sixteenths = cdiv(shape.total, SYMMETRIC), cdiv(shape.total, 16)
    whole = next_power_of_2(16 * sixteenths)
    held = max(1, min(MIN_TILE, _HELD // whole))
    return config, BackwardPlan(
        constants,
        (row_tiles, cdiv(width, part_f)),
        part_f,
        blocks,
        sixteenths,
        (cdiv(16 * sixteenths, held),),
        {"TERMS": 1 + shape.raw, "BLOCK": held, "ALL": whole, "BLOCKS": next_power_of_2(blocks)},
    )
