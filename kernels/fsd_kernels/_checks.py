"""Checks of the ops' arguments. Every error names the argument, what was expected and what it got."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_features(name: str, features: Tensor, ndim: int, layout: str) -> None:
    """Check that ``features`` is a floating tensor of ``ndim`` axes, described to the user by ``layout``."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {type(features).__name__}")
    if features.ndim != ndim:
        raise ValueError(f"{name}: expected {layout}, got shape {list(features.shape)}")
    if features.dtype not in FEATURE_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FEATURE_DTYPES)
        raise TypeError(f"{name}: expected one of {names}, got {features.dtype}")


def check_mask(mask: Tensor | None, batch: int, rows: int, device: torch.device) -> Tensor | None:
    """Return an attention mask ``[B, S]`` as booleans (True = keep), or None.

    Integer masks hold 1 and 0. Their values are checked on a CPU only; on a GPU the host would have to wait.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor [B, S], got {type(mask).__name__}")
    if tuple(mask.shape) != (batch, rows):
        raise ValueError(
            f"mask: expected [B, S] = [{batch}, {rows}] like the features, got {list(mask.shape)}"
        )
    if mask.device != device:
        raise ValueError(f"mask: on {mask.device}, but the features are on {device}")
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask: expected booleans or integers, 1 = keep and 0 = drop, got {mask.dtype}")
    if device.type == "cpu" and mask.numel() and not torch.compiler.is_compiling():
        valid = ((mask == 0) | (mask == 1)).all()
        # Fake tensors have no values.
        if type(valid) is Tensor and not bool(valid):
            raise ValueError(
                f"mask: expected 1 = keep and 0 = drop, got values from {int(mask.min())} to {int(mask.max())}"
            )
    return mask != 0


def check_same_device(tensors: Sequence[tuple[str, Tensor]]) -> torch.device:
    """Check that all named tensors are on one device and return it."""
    first_name, first = tensors[0]
    for name, tensor in tensors[1:]:
        if tensor.device != first.device:
            raise ValueError(f"{name}: on {tensor.device}, but {first_name} is on {first.device}")
    return first.device


def flatten_features(name: str, features: Tensor) -> Tensor:
    """Check features ``[B, S, D]`` or ``[B, F]`` and return them as ``[B, F]``, F = S * D."""
    ndim = 2 if isinstance(features, Tensor) and features.ndim == 2 else 3
    check_features(name, features, ndim, "[B, S, D] or [B, F]")
    return features.flatten(1)


def check_flat_mask(mask: Tensor | None, name: str, features: Tensor) -> Tensor | None:
    """As ``check_mask``, for checked features ``[B, S, D]``; features ``[B, F]`` take no mask."""
    if mask is not None and features.ndim == 2:
        raise ValueError(f"mask: needs {name} [B, S, D], got [B, F]: where tokens begin is not known")
    batch, rows = features.shape[:2]
    return check_mask(mask, batch, rows, features.device)
