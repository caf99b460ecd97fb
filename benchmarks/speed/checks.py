"""The performance targets on a CPU, as checks on the rows of one run.

A check whose rows were not measured neither passes nor fails and names the missing rows. Ratios are medians over the
rounds, printed with their quartiles. "The best peer" is the fastest peer that the gate accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.speed.growth import growth
from benchmarks.speed.harness import Spread, ratio
from benchmarks.speed.inputs import LETTERS, Sizes
from benchmarks.speed.peers import CKA_PEERS
from benchmarks.speed.registry import OPS
from benchmarks.speed.results import WRONG, CheckResult, Result, Row

GROWTH_OPS = ("intra", "local", "global", "fsd_ilg")


class Needed(NamedTuple):
    """Rows that the checks need: the op's cases with these providers, forward and backward."""

    op: str
    cases: tuple[Sizes, ...]
    providers: tuple[str, ...]
    rounds: int = 0
    """Smallest number of rounds; 0: the run's own setting."""


_BASE = Sizes(32, 128, 768, 100)
_BERT, _MINILM = _BASE, Sizes(32, 128, 384, 100)

NEEDED: tuple[Needed, ...] = (
    Needed("intra", (_BASE,), ("ours", "released", "plain", *CKA_PEERS)),
    Needed("local", (_BASE,), ("ours", "released", "plain", *CKA_PEERS)),
    Needed("global", (_BASE, _BASE._replace(centroids=300)), ("ours", "released")),
    Needed("fsd_ilg", (_BASE,), ("ours", "released")),
    # A step's time spreads by more than the 5 % of its target: its median needs many rounds, or long ones.
    Needed("step", (_MINILM,), ("ours", "vkd-only", "released", "released-teacher-grad"), 20),
    Needed("step", (_BERT,), ("ours", "vkd-only", "released", "released-teacher-grad"), 7),
    *(Needed(op, tuple(OPS[op].shapes["growth"]), ("ours",)) for op in GROWTH_OPS),
)

Check = Callable[[Result], CheckResult]


def _case(op: str, sizes: Sizes) -> str:
    return sizes.label(OPS[op].size_names)


def _text(value: Spread, row: Row) -> str:
    # Three decimals: 1.054 must not be printed as 1.05 where the target is 1.05.
    return f"{value.median:.3f}x ({value.low:.2f} to {value.high:.2f}; {len(row.samples)} rounds)"


def _missing(name: str, required: str, what: str) -> CheckResult:
    return CheckResult(name, required, "", None, reason=f"not measured: {what}")


def _ratio_of(slower: Row, faster: Row) -> Spread | None:
    return ratio(slower.samples, faster.samples) if len(slower.samples) == len(faster.samples) else None


def _at_least(name: str, op: str, sizes: Sizes, against: Sequence[str], factor: float) -> Check:
    """Ours is at least ``factor`` times faster than the fastest of ``against``."""
    required = f"at least {factor:g}x"

    def evaluate(result: Result) -> CheckResult:
        case = _case(op, sizes)
        ours = result.find(op, case, "full", "ours")
        others = [result.find(op, case, "full", other) for other in against]
        present = [row for row in others if row is not None]
        if ours is None or not present:
            return _missing(name, required, f"{op} {case}: ours and {' or '.join(against)}")
        best = min(present, key=lambda row: row.time.median)
        value = _ratio_of(best, ours)
        if value is None:
            return _missing(name, required, f"{op} {case} in one run")
        reason = f"against {best.provider}" if len(against) > 1 else ""
        return CheckResult(name, required, _text(value, ours), value.median >= factor, ours.noisy, reason)

    return evaluate


def _at_most_slower(name: str, sizes: Sizes, against: str, factor: float) -> Check:
    """Our whole step takes at most ``factor`` times as long as the step ``against``."""
    required = f"at most {factor:g}x its time"

    def evaluate(result: Result) -> CheckResult:
        case = _case("step", sizes)
        ours, other = (result.find("step", case, "full", provider) for provider in ("ours", against))
        value = None if ours is None or other is None else _ratio_of(ours, other)
        if ours is None or value is None:
            return _missing(name, required, f"step {case}: ours and {against}")
        return CheckResult(name, required, _text(value, ours), value.median <= factor, ours.noisy)

    return evaluate


def _matmul_percent(name: str, op: str, sizes: Sizes, percent: float) -> Check:
    required = f"at least {percent:g} % of the machine's own product rate"

    def evaluate(result: Result) -> CheckResult:
        case = _case(op, sizes)
        ours = result.find(op, case, "full", "ours")
        if ours is None or ours.matmul_percent is None:
            return _missing(name, required, f"{op} {case}: ours")
        value = ours.matmul_percent
        time = ours.time
        low, high = value * time.median / time.high, value * time.median / time.low
        bound = result.bound(op, case, "full")
        limit = None if bound is None else bound.matmul_percent
        reason = "" if limit is None else f"its products alone: {limit:.0f} %"
        return CheckResult(
            name, required, f"{value:.0f} % ({low:.0f} to {high:.0f})", value >= percent, ours.noisy, reason
        )

    return evaluate


def _memory(name: str, op: str, sizes: Sizes, factor: float) -> Check:
    required = f"at most {factor:g} times the gradients it returns"

    def evaluate(result: Result) -> CheckResult:
        case = _case(op, sizes)
        ours = result.find(op, case, "full", "ours")
        if ours is None or ours.peak_bytes is None or not ours.returned_bytes:
            return _missing(name, required, f"{op} {case}: peak memory of ours")
        value = ours.peak_bytes / ours.returned_bytes
        measured = f"{value:.2f}x ({ours.peak_bytes / 1e6:.1f} of {ours.returned_bytes / 1e6:.1f} MB)"
        return CheckResult(name, required, measured, value <= factor)

    return evaluate


def _growth(op: str) -> Check:
    name, required = f"growth of {op}", "exponents within 0.1 of the minimal flops'"

    def evaluate(result: Result) -> CheckResult:
        found = growth([row for row in result.rows if row.op == op and row.provider == "ours"])
        if not found:
            return _missing(name, required, f"{op} with --shapes growth")
        measured = ", ".join(
            f"{LETTERS[each.size]} {each.exponent:.3f} (flops {each.flops_exponent:.3f})" for each in found
        )
        noisy = any(row.noisy for row in result.rows if row.op == op and row.provider == "ours")
        return CheckResult(name, required, measured, all(each.passed for each in found), noisy)

    return evaluate


CHECKS: tuple[Check, ...] = (
    _at_least("L_I against the released formulation", "intra", _BASE, ("released",), 5.5),
    _at_least("L_I against the best peer", "intra", _BASE, CKA_PEERS, 1.4),
    _matmul_percent("L_I against the machine", "intra", _BASE, 85),
    _at_least("L_L against the released formulation", "local", _BASE, ("released",), 3.2),
    _at_least("L_L against the best peer", "local", _BASE, CKA_PEERS, 1.35),
    _at_least("L_G, K=100, against the released formulation", "global", _BASE, ("released",), 4),
    _at_least(
        "L_G, K=300, against the released formulation",
        "global",
        _BASE._replace(centroids=300),
        ("released",),
        5,
    ),
    _at_least("FSD_ILG, K=100, against the released formulation", "fsd_ilg", _BASE, ("released",), 5),
    _memory("extra memory of FSD_ILG, K=100", "fsd_ilg", _BASE, 1.3),
    *(
        check
        for name, sizes in (("BERT-base", _BERT), ("MiniLM", _MINILM))
        for check in (
            _at_most_slower(f"whole step, {name}, against VKD alone", sizes, "vkd-only", 1.05),
            _at_most_slower(
                f"whole step, {name}, against released, teacher gradients off", sizes, "released", 1.0
            ),
            _at_least(
                f"whole step, {name}, against released, teacher gradients on",
                "step",
                sizes,
                ("released-teacher-grad",),
                1.6,
            ),
        )
    ),
    *(_growth(op) for op in GROWTH_OPS),
)
"""One check for each performance target."""


def evaluate(result: Result, targets: Sequence[Check] = CHECKS) -> list[CheckResult]:
    """Check a result against the targets; each provider that the gate refused is one more failed check."""
    refused = [
        CheckResult(
            f"gate: {row.op} {row.case} {row.provider}",
            "value and gradient right",
            "wrong",
            False,
            reason=row.reason,
        )
        for row in {(row.op, row.case, row.provider): row for row in result.rows}.values()
        if row.status == WRONG
    ]
    return [*refused, *(check(result) for check in targets)]
