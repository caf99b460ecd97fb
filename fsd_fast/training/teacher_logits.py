"""How far a student follows its teacher: the teacher's logits on the evaluation splits, computed once.

They may be kept on disk, one safetensors file for each teacher and split. A file is named by the teacher's fingerprint
and by the split's tokens, so that logits of another teacher or of other samples are never taken for these.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from safetensors.torch import save
from torch import Tensor
from transformers import Trainer

from fsd_fast.data import SAMPLE_COLUMN, PadCollator, Task, tokens_digest
from fsd_fast.distributed import Collectives
from fsd_fast.files import write_atomically
from fsd_fast.memory.features import local_sample_indices
from fsd_fast.metrics import fidelity
from fsd_fast.models.teacher import Teacher, TeacherDescription
from fsd_fast.untrusted import load_tensors


class TeacherLogits:
    """The logits of a frozen teacher.

    Args:
        teacher: Gives the teacher, its outputs in the task's order; called only where it must run.
        description: Of the teacher.
        collator: Pads a batch.
        precision: Of its matrix products: bfloat16 or float16; None for float32.
        batch_size: Samples of one forward pass.
        device: Where the teacher runs.
        folder: Where logits are kept; None: they are computed anew for every split.
    """

    def __init__(
        self,
        teacher: Callable[[], Teacher],
        description: TeacherDescription,
        collator: PadCollator,
        *,
        precision: torch.dtype | None = None,
        batch_size: int,
        device: torch.device,
        folder: str | None = None,
    ) -> None:
        self._teacher, self._description = teacher, description
        self._collator, self._precision = collator, precision
        self._batch_size, self._device = batch_size, device
        self._folder = None if folder is None else Path(folder)

    def of(self, rows: Dataset) -> npt.NDArray[np.float32]:
        """Return the logits of a split's N tokenized samples, float32 [N, C], in their order.

        All processes call it together; each runs the teacher on its share of the samples.

        Raises:
            ValueError: The file that keeps them is damaged; where it is removed they are computed again.
        """
        if self._folder is None:
            return self._compute(rows)
        kind = f"{self._description.fingerprint} {self._precision} {tokens_digest(rows)}"
        path = self._folder / f"logits-{hashlib.sha256(kind.encode()).hexdigest()[:32]}.safetensors"
        collectives = Collectives()
        if collectives.broadcast_json(path.is_file()):
            return self._read(path, len(rows))
        logits = self._compute(rows)
        if collectives.rank == 0:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, save({"logits": torch.from_numpy(logits)}))
            except OSError as error:  # the work is done, and must not be lost for it
                warnings.warn(
                    f"the teacher's logits cannot be kept: {path}: {error.strerror}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return logits

    def _compute(self, rows: Dataset) -> npt.NDArray[np.float32]:
        teacher = self._teacher().to(self._device, self._precision)
        share = local_sample_indices(rows)
        parts: list[Tensor] = []
        for index in share.split(self._batch_size):
            inputs = self._collator([rows[place] for place in index.tolist()])
            inputs = {name: value.to(self._device) for name, value in inputs.items() if name != SAMPLE_COLUMN}
            parts.append(teacher.hidden_states(inputs)[0].cpu())
        outputs = self._description.num_labels
        collectives = Collectives()
        logits = collectives.gather_rows(torch.cat(parts) if parts else torch.empty(0, outputs))
        ordered = torch.empty_like(logits)
        ordered[collectives.gather_rows(share)] = logits
        return np.asarray(ordered.numpy())

    def _read(self, path: Path, samples: int) -> npt.NDArray[np.float32]:
        expected = (samples, self._description.num_labels)
        stored = load_tensors(path.read_bytes(), path).get("logits")
        if stored is None or stored.shape != expected or stored.dtype != torch.float32:
            found = "none" if stored is None else f"{stored.dtype} {list(stored.shape)}"
            raise ValueError(f"{path}: expected float32 logits {list(expected)}, got {found}")
        return np.asarray(stored.numpy())


def score_splits(
    trainer: Trainer, splits: Mapping[str, Dataset], task: Task, teacher: TeacherLogits | None
) -> dict[str, float]:
    """Score a model on every evaluation split, and compare it with its teacher.

    Args:
        trainer: Holds the model and computes the task's metrics.
        splits: Name -> tokenized samples.
        task: The task.
        teacher: None: scores alone.

    Returns:
        "eval_accuracy" and the like; with several splits each has its name, as in "eval_heldout_accuracy". With a
        teacher also ``fsd_fast.metrics.fidelity`` under the same prefixes.
    """
    figures: dict[str, float] = {}
    for name, rows in splits.items():
        prefix = f"eval_{name}" if len(splits) > 1 else "eval"
        output = trainer.predict(rows, metric_key_prefix=prefix)
        figures |= output.metrics or {}
        if teacher is not None:
            compared = fidelity(task, output.predictions, teacher.of(rows))
            figures |= {f"{prefix}_{key}": value for key, value in compared.items()}
    return figures
