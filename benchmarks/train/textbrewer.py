"""TextBrewer's training loop on the same task and models: logits and hidden states.

python -m benchmarks.train.textbrewer TASK GLUE TEACHER STEPS

Prints one line of JSON: samples and tokens per second. TextBrewer is installed with the other peers, see
``benchmarks/requirements.txt``.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from benchmarks.train.released import BATCH, LEARNING_RATE, TEMPERATURE, read_task
from fsd_fast.data import resolve_model
from fsd_fast.models.student import load_classifier


class _Batches:
    """The first batches of a training set, each padded to its longest sample, and the clock of all but the first."""

    def __init__(self, loader: DataLoader[Any], steps: int) -> None:
        self._loader, self._count = loader, steps + 1
        self.samples, self.tokens, self.seconds = 0, 0, 0.0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        started = 0.0
        for step, batch in enumerate(itertools.islice(self._loader, self._count)):
            if step == 1:
                self.samples, self.tokens, started = 0, 0, time.perf_counter()
            self.samples += len(batch["labels"])
            self.tokens += int(batch["attention_mask"].sum())
            yield dict(batch)
        self.seconds = time.perf_counter() - started


def _outputs(batch: Any, outputs: Any) -> dict[str, Any]:
    return {
        "logits": outputs.logits,
        "hidden": outputs.hidden_states,
        "losses": outputs.loss,
        "inputs_mask": batch["attention_mask"],
    }


def distil(task_name: str, glue: str, teacher_path: str, steps: int) -> dict[str, float]:
    """Train a student of 3 layers on the labels, the teacher's logits and its penultimate hidden states."""
    task, tokenizer, rows = read_task(task_name, glue, teacher_path)
    teacher = load_classifier(teacher_path, task.labels).eval()
    student = load_classifier(resolve_model("minilm"), task.labels, 3).train()
    columns = rows.select_columns(["input_ids", "attention_mask", "token_type_ids", "labels"])
    loader = DataLoader(columns, BATCH, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
    batches = _Batches(loader, steps)
    match = {"layer_T": 5, "layer_S": 2, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    with tempfile.TemporaryDirectory() as folder:
        distiller = GeneralDistiller(
            TrainingConfig(device="cpu", output_dir=folder, log_dir=None, ckpt_frequency=0),
            DistillationConfig(
                temperature=TEMPERATURE, hard_label_weight=0.5, kd_loss_weight=0.5, intermediate_matches=[match]
            ),
            *(teacher, student, _outputs, _outputs),
        )  # fmt: skip
        with distiller:
            distiller.train(
                torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE),
                batches,
                num_epochs=1,
                max_grad_norm=1.0,
                batch_postprocessor=None,
                output_hidden_states=True,
            )
    return {
        "samples_per_second": batches.samples / batches.seconds,
        "tokens_per_second": batches.tokens / batches.seconds,
    }


if __name__ == "__main__":
    name, glue_folder, teacher_folder, count = sys.argv[1:]
    print(json.dumps(distil(name, glue_folder, teacher_folder, int(count))))
