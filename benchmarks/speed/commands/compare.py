"""``python -m benchmarks compare A B``: list the times that changed by more than the spread."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed import results
from benchmarks.speed.run import print_comparison


def main(argv: Sequence[str]) -> int:
    """Print the comparison of two results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(argv)
    print_comparison(results.load(options.before), results.load(options.after))
    return 0
