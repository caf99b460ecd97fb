"""``python -m benchmarks OP[,OP]`` and ``python -m benchmarks --check``: measure ops, or the performance targets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import benchmarks
from benchmarks.speed import checks, results
from benchmarks.speed.registry import OPS
from benchmarks.speed.results import WRONG
from benchmarks.speed.run import Run, add_settings, print_comparison


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=benchmarks.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("op", nargs="?", default="all", help=f"some of {', '.join(OPS)}, or all")
    parser.add_argument("--providers", help="comma-separated (default: all of the op's)")
    parser.add_argument("--without", help="comma-separated providers to leave out")
    parser.add_argument("--mode", help="comma-separated: forward, backward, full")
    parser.add_argument("--shapes", choices=("paper", "small", "growth"), default="paper")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 if a result is wrong or a target is missed"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="list the times that changed since an earlier result"
    )
    add_settings(parser)
    return parser


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _chosen_ops(text: str) -> list[str]:
    chosen = list(OPS) if text == "all" else _names(text) or []
    for name in chosen:
        if name not in OPS:
            raise ValueError(f"OP: expected some of {', '.join(OPS)}, or all; got {name!r}")
    return chosen


def measure_needed(run: Run, needed_rows: Sequence[checks.Needed]) -> None:
    """Measure the rows that checks need."""
    for needed in needed_rows:
        rounds = max(run.settings.min_rounds, needed.rounds)
        settings = run.settings._replace(min_rounds=rounds)
        run.measure(OPS[needed.op], needed.cases, needed.providers, ["full"], settings)


def _measure_ops(run: Run, names: Sequence[str]) -> None:
    options = run.options
    providers = ["ours"] if options.providers is None and options.shapes == "growth" else None
    providers = _names(options.providers) or providers
    left_out = _names(options.without) or []
    modes = _names(options.mode)
    for name in names:
        op = OPS[name]
        of_op = [provider for provider in providers or op.providers if provider not in left_out]
        of_modes = modes
        if modes is not None and len(names) > 1:
            # Several ops need not have the same modes; a single op must have every mode that is named.
            of_modes = [mode for mode in modes if mode in op.modes]
        run.measure(op, op.shapes[options.shapes], of_op, of_modes)
        if options.json is not None:
            # Keep what is measured so far, in case the run is interrupted.
            results.save(run.result, options.json)


def main(argv: Sequence[str]) -> int:
    """Measure; return 1 if ``--check`` finds a wrong result, a missed target, or a target without measurements."""
    options = _parser().parse_args(argv)
    chosen = _chosen_ops(options.op)
    run = Run(options)
    all_targets = options.check and options.op == "all"
    if all_targets:
        measure_needed(run, checks.NEEDED)
    else:
        _measure_ops(run, chosen)
    if options.check:
        run.check()
    if options.json is not None:
        run.save(options.json)
    if options.compare is not None:
        print_comparison(results.load(options.compare), run.result)
    return exit_status(run, all_targets) if options.check else 0


def exit_status(run: Run, all_targets: bool) -> int:
    """1 if a row is wrong or a target missed or, with ``all_targets``, not measured; else 0."""
    wrong = any(row.status == WRONG for row in run.result.rows)
    failed = any(check.passed is False for check in run.result.checks)
    missing = all_targets and any(check.passed is None for check in run.result.checks)
    return int(wrong or failed or missing)
