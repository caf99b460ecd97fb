"""The demo: fine-tune a teacher, keep its outputs, build its memory, train three students, and compare them.

All runs read the built-in ``reviews`` task and start from the built-in 6-layer backbone. The three students have
the same 3 layers, the same first weights, data order, epochs and learning rate; they differ in the loss alone:
hard labels only, L_VKD, and FSD_ILG. The settings are fixed here; nothing is chosen by a
score on the dev rows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fsd_fast.commands.flags import flag
from fsd_fast.files import write_json
from fsd_fast.training.record import RECORD_FILE, read_record


@dataclass
class DemoArguments:
    """The ``demo`` command: teacher, memory and students on the built-in task."""

    output_dir: str = flag("Folder for everything the demo makes.", "runs/demo", writes=True)
    overwrite_output_dir: bool = flag("Run every stage anew, also those that are finished.", False)


ARGUMENTS = (DemoArguments,)

TASK = ["--task_name", "reviews", "--max_seq_length", "64", "--pad_features", "exclude"]
TASK += ["--max_train_samples", "2400"]
TRAINING = ["--save_strategy", "no", "--disable_tqdm", "false", "--per_device_train_batch_size", "32"]
TRAINING += ["--logging_steps", "10", "--seed", "42", "--use_cpu", "true"]
TEACHER = [*TASK, *TRAINING, "--num_train_epochs", "1", "--learning_rate", "1e-4"]
STUDENT = [*TASK, *TRAINING, "--num_train_epochs", "2", "--learning_rate", "1e-4"]
SCORE = "eval_accuracy"


def stages(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Stage name -> (command, its flags), in the order in which they run."""
    teacher, memory = str(folder / "teacher"), str(folder / "memory")
    taught = ["--teacher_model_name_or_path", teacher, "--teacher_cache_dir", str(folder / "cache")]
    distilled = [*STUDENT, *taught, "--model_name_or_path", "minilm", "--student_layers", "3"]

    def out(name: str) -> list[str]:
        return ["--output_dir", str(folder / name), "--overwrite_output_dir", "true"]

    return {
        "teacher": ("teacher", [*TEACHER, *out("teacher")]),
        "cache": ("cache", [*TASK, *taught, "--use_cpu", "true"]),
        "memory": ("memory", [*TASK, *taught, "--use_cpu", "true", *out("memory")]),
        "no teacher": ("teacher", [*STUDENT, "--num_layers", "3", *out("no_teacher")]),
        "vkd": ("distill", [*distilled, "--method", "vkd", *out("vkd")]),
        "fsd_ilg": (
            "distill",
            [*distilled, "--method", "fsd_ilg", "--memory_path", memory, *out("fsd_ilg")],
        ),
    }


def _run_stage(
    name: str, command: str, flags: list[str], folder: Path, anew: bool
) -> tuple[dict[str, float], bool]:
    """Return a stage's figures, and whether it ran or had run before with the same flags."""
    from fsd_fast.commands import run

    record = folder / "stages" / f"{name.replace(' ', '_')}.json"
    if record.is_file() and not anew:
        finished = json.loads(record.read_text(encoding="utf-8"))
        if finished["flags"] == flags:
            print(f"== {name}: finished before, kept", flush=True)
            return finished["figures"], False
    record.unlink(missing_ok=True)
    print(f"== {name}: fsd-fast {command} {' '.join(flags)}", flush=True)
    start = time.perf_counter()
    figures = run(command, flags)
    figures = {**figures, "seconds": time.perf_counter() - start}
    write_json(record, {"flags": flags, "figures": figures})
    return figures, True


def _row(name: str, figures: dict[str, float], folder: Path) -> dict[str, Any]:
    settings = read_record(folder / name.replace(" ", "_") / RECORD_FILE).settings
    return {
        "method": name,
        "layers": settings.get("student_layers") or settings["num_layers"],
        "parameters": settings["parameters"],
        "dev_accuracy": figures[SCORE],
        "seconds": figures["seconds"],
    }


def results_table(rows: list[dict[str, Any]]) -> str:
    """Return the demo's table as Markdown, from the rows of results.json."""
    lines = ["| method | layers | parameters | dev accuracy | seconds |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['layers']} | {row['parameters']:,} | {row['dev_accuracy']:.4f} | "
            f"{row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def draw_curves(histories: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw the dev accuracy of every student and the loss components of the last one over the training steps.

    Args:
        histories: Student name -> Trainer's ``log_history``.
        path: The PNG to write.
    """
    matplotlib.use("Agg")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, history in histories.items():
        points = [(entry["step"], entry[SCORE]) for entry in history if SCORE in entry]
        left.plot(*zip(*points, strict=True), marker="o", label=name)
    left.set(xlabel="training step", ylabel="dev accuracy", title="Students on the dev split")
    left.legend()
    name, history = list(histories.items())[-1]
    for component in (
        "loss_hard",
        "loss_soft",
        "loss_intra",
        "loss_local",
        "global_memory",
        "global_cosine",
    ):
        points = [(entry["step"], entry[component]) for entry in history if component in entry]
        if points:
            right.plot(*zip(*points, strict=True), label=component)
    right.set(
        xlabel="training step", ylabel="loss component", yscale="log", title=f"Loss components of {name}"
    )
    right.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def prepare(arguments: DemoArguments) -> Callable[[], dict[str, float]]:
    """Return the work: run every stage, print the table, write results.json and curves.png."""
    folder = Path(arguments.output_dir)

    def work() -> dict[str, float]:
        start = time.perf_counter()
        figures, anew = {}, arguments.overwrite_output_dir
        for name, (command, flags) in stages(folder).items():
            # A stage reads what earlier ones wrote: after one that ran, all run.
            figures[name], anew = _run_stage(name, command, flags, folder, anew)
        rows = [_row(name, values, folder) for name, values in figures.items() if SCORE in values]
        write_json(
            folder / "results.json",
            {
                "rows": rows,
                "cache_seconds": figures["cache"]["seconds"],
                "memory_seconds": figures["memory"]["seconds"],
                "task": "reviews",
                "flags": STUDENT,
            },
        )
        histories = {}
        for name in ("no teacher", "vkd", "fsd_ilg"):
            state = json.loads(
                (folder / name.replace(" ", "_") / "trainer_state.json").read_text(encoding="utf-8")
            )
            histories[name] = state["log_history"]
        draw_curves(histories, folder / "curves.png")
        shared = ", ".join(f"{name}: {figures[name]['seconds']:.1f} s" for name in ("cache", "memory"))
        print(f"\n{results_table(rows)}\n\n{shared}")
        print(f"written: {folder / 'results.json'}, {folder / 'curves.png'}", flush=True)
        return {"demo_seconds": time.perf_counter() - start}

    return work
