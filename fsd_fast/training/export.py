"""The exported student: a plain transformers model with its tokenizer and a model card, and no trace of training.

What is written loads with ``AutoModelForSequenceClassification.from_pretrained`` where this package is not
installed. The files are written to a folder inside the target, the weights of an earlier export are removed, and the
new files are moved in one by one, the weights last: a folder with weights is a whole export.
"""

from __future__ import annotations

import html
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_NAME

from fsd_fast.distributed import Collectives
from fsd_fast.models.families import outputs_of, same, sample_inputs
from fsd_fast.models.whole_weights import whole_weights

CARD = "README.md"
_PREFIX = ".export-"


def export_student(
    student: PreTrainedModel,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
) -> None:
    """Write a student that loads without this package.

    Args:
        student: Gives class and configuration; its own weights are not read (ZeRO-3 has partitioned them).
        state: The weights, complete, under the student's own names.
        tokenizer: Saved next to the weights.
        folder: Target; files of the same name are replaced, weights of another name removed.
        card: Text of the model card, README.md.

    Raises:
        RuntimeError: ``state`` lacks a weight of the student or holds one that is not its own.
    """
    plain = type(student)(student.config)
    plain.load_state_dict({name: value.float() for name, value in state.items()})
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f"{_PREFIX}*"):  # of an export that was killed
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_PREFIX) as name:
        part = Path(name)
        plain.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / CARD).write_text(card, encoding="utf-8")
        # The card has the mode that the umask gives a file; weights begin as temporary files, for their owner alone.
        mode = (part / CARD).stat().st_mode
        for old in (*folder.glob("model*.safetensors"), *folder.glob("model*.safetensors.index.json")):
            old.unlink()
        for file in sorted(part.iterdir(), key=lambda path: path.name == SAFE_WEIGHTS_NAME):
            file.chmod(mode)
            shutil.move(file, folder / file.name)


def check_export(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Export a student that is about to be trained into a scratch folder and compare what loads from there.

    Call it on all processes: the first one does the work (transformers writes a configuration nowhere else), and all
    stop if it fails.

    Args:
        student: Whole, on the CPU.
        tokenizer: Its tokenizer.

    Raises:
        ValueError: It cannot be saved, or what loads has other weights, logits or tokens.
        RuntimeError: The same, in the other processes.
    """
    processes = Collectives()
    processes.run_on_all_ranks(
        (lambda: _try_export(student, tokenizer)) if processes.rank == 0 else lambda: None
    )


def _try_export(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    name = type(student).__name__
    fork = torch.random.fork_rng(devices=[])  # the weights drawn here should not shift those of the run
    with tempfile.TemporaryDirectory(prefix="fsd-fast-") as scratch, whole_weights(), fork:
        try:
            export_student(student, student.state_dict(), tokenizer, Path(scratch), "")
            loaded, report = AutoModelForSequenceClassification.from_pretrained(
                scratch, dtype=torch.float32, output_loading_info=True
            )
            tokens = AutoTokenizer.from_pretrained(scratch)("one two")["input_ids"]
        except Exception as error:
            raise ValueError(f"student: a {name} like this cannot be exported: {error}") from error
    faults = {key: sorted(map(str, keys)) for key, keys in report.items() if keys}
    if faults:
        raise ValueError(f"student: a {name} like this cannot be exported: what loads has {faults}")
    inputs = sample_inputs(student.config, 4)
    weights, given = loaded.state_dict(), student.state_dict()
    equal = all(torch.equal(weights[key], value.float()) for key, value in given.items())
    if not (equal and same(outputs_of(loaded, inputs)[0], outputs_of(student, inputs)[0])):
        raise ValueError(
            f"student: a {name} like this cannot be exported: what loads has other weights or logits"
        )
    if tokens != tokenizer("one two")["input_ids"]:
        raise ValueError(
            f"student: the tokenizer {type(tokenizer).__name__} cannot be exported: it loads as another"
        )


def _plain(value: Any) -> str:
    """Text that stays within its line and table cell and is no HTML; of an absolute path the name alone."""
    text = str(value)
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(text).is_absolute():
            text = kind(text).name
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").split())


def model_card(
    title: str,
    task_name: str,
    rows: Mapping[str, Any],
    metrics: Mapping[str, float],
    id2label: Mapping[int, str],
) -> str:
    """Return the model card: what was trained, how, and what it scored.

    Args:
        title: First heading.
        task_name: The task.
        rows: Settings by name.
        metrics: Evaluation figures by name.
        id2label: Class name of each logit; a regression has one.
    """
    labels = ", ".join(f"{output} = {_plain(label)}" for output, label in sorted(id2label.items()))
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-classification",
        "tags:",
        "- feature-structure-distillation",
        "---",
        "",
        f"# {_plain(title)}",
        "",
        f"Task: {_plain(task_name)}. Trained with fsd_fast (feature structure distillation).",
        "",
        f"Logits: {labels}." if len(id2label) > 1 else "Logits: one, the score.",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {_plain(name)} | {_plain(value)} |" for name, value in rows.items()),
        "",
        "| evaluation | value |",
        "|---|---|",
        *(f"| {_plain(name)} | {value:.4f} |" for name, value in metrics.items()),
        "",
        "```python",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        'model = AutoModelForSequenceClassification.from_pretrained("PATH_OF_THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")',
        "```",
        "",
    ]
    return "\n".join(lines)
