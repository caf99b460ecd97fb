"""The hidden states of two models for the same samples, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor

from fsd_fast.data import SAMPLE_COLUMN, PadCollator
from fsd_fast.data.subsets import row_order
from fsd_fast.models.teacher import Teacher


@dataclass(frozen=True)
class PairedStates:
    """Both models' hidden states for a batch of B samples.

    Attributes:
        teacher: One ``[B, S, D_t]`` for the embeddings and each layer.
        student: The same, ``[B, S, D_s]``.
        keep: Bool ``[B, S]``: positions that count. Under "include" all of them do.
        labels: ``[B]``.
    """

    teacher: tuple[Tensor, ...]
    student: tuple[Tensor, ...]
    keep: Tensor
    labels: Tensor


def flat(states: Tensor, keep: Tensor) -> Tensor:
    """Features ``[B, S * D]`` in float64, zero where a position does not count."""
    return states.double().masked_fill(~keep[:, :, None], 0).flatten(1)


def chosen_samples(total: int, maximum: int, seed: int) -> list[int]:
    """Up to ``maximum`` samples in a seeded order, so that every batch is a fair sample of them all."""
    return row_order(total, seed)[:maximum]


def paired_states(
    teacher: Teacher,
    student: Teacher,
    rows: Dataset,
    collator: PadCollator,
    samples: list[int],
    *,
    batch_size: int,
    device: torch.device,
    pad_features: str,
) -> Iterator[PairedStates]:
    """Run both models on chosen samples.

    Args:
        teacher: On ``device``.
        student: On ``device``.
        rows: Tokenized samples.
        collator: Pads a batch.
        samples: Places of the samples.
        batch_size: Samples of a batch.
        device: Where the models run.
        pad_features: "include" or "exclude", as in the losses.
    """
    for begin in range(0, len(samples), batch_size):
        inputs = collator([rows[place] for place in samples[begin : begin + batch_size]])
        inputs = {name: value.to(device) for name, value in inputs.items() if name != SAMPLE_COLUMN}
        keep = inputs["attention_mask"].bool()
        if pad_features == "include":
            keep = torch.ones_like(keep)
        yield PairedStates(
            teacher.hidden_states(inputs)[1], student.hidden_states(inputs)[1], keep, inputs["labels"]
        )
