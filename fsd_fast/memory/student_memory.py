"""The student's memory: K trainable centroids, which the deployed student does without."""

from __future__ import annotations

import torch
from torch import nn

from fsd_fast.memory.teacher_memory import TeacherMemory


class StudentMemory(nn.Module):
    """The student's memory: a parameter ``centroids`` ``[K, S*D]``, trained by the global inter-feature loss.

    Args:
        num_centroid: K.
        max_seq_length: S.
        hidden_size: D of the student.
        init: "normal" (the paper: independent numbers from N(0, ``std``^2)) or "teacher" (a copy of the
            teacher's centroids).
        teacher_memory: Needed for "teacher".
        std: Of "normal". 1 is the standard normal.
        generator: Of "normal", on the CPU; None: one seeded with 0.

    Raises:
        ValueError: An unknown ``init``; "teacher" without a memory or with one of another shape.
    """

    def __init__(
        self,
        num_centroid: int,
        max_seq_length: int,
        hidden_size: int,
        init: str = "normal",
        *,
        teacher_memory: TeacherMemory | None = None,
        std: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        shape = (num_centroid, max_seq_length * hidden_size)
        if init == "normal":
            generator = generator if generator is not None else torch.Generator().manual_seed(0)
            centroids = torch.randn(shape, generator=generator) * std
        elif init == "teacher":
            if teacher_memory is None:
                raise ValueError("teacher_memory: init = 'teacher' needs the teacher's memory, got None")
            if teacher_memory.centroids.shape != shape:
                raise ValueError(
                    f"teacher_memory: its centroids are {list(teacher_memory.centroids.shape)}; init = 'teacher' "
                    f"needs [K, S*D] = {list(shape)}, a student as wide as its teacher: use init = 'normal'"
                )
            centroids = teacher_memory.centroids.clone()
        else:
            raise ValueError(f"init: expected 'normal' or 'teacher', got {init!r}")
        self.centroids = nn.Parameter(centroids)
