"""The logits of a frozen model on evaluation splits, kept on disk: one safetensors file for each model and split.

The file is named by the model's fingerprint and by the split's tokens, so that logits of another model or of other
samples are never taken for these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from safetensors.torch import save

from fsd_fast.distributed import Collectives
from fsd_fast.files import write_atomically
from fsd_fast.memory.features import model_fingerprint, tokens_digest
from fsd_fast.models.teacher import Teacher
from fsd_fast.untrusted import load_tensors


class StoredLogits:
    """A folder of logits.

    Args:
        folder: Made when the first logits are written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(
        self, model: Teacher, rows: Dataset, outputs: int, compute: Callable[[], npt.NDArray[np.float32]]
    ) -> npt.NDArray[np.float32]:
        """Return the logits of a split, computed once.

        Args:
            model: The frozen model.
            rows: The split's N tokenized samples.
            outputs: Number of logits C.
            compute: Runs the model; called on all processes together where the file is missing.

        Returns:
            Float32 [N, C] in the order of the samples.

        Raises:
            ValueError: The file is damaged; removing it lets it be computed again.
            OSError: The file cannot be written.
        """
        key = hashlib.sha256(f"{model_fingerprint(model.model)} {tokens_digest(rows)}".encode()).hexdigest()
        path = self._folder / f"logits-{key[:32]}.safetensors"
        collectives = Collectives()
        if not collectives.broadcast_json(path.is_file()):
            logits = np.asarray(compute(), dtype=np.float32).reshape(len(rows), outputs)
            if collectives.rank == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, save({"logits": torch.from_numpy(logits)}))
            return logits
        stored = load_tensors(path.read_bytes(), path).get("logits")
        if stored is None or stored.shape != (len(rows), outputs) or stored.dtype != torch.float32:
            found = "none" if stored is None else f"{stored.dtype} {list(stored.shape)}"
            raise ValueError(f"{path}: expected float32 logits [{len(rows)}, {outputs}], got {found}")
        return np.asarray(stored.numpy())
