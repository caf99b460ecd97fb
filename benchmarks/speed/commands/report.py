"""``python -m benchmarks report FILE``: write the Markdown report of a stored result."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed import report, results


def main(argv: Sequence[str]) -> int:
    """Write the report next to its result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report")
    parser.add_argument("file", type=Path, help="a result")
    options = parser.parse_args(argv)
    print(f"wrote {report.write(results.load(options.file), options.file)}")
    return 0
