"""What is wanted on a GPU, beside what a session found. Microseconds are for the paper's shape on an H100 or H200."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from benchmarks.gpu.stages import Figures
from benchmarks.speed import harness, results
from benchmarks.speed.commands.enqueue import TARGETS_US
from benchmarks.speed.results import OK, WRONG, Result
from benchmarks.tables import Table

STEP_RATIO = 1.05
HOST_US = 250.0
_NOT_FOUND = "not measured"


class Target(NamedTuple):
    """One thing that is wanted."""

    stage: str
    name: str
    wanted: str
    found: str
    passed: bool | None
    """None where it was not measured, or where shapes are too small to judge."""


KERNEL_US: tuple[tuple[str, str, str, float], ...] = (
    ("kernels-bf16", "L_I", "forward", 12),
    ("kernels-bf16", "L_I", "backward", 8),
    ("kernels-bf16", "L_G + L_L, K=100", "forward", 40),
    ("kernels-bf16", "L_G + L_L, K=100", "backward", 30),
    ("kernels-bf16", "L_G + L_L, K=300", "both", 220),
    ("kernels-bf16", "k-means, K=100", "both", 640),
    ("kernels-ieee", "L_I", "both", 50),
    ("kernels-ieee", "L_G + L_L, K=100", "both", 150),
)
"""(stage, pass, part of the pass, microseconds of its kernels)."""


def _microseconds(figures: Figures, name: str, part: str) -> float | None:
    """Kernel time of a pass; the backward is the whole pass without its forward."""
    passes: Mapping[str, Mapping[str, float]] = figures.get("passes", {})
    both, forward = (passes.get(key, {}).get("device") for key in (name, f"{name}, forward"))
    if part == "both":
        return both
    if part == "forward":
        return forward
    return None if both is None or forward is None else both - forward


def _at_most(stage: str, name: str, limit: float, found: float | None, unit: str) -> Target:
    wanted = f"at most {limit:g}{unit}"
    if found is None:
        return Target(stage, name, wanted, _NOT_FOUND, None)
    return Target(
        stage, name, wanted, f"{found:.3g}{unit}" if found < 100 else f"{found:.0f}{unit}", found <= limit
    )


def _tests(stage: str, figures: Figures) -> Iterable[Target]:
    if not figures:
        yield Target(stage, "kernel tests", "none fails", _NOT_FOUND, None)
        return
    counts = ", ".join(f"{figures[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
    passed = figures["failed"] == 0 and figures["passed"] > 0
    yield Target(stage, "kernel tests", "none fails", counts, passed)


def _kernels(all_figures: Mapping[str, Figures]) -> Iterable[Target]:
    for stage, name, part, limit in KERNEL_US:
        found = _microseconds(all_figures.get(stage, {}), name, part)
        label = f"{name}, kernels" if part == "both" else f"{name}, kernels, {part}"
        yield _at_most(stage, label, limit, found, " us")
    passes = all_figures.get("kernels-bf16", {}).get("passes", {})
    for name in ("L_I", "L_G + L_L, K=100"):
        host = passes.get(name, {}).get("host")
        yield _at_most("kernels-bf16", f"{name}, the CPU's time to enqueue it", HOST_US, host, " us")


def _enqueued(all_figures: Mapping[str, Figures]) -> Iterable[Target]:
    losses = all_figures.get("enqueue", {}).get("losses", {})
    for name, limit in TARGETS_US.items():
        yield _at_most("enqueue", f"{name}, own host time", limit, losses.get(name, {}).get("us"), " us")


def _captures(all_figures: Mapping[str, Figures]) -> Iterable[Target]:
    losses = all_figures.get("capture", {}).get("losses", {})
    if not losses:
        yield Target("capture", "CUDA graphs", "same bits", _NOT_FOUND, None)
    for name, outcome in losses.items():
        found = outcome["reason"] or "same bits"
        yield Target("capture", f"{name}, CUDA graph", "same bits", found, outcome["passed"])


def _result(figures: Figures) -> Result | None:
    return results.from_content(figures) if figures else None


def _steps(stage: str, figures: Figures) -> Iterable[Target]:
    """Steps of every structure against the one with none, round by round."""
    result = _result(figures)
    rows = [row for row in result.rows if row.status == OK] if result else []
    plain = {row.case: row for row in rows if row.provider == "vkd-only"}
    judged = [row for row in rows if row.provider != "vkd-only" and row.case in plain]
    if not judged:
        yield _at_most(stage, "training steps over VKD's", STEP_RATIO, None, "x")
    for row in judged:
        found = harness.ratio(row.samples, plain[row.case].samples).median
        yield _at_most(stage, f"step {row.case}, {row.provider} over vkd-only", STEP_RATIO, found, "x")


def _refused(stage: str, figures: Figures) -> Iterable[Target]:
    """Each of our own providers that the gate found wrong; it was not timed."""
    result = _result(figures)
    for row in result.rows if result else []:
        if row.status == WRONG and row.provider.startswith("ours"):
            yield Target(stage, f"{row.op} {row.case}, {row.provider}", "right", row.reason, False)


def _ahead(stage: str, figures: Figures) -> Iterable[Target]:
    """The closest other provider of every op: its time over ours."""
    result = _result(figures)
    closest: dict[str, tuple[float, str]] = {}
    for row in result.rows if result else []:
        if row.status != OK or row.provider == "ours" or result is None:
            continue
        ratio = result.speedup(row)
        if ratio is not None and (row.op not in closest or ratio.median < closest[row.op][0]):
            closest[row.op] = ratio.median, f"{ratio.median:.2f}x, {row.provider}, {row.case}"
    if not closest:
        yield Target(stage, "time of others over ours", "more than 1x", _NOT_FOUND, None)
    for op, (ratio_found, text) in closest.items():
        yield Target(stage, f"{op}: closest other over ours", "more than 1x", text, ratio_found > 1)


def _sanitizer(stage: str, figures: Figures) -> Target:
    errors = figures.get("errors")
    found = _NOT_FOUND if errors is None else f"{errors} errors"
    if errors:
        found += "".join(f", {name} {count}" for name, count in figures.get("kernels", {}).items())
    return Target(stage, stage, "0 errors", found, None if errors is None else errors == 0)


def evaluate(figures: Mapping[str, Figures], quick: bool) -> list[Target]:
    """All targets; times on tiny shapes are not judged.

    Args:
        figures: What each stage found, by the stage's name.
        quick: Whether shapes were tiny.
    """
    measured = {stage: figures.get(stage, {}) for stage in ("steps", "peers-bf16", "peers-tf32", "compiled")}
    right = list(_tests("tests", figures.get("tests", {})))
    right += [target for stage, found in measured.items() for target in _refused(stage, found)]
    right += [
        *_captures(figures),
        *(_sanitizer(stage, figures.get(stage, {})) for stage in ("memcheck", "racecheck")),
    ]
    times = [*_kernels(figures), *_enqueued(figures), *_steps("steps", measured.pop("steps"))]
    times += [target for stage, found in measured.items() for target in _ahead(stage, found)]
    return right + [target._replace(passed=None) if quick else target for target in times]


def table(targets: Iterable[Target]) -> Table:
    """One line for each target."""
    words = {True: "yes", False: "NO", None: "-"}
    lines = [[each.stage, each.name, each.wanted, each.found, words[each.passed]] for each in targets]
    return [["stage", "what", "wanted", "found", "reached"], *lines]
