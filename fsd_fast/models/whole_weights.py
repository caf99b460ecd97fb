"""Loading models whole under ZeRO-3."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import transformers.integrations.deepspeed as hf_deepspeed


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Load models as plain tensors although ZeRO-3 is configured.

    transformers would partition whatever is loaded, the teacher too, which nothing gathers again. DeepSpeed
    partitions the trained module itself when training starts.
    """
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference
