"""``fsd-fast analyze``: what a student kept of its teacher, as figures, plots and a report."""

from __future__ import annotations

import csv
import functools
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from fsd_fast import __version__
from fsd_fast.analysis.cost import measure_cost
from fsd_fast.analysis.layer_cka import MINIMUM_BATCH, LayerCKA, matched_layers, mean_diagonal
from fsd_fast.analysis.plots import draw_cka, draw_curves, draw_pairs, draw_planes
from fsd_fast.analysis.report import html_report
from fsd_fast.analysis.restoration import Restoration
from fsd_fast.analysis.states import chosen_samples, flat, paired_states
from fsd_fast.clustering.sketch import CountSketch
from fsd_fast.commands._common import TaskData, Work, align_outputs, check_model, load_data, read_task
from fsd_fast.commands.analysis_report import RunFiles, report_cards, report_sections
from fsd_fast.commands.flags import DataArguments, flag
from fsd_fast.commands.values import Range
from fsd_fast.data import SAMPLE_COLUMN, resolve_model
from fsd_fast.files import write_atomically, write_json
from fsd_fast.memory.features import memory_identity
from fsd_fast.memory.teacher_memory import TeacherMemory
from fsd_fast.models.labels import saved_labels
from fsd_fast.models.loading import load_tokenizer, read_config
from fsd_fast.models.teacher import Teacher
from fsd_fast.training.checkpoints import check_writable

_SKETCH_WIDTH = 1024
_TIMED_SAMPLES, _TIMED_BATCHES = 30, 8


@dataclass
class AnalysisArguments:
    """The ``analyze`` command: a student beside its teacher."""

    model_name_or_path: str = flag("The student: the folder of a run, or another classifier.")
    teacher_model_name_or_path: str = flag("The fine-tuned teacher.")
    output_dir: str | None = flag(
        "Folder for report.html, plots and figures. Default: 'analysis' in the student's folder.",
        None,
        writes=True,
    )
    memory_path: str | None = flag("A teacher memory, to draw its centroids among the features.", None)
    num_samples: int = flag(
        "Samples of the first evaluation split that are compared, drawn in a seeded order.",
        512,
        numbers=Range(minimum=MINIMUM_BATCH),
    )
    per_device_batch_size: int = flag(
        "Samples of a minibatch: of one forward pass, and of one estimate of CKA.",
        32,
        numbers=Range(minimum=MINIMUM_BATCH),
    )
    seed: int = flag(
        "Order of the samples, and seed of t-SNE.", 42, numbers=Range(minimum=0, maximum=2**32 - 1)
    )
    use_cpu: bool = flag("Use the CPU even where there is a GPU.", False)


ARGUMENTS = (DataArguments, AnalysisArguments)


def prepare(data_arguments: DataArguments, arguments: AnalysisArguments) -> Work:
    """Check the input; return the work that compares the models and writes the report."""
    path = resolve_model(arguments.model_name_or_path)
    teacher_path = resolve_model(arguments.teacher_model_name_or_path)
    folder = _output_folder(arguments, path)
    tokenizer = load_tokenizer(path)
    if load_tokenizer(teacher_path).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"teacher_model_name_or_path: {teacher_path} and {path} have different vocabularies")
    labels = None if data_arguments.train_file is not None else saved_labels(read_config(path))
    task, splits = read_task(data_arguments, needs=(), labels=labels)
    if not task.eval_splits:
        raise ValueError(
            "train_file: expected --validation_file or --test_file beside it, got none to analyze"
        )
    loaded = {}
    for name, where in (("teacher_model_name_or_path", teacher_path), ("model_name_or_path", path)):
        check_model(where, tokenizer, task, data_arguments.max_seq_length)
        loaded[name] = Teacher.from_pretrained(where)
        align_outputs(loaded[name], task, name)
    device = PartialState(cpu=arguments.use_cpu).device
    teacher, student = (model.to(device) for model in loaded.values())
    memory = None
    if arguments.memory_path is not None:
        memory = TeacherMemory.from_pretrained(arguments.memory_path)
        expected = memory_identity(
            teacher.describe(),
            task,
            data_arguments.max_seq_length,
            data_arguments.pad_features,
            memory.identity.num_centroid,
        )
        memory.identity.check(expected, arguments.memory_path)
    data = load_data(data_arguments, task, splits, tokenizer, train=False)
    rows = next(iter(data.evaluation.values()))
    if len(rows) < MINIMUM_BATCH:
        raise ValueError(
            f"num_samples: expected at least {MINIMUM_BATCH} evaluation samples, got {len(rows)}"
        )
    run = RunFiles.read(Path(path))
    analysis = _Analysis(data_arguments, arguments, teacher, student, data, memory, device)
    return functools.partial(analysis.write, folder, run)


def _output_folder(arguments: AnalysisArguments, path: str) -> Path:
    if arguments.output_dir is not None:
        return Path(arguments.output_dir)
    if not Path(path).is_dir():
        raise ValueError(f"output_dir: expected a folder to write to, got none and {path} is none")
    folder = Path(path) / "analysis"
    check_writable("output_dir", str(folder))
    return folder


class _Analysis:
    """An analysis whose input has been checked."""

    def __init__(
        self,
        data_arguments: DataArguments,
        arguments: AnalysisArguments,
        teacher: Teacher,
        student: Teacher,
        data: TaskData,
        memory: TeacherMemory | None,
        device: torch.device,
    ) -> None:
        self._data_arguments, self._arguments = data_arguments, arguments
        self._teacher, self._student = teacher, student
        self._data, self._memory, self._device = data, memory, device
        self._split, self._rows = next(iter(data.evaluation.items()))
        self._samples = chosen_samples(len(self._rows), arguments.num_samples, arguments.seed)
        self._cka, self._restoration = LayerCKA(), Restoration()
        self._sketches: dict[str, list[Tensor]] = {"teacher": [], "student": []}
        self._labels: list[Tensor] = []

    def write(self, folder: Path, run: RunFiles) -> dict[str, float]:
        """Compare the models and write everything; return the figures that sum it up."""
        self._compare()
        folder.mkdir(parents=True, exist_ok=True)
        matrix = self._cka.matrix()
        figures: dict[str, Any] = {
            "task": self._data.task.name,
            "split": self._split,
            "samples": len(self._samples),
            "cka_mean_diagonal": mean_diagonal(matrix),
            "restoration": self._restoration.figures(),
            "cost": self._cost(),
        }
        write_atomically(folder / "cka.csv", cka_csv(matrix).encode())
        draw_cka(matrix, folder / "cka.png")
        draw_pairs(
            [torch.cat(each) for each in zip(*self._restoration.between, strict=True)],
            folder / "euclid_cosine.png",
        )
        self._draw_planes(folder / "tsne.png")
        curves = draw_curves(run.history, folder / "curves.png")
        write_json(folder / "analysis.json", figures)
        report = html_report(
            f"{run.name}: {self._data.task.name}",
            f"{self._student.num_layers} layers, {self._student.hidden_size} wide, beside its teacher with "
            f"{self._teacher.num_layers} layers, {self._teacher.hidden_size} wide.",
            report_cards(figures, run),
            report_sections(figures, folder, run, curves=curves, memory=self._memory is not None),
            f"fsd_fast {__version__}. {len(self._samples)} samples of {self._split}.",
        )
        write_atomically(folder / "report.html", report.encode(errors="replace"))
        print(f"written: {folder / 'report.html'}", flush=True)
        cost = figures["cost"]
        return {
            "cka_mean_diagonal": figures["cka_mean_diagonal"],
            **{f"restoration_{name}": value for name, value in figures["restoration"].items()},
            **{f"{model}_{name}": value for model, values in cost.items() for name, value in values.items()},
        }

    def _compare(self) -> None:
        length, seed = self._data_arguments.max_seq_length, self._arguments.seed
        sketches = [
            CountSketch(length * model.hidden_size, _SKETCH_WIDTH, seed)
            for model in (self._teacher, self._student)
        ]
        for batch in paired_states(
            self._teacher,
            self._student,
            self._rows,
            self._data.collator,
            self._samples,
            batch_size=self._arguments.per_device_batch_size,
            device=self._device,
            pad_features=self._data_arguments.pad_features,
        ):
            self._cka.add(
                (flat(states, batch.keep) for states in batch.teacher),
                (flat(states, batch.keep) for states in batch.student),
            )
            teacher, student = batch.teacher[-2], batch.student[-2]
            self._restoration.add(teacher, student, batch.keep)
            kept_by_model = self._sketches.values()
            for kept, sketch, states in zip(kept_by_model, sketches, (teacher, student), strict=True):
                kept.append(sketch(flat(states, batch.keep).float()).cpu())
            self._labels.append(batch.labels.cpu())

    def _draw_planes(self, path: Path) -> None:
        centroids = None
        if self._memory is not None:
            identity = self._memory.identity
            centroids = CountSketch(identity.features, _SKETCH_WIDTH, self._arguments.seed)(
                self._memory.centroids
            )
        panels = {
            "teacher": (torch.cat(self._sketches["teacher"]), centroids),
            "student": (torch.cat(self._sketches["student"]), None),
        }
        draw_planes(panels, self._data.task.labels, torch.cat(self._labels), self._arguments.seed, path)

    def _cost(self) -> dict[str, dict[str, float]]:
        size = self._arguments.per_device_batch_size

        def inputs(places: list[int]) -> dict[str, Tensor]:
            batch = self._data.collator([self._rows[place] for place in places])
            return {name: value.to(self._device) for name, value in batch.items() if name != SAMPLE_COLUMN}

        single = [inputs([place]) for place in self._samples[:_TIMED_SAMPLES]]
        begins = range(0, len(self._samples), size)[:_TIMED_BATCHES]
        batches = [inputs(self._samples[begin : begin + size]) for begin in begins]
        return measure_cost({"teacher": self._teacher, "student": self._student}, single, batches)


def cka_csv(matrix: Tensor) -> str:
    """CKA as CSV: a line for each pair of layers, and whether they are matched."""
    matched = set(matched_layers(matrix.shape[0] - 1, matrix.shape[1] - 1))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["teacher_layer", "student_layer", "cka", "matched"])
    for teacher in range(matrix.shape[0]):
        for student in range(matrix.shape[1]):
            value = repr(float(matrix[teacher, student]))
            writer.writerow([teacher, student, value, json.dumps((teacher, student) in matched)])
    return text.getvalue()
