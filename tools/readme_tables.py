"""The README's tables of figures, from the stored results: ``python -m tools.readme_tables`` prints them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.speed import report, results
from fsd_fast.commands.demo import results_table

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "docs" / "results" / "demo.json"
CPU = ROOT / "benchmarks" / "results" / "intel-r-xeon-r-processor-2-threads" / "2026-11-26-97fc364.json"
GPU = ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3" / "2026-11-27-c6d88d5-bf16.json"

_SHAPE = "B=32 S=128 D=768"
_NAMES = {
    ("intra", _SHAPE): "L_I",
    ("local", _SHAPE): "L_L",
    ("global", f"{_SHAPE} K=100"): "L_G",
    ("fsd_ilg", f"{_SHAPE} K=100"): "L_I + L_L + L_G",
    ("kmeans", "N=1024 S=128 D=768 K=100"): "k-means, K = 100",
    ("kmeans", "N=1024 S=128 D=768 K=300"): "k-means, K = 300",
    ("step", f"{_SHAPE} K=100"): "training step",
}
"""(op, case) of the benchmarks -> its name in the README."""


def demo_table() -> str:
    """The demo's table."""
    return results_table(json.loads(DEMO.read_text(encoding="utf-8"))["rows"])


def speed_table(path: Path) -> str:
    """Milliseconds of ours at the paper's shape, and how many times as long others take.

    Args:
        path: A stored result of the benchmarks.
    """
    lines = ["| | fsd_fast | released code | plain torch | fastest package |", "|---|---|---|---|---|"]
    for op, case, ours, *others in report.summary(results.load(path))[1:]:
        if (op, case) in _NAMES:
            cells = " | ".join(_short(other) for other in others)
            lines.append(f"| {_NAMES[op, case]} | {ours} ms | {cells} |")
    return "\n".join(lines)


def _short(times: str) -> str:
    """Shorten "7.23 (7.09 to 8.54)" to "7.2x", with the package's name where there is one."""
    if times == "-":
        return "-"
    ratio, _, rest = times.partition(" (")
    package = rest.partition(") ")[2]
    return f"{float(ratio):.1f}x{f' ({package})' if package else ''}"


def tables() -> dict[str, str]:
    """Return name -> table as Markdown."""
    return {"demo": demo_table(), "CPU": speed_table(CPU), "GPU": speed_table(GPU)}


def main() -> None:
    """Print the tables."""
    for name, table in tables().items():
        sys.stdout.write(f"{name}\n\n{table}\n\n")


if __name__ == "__main__":
    main()
