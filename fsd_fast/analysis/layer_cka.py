"""Linear CKA between every layer of one model and every layer of another, summed up over minibatches.

Rows are samples, each flattened to S*D numbers, as in L_L. Within a batch of n samples HSIC is estimated without bias
(Song et al., 2012): with K~ and L~ the Gram matrices whose diagonals are set to 0,

    HSIC_1(K, L) = [tr(K~ L~) + (1'K~1)(1'L~1) / ((n-1)(n-2)) - 2 / (n-2) 1'K~L~1] / (n (n-3))

and CKA is the quotient of sums over batches (Nguyen, Raghu, Kornblith, 2021):

    CKA = sum HSIC_1(K, L) / sqrt(sum HSIC_1(K, K) * sum HSIC_1(L, L))

The biased estimator of the losses would be near 1 for any two models, because a batch has far fewer samples than
features. Two random models have about 0 here; the value may be slightly negative.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

MINIMUM_BATCH = 4
"""Samples without which HSIC_1 is not defined."""


def gram(features: Tensor) -> Tensor:
    """Gram matrix ``[n, n]`` of rows ``[n, F]``, float64. Their mean is taken out first: HSIC_1 does not see it."""
    centred = features.double() - features.double().mean(dim=0)
    return centred @ centred.T


def unbiased_hsic(first: Tensor, second: Tensor) -> Tensor:
    """HSIC_1 of every pair of Gram matrices.

    Args:
        first: ``[P, n, n]``, n >= 4.
        second: ``[Q, n, n]``.

    Returns:
        ``[P, Q]``, float64.

    Raises:
        ValueError: There are fewer than four rows.
    """
    n = first.shape[-1]
    if n < MINIMUM_BATCH:
        raise ValueError(f"first: expected Gram matrices of at least {MINIMUM_BATCH} rows, got {n}")
    eye = torch.eye(n, dtype=torch.bool, device=first.device)
    first, second = (each.double().masked_fill(eye, 0) for each in (first, second))
    traces = torch.einsum("pij,qij->pq", first, second)
    rows, other_rows = first.sum(dim=-1), second.sum(dim=-1)
    totals = rows.sum(dim=-1)[:, None] * other_rows.sum(dim=-1)[None, :]
    return (traces + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows @ other_rows.T)) / (n * (n - 3))


class LayerCKA:
    """CKA of all pairs of layers, added up batch by batch."""

    def __init__(self) -> None:
        self._cross: Tensor | None = None
        self._teacher: Tensor | None = None
        self._student: Tensor | None = None

    def add(self, teacher: Iterable[Tensor], student: Iterable[Tensor]) -> None:
        """Add a batch; one of fewer than four samples is left out.

        Args:
            teacher: Features ``[n, F_t]`` of each of the teacher's layers, taken one at a time.
            student: Features ``[n, F_s]`` of each of the student's layers.
        """
        grams = [torch.stack([gram(features) for features in layers]) for layers in (teacher, student)]
        if grams[0].shape[-1] < MINIMUM_BATCH:
            return
        cross = unbiased_hsic(grams[0], grams[1]).cpu()
        own = [torch.diagonal(unbiased_hsic(each, each)).cpu() for each in grams]
        self._cross = cross if self._cross is None else self._cross + cross
        self._teacher = own[0] if self._teacher is None else self._teacher + own[0]
        self._student = own[1] if self._student is None else self._student + own[1]

    def matrix(self) -> Tensor:
        """CKA ``[teacher layers, student layers]``, the embeddings first; 0 for a layer that is constant.

        Raises:
            ValueError: No batch had four samples.
        """
        if self._cross is None or self._teacher is None or self._student is None:
            raise ValueError(f"batches: expected one of at least {MINIMUM_BATCH} samples, got none")
        norms = (self._teacher.clamp(min=0)[:, None] * self._student.clamp(min=0)[None, :]).sqrt()
        return torch.where(norms > 0, self._cross / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0.0)


def matched_layers(teacher_layers: int, student_layers: int) -> list[tuple[int, int]]:
    """The diagonal of two models: (teacher layer, student layer), the student's spread evenly over the teacher's."""
    return [(round(layer * teacher_layers / student_layers), layer) for layer in range(student_layers + 1)]


def mean_diagonal(matrix: Tensor) -> float:
    """Mean CKA of matched layers, the embeddings among them.

    Args:
        matrix: ``[teacher layers + 1, student layers + 1]``.
    """
    pairs = matched_layers(matrix.shape[0] - 1, matrix.shape[1] - 1)
    return float(torch.stack([matrix[teacher, student] for teacher, student in pairs]).mean())
