"""The benchmark harness: its gate, its statistics, its canary, its files and its table of numbers to reach."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks.memory import command as memory
from benchmarks.speed import checks, gate, harness, kernel_times, registry, report, results
from benchmarks.speed.contenders import LossContender, Outcome
from benchmarks.speed.growth import fitted_exponent, growth
from benchmarks.speed.harness import Canary, Timed
from benchmarks.speed.inputs import Inputs, Sizes
from benchmarks.speed.measure import Settings, measure_op
from benchmarks.speed.peers import CKA_PEERS, Unavailable
from benchmarks.speed.registry import OPS, Op, Provider
from benchmarks.speed.results import BOUND, OK, UNAVAILABLE, WRONG, CheckResult, Result, Row
from fsd_kernels.intra_cka import reference as intra_reference
from fsd_kernels.structure import reference as structure_reference

CPU = torch.device("cpu")
SMALL = Sizes(8, 16, 32, 6)
QUICK = Settings(CPU, seconds=0.0, min_rounds=2)


class ScriptedClock:
    """A clock that runs nothing and remembers in which order it was asked."""

    canary_flops = 1000
    shortest = 5e-3

    def __init__(self, canary: Iterator[tuple[float, float]] | None = None) -> None:
        self.order: list[str] = []
        self._canary = canary

    def time(self, timed: Timed, repeats: int) -> float:
        result = timed.call(None)
        assert isinstance(result, tuple)
        self.order.append(result[0])
        return float(result[1])

    def canary(self) -> tuple[float, float]:
        self.order.append("canary")
        return (1.0, 1.0) if self._canary is None else next(self._canary)


def scripted(name: str, seconds: Callable[[], float]) -> list[Timed]:
    return [Timed(lambda: None, lambda _: (name, seconds()))]


# ---------------------------------------------------------------------------------------------- timing


def test_providers_are_timed_in_turn_after_a_warm_up() -> None:
    clock = ScriptedClock()
    contestants = {name: scripted(name, lambda: 1.0) for name in "AB"}
    measured = harness.measure(contestants, clock, seconds=0, min_rounds=3)  # type: ignore[arg-type]
    warm_up = ["A", "B"]
    assert clock.order == [*warm_up, "canary", "A", "B", "canary", "B", "A", "canary", "A", "B"]
    assert {name: len(samples) for name, samples in measured.samples.items()} == {"A": 3, "B": 3}


def test_a_short_call_is_preceded_by_an_untimed_one() -> None:
    times = iter([0.4, 0.4, *[9.0, 0.4] * 3])
    clock = ScriptedClock()
    contestants = {"short": scripted("short", lambda: next(times)), "long": scripted("long", lambda: 0.6)}
    measured = harness.measure(contestants, clock, seconds=0, min_rounds=3)  # type: ignore[arg-type]
    in_turn = ["canary", "short", "short", "long"], ["canary", "long", "short", "short"]
    assert clock.order[:3] == ["short", "short", "long"]
    assert clock.order[3:] == [*in_turn[0], *in_turn[1], *in_turn[0]]
    assert measured.samples == {"short": [0.4] * 3, "long": [0.6] * 3}


def test_the_warm_up_is_not_among_the_samples() -> None:
    times = iter([100.0, 1.0, 1.0, 1.0])
    clock = ScriptedClock()
    measured = harness.measure({"A": scripted("A", lambda: next(times))}, clock, seconds=0, min_rounds=3)  # type: ignore[arg-type]
    assert measured.samples["A"] == [1.0, 1.0, 1.0]


def test_only_the_call_is_timed() -> None:
    clock = harness.CpuClock()
    slow_setup = Timed(lambda: time.sleep(0.05), lambda _: None)
    slow_call = Timed(lambda: None, lambda _: time.sleep(0.05))
    assert clock.time(slow_setup, 1) < 0.04
    assert clock.time(slow_call, 2) >= 0.05


def test_input_sets_are_rotated() -> None:
    clock = ScriptedClock()
    sets = [scripted(name, lambda: 1.0)[0] for name in ("one", "two")]
    harness.measure({"A": sets}, clock, seconds=0, min_rounds=4)  # type: ignore[arg-type]
    assert [name for name in clock.order[3:] if name != "canary"] == ["one", "two", "one", "two"]


def test_ratios_are_taken_pair_by_pair() -> None:
    # The machine slows down during the run: medians of each list would hide that every pair has ratio 2 or 3.
    faster = [1.0, 10.0, 100.0, 1.0, 10.0]
    slower = [2.0, 20.0, 200.0, 3.0, 30.0]
    assert harness.ratio(slower, faster) == (2.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="faster: expected 5 samples"):
        harness.ratio(slower, faster[:3])


def test_spread_is_median_and_quartiles() -> None:
    assert harness.spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0)
    assert harness.spread([7.0]) == (7.0, 7.0, 7.0)
    assert harness.spread([5.0, 1.0, 3.0, 2.0, 4.0]).relative == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least one"):
        harness.spread([])


@pytest.mark.parametrize(
    ("seconds", "shares", "noisy"),
    [
        ([1.0, 1.01, 0.99, 1.0, 1.02], [1.0] * 5, False),
        ([1.0, 1.5, 1.0, 1.4, 1.0], [1.0] * 5, True),
        ([1.0] * 5, [0.6, 0.55, 1.0, 0.5, 0.6], True),
        ([], [], False),
    ],
)
def test_canary_sees_contention(seconds: list[float], shares: list[float], noisy: bool) -> None:
    assert Canary(seconds, shares).noisy is noisy


def test_product_rates_are_compared_round_by_round() -> None:
    # 500 flops in the time of the canary's 1000 are half of its rate, however fast a round is.
    canary = Canary([1.0, 3.0, 2.0], [1.0] * 3, 1000)
    assert canary.percent(500, [1.0, 3.0, 2.0]) == pytest.approx(50)
    assert canary.percent(500, [2.0, 3.0, 1.0]) == pytest.approx(50)
    assert canary.percent(500, [2.0, 6.0, 4.0]) == pytest.approx(25)


def test_a_noisy_run_is_marked() -> None:
    noise = iter([(1.0, 1.0), (2.0, 0.5)] * 10)
    quiet = iter([(1.0, 1.0)] * 20)
    for canary, expected in ((noise, True), (quiet, False)):
        clock = _RealTimeScriptedCanary(canary)
        op = OPS["intra"]
        rows = measure_op(
            op, [SMALL], QUICK, clock, harness.Ceilings(1e9, 1e9), providers=["ours"], modes=["full"]
        )
        assert [row.noisy for row in rows] == [expected, expected]
        assert ("NOISY" in report.text(_result(rows), rows)) is expected


class _RealTimeScriptedCanary(harness.CpuClock):
    def __init__(self, canary: Iterator[tuple[float, float]]) -> None:
        super().__init__()
        self._scripted = canary

    def canary(self) -> tuple[float, float]:
        return next(self._scripted)


def test_peak_memory_counts_temporaries_and_results() -> None:
    x = torch.ones(1000, 250)  # 1 MB

    def call(_: object) -> Tensor:
        first = x + 1
        second = first + 1
        del first
        return second + 1  # two live at once, three allocated in all

    assert harness.peak_memory(Timed(lambda: None, call), CPU) == pytest.approx(2e6, rel=0.01)


def test_ceilings_are_rates() -> None:
    found = harness.ceilings(CPU, harness.CpuClock(), size=256)
    assert found.matmul > 1e8
    assert found.copy > 1e7


# ------------------------------------------------------------------------------------------------ gate


def _op_with(**providers: Provider) -> Op:
    op = OPS["intra"]
    return dataclasses.replace(op, providers={**op.providers, **providers})


class _Wrong:
    """Our own contender with its value or its gradient changed."""

    def __init__(self, inputs: Inputs, value: float, gradient: float) -> None:
        from fsd_fast.losses import IntraFeatureLoss

        module = IntraFeatureLoss()
        self._inner = LossContender(lambda t: module(t["student"], t["teacher"]), inputs, ("student",))
        self._value, self._gradient = value, gradient
        self.calls = 0

    def outcome(self) -> Outcome:
        value, gradients = self._inner.outcome()
        return Outcome(value * self._value, tuple(g * self._gradient for g in gradients))

    def timed(self, mode: str) -> Timed:
        raise AssertionError("a wrong provider was timed")


def _wrong(value: float = 1.0, gradient: float = 1.0, ours: bool = False) -> Provider:
    return Provider(lambda inputs, _: _Wrong(inputs, value, gradient), ours=ours)


@pytest.mark.parametrize(
    ("provider", "word"),
    [
        (_wrong(gradient=1.05), "gradient"),
        (_wrong(gradient=-1.0), "gradient"),
        (_wrong(value=0.98), "value"),
        (_wrong(gradient=float("nan")), "gradient"),
        (_wrong(gradient=1 + 5e-4, ours=True), "gradient"),
    ],
)
def test_a_wrong_provider_is_refused_and_not_timed(provider: Provider, word: str) -> None:
    clock, ceilings = harness.CpuClock(), harness.Ceilings(1e9, 1e9)
    op = _op_with(broken=provider)
    rows = measure_op(op, [SMALL], QUICK, clock, ceilings, providers=["ours", "broken"], modes=["full"])
    ours, broken, bound = rows
    assert (bound.provider, bound.status, len(bound.samples)) == ("products", BOUND, 2)
    assert (ours.status, len(ours.samples)) == (OK, 2)
    assert (broken.status, broken.samples) == (WRONG, [])
    assert word in broken.reason
    assert "wrong:" in report.text(_result(rows), rows)


def test_others_may_lose_digits_that_ours_may_not() -> None:
    truth = Outcome(torch.tensor(1.0), (torch.ones(3),))
    slightly_off = Outcome(torch.tensor(1.0), (torch.ones(3) * (1 + 5e-5),))
    float32 = torch.float32
    assert not gate.judge(slightly_off, truth, gate.limit(True, float32, False)).passed
    assert gate.judge(slightly_off, truth, gate.limit(False, float32, False)).passed
    assert gate.limit(True, float32, True) == gate.limit(True, torch.float16, True) == 2.0**-9
    assert gate.limit(True, torch.bfloat16, True) == 2.0**-6
    # A point between two centroids may go to either, where it is rounding that decides.
    assert gate.limit(True, float32, False, discrete=True) == 1e-5
    assert gate.limit(True, float32, True, discrete=True) == gate.limit(False, float32, True) == 0.1


def test_a_missing_gradient_or_another_shape_is_wrong() -> None:
    truth = Outcome(torch.tensor(1.0), (torch.ones(3),))
    for outcome in (Outcome(torch.tensor(1.0), ()), Outcome(torch.tensor(1.0), (torch.ones(4),))):
        assert not gate.judge(outcome, truth, 1e-2).passed


def test_a_peer_that_cannot_run_says_why() -> None:
    def build(inputs: Inputs, sizes: Sizes) -> LossContender:
        raise Unavailable("needs a flux capacitor")

    rows = measure_op(
        _op_with(peer=Provider(build)),
        [SMALL],
        QUICK,
        harness.CpuClock(),
        harness.Ceilings(1e9, 1e9),
        providers=["peer"],
        modes=["full"],
    )
    assert [(row.status, row.reason) for row in rows] == [(UNAVAILABLE, "needs a flux capacitor")]
    assert "needs a flux capacitor" in report.text(_result(rows), rows)


def test_a_compiler_that_takes_too_long_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(loss: Callable[[Inputs], Tensor], **_: object) -> Callable[[Inputs], Tensor]:
        def compiled(tensors: Inputs) -> Tensor:
            for _ in range(100):
                try:
                    time.sleep(0.1)
                except Exception:  # a compiler may go on after what it takes for its own error
                    continue
            return loss(tensors)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(registry, "_COMPILE_SECONDS", 0.2)
    slow = registry._compiled(lambda tensors: tensors["student"].sum())
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"takes more than 0\.2 s"):
        slow({"student": torch.ones(3)})
    assert time.monotonic() - started < 5


def test_unknown_providers_and_modes_are_named() -> None:
    arguments = (OPS["intra"], [SMALL], QUICK, harness.CpuClock(), harness.Ceilings(1e9, 1e9))
    with pytest.raises(ValueError, match="got 'theirs'"):
        measure_op(*arguments, providers=["theirs"])
    with pytest.raises(ValueError, match="got 'sideways'"):
        measure_op(*arguments, modes=["sideways"])


def _main(*arguments: str) -> int:
    return command.main(
        [*arguments, "--shapes", "small", "--mode", "full", "--seconds", "0", "--min-rounds", "2"]
    )


@pytest.fixture
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "ceilings", lambda *_, **__: harness.Ceilings(1e11, 1e10))


@pytest.mark.usefixtures("quick_ceilings")
def test_check_exits_1_on_a_wrong_gradient(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(OPS, "intra", _op_with(broken=_wrong(gradient=1.5)))
    assert _main("intra", "--providers", "ours,broken", "--check") == 1
    assert "gradient is off by 5.0e-01" in capsys.readouterr().out
    assert _main("intra", "--providers", "ours,plain", "--check") == 0
    assert _main("intra", "--providers", "ours,broken") == 0


@pytest.fixture
def ops_as_they_were() -> Iterator[None]:
    """Put back what a test takes out of the registry, in its order, which messages show."""
    before = dict(OPS)
    yield
    OPS.clear()
    OPS.update(before)


@pytest.mark.usefixtures("quick_ceilings", "ops_as_they_were")
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_bench_exits_1_where_ours_is_wrong(
    whose: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    op = OPS["intra"]
    providers = {"ours": op.providers["ours"], "broken": _wrong(gradient=1.5, ours=whose == "ours")}
    shapes = {"paper": [SMALL], "growth": [SMALL]}
    OPS.clear()
    OPS["intra"] = dataclasses.replace(op, providers=providers, shapes=shapes)
    monkeypatch.setattr(checks, "evaluate", lambda result: [])
    monkeypatch.setattr(checks, "GROWTH_OPS", ("intra",))
    path = tmp_path / "result.json"
    arguments = ["bench", "--seconds", "0", "--min-rounds", "2", "--json", str(path)]
    assert command.main(arguments) == (1 if whose == "ours" else 0)
    assert {row.status for row in results.load(path).rows if row.provider == "broken"} == {WRONG}


@pytest.mark.usefixtures("quick_ceilings", "ops_as_they_were")
@pytest.mark.parametrize(("minutes", "cases"), [(20, 3), (0, 1)])
def test_bench_begins_no_growth_when_its_time_is_up(
    minutes: int,
    cases: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shapes = {"paper": [SMALL], "growth": [SMALL._replace(batch=batch) for batch in (5, 6)]}
    op = dataclasses.replace(OPS["intra"], providers={"ours": OPS["intra"].providers["ours"]}, shapes=shapes)
    OPS.clear()
    OPS["intra"] = op
    monkeypatch.setattr(checks, "evaluate", lambda result: [])
    monkeypatch.setattr(checks, "GROWTH_OPS", ("intra",))
    path = tmp_path / "result.json"
    options = ["--seconds", "0", "--min-rounds", "2", "--minutes", str(minutes), "--json", str(path)]
    assert command.main(["bench", *options]) == 0
    rows = results.load(path).rows
    assert len({row.case for row in rows if row.mode == "full" and row.provider == "ours"}) == cases
    assert ("2 of 2 cases of growth are left out" in capsys.readouterr().out) == (cases == 1)


@pytest.mark.usefixtures("quick_ceilings", "ops_as_they_were")
def test_bench_gives_a_step_more_time_and_growth_less(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shapes = {"paper": [SMALL], "growth": [SMALL]}
    ops = [dataclasses.replace(OPS[name], shapes=shapes) for name in ("step", "intra")]
    OPS.clear()
    OPS.update({op.name: op for op in ops})
    given: list[tuple[str, float]] = []
    monkeypatch.setattr(
        command, "measure_op", lambda op, cases, settings, *_, **__: given.append((op.name, settings.seconds))
    )
    monkeypatch.setattr(checks, "evaluate", lambda result: [])
    monkeypatch.setattr(checks, "GROWTH_OPS", ("intra",))
    assert command.main(["bench", "--seconds", "2", "--json", str(tmp_path / "result.json")]) == 0
    assert given == [("step", 30.0), ("intra", 2.0), ("intra", 0.5)]


@pytest.mark.usefixtures("quick_ceilings")
def test_the_table_takes_as_many_rounds_as_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needed = checks.Needed("intra", (SMALL,), ("ours",), 5), checks.Needed("local", (SMALL,), ("ours",))
    monkeypatch.setattr(checks, "NEEDED", needed)
    monkeypatch.setattr(checks, "evaluate", lambda result: [])
    path = tmp_path / "result.json"
    assert _main("--check", "--json", str(path)) == 0
    rounds = {(row.op, row.provider): len(row.samples) for row in results.load(path).rows}
    assert rounds == {("intra", "ours"): 5, ("intra", "products"): 5, ("local", "ours"): 2}


@pytest.mark.usefixtures("quick_ceilings")
def test_command_writes_json_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "folder" / "result.json"
    assert _main("intra", "--providers", "ours,released", "--json", str(path)) == 0
    result = results.load(path)
    assert [(row.provider, row.status) for row in result.rows] == [
        ("ours", OK),
        ("released", OK),
        ("products", BOUND),
    ]
    assert result.environment["threads"] == torch.get_num_threads()
    assert {"torch", "python"} <= set(result.environment["versions"])
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "released" in text
    assert (path.parent / "result-ratios.png").exists()
    assert command.main(["compare", str(path), str(path)]) == 0
    assert "nothing moved" in capsys.readouterr().out


def test_bad_command_lines_exit_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.main(["kinetic"]) == 2
    assert "OP: expected some of intra" in capsys.readouterr().err
    assert command.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2


@pytest.mark.parametrize("name", command.MODULES)
def test_other_commands_reach_their_modules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("fake")
    seen: list[list[str]] = []

    def fake_main(argv: list[str]) -> int:
        seen.append(argv)
        return 3

    module.main = fake_main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"benchmarks.{command.MODULES[name]}", module)
    assert command.main([name, "--flag"]) == 3
    assert seen == [["--flag"]]


# -------------------------------------------------------------------------------------------- registry


def test_registry_is_complete() -> None:
    assert set(OPS) == {"intra", "local", "global", "fsd_ilg", "kmeans", "step"}
    for name in ("intra", "local", "global", "fsd_ilg"):
        assert {"ours", "reference", "released", "plain", "compiled"} <= set(OPS[name].providers)
        assert OPS[name].modes == ("forward", "backward", "full")
        widths = {(sizes.batch, sizes.rows, sizes.width) for sizes in OPS[name].shapes["paper"]}
        assert widths == {(32, 128, 768), (32, 128, 384)}
    for name in ("intra", "local"):
        assert set(CKA_PEERS) <= set(OPS[name].providers)
    for name, centroids in (("global", {100, 300}), ("fsd_ilg", {100})):
        assert {sizes.centroids for sizes in OPS[name].shapes["paper"]} == centroids
    peers = {"scikit-learn", "faiss-cpu", "fastkmeans", "fast-pytorch-kmeans", "flash-kmeans"}
    assert peers <= set(OPS["kmeans"].providers)
    steps = {
        "ours",
        "vkd-only",
        "ours-fsd_i",
        "ours-fsd_l",
        "ours-fsd_g",
        "released",
        "released-teacher-grad",
    }
    assert set(OPS["step"].providers) == steps
    for op in OPS.values():
        assert {"paper", "small", "growth"} == set(op.shapes)
        assert {provider.truth for provider in op.providers.values()} <= set(op.truths)
    growth_sizes = OPS["global"].shapes["growth"]
    assert {(min(v), max(v)) for v in zip(*(sizes[:4] for sizes in growth_sizes), strict=True)} == {
        (8, 256),
        (32, 512),
        (256, 1024),
        (50, 1000),
    }


def test_everything_that_the_table_needs_exists() -> None:
    for needed in checks.NEEDED:
        op = OPS[needed.op]
        assert set(needed.providers) <= set(op.providers)
        assert all(isinstance(sizes, Sizes) for sizes in needed.cases)


@pytest.mark.parametrize("outliers", [False, True])
def test_truth_is_the_reference(outliers: bool) -> None:
    inputs = {name: x.double() for name, x in OPS["global"].make_inputs(SMALL, 0, outliers).items()}
    student, teacher = inputs["student"], inputs["teacher"]
    _, neg_log = intra_reference.forward([student], [teacher], None)
    features = {"student": student, "teacher": teacher}
    truth = OPS["intra"].truths["biased"](features, SMALL).outcome().value
    torch.testing.assert_close(truth, neg_log.mean())
    own, given = inputs["student_memory"], inputs["teacher_memory"]
    local, memory, distance, cosine = structure_reference.inter_structure(
        student.flatten(1), teacher.flatten(1), own, given, None
    )
    truth = OPS["local"].truths["biased"](features, SMALL).outcome().value
    torch.testing.assert_close(truth, local)
    truth = OPS["global"].truths["biased"](inputs, SMALL).outcome().value
    torch.testing.assert_close(truth, 0.5 * distance + 0.5 * cosine + memory)


def test_outliers_give_features_a_large_offset() -> None:
    plain, outlying = (OPS["intra"].make_inputs(SMALL, 0, outliers)["student"] for outliers in (False, True))
    assert plain.mean(dim=(0, 1)).abs().max() < 1
    assert 20 < outlying.mean(dim=(0, 1)).abs().max() < 51


@pytest.mark.parametrize("name", ["intra", "local", "global", "fsd_ilg", "kmeans", "step"])
def test_every_provider_that_is_here_agrees_with_the_reference(name: str) -> None:
    op = OPS[name]
    providers = [provider for provider in op.providers if provider != "compiled"]
    mode = op.modes[-1:]
    settings = QUICK._replace(min_rounds=1, memory=name == "fsd_ilg")
    rows = measure_op(
        op,
        op.shapes["small"],
        settings,
        harness.CpuClock(),
        harness.Ceilings(1e11, 1e10),
        providers=providers,
        modes=mode,
    )
    assert [(row.provider, row.reason) for row in rows if row.status == WRONG] == []
    by_name = {row.provider: row for row in rows}
    assert by_name["ours"].status == OK
    if name == "fsd_ilg":
        assert by_name["ours"].returned_bytes == 4 * (8 * 16 * 32 + 6 * 16 * 32)
        assert (by_name["ours"].peak_bytes or 0) >= (by_name["ours"].returned_bytes or 0)
    missing = {row.provider for row in rows if row.status == UNAVAILABLE and not row.reason}
    assert not missing


# --------------------------------------------------------------------------------------------- results


def _row(provider: str, samples: list[float], **changes: object) -> Row:
    sizes = Sizes(32, 128, 768, 100)
    row = Row(
        "intra", sizes.label(OPS["intra"].letters), sizes._asdict(), provider, "full", OK, samples=samples
    )
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


def _result(rows: list[Row]) -> Result:
    environment = {
        "device": "A Processor",
        "device_type": "cpu",
        "threads": 2,
        "versions": {"torch": "2"},
        "commit": "abc1234",
        "modified": False,
        "date": "2030-01-02",
    }
    return Result(environment, {"matmul": 1e11, "copy": 1e10}, rows)


def test_json_round_trips(tmp_path: Path) -> None:
    rows = [
        _row("ours", [0.1, 0.2], noisy=True, canary_spread=0.3, value_error=1e-7, peak_bytes=5),
        _row("peer", [], status=WRONG, reason="gradient is off"),
    ]
    result = dataclasses.replace(_result(rows), checks=[CheckResult("a", "b", "c", None, True, "d")])
    path = tmp_path / "result.json"
    results.save(result, path)
    assert results.load(path) == result
    assert json.loads(path.read_text(encoding="utf-8"))["schema"] == results.SCHEMA
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    for content, message in (
        ("{", "not JSON"),
        ("[]", "schema"),
        ('{"schema": 1, "rows": 1}', "not a benchmark"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            results.load(path)


def test_files_are_named_after_device_date_and_commit() -> None:
    path = results.default_path(_result([]))
    assert path.parts[-3:] == ("results", "a-processor-2-threads", "2030-01-02-abc1234.json")


def test_compare_reports_what_moved_beyond_the_spread() -> None:
    before = _result([_row("ours", [1.0, 1.1, 1.2]), _row("plain", [1.0, 1.1, 1.2])])
    after = _result([_row("ours", [2.0, 2.2, 2.4], noisy=True), _row("plain", [1.1, 1.18, 1.3])])
    (line,) = results.compare(before, after)
    assert "ours: 1100.00 ms -> 2200.00 ms, 2.00x slower (noisy run)" in line
    (line,) = results.compare(after, before)
    assert "2.00x faster" in line


def test_summary_names_the_fastest_peer_that_passed() -> None:
    rows = [
        _row("ours", [0.02, 0.02]),
        _row("released", [0.08, 0.1]),
        _row("ckatorch", [0.06, 0.06]),
        _row("pytorch-cka", [0.05, 0.05]),
        dataclasses.replace(_row("cka-pytorch", [0.01, 0.01]), status=WRONG),
        _row("ours", [0.03, 0.03]),  # growth measures the case again
    ]
    header, line = report.summary(_result(rows))
    assert header[:3] == ["op", "case", "ours, ms"]
    expected = ["intra", "B=32 S=128 D=768", "20", "4.50 (4.25 to 4.75)", "-"]
    assert line == [*expected, "2.50 (2.50 to 2.50) pytorch-cka"]
    assert len(report.summary(_result(rows[:1]))) == 1


def test_report_says_where_something_else_is_faster(tmp_path: Path) -> None:
    rows = [_row("ours", [2.0, 2.0]), _row("plain", [1.0, 1.0]), _row("released", [6.0, 6.0])]
    result = _result(rows)
    assert report.slower_than_others(result) == [
        "intra B=32 S=128 D=768 full: plain takes 0.50 of our time",
    ]
    text = report.report(result, tmp_path / "r")
    assert "plain takes 0.50 of our time" in text
    assert "| released | 6000 | 6000 to 6000 | 3.00 (3.00 to 3.00) |" in text
    assert "![ratios](r-ratios.png)" in text


# ---------------------------------------------------------------------------------------------- growth


def test_fitted_exponent() -> None:
    assert fitted_exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="two different"):
        fitted_exponent([2, 2], [1.0, 1.0])


@pytest.mark.parametrize(("power", "passed"), [(1.0, True), (1.08, True), (1.3, False), (0.4, True)])
def test_growth_is_held_against_the_minimal_flops(power: float, passed: bool) -> None:
    rows = []
    # The machine runs at another speed for every case, and so does its canary.
    for batch, speed in zip((8, 16, 32, 64), (1.0, 0.7, 1.4, 0.5), strict=True):
        flops = batch * 10**6
        rows.append(
            _row(
                "ours",
                [batch**power / speed],
                case=f"B={batch}",
                sizes=Sizes(batch, 128, 768, 100)._asdict(),
                minimal_flops=flops,
                matmul_percent=flops / batch**power,
            )
        )
    (found,) = growth(rows)
    assert (found.size, found.values, found.passed) == ("batch", [8, 16, 32, 64], passed)
    assert found.exponent == pytest.approx(power)
    check = next(c for c in checks.evaluate(_result(rows)) if c.name == "growth of intra")
    assert check.passed is passed


# ---------------------------------------------------------------------------------------------- checks


def _check(rows: list[Row], name: str) -> CheckResult:
    return next(check for check in checks.evaluate(_result(rows)) if check.name == name)


def test_a_ratio_check_compares_with_the_required_factor() -> None:
    name = "L_I against the released formulation"
    ours = _row("ours", [1.0, 1.0, 1.0], noisy=True)
    good = _check([ours, _row("released", [5.6, 5.5, 5.7])], name)
    assert (good.passed, good.measured, good.noisy) == (True, "5.600x (5.55 to 5.65; 3 rounds)", True)
    missed = _check([ours, _row("released", [5.4, 5.498, 5.6])], name)
    assert (missed.passed, missed.measured.split()[0]) == (False, "5.498x")
    missing = _check([ours], name)
    assert missing.passed is None
    assert "not measured" in missing.reason


def test_the_best_peer_is_the_fastest_one_that_the_gate_let_through() -> None:
    rows = [
        _row("ours", [1.0, 1.0]),
        _row("pytorch-cka", [2.0, 2.0]),
        _row("cka-pytorch", [1.3, 1.3]),
        _row("ckatorch", [], status=WRONG, reason="off"),
    ]
    check = _check(rows, "L_I against the best peer")
    assert (check.passed, check.reason) == (False, "against cka-pytorch")
    assert _check([rows[0], rows[1], rows[3]], "L_I against the best peer").passed is True


def test_percent_memory_and_step_checks() -> None:
    assert _check([_row("ours", [1.0], matmul_percent=84.0)], "L_I against the machine").passed is False
    bound = _row("products", [0.9], status=BOUND, matmul_percent=93.0)
    check = _check([_row("ours", [1.0], matmul_percent=86.0), bound], "L_I against the machine")
    assert (check.passed, check.reason) == (True, "its products alone: 93 %")
    case = {"op": "fsd_ilg", "case": "B=32 S=128 D=768 K=100"}
    name = "extra memory of FSD_ILG, K=100"
    assert _check([_row("ours", [1.0], peak_bytes=129, returned_bytes=100, **case)], name).passed is True
    assert _check([_row("ours", [1.0], peak_bytes=131, returned_bytes=100, **case)], name).passed is False
    case = {"op": "step", "case": "B=32 S=128 D=384 K=100"}
    name = "whole step, MiniLM, against VKD alone"
    vkd = _row("vkd-only", [1.0, 1.0], **case)
    assert _check([_row("ours", [1.04, 1.05], **case), vkd], name).passed is True
    assert _check([_row("ours", [1.06, 1.06], **case), vkd], name).passed is False


def test_a_refused_provider_fails_the_table() -> None:
    found = checks.evaluate(_result([_row("pytorch-cka", [], status=WRONG, reason="value is off")]))
    assert (found[0].passed, found[0].reason) == (False, "value is off")


@pytest.mark.parametrize(("bound", "least"), [(16.0, 8.0), (9.5, 8.0), (8.0, 6.8)])
def test_a_build_need_not_outrun_its_own_forward(bound: float, least: float) -> None:
    assert memory.least_faster(bound) == pytest.approx(least)


def test_kernel_times_profile_what_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("_BATCH", 4), ("_ROWS", 5), ("_WIDTH", 6), ("_POINTS", 120)):
        monkeypatch.setattr(kernel_times, name, size)
    names = []
    for name, call in kernel_times.cases(torch.float32, CPU):
        call()
        names.append(name)
    assert names == ["L_I", "L_G + L_L, K=100", "L_G + L_L, K=300", "k-means, K=100"]
    if not torch.cuda.is_available():
        assert kernel_times.main([]) == 2
        assert "needs a GPU" in capsys.readouterr().err


def test_a_gpu_result_says_what_was_rounded_and_what_the_cpu_took(tmp_path: Path) -> None:
    rows = [_row("ours", [2e-4], host_seconds=1.5e-3)]
    result = _result(rows)
    result.environment.update({"device_type": "cuda", "dtype": "float32", "precision": "tf32"})
    text = report.report(result, tmp_path / "x")
    assert "float32, tf32 products" in text
    assert "the CPU enqueues it in 1.5 ms" in text
