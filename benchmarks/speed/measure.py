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
from benchmarks.speed.ops import Bound, Op, Provider
from benchmarks.speed.peers import Unavailable
from benchmarks.speed.results import BOUND, OK, UNAVAILABLE, WRONG, Row

_INPUT_SETS = {"cpu": 1, "cuda": 3}

Fields = dict[str, Any]
"""Values for the fields of a ``Row``."""


class Settings(NamedTuple):
    """How to measure."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    seconds: float = 6.0
    """Time for one case in one mode."""
    min_rounds: int = 5
    max_rounds: int = 40
    memory: bool = True
    """Whether to measure peak memory."""

    @property
    def rounded(self) -> bool:
        """Whether products have operands narrower than float32."""
        return self.dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"


class Machine(NamedTuple):
    """The device's clock, and the rates that the device reached in this run."""

    clock: harness.Clock
    ceilings: harness.Ceilings


def _move(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


class Judge:
    """The truths of one case, on ordinary features or on features with outlier dimensions."""

    def __init__(
        self, op: Op, sizes: Sizes, settings: Settings, outliers: bool, truths: Iterable[str]
    ) -> None:
        self.sizes, self.settings = op.gate_sizes(sizes), settings
        drawn = op.make_inputs(self.sizes, 0, outliers)
        self.inputs = _move(drawn, settings.device, settings.dtype)
        # The truth has the same inputs as the contenders, rounded to their dtype.
        exact = _move(self.inputs, settings.device, torch.float64)
        self.discrete = op.discrete
        self.truths = {name: op.truths[name](exact, self.sizes).outcome() for name in truths}

    def verdict(self, provider: Provider) -> Verdict:
        """Judge a provider; one that raises an error is wrong.

        Raises:
            Unavailable: The provider cannot run here.
        """
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


def _judged(op: Op, sizes: Sizes, providers: Mapping[str, Provider], settings: Settings) -> dict[str, Fields]:
    """Judge every provider: the fields of its rows that say whether it is right."""
    truths = {provider.truth for provider in providers.values()}
    judges = [Judge(op, sizes, settings, outliers, truths) for outliers in (False, True)]
    fields: dict[str, Fields] = {}
    for name, provider in providers.items():
        values = fields[name] = {"note": provider.note}
        try:
            ordinary, outlying = (judge.verdict(provider) for judge in judges)
        except Unavailable as error:
            values |= {"status": UNAVAILABLE, "reason": str(error)}
            continue
        values["value_error"], values["gradient_error"] = map(_finite, ordinary.errors)
        values["outlier_value_error"], values["outlier_gradient_error"] = map(_finite, outlying.errors)
        reason = ordinary.reason
        if not reason and provider.ours and outlying.reason:
            reason = f"with outlier dimensions: {outlying.reason}"
        values |= {"status": WRONG if reason else OK, "reason": reason}
        if not reason and judges[0].sizes != sizes:
            judged_at = f"judged at {judges[0].sizes.label(op.size_names)}"
            values["note"] = f"{provider.note}; {judged_at}".lstrip("; ")
    return fields


def measure_case(
    op: Op,
    sizes: Sizes,
    providers: Sequence[str],
    modes: Sequence[str],
    settings: Settings,
    machine: Machine,
) -> list[Row]:
    """Measure one case; every provider has a row for every mode, whether it was timed or not."""
    chosen = {name: op.providers[name] for name in providers}
    fields = _judged(op, sizes, chosen, settings)
    passed = {name: provider for name, provider in chosen.items() if fields[name]["status"] == OK}
    contenders = _contenders(op, sizes, passed, settings)
    timed = dict(contenders)
    if contenders and settings.device.type == "cpu":
        timed |= _contenders(op, sizes, op.bounds, settings)
        fields |= {name: {"note": bound.note, "status": BOUND} for name, bound in op.bounds.items()}
    rows: list[Row] = []
    for mode in modes:
        times = _times(op, sizes, timed, mode, settings, machine)
        for name, of_gate in fields.items():
            values = {**of_gate, **times.get(name, {})}
            if settings.memory and mode == "full" and name in contenders and chosen[name].memory:
                values |= _memory(contenders[name][0], settings.device)
            label = sizes.label(op.size_names)
            rows.append(Row(op.name, label, sizes._asdict(), name, mode, **values))
    return rows


def _times(
    op: Op, sizes: Sizes, timed: Mapping[str, list[Any]], mode: str, settings: Settings, machine: Machine
) -> dict[str, Fields]:
    """Time contenders and bounds in turn: the fields of their rows that hold times and rates."""
    if not timed:
        return {}
    measured = harness.measure(
        {name: [each.timed(mode) for each in sets] for name, sets in timed.items()},
        machine.clock,
        seconds=settings.seconds,
        min_rounds=settings.min_rounds,
        max_rounds=settings.max_rounds,
    )
    canary = measured.canary
    minimum = op.minimum(sizes, mode, settings.dtype)
    fields: dict[str, Fields] = {}
    for name, samples in measured.samples.items():
        values = fields[name] = {
            "samples": samples,
            "noisy": canary.noisy,
            "canary_spread": canary.spread,
            "canary_share": canary.share,
        }
        if name in measured.host:
            values["host_seconds"] = harness.spread(measured.host[name]).median
        if minimum is not None:
            copied = minimum.bytes / harness.spread(samples).median
            values |= {
                "matmul_percent": canary.percent(minimum.flops, samples),
                "copy_percent": 100 * copied / machine.ceilings.copy,
                "minimal_flops": minimum.flops,
            }
    return fields


def _memory(contender: Contender, device: torch.device) -> dict[str, int]:
    gradients = contender.outcome().gradients
    returned = harness.tensor_bytes(gradients)
    del gradients
    return {"peak_bytes": harness.peak_memory(contender.timed("full"), device), "returned_bytes": returned}


def _contenders(
    op: Op, sizes: Sizes, builders: Mapping[str, Provider] | Mapping[str, Bound], settings: Settings
) -> dict[str, list[Any]]:
    sets = range(_INPUT_SETS[settings.device.type])
    inputs = [_move(op.make_inputs(sizes, seed, False), settings.device, settings.dtype) for seed in sets]
    return {name: [each.build(tensors, sizes) for tensors in inputs] for name, each in builders.items()}


def measure_op(
    op: Op,
    cases: Sequence[Sizes],
    settings: Settings,
    machine: Machine,
    *,
    providers: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    report: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Measure an op on its cases.

    Args:
        op: The op.
        cases: Sizes of the cases.
        settings: How to measure.
        machine: The device's clock and its rates in this run.
        providers: Names; None: all of the op's.
        modes: Names; None: all of the op's.
        report: Called with the rows of every finished case.

    Returns:
        All rows.

    Raises:
        ValueError: The op has no such provider or mode.
    """
    names = list(op.providers) if providers is None else list(providers)
    chosen = list(op.modes) if modes is None else list(modes)
    for kind, wanted, available in (("providers", names, op.providers), ("mode", chosen, op.modes)):
        for name in wanted:
            if name not in available:
                raise ValueError(f"{kind}: {op.name} has {', '.join(available)}; got {name!r}")
    rows = []
    for sizes in cases:
        done = measure_case(op, sizes, names, chosen, settings, machine)
        report(done)
        rows += done
    return rows
