"""A result as text for the terminal, and as a Markdown report with plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed import harness
from benchmarks.speed.growth import Growth, growth
from benchmarks.speed.peers import CKA_PEERS, KMEANS_PEERS
from benchmarks.speed.registry import OPS
from benchmarks.speed.results import BOUND, OK, CheckResult, Result, Row, write_text

Table = list[list[str]]

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
    """One line of a case's table; a row that was not timed says why."""
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


def aligned(table: Table) -> str:
    """Columns padded to their widest cell."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)
    return "\n".join(line.rstrip() for line in lines)


def markdown(table: Table) -> str:
    """A Markdown table; the first line is its header."""
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def groups(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by (op, case, mode), in their order."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.op, row.case, row.mode), []).append(row)
    return found


def text(result: Result, rows: Sequence[Row]) -> str:
    """Tables for the terminal."""
    parts = []
    for (op, case, mode), group in groups(rows).items():
        table = [HEADER, *(row_cells(result, row) for row in group)]
        parts.append(f"{op} {case} {mode}\n{aligned(table)}")
    return "\n\n".join(parts)


def checks_table(checks: Sequence[CheckResult]) -> Table:
    """The table of numbers to reach."""
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
    """Fitted exponents."""
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
    """Where something else is faster than ours."""
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
    """Whole passes of our ops: milliseconds, and how many times as long others take in the same rounds.

    The peer is the fastest of those that compute the same thing and passed the gate.
    """
    table = [["op", "case", "ours, ms", "released", "plain torch", "fastest peer"]]
    for row in result.rows:
        # A case that growth measures again is compared with others where it came first.
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


def _plots(result: Result, stem: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    drawn: list[Path] = []

    def finish(name: str) -> None:
        path = stem.with_name(f"{stem.name}-{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        pyplot.tight_layout()
        pyplot.savefig(path, dpi=110, bbox_inches="tight")
        pyplot.close()
        drawn.append(path)

    bars = []
    for row in result.rows:
        times = result.speedup(row) if row.status == OK and row.mode == "full" else None
        if times is not None and row.provider != "ours":
            bars.append((f"{row.op} {row.case}  {row.provider}", times))
    if bars:
        pyplot.figure(figsize=(9, 1 + 0.26 * len(bars)))
        middle = [times.median for _, times in bars]
        spread = [
            [times.median - times.low for _, times in bars],
            [times.high - times.median for _, times in bars],
        ]
        colours = ["#4477aa" if times.median >= 1 else "#ee6677" for _, times in bars]
        # From 1, twice as long and half as long look alike; one that takes hundreds of times as long hides no other.
        lengths = [each - 1 for each in middle]
        pyplot.barh(range(len(bars)), lengths, left=1, xerr=spread, height=0.7, color=colours)
        pyplot.xscale("log")
        axis = pyplot.gca().xaxis
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(ticker.NullFormatter())
        pyplot.yticks(range(len(bars)), [name for name, _ in bars], fontsize=7)
        pyplot.ylim(len(bars) - 0.4, -0.6)
        pyplot.axvline(1, color="black", linewidth=0.8)
        pyplot.xlabel(
            "forward + backward, in units of ours (median of pairs, quartiles)\nred: faster than ours"
        )
        finish("ratios")
    found = growth(result.rows)
    if found:
        names = list(dict.fromkeys(each.size for each in found))
        lines = list(dict.fromkeys((each.op, each.provider) for each in found))
        _, panels = pyplot.subplots(
            1, len(names), figsize=(1 + 3.2 * len(names), 4), squeeze=False, sharey=True
        )
        for panel, size in zip(panels[0], names, strict=True):
            for each in found:
                if each.size == size:
                    label = (
                        f"{each.op} {each.provider}: {each.exponent:.2f} (flops {each.flops_exponent:.2f})"
                    )
                    colour = f"C{lines.index((each.op, each.provider))}"
                    panel.loglog(
                        each.values, [s * 1e3 for s in each.seconds], "o-", color=colour, label=label
                    )
            values = sorted({value for each in found if each.size == size for value in each.values})
            panel.set_xticks(values, [str(value) for value in values], fontsize=7)
            panel.set_xticks([], minor=True)
            panel.set_xlabel(size)
            panel.legend(fontsize=6)
        panels[0][0].set_ylabel("forward + backward, ms")
        finish("growth")
    roofline = [
        row for row in result.rows if row.status == OK and row.mode == "full" and row.provider == "ours"
    ]
    roofline = [row for row in roofline if row.minimal_flops and row.copy_percent and row.matmul_percent]
    if roofline:
        peak, copy = result.ceilings["matmul"], result.ceilings["copy"]
        pyplot.figure(figsize=(7, 5))
        for op in dict.fromkeys(row.op for row in roofline):
            own = [row for row in roofline if row.op == op]
            rates = [(row.minimal_flops or 0) / row.time.median for row in own]
            moved = [(row.copy_percent or 0) / 100 * copy for row in own]
            pyplot.loglog([a / b for a, b in zip(rates, moved, strict=True)], rates, "o", label=op)
        lowest, highest = pyplot.xlim()
        edge = peak / copy
        xs = [min(lowest, edge / 4), edge, max(highest, edge * 4)]
        pyplot.loglog(xs, [min(peak, x * copy) for x in xs], color="black", label="this machine")
        pyplot.xlabel("minimal flops per minimal byte")
        pyplot.ylabel("minimal flops per second")
        pyplot.legend(fontsize=8)
        finish("roofline")
    return drawn


def report(result: Result, stem: Path) -> str:
    """Return the Markdown report and draw its plots next to it.

    Args:
        result: What was measured.
        stem: Path of the report without its suffix; plots are named after it.
    """
    environment = result.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    modified = " with changes" if environment["modified"] else ""
    # Files of earlier versions do not say; they are float32's.
    clock = harness.CpuClock if environment["device_type"] == "cpu" else harness.CudaClock
    kind = f", {environment['dtype']}, {environment['precision']} products" if "dtype" in environment else ""
    noisy = sum(row.noisy for row in result.rows)
    parts = [
        f"# Benchmarks on {environment['device']}",
        f"{environment['date']}, commit {environment['commit']}{modified}, {environment['threads']} threads{kind}; "
        f"{versions}.",
        f"In the same run this machine reached {result.ceilings['matmul'] / 1e9:.0f} GFLOP/s in a large product and "
        f"{result.ceilings['copy'] / 1e9:.1f} GB/s in a large copy. Percentages are of that copy, and of a product of "
        f"{clock.canary_flops / 1e9:.1f} GFLOP timed in the same rounds, for the minimal work of each op.",
        "Providers are timed in turn within one run; ratios are taken pair by pair; ms are medians. Errors are of "
        "value / gradient, relative to the reference in float64, on ordinary features and on features with BERT's "
        "outlier dimensions. What is wrong is not timed.",
        (
            f"**{noisy} of {len(result.rows)} rows were taken while something else ran on the machine** (marked NOISY)."
            if noisy
            else "The contention canary stayed quiet throughout."
        ),
    ]
    if result.checks:
        parts += ["## Numbers to reach", markdown(checks_table(result.checks))]
    parts += [
        "## Whole passes",
        "Times others take, in units of ours (median of pairs, quartiles).",
        markdown(summary(result)),
    ]
    others = slower_than_others(result)
    parts += [
        "## Where something else is faster",
        "\n".join(f"- {line}" for line in others) if others else "Nowhere in this run.",
    ]
    for path in _plots(result, stem):
        parts.append(f"![{path.stem.rsplit('-', 1)[-1]}]({path.name})")
    found = growth(result.rows)
    if found:
        parts += [
            "## Growth",
            "Exponents are of times in units of the canary, the plot is in milliseconds.",
            markdown(growth_table(found)),
        ]
    for op in dict.fromkeys(row.op for row in result.rows):
        parts.append(f"## {OPS[op].title if op in OPS else op}")
        own = [row for row in result.rows if row.op == op]
        for (_, case, mode), group in groups(own).items():
            parts.append(f"{case}, {mode}:")
            parts.append(markdown([HEADER, *(row_cells(result, row) for row in group)]))
    return "\n\n".join(parts) + "\n"


def write(result: Result, path: Path) -> Path:
    """Write the report of a result next to its JSON file ``path``; returns the Markdown file."""
    target = path.with_suffix(".md")
    write_text(target, report(result, path.with_suffix("")))
    return target
