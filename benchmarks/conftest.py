"""Options and cases of ``pytest benchmarks/ --benchmark-only``, the same cases as ``python -m benchmarks``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --shapes and --ops."""
    group = parser.getgroup("fsd_fast benchmarks")
    group.addoption(
        "--shapes", choices=("paper", "small"), default="small", help="which shapes (default small)"
    )
    group.addoption("--ops", default="", help="comma-separated; all by default")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test for every op, case, mode and provider."""
    from benchmarks.speed.registry import OPS

    if "benchmark_case" not in metafunc.fixturenames:
        return
    shapes = metafunc.config.getoption("shapes")
    chosen = [name for name in metafunc.config.getoption("ops").split(",") if name] or list(OPS)
    cases = [
        (op, sizes, provider, mode)
        for op in chosen
        for sizes in OPS[op].shapes[shapes]
        for mode in OPS[op].modes
        for provider in OPS[op].providers
    ]
    names = [
        f"{op}-{sizes.label(OPS[op].size_names)}-{mode}-{provider}" for op, sizes, provider, mode in cases
    ]
    metafunc.parametrize("benchmark_case", cases, ids=[name.replace(" ", ",") for name in names])
