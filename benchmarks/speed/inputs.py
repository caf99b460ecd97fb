"""Inputs of the benchmarks: features shaped like BERT's, with a student that partly follows its teacher.

    t = z + o,    s = (z + e) / sqrt(2) + o'        z, e standard normal; o, o' constant over samples and tokens

The timed inputs have o = o' = 0: every correct formulation then agrees with the reference, whatever it rounds. With
``outliers`` a few dimensions of o are 20 to 50 times the standard deviation, as in BERT's hidden states. The errors on
such features are measured too and printed beside the times.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_OUTLIERS = 3

LETTERS = {"batch": "B", "rows": "S", "width": "D", "centroids": "K", "points": "N"}
"""The paper's letter of each size."""


class Sizes(NamedTuple):
    """The sizes of a case. An op ignores those that it does not use."""

    batch: int = 32
    rows: int = 128
    width: int = 768
    centroids: int = 100
    points: int = 1024

    def label(self, size_names: tuple[str, ...]) -> str:
        """Write the named sizes in the paper's letters, e.g. "B=32 S=128 D=768"."""
        return " ".join(f"{LETTERS[name]}={getattr(self, name)}" for name in size_names)


Inputs = dict[str, Tensor]


def _offset(width: int, outliers: bool, generator: torch.Generator) -> Tensor:
    offset = torch.zeros(width)
    if not outliers:
        return offset
    dims = torch.randperm(width, generator=generator)[:_OUTLIERS]
    sign = 1 - 2 * torch.randint(2, (len(dims),), generator=generator)
    offset[dims] = sign * (20 + 30 * torch.rand(len(dims), generator=generator))
    return offset


def _pair(
    shape: tuple[int, ...], offsets: tuple[Tensor, Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Student and teacher of ``shape``; the last axis holds one or more tokens as wide as the offsets."""
    shared = torch.randn(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    student_offset, teacher_offset = (offset.repeat(shape[-1] // len(offset)) for offset in offsets)
    return noise.add_(shared).mul_(0.5**0.5).add_(student_offset), shared + teacher_offset


def _offsets(sizes: Sizes, seed: int, outliers: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student_offset, teacher_offset = (_offset(sizes.width, outliers, generator) for _ in range(2))
    return student_offset, teacher_offset


def features(sizes: Sizes, seed: int, outliers: bool = False) -> Inputs:
    """``student`` and ``teacher``, [B, S, D] float32."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sizes.batch, sizes.rows, sizes.width)
    student, teacher = _pair(shape, _offsets(sizes, seed, outliers), generator)
    return {"student": student, "teacher": teacher}


def with_memories(sizes: Sizes, seed: int, outliers: bool = False) -> Inputs:
    """Features, ``student_memory`` and ``teacher_memory`` [K, S * D] float32.

    The teacher's centroids have the offset of its features, since they are means of features. The student memory is
    standard normal, as at the start of training.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (sizes.centroids, sizes.rows * sizes.width)
    _, teacher_offset = _offsets(sizes, seed, outliers)
    student, teacher = _pair(shape, (torch.zeros_like(teacher_offset), teacher_offset), generator)
    return {**features(sizes, seed, outliers), "student_memory": student, "teacher_memory": teacher}


def points(sizes: Sizes, seed: int, outliers: bool = False) -> Inputs:
    """``points`` [N, F] around K centres, and ``centroids`` [K, F] drawn from the points.

    The draw is the one of ``torch.randperm`` seeded with 0: one peer always starts from those points.
    """
    generator = torch.Generator().manual_seed(seed)
    width = sizes.rows * sizes.width
    centres = torch.randn(sizes.centroids, width, generator=generator)
    centres += _offset(sizes.width, outliers, generator).repeat(sizes.rows)
    member = torch.randint(sizes.centroids, (sizes.points,), generator=generator)
    drawn = torch.randn(sizes.points, width, generator=generator).add_(centres[member])
    start = torch.randperm(sizes.points, generator=torch.Generator().manual_seed(0))[: sizes.centroids]
    return {"points": drawn, "centroids": drawn[start].clone()}
