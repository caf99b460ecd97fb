"""One of two processes is killed: the job ends within a minute and names it, and it can go on."""

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
SAVING = ["--save_strategy", "steps", "--save_steps", "20", "--save_total_limit", "2"]


def distillation(tiny, folder, *more):
    return ["distill", *tiny.distillation(folder, "fsd_ilg", steps=200, batch=4), *SAVING, *more]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_torchrun(2, distillation(tiny, folder))
    return folder


@fault(
    "SIGKILL of one of two processes under torchrun",
    "the job ends within a minute and names the rank; continued, it ends with the same bits",
    slow=True,
)
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_under_torchrun(tiny, whole, tmp_path, rank):
    folder = tmp_path / "run"
    done = signal_while_training(start_torchrun(2, distillation(tiny, folder)), signal.SIGKILL, rank)
    assert done.returncode != 0
    cause = done.stdout.rpartition("Root Cause")[2]
    assert f"(local_rank: {rank})" in cause, done.stdout[-3000:]
    assert "exitcode  : -9" in cause
    run_torchrun(2, distillation(tiny, folder, "--resume_from_checkpoint", "auto"))
    one, other = (load_file(each / "model.safetensors") for each in (folder, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert losses(folder) == losses(whole)
    assert find_checkpoint(str(folder), "last") == str(folder / "checkpoint-200")


@fault(
    "SIGKILL of one of two processes under the deepspeed launcher, with ZeRO 2",
    "the job ends within a minute and says with which signal; the newest checkpoint is whole",
    slow=True,
)
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed builds its CPU communication with g++")
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_under_deepspeed(tiny, tmp_path, rank):
    remove_build_locks()
    folder = tmp_path / "run"
    given = distillation(tiny, folder, "--deepspeed", "ds_config.json", "--save_steps", "1")
    done = signal_while_training(start_deepspeed(2, given), signal.SIGKILL, rank)
    assert done.returncode != 0
    assert "exits with return code = -9" in done.stdout, done.stdout[-3000:]
    assert find_checkpoint(str(folder), "last") is not None
