"""A session on a GPU: stages that fail, take too long or are cut off, what is kept, and what is judged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.gpu import targets
from benchmarks.gpu.session import FAILED, LEFT_OUT, OK, OUT_OF_TIME, Session
from benchmarks.gpu.stages import STAGES, Plan, Stage, read_json, read_sanitizer, read_tests
from benchmarks.paths import ROOT
from benchmarks.speed import results
from benchmarks.speed.commands import capture
from benchmarks.speed.results import WRONG
from tests.benchmarks.helpers import CPU, make_result, make_row

TRIAL = Plan("cpu", True)
HERE = {
    "device": "A GPU",
    "commit": "abc1234",
    "modified": False,
    "date": "2030-01-02",
    "versions": {"torch": "2"},
}


def stage(name: str, program: str, seconds: float = 60.0, missing: str = "") -> Stage:
    """A stage that runs a line of Python; ``FILE`` is the file for its figures."""

    def command(_: Plan, figures: Path) -> Sequence[str]:
        return [sys.executable, "-S", "-c", program.replace("FILE", repr(str(figures)))]

    return Stage(name, seconds, command, read_json, lambda: missing)


def stored(folder: Path) -> dict[str, dict[str, object]]:
    return dict(json.loads((folder / "session.json").read_text())["stages"])


def test_a_stage_that_fails_or_takes_too_long_is_reported_and_the_next_one_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writes = "open(FILE, 'w').write('{\"us\": 3}')"
    stages = [
        stage("fails", f"{writes}; raise SystemExit('no such kernel')"),
        stage("hangs", f"{writes}; import time; time.sleep(99)", seconds=1.5),
        stage("absent", "", missing="not installed: a tool"),
        stage("works", writes),
    ]
    begin = time.monotonic()
    Session(tmp_path, TRIAL, HERE).run(stages, 1)
    assert time.monotonic() - begin < 40
    found = stored(tmp_path)
    assert {name: each["status"] for name, each in found.items()} == {
        "fails": FAILED,
        "hangs": OUT_OF_TIME,
        "absent": LEFT_OUT,
        "works": OK,
    }
    assert found["fails"]["reason"] == "exit status 1: no such kernel"
    # What a stage had written counts, however the stage ended.
    assert [found[name]["figures"] for name in ("fails", "hangs", "works")] == [{"us": 3}] * 3
    report = (tmp_path / "session.md").read_text()
    assert "| absent | left out | 0 | not installed: a tool |" in report
    assert "fails: failed" in capsys.readouterr().out


def test_no_stage_begins_when_the_time_is_up(tmp_path: Path) -> None:
    Session(tmp_path, TRIAL, HERE).run([stage("late", "")], 0.01)
    assert stored(tmp_path)["late"]["reason"] == "no time is left"


def test_a_second_session_runs_what_has_not_ended_well(tmp_path: Path) -> None:
    Session(tmp_path, TRIAL, HERE).run([stage("good", ""), stage("bad", "raise SystemExit(3)")], 1)
    second = Session(tmp_path, TRIAL, HERE)
    assert [second.ended_well(name) for name in ("good", "bad", "new")] == [True, False, False]
    second.run([stage("bad", "")], 1)
    assert {name: each["status"] for name, each in stored(tmp_path).items()} == {"good": OK, "bad": OK}


def test_a_folder_of_another_session_is_refused(tmp_path: Path) -> None:
    Session(tmp_path, TRIAL, HERE).run([stage("good", "")], 1)
    with pytest.raises(
        ValueError, match=r"--output: expected .* commit def5678.*session\.json is of A GPU, abc1234"
    ):
        Session(tmp_path, TRIAL, {**HERE, "commit": "def5678"})
    with pytest.raises(ValueError, match="quick False"):
        Session(tmp_path, Plan("cpu", False), HERE)
    (tmp_path / "session.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="expected a session of schema 1"):
        Session(tmp_path, TRIAL, HERE)


def test_figures_are_kept_while_a_stage_runs_and_the_stage_ends_with_the_session(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom benchmarks.gpu import command\n"
        "from benchmarks.gpu.session import Session\n"
        "from tests.benchmarks.test_gpu_session import HERE, TRIAL, stage\n"
        "import signal; signal.signal(signal.SIGTERM, command._leave)\n"
        f"line = 'import os, time; open(FILE, \"w\").write(str(os.getpid())); time.sleep(99)'\n"
        f"Session(Path({str(tmp_path)!r}), TRIAL, HERE).run([stage('hangs', line)], 1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (tmp_path / "session.json").is_file():
        time.sleep(0.2)
    running = stored(tmp_path)["hangs"]
    assert running["status"] == "running"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    child = running["figures"]
    assert isinstance(child, int)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("a.py::test_x[1-2] PASSED [ 50%]\na.py::test_y SKIPPED (a GPU) [100%]\n", (1, 0, 1, [])),
        ("a.py::test_x FAILED [ 50%]\na.py::test_y PASSED", (1, 1, 0, ["a.py::test_x"])),
        (
            "[gw3] [ 10%] PASSED a.py::test_x[1] \n[gw0] [ 20%] FAILED a.py::test_y ",
            (1, 1, 0, ["a.py::test_y"]),
        ),
        ("a.py::test_x PASSED [ 50%]\na.py::test_x ERROR [ 50%]\n", (0, 1, 0, ["a.py::test_x"])),
        ("collected 3 items\nE  AssertionError: FAILED\n", (0, 0, 0, [])),
    ],
)
def test_outcomes_are_read_from_pytest_as_they_come(
    lines: str, found: tuple[int, int, int, list[str]], tmp_path: Path
) -> None:
    names = ("passed", "failed", "skipped", "failures")
    assert read_tests(tmp_path, lines) == dict(zip(names, found, strict=True))


def test_targets_are_judged_by_what_was_found() -> None:
    passes = {"L_I, forward": 11.0, "L_I": 20.0, "L_G + L_L, K=100": 300.0}
    steps = make_result(
        [make_row("vkd-only", [1.0, 1.0]), make_row("ours", [1.04, 1.04]), make_row("ours-fsd_g", [1.2, 1.2])]
    )
    wrong = make_row("ours", [], status=WRONG, reason="value is off by 1", op="local")
    peers = make_result([make_row("ours", [1.0, 1.0]), make_row("plain", [0.9, 0.9]), wrong])
    figures = {
        "tests": {"passed": 3, "failed": 0, "skipped": 0, "failures": []},
        "kernels-bf16": {"passes": {name: {"device": us, "host": 400.0} for name, us in passes.items()}},
        "steps": json.loads(json.dumps(steps, default=vars)),
        "peers-bf16": json.loads(json.dumps(peers, default=vars)),
        "memcheck": {"errors": 2},
    }
    found = {(each.stage, each.name): each for each in targets.evaluate(figures, quick=False)}
    judged = {key: each.passed for key, each in found.items()}
    assert judged["tests", "kernel tests"] is True
    assert judged["kernels-bf16", "L_I, kernels, forward"] is True
    assert found["kernels-bf16", "L_I, kernels, backward"].found == "9 us"
    assert judged["kernels-bf16", "L_I, kernels, backward"] is False
    assert judged["kernels-bf16", "L_G + L_L, K=100, kernels, forward"] is None
    assert judged["kernels-bf16", "L_I, the CPU's time to enqueue it"] is False
    case = "B=32 S=128 D=768"
    assert judged["steps", f"step {case}, ours over vkd-only"] is True
    assert judged["steps", f"step {case}, ours-fsd_g over vkd-only"] is False
    assert found["peers-bf16", "intra: closest other over ours"].found.startswith("0.90x, plain")
    assert judged["peers-bf16", "intra: closest other over ours"] is False
    assert found["peers-bf16", f"local {case}, ours"][3:] == ("value is off by 1", False)
    assert judged["memcheck", "memcheck"] is False
    quick = {(each.stage, each.name): each.passed for each in targets.evaluate(figures, quick=True)}
    assert quick["kernels-bf16", "L_I, kernels, backward"] is None
    assert quick["memcheck", "memcheck"] is False


def test_tests_that_did_not_run_are_no_success() -> None:
    none = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    assert targets.evaluate({"tests": none}, quick=False)[0].passed is False


def test_every_kernel_target_names_a_pass_that_is_measured() -> None:
    from benchmarks.speed.commands.kernel_times import TINY, cases

    names = {name for name, _ in cases(torch.float32, CPU, TINY)}
    stages = {each.name for each in STAGES}
    for of_stage, name, part, _ in targets.KERNEL_US:
        assert of_stage in stages
        assert {name} | (set() if part == "both" else {f"{name}, forward"}) <= names


def test_the_time_of_all_stages_is_nine_minutes() -> None:
    assert sum(each.seconds for each in STAGES) <= 9 * 60


def test_a_session_runs_here_on_tiny_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["gpu-session", "--quick", "--stages", "kernels-bf16,capture", "--output", str(tmp_path)]
    assert main([*chosen, "--minutes", "30"]) == 0
    found = stored(tmp_path)
    assert {name: each["status"] for name, each in found.items()} == {"kernels-bf16": OK, "capture": OK}
    by_name = {
        target["name"]: target for target in json.loads((tmp_path / "session.json").read_text())["targets"]
    }
    assert by_name["L_I, CUDA graph"]["passed"] is True
    assert by_name["L_G + L_L, K=300, kernels"]["found"].endswith(" us")
    assert "wrote" in capsys.readouterr().out
    log = (tmp_path / "session.log").stat().st_size
    assert main(chosen) == 0
    assert (tmp_path / "session.log").stat().st_size == log


def test_a_capture_that_fails_or_writes_other_bits_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def graph(replay: Callable[[torch.Tensor], object]) -> object:
        def captured(call: Callable[[], Sequence[torch.Tensor]]) -> object:
            found = call()
            return found, lambda: replay(found[0])

        return captured

    call = lambda: (torch.ones(3),)  # noqa: E731
    assert capture.check(call, CPU) == (True, "")
    monkeypatch.setattr(capture, "_second_call", graph(lambda found: found))
    assert capture.check(call, CPU) == (False, "a replay has other bits than a plain call")

    def refuses(_: object) -> object:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(capture, "_second_call", refuses)
    assert capture.check(call, CPU).reason == "RuntimeError: operation not permitted when stream is capturing"


def test_bad_arguments_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OUT", raising=False)
    output = ["--output", str(tmp_path / "new")]
    cases = {
        "--stages: expected some of tests": ["--stages", "test", *output],
        "--output: expected a folder": ["--quick"],
        "--minutes: expected more than 0, got 0": ["--quick", "--minutes", "0", *output],
    }
    if not torch.cuda.is_available():
        cases["gpu-session: expected a GPU, torch finds none"] = output
    for message, arguments in cases.items():
        assert main(["gpu-session", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_tree_without_git_has_the_commit_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_git", lambda *_: "")
    monkeypatch.setenv("FSD_COMMIT", "def5678")
    assert results.environment(CPU)["commit"] == "def5678"


def test_the_script_says_what_it_expects() -> None:
    done = subprocess.run(
        ["bash", "tools/gpu_session.sh", "go"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "expected prepare or run, got 'go'" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_script_runs_a_session(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "tools/gpu_session.sh", "run", "--output", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "GPU_SESSION_FOLDER": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "gpu-session: expected a GPU" in done.stderr


def test_a_sanitizers_reports_name_the_kernels() -> None:
    output = (
        "========= COMPUTE-SANITIZER\n"
        "========= Error: Race reported between Write access at _gram_sum_kernel+0x5e0 and Read\n"
        "========= Error: Race reported between Write access at 0x10 in _gram_fwd_kernel\n"
        "tests/kernels/test_gram.py::test_kernels_launched PASSED\n"
        "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    )
    found = read_sanitizer(Path(), output)
    assert found["errors"] == 2
    assert found["kernels"] == {"_gram_sum_kernel": 1, "_gram_fwd_kernel": 1}
    assert found["passed"] == 1
    (line,) = [each for each in targets.evaluate({"racecheck": found}, False) if each.stage == "racecheck"]
    assert line.found == "2 errors, _gram_sum_kernel 1, _gram_fwd_kernel 1"
    assert line.passed is False
