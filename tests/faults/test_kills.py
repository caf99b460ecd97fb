"""SIGKILL at any moment of a run: what goes on afterwards ends with the bits of a run that was never killed."""

import json
import os
import random
import signal

import pytest
import torch
from safetensors.torch import load_file

from fsd_fast.cli import main
from fsd_fast.training import manifest, run, stopping
from fsd_fast.training.checkpoints import find_checkpoint
from fsd_fast.training.trainer import ClassifierTrainer
from tests.faults.child import at_files, in_child, kill_at_call, kill_at_file
from tests.faults.registry import fault
from tests.tiny import TRAINING, history, losses, tiny

__all__ = ["tiny"]

# Six steps in two epochs of three; checkpoints after 2, 4, 6 of which one is kept; evaluations after 3 and 6.
STEPS = 6
SAVING = [
    "--save_strategy",
    "steps",
    "--save_steps",
    "2",
    "--save_total_limit",
    "1",
    "--eval_strategy",
    "epoch",
]
COMMANDS = ("distill", "teacher")


def flags(tiny, folder, command):
    if command == "distill":
        return [*tiny.distillation(folder, "fsd_ilg", steps=STEPS), *SAVING]
    given = [*tiny.data(), *TRAINING, *SAVING, "--model_name_or_path", str(tiny.backbone)]
    given += ["--output_dir", str(folder), "--max_steps", str(STEPS), "--logging_steps", "1"]
    return [*given, "--per_device_train_batch_size", "8"]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run of each command that nothing disturbed."""
    folders = {command: tmp_path_factory.mktemp("whole") / command for command in COMMANDS}
    for command, folder in folders.items():
        assert main([command, *flags(tiny, folder, command)]) == 0
    return folders


def goes_on_to_the_same(tiny, folder, whole, command):
    """Continue a run, and compare everything that it leaves with what the undisturbed one left."""
    assert main([command, *flags(tiny, folder, command), "--resume_from_checkpoint", "auto"]) == 0
    one, other = (load_file(each / "model.safetensors") for each in (folder, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert losses(folder) == losses(whole)
    scores = [
        {(e["step"], e["eval_loss"]) for e in history(each) if "eval_loss" in e} for each in (folder, whole)
    ]
    assert scores[0] == scores[1]
    # An older checkpoint stays where the kill came before its removal and no later one was saved.
    names = [{path.name for path in each.iterdir()} - {"checkpoint-4"} for each in (folder, whole)]
    assert names[0] == names[1]
    assert find_checkpoint(str(folder), "last") == str(folder / f"checkpoint-{STEPS}")
    results = [json.loads((each / "eval_results.json").read_text()) for each in (folder, whole)]
    assert results[0]["eval_loss"] == results[1]["eval_loss"]


# Moment -> function, and how often it is called in the run.
MOMENTS = {
    "in a step, before its forward": (ClassifierTrainer, "training_step", STEPS),
    "in a step, before its update": (ClassifierTrainer, "_get_grad_norm", STEPS),
    "in the update of the weights": (torch.optim.AdamW, "step", STEPS),
    "while saving, before the weights": (ClassifierTrainer, "save_model", 3),
    "while saving, before the optimizer": (ClassifierTrainer, "_save_optimizer_and_scheduler", 3),
    "while saving, before the manifest": (manifest, "write_json", 3),
    "while removing an older checkpoint": (manifest.shutil, "rmtree", 2),
    "while evaluating": (ClassifierTrainer, "prediction_step", 2),
    "between two epochs": (stopping.StopAtSignal, "on_epoch_end", 2),
    "before the export": (run, "export_student", 1),
    "between the export and the results": (ClassifierTrainer, "save_metrics", 2),
    "before the last file": (ClassifierTrainer, "save_state", 1),
}


@fault(
    "SIGKILL at 12 seeded moments: in steps, saving, removing, evaluating, between epochs, exporting",
    "continued, the run ends with the same weights, log and figures, bit for bit",
    slow=True,
)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_killed(tiny, whole, tmp_path, command, moment):
    owner, name, calls = MOMENTS[moment]
    call = random.Random(moment + command).randint(1, calls)
    folder = tmp_path / "run"
    ended = in_child(command, flags(tiny, folder, command), tmp_path / "out", kill_at_call(owner, name, call))
    assert ended.status == -signal.SIGKILL, ended.printed[-2000:]
    goes_on_to_the_same(tiny, folder, whole[command], command)


@pytest.fixture(scope="module")
def file_events(tiny, tmp_path_factory):
    """How often a run of distill writes, renames or removes a file in its folder."""
    folder = tmp_path_factory.mktemp("events")
    counter = os.open(folder / "counter", os.O_WRONLY | os.O_CREAT)
    count = at_files(folder / "run", lambda: os.write(counter, b"1"))
    assert in_child("distill", flags(tiny, folder / "run", "distill"), folder / "out", count).status == 0
    os.close(counter)
    return (folder / "counter").stat().st_size


@fault(
    "SIGKILL at 12 seeded writes, renames and removals of files in the run's folder",
    "as above",
    slow=True,
)
@pytest.mark.parametrize("draw", range(12))
def test_killed_at_a_file(tiny, whole, tmp_path, file_events, draw):
    folder = tmp_path / "run"
    number = random.Random(draw).randint(1 + draw * file_events // 12, (draw + 1) * file_events // 12)
    ended = in_child(
        "distill", flags(tiny, folder, "distill"), tmp_path / "out", kill_at_file(folder, number)
    )
    assert ended.status == -signal.SIGKILL, (number, ended.printed[-2000:])
    goes_on_to_the_same(tiny, folder, whole["distill"], "distill")


@fault("SIGKILL twice in a row, the second while the run goes on", "as above")
def test_killed_twice(tiny, whole, tmp_path):
    folder = tmp_path / "run"
    given = flags(tiny, folder, "distill")
    for call, more in ((4, []), (2, ["--resume_from_checkpoint", "auto"])):
        moment = kill_at_call(ClassifierTrainer, "training_step", call)
        ended = in_child("distill", [*given, *more], tmp_path / "out", moment)
        assert ended.status == -signal.SIGKILL, ended.printed[-2000:]
    goes_on_to_the_same(tiny, folder, whole["distill"], "distill")
