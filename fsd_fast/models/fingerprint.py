"""By what a model is told from another: its parameters, the files it is loaded from, and its settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from fsd_fast.models.loading import weight_files

# Settings that no number depends on: names, and what the library notes about itself.
_NAMES = frozenset(
    {
        *("architectures", "transformers_version", "dtype", "torch_dtype", "finetuning_task", "use_cache"),
        *("label2id", "problem_type", "output_hidden_states", "output_attentions", "return_dict"),
    }
)


def model_fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes, dtypes and bytes of a model's parameters, sorted by name."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {list(values.shape)} {values.dtype}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def settings_digest(name_or_path: str) -> str:
    """sha256 of the settings in a model's config.json that its forward pass may depend on.

    Raises:
        OSError: There is no such model.
    """
    settings, _ = PreTrainedConfig.get_config_dict(name_or_path)
    kept = {
        key: value
        for key, value in settings.items()
        if key not in _NAMES and key != "id2label" and not key.startswith("_")
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(name_or_path: str) -> str | None:
    """sha256 over the files of a model's weights and the names of its outputs; None where no file is at hand.

    Equal digests mean equal parameters in equal order, and no model has to be built to see that.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        config = cached_file(name_or_path, "config.json", _raise_exceptions_for_missing_entries=False)
        if config is None:
            return None
        folder = Path(config).parent
    try:
        files = weight_files(folder)
    except (OSError, ValueError):  # loading the model says what is wrong
        return None
    settings, _ = PreTrainedConfig.get_config_dict(name_or_path)
    digest = hashlib.sha256(json.dumps(settings.get("id2label"), sort_keys=True).encode())
    for chunk in _contents(files):
        digest.update(chunk)
    return digest.hexdigest()


def _contents(files: Iterable[Path]) -> Any:
    for path in files:
        yield f"\n{path.name} {path.stat().st_size}\n".encode()
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                yield chunk
