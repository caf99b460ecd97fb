"""The benchmarks' cases under pytest-benchmark: ``pytest benchmarks/ --benchmark-only [--shapes paper]``."""

from __future__ import annotations

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.speed.inputs import Sizes
from benchmarks.speed.measure import Judge, Settings
from benchmarks.speed.peers import Unavailable
from benchmarks.speed.registry import OPS

_SETTINGS = Settings(torch.device("cpu"))


@functools.lru_cache(maxsize=1)
def _judge(op: str, sizes: Sizes) -> Judge:
    return Judge(OPS[op], sizes, _SETTINGS, False, OPS[op].truths)


def test_speed(benchmark: BenchmarkFixture, benchmark_case: tuple[str, Sizes, str, str]) -> None:
    """Judge the provider, then time it; a wrong provider fails and is not timed."""
    name, sizes, provider_name, mode = benchmark_case
    op = OPS[name]
    provider = op.providers[provider_name]
    try:
        verdict = _judge(name, sizes).verdict(provider)
        contender = provider.build(op.make_inputs(sizes, 0, False), sizes)
    except Unavailable as error:
        pytest.skip(str(error))
    assert verdict.passed, verdict.reason
    timed = contender.timed(mode)
    benchmark.group = f"{name} {sizes.label(op.size_names)} {mode}"
    benchmark.pedantic(timed.call, setup=lambda: ((timed.setup(),), {}), rounds=10, warmup_rounds=1)
