"""Plots of a result: ratios to ours, growth of time with each size, and our ops under the machine's roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed.growth import Growth, growth
from benchmarks.speed.harness import Spread
from benchmarks.speed.results import OK, Result, Row


def draw(result: Result, stem: Path) -> list[Path]:
    """Draw the plots that the result has rows for; return their files, ``<stem>-<plot>.png``."""
    import matplotlib

    matplotlib.use("Agg")
    bars = _ratios(result)
    found = growth(result.rows)
    roofline = [
        row
        for row in result.rows
        if (row.status, row.mode, row.provider) == (OK, "full", "ours")
        and row.minimal_flops
        and row.copy_percent
        and row.matmul_percent
    ]
    drawn = []
    if bars:
        _draw_ratios(bars)
        drawn.append(_save(stem, "ratios"))
    if found:
        _draw_growth(found)
        drawn.append(_save(stem, "growth"))
    if roofline:
        _draw_roofline(roofline, result.ceilings["matmul"], result.ceilings["copy"])
        drawn.append(_save(stem, "roofline"))
    return drawn


def _save(stem: Path, name: str) -> Path:
    from matplotlib import pyplot

    path = stem.with_name(f"{stem.name}-{name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close()
    return path


def _ratios(result: Result) -> list[tuple[str, Spread]]:
    bars = []
    for row in result.rows:
        times = result.speedup(row) if row.status == OK and row.mode == "full" else None
        if times is not None and row.provider != "ours":
            bars.append((f"{row.op} {row.case}  {row.provider}", times))
    return bars


def _draw_ratios(bars: Sequence[tuple[str, Spread]]) -> None:
    from matplotlib import pyplot, ticker

    pyplot.figure(figsize=(9, 1 + 0.26 * len(bars)))
    middle = [times.median for _, times in bars]
    spread = [
        [times.median - times.low for _, times in bars],
        [times.high - times.median for _, times in bars],
    ]
    colours = ["#4477aa" if times.median >= 1 else "#ee6677" for _, times in bars]
    # Bars start at 1 on a logarithmic axis: twice and half as long have the same length, and large ratios leave room.
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
    pyplot.xlabel("forward + backward, in units of ours (median of pairs, quartiles)\nred: faster than ours")


def _draw_growth(found: Sequence[Growth]) -> None:
    from matplotlib import pyplot

    names = list(dict.fromkeys(each.size for each in found))
    lines = list(dict.fromkeys((each.op, each.provider) for each in found))
    _, panels = pyplot.subplots(1, len(names), figsize=(1 + 3.2 * len(names), 4), squeeze=False, sharey=True)
    for panel, size in zip(panels[0], names, strict=True):
        of_size = [each for each in found if each.size == size]
        for each in of_size:
            label = f"{each.op} {each.provider}: {each.exponent:.2f} (flops {each.flops_exponent:.2f})"
            colour = f"C{lines.index((each.op, each.provider))}"
            panel.loglog(each.values, [s * 1e3 for s in each.seconds], "o-", color=colour, label=label)
        values = sorted({value for each in of_size for value in each.values})
        panel.set_xticks(values, [str(value) for value in values], fontsize=7)
        panel.set_xticks([], minor=True)
        panel.set_xlabel(size)
        panel.legend(fontsize=6)
    panels[0][0].set_ylabel("forward + backward, ms")


def _draw_roofline(rows: Sequence[Row], matmul: float, copy: float) -> None:
    from matplotlib import pyplot

    pyplot.figure(figsize=(7, 5))
    for op in dict.fromkeys(row.op for row in rows):
        of_op = [row for row in rows if row.op == op]
        rates = [(row.minimal_flops or 0) / row.time.median for row in of_op]
        moved = [(row.copy_percent or 0) / 100 * copy for row in of_op]
        pyplot.loglog([a / b for a, b in zip(rates, moved, strict=True)], rates, "o", label=op)
    lowest, highest = pyplot.xlim()
    edge = matmul / copy
    xs = [min(lowest, edge / 4), edge, max(highest, edge * 4)]
    pyplot.loglog(xs, [min(matmul, x * copy) for x in xs], color="black", label="this machine")
    pyplot.xlabel("minimal flops per minimal byte")
    pyplot.ylabel("minimal flops per second")
    pyplot.legend(fontsize=8)
