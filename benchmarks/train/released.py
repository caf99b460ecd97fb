"""The released training loop and the plain fine-tuning loop of transformers, on the same task and models.

python -m benchmarks.train.released TASK GLUE TEACHER MEMORY STEPS      the released loop, written from its formulas
python -m benchmarks.train.released TASK GLUE TEACHER finetune STEPS    transformers.Trainer on hard labels

Each prints one line of JSON: samples and tokens per second.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from benchmarks.speed import baselines
from fsd_fast.data import get_task, load_task_dataset, resolve_model, tokenize
from fsd_fast.memory.teacher_memory import TeacherMemory
from fsd_fast.models.loading import load_tokenizer
from fsd_fast.models.student import load_classifier

LENGTH, BATCH, LEARNING_RATE = 128, 32, 4e-5
_ALPHA, TEMPERATURE, _CLIP = 0.5, 10.0, 1.0


def read_task(task_name: str, glue: str, teacher: str) -> tuple[Any, Any, Any]:
    """Return a task, the teacher's tokenizer, and the tokenized training set."""
    task, tokenizer = get_task(task_name), load_tokenizer(teacher)
    rows = load_task_dataset(task, glue)["train"]
    return task, tokenizer, tokenize(rows, tokenizer, task, LENGTH)[0]


def released(task_name: str, glue: str, teacher_path: str, memory_path: str, steps: int) -> dict[str, float]:
    """Run the released loop: padded to 128, float32, the teacher in the graph, a new memory Gram in every step."""
    task, tokenizer, rows = read_task(task_name, glue, teacher_path)
    teacher = load_classifier(teacher_path, task.labels).eval()
    student = load_classifier(resolve_model("minilm"), task.labels, 3).train()
    teacher_memory = TeacherMemory.from_pretrained(memory_path).centroids
    memory = torch.nn.Parameter(torch.randn(teacher_memory.shape))
    optimizer = torch.optim.AdamW([*student.parameters(), memory], lr=LEARNING_RATE)
    columns = rows.select_columns(["input_ids", "attention_mask", "token_type_ids", "labels"])
    collator = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=LENGTH)
    loader = DataLoader(columns, batch_size=BATCH, shuffle=True, collate_fn=collator)
    tokens, started = 0, 0.0
    for step, batch in enumerate(loader):
        if step == 1:
            tokens, started = 0, time.perf_counter()
        labels = batch.pop("labels")
        tokens += int(batch["attention_mask"].sum())
        of_teacher = teacher(**batch, output_hidden_states=True)
        of_student = student(**batch, output_hidden_states=True)
        soft = functional.kl_div(
            functional.log_softmax(of_student.logits / TEMPERATURE, dim=1),
            functional.softmax(of_teacher.logits / TEMPERATURE, dim=1),
            reduction="batchmean",
        )
        structures = baselines.fsd_ilg(baselines.released_cka)(
            {
                "student": of_student.hidden_states[2],
                "teacher": of_teacher.hidden_states[5],
                "student_memory": memory,
                "teacher_memory": teacher_memory,
            }
        )
        hard = functional.cross_entropy(of_student.logits, labels)
        loss = _ALPHA * hard + (1 - _ALPHA) * TEMPERATURE**2 * soft + structures
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), _CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if step == steps:
            break
    seconds = time.perf_counter() - started
    return {"samples_per_second": steps * BATCH / seconds, "tokens_per_second": tokens / seconds}


class _Clock(TrainerCallback):
    """Seconds from the end of the first step to the end of the last."""

    started, seconds = 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        now = time.perf_counter()
        if state.global_step == 1:
            self.started = now
        self.seconds = now - self.started


def finetune(task_name: str, glue: str, teacher_path: str, steps: int) -> dict[str, float]:
    """Run transformers' Trainer as it is on the hard labels, batches padded to their longest sample."""
    task, tokenizer, rows = read_task(task_name, glue, teacher_path)
    student = load_classifier(resolve_model("minilm"), task.labels, 3)
    columns = rows.select_columns(["input_ids", "attention_mask", "token_type_ids", "labels"])
    tokens: list[int] = []
    pad = DataCollatorWithPadding(tokenizer)

    def collate(samples: list[dict[str, Any]]) -> Any:
        batch = pad(samples)
        tokens.append(int(batch["attention_mask"].sum()))
        return batch

    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps + 1, per_device_train_batch_size=BATCH, learning_rate=LEARNING_RATE,
            use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=50,
        )  # fmt: skip
        Trainer(student, arguments, train_dataset=columns, data_collator=collate, callbacks=[clock]).train()
    return {
        "samples_per_second": steps * BATCH / clock.seconds,
        "tokens_per_second": sum(tokens[1 : steps + 1]) / clock.seconds,
    }


if __name__ == "__main__":
    name, glue_folder, teacher_folder, what, count = sys.argv[1:]
    if what == "finetune":
        figures = finetune(name, glue_folder, teacher_folder, int(count))
    else:
        figures = released(name, glue_folder, teacher_folder, str(Path(what)), int(count))
    print(json.dumps(figures))
