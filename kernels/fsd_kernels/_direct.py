"""When a fused op may be called without torch's dispatcher.

A custom op in Python costs a call some 0.1 ms of the dispatcher's own, and twice that where the processor's caches have
just been emptied by a product: as much as a fused kernel takes. Compilers, exporters and tensors that are no plain ones
need what the op is registered with; everything else runs the same forward and backward as an ``autograd.Function``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def may_call_directly(tensors: Iterable[Tensor | None]) -> bool:
    """Whether nothing looks at the ops that are called with these tensors."""
    return not torch.compiler.is_compiling() and all(each is None or type(each) in _PLAIN for each in tensors)
