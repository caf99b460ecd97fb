"""How fast training goes, and where the time of a step goes."""

import json
import time

import pytest
import torch

from fsd_fast.commands import run
from fsd_fast.sections import SectionTimes, record, section
from fsd_fast.training.profile import profile_table
from fsd_fast.training.throughput import Throughput
from tests.tiny import history, tiny

__all__ = ["tiny"]


def alone(counts):
    return counts


def test_samples_tokens_and_padding_are_counted(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    throughput = Throughput()
    throughput.add(
        {"input_ids": torch.ones(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])}
    )
    throughput.add({"input_ids": torch.ones(1, 2)})
    now[0] += 2
    with throughput.paused():
        now[0] += 1000
    assert throughput.recent(alone) == {
        "samples_per_second": 1.5,
        "tokens_per_second": 3.5,
        "padding_share": pytest.approx(0.3),
    }
    assert throughput.recent(alone) == {}
    throughput.add({"input_ids": torch.ones(1, 2)})
    now[0] += 2
    assert throughput.recent(alone)["samples_per_second"] == 0.5
    # Two processes that work alike.
    assert throughput.total(lambda counts: 2 * counts) == {
        "samples_per_second": 1.0,
        "tokens_per_second": 9 / 4,
        "padding_share": pytest.approx(0.25),
    }
    throughput.restart()
    assert throughput.total(alone) == {}


def test_counting_does_not_wait_for_the_device(monkeypatch):
    def refuse(self):
        raise AssertionError("the count was read")

    throughput = Throughput()
    monkeypatch.setattr(torch.Tensor, "__int__", refuse)
    monkeypatch.setattr(torch.Tensor, "item", refuse)
    for _ in range(3):
        throughput.add({"input_ids": torch.ones(2, 4), "attention_mask": torch.ones(2, 4)})
    with pytest.raises(AssertionError, match="the count was read"):
        throughput.recent(alone)


def test_a_section_does_not_count_what_runs_within_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    times = SectionTimes()
    with section("ignored"):
        now[0] += 5
    with record(times):
        with section("backward"):
            now[0] += 1
            with section("teacher"):
                now[0] += 10
            now[0] += 2
        now[0] += 7
        with section("teacher"):
            now[0] += 20
    assert times.seconds == {"backward": 3, "teacher": 30}
    assert times.calls == {"backward": 1, "teacher": 2}
    table = profile_table(times, 40.0, 2).splitlines()
    assert table[0].split() == ["where", "a", "step", "goes", "ms/step", "share"]
    assert [line.split() for line in table[1:]] == [
        ["teacher", "15000.0", "75.0%"],
        ["backward", "1500.0", "7.5%"],
        ["other", "3500.0", "17.5%"],
        ["step", "20000.0", "100.0%"],
    ]


def test_a_device_is_waited_for_at_every_boundary():
    waits = []
    with record(SectionTimes(lambda: waits.append(1))), section("a"), section("b"):
        pass
    assert len(waits) == 4


def test_sections_are_no_break_in_a_compiled_graph():
    def step(values):
        with section("a"):
            return values + 1

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 1
    with record(SectionTimes()):
        assert compiled(torch.ones(1)).item() == 2


def test_a_profile_prints_a_table_and_writes_a_trace(tiny, tmp_path, capsys):
    figures = run("distill", [*tiny.distillation(tmp_path / "run", steps=4), "--profile", "2"])
    lines = capsys.readouterr().out.splitlines()
    first = next(row for row, line in enumerate(lines) if line.startswith("where a step goes"))
    rows = {line.rsplit(maxsplit=2)[0]: line.split()[-2:] for line in lines[first + 1 : first + 13]}
    expected = {
        "data",
        "teacher",
        "student",
        "backward",
        "optimizer",
        "logging",
        "gradient clip",
        "other",
        "step",
    }
    assert expected | {"loss_vkd", "loss_intra", "loss_global"} <= rows.keys()
    shares = [float(share.removesuffix("%")) for name, (_, share) in rows.items() if name != "step"]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert all(
        float(milliseconds) > 0 for milliseconds, _ in (rows["student"], rows["backward"], rows["teacher"])
    )
    trace = json.loads((tmp_path / "run" / "profile_trace.json").read_text(encoding="utf-8"))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("teacher") >= 2
    logged = [entry for entry in history(tmp_path / "run") if "loss" in entry]
    assert all(entry["samples_per_second"] > 0 for entry in logged)
    assert all(0 < entry["padding_share"] < 1 for entry in logged)
    results = json.loads((tmp_path / "run" / "train_results.json").read_text(encoding="utf-8"))
    assert results["train_step_tokens_per_second"] == figures["train_step_tokens_per_second"] > 0
    assert results["train_step_padding_share"] == pytest.approx(
        sum(entry["padding_share"] for entry in logged) / len(logged), abs=0.2
    )


def test_a_profile_longer_than_the_run_ends_with_it(tiny, tmp_path):
    run("distill", [*tiny.distillation(tmp_path / "run", "vkd", steps=2), "--profile", "9"])
    assert not (tmp_path / "run" / "profile_trace.json").exists()
