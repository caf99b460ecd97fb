"""How fast training goes: samples and tokens per second, and how much of the batches is padding."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Adds a tensor up over the processes."""


class Throughput:
    """Counts what training steps work through; nothing waits for the device before the counts are read.

    Time that is spent evaluating or saving does not count, see ``paused``.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin at nothing."""
        self._samples, self._positions = 0, 0
        self._tokens: Tensor | int = 0
        self._seconds = 0.0
        self._since = time.perf_counter()
        self._earlier = torch.zeros(3, dtype=torch.float64)
        self._earlier_seconds = 0.0

    def add(self, inputs: Mapping[str, Tensor]) -> None:
        """Count a batch: ``input_ids`` [B, S] and, where there is one, its ``attention_mask`` [B, S], 1 = token."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        self._samples += ids.shape[0]
        self._positions += ids.numel()
        self._tokens = self._tokens + (ids.numel() if mask is None else mask.count_nonzero())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for what is no training step."""
        self._seconds += time.perf_counter() - self._since
        try:
            yield
        finally:
            self._since = time.perf_counter()

    def recent(self, reduce: Reduce) -> dict[str, float]:
        """The figures since the last call; all processes call it together."""
        with self.paused():
            counts = reduce(
                torch.tensor([self._samples, int(self._tokens), self._positions], dtype=torch.float64)
            )
            figures = _figures(counts, self._seconds)
            self._earlier += counts
            self._earlier_seconds += self._seconds
            self._samples, self._positions, self._tokens, self._seconds = 0, 0, 0, 0.0
        return figures

    def total(self, reduce: Reduce) -> dict[str, float]:
        """The figures since the beginning; all processes call it together."""
        self.recent(reduce)
        return _figures(self._earlier, self._earlier_seconds)


def _figures(counts: Tensor, seconds: float) -> dict[str, float]:
    samples, tokens, positions = counts.tolist()
    if not positions or not seconds:
        return {}
    return {
        "samples_per_second": samples / seconds,
        "tokens_per_second": tokens / seconds,
        "padding_share": 1 - tokens / positions,
    }
