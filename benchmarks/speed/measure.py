"""Measures an op: the gate first, then all providers that passed it, timed in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.speed import gate, harness
from benchmarks.speed.contenders import Contender
from benchmarks.speed.gate import Errors, Verdict
from benchmarks.speed.inputs import Inputs, Sizes
from benchmarks.speed.peers import Unavailable
from benchmarks.speed.registry import Bound, Op, Provider
from benchmarks.speed.results import BOUND, OK, UNAVAILABLE, WRONG, Row

_INPUT_SETS = {"cpu": 1, "cuda": 3}


class Settings(NamedTuple):
    """How to measure."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    seconds: float = 6.0
    """Per case and mode, in all."""
    min_rounds: int = 5
    max_rounds: int = 40
    memory: bool = True

    @property
    def rounded(self) -> bool:
        """Whether products have operands narrower than float32."""
        return self.dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"


def _move(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


class Judge:
    """The truths of one case, for ordinary features or for features with outlier dimensions."""

    def __init__(
        self, op: Op, sizes: Sizes, settings: Settings, outliers: bool, truths: Iterable[str]
    ) -> None:
        self.sizes, self.settings = op.gate_sizes(sizes), settings
        drawn = op.make_inputs(self.sizes, 0, outliers)
        self.inputs = _move(drawn, settings.device, settings.dtype)
        # Truth is computed from the numbers that the contenders get, after rounding to their dtype.
        exact = _move(self.inputs, settings.device, torch.float64)
        self.discrete = op.discrete
        self.truths = {name: op.truths[name](exact, self.sizes).outcome() for name in truths}

    def verdict(self, provider: Provider) -> Verdict:
        """Judge a provider; an error it raises is a reason, except that it is unavailable."""
        truth = self.truths[provider.truth]
        try:
            outcome = provider.build(self.inputs, self.sizes).outcome()
        except Unavailable:
            raise
        except Exception as error:  # a peer may raise anything
            return Verdict(Errors(math.inf, math.inf), f"{type(error).__name__}: {error}".splitlines()[0])
        settings = self.settings
        allowed = gate.limit(provider.ours, settings.dtype, settings.rounded, self.discrete)
        return gate.judge(outcome, truth, allowed)


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


def measure_case(
    op: Op,
    sizes: Sizes,
    providers: Sequence[str],
    modes: Sequence[str],
    settings: Settings,
    clock: harness.Clock,
    ceilings: harness.Ceilings,
) -> list[Row]:
    """Measure one case: a row for every provider and mode, also for those that are refused or cannot run."""
    chosen = {name: op.providers[name] for name in providers}
    truths = {provider.truth for provider in chosen.values()}
    judges = [Judge(op, sizes, settings, outliers, truths) for outliers in (False, True)]
    label = sizes.label(op.letters)
    facts: dict[str, dict[str, object]] = {}
    passed: list[str] = []
    for name, provider in chosen.items():
        fact: dict[str, object] = {"note": provider.note}
        facts[name] = fact
        try:
            ordinary, outlying = (judge.verdict(provider) for judge in judges)
        except Unavailable as error:
            fact |= {"status": UNAVAILABLE, "reason": str(error)}
            continue
        fact["value_error"], fact["gradient_error"] = map(_finite, ordinary.errors)
        fact["outlier_value_error"], fact["outlier_gradient_error"] = map(_finite, outlying.errors)
        reason = ordinary.reason
        if not reason and provider.ours and outlying.reason:
            reason = f"with outlier dimensions: {outlying.reason}"
        fact |= {"status": WRONG if reason else OK, "reason": reason}
        if not reason:
            passed.append(name)
            if judges[0].sizes != sizes:
                fact["note"] = f"{provider.note}; judged at {judges[0].sizes.label(op.letters)}".lstrip("; ")
    del judges
    rows: list[Row] = []
    contenders = _contenders(op, sizes, {name: chosen[name] for name in passed}, settings)
    timed = dict(contenders)
    if contenders and settings.device.type == "cpu":
        timed |= _contenders(op, sizes, op.bounds, settings)
        facts |= {name: {"note": bound.note, "status": BOUND} for name, bound in op.bounds.items()}
    for mode in modes:
        samples: harness.Measurement | None = None
        if timed:
            samples = harness.measure(
                {name: [each.timed(mode) for each in sets] for name, sets in timed.items()},
                clock,
                seconds=settings.seconds,
                min_rounds=settings.min_rounds,
                max_rounds=settings.max_rounds,
            )
        minimum = op.minimum(sizes, mode, settings.dtype)
        for name in facts:
            fact = dict(facts[name])
            if name in timed and samples is not None:
                times = samples.samples[name]
                fact |= {
                    "samples": times,
                    "noisy": samples.canary.noisy,
                    "canary_spread": samples.canary.spread,
                    "canary_share": samples.canary.share,
                }
                if name in samples.host:
                    fact["host_seconds"] = harness.spread(samples.host[name]).median
                if minimum is not None:
                    fact |= {
                        "matmul_percent": samples.canary.percent(minimum.flops, times),
                        "copy_percent": 100 * minimum.bytes / harness.spread(times).median / ceilings.copy,
                        "minimal_flops": minimum.flops,
                    }
                if settings.memory and mode == "full" and name in chosen and chosen[name].memory:
                    fact |= _memory(contenders[name][0], settings.device)
            row = Row(op.name, label, sizes._asdict(), name, mode, **fact)  # type: ignore[arg-type]
            rows.append(row)
    return rows


def _memory(contender: Contender, device: torch.device) -> dict[str, int]:
    gradients = contender.outcome().gradients
    returned = harness.tensor_bytes(gradients)
    del gradients
    return {"peak_bytes": harness.peak_memory(contender.timed("full"), device), "returned_bytes": returned}


def _contenders(
    op: Op, sizes: Sizes, builders: Mapping[str, Provider | Bound], settings: Settings
) -> dict[str, list[Any]]:
    sets = range(_INPUT_SETS[settings.device.type])
    inputs = [_move(op.make_inputs(sizes, seed, False), settings.device, settings.dtype) for seed in sets]
    return {name: [each.build(tensors, sizes) for tensors in inputs] for name, each in builders.items()}


def measure_op(
    op: Op,
    cases: Sequence[Sizes],
    settings: Settings,
    clock: harness.Clock,
    ceilings: harness.Ceilings,
    *,
    providers: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    report: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Measure an op on its cases.

    Args:
        op: What to measure.
        cases: Sizes.
        settings: How.
        clock: Of the device.
        ceilings: Of the device, from the same run.
        providers: Names; all of the op's by default.
        modes: Names; all of the op's by default.
        report: Called with the rows of every case as it is done.

    Returns:
        All rows.

    Raises:
        ValueError: A provider or a mode that the op does not have.
    """
    names = list(op.providers) if providers is None else list(providers)
    chosen = list(op.modes) if modes is None else list(modes)
    for kind, given, known in (("providers", names, op.providers), ("mode", chosen, op.modes)):
        for name in given:
            if name not in known:
                raise ValueError(f"{kind}: {op.name} has {', '.join(known)}; got {name!r}")
    rows = []
    for sizes in cases:
        done = measure_case(op, sizes, names, chosen, settings, clock, ceilings)
        report(done)
        rows += done
    return rows
