"""``gram``: the one small matrix from which every between-sample structure is read.

    Z = [m_1 - mu_m, ..., m_K - mu_m, mu_m,  h_1 - mu_h, ..., h_B - mu_h, mu_h - mu_m],   Gamma = Z Z^T

with m the K rows of a memory, h the flattened features of B samples and mu their means over rows; without a
memory Z = [h_1 - mu_h, ..., h_B - mu_h, mu_h]. Rows are centred before they are rounded or multiplied, so a large
offset common to all samples does not drown the differences between them; the mean rows keep what centring
removes, so every raw inner product, norm and distance is still a sum of entries of Gamma. That the last row is the
difference of the means, and not mu_h, keeps distances exact where features and memory share the offset. The
diagonal blocks are the centred Gram matrices of CKA.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsd_kernels._backend import implementation, resolve_backend, without_autocast
from fsd_kernels._checks import check_features, check_mask, check_same_device
from fsd_kernels._numerics import compute_dtype
from fsd_kernels._saved import save, saved


class GramBasis(NamedTuple):
    """A constant memory together with its own block of Gamma, which then is never computed again."""

    memory: Tensor
    """[K, F]."""
    gram: Tensor
    """[K + 1, K + 1], in the dtype that ``gram`` returns."""


@torch.library.custom_op("fsd_kernels::gram_forward", mutates_args=())
def _forward(
    features: Tensor, memory: Tensor | None, memory_gram: Tensor | None, mask: Tensor | None, backend: str
) -> Tensor:
    with without_autocast(features.device):
        return implementation("gram", backend).forward(features, memory, memory_gram, mask)


@_forward.register_fake
def _(
    features: Tensor, memory: Tensor | None, memory_gram: Tensor | None, mask: Tensor | None, backend: str
) -> Tensor:
    return fake_gamma(features, memory, backend)


def fake_gamma(features: Tensor, memory: Tensor | None, backend: str) -> Tensor:
    """A tensor of Gamma's shape and dtype."""
    total = features.shape[0] + 1 + (0 if memory is None else memory.shape[0] + 1)
    dtype = torch.float64 if backend == "eager" else compute_dtype(features)
    return features.new_empty((total, total), dtype=dtype)


@torch.library.custom_op("fsd_kernels::gram_backward", mutates_args=())
def _backward(
    features: Tensor,
    memory: Tensor | None,
    mask: Tensor | None,
    d_gram: Tensor,
    need_features: bool,
    need_memory: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with without_autocast(features.device):
        return implementation("gram", backend).backward(
            features, memory, mask, d_gram, (need_features, need_memory)
        )


@_backward.register_fake
def _(
    features: Tensor,
    memory: Tensor | None,
    mask: Tensor | None,
    d_gram: Tensor,
    need_features: bool,
    need_memory: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return fake_gradients(features, memory, need_features, need_memory)


def fake_gradients(
    features: Tensor, memory: Tensor | None, need_features: bool, need_memory: bool
) -> tuple[Tensor, Tensor]:
    """Tensors of the shapes and dtypes of d features and d memory; empty where not needed."""
    d_features = torch.empty_like(features) if need_features else features.new_empty(0)
    d_memory = torch.empty_like(memory) if memory is not None and need_memory else features.new_empty(0)
    return d_features, d_memory


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, memory, _, mask, backend = inputs
    ctx.backend = backend
    save(ctx, features, memory, mask)


def _autograd(ctx: Any, d_gram: Tensor) -> tuple[Tensor | None, ...]:
    features, memory, mask = saved(ctx)
    needs = (ctx.needs_input_grad[0], memory is not None and ctx.needs_input_grad[1])
    d_features, d_memory = _backward(features, memory, mask, d_gram, *needs, ctx.backend)
    return d_features if needs[0] else None, d_memory if needs[1] else None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def gram(
    features: Tensor,
    memory: Tensor | GramBasis | None = None,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Gamma = Z Z^T of stacked memory and features, each block centred and followed by a row for its mean.

    Args:
        features: [B, S, D] or [B, F], differentiable. [B, S, D] is flattened to F = S * D.
        memory: [K, F'], F' >= F, differentiable; features narrower than it end in zeros. A ``GramBasis`` (see
            ``frozen_gram``) is a constant memory whose own block is copied instead of computed. None: no memory.
        mask: [B, S], 1 = keep; needs [B, S, D] features. Dropped positions count as zeros, whatever they hold.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        [N, N] with N = (K + 1) + (B + 1), or B + 1 without a memory; float32, or float64 for float64 features and
        from "eager", whose losses would else lose to its rounding what the sums kept.

    Raises:
        TypeError: An argument is not a floating tensor.
        ValueError: Shapes or devices do not fit.
    """
    flat, kept = flatten_features(features, mask)
    rows, known = (None, None) if memory is None else check_memory("memory", memory, "features", flat)
    chosen = resolve_backend(backend, features.device, "gram")
    if chosen == "reference":
        with without_autocast(features.device):
            return implementation("gram", "reference").forward(flat, rows, kept)
    return _forward(flat, rows, known, kept, chosen)


def flatten_features(features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Check features [B, S, D] or [B, F] with mask [B, S]; return them as [B, F] with a boolean mask."""
    if not isinstance(features, Tensor) or features.ndim != 2:
        check_features("features", features, 3, "[B, S, D] or [B, F]")
        batch, rows, _ = features.shape
        return features.flatten(1), check_mask(mask, batch, rows, features.device)
    check_features("features", features, 2, "[B, S, D] or [B, F]")
    if mask is not None:
        raise ValueError("mask: needs features [B, S, D], got [B, F]: where tokens begin is not known")
    return features, None


def check_memory(
    name: str, memory: Tensor | GramBasis, of: str, features: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Check a memory against the features [B, F] called ``of``; return its rows and, if known, their own block."""
    known = memory.gram if isinstance(memory, GramBasis) else None
    rows = memory.memory.detach() if isinstance(memory, GramBasis) else memory
    check_features(name, rows, 2, "[K, F]")
    check_same_device([(of, features), (name, rows)])
    if rows.shape[0] < 1 or rows.shape[1] < features.shape[1]:
        raise ValueError(
            f"{name}: expected [K, F] with K >= 1 and F >= {features.shape[1]} like the features, "
            f"got {list(rows.shape)}"
        )
    if known is not None and known.shape != (rows.shape[0] + 1, rows.shape[0] + 1):
        raise ValueError(f"{name}.gram: expected [K + 1, K + 1], got {list(known.shape)}")
    return rows, known


def frozen_gram(memory: Tensor, *, backend: str | None = None) -> GramBasis:
    """Compute, once, what ``gram`` needs of a memory [K, F] that never changes.

    Raises:
        TypeError: ``memory`` is not a floating tensor.
        ValueError: ``memory`` is not [K, F] with K >= 1.
    """
    check_features("memory", memory, 2, "[K, F]")
    if memory.shape[0] < 1:
        raise ValueError(f"memory: expected [K, F] with K >= 1, got {list(memory.shape)}")
    memory = memory.detach()
    # Beside a batch of nothing, so that it is the very block that ``gram`` makes of this memory beside any batch.
    return GramBasis(memory, gram(memory[:0], memory, backend=backend)[:-1, :-1].contiguous())
