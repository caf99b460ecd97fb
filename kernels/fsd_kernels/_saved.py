"""Tensors kept from forward to backward, of which some may be None."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Keep tensors in an autograd context."""
    ctx.present = [tensor is not None for tensor in tensors]
    ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None))


def saved(ctx: Any) -> list[Any]:
    """What was kept, None where there was None."""
    present = iter(ctx.saved_tensors)
    return [next(present) if there else None for there in ctx.present]
