"""Where a training step gets the teacher's outputs: from the teacher, or from its cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fsd_fast.cache.teacher_cache import CachedBatch, TeacherCache
from fsd_fast.distributed import Collectives
from fsd_fast.losses import Requirements, Signals
from fsd_fast.models.caching import compute_batch
from fsd_fast.models.teacher import Teacher


class TeacherSource(Protocol):
    """Gives the teacher's signals for a training batch."""

    def start(self, device: torch.device, dtype: torch.dtype | None, compiled: dict[str, Any] | None) -> None:
        """Set where signals are wanted, before the first batch.

        Args:
            device: The training device.
            dtype: bfloat16 or float16 for the teacher's matrix products; None for float32.
            compiled: Arguments of ``torch.compile``; None: the teacher is not compiled.
        """

    def signals(self, inputs: dict[str, Tensor], sample_index: Tensor) -> Signals:
        """What the objective requires of the teacher for a batch, but for the memory; on the training device.

        Args:
            inputs: The teacher's inputs, on the training device.
            sample_index: The samples' places in the training set, int64 [B], on the CPU.
        """


class RunningTeacher:
    """A teacher that runs on every batch.

    Args:
        teacher: The teacher.
        requires: What the objective reads of it.

    Raises:
        ValueError: The teacher has no queries, keys and values as the objective requires them.
    """

    def __init__(self, teacher: Teacher, requires: Requirements) -> None:
        self.teacher, self._layers = teacher, requires.teacher_layers
        if requires.relation_heads:
            teacher.record_projections(requires.relation_heads)

    def start(self, device: torch.device, dtype: torch.dtype | None, compiled: dict[str, Any] | None) -> None:
        """Move the teacher; see ``TeacherSource``."""
        self.teacher.to(device, dtype)
        if compiled is not None:
            self.teacher.compile(**compiled)

    def signals(self, inputs: dict[str, Tensor], sample_index: Tensor) -> Signals:
        """Run the teacher; see ``TeacherSource``."""
        logits, hidden_states = self.teacher.hidden_states(inputs)
        recorder = self.teacher.projections
        return Signals(
            logits,
            {layer: hidden_states[layer] for layer in self._layers},
            projections=None if recorder is None else recorder.take(),
        )


class CachedTeacher:
    """A teacher whose outputs are read from a cache; it runs, and is loaded, only for samples that are not there.

    What a batch computes is used as it would be read, rounded where the cache rounds.

    Args:
        cache: The outputs.
        load: Gives the teacher.

    Attributes:
        writes: Whether computed batches are written to the cache; false where another process is its writer.
        samples_read: Samples of the batches that were read so far.
        samples_computed: Samples of those on which the teacher ran.
    """

    def __init__(self, cache: TeacherCache, load: Callable[[], Teacher]) -> None:
        self.cache, self._load = cache, load
        self.writes = False
        self.samples_read = self.samples_computed = 0
        self._teacher: Teacher | None = None
        self._device = torch.device("cpu")
        self._compiled: dict[str, Any] | None = None

    def start(self, device: torch.device, dtype: torch.dtype | None, compiled: dict[str, Any] | None) -> None:
        """Note the device; the precision is the one that the cache is in. See ``TeacherSource``."""
        self._device, self._compiled = device, compiled

    def signals(self, inputs: dict[str, Tensor], sample_index: Tensor) -> Signals:
        """Read a batch, or compute and write it; see ``TeacherSource``.

        Raises:
            ValueError: A number to be written is not finite.
        """
        positions = inputs["input_ids"].shape[1]
        found = self.cache.read(sample_index, positions, pin_memory=self._device.type == "cuda")
        if found is None:
            found = self._compute(inputs, sample_index)
            self.samples_computed += len(sample_index)
        else:
            self.samples_read += len(sample_index)
        hidden_states = {
            layer: values.to(self._device, non_blocking=True).float()
            for layer, values in found.hidden_states.items()
        }
        return Signals(found.logits.to(self._device, non_blocking=True), hidden_states)

    def _compute(self, inputs: dict[str, Tensor], sample_index: Tensor) -> CachedBatch:
        if self._teacher is None:
            self._teacher = self._load()
            precision: torch.dtype = getattr(torch, self.cache.identity.precision)
            self._teacher.to(self._device, None if precision == torch.float32 else precision)
            if self._compiled is not None:
                self._teacher.compile(**self._compiled)
        try:
            return compute_batch(self._teacher, self.cache, inputs, sample_index, write=self.writes)
        except OSError as error:
            warnings.warn(f"{error}. Training goes on and writes no more of it", RuntimeWarning, stacklevel=2)
            self.writes = False
            return compute_batch(self._teacher, self.cache, inputs, sample_index, write=False)


class CacheScan(TrainerCallback):
    """Finds, between two epochs, what other processes have written to a cache.

    Within an epoch a process sees its own batches alone, so that which batches are read does not depend on how fast the
    others are.
    """

    def __init__(self, cache: TeacherCache) -> None:
        self._cache = cache

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Wait until every process is through the epoch, then look."""
        collectives = Collectives()
        collectives.gather_sizes(0)
        collectives.run_on_all_ranks(self._cache.scan)
