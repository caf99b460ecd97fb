"""The cost of every op as a function of its shapes: bytes of device memory, flops of matrix products, launches.

``minimum(op, shape)`` counts what the formulas need: every input read and every output written once per stage, small
matrices kept on chip, symmetry not used.

=========  ========================================  ============================================
op         forward                                   backward
=========  ========================================  ============================================
intra      X, Y read, G [B, S, S] written            Y, G read, dY written
           2 B S^2 (D_t + D_s)                       2 B S^2 D_s
local      h_T, h_S read                             h_S read, dh_S written
           2 B^2 (F_t + F_s)                         2 B^2 F_s
global     both memories and both features read      m_S, h_S read, dm_S, dh_S written
           2 (K^2 + B K) F_s + 2 B K F_t             2 (K^2 + 2 B K) F_s
inter      local and global in one pass over the features
fsd_ilg    intra and inter in one pass over the features
kmeans     assign: x, c read, 2 N K F                update: x, s read, s written, N F additions
=========  ========================================  ============================================

``eager`` gives the flops of the CPU path's matrix products. ``triton`` follows the kernels' launches for a named target
and counts the bytes that programs load and store, without caches. ``Device.seconds`` is the roofline: the larger of
bytes / bandwidth and flops / peak, stage by stage. Nothing here needs a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fsd_kernels._triton import Target
    from fsd_kernels.gram.plan import LaunchShape

OPS = ("intra", "local", "global", "inter", "fsd_ilg", "kmeans")
"""What is costed: losses and k-means, each made of one or more of the registered ops."""

_FLOAT32, _FLOAT64 = 4, 8


@dataclass(frozen=True)
class Cost:
    """The cost of one stage; costs add."""

    read: int
    """Bytes."""
    written: int
    """Bytes."""
    flops: int
    """A multiplication and an addition count as two."""
    launches: int = 1

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.read + other.read,
            self.written + other.written,
            self.flops + other.flops,
            self.launches + other.launches,
        )

    def __mul__(self, times: int) -> Cost:
        return Cost(self.read * times, self.written * times, self.flops * times, self.launches * times)


Stages = Mapping[str, Cost]


@dataclass(frozen=True)
class Shape:
    """The sizes and the dtype of an op's inputs.

    Raises:
        ValueError: A size is below 1.
        TypeError: The dtype is not a floating one.
    """

    batch: int = 32
    """B samples."""
    rows: int = 128
    """S tokens per sample."""
    width: int = 768
    """D_s, the student's hidden size."""
    teacher_width: int = 0
    """D_t, the teacher's hidden size; 0: as the student's."""
    centroids: int = 100
    """K, for global, inter, fsd_ilg and kmeans."""
    points: int = 4096
    """N, for kmeans, whose points have F = S D_s features."""
    pairs: int = 1
    """Layer pairs, for intra."""
    dtype: torch.dtype = torch.float32
    """Of features, memories and points on both sides."""

    def __post_init__(self) -> None:
        for name in ("batch", "rows", "width", "centroids", "points", "pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.teacher_width < 0:
            raise ValueError(f"teacher_width: expected at least 0, got {self.teacher_width}")
        if not self.dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating dtype, got {self.dtype}")

    @property
    def size(self) -> int:
        """Bytes of one feature."""
        return self.dtype.itemsize

    @property
    def student_features(self) -> int:
        """F_s = S D_s."""
        return self.rows * self.width

    @property
    def teacher_features(self) -> int:
        """F_t = S D_t."""
        return self.rows * (self.teacher_width or self.width)


def total(stages: Stages) -> Cost:
    """Add up the stages."""
    return sum(stages.values(), Cost(0, 0, 0, 0))


def _check_op(op: str) -> None:
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")


# ---------------------------------------------------------------------------------------------- minimum


def _intra_minimum(shape: Shape) -> dict[str, Cost]:
    items = shape.pairs * shape.batch
    student, teacher = shape.student_features * shape.size, shape.teacher_features * shape.size
    gram = shape.rows**2 * _FLOAT32
    squares = 2 * shape.rows
    return {
        "forward": Cost(
            items * (student + teacher),
            items * gram,
            items * squares * (shape.student_features + shape.teacher_features),
        ),
        "backward": Cost(items * (student + gram), items * student, items * squares * shape.student_features),
    }


def _inter_minimum(shape: Shape, local: bool, centroids: int) -> dict[str, Cost]:
    """L_L where ``local``, L_G where there are centroids, in one pass."""
    batch, student_features, teacher_features = shape.batch, shape.student_features, shape.teacher_features
    rows = (batch + centroids) * shape.size
    samples = batch**2 if local else 0
    cross = batch * centroids
    return {
        "forward": Cost(
            rows * (student_features + teacher_features),
            0,
            2 * student_features * (centroids**2 + cross + samples)
            + 2 * teacher_features * (cross + samples),
        ),
        "backward": Cost(
            rows * student_features,
            rows * student_features,
            2 * student_features * (centroids**2 + 2 * cross + samples),
        ),
    }


def _kmeans_minimum(shape: Shape) -> dict[str, Cost]:
    numbers = shape.points * shape.student_features
    centroids = shape.centroids * shape.student_features
    read = (numbers + centroids) * shape.size
    return {
        "assign": Cost(read, 12 * shape.points, 2 * numbers * shape.centroids),
        "update": Cost(numbers * shape.size + centroids * _FLOAT32, centroids * _FLOAT32, numbers),
    }


def minimum(op: str, shape: Shape) -> dict[str, Cost]:
    """The minimum that the op's formulas need, stage by stage.

    Args:
        op: "intra" (L_I), "local" (L_L), "global" (L_G), "inter" (L_L and L_G), "fsd_ilg" (all three) or "kmeans".
        shape: Sizes and dtype.

    Returns:
        "forward" and "backward", for kmeans "assign" and "update". The backward is that of the student's side.

    Raises:
        ValueError: The op is unknown.
    """
    _check_op(op)
    if op == "intra":
        return _intra_minimum(shape)
    if op == "kmeans":
        return _kmeans_minimum(shape)
    if op == "local":
        return _inter_minimum(shape, True, 0)
    stages = _inter_minimum(shape, op != "global", shape.centroids)
    if op != "fsd_ilg":
        return stages
    intra = _intra_minimum(replace(shape, pairs=1))
    gram = intra["forward"].written
    return {
        name: Cost(
            stage.read + (gram if name == "backward" else 0),
            stage.written + (gram if name == "forward" else 0),
            stage.flops + intra[name].flops,
        )
        for name, stage in stages.items()
    }


# ------------------------------------------------------------------------------------------------ eager


def eager(op: str, shape: Shape) -> dict[str, int]:
    """Flops of the CPU path's matrix products, stage by stage; the teacher memory's own block is given.

    Raises:
        ValueError: The op is unknown.
    """
    _check_op(op)
    stages = minimum(op, shape)
    if op == "kmeans":
        return {"assign": stages["assign"].flops}
    if op == "intra":
        from fsd_kernels.intra_cka.eager import strips

        entries = sum(strip.stop * (strip.stop - strip.start) for strip in strips(shape.rows))
        widths = shape.width + (shape.teacher_width or shape.width)
        # The Gram matrices, and the products of both with both.
        forward = shape.pairs * shape.batch * (2 * entries * widths + 2 * 4 * shape.rows**2)
        return {"forward": forward, "backward": stages["backward"].flops}
    from fsd_kernels.gram.eager import padded
    from fsd_kernels.gram.eager import strips as gram_strips

    def square(rows: int) -> int:
        """Entries of a block's product with itself."""
        return sum(strip.stop * (strip.stop - strip.start) for strip in gram_strips(rows))

    batch, centroids = shape.batch, 0 if op == "local" else shape.centroids
    batch_products, memory_products, weights = square(batch), 0, batch**2
    if centroids:
        # Per feature: the batch and its mean with the memory and itself, the memory with itself (without an offset).
        rows = padded(batch + 1)
        batch_products = rows * centroids + square(rows)
        memory_products = square(centroids)
        weights = (batch + centroids) ** 2
    flops = {
        "forward": 2 * (batch_products + memory_products) * shape.student_features
        + 2 * batch_products * shape.teacher_features,
        "backward": 2 * weights * shape.student_features,
    }
    if op == "fsd_ilg":
        intra = eager("intra", replace(shape, pairs=1))
        return {name: count + intra[name] for name, count in flops.items()}
    return flops


# ----------------------------------------------------------------------------------------------- triton


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _part(width: int, parts: int, block: int) -> int:
    """The width of one of ``parts`` parts of ``width``: a multiple of ``block``."""
    return _cdiv(_cdiv(width, parts), block) * block


def _triangle(size: int) -> int:
    return size * (size + 1) // 2


def _intra_triton(shape: Shape, target: Target, precision: str) -> dict[str, Cost]:
    from fsd_kernels.intra_cka.triton import backward_config, forward_config

    rows, size, wide = shape.rows, shape.size, shape.dtype == torch.float32
    items = shape.pairs * shape.batch
    width, widths = shape.width, shape.width + (shape.teacher_width or shape.width)
    config = forward_config(rows, shape.dtype, target)
    blocks = _cdiv(rows, config.block_s)
    square, gram, features = config.block_s**2, rows**2 * _FLOAT32, rows * widths * size
    # The rows whose mean is subtracted from float32 features.
    shift = min(4, rows) * _FLOAT32 if wide else 0
    # Products for one of float32, and for one of two terms of G with 16-bit features.
    products = 3 if wide and precision == "ieee" and target.backend == "cuda" else 1
    flops = items * 2 * square * widths * products
    losses = 2 * _FLOAT32
    if blocks == 1:
        stages = {"forward": Cost(items * (features + shift * widths), items * (gram + losses), flops)}
    else:
        tiles = _triangle(blocks)
        read = features * (blocks + 1) + tiles * shift * widths
        full, last = divmod(rows, 64)
        lower = (rows**2 + full * 64**2 + last**2) // 2
        # The norms, the losses and G each read the lower triangle of tiles and the means of its rows and columns.
        finish = 3 * (lower + rows * (_cdiv(rows, 64) + 1)) + 2 * rows + 1
        stages = {
            "tiles": Cost(items * read, 2 * items * (gram + _FLOAT32), flops * tiles),
            "means": Cost(2 * items * gram, 2 * items * rows * _FLOAT32, 0),
            "finish": Cost(2 * items * finish * _FLOAT32, items * (gram + losses), 0),
        }
    back = backward_config(rows, width, items, shape.dtype, target)
    student, derivatives = rows * width * size, 3 * _FLOAT32
    back_blocks = _cdiv(rows, back.block_s)
    flops = items * 2 * (back_blocks * back.block_s) ** 2 * width * (products if wide else 2)
    if back_blocks == 1:
        parts = _cdiv(width, _part(width, back.parts, back.block_d))
        read = student + shift * width + parts * (gram + derivatives)
    else:
        read = back_blocks * (student + shift * width)
        # G's rows are summed first.
        read += _cdiv(width, back.block_d) * (2 * gram + back_blocks * derivatives)
    stages["backward"] = Cost(items * read, items * student, flops)
    return stages


def _real_rows(first: int, last: int, centroids: int, batch: int) -> int:
    """The number of rows of a memory or of features among the stacked rows [first, last)."""
    head = centroids + 1 if centroids else 0
    memory = max(0, min(last, centroids) - first)
    features = max(0, min(last, head + batch) - max(first, head))
    return memory + features


def _three_products(precision: str, dtype: torch.dtype, target: Target) -> str:
    """The kernels' name for a precision: IEEE products are three tf32 products where there are tensor cores."""
    return (
        "tf32x3" if precision == "ieee" and dtype == torch.float32 and target.backend == "cuda" else precision
    )


def _gram_shape(shape: Shape, centroids: int, target: Target, precision: str) -> LaunchShape:
    from fsd_kernels.gram.plan import LaunchShape

    widths = (shape.student_features, shape.teacher_features)
    return LaunchShape(
        num_centroid=centroids,
        batch=shape.batch,
        widths=tuple((width if centroids else 0, width) for width in widths),
        tokens=0,
        dot=shape.dtype,
        precision=_three_products(precision, shape.dtype, target),
        given_side=1 if centroids else -1,
        target=target,
    )


def _gram_forward_triton(shape: Shape, centroids: int, target: Target, precision: str) -> dict[str, Cost]:
    """Forward of both sides' Gamma: parts, their sum, and its centring; the teacher's memory has its block."""
    from fsd_kernels.gram.plan import forward_plan, held_tiles, stored_entries

    launched = _gram_shape(shape, centroids, target, precision)
    config, plan = forward_plan(launched)
    batch, total, head, size = shape.batch, launched.total, launched.head, shape.size
    # Of float32 every program reads the rows of the shift too.
    shift = 0 if launched.raw else min(centroids, 8) + min(batch, 8)
    read = written = flops = 0
    for side, (width, parts) in enumerate(
        zip((launched.width(0), launched.width(1)), plan.parts, strict=True)
    ):
        given = side == launched.given_side
        if config.tiles:
            rows = centroids + batch + shift
            first = plan.constants["OTHER_FIRST"] if side else plan.constants["FIRST"]
            products = sum(2 * a * b for a, b in held_tiles(config, first))
        else:
            block = config.block
            bounds = [(i * block, (i + 1) * block) for i in range(_cdiv(total - launched.raw, block))]
            real = [_real_rows(start, stop, centroids, batch) for start, stop in bounds]
            first = plan.constants["OTHER_FIRST"] if side else plan.constants["FIRST"]
            active = [(i, j) for i in range(first, len(real)) for j in range(i + 1)]
            rows = sum(real[i] + real[j] + shift for i, j in active)
            products = 2 * block**2 * len(active)
        read += rows * width * size
        flops += products * width
        written += parts * stored_entries(launched, given) * _FLOAT32
    blocks = plan.blocks
    tiles = blocks * (blocks + 1) // 2
    work = total**2 + 2 * blocks * total + 5 * tiles
    edge = plan.centre_grid[0]
    centre = _FLOAT64 * (total**2 + 4 * edge * total * blocks + 5 * tiles * edge**2)
    of_block = _FLOAT32 * (head**2 + launched.raw * (2 * edge * centroids + edge**2)) if centroids else 0
    return {
        "gram": Cost(read, written, flops),
        "gram_sum": Cost(written, 2 * work * _FLOAT64, 0),
        "gram_centre": Cost(2 * centre + of_block, 2 * total**2 * _FLOAT32, 0),
    }


def _gram_backward_triton(shape: Shape, centroids: int, target: Target, precision: str) -> dict[str, Cost]:
    """Backward of the student's Gamma from the derivatives of four losses."""
    from fsd_kernels.gram.plan import backward_plan

    launched = _gram_shape(shape, centroids, target, precision)
    config, plan = backward_plan(launched, (True, centroids > 0))
    width, total, batch = launched.width(0), launched.total, shape.batch
    small, blocks = total**2 * _FLOAT32, plan.blocks
    padded, (programs,) = 16 * plan.sixteenths, plan.rows_grid
    terms = (1 + launched.raw) * padded**2 * shape.size
    sums = 2 * blocks * total * _FLOAT32
    scales = padded * _FLOAT32
    shift = 0 if launched.raw else min(centroids, 8) + min(batch, 8)
    gradients = (centroids + batch) * width * shape.size
    row_tiles, slices = plan.grid
    read = slices * (terms + scales) + row_tiles * (centroids + batch + shift) * width * shape.size
    if config.tiles:
        columns = (config.tiles - 1) * config.block + config.last
        products = 2 * columns**2
    else:
        products = 2 * row_tiles * config.block * _cdiv(total, config.inner) * config.inner
    return {
        "gram_symmetric": Cost(4 * (2 * small + blocks**2 * _FLOAT32), small + sums, 0),
        "gram_rows": Cost(small + (programs + 1) * sums, terms + scales, 0),
        "gram_backward": Cost(read, gradients, (1 + launched.raw) * products * width),
    }


def _inter_triton(shape: Shape, centroids: int, target: Target, precision: str) -> dict[str, Cost]:
    size = shape.batch + 1 + (centroids + 1 if centroids else 0)
    small = size**2 * _FLOAT32
    return {
        **_gram_forward_triton(shape, centroids, target, precision),
        # Both Gammas are read for energies, norms, distances and gradients. This gives their order of magnitude.
        "structure": Cost(6 * small, 4 * small, 0, launches=2),
        **_gram_backward_triton(shape, centroids, target, precision),
    }


def _kmeans_triton(shape: Shape, target: Target, precision: str) -> dict[str, Cost]:
    """One assignment and one update, no cluster empty, centroids in the points' dtype; torch sorts the labels."""
    from fsd_kernels.kmeans.triton import assign_config, update_config

    points, clusters, width = shape.points, shape.centroids, shape.student_features
    kernels_precision = _three_products(precision, shape.dtype, target)
    config = assign_config(points, clusters, width, shape.dtype, kernels_precision, target)
    part = _part(width, config.parts, 2 * config.block_f)
    parts, group = _cdiv(width, part), sum(config.blocks)
    groups, blocks = _cdiv(clusters, group), _cdiv(points, config.block_n)
    # Rows past the last one repeat it.
    read = blocks * (groups * config.block_n + clusters) * width * shape.size
    labels = 12 * points
    scores = parts * (clusters + 1) * points * _FLOAT32 if parts > 1 else 0
    # Every program reads its part of the shift, which torch computes from a few centroids.
    read += blocks * groups * width * _FLOAT32
    stages = {"shift": Cost(min(clusters, 16) * width * shape.size, width * _FLOAT32, 0)}
    flops = 2 * blocks * config.block_n * groups * group * width
    stages["assign"] = Cost(read, scores or labels, flops)
    if parts > 1:
        stages["nearest"] = Cost(scores, labels, 0)
    slices = _cdiv(width, update_config(clusters, width, shape.dtype, target).block_f)
    sums = clusters * width * _FLOAT32
    order = slices * (points + 2 * clusters) * 8
    stages["update"] = Cost(points * width * shape.size + sums + order, sums, points * width)
    return stages


def triton(op: str, shape: Shape, target: str = "sm_90", precision: str = "tf32") -> dict[str, Cost]:
    """The bytes and flops of the fused kernels on a target, launch by launch.

    The configurations are those that the launchers choose for the target. Flops include the padding of the last tile.

    Args:
        op: As for ``minimum``.
        shape: Sizes and dtype (float32, bfloat16 or float16).
        target: "sm_80", "sm_90", "sm_100" or "gfx942".
        precision: "tf32" or "ieee", for float32.

    Returns:
        The cost of every kernel by its role.

    Raises:
        ValueError: The op or the target is unknown.
        RuntimeError: Triton is not installed.
    """
    _check_op(op)
    try:
        from fsd_kernels._triton import TARGETS
    except ImportError as error:
        raise RuntimeError(
            f"the kernels' configurations need triton, which cannot be imported: {error}"
        ) from error
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    limits = TARGETS[target]
    if op == "kmeans":
        return _kmeans_triton(shape, limits, precision)
    stages: dict[str, Cost] = {}
    if op in ("intra", "fsd_ilg"):
        intra = _intra_triton(shape, limits, precision)
        stages |= {f"intra_{name}": cost for name, cost in intra.items()}
    if op != "intra":
        centroids = 0 if op == "local" else shape.centroids
        stages |= _inter_triton(shape, centroids, limits, precision)
    return stages


# ---------------------------------------------------------------------------------------------- devices


@dataclass(frozen=True)
class Device:
    """The bandwidth and the peak flops of a device, as its maker states them or as measured."""

    name: str
    bandwidth: float
    """Bytes per second to and from device memory."""
    matmul: Mapping[str, float] = field(default_factory=dict)
    """Flops per second of dense matrix products by "bf16", "tf32" or "fp32"."""
    target: str | None = None
    """The name of its Triton target."""

    def peak(self, dtype: torch.dtype, precision: str = "tf32") -> float:
        """Flops per second for a dtype; tf32 counts for float32 only where ``precision`` says so."""
        if dtype in (torch.bfloat16, torch.float16):
            names: tuple[str, ...] = ("bf16", "fp32")
        else:
            names = ("tf32", "fp32") if precision == "tf32" else ("fp32",)
        return next(self.matmul[name] for name in names if name in self.matmul)

    def memory_seconds(self, stages: Stages) -> float:
        """Time for the bytes alone."""
        return total(stages).bytes / self.bandwidth

    def matmul_seconds(self, stages: Stages, dtype: torch.dtype, precision: str = "tf32") -> float:
        """Time for the flops alone."""
        return total(stages).flops / self.peak(dtype, precision)

    def seconds(self, stages: Stages, dtype: torch.dtype, precision: str = "tf32") -> float:
        """Roofline time, a lower bound: the sum over stages of the larger of both times."""
        peak = self.peak(dtype, precision)
        return sum(max(stage.bytes / self.bandwidth, stage.flops / peak) for stage in stages.values())


DEVICES: Mapping[str, Device] = {
    "h100": Device("H100 SXM", 3.35e12, {"bf16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12}, "sm_90"),
    "a100": Device("A100 80GB SXM", 2.0e12, {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}, "sm_80"),
    "mi300x": Device("MI300X", 5.3e12, {"bf16": 1307.4e12, "tf32": 653.7e12, "fp32": 163.4e12}, "gfx942"),
}
"""Dense peaks as the makers state them."""
