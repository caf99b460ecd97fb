"""Inertia of the memory's clustering against scikit-learn's, and against the width of its sketch."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from sklearn.cluster import KMeans
from torch import Tensor

from benchmarks.memory.features import CLUSTERS, TaskFeatures
from benchmarks.memory.numbers import Number
from benchmarks.tables import aligned
from fsd_fast.clustering.two_pass import cluster_stream

SEEDS = 3
WIDTHS = (128, 256, 512, 1024, 2048, 4096)


def _sklearn_inertias(points: Tensor) -> list[float]:
    return [
        float(KMeans(CLUSTERS, n_init=1, random_state=seed, max_iter=300).fit(points.numpy()).inertia_)
        for seed in range(SEEDS)
    ]


def quality(options: argparse.Namespace) -> tuple[list[Number], dict[str, Any]]:
    """Compare inertias with scikit-learn's on every task."""
    numbers: list[Number] = []
    facts: dict[str, Any] = {}
    for name in options.tasks:
        features = TaskFeatures(name, options.glue, options.samples)
        points = features.points()
        theirs = _sklearn_inertias(points)
        mean = statistics.mean(theirs)
        found = [cluster_stream(points, CLUSTERS, seed=seed) for seed in range(SEEDS)]
        ratios = [one.inertia / mean for one in found]
        facts[name] = {
            "samples": len(features),
            "longest": features.longest,
            "scikit-learn": theirs,
            "ours": [one.inertia for one in found],
        }
        print(
            f"{name}: {len(features)} samples, longest {features.longest} tokens; scikit-learn "
            f"{mean:.6g} ({max(theirs) / min(theirs):.4f} between its seeds); ours / scikit-learn "
            f"{', '.join(f'{ratio:.4f}' for ratio in ratios)}",
            flush=True,
        )
        numbers.append(Number.at_most(f"{name}: inertia ratio, mean", statistics.mean(ratios), 1.01))
        numbers.append(Number.at_most(f"{name}: inertia ratio, worst seed", max(ratios), 1.02))
    return numbers, facts


def widths(options: argparse.Namespace) -> tuple[list[Number], dict[str, Any]]:
    """Measure inertia and time at several sketch widths; these figures have no limits."""
    facts: dict[str, Any] = {}
    for name in options.tasks:
        features = TaskFeatures(name, options.glue, options.samples)
        points = features.points()
        mean = statistics.mean(_sklearn_inertias(points))
        table = [["sketch width", "bytes per sample", "inertia ratio, mean", "worst of 3", "k-means seconds"]]
        facts[name] = {}
        for width in WIDTHS:
            found = [cluster_stream(points, CLUSTERS, seed=seed, sketch_width=width) for seed in range(SEEDS)]
            ratios = [one.inertia / mean for one in found]
            seconds = statistics.mean(one.seconds["sketch_clustering"] for one in found)
            facts[name][width] = {"ratios": ratios, "seconds": seconds}
            table.append([str(width), str(4 * width), *_ratio_cells(ratios), f"{seconds:.1f}"])
        refined = [
            cluster_stream(points, CLUSTERS, seed=seed, refine=2).inertia / mean for seed in range(SEEDS)
        ]
        facts[name]["2048, refine 2"] = {"ratios": refined}
        table.append(["2048, 2 exact epochs", "8192", *_ratio_cells(refined), ""])
        print(f"{name}, {len(features)} samples, F = {points.shape[1]}\n{aligned(table)}", flush=True)
    return [], facts


def _ratio_cells(ratios: list[float]) -> list[str]:
    return [f"{statistics.mean(ratios):.4f}", f"{max(ratios):.4f}"]
