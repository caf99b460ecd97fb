"""``gram``: the one small matrix from which every between-sample structure is read.

    Z = [m_1 - mu_m, ..., m_K - mu_m, mu_m,  h_1 - mu_h, ..., h_B - mu_h, mu_h - mu_m],   Gamma = Z Z^T

Here m are the K rows of a memory, h the flattened features of B samples, and mu their means over rows. Without a
memory, Z = [h_1 - mu_h, ..., h_B - mu_h, mu_h].

A large offset common to all samples must not drown the differences between them: rows are centred before they are
rounded or multiplied. "eager" centres Gamma instead, in float64, if the offset is small. The rows of the means keep
what centring removes: every raw inner product, norm and distance is a sum of entries of Gamma. The last row is mu_h -
mu_m, and not mu_h, because distances then stay exact if features and memory share the offset. The diagonal blocks are
the centred Gram matrices of CKA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsd_kernels._backend import implementation, resolve_backend
from fsd_kernels._checks import check_features, check_flat_mask, check_same_device, flatten_features
from fsd_kernels._numerics import compute_dtype
from fsd_kernels._op import op, run_reference


class GramBasis(NamedTuple):
    """A constant memory and its own block of Gamma, which is computed once."""

    memory: Tensor
    """[K, F]."""
    gram: Tensor
    """[K + 1, K + 1], in the dtype that ``gram`` returns."""


def gamma_like(features: Tensor, memory: Tensor | None, backend: str) -> Tensor:
    """An empty tensor of Gamma's shape and dtype."""
    total = features.shape[0] + 1 + (0 if memory is None else memory.shape[0] + 1)
    dtype = torch.float64 if backend == "eager" else compute_dtype(features)
    return features.new_empty((total, total), dtype=dtype)


def gradients_like(
    features: Tensor, memory: Tensor | None, need_features: bool, need_memory: bool
) -> tuple[Tensor, Tensor]:
    """Empty tensors of the shapes and dtypes of d features and d memory, without elements if not needed."""
    d_features = torch.empty_like(features) if need_features else features.new_empty(0)
    d_memory = torch.empty_like(memory) if memory is not None and need_memory else features.new_empty(0)
    return d_features, d_memory


@op(
    "gram_backward",
    fake=lambda features, memory, _mask, _d_gram, need_features, need_memory, _backend: gradients_like(
        features, memory, need_features, need_memory
    ),
)
def _backward(
    features: Tensor,
    memory: Tensor | None,
    mask: Tensor | None,
    d_gram: Tensor,
    need_features: bool,
    need_memory: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    needs = need_features, need_memory
    return implementation("gram", backend).backward(features, memory, mask, d_gram[None], None, needs)


@op(
    "gram_forward", fake=lambda features, memory, _gram, _mask, backend: gamma_like(features, memory, backend)
)
def _forward(
    features: Tensor, memory: Tensor | None, memory_gram: Tensor | None, mask: Tensor | None, backend: str
) -> Tensor:
    (gamma,) = implementation("gram", backend).forward([(features, memory, memory_gram)], mask)
    return gamma


def _keep(inputs: Sequence[Any], outputs: Sequence[Tensor]) -> Sequence[Any]:
    features, memory, _, mask, backend = inputs
    return features, memory, mask, backend


def _gradients(kept: Sequence[Any], needs: Sequence[bool], d_gram: Tensor) -> Sequence[Tensor]:
    features, memory, mask, backend = kept
    return _backward(features, memory, mask, d_gram, *needs, backend)


_forward.differentiable(_keep, _gradients, leaves=2)


def gram(
    features: Tensor,
    memory: Tensor | GramBasis | None = None,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Gamma = Z Z^T of stacked memory and features, each centred and followed by a row for its mean.

    Args:
        features: [B, S, D] or [B, F], differentiable. [B, S, D] is flattened to F = S * D.
        memory: [K, F'], F' >= F, differentiable; narrower features count as padded with zeros. A ``GramBasis`` (see
            ``frozen_gram``) is a constant memory whose own block is copied instead of computed. None: no memory.
        mask: [B, S], 1 = keep; needs [B, S, D] features. Dropped positions count as zeros, whatever they hold.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        [N, N] with N = (K + 1) + (B + 1), or B + 1 without a memory. float32, or float64 for float64 features; "eager"
        always returns float64, because rounding to float32 would cost the losses digits.

    Raises:
        TypeError: An argument is not a floating tensor.
        ValueError: Shapes or devices do not fit.
        RuntimeError: ``backend="triton"`` where it cannot run.
    """
    flat = flatten_features("features", features)
    kept = check_flat_mask(mask, "features", features)
    rows, memory_gram = (None, None) if memory is None else check_memory("memory", memory, "features", flat)
    chosen = resolve_backend(backend, features.device, "gram")
    if chosen == "reference":
        return run_reference("gram", "forward", flat, rows, kept)
    return _forward(flat, rows, memory_gram, kept, chosen)


def check_memory(
    name: str, memory: Tensor | GramBasis, features_name: str, features: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Check a memory against features [B, F]; return its rows and its own block of Gamma, None if not computed."""
    memory_gram = memory.gram if isinstance(memory, GramBasis) else None
    rows = memory.memory.detach() if isinstance(memory, GramBasis) else memory
    check_features(name, rows, 2, "[K, F]")
    check_same_device([(features_name, features), (name, rows)])
    if rows.shape[0] < 1 or rows.shape[1] < features.shape[1]:
        raise ValueError(
            f"{name}: expected [K, F] with K >= 1 and F >= {features.shape[1]} like the features, "
            f"got {list(rows.shape)}"
        )
    if memory_gram is not None and memory_gram.shape != (rows.shape[0] + 1, rows.shape[0] + 1):
        raise ValueError(f"{name}.gram: expected [K + 1, K + 1], got {list(memory_gram.shape)}")
    return rows, memory_gram


def frozen_gram(memory: Tensor, *, backend: str | None = None) -> GramBasis:
    """Compute the block of Gamma that belongs to a constant memory [K, F], for reuse in every batch.

    Args:
        memory: [K, F] with K >= 1.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        The memory and its block, with the bits that ``gram`` gives the block beside any batch.

    Raises:
        TypeError: ``memory`` is not a floating tensor.
        ValueError: ``memory`` is not [K, F] with K >= 1.
        RuntimeError: ``backend="triton"`` where it cannot run.
    """
    check_features("memory", memory, 2, "[K, F]")
    if memory.shape[0] < 1:
        raise ValueError(f"memory: expected [K, F] with K >= 1, got {list(memory.shape)}")
    memory = memory.detach()
    # With an empty batch the block has the same bits as with any other batch.
    return GramBasis(memory, gram(memory[:0], memory, backend=backend)[:-1, :-1].contiguous())
