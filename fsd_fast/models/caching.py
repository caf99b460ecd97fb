"""A teacher's batch into its cache."""

from __future__ import annotations

from torch import Tensor

from fsd_fast.cache.teacher_cache import CachedBatch, TeacherCache
from fsd_fast.models.teacher import Teacher


def compute_batch(
    teacher: Teacher,
    cache: TeacherCache,
    inputs: dict[str, Tensor],
    sample_index: Tensor,
    *,
    write: bool = True,
) -> CachedBatch:
    """Run a teacher on a batch and keep what it computed.

    Args:
        teacher: On the device of ``inputs``.
        cache: Says which layers are kept, and how they are rounded.
        inputs: The teacher's inputs, ``[b, S_b]`` each.
        sample_index: The samples' places in the training set, int64 ``[b]``, on the CPU.
        write: Whether the cache is written.

    Returns:
        What the cache gives for these samples when they are read, on the teacher's device; positions of padding alone
        may hold other numbers.

    Raises:
        ValueError: A number to be written is not finite.
        OSError: The cache cannot be written.
    """
    logits, every = teacher.hidden_states(inputs)
    kept = {layer: every[layer].to(cache.dtype) for layer in cache.identity.layers}
    if write:
        cache.write(sample_index, logits, kept, inputs.get("attention_mask"))
    return CachedBatch(logits, {layer: kept[layer] for layer in cache.layers})
