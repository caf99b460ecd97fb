"""Every op that is measured, by name.

An op names its truth (the reference, run in float64), its minimal cost (``fsd_kernels.cost``) and its providers.
"""

from __future__ import annotations

from benchmarks.speed.kmeans import kmeans_op
from benchmarks.speed.losses import loss_ops
from benchmarks.speed.ops import Op
from benchmarks.speed.step import step_op

OPS: dict[str, Op] = {op.name: op for op in (*loss_ops(), kmeans_op(), step_op())}
