"""Results: their files, their comparison, their report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.speed import report, results
from benchmarks.speed.results import WRONG, CheckResult
from tests.benchmarks.helpers import make_result, make_row


def test_json_round_trips(tmp_path: Path) -> None:
    rows = [
        make_row("ours", [0.1, 0.2], noisy=True, canary_spread=0.3, value_error=1e-7, peak_bytes=5),
        make_row("peer", [], status=WRONG, reason="gradient is off"),
    ]
    result = dataclasses.replace(make_result(rows), checks=[CheckResult("a", "b", "c", None, True, "d")])
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


def test_stored_results_can_be_read() -> None:
    """Results of the speed benchmarks, and of sessions on a GPU with what each stage found."""
    stored = sorted((Path(results.__file__).parents[1] / "results").rglob("*.json"))
    assert stored
    for path in stored:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "stages" in content:
            assert all(stage["figures"] for stage in content["stages"].values())
        else:
            assert results.load(path).rows


def test_files_are_named_after_device_date_and_commit() -> None:
    path = results.default_path(make_result([]))
    expected = ("benchmarks", "results", "a-processor-2-threads", "2030-01-02-abc1234.json")
    assert path.parts[-4:] == expected


def test_compare_reports_times_that_changed_by_more_than_the_spread() -> None:
    before = make_result([make_row("ours", [1.0, 1.1, 1.2]), make_row("plain", [1.0, 1.1, 1.2])])
    after = make_result([make_row("ours", [2.0, 2.2, 2.4], noisy=True), make_row("plain", [1.1, 1.18, 1.3])])
    (line,) = results.compare(before, after)
    assert "ours: 1100.00 ms -> 2200.00 ms, 2.00x slower (noisy run)" in line
    (line,) = results.compare(after, before)
    assert "2.00x faster" in line


def test_summary_names_the_fastest_peer_that_passed() -> None:
    rows = [
        make_row("ours", [0.02, 0.02]),
        make_row("released", [0.08, 0.1]),
        make_row("ckatorch", [0.06, 0.06]),
        make_row("pytorch-cka", [0.05, 0.05]),
        make_row("cka-pytorch", [0.01, 0.01], status=WRONG),
        make_row("ours", [0.03, 0.03]),  # growth measures the case again
    ]
    header, line = report.summary(make_result(rows))
    assert header[:3] == ["op", "case", "ours, ms"]
    expected = ["intra", "B=32 S=128 D=768", "20", "4.50 (4.25 to 4.75)", "-"]
    assert line == [*expected, "2.50 (2.50 to 2.50) pytorch-cka"]
    assert len(report.summary(make_result(rows[:1]))) == 1


def test_report_says_where_something_else_is_faster(tmp_path: Path) -> None:
    rows = [make_row("ours", [2.0, 2.0]), make_row("plain", [1.0, 1.0]), make_row("released", [6.0, 6.0])]
    result = make_result(rows)
    assert report.slower_than_others(result) == [
        "intra B=32 S=128 D=768 full: plain takes 0.50 of our time",
    ]
    text = report.report(result, tmp_path / "r")
    assert "plain takes 0.50 of our time" in text
    assert "| released | 6000 | 6000 to 6000 | 3.00 (3.00 to 3.00) |" in text
    assert "![ratios](r-ratios.png)" in text
    assert (tmp_path / "r-ratios.png").read_bytes().startswith(b"\x89PNG")


def test_a_gpu_report_names_the_rounding_and_the_time_of_the_cpu(tmp_path: Path) -> None:
    rows = [make_row("ours", [2e-4], host_seconds=1.5e-3)]
    result = make_result(rows)
    result.environment.update({"device_type": "cuda", "dtype": "float32", "precision": "tf32"})
    text = report.report(result, tmp_path / "x")
    assert "float32, tf32 products" in text
    assert "the CPU enqueues it in 1.5 ms" in text
