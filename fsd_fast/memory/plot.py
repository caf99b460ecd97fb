"""A picture of a teacher memory: how large its clusters are, and where they lie among the points.

Left: sizes of the K clusters, largest first. Right: t-SNE in the plane of the centroids and of a sample of the
points. t-SNE runs on count sketches (distances kept within a few percent) of both, so that nothing of the size of
the points is held; a point has the colour of its nearest centroid.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fsd_fast.clustering.sketch import CountSketch
from fsd_fast.memory.features import FeatureBatch, flatten_features
from fsd_fast.memory.teacher_memory import TeacherMemory
from fsd_kernels.kmeans import nearest

PLOT_FILE = "memory_plot.png"
_SAMPLE = 1000
_SKETCH_WIDTH = 2048
_PERPLEXITY = 30.0


def plotted_samples(total: int) -> Tensor:
    """Sample indices int64 of up to 1000 samples, spread evenly over ``total``."""
    return torch.linspace(0, total - 1, min(total, _SAMPLE), dtype=torch.float64).round().long().unique()


def plot_memory(memory: TeacherMemory, batches: Iterable[FeatureBatch], path: Path) -> None:
    """Draw a memory and a sample of its points into a PNG.

    Args:
        memory: What is drawn.
        batches: The points of the sample, of the memory's own teacher, task and padding policy.
        path: Of the PNG; its folder exists.

    Raises:
        ValueError: The batches do not fit the memory, or there are none.
        OSError: The file cannot be written.
    """
    # Imported here: the plots of one command should not slow down the start of all of them.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    sketch = CountSketch(memory.identity.features, _SKETCH_WIDTH, memory.seed)
    sketches, labels = [sketch(memory.centroids)], []
    for batch in batches:
        points = flatten_features(batch, memory.identity)
        sketches.append(sketch(points).cpu())
        labels.append(nearest(points, memory.centroids.to(points.device)).cpu())
    if not labels:
        raise ValueError("batches: expected at least one batch of points to draw, got none")
    both = torch.cat(sketches)
    owner = torch.cat(labels)
    plane = TSNE(
        perplexity=min(_PERPLEXITY, (both.shape[0] - 1) / 3), init="pca", random_state=memory.seed % 2**32
    ).fit_transform((both - both.mean(dim=0)).numpy())

    clusters = memory.identity.num_centroid
    sizes = np.asarray(memory.cluster_sizes)
    figure = Figure(figsize=(14, 6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.bar(np.arange(1, clusters + 1), np.sort(sizes)[::-1], width=1.0, color="#4878a8")
    left.axhline(sizes.mean(), color="black", linewidth=1, linestyle="--", label=f"mean {sizes.mean():.1f}")
    left.set(xlabel="cluster, largest first", ylabel="samples", title=f"Sizes of {clusters} clusters")
    left.set_xlim(0.5, clusters + 0.5)
    left.legend(frameon=False)
    # Neighbouring numbers far apart on the colour wheel: the golden ratio.
    colours = (np.arange(clusters) * 0.6180339887) % 1.0
    right.scatter(
        plane[clusters:, 0], plane[clusters:, 1], s=9, c=colours[owner.numpy()], cmap="hsv", vmin=0, vmax=1, alpha=0.6,
        linewidths=0, label=f"{owner.shape[0]} samples",
    )  # fmt: skip
    right.scatter(
        plane[:clusters, 0], plane[:clusters, 1], s=30 + 120 * sizes / sizes.max(), c=colours,
        cmap="hsv", vmin=0, vmax=1, marker="X", edgecolors="black", linewidths=0.8, label=f"{clusters} centroids",
    )  # fmt: skip
    right.set(title="t-SNE of centroids and samples", xticks=[], yticks=[])
    right.legend(loc="best")
    identity = memory.identity
    figure.suptitle(
        f"Teacher memory: {identity.task_name}, layer {identity.layer}, S = {identity.max_seq_length}, "
        f"D = {identity.hidden_size}, padding {identity.pad_features}d, {memory.num_samples} samples, "
        f"inertia {memory.inertia:.4g}"
    )
    figure.savefig(path, dpi=120)
