"""The order of samples under ``group_by_length``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class SeededLengthGroups(LengthGroupedSampler):
    """Trainer's sampler of batches whose samples have about one length, in an order that seed and epoch decide.

    Trainer's own draws from torch's global generator whenever an epoch begins: a run that is resumed amid an epoch
    would go on with other batches, and evaluation would change the random numbers of the training that follows.

    Args:
        batch_size: Samples of one length group.
        lengths: Tokens of every sample.
        seed: With the number of the epoch it decides the order.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths))
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Trainer calls this before each."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(super().__iter__())
