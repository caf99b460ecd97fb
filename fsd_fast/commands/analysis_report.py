"""The report of ``analyze``: which figures stand where, and what is said about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsd_fast.analysis.report import Section
from fsd_fast.data import HELDOUT
from fsd_fast.training.record import RECORD_FILE, read_record
from fsd_fast.untrusted import read_json_object

_RESTORATION = {
    "between_distance": "distance between samples",
    "between_relative_distance": "distance between samples / mean",
    "between_cosine": "cosine between samples",
    "within_distance": "distance between tokens of a sample",
    "within_relative_distance": "distance between tokens of a sample / mean",
    "within_cosine": "cosine between tokens of a sample",
}
_COSTS = {
    "parameters": ("parameters", "{:,.0f}"),
    "disk_bytes": ("weights on disk, MB", "{:,.1f}"),
    "latency_ms": ("latency of one sample, ms", "{:,.1f}"),
    "samples_per_second": ("throughput, samples/s", "{:,.0f}"),
}
_NO_SCORES = ("_runtime", "_per_second", "_time")


@dataclass(frozen=True)
class RunFiles:
    """What the folder of a run says; all of it may be missing.

    Attributes:
        name: Name of the folder.
        settings: Its record's settings.
        scores: Figures of its evaluation.
        history: Trainer's log.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    history: list[Mapping[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """Read what there is in a folder.

        Raises:
            ValueError: A file is damaged.
        """

        def content(name: str) -> dict[str, Any]:
            path = folder / name
            return read_json_object(path, wide_integers=True) if path.is_file() else {}

        history = content("trainer_state.json").get("log_history", [])
        if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
            raise ValueError(f"{folder / 'trainer_state.json'}: log_history: expected a list of objects")
        record = folder / RECORD_FILE
        return cls(
            folder.resolve().name,
            read_record(record).settings if record.is_file() else {},
            {
                name: value
                for name, value in content("all_results.json").items()
                if name.startswith("eval_")
                and isinstance(value, int | float)
                and not name.endswith(_NO_SCORES)
            },
            history,
        )


def report_cards(figures: Mapping[str, Any], run: RunFiles) -> dict[str, str]:
    """The figures that stand out."""
    teacher, student = figures["cost"]["teacher"], figures["cost"]["student"]
    cards = {}
    scores = {
        name: value
        for name, value in run.scores.items()
        if not name.endswith("_loss") and not name.startswith(f"eval_{HELDOUT}_")
    }
    if scores:
        name, value = next(iter(scores.items()))
        cards[name.removeprefix("eval_").replace("_", " ")] = f"{value:.4f}"
    cards["of the teacher's parameters"] = f"{100 * student['parameters'] / teacher['parameters']:.0f} %"
    cards["of the teacher's throughput"] = (
        f"{student['samples_per_second'] / teacher['samples_per_second']:.1f}x"
    )
    cards["mean CKA of matched layers"] = f"{figures['cka_mean_diagonal']:.3f}"
    agreement = next((value for name, value in scores.items() if name.endswith("teacher_agreement")), None)
    if agreement is not None:
        cards["agreement with the teacher"] = f"{100 * agreement:.1f} %"
    return cards


def report_sections(
    figures: Mapping[str, Any], folder: Path, run: RunFiles, *, curves: bool, memory: bool
) -> list[Section]:
    """The parts of a report; plots are those in the folder."""
    sections = []
    if run.scores:
        rows = [
            [name.removeprefix("eval_").replace("_", " "), f"{value:.4f}"]
            for name, value in run.scores.items()
        ]
        sections.append(Section("Evaluation", "As the run ended.", header=["figure", "value"], rows=rows))
    if curves:
        sections.append(Section("Training", "The run's own log.", image=folder / "curves.png", wide=True))
    cost = figures["cost"]
    rows = []
    for key, (name, text) in _COSTS.items():
        unit = 1e6 if key == "disk_bytes" else 1
        rows.append([name, *(text.format(cost[model][key] / unit) for model in ("teacher", "student"))])
    note = "Measured side by side on this machine, without gradients: the median of one sample, and batches."
    sections.append(Section("Size and speed", note, header=["", "teacher", "student"], rows=rows))
    sections.append(
        Section(
            "Layers compared",
            "CKA between layers over samples, estimated without bias by minibatches: 0 for unrelated features, 1 for "
            f"the same up to rotation and scale. Frames mark matched layers; their mean is "
            f"{figures['cka_mean_diagonal']:.4f}.",
            image=folder / "cka.png",
        )
    )
    rows = [[_RESTORATION[name], f"{value:.4g}"] for name, value in figures["restoration"].items()]
    note = "Mean absolute difference of both models' pairs in the penultimate layer. Lower is better."
    sections.append(Section("Structure restored", note, header=["pairs", "difference"], rows=rows))
    note = "Distance and cosine of pairs of samples in the penultimate layer: the closer both clouds, the better."
    sections.append(Section("Euclid-cosine map", note, image=folder / "euclid_cosine.png"))
    note = "t-SNE of the penultimate features, coloured by label." + (
        " Crosses are the centroids of the teacher's memory." if memory else ""
    )
    sections.append(Section("Features", note, image=folder / "tsne.png", wide=True))
    if run.settings:
        rows = [[name, str(value)] for name, value in sorted(run.settings.items())]
        sections.append(Section("Settings", header=["setting", "value"], rows=rows, folded=True))
    return sections
