"""Stops a training run at the first loss or gradient that is not finite, before it is logged or saved.

Without it NaN weights would be trained on, evaluated, and saved over the last good checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fsd_fast.training.manifest import MANIFEST_FILE, checkpoint_folders

# Values on a GPU are read this many at a time at the latest: reading one waits for the GPU.
_MAXIMUM_PENDING = 200
_NAMED_SAMPLES = 8


class _Value(NamedTuple):
    """A scalar of one training step that must be finite."""

    step: int
    name: str
    value: Tensor
    samples: Tensor | None
    components: Mapping[str, Tensor]


class FiniteCheck(TrainerCallback):
    """Collects the losses and gradient norms of training steps and raises at the first one that is not finite.

    On a CPU a value is looked at when it is added. On a GPU that would make the host wait in every step, so values
    are kept and looked at before anything is logged, evaluated or saved.

    Raises:
        FloatingPointError: A value is NaN or infinite. The message names the step, the value, the loss components,
            the samples of the batch, the last checkpoint, and what to try.
    """

    def __init__(self, output_dir: str) -> None:
        self._output_dir = output_dir
        self._pending: list[_Value] = []

    def add(
        self,
        step: int,
        name: str,
        value: Tensor,
        samples: Tensor | None = None,
        components: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add a scalar of training step ``step`` (from 1).

        Args:
            step: The step that computed it.
            name: What it is, for the message.
            value: The scalar.
            samples: The dataset indices of the batch, [B]; None where they are unknown.
            components: The terms of the loss by name.
        """
        self._pending.append(_Value(step, name, value.detach(), samples, components or {}))
        if value.device.type == "cpu" or len(self._pending) >= _MAXIMUM_PENDING:
            self.check()

    def check(self) -> None:
        """Look at all values that were added since the last call."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        finite = torch.stack([entry.value.float().reshape(()) for entry in pending]).isfinite().tolist()
        if not all(finite):
            raise FloatingPointError(self._message(pending[finite.index(False)]))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Check before Trainer logs, evaluates or saves."""
        if control.should_log or control.should_evaluate or control.should_save:
            self.check()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Check before Trainer logs, evaluates or saves."""
        self.check()

    def _message(self, entry: _Value) -> str:
        text = f"training stopped at step {entry.step}: {entry.name} is {float(entry.value)}"
        components = {name: float(value) for name, value in entry.components.items()}
        spoilt = [name for name, value in components.items() if not math.isfinite(value)]
        if spoilt:
            text += f" ({', '.join(f'{name} = {value:.4g}' for name, value in components.items())})"
        if entry.samples is not None:
            samples = entry.samples.tolist()
            more = f" and {len(samples) - _NAMED_SAMPLES} more" if len(samples) > _NAMED_SAMPLES else ""
            text += f"; training samples {', '.join(map(str, samples[:_NAMED_SAMPLES]))}{more}"
        whole = [path for path in checkpoint_folders(self._output_dir) if (path / MANIFEST_FILE).is_file()]
        text += f"; the last checkpoint is {whole[-1]}" if whole else "; no checkpoint was saved"
        return (
            f"{text}. Try a lower --learning_rate, a smaller --beta, or --bf16 true in place of --fp16 true"
        )
