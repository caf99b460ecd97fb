"""Inputs shared by the tests of the ops and of the losses: features shaped like BERT's, memories, ragged masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def outlier_mean(width: int, outliers: int = 3) -> Tensor:
    """The mean of BERT-shaped features: 20 to 50 (of either sign) in a few dims, fixed by the width, else 0."""
    generator = torch.Generator().manual_seed(width)
    dims = torch.randperm(width, generator=generator)[: min(outliers, width)]
    size = 20 + 30 * torch.rand(len(dims), generator=generator, dtype=torch.float64)
    sign = 1 - 2 * torch.randint(2, (len(dims),), generator=generator, dtype=torch.float64)
    mean = torch.zeros(width, dtype=torch.float64)
    mean[dims] = size * sign
    return mean


def bert_features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Features ``[..., D]`` of standard deviation 1 whose mean, in a few dims, is 20 to 50 times that."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (noise + outlier_mean(shape[-1])).to(dtype)


def centroids(count: int, rows: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A memory ``[K, S * D]`` near BERT-shaped features of the same width."""
    return bert_features(count, rows, width, seed=seed + 1000, dtype=dtype).flatten(1)


def ragged_mask(batch: int, rows: int, seed: int = 0, lengths: Sequence[int] | None = None) -> Tensor:
    """An attention mask ``[B, S]`` (int64, 1 = keep) of samples of 1 to S tokens, padded on the right."""
    if lengths is None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, rows + 1, (batch,), generator=generator).tolist()
    return (torch.arange(rows)[None] < torch.tensor(lengths).reshape(-1, 1)).long()


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in the Euclidean norm; the absolute error where the truth is 0."""
    value, truth = value.detach().double(), truth.detach().double()
    error, size = torch.linalg.vector_norm(value - truth), torch.linalg.vector_norm(truth)
    return float(error / size) if size > 0 else float(error)
