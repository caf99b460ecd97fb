"""Training runs as their user starts them, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Pads every batch to max_seq_length, as the released loop does; no flag of ours wastes time on purpose.
_PADDED = """
import functools, sys
from fsd_fast.cli import main
from fsd_fast.commands import _common
length = int(sys.argv[1])
_common.PadCollator = functools.partial(_common.PadCollator, pad_to_multiple_of=length)
sys.exit(main(sys.argv[2:]))
"""
_PLAIN = "import sys\nfrom fsd_fast.cli import main\nsys.exit(main(sys.argv[1:]))"


class Run(NamedTuple):
    """The figures of a training run."""

    samples_per_second: float
    """While steps ran, evaluation and saving left out."""
    tokens_per_second: float
    """Likewise; padding does not count."""
    padding_share: float
    """Positions of the batches that are padding."""
    peak_bytes: int
    """Largest resident memory of the process."""


class Workshop:
    """Makes teachers and memories of a task once, and runs distillations with them.

    Args:
        folder: Where everything is kept.
        glue: Folder of the official GLUE folders.
        threads: torch's threads in every run.
    """

    def __init__(self, folder: Path, glue: Path, threads: int) -> None:
        self.folder, self._glue, self.threads = folder, glue, threads

    def data(self, task: str) -> list[str]:
        """The flags of a task's data."""
        return ["--task_name", task, "--data_dir", str(self._glue), "--pad_features", "exclude"]

    def teacher(self, task: str) -> Path:
        """A MiniLM teacher of 6 layers. One step of training: how well it does changes no time."""
        path = self.folder / f"{task}-teacher"
        if not (path / "model.safetensors").is_file():
            flags = ["--model_name_or_path", "minilm", "--output_dir", str(path), "--max_steps", "1"]
            self.command(["teacher", *self.data(task), *flags, *COMMON, "--overwrite_output_dir", "true"])
        return path

    def memory(self, task: str) -> Path:
        """The teacher's memory of 100 centroids."""
        path = self.folder / f"{task}-memory"
        if not (path / "memory.json").is_file():
            flags = ["--teacher_model_name_or_path", str(self.teacher(task)), "--use_cpu", "true"]
            self.command(["memory", *self.data(task), *flags, "--output_dir", str(path)])
        return path

    def command(self, arguments: Sequence[str], padded_to: int | None = None) -> int:
        """Run a command; return the largest resident memory of its process in bytes.

        Raises:
            RuntimeError: It failed; what it said last is the message.
        """
        program = _PLAIN if padded_to is None else _PADDED
        numbers = [] if padded_to is None else [str(padded_to)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(
                [sys.executable, "-c", program, *numbers, *arguments],
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                said.seek(0)
                last = said.read().strip().splitlines()[-1:]
                raise RuntimeError(
                    f"{' '.join(arguments)}: exit status {process.returncode}: {' '.join(last)}"
                )
        return int(usage.ru_maxrss) * 1024

    def distill(
        self, task: str, method: str, *flags: str, steps: int | None = None, padded_to: int | None = None
    ) -> Run:
        """Train a student of 3 layers; one epoch, or so many steps of it."""
        with tempfile.TemporaryDirectory(dir=self.folder) as output:
            arguments = ["distill", *self.data(task), *COMMON, "--output_dir", output, "--method", method]
            arguments += ["--teacher_model_name_or_path", str(self.teacher(task)), "--student_layers", "3"]
            arguments += ["--overwrite_output_dir", "true", "--fidelity", "false"]
            if method in ("fsd_g", "fsd_ilg"):
                # The start of the student memory costs a pass that belongs to no step.
                arguments += ["--memory_path", str(self.memory(task)), "--student_memory_init", "normal"]
            if steps is not None:
                arguments += ["--max_steps", str(steps)]
            peak = self.command([*arguments, *flags], padded_to)
            results = json.loads((Path(output) / "train_results.json").read_text(encoding="utf-8"))
        return Run(
            results["train_step_samples_per_second"],
            results["train_step_tokens_per_second"],
            results["train_step_padding_share"],
            peak,
        )


COMMON = ["--use_cpu", "true", "--num_train_epochs", "1", "--eval_strategy", "no", "--save_strategy", "no"]
COMMON += [
    "--max_eval_samples",
    "32",
    "--logging_steps",
    "50",
    "--report_to",
    "none",
    "--disable_tqdm",
    "true",
]
