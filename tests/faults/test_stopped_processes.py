"""A signal to one process, or to the launcher: all processes stop at the same step, and the run can go on."""

import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from fsd_fast.training.checkpoints import find_checkpoint
from tests.faults.processes import signal_while_training
from tests.faults.registry import fault
from tests.launch import remove_build_locks, run_torchrun, start_deepspeed, start_torchrun
from tests.tiny import losses, tiny

__all__ = ["tiny"]

pytestmark = pytest.mark.launcher
STEPS = 100


def distillation(tiny, folder, *more):
    return ["distill", *tiny.distillation(folder, "fsd_ilg", steps=STEPS, batch=4), *more]


def stopped_at(done):
    found = re.findall(r"stopped by (\w+): step (\d+) of", done.stdout)
    assert len(found) == 1, done.stdout[-4000:]
    return found[0][0], int(found[0][1])


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_torchrun(2, distillation(tiny, folder))
    return folder


@fault(
    "SIGTERM to one of two processes, or to torchrun",
    "both save the same step and stop; continued, the run ends with the same bits",
    slow=True,
)
@pytest.mark.parametrize("rank", [0, 1, None], ids=["the first process", "the second process", "torchrun"])
def test_all_processes_stop_at_the_same_step_and_go_on_to_the_same_bits(tiny, whole, tmp_path, rank):
    folder = tmp_path / "run"
    done = signal_while_training(start_torchrun(2, distillation(tiny, folder)), signal.SIGTERM, rank)
    assert done.returncode != 0
    name, step = stopped_at(done)
    assert name == "SIGTERM"
    assert 0 < step < STEPS
    assert find_checkpoint(str(folder), "last") == str(folder / f"checkpoint-{step}")
    run_torchrun(2, distillation(tiny, folder, "--resume_from_checkpoint", "auto"))
    one, other = (load_file(each / "model.safetensors") for each in (folder, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert losses(folder) == losses(whole)


@fault(
    "SIGTERM to one of two processes of the deepspeed launcher, with ZeRO 2 and 3",
    "both save the same step and stop",
    slow=True,
)
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed builds its CPU communication with g++")
@pytest.mark.parametrize("config", ["ds_config.json", "ds_config_zero3.json"])
def test_the_deepspeed_launcher_passes_the_signal_on(tiny, tmp_path, config):
    remove_build_locks()
    folder = tmp_path / "run"
    launcher = start_deepspeed(2, distillation(tiny, folder, "--deepspeed", config))
    done = signal_while_training(launcher, signal.SIGTERM, rank=1)
    assert done.returncode != 0
    _, step = stopped_at(done)
    assert find_checkpoint(str(folder), "last") == str(folder / f"checkpoint-{step}")
