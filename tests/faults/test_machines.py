"""What else may be wrong with a machine: its clock, its users' folders, files that others change or write as well."""

import os
import shutil
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from fsd_fast.cli import main
from fsd_fast.clustering import checkpoint
from fsd_fast.training.checkpoints import find_checkpoint
from tests.faults.child import in_child, kill_at_call
from tests.faults.registry import fault
from tests.launch import finish, start
from tests.tiny import memory_flags, tiny, write_rte

__all__ = ["tiny"]

SAVING = ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2"]


def flags(tiny, folder, *more):
    return [*tiny.distillation(folder, "fsd_ilg", steps=6), *SAVING, *more]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["distill", *flags(tiny, folder)]) == 0
    return folder


def same_weights(one, other, name="model.safetensors"):
    return all(
        torch.equal(value, load_file(other / name)[key]) for key, value in load_file(one / name).items()
    )


@fault(
    "the clock is set back an hour at every step",
    "the same weights; the newest checkpoint is the one of the last step",
)
def test_a_clock_that_goes_back(tiny, whole, tmp_path, monkeypatch):
    now, calls = time.time(), [0]

    def back():
        calls[0] += 1
        return now - 3600 * calls[0]

    monkeypatch.setattr(time, "time", back)
    folder = tmp_path / "run"
    assert main(["distill", *flags(tiny, folder)]) == 0
    assert same_weights(folder, whole)
    assert find_checkpoint(str(folder), "last") == str(folder / "checkpoint-6")
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


@fault("the files of checkpoints have times in the wrong order", "they go by their steps")
def test_times_of_files_do_not_count(tiny, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for path in folder.rglob("checkpoint-6/*"):
        os.utime(path, (0, 0))
    os.utime(folder / "checkpoint-6", (0, 0))
    assert find_checkpoint(str(folder), "last") == str(folder / "checkpoint-6")
    more = ["--resume_from_checkpoint", "last", "--max_steps", "8"]
    assert main(["distill", *flags(tiny, folder, *more)]) == 0
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]


@fault("HOME is not set, or names a folder that is not there", "commands run as ever", slow=True)
@pytest.mark.parametrize("home", [None, "/no/such/folder"])
def test_no_home(tiny, home):
    command = [sys.executable, "train_ds.py", "evaluate", *tiny.data()]
    command += ["--model_name_or_path", str(tiny.teacher), "--use_cpu", "true"]
    shell = ["env", *(["-u", "HOME"] if home is None else [f"HOME={home}"])]
    done = finish(start([*shell, *command], HF_HOME=""))
    assert done.returncode == 0, done.stdout[-2000:]


@fault(
    "the training data change between a kill and the resumption: a word, a label, a row",
    "refused in one line that names both; --allow_changes train_data goes on",
)
@pytest.mark.parametrize("change", ["word", "label", "row"])
@pytest.mark.parametrize("command", ["distill", "teacher"])
def test_data_that_change(tiny, tmp_path, capsys, command, change):
    data, folder = write_rte(tmp_path / "RTE"), tmp_path / "run"
    given = {
        "distill": flags(tiny, folder, "--data_dir", str(data)),
        "teacher": [
            *tiny.data(),
            "--data_dir",
            str(data),
            "--model_name_or_path",
            str(tiny.backbone),
            *SAVING,
        ],
    }[command]
    given = [*given, "--output_dir", str(folder), "--max_steps", "4", "--use_cpu", "true"]
    assert main([command, *given]) == 0
    lines = (data / "train.tsv").read_text().splitlines()
    old = {"word": "a two", "label": "not_entailment", "row": None}[change]
    at = next(i for i, line in enumerate(lines) if i and (old is None or old in line))
    if change == "row":
        lines[at], lines[at + 1] = lines[at + 1], lines[at]
    else:
        lines[at] = lines[at].replace(old, {"word": "a three", "label": "entailment"}[change])
    (data / "train.tsv").write_text("\n".join(lines) + "\n")
    more = ["--max_steps", "6", "--resume_from_checkpoint", "last"]
    capsys.readouterr()
    assert main([command, *given, *more]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{folder / 'checkpoint-4'} belongs to a run with other settings: train_data was '" in line
    assert main([command, *given, *more, "--allow_changes", "train_data"]) == 0


@fault("the teacher is trained anew between a kill and the resumption", "refused in one line that names both")
def test_a_teacher_that_changes(tiny, tmp_path, capsys):
    teacher, folder = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(tiny.teacher, teacher)
    given = tiny.distillation(folder, "fsd_il", steps=4)
    given = [*given, *SAVING, "--teacher_model_name_or_path", str(teacher)]
    assert main(["distill", *given]) == 0
    weights = load_file(teacher / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert main(["distill", *given, "--resume_from_checkpoint", "last", "--max_steps", "6"]) == 2
    assert "teacher_fingerprint was '" in capsys.readouterr().err.splitlines()[-1]


@fault(
    "the data or the teacher change while a memory is built and killed",
    "refused in one line that names what changed",
)
def test_a_memory_whose_data_change(tiny, tmp_path, capsys):
    data, folder = write_rte(tmp_path / "RTE"), tmp_path / "memory"
    given = [*memory_flags(tiny, folder), "--data_dir", str(data), "--per_device_batch_size", "5"]
    moment = kill_at_call(checkpoint.Stage, "finish", 2)
    assert in_child("memory", given, tmp_path / "out", moment).status < 0
    text = (data / "train.tsv").read_text()
    (data / "train.tsv").write_text(text.replace("a two", "a three", 1))
    assert main(["memory", *given]) == 1
    assert "tokens is" in capsys.readouterr().err.splitlines()[-1]


@fault(
    "two processes build one memory, or write one cache, at the same time",
    "one of them is refused in one line; the other ends with the same bits",
    slow=True,
)
def test_two_builders(tiny, tmp_path):
    command = [sys.executable, "train_ds.py", "memory", *memory_flags(tiny, tmp_path / "memory")]
    command += ["--teacher_cache_dir", str(tmp_path / "cache")]
    ended = [finish(each) for each in [start(command), start(command)]]
    assert sorted(each.returncode for each in ended) == [0, 2], [each.stdout[-1500:] for each in ended]
    (refused,) = [each.stdout for each in ended if each.returncode == 2]
    line = refused.splitlines()[-1]
    # The second either meets the first at work, or comes when it is done.
    assert "is being written by process" in line or "holds a run already" in line
    assert same_weights(tmp_path / "memory", tiny.memory_exclude, "memory.safetensors")


@fault(
    "two runs train in one folder at the same time", "the second is refused in one line and changes nothing"
)
def test_two_runs(tiny, whole, tmp_path):
    command = [sys.executable, "train_ds.py", "distill", *flags(tiny, tmp_path / "run")]
    ended = [finish(each) for each in [start(command), start(command)]]
    codes = sorted(each.returncode for each in ended)
    assert codes in ([0, 1], [0, 2]), [each.stdout[-1500:] for each in ended]
    assert same_weights(tmp_path / "run", whole)
