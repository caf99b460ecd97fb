"""Trains tiny models for many steps in a process of its own and prints its memory along the way; see ``steps``."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForSequenceClassification

from benchmarks.resident import open_files, resident_bytes
from fsd_fast.commands import run
from fsd_fast.data import resolve_model
from fsd_fast.training.trainer import ClassifierTrainer

_LAYERS = 3
_DATA = "--task_name reviews --max_seq_length 16 --max_train_samples 400 --pad_features exclude".split()


def _save_teacher(folder: Path) -> None:
    """A tiny BERT with the built-in backbone's tokenizer; how well it does changes nothing here."""
    source = Path(resolve_model("minilm"))
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    config = AutoConfig.from_pretrained(source, num_labels=2, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    for path in source.iterdir():
        if path.suffix in (".txt", ".json") and path.name != "config.json":
            shutil.copy(path, folder)


def _watched(every: int) -> tuple[list[int], list[int]]:
    """Resident memory and open files, of every so manieth step from now on."""
    resident: list[int] = []
    files: list[int] = []
    original = ClassifierTrainer.training_step

    def training_step(self: ClassifierTrainer, *arguments: Any, **keywords: Any) -> Any:
        if (self.state.global_step + 1) % every == 0:
            resident.append(resident_bytes())
            files.append(open_files())
        return original(self, *arguments, **keywords)

    ClassifierTrainer.training_step = training_step  # type: ignore[method-assign]
    return resident, files


def main(steps: int, looks: int) -> None:
    """Train and print what was seen."""
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _save_teacher(folder / "teacher")
        common = [*_DATA, "--use_cpu", "true", "--teacher_model_name_or_path", str(folder / "teacher")]
        run("memory", [*common, "--num_centroid", "8", "--output_dir", str(folder / "memory")])
        often = str(max(1, steps // 20))
        flags = [*common, "--method", "fsd_ilg", "--memory_path", str(folder / "memory")]
        flags += [
            "--model_name_or_path",
            str(folder / "teacher"),
            "--student_layers",
            "2",
            "--fidelity",
            "false",
        ]
        flags += ["--max_steps", str(steps), "--per_device_train_batch_size", "8", "--max_eval_samples", "32"]
        flags += [
            "--logging_steps",
            "10",
            "--eval_strategy",
            "steps",
            "--eval_steps",
            often,
            "--disable_tqdm",
            "true",
        ]
        flags += ["--save_strategy", "steps", "--save_steps", often, "--save_total_limit", "2"]
        resident, files = _watched(steps // looks)
        began = time.perf_counter()
        run("distill", [*flags, "--output_dir", str(folder / "run")])
        seconds = time.perf_counter() - began
    print(json.dumps({"resident": resident, "open_files": files, "seconds": seconds}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
