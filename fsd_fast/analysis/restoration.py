"""How well a student restores the pairwise structure of its teacher [eq. 12, 13].

    restoration = mean over pairs of |psi_T(i, j) - psi_S(i, j)|

psi is the Euclidean distance or the cosine similarity of two hidden states of the penultimate layer. Pairs between
samples are those of each minibatch, a sample flattened to S*D numbers; pairs within samples are those of each sample's
tokens. Lower is better. A distance depends on width and scale, so it is also given after division by its mean on each
side ("relative").
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from fsd_fast.analysis.states import flat


def pairwise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distances and cosine similarities of all pairs i < j of rows.

    Args:
        rows: ``[n, F]``.

    Returns:
        Two float64 ``[n (n-1) / 2]``, in the same order; the cosine with a row of zeros is 0.
    """
    rows = rows.double()
    # Differences are taken before they are squared: equal rows have the distance 0 and not a rounding error.
    distances = torch.pdist(rows)
    unit = torch.nn.functional.normalize(rows, dim=1, eps=torch.finfo(torch.float64).tiny)
    first, second = torch.triu_indices(len(rows), len(rows), offset=1, device=rows.device)
    return distances, (unit @ unit.T)[first, second]


class Restoration:
    """Mean absolute differences of pairwise distances and cosines, added up batch by batch."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._pairs: dict[str, int] = defaultdict(int)
        self.between: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        """Of each batch the teacher's distances and cosines and the student's, float64 ``[pairs]``."""

    def add(self, teacher: Tensor, student: Tensor, keep: Tensor) -> None:
        """Add a batch.

        Args:
            teacher: Hidden states ``[B, S, D_t]``.
            student: Hidden states ``[B, S, D_s]``.
            keep: Bool ``[B, S]``: positions that count.
        """
        teacher, student, keep = teacher.cpu(), student.cpu(), keep.cpu()
        between = (*pairwise(flat(teacher, keep)), *pairwise(flat(student, keep)))
        self.between.append(between)
        self._add("between", *between)
        for sample in range(len(keep)):
            kept = keep[sample]
            self._add("within", *pairwise(teacher[sample, kept]), *pairwise(student[sample, kept]))

    def _add(
        self,
        where: str,
        teacher_distance: Tensor,
        teacher_cosine: Tensor,
        student_distance: Tensor,
        student_cosine: Tensor,
    ) -> None:
        pairs = len(teacher_distance)
        if not pairs:
            return
        tiny = torch.finfo(torch.float64).tiny
        relative = [each / each.mean().clamp(min=tiny) for each in (teacher_distance, student_distance)]
        for name, difference in (
            ("distance", teacher_distance - student_distance),
            ("relative_distance", relative[0] - relative[1]),
            ("cosine", teacher_cosine - student_cosine),
        ):
            self._sums[f"{where}_{name}"] += float(difference.abs().sum())
            self._pairs[f"{where}_{name}"] += pairs

    def figures(self) -> dict[str, float]:
        """Mean absolute differences: "between_distance", "within_cosine" and so on."""
        return {name: total / self._pairs[name] for name, total in self._sums.items()}
