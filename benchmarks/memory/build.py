"""A whole build of a memory: teacher passes, clustering time, and its time against the released procedure."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory.features import TaskFeatures
from benchmarks.memory.numbers import Number
from benchmarks.memory.released import released_procedure
from benchmarks.speed import harness
from benchmarks.tables import aligned
from fsd_fast.memory.teacher_memory import TeacherMemory

_BUILDS = {
    (policy, cached): f"padding {policy}d, {'with' if cached else 'without'} a teacher cache"
    for policy in ("exclude", "include")
    for cached in (True, False)
}


def build_once(features: TaskFeatures, pad_features: str, cached: bool) -> tuple[TeacherMemory, float]:
    """Build a memory; return it and the seconds, which include writing a new teacher cache if ``cached``."""
    features.teacher.reset()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        identity = features.identity(pad_features)
        cache = features.open_cache(Path(folder) / "features", identity) if cached else None
        memory = TeacherMemory.build(
            lambda first: features.batches(pad_features, first, cache),
            identity,
            seed=0,
            progress=False,
            num_samples=len(features),
        )
        return memory, time.perf_counter() - started


def build(options: argparse.Namespace) -> tuple[list[Number], dict[str, Any]]:
    """Build a memory of RTE; on some of its samples, compare builds with the released procedure."""
    features = TaskFeatures("rte", options.glue, options.samples)
    numbers, facts = _whole_build(features)
    if len(features) > options.released_samples:
        features = TaskFeatures("rte", options.glue, options.released_samples)
    more_numbers, more_facts = _against_released(features, options.rounds)
    return numbers + more_numbers, facts | more_facts


def _whole_build(features: TaskFeatures) -> tuple[list[Number], dict[str, Any]]:
    memory, total = build_once(features, "exclude", False)
    teacher = features.teacher
    passes = teacher.samples / len(features)
    print(
        f"rte, {len(features)} samples, padding excluded, no cache: {total:.1f} s, of which the teacher's forward "
        f"{teacher.seconds:.1f} s in {passes:g} passes; "
        + ", ".join(f"{stage} {seconds} s" for stage, seconds in memory.seconds.items()),
        flush=True,
    )
    share = (total - teacher.seconds) / teacher.seconds
    numbers = [
        Number.at_most("rte: teacher passes", passes, 2),
        Number.at_most("rte: clustering time / the teacher's forward", share, 0.25),
    ]
    return numbers, {"samples": len(features), "seconds": total, "forward": teacher.seconds}


def _against_released(features: TaskFeatures, rounds: int) -> tuple[list[Number], dict[str, Any]]:
    """Time the builds and the released procedure in turn, so that a slow moment of the machine affects all."""
    seconds: dict[str, list[float]] = {name: [] for name in (*_BUILDS.values(), "released")}
    forwards: dict[str, list[float]] = {name: [] for name in _BUILDS.values()}
    passes: dict[str, float] = {}
    for _ in range(rounds):
        for (policy, cached), name in _BUILDS.items():
            seconds[name].append(build_once(features, policy, cached)[1])
            forwards[name].append(features.teacher.seconds)
            passes[name] = features.teacher.samples / len(features)
        seconds["released"].append(
            _seconds(lambda: released_procedure(features, torch.Generator().manual_seed(0)))
        )
    released = seconds["released"]
    print(f"rte, {len(features)} samples: the released procedure {statistics.median(released):.1f} s")
    table = [["build", "teacher passes", "seconds", "times faster", "its forward alone"]]
    numbers: list[Number] = []
    for (_, cached), name in _BUILDS.items():
        faster, bound = harness.ratio(released, seconds[name]), harness.ratio(released, forwards[name])
        table.append(
            [
                name,
                f"{passes[name]:g}",
                f"{statistics.median(seconds[name]):.1f}",
                f"{faster.median:.1f} ({faster.low:.1f} to {faster.high:.1f})",
                f"{bound.median:.1f}",
            ]
        )
        if cached:
            number = f"rte, {len(features)} samples, {name}: times faster than the released procedure"
            numbers.append(Number.at_least(number, faster.median, minimum_speedup(bound.median)))
            numbers.append(Number.at_most(f"rte, {name}: teacher passes", passes[name], 1))
    print(aligned(table), flush=True)
    facts = {
        "compared_samples": len(features),
        "compared_seconds": seconds,
        "compared_forward_seconds": forwards,
    }
    return numbers, facts


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def minimum_speedup(bound: float) -> float:
    """Return how many times faster than the released procedure a build must be.

    Args:
        bound: How many times faster a build would be if it did nothing but the teacher's forward.

    Returns:
        8, or 85 % of ``bound`` where that is less: with all S positions one pass of the teacher alone takes nearly an
        eighth of the released procedure's time.
    """
    return min(8.0, 0.85 * bound)
