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

OPS = ("intra", "local", "global", "inter", "fsd_ilg", "kmeans")
"""What is costed: losses and k-means, each made of one or more of the registered ops."""

_FLOAT32 = 4


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


def _gram_means(rows: int, width: int, size: int) -> dict[str, Cost]:
    """The launch that computes the means for programs of one tile, none of which reads every row."""
    return {"gram_means": Cost(rows * width * size, 2 * width * _FLOAT32, 0)}


def _gram_triton(
    shape: Shape, width: int, centroids: int, has_memory_gram: bool, target: Target, precision: str
) -> dict[str, Cost]:
    """Forward of one side's Gamma: partial Grams, then their sum."""
    from fsd_kernels.gram.triton import forward_config, held_tiles

    head = centroids + 1 if centroids else 0
    size = head + shape.batch + 1
    config = forward_config(size, width, shape.dtype, precision, target, head if has_memory_gram else 0)
    part = _part(width, config.parts, 2 * config.block_f)
    parts = _cdiv(width, part)
    lower = _triangle(size) - (_triangle(head) if has_memory_gram else 0)
    rows = centroids + shape.batch
    means: dict[str, Cost] = {}
    if config.tiles:
        read = rows * width * shape.size
        flops = sum(2 * a * b for a, b in held_tiles(config, head if has_memory_gram else 0)) * width
    else:
        block = config.block
        bounds = [(i * block, (i + 1) * block) for i in range(_cdiv(size, block))]
        real = [_real_rows(first, last, centroids, shape.batch) for first, last in bounds]
        active = [
            (i, j)
            for i in range(len(real))
            for j in range(i + 1)
            if not (has_memory_gram and bounds[i][1] <= head)
        ]
        # Programs of one tile read the means too.
        read = sum((real[i] + real[j]) * shape.size + 2 * _FLOAT32 for i, j in active) * width
        means = _gram_means(rows, width, shape.size)
        flops = 2 * block**2 * len(active) * width
    memory_gram = _triangle(head) * _FLOAT32 if has_memory_gram else 0
    return {
        **means,
        "gram": Cost(read, parts * lower * _FLOAT32, flops),
        "gram_sum": Cost(parts * lower * _FLOAT32 + memory_gram, size**2 * _FLOAT32, 0),
    }


def _gram_backward_triton(shape: Shape, centroids: int, target: Target, precision: str) -> dict[str, Cost]:
    from fsd_kernels.gram.triton import backward_config, small_block

    width = shape.student_features
    size = shape.batch + 1 + (centroids + 1 if centroids else 0)
    config = backward_config(
        total=size, width=width, masked=False, dtype=shape.dtype, precision=precision, target=target
    )
    # A is stored in bfloat16 if it is multiplied in that; float16 would not hold its range.
    small = size**2 * _FLOAT32
    weights = size**2 * (shape.size if shape.dtype == torch.bfloat16 else _FLOAT32)
    rows = (centroids + shape.batch) * width * shape.size
    tiles = _cdiv(size, small_block(size))
    stages = {"gram_rows": Cost(2 * small * (tiles + 1), weights, 0)}
    if config.tiles:
        part = _part(width, config.parts, config.block_f)
        panels = _cdiv(config.tiles, config.panel)
        columns = (config.tiles - 1) * config.block + config.last
        computed_rows = columns if panels == 1 else panels * config.panel * config.block
        read = panels * rows + _cdiv(width, part) * weights
        stages["gram_backward"] = Cost(read, rows, 2 * computed_rows * columns * width)
    else:
        blocks, inner = _cdiv(size, config.block), _cdiv(size, config.inner) * config.inner
        read = blocks * (rows + 2 * width * _FLOAT32) + _cdiv(width, config.block_f) * weights
        means = _gram_means(centroids + shape.batch, width, shape.size)
        stages |= {f"{name}_backward": cost for name, cost in means.items()}
        stages["gram_backward"] = Cost(read, rows, 2 * blocks * config.block * inner * width)
    return stages


def _inter_triton(shape: Shape, centroids: int, target: Target, precision: str) -> dict[str, Cost]:
    size = shape.batch + 1 + (centroids + 1 if centroids else 0)
    small = size**2 * _FLOAT32
    teacher = _gram_triton(shape, shape.teacher_features, centroids, centroids > 0, target, precision)
    student = _gram_triton(shape, shape.student_features, centroids, False, target, precision)
    return {
        **{f"teacher_{name}": cost for name, cost in teacher.items()},
        **{f"student_{name}": cost for name, cost in student.items()},
        # Both Gammas are read for energies, norms, distances and gradients. This gives their order of magnitude.
        "structure": Cost(6 * small, 4 * small, 0, launches=2),
        "structure_backward": Cost(4 * small, small, 0),
        **_gram_backward_triton(shape, centroids, target, precision),
    }


def _kmeans_triton(shape: Shape, target: Target, precision: str) -> dict[str, Cost]:
    """One assignment and one update, no cluster empty, centroids in the points' dtype; torch sorts the labels."""
    from fsd_kernels.kmeans.triton import assign_config, update_config

    points, clusters, width = shape.points, shape.centroids, shape.student_features
    config = assign_config(points, clusters, width, shape.dtype, precision, target)
    part = _part(width, config.parts, 2 * config.block_f)
    parts, group = _cdiv(width, part), sum(config.blocks)
    groups, blocks = _cdiv(clusters, group), _cdiv(points, config.block_n)
    # Rows past the last one repeat it.
    read = blocks * (groups * config.block_n + clusters) * width * shape.size
    labels = 12 * points
    scores = parts * (clusters + 1) * points * _FLOAT32 if parts > 1 else 0
    stages: dict[str, Cost] = {}
    if groups > 1:
        read += blocks * groups * width * _FLOAT32
        stages["mean"] = Cost(clusters * width * shape.size, width * _FLOAT32, 0)
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
