"""The figures of an analysis, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fsd_fast.analysis.layer_cka import matched_layers

TEACHER_COLOUR, STUDENT_COLOUR = "#4878a8", "#d1703c"
_MAXIMUM_PAIRS = 5000
_PERPLEXITY = 30.0
_COLOURS = (TEACHER_COLOUR, STUDENT_COLOUR, "#5a9367", "#8e6bab", "#b5a642", "#4b4b4b", "#c05a78", "#58a6a6")


def _figure(columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    # Imported here: the other commands should not wait for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(1, columns))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def draw_cka(matrix: Tensor, path: Path) -> None:
    """Draw the heat map of CKA ``[teacher layers, student layers]``; matched layers have a frame."""
    from matplotlib.patches import Rectangle

    teacher_layers, student_layers = matrix.shape
    figure, (axis,) = _figure(1, 2.2 + 0.62 * student_layers, 1.4 + 0.42 * teacher_layers)
    image = axis.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="viridis", origin="lower", aspect="auto")
    for teacher in range(teacher_layers):
        for student in range(student_layers):
            value = float(matrix[teacher, student])
            axis.text(
                student, teacher, f"{value:.2f}", ha="center", va="center", fontsize=8,
                color="white" if value < 0.6 else "black",
            )  # fmt: skip
    for teacher, student in matched_layers(teacher_layers - 1, student_layers - 1):
        axis.add_patch(
            Rectangle((student - 0.5, teacher - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=2)
        )
    axis.set(
        xlabel="student layer (0: embeddings)", ylabel="teacher layer",
        xticks=range(student_layers), yticks=range(teacher_layers),
    )  # fmt: skip
    figure.colorbar(image, ax=axis, label="CKA")
    figure.savefig(path, dpi=150)


def draw_pairs(pairs: Sequence[Tensor], path: Path) -> None:
    """Draw the Euclid-cosine map: distance (divided by its mean) and cosine of pairs of samples, for both models.

    Args:
        pairs: The teacher's distances and cosines and the student's, each ``[pairs]``.
        path: The PNG.
    """
    figure, (axis,) = _figure(1, 6.4, 4.6)
    step = max(1, len(pairs[0]) // _MAXIMUM_PAIRS)
    for name, distance, cosine, colour in (
        ("teacher", pairs[0], pairs[1], TEACHER_COLOUR),
        ("student", pairs[2], pairs[3], STUDENT_COLOUR),
    ):
        scale = float(distance.mean()) or 1.0
        axis.scatter(
            (distance / scale)[::step],
            cosine[::step],
            s=6,
            alpha=0.35,
            linewidths=0,
            color=colour,
            label=name,
        )
    axis.set(xlabel="Euclidean distance / mean", ylabel="cosine similarity")
    axis.legend(frameon=False, markerscale=3)
    figure.savefig(path, dpi=150)


def draw_planes(
    panels: Mapping[str, tuple[Tensor, Tensor | None]],
    classes: Sequence[str],
    labels: Tensor,
    seed: int,
    path: Path,
) -> None:
    """Draw the t-SNE of each model's features, coloured by class, with its memory where there is one.

    Args:
        panels: Title -> sketches of the samples ``[N, W]``, and of the memory's centroids ``[K, W]`` or None.
        classes: Names of the classes; empty for scores, which colour by a scale.
        labels: ``[N]``.
        seed: Of t-SNE.
        path: The PNG.
    """
    figure, axes = _figure(len(panels), 6 * len(panels), 5)
    for axis, (title, (samples, centroids)) in zip(axes, panels.items(), strict=True):
        plane, memory = _plane(samples, centroids, seed)
        if classes:
            for number, name in enumerate(classes):
                chosen = plane[labels.numpy() == number]
                colour = _COLOURS[number % len(_COLOURS)]
                axis.scatter(*chosen.T, s=10, alpha=0.7, linewidths=0, color=colour, label=name)
        else:
            points = axis.scatter(*plane.T, s=10, alpha=0.8, linewidths=0, c=labels.numpy(), cmap="viridis")
            figure.colorbar(points, ax=axis, label="score")
        if len(memory):
            axis.scatter(*memory.T, s=36, marker="X", color="black", linewidths=0, label="memory")
        axis.set(title=title, xticks=[], yticks=[])
        if len(classes) <= len(_COLOURS) and (classes or len(memory)):
            axis.legend(frameon=False, markerscale=1.6, fontsize="small")
    figure.savefig(path, dpi=150)


def _plane(
    samples: Tensor, centroids: Tensor | None, seed: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    from sklearn.manifold import TSNE

    rows = samples.numpy() if centroids is None else np.concatenate([samples.numpy(), centroids.numpy()])
    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows - rows.mean(axis=0))
    return plane[: len(samples)], plane[len(samples) :]


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw a run's training curves: evaluation scores, the loss, and each component of it on its own scale.

    Args:
        history: Trainer's ``log_history``.
        path: The PNG.

    Returns:
        Whether there was anything to draw.
    """
    series = _series(history)
    scores = {name: points for name, points in series.items() if name.startswith("eval_") and _is_score(name)}
    losses = {
        name: points for name, points in series.items() if name.startswith("loss") or name == "eval_loss"
    }
    shown = [(title, group) for title, group in (("evaluation", scores), ("losses", losses)) if group]
    if not shown:
        return False
    figure, axes = _figure(len(shown), 7 * len(shown), 3.8)
    for axis, (title, group) in zip(axes, shown, strict=True):
        for name, points in group.items():
            marker = "o" if name.startswith("eval_") else None
            label = name.removeprefix("eval_") if title == "evaluation" else name
            axis.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=1.4, label=label)
        axis.set(xlabel="step", title=title)
        if title == "losses" and all(value > 0 for points in group.values() for _, value in points):
            axis.set_yscale("log")
        axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=150)
    return True


def _is_score(name: str) -> bool:
    return not name.endswith(("_loss", "_runtime", "_per_second", "_time", "_kl", "_mse"))


def _series(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, dict[float, float]] = {}
    for entry in history:
        for name, value in entry.items():
            if name not in ("step", "epoch") and isinstance(value, int | float) and "step" in entry:
                series.setdefault(name, {})[entry["step"]] = float(value)
    return {name: sorted(points.items()) for name, points in series.items()}
