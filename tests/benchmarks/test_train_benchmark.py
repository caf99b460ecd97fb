"""``python -m benchmarks train``: what it runs, and what it makes of the figures."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.train import command
from benchmarks.train.runs import Run, Workshop


@pytest.fixture
def glue(tmp_path):
    for name in ("RTE", "CoLA"):
        (tmp_path / "glue" / name).mkdir(parents=True)
    return str(tmp_path / "glue")


@pytest.fixture
def speeds(monkeypatch):
    """Runs nothing; a distillation's speed depends on its method and flags as the function given says."""
    calls = []

    def distill(self, task, method, *flags, steps=None, padded_to=None):
        calls.append((task, method, flags, steps, padded_to))
        rate = 100.0
        if padded_to is not None:
            rate /= 2
        if "--teacher_cache_dir" in flags:
            rate *= 3
        if method == "vkd":
            rate *= 1.1
        if "--bf16" in flags:
            rate *= 1.6
        return Run(rate, 10 * rate, 0.25, 5 if "--teacher_cache_dir" in flags else 10)

    monkeypatch.setattr(Workshop, "distill", distill)
    monkeypatch.setattr(Workshop, "command", lambda self, arguments, padded_to=None: 0)
    monkeypatch.setattr(Workshop, "teacher", lambda self, task: self.folder)

    def outside(self, module, task, *arguments):
        rates = {"textbrewer": 80.0, "released": 80.0 if arguments[0] == "finetune" else 30.0}
        return {"samples_per_second": rates[module]}

    monkeypatch.setattr(command.Measurement, "outside", outside)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: name == "textbrewer")
    return calls


def test_ratios_are_held_against_their_limits(glue, speeds, tmp_path, capsys):
    path = tmp_path / "figures.json"
    parts = ["released", "dynamic", "cache", "structures", "peers"]
    flags = [flag for part in parts for flag in ("--part", part)]
    status = main(["train", "--glue", glue, "--check", "--rounds", "2", "--json", str(path), *flags])
    numbers = {one["name"]: one for one in json.loads(path.read_text(encoding="utf-8"))["numbers"]}
    values = {name: (one["value"], one["passed"]) for name, one in numbers.items()}
    assert values == {
        "CoLA, FSD_ILG: all switches / the released loop": (10, True),
        "cola, FSD_ILG: dynamic / padded to 128": (2, False),
        "rte, FSD_ILG: dynamic / padded to 128": (2, True),
        "RTE, FSD_ILG: teacher from the cache / teacher runs": (3, True),
        "RTE: peak memory with the cache / without, less the teacher": (0.5, True),
        "RTE, cached: a step of FSD_ILG / of VKD": (pytest.approx(1.1), True),
        "RTE, hard labels: ours / transformers' Trainer": (1.25, True),
        "RTE: ours with FSD_ILG / TextBrewer with logits and hidden states": (1.25, True),
    }
    assert status == 1, "one of them is missed"
    assert "MISSED" in capsys.readouterr().out
    assert main(["train", "--glue", glue, "--check", "--part", "structures"]) == 0


def test_the_sides_of_a_ratio_take_turns():
    measured = command.Measurement(None, 3, None)
    order = []
    rates = iter([2.0, 1.0, 1.0, 4.0, 6.0, 2.0])

    def side(name):
        order.append(name)
        return next(rates)

    # Rounds: fast 2 / slow 1; slow 1, fast 4; fast 6 / slow 2.
    assert measured.ratio(lambda: side("fast"), lambda: side("slow")) == 3
    assert order == ["fast", "slow", "slow", "fast", "fast", "slow"]


def test_bf16_is_measured_where_the_cpu_has_instructions(glue, speeds, monkeypatch, capsys):
    monkeypatch.setattr(command, "has_bf16_instructions", lambda: False)
    assert main(["train", "--glue", glue, "--part", "bf16", "--check"]) == 0
    assert "bf16: not measured, this CPU has no bfloat16 instructions" in capsys.readouterr().out
    assert speeds == []
    monkeypatch.setattr(command, "has_bf16_instructions", lambda: True)
    assert main(["train", "--glue", glue, "--part", "bf16", "--check"]) == 0
    assert "1.6" in capsys.readouterr().out


def test_a_peer_that_is_not_installed_is_named(glue, speeds, monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert main(["train", "--glue", glue, "--part", "peers"]) == 0
    assert "TextBrewer: not measured, it is not installed" in capsys.readouterr().out


def test_arguments_are_checked(glue, tmp_path, capsys):
    assert main(["train", "--glue", str(tmp_path / "nowhere")]) == 2
    assert "--glue: expected a folder with RTE and CoLA" in capsys.readouterr().err
    assert main(["train", "--glue", glue, "--rounds", "0"]) == 2
    assert "--rounds: expected at least 1, got 0" in capsys.readouterr().err


def test_a_command_that_fails_says_why(tmp_path):
    shop = Workshop(tmp_path, tmp_path, 1)
    with pytest.raises(RuntimeError, match=r"exit status 2: .*unknown command 'nothing'"):
        shop.command(["nothing"])
