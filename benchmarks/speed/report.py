"""A result as text for the terminal, and as a Markdown report with plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed import harness, plots
from benchmarks.speed.growth import Growth, growth
from benchmarks.speed.peers import CKA_PEERS, KMEANS_PEERS
from benchmarks.speed.registry import OPS
from benchmarks.speed.results import BOUND, OK, CheckResult, Result, Row, write_text
from benchmarks.tables import Table, aligned, markdown

PEERS = (*CKA_PEERS, *KMEANS_PEERS)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f}"


HEADER = [
    "provider",
    "ms",
    "quartiles",
    "x ours",
    "% matmul",
    "% copy",
    "peak MB",
    "error",
    "error, outliers",
    "remarks",
]


def row_cells(result: Result, row: Row) -> list[str]:
    """One line of a case's table; it gives the reason where the row was not timed."""
    if row.status not in (OK, BOUND):
        return [row.provider, "-", "-", "-", "-", "-", "-", *_errors(row), f"{row.status}: {row.reason}"]
    time = row.time
    times = result.speedup(row)
    remarks = [row.note] if row.note else []
    if row.host_seconds is not None:
        remarks.append(f"the CPU enqueues it in {_milliseconds(row.host_seconds)} ms")
    if row.noisy:
        remarks.append(f"NOISY (canary +-{row.canary_spread:.0%}, {row.canary_share:.0%} of the processor)")
    return [
        row.provider,
        _milliseconds(time.median),
        f"{_milliseconds(time.low)} to {_milliseconds(time.high)}",
        "-" if times is None else f"{times.median:.2f} ({times.low:.2f} to {times.high:.2f})",
        _percent(row.matmul_percent),
        _percent(row.copy_percent),
        _megabytes(row.peak_bytes),
        *_errors(row),
        "; ".join(remarks),
    ]


def _errors(row: Row) -> list[str]:
    return [
        f"{_error(row.value_error)} / {_error(row.gradient_error)}",
        f"{_error(row.outlier_value_error)} / {_error(row.outlier_gradient_error)}",
    ]


def groups(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Group rows by (op, case, mode), in their order."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.op, row.case, row.mode), []).append(row)
    return found


def text(result: Result, rows: Sequence[Row]) -> str:
    """Write the rows as tables for the terminal."""
    parts = []
    for (op, case, mode), group in groups(rows).items():
        table = [HEADER, *(row_cells(result, row) for row in group)]
        parts.append(f"{op} {case} {mode}\n{aligned(table)}")
    return "\n\n".join(parts)


def checks_table(checks: Sequence[CheckResult]) -> Table:
    """Table of the performance targets."""
    words = {True: "yes", False: "NO", None: "not measured"}
    lines = [
        [
            check.name,
            check.required,
            check.measured or "-",
            words[check.passed],
            "; ".join(part for part in ("NOISY run" if check.noisy else "", check.reason) if part),
        ]
        for check in checks
    ]
    return [["what", "required", "measured (quartiles)", "reached", "remarks"], *lines]


def growth_table(found: Sequence[Growth]) -> Table:
    """Table of the fitted exponents."""
    lines = [
        [
            each.op,
            each.provider,
            each.size,
            f"{min(each.values)} to {max(each.values)}",
            f"{each.exponent:.2f}",
            f"{each.flops_exponent:.2f}",
            "yes" if each.passed else "NO",
        ]
        for each in found
    ]
    return [
        ["op", "provider", "size", "range", "exponent", "exponent of minimal flops", "within 0.1"],
        *lines,
    ]


def slower_than_others(result: Result) -> list[str]:
    """Describe in one line each row that is faster than ours; steps without our losses do not count."""
    lines = []
    for row in result.rows:
        times = result.speedup(row) if row.status == OK and row.op != "step" else None
        if times is not None and row.provider != "ours" and times.median < 1:
            lines.append(
                f"{row.op} {row.case} {row.mode}: {row.provider} takes {times.median:.2f} of our time"
            )
    return lines


def _times(result: Result, row: Row | None) -> str:
    times = result.speedup(row) if row is not None else None
    return "-" if times is None else f"{times.median:.2f} ({times.low:.2f} to {times.high:.2f})"


def summary(result: Result) -> Table:
    """Table of forward + backward: our milliseconds, and the times of others over ours in the same rounds.

    The peer is the fastest published package that computes the same and passed the gate.
    """
    table = [["op", "case", "ours, ms", "released", "plain torch", "fastest peer"]]
    for row in result.rows:
        # A growth case may repeat a case; only its first row was timed together with other providers.
        if row.mode != "full" or row is not result.find(row.op, row.case, "full", "ours"):
            continue
        found = {name: result.find(row.op, row.case, "full", name) for name in OPS[row.op].providers}
        peers = [each for name, each in found.items() if each is not None and name in PEERS]
        fastest = min(peers, key=lambda each: each.time.median, default=None)
        others = [_times(result, found.get(name)) for name in ("released", "plain")]
        if fastest is None and set(others) == {"-"}:
            continue
        peer = "-" if fastest is None else f"{_times(result, fastest)} {fastest.provider}"
        table.append([row.op, row.case, _milliseconds(row.time.median), *others, peer])
    return table


def report(result: Result, stem: Path) -> str:
    """Return the Markdown report; draw its plots next to it.

    Args:
        result: The result of a run.
        stem: Path of the report without its suffix; the plots' names begin with it.
    """
    parts = _conditions(result)
    if result.checks:
        parts += ["## Numbers to reach", markdown(checks_table(result.checks))]
    parts += [
        "## Whole passes",
        "Times of others, in units of ours (median of pairs, quartiles).",
        markdown(summary(result)),
    ]
    others = slower_than_others(result)
    parts += [
        "## Where something else is faster",
        "\n".join(f"- {line}" for line in others) if others else "Nowhere in this run.",
    ]
    for path in plots.draw(result, stem):
        parts.append(f"![{path.stem.rsplit('-', 1)[-1]}]({path.name})")
    found = growth(result.rows)
    if found:
        parts += [
            "## Growth",
            "Exponents are fitted to times in units of the canary; the plot is in milliseconds.",
            markdown(growth_table(found)),
        ]
    for op in dict.fromkeys(row.op for row in result.rows):
        parts.append(f"## {OPS[op].title if op in OPS else op}")
        of_op = [row for row in result.rows if row.op == op]
        for (_, case, mode), group in groups(of_op).items():
            parts.append(f"{case}, {mode}:")
            parts.append(markdown([HEADER, *(row_cells(result, row) for row in group)]))
    return "\n\n".join(parts) + "\n"


def _conditions(result: Result) -> list[str]:
    """Title and first paragraphs: the machine, the versions, the method, and whether the machine was busy."""
    environment, ceilings = result.environment, result.ceilings
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    modified = " with changes" if environment["modified"] else ""
    # Results of earlier versions, all float32, have no dtype.
    kind = f", {environment['dtype']}, {environment['precision']} products" if "dtype" in environment else ""
    clock = harness.CpuClock if environment["device_type"] == "cpu" else harness.CudaClock
    noisy = sum(row.noisy for row in result.rows)
    return [
        f"# Benchmarks on {environment['device']}",
        f"{environment['date']}, commit {environment['commit']}{modified}, {environment['threads']} threads{kind}; "
        f"{versions}.",
        f"In the same run this machine reached {ceilings['matmul'] / 1e9:.0f} GFLOP/s in a large product and "
        f"{ceilings['copy'] / 1e9:.1f} GB/s in a large copy. The table gives the minimal work of each op per second in "
        f"percent of that copy, and of a product of {clock.canary_flops / 1e9:.1f} GFLOP timed in the same rounds.",
        "Providers are timed in turn within one run; ratios are taken pair by pair; ms are medians. Errors are those "
        "of value / gradient, relative to the reference in float64, on ordinary features and on features with BERT's "
        "outlier dimensions. A wrong provider is not timed.",
        (
            f"**{noisy} of {len(result.rows)} rows were taken while something else ran on the machine** (marked NOISY)."
            if noisy
            else "The contention canary stayed quiet throughout."
        ),
    ]


def write(result: Result, path: Path) -> Path:
    """Write the report of a result next to its JSON file ``path``; return the Markdown file."""
    target = path.with_suffix(".md")
    write_text(target, report(result, path.with_suffix("")))
    return target
