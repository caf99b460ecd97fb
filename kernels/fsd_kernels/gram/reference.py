"""The Gram matrix of stacked rows and their means, written as the formula reads; any dtype.

    Z = [m_1 - mu_m, ..., m_K - mu_m, mu_m,  h_1 - mu_h, ..., h_B - mu_h, mu_h - mu_m]
    Gamma = Z Z^T

with m the memory's rows, h the features' rows, mu their means over rows. Without a memory,
Z = [h_1 - mu_h, ..., h_B - mu_h, mu_h]. Gradients come from autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor


def centred_block(rows: Tensor) -> Tensor:
    """[n, F] -> [n + 1, F]: the rows less their mean, then the mean (0 of no rows)."""
    if rows.shape[0] == 0:
        return rows.new_zeros((1, rows.shape[1]))
    mean = rows.mean(dim=0, keepdim=True)
    return torch.cat([rows - mean, mean])


def forward(features: Tensor, memory: Tensor | None, mask: Tensor | None) -> Tensor:
    """Gamma of features [B, F] and memory [K, F'] or None; features narrower than the memory end in zeros."""
    if mask is not None:
        kept = mask.repeat_interleave(features.shape[1] // mask.shape[1], dim=1)
        features = features.masked_fill(~kept, 0.0)
    if memory is None:
        stacked = centred_block(features)
    else:
        features = torch.nn.functional.pad(features, (0, memory.shape[1] - features.shape[1]))
        first, second = centred_block(memory.to(features.dtype)), centred_block(features)
        stacked = torch.cat([first, second[:-1], second[-1:] - first[-1:]])
    return stacked @ stacked.T
