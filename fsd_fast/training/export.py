"""The exported student: a plain transformers model with its tokenizer and a model card, and no trace of training.

What is written loads with ``AutoModelForSequenceClassification.from_pretrained`` where this package is not
installed. The files are written to a folder beside the target and moved in one by one, the weights last, so
an interrupted export never looks complete.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"


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
        folder: Target; files of the same name are replaced.
        card: Text of the model card, README.md.

    Raises:
        RuntimeError: ``state`` lacks a weight of the student or holds one that is not its own.
    """
    plain = type(student)(student.config)
    plain.load_state_dict({name: value.float() for name, value in state.items()})
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as name:
        part = Path(name)
        plain.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "README.md").write_text(card, encoding="utf-8")
        for file in sorted(part.iterdir(), key=lambda path: path.name == WEIGHTS):
            shutil.move(file, folder / file.name)


def model_card(title: str, task_name: str, rows: dict[str, Any], metrics: dict[str, float]) -> str:
    """Return the model card: what was trained, how, and what it scored.

    Args:
        title: First heading.
        task_name: The task.
        rows: Settings by name.
        metrics: Evaluation figures by name.
    """
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-classification",
        "tags:",
        "- feature-structure-distillation",
        "---",
        "",
        f"# {title}",
        "",
        f"Task: {task_name}. Trained with fsd_fast (feature structure distillation).",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "| evaluation | value |",
        "|---|---|",
        *(f"| {name} | {value:.4f} |" for name, value in metrics.items()),
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
