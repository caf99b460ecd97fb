"""Checkpoints that are whole or not there: cut off while written, damaged afterwards, removed in the right order."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from fsd_fast.commands import run
from fsd_fast.files import exclusive_folder
from fsd_fast.training.checkpoints import find_checkpoint
from fsd_fast.training.manifest import MANIFEST_FILE, checkpoint_faults, checkpoint_folders, seal_checkpoint
from fsd_fast.untrusted import seal
from tests.faults.registry import fault
from tests.tiny import history, losses, tiny

__all__ = ["tiny"]

SAVING = ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "5"]


def flags(tiny, folder, *more):
    return [*tiny.distillation(folder, "fsd_ilg", steps=6), *SAVING, *more]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """An undisturbed run of six steps with checkpoints after 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run("distill", flags(tiny, folder))
    return folder


@pytest.fixture
def cut_off(whole, tmp_path):
    """The run as it was after its fourth step."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint-6")
    for name in ("model.safetensors", "all_results.json", "train_results.json", "trainer_state.json"):
        (folder / name).unlink()
    return folder


def resumed(tiny, folder, *more):
    run("distill", flags(tiny, folder, "--resume_from_checkpoint", "last", *more))
    return load_file(folder / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_file_of_a_checkpoint_is_in_its_manifest(whole):
    folder = whole / "checkpoint-4"
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert manifest["files"].keys() == files - {MANIFEST_FILE}
    assert {
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    } <= files
    assert checkpoint_faults(folder) is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    **{f"{name} {kind}": (name, act) for name in
       ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
       for kind, act in (("missing", os.unlink), ("truncated", truncate), ("with a flipped bit", flip))},
    "trainer_state.json empty": ("trainer_state.json", lambda path: path.write_text("")),
    "manifest missing": (MANIFEST_FILE, os.unlink),
    "manifest truncated": (MANIFEST_FILE, truncate),
    "manifest of another format": (MANIFEST_FILE, lambda path: path.write_text('{"format": 3}')),
}  # fmt: skip


@fault(
    "a file of the newest checkpoint is missing, truncated, empty, or has a flipped bit (18 kinds)",
    "named in one line, and the newest whole one is taken; asked for by name it is refused",
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(cut_off, caplog, damage):
    name, act = DAMAGES[damage]
    act(cut_off / "checkpoint-4" / name)
    assert find_checkpoint(str(cut_off), "last") == str(cut_off / "checkpoint-2")
    assert find_checkpoint(str(cut_off), "auto") == str(cut_off / "checkpoint-2")
    assert f"{cut_off / 'checkpoint-4'}: " in caplog.text
    assert name in caplog.text
    with pytest.raises(ValueError, match="checkpoint-4 is damaged") as error:
        find_checkpoint(str(cut_off), str(cut_off / "checkpoint-4"))
    assert name in str(error.value)


def test_a_run_goes_on_from_an_older_whole_checkpoint_to_the_same_bits(tiny, whole, cut_off):
    flip(cut_off / "checkpoint-4" / "model.safetensors")
    assert equal(resumed(tiny, cut_off), load_file(whole / "model.safetensors"))
    assert losses(cut_off) == losses(whole)
    # The damaged one was written anew on the way.
    assert checkpoint_faults(cut_off / "checkpoint-4") is None


@fault(
    "every checkpoint is damaged",
    "refused in one line that lists each fault; auto starts anew",
)
def test_without_a_whole_checkpoint(cut_off):
    for folder in checkpoint_folders(cut_off):
        flip(folder / "model.safetensors")
    assert find_checkpoint(str(cut_off), "auto") is None
    with pytest.raises(FileNotFoundError, match="holds no whole checkpoint") as error:
        find_checkpoint(str(cut_off), "last")
    assert all(str(folder) in str(error.value) for folder in checkpoint_folders(cut_off))


@fault(
    "the state of the optimizer, the schedule or the random numbers is missing",
    "refused; --allow_partial_resume goes on without and says so",
)
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_partial_resume_is_asked_for_and_said(tiny, cut_off, caplog, name):
    shutil.rmtree(cut_off / "checkpoint-2")
    (cut_off / "checkpoint-4" / name).unlink()
    with pytest.raises(FileNotFoundError, match="--allow_partial_resume true goes on without"):
        resumed(tiny, cut_off)
    resumed(tiny, cut_off, "--allow_partial_resume", "true")
    assert f"{name} is missing; the run goes on without" in caplog.text
    assert history(cut_off)[-1]["step"] == 6


def test_a_partial_resume_takes_no_damaged_weights(cut_off):
    (cut_off / "checkpoint-4" / "rng_state.pth").unlink()
    flip(cut_off / "checkpoint-4" / "model.safetensors")
    found = find_checkpoint(str(cut_off), "last", allow_partial=True)
    assert found == str(cut_off / "checkpoint-2")


def test_a_changed_manifest_is_found(cut_off):
    path = cut_off / "checkpoint-4" / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    del manifest["files"]["optimizer.pt"]
    path.write_text(json.dumps(manifest))
    assert "its checksum is not that of its fields" in checkpoint_faults(path.parent).reasons[0]


def test_a_manifest_of_version_0_2_0_is_read(cut_off):
    path = cut_off / "checkpoint-4" / MANIFEST_FILE
    manifest = json.loads(path.read_text()) | {"format": 1}
    del manifest["checksum"]
    path.write_text(json.dumps(manifest))
    assert checkpoint_faults(path.parent) is None


class Stop(BaseException):
    """A kill: nothing that cleans up after errors sees it."""


WRITES = ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "seal")


@fault(
    "a kill at each stage of writing a checkpoint",
    "the older one is taken and the run goes on to the same bits",
)
@pytest.mark.parametrize("point", WRITES)
@pytest.mark.parametrize("limit", ["1", "5"])
def test_a_kill_while_a_checkpoint_is_written(tiny, whole, tmp_path, monkeypatch, point, limit):
    from fsd_fast.training import trainer

    folder = tmp_path / "run"
    owner, name = (trainer, "seal_checkpoint") if point == "seal" else (trainer.FSDTrainer, point)
    original, calls = getattr(owner, name), []

    def killed(*arguments, **keywords):
        calls.append(0)
        if len(calls) == 2:
            raise Stop
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Stop):
            run("distill", [*flags(tiny, folder), "--save_total_limit", limit])
    # Half of the second checkpoint may be there: transformers' own search would take it.
    assert find_checkpoint(str(folder), "last") == str(folder / "checkpoint-2")
    assert equal(resumed(tiny, folder, "--save_total_limit", limit), load_file(whole / "model.safetensors"))
    assert get_last_checkpoint(str(folder)) == str(folder / "checkpoint-6")


@fault(
    "a folder checkpoint-analysis of the user's lies among the checkpoints",
    "it stays; older checkpoints go, the best one stays",
)
def test_old_checkpoints_go_by_their_step_and_the_best_stays(tiny, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoint-analysis").mkdir(parents=True)
    more = ["--save_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1", "--learning_rate", "3e-2"]
    more += ["--load_best_model_at_end", "true", "--metric_for_best_model", "loss", "--save_total_limit", "2"]
    run("distill", [*flags(tiny, folder), *more, "--overwrite_output_dir", "true"])
    best = json.loads((folder / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert {path.name for path in checkpoint_folders(folder)} == {os.path.basename(best), "checkpoint-6"}
    assert (folder / "checkpoint-analysis").is_dir()


@fault(
    "a run that was killed while it exported is continued from its last step, inside an epoch",
    "it makes no further step and exports the same bits",
)
def test_a_run_that_has_made_its_steps_makes_no_more(tiny, tmp_path):
    folder, four = tmp_path / "run", ["--max_steps", "4"]
    run("distill", flags(tiny, folder, *four))
    before, logged = load_file(folder / "model.safetensors"), losses(folder)
    for name in ("model.safetensors", "all_results.json"):
        (folder / name).unlink()
    assert equal(resumed(tiny, folder, *four), before)
    assert losses(folder) == logged
    assert history(folder)[-1]["step"] == 4
    assert [path.name for path in checkpoint_folders(folder)] == ["checkpoint-2", "checkpoint-4"]


def test_checkpoints_without_the_optimizer_are_not_resumed(tiny, tmp_path):
    folder = tmp_path / "run"
    run("distill", flags(tiny, folder, "--save_only_model", "true"))
    with pytest.raises(FileNotFoundError, match="holds the model alone"):
        find_checkpoint(str(folder), "last")


@fault(
    "a manifest names a file outside of its checkpoint",
    "refused",
)
def test_a_manifest_that_leads_out_of_its_folder_is_refused(cut_off):
    folder = cut_off / "checkpoint-4"
    path = folder / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    manifest["files"]["../checkpoint-2/optimizer.pt"] = manifest["files"]["optimizer.pt"]
    del manifest["checksum"]
    path.write_text(json.dumps(seal(manifest)))
    assert "lies outside" in checkpoint_faults(folder).reasons[0]


def test_a_full_disk_leaves_the_older_checkpoint(tiny, whole, tmp_path, monkeypatch):
    from fsd_fast.training import trainer

    folder, calls = tmp_path / "run", []

    def full(path, **keywords):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(path))
        seal_checkpoint(path, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "seal_checkpoint", full)
        with pytest.raises(OSError, match="No space left"):
            run("distill", [*flags(tiny, folder), "--save_total_limit", "1"])
    assert find_checkpoint(str(folder), "last") == str(folder / "checkpoint-2")
    assert equal(resumed(tiny, folder), load_file(whole / "model.safetensors"))


def test_two_runs_do_not_share_a_folder(tiny, cut_off):
    before = {path: path.stat().st_mtime_ns for path in cut_off.rglob("*")}
    with (
        exclusive_folder(cut_off, "output_dir"),
        pytest.raises(BlockingIOError, match="is being written by process"),
    ):
        resumed(tiny, cut_off)
    after = {path: path.stat().st_mtime_ns for path in cut_off.rglob("*") if path.name != ".lock"}
    assert after.keys() == before.keys()
    assert all(after[path] == before[path] for path in before if path.is_file())
    resumed(tiny, cut_off)
    assert not (cut_off / ".lock").exists()
