"""Features of as many samples as one likes, from a teacher that costs almost nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from fsd_fast.memory.features import FeatureBatch, MemoryIdentity

BATCH = 32
_PATTERNS = 64


class SyntheticFeatures:
    """Hidden states of N samples, the same ones on every pass, none of which is kept.

    A sample is a mixture of 64 random patterns: one counts in full, a second half, and every one a little. That makes
    4,096 groups, more than a memory has centroids, and each sample differs from all others. A batch is one matrix
    product; ``seconds`` adds up what it takes.

    Args:
        identity: Gives S and D.
        samples: N.
    """

    def __init__(self, identity: MemoryIdentity, samples: int) -> None:
        self._shape = (identity.max_seq_length, identity.hidden_size)
        self._samples = samples
        generator = torch.Generator().manual_seed(0)
        self._patterns = torch.randn(_PATTERNS, identity.features, generator=generator)
        self.seconds = 0.0

    def batches(self, first_batch: int) -> Iterator[FeatureBatch]:
        """The batches from this number on."""
        for start in range(first_batch * BATCH, self._samples, BATCH):
            began = time.perf_counter()
            size = min(BATCH, self._samples - start)
            generator = torch.Generator().manual_seed(1 + start)
            mixture = 0.05 * torch.randn(size, _PATTERNS, generator=generator)
            for weight in (1.0, 0.5):
                chosen = torch.randint(_PATTERNS, (size,), generator=generator)
                mixture[torch.arange(size), chosen] += weight
            features = (mixture @ self._patterns).view(size, *self._shape)
            self.seconds += time.perf_counter() - began
            yield FeatureBatch(features, None, torch.arange(start, start + size))
