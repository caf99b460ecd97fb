"""Signals: training saves and stops at the end of a step, a memory at a batch, and both go on to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file

from fsd_fast.cli import main
from fsd_fast.clustering import checkpoint
from fsd_fast.commands import run
from fsd_fast.shutdown import Stopped, stop_requested, stoppable
from fsd_fast.training.checkpoints import find_checkpoint
from fsd_fast.training.trainer import ClassifierTrainer
from tests.faults.registry import fault
from tests.tiny import ROOT, TRAINING, history, losses, memory_flags, tiny

__all__ = ["tiny"]

STEPS = 6  # two epochs of three batches
EPOCHS = ["--save_strategy", "epoch", "--eval_strategy", "epoch", "--save_total_limit", "1"]
BEST = [*EPOCHS, "--load_best_model_at_end", "true"]


def flags(tiny, folder, *more):
    return [*tiny.distillation(folder, "fsd_ilg", steps=STEPS), *more]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Undisturbed runs: without checkpoints, with those of each epoch, and with the best one at the end."""
    folders = {}
    for name, more in (("no", []), ("epoch", EPOCHS), ("best", BEST)):
        folders[name] = tmp_path_factory.mktemp("whole") / name
        run("distill", flags(tiny, folders[name], *more))
    return folders


@pytest.fixture
def signal_at(monkeypatch):
    """Send this process a signal in the middle of a training step."""
    original = ClassifierTrainer.training_step

    def arrange(step, number):
        def training_step(self, *arguments, **keywords):
            if self.state.global_step + 1 == step:
                os.kill(os.getpid(), number)
            return original(self, *arguments, **keywords)

        monkeypatch.setattr(ClassifierTrainer, "training_step", training_step)

    return arrange


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@fault(
    "SIGTERM in any step, with and without checkpoints of each epoch, with the best one",
    "the step is saved and the run ends with 143; continued, it has the same bits, log and evaluations",
)
@pytest.mark.parametrize("step", range(1, STEPS))
@pytest.mark.parametrize(("kind", "more"), [("no", []), ("epoch", EPOCHS), ("best", BEST)])
def test_sigterm_saves_and_the_run_goes_on_to_the_same_bits(
    tiny, whole, tmp_path, signal_at, kind, more, step
):
    folder = tmp_path / "run"
    signal_at(step, signal.SIGTERM)
    with pytest.raises(
        Stopped, match=rf"stopped by SIGTERM: step {step} of {STEPS}, saved in .*checkpoint-{step}"
    ):
        run("distill", flags(tiny, folder, *more))
    assert find_checkpoint(str(folder), "last") == str(folder / f"checkpoint-{step}")
    assert not (folder / "model.safetensors").exists()
    assert not (folder / ".lock").exists()
    signal_at(None, None)
    run("distill", flags(tiny, folder, *more, "--resume_from_checkpoint", "auto"))
    assert equal(weights(folder), weights(whole[kind]))
    assert losses(folder) == losses(whole[kind])
    evaluations = [
        [entry["eval_loss"] for entry in history(each) if "eval_loss" in entry]
        for each in (folder, whole[kind])
    ]
    assert evaluations[0] == evaluations[1]


@fault(
    "SIGTERM, SIGINT, SIGHUP",
    "143, 130, 129, and one line that says how to go on",
)
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_the_exit_status_and_the_line_name_the_signal(tiny, tmp_path, signal_at, capfd, number, status):
    folder = tmp_path / "run"
    signal_at(2, number)
    assert main(["distill", *flags(tiny, folder)]) == status
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"fsd-fast distill: stopped by {number.name}: step 2 of {STEPS}, saved in {folder / 'checkpoint-2'}; "
        "the same command with --resume_from_checkpoint auto continues"
    )


def test_a_teacher_stops_too_and_saves_all_of_its_state(tiny, tmp_path, signal_at):
    folder = tmp_path / "run"
    signal_at(1, signal.SIGTERM)
    given = [*tiny.data(), *TRAINING, "--model_name_or_path", str(tiny.backbone), "--output_dir", str(folder)]
    with pytest.raises(Stopped):
        run("teacher", [*given, "--max_steps", "3", "--save_only_model", "true"])
    assert find_checkpoint(str(folder), "last") == str(folder / "checkpoint-1")
    assert json.loads((folder / "checkpoint-1" / "manifest.json").read_text())["resumable"]


@fault(
    "SIGTERM in the last step",
    "the run finishes and exports",
)
def test_a_signal_in_the_last_step_lets_the_run_finish(tiny, whole, tmp_path, signal_at):
    signal_at(STEPS, signal.SIGTERM)
    run("distill", flags(tiny, tmp_path / "run"))
    assert equal(weights(tmp_path / "run"), weights(whole["no"]))


def test_no_sum_of_the_log_is_lost(tiny, tmp_path, signal_at):
    folder = tmp_path / "run"
    signal_at(2, signal.SIGTERM)
    with pytest.raises(Stopped):
        run("distill", flags(tiny, folder, "--logging_steps", "4"))
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [2]


def test_a_second_interrupt_stops_at_once():
    def interrupted_twice():
        with stoppable():
            os.kill(os.getpid(), signal.SIGINT)
            assert stop_requested() == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt) as interrupt:
        interrupted_twice()
    assert not isinstance(interrupt.value, Stopped)
    assert stop_requested() is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_launchers_send_twice_is_one_request(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with stoppable():
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop_requested() == signal.SIGINT


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop_requested() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_worker_dies_of_the_signal():
    reading, writing = os.pipe()
    with stoppable():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's threads
            worker = os.fork()
        if worker == 0:
            os.write(writing, b"1")
            time.sleep(60)
            os._exit(0)
        os.read(reading, 1)
        os.kill(worker, signal.SIGTERM)
        _, status = os.waitpid(worker, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert stop_requested() is None


@fault(
    "SIGTERM while a memory is built",
    "it stops at the batch; continued, it has the same bits and reads no batch twice",
)
@pytest.mark.parametrize("batch", [1, 3, 5, 9])
def test_a_memory_stops_at_a_batch_and_goes_on_to_the_same_bits(tiny, tmp_path, monkeypatch, batch):
    # Five batches in each of the two passes, and a state that is otherwise saved every 200 batches.
    given = [*memory_flags(tiny, tmp_path / "memory"), "--per_device_batch_size", "5"]
    run("memory", [*memory_flags(tiny, tmp_path / "whole"), "--per_device_batch_size", "5"])
    original, done = checkpoint.Stage.batch_done, []

    def batch_done(self, *arguments):
        done.append(0)
        if len(done) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Stage, "batch_done", batch_done)
        with pytest.raises(Stopped, match=r"batch \d of stage .*the same command continues the build"):
            run("memory", given)
        assert len(done) == batch
        run("memory", given)
    assert len(done) == 10, "no batch was read twice"
    assert equal(*(load_file(tmp_path / name / "memory.safetensors") for name in ("memory", "whole")))


def test_a_process_of_its_own(tiny, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "train_ds.py", "distill", *flags(tiny, folder, "--max_steps", "5000")]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if "loss_vkd" in line:
            process.send_signal(signal.SIGTERM)
            break
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 143, printed
    assert "SIGTERM: stopping where the work can be continued\n" in printed
    assert printed.splitlines()[-1].startswith("fsd-fast distill: stopped by SIGTERM: step ")
    assert find_checkpoint(str(folder), "last") is not None
