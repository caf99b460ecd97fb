"""The classifier in a checkpoint: of a teacher as it was saved, of a distillation without the memory and the loss."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForSequenceClassification
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from fsd_fast.models.loading import read_config
from fsd_fast.models.teacher import Teacher
from fsd_fast.models.whole_weights import whole_weights
from fsd_fast.training.distillation import export_state
from fsd_fast.training.manifest import MANIFEST_FILE
from fsd_fast.untrusted import load_tensors, shorten


def check_loadable(folder: Path, run: Path) -> None:
    """Check that a checkpoint is whole and holds a model.

    Args:
        folder: The checkpoint.
        run: The folder of the finished run.

    Raises:
        FileNotFoundError: A file is missing.
    """
    if not (folder / MANIFEST_FILE).is_file():
        raise FileNotFoundError(f"{folder}: {MANIFEST_FILE} is missing: it was cut off while it was written")
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        raise FileNotFoundError(
            f"{folder}: expected the model in {SAFE_WEIGHTS_NAME}, found none; DeepSpeed may keep it elsewhere"
        )
    if not ((folder / CONFIG_NAME).is_file() or (run / CONFIG_NAME).is_file()):
        raise FileNotFoundError(f"{run}: expected {CONFIG_NAME} of a finished run, found none")


def load_checkpoint(folder: Path, run: Path) -> Teacher:
    """Load the classifier in a checkpoint, frozen.

    Args:
        folder: The checkpoint.
        run: The folder of the finished run, whose configuration a distillation's checkpoints have too.

    Raises:
        ValueError: The weights are damaged, or not those of the run's model.
    """
    if (folder / CONFIG_NAME).is_file():
        return Teacher.from_pretrained(str(folder))
    path = folder / SAFE_WEIGHTS_NAME
    state = export_state(load_tensors(path.read_bytes(), path))
    with whole_weights():
        model = AutoModelForSequenceClassification.from_config(read_config(str(run)), trust_remote_code=False)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: expected the weights of the model in {run}, got {shorten(str(error))}"
        ) from None
    return Teacher(model, str(folder))
