"""``fsd-fast predict``: a classifier's predictions for a test set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset

from fsd_fast.commands._common import (
    Work,
    align_outputs,
    check_model,
    own_columns,
    own_files,
    own_name,
    tokenize_split,
)
from fsd_fast.commands.flags import DataArguments, flag
from fsd_fast.commands.values import Range
from fsd_fast.data import PadCollator, Task, get_task, resolve_model
from fsd_fast.data.load import load_task_test
from fsd_fast.data.own import read_own_texts
from fsd_fast.data.submission import OWN_FILE, predictions_csv, submission, submission_name
from fsd_fast.files import write_atomically
from fsd_fast.models.labels import saved_labels
from fsd_fast.models.loading import load_tokenizer, read_config
from fsd_fast.models.teacher import Teacher
from fsd_fast.training.teacher_logits import TeacherLogits


@dataclass
class PredictionArguments:
    """The ``predict`` command: predictions of a saved classifier for a test set."""

    model_name_or_path: str = flag("The classifier: a folder or a Hub name.")
    output_dir: str = flag(
        "Folder for the predictions: GLUE's submission files, or predictions.csv.", writes=True
    )
    per_device_eval_batch_size: int = flag("Samples of one forward pass.", 64, numbers=Range(minimum=1))
    use_cpu: bool = flag("Use the CPU even where there is a GPU.", False)


ARGUMENTS = (DataArguments, PredictionArguments)


def prepare(data_arguments: DataArguments, arguments: PredictionArguments) -> Work:
    """Check the input; return the work that writes the predictions."""
    path = resolve_model(arguments.model_name_or_path)
    tokenizer = load_tokenizer(path)
    task, splits = _read_test(data_arguments, saved_labels(read_config(path)))
    check_model(path, tokenizer, task, data_arguments.max_seq_length)
    saved = Teacher.from_pretrained(path)
    align_outputs(saved, task, "model_name_or_path")
    tokens = {
        name: tokenize_split(name, rows, tokenizer, task, data_arguments.max_seq_length, labelled=False)
        for name, rows in splits.items()
    }
    process = PartialState(cpu=arguments.use_cpu)
    logits = TeacherLogits.of_loaded(
        saved,
        PadCollator(tokenizer, data_arguments.pad_features, data_arguments.max_seq_length),
        batch_size=arguments.per_device_eval_batch_size,
        device=process.device,
    )
    own = bool(own_files(data_arguments))

    def work() -> dict[str, float]:
        folder = Path(arguments.output_dir)
        for name, rows in tokens.items():
            outputs = logits.of(rows)
            text = predictions_csv(task, outputs) if own else submission(task, outputs)
            if process.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / (OWN_FILE if own else submission_name(task, name)), text.encode())
        return {"predicted_samples": float(sum(map(len, tokens.values())))}

    return work


def _read_test(arguments: DataArguments, labels: tuple[str, ...]) -> tuple[Task, dict[str, Dataset]]:
    if not own_files(arguments):
        task = get_task(arguments.task_name)
        return task, dict(load_task_test(task, arguments.data_dir))
    assert arguments.test_file is not None  # the other files are refused
    if (arguments.label_type == "score") != (not labels):
        raise ValueError(
            f"label_type: expected {'classes' if labels else 'score'} for this classifier, got {arguments.label_type}"
        )
    task, rows = read_own_texts(own_name(arguments), arguments.test_file, own_columns(arguments), labels)
    return task, {"test": rows}
