"""Inputs of the benchmarks: features shaped like BERT's, with a student that partly follows its teacher.

    t = z + o,    s = (z + e) / sqrt(2) + o'        z, e standard normal; o, o' constant over samples and tokens

The timed inputs have o = 0: a formulation must then agree with the truth whatever its rounding. With ``outliers`` a
few dimensions of o are 20 to 50 times the standard deviation, as in BERT's hidden states: what a formulation loses
to rounding there is measured too and printed next to its time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_OUTLIERS = 3


class Sizes(NamedTuple):
    """The sizes of a case; those that an op does not use are ignored."""

    batch: int = 32
    rows: int = 128
    width: int = 768
    centroids: int = 100
    points: int = 1024

    def label(self, names: tuple[str, ...]) -> str:
        """Write the named sizes in the paper's letters, e.g. "B=32 S=128 D=768"."""
        letters = {"batch": "B", "rows": "S", "width": "D", "centroids": "K", "points": "N"}
        return " ".join(f"{letters[name]}={getattr(self, name)}" for name in names)


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
    """Student and teacher of ``shape``, whose last axis holds tokens as wide as the offsets."""
    shared = torch.randn(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    own, given = (offset.repeat(shape[-1] // len(offset)) for offset in offsets)
    return noise.add_(shared).mul_(0.5**0.5).add_(own), shared + given


def _offsets(sizes: Sizes, seed: int, outliers: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    own, given = (_offset(sizes.width, outliers, generator) for _ in range(2))
    return own, given


def features(sizes: Sizes, seed: int, outliers: bool = False) -> Inputs:
    """``student`` and ``teacher``, [B, S, D]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sizes.batch, sizes.rows, sizes.width)
    student, teacher = _pair(shape, _offsets(sizes, seed, outliers), generator)
    return {"student": student, "teacher": teacher}


def with_memories(sizes: Sizes, seed: int, outliers: bool = False) -> Inputs:
    """Features and ``student_memory`` and ``teacher_memory``, [K, S * D].

    The teacher's centroids carry the offset of the features that they are the means of; the student memory is
    standard normal, as it starts.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (sizes.centroids, sizes.rows * sizes.width)
    _, given = _offsets(sizes, seed, outliers)
    student, teacher = _pair(shape, (torch.zeros_like(given), given), generator)
    return {**features(sizes, seed, outliers), "student_memory": student, "teacher_memory": teacher}


def points(sizes: Sizes, seed: int, outliers: bool = False) -> Inputs:
    """``points`` [N, F] around K centres, and ``centroids`` [K, F] drawn from them.

    The draw is that of ``torch.randperm`` seeded with 0, because one peer starts there and nowhere else.
    """
    generator = torch.Generator().manual_seed(seed)
    width = sizes.rows * sizes.width
    centres = torch.randn(sizes.centroids, width, generator=generator)
    centres += _offset(sizes.width, outliers, generator).repeat(sizes.rows)
    member = torch.randint(sizes.centroids, (sizes.points,), generator=generator)
    drawn = torch.randn(sizes.points, width, generator=generator).add_(centres[member])
    start = torch.randperm(sizes.points, generator=torch.Generator().manual_seed(0))[: sizes.centroids]
    return {"points": drawn, "centroids": drawn[start].clone()}
