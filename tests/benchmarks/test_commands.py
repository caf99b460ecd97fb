"""``python -m benchmarks``: its commands, their exit statuses, the files that they write, and what bench plans."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import COMMANDS, MEASURE, main
from benchmarks.paths import ROOT
from benchmarks.speed import checks, harness, results
from benchmarks.speed.commands import bench
from benchmarks.speed.commands.measure import exit_status, measure_needed
from benchmarks.speed.ops import Op
from benchmarks.speed.registry import OPS
from benchmarks.speed.results import BOUND, OK, WRONG, CheckResult
from benchmarks.speed.run import Run
from tests.benchmarks.helpers import CEILINGS, QUICK, SMALL, intra_with, machine, make_row, wrong


def _options(**changes: object) -> argparse.Namespace:
    options = {
        "device": "cpu",
        "dtype": "float32",
        "precision": "ieee",
        "threads": None,
        "seconds": 0.0,
        "min_rounds": 2,
        "json": None,
    }
    return argparse.Namespace(**{**options, **changes})


def _main(*arguments: str) -> int:
    return main([*arguments, "--shapes", "small", "--mode", "full", "--seconds", "0", "--min-rounds", "2"])


@pytest.fixture
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the large products and copies that a run starts with."""
    monkeypatch.setattr(harness, "ceilings", lambda *_, **__: CEILINGS)


# ------------------------------------------------------------------------------------------ the command line


# Importing the module of "traffic" turns Triton's interpreter on for the whole process.
@pytest.mark.parametrize("name", sorted({*COMMANDS, "OP"} - {"traffic"}))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(COMMANDS.get(name, MEASURE))
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_traffic_takes_no_arguments() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks", "traffic", "--fast"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "traffic takes no arguments, got --fast" in done.stderr


def test_the_package_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert [name for name in COMMANDS if name not in printed] == []


def test_bad_command_lines_exit_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["kinetic"]) == 2
    assert "OP: expected some of intra" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "a.json" in capsys.readouterr().err
    assert main(["intra", "--threads", "0"]) == 2
    assert "--threads: expected at least 1, got 0" in capsys.readouterr().err
    assert main(["intra", "--precision", "tf32"]) == 2
    assert "a CPU has no tf32 products" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_commands_for_a_gpu_exit_2_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernel-times"]) == main(["capture"]) == 2
    assert main(["intra", "--device", "cuda"]) == 2
    errors = capsys.readouterr().err
    assert "kernel-times needs a GPU" in errors
    assert "capture needs a GPU" in errors
    assert "--device cuda: expected a GPU" in errors


@pytest.mark.usefixtures("quick_ceilings")
def test_check_exits_1_on_a_wrong_gradient(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(OPS, "intra", intra_with(broken=wrong(gradient=1.5)))
    assert _main("intra", "--providers", "ours,broken", "--check") == 1
    assert "gradient is off by 5.0e-01" in capsys.readouterr().out
    assert _main("intra", "--providers", "ours,plain", "--check") == 0
    assert _main("intra", "--providers", "ours,broken") == 0


@pytest.mark.usefixtures("quick_ceilings")
def test_several_ops_are_measured_in_the_modes_that_they_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    flags = ["--shapes", "small", "--seconds", "0", "--min-rounds", "1", "--json", str(path)]
    assert main(["intra,kmeans", "--providers", "ours", "--mode", "forward,full", *flags]) == 0
    modes = {(row.op, row.mode) for row in results.load(path).rows if row.provider == "ours"}
    assert modes == {("intra", "forward"), ("intra", "full"), ("kmeans", "full")}
    assert main(["kmeans", "--providers", "ours", "--mode", "forward,full", *flags]) == 2
    assert "mode: kmeans has full; got 'forward'" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_ceilings")
def test_a_run_writes_json_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "folder" / "result.json"
    arguments = ["intra", "--without", "compiled,plain", "--providers", "ours,plain,released"]
    assert _main(*arguments, "--json", str(path)) == 0
    result = results.load(path)
    assert [(row.provider, row.status) for row in result.rows] == [
        ("ours", OK),
        ("released", OK),
        ("products", BOUND),
    ]
    assert result.environment["threads"] == torch.get_num_threads()
    assert {"torch", "python"} <= set(result.environment["versions"])
    assert "released" in path.with_suffix(".md").read_text(encoding="utf-8")
    assert (path.parent / "result-ratios.png").exists()
    path.with_suffix(".md").unlink()
    assert main(["report", str(path)]) == 0
    assert "released" in path.with_suffix(".md").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["compare", str(path), str(path)]) == 0
    assert capsys.readouterr().out == "nothing moved beyond the spread\n"


# -------------------------------------------------------------------------------------------------- --check


def test_a_target_sets_the_smallest_number_of_rounds() -> None:
    run = Run(_options(), machine())
    needed = checks.Needed("intra", (SMALL,), ("ours",), 5), checks.Needed("local", (SMALL,), ("ours",))
    measure_needed(run, needed)
    rounds = {(row.op, row.provider): len(row.samples) for row in run.result.rows}
    assert rounds == {("intra", "ours"): 5, ("intra", "products"): 5, ("local", "ours"): 2}


@pytest.mark.parametrize(
    ("passed", "all_targets", "status"),
    [(True, True, 0), (False, False, 1), (None, True, 1), (None, False, 0)],
)
def test_a_target_without_its_rows_fails_a_run_of_all_targets(
    passed: bool | None, all_targets: bool, status: int
) -> None:
    run = Run(_options(), machine())
    run.result.rows.append(make_row("ours", [1.0]))
    run.result.checks.append(CheckResult("a target", "at least 2x", "", passed))
    assert exit_status(run, all_targets) == status
    run.result.rows.append(make_row("plain", [], status=WRONG))
    assert exit_status(run, all_targets) == 1


# ---------------------------------------------------------------------------------------------------- bench


def _small(name: str, growth: int = 1) -> Op:
    """An op with one small case and so many growth cases."""
    cases = [SMALL._replace(batch=5 + each) for each in range(growth)]
    return dataclasses.replace(OPS[name], shapes={"paper": [SMALL], "growth": cases})


def test_bench_plans_no_provider_that_takes_too_long() -> None:
    planned = list(bench.plan(OPS, QUICK))
    assert {each.op for each in planned} == set(OPS)
    for name, op in OPS.items():
        cases = [each for each in planned if each.op == name]
        assert [each.case for each in cases] == op.shapes["paper"]
        compiled = ["compiled" in each.providers for each in cases]
        assert compiled == ["compiled" in op.providers, *[False] * (len(cases) - 1)]
        # With a memory the reference computes its distances one by one.
        timed = any("reference" in each.providers for each in cases)
        assert timed == ("reference" in op.providers and "centroids" not in op.size_names)
        assert all("backward" not in each.modes for each in cases)


def test_bench_gives_a_step_more_time_and_growth_less() -> None:
    settings = QUICK._replace(seconds=2.0)
    seconds = {each.op: each.settings.seconds for each in bench.plan(OPS, settings)}
    assert (seconds["step"], seconds["intra"], seconds["kmeans"]) == (30.0, 2.0, 2.0)
    growth = bench.growth_plan(OPS, ("intra", "local"), settings)
    assert {(each.settings.seconds, each.providers, each.modes) for each in growth} == {
        (0.5, ("ours",), ("full",))
    }
    # The ops take turns, so that a run which is cut short has a part of each.
    assert [each.op for each in growth[:4]] == ["intra", "local", "intra", "local"]
    assert [each.case for each in growth if each.op == "intra"] == OPS["intra"].shapes["growth"]


@pytest.mark.parametrize(("minutes", "measured", "left_out"), [(20, 3, ""), (0, 1, "2 of 2 cases")])
def test_bench_begins_no_growth_when_its_time_is_up(
    minutes: int, measured: int, left_out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    op = dataclasses.replace(_small("intra", 2), providers={"ours": OPS["intra"].providers["ours"]})
    run = Run(_options(json=path), machine())
    assert bench.bench(run, {"intra": op}, ("intra",), minutes, targets=()) == 0
    rows = results.load(path).rows
    assert len({row.case for row in rows if row.mode == "full" and row.provider == "ours"}) == measured
    printed = capsys.readouterr().out
    assert ("the time is up" in printed) == bool(left_out)
    assert left_out in printed


@pytest.mark.parametrize(("ours", "status"), [(True, 1), (False, 0)])
def test_bench_exits_1_where_ours_is_wrong(ours: bool, status: int, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    op = _small("intra", 0)
    providers = {"ours": op.providers["ours"], "broken": wrong(gradient=1.5, ours=ours)}
    run = Run(_options(json=path), machine())
    assert bench.bench(run, {"intra": dataclasses.replace(op, providers=providers)}, (), 20, ()) == status
    assert {row.status for row in results.load(path).rows if row.provider == "broken"} == {WRONG}
