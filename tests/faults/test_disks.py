"""Disks that are full, read-only or gone: one line says so, what was there before stays, and the run can go on."""

import contextlib
import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from fsd_fast.cli import main
from fsd_fast.training.checkpoints import find_checkpoint
from fsd_fast.training.trainer import ClassifierTrainer
from tests.faults.child import in_child, limit_files
from tests.faults.registry import fault
from tests.tiny import losses, memory_flags, tiny

__all__ = ["tiny"]

SAVING = ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "5"]


def flags(tiny, folder, *more):
    return [*tiny.distillation(folder, "fsd_ilg", steps=6), *SAVING, *more]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["distill", *flags(tiny, folder)]) == 0
    return folder


def goes_on(tiny, folder, whole):
    assert main(["distill", *flags(tiny, folder, "--resume_from_checkpoint", "auto")]) == 0
    one, other = (load_file(each / "model.safetensors") for each in (folder, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert losses(folder) == losses(whole)


def failed(ended, *words):
    """One line on stderr that names the failure, and no traceback."""
    assert ended.status == 1, ended.printed[-3000:]
    assert "Traceback" not in ended.printed
    assert ended.last_line.startswith("fsd-fast "), ended.last_line
    for word in words:
        assert word in ended.last_line


@contextlib.contextmanager
def mounted(folder, options):
    """A file system in memory at a folder, where this user may mount one."""
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB, and a way to leave so many bytes of it free."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def leave(size):
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(bytes(max(0, free - size)))

    with mounted(disk, "size=8m"):
        yield disk, leave


def when_saving(number, act):
    """Return what makes a child call ``act`` as it begins to save its n-th checkpoint."""

    def prepare():
        original, calls = ClassifierTrainer._save_checkpoint, [0]

        def save(self, *arguments):
            calls[0] += 1
            if calls[0] == number:
                act()
            return original(self, *arguments)

        ClassifierTrainer._save_checkpoint = save

    return prepare


@fault(
    "the disk is full in the second checkpoint: at its weights, its optimizer, its last small files",
    "status 1 and one line; the first checkpoint stays; with room again the run goes on to the same bits",
    slow=True,
)
@pytest.mark.parametrize("room", [4_000, 150_000, 345_000, 362_000])
def test_a_full_disk_while_saving(tiny, whole, tmp_path, small_disk, room):
    disk, leave = small_disk
    folder = disk / "run"
    ended = in_child("distill", flags(tiny, folder), tmp_path / "out", when_saving(2, lambda: leave(room)))
    failed(ended, "No space left" if "No space" in ended.last_line else "could not be written")
    (disk / "filler").unlink()
    assert find_checkpoint(str(folder), "last") == str(folder / "checkpoint-2")
    goes_on(tiny, folder, whole)


@fault(
    "the disk is full while the student is exported",
    "status 1 and one line; no half export; with room again the run goes on to the same bits",
)
def test_a_full_disk_while_exporting(tiny, whole, tmp_path, small_disk):
    disk, leave = small_disk
    folder = disk / "run"
    ended = in_child("distill", flags(tiny, folder), tmp_path / "out", when_saving(3, lambda: leave(440_000)))
    failed(ended)
    (disk / "filler").unlink()
    assert not (folder / "model.safetensors").exists()
    goes_on(tiny, folder, whole)


@fault(
    "the disk is full while a memory is built, its features are cached, or it is written",
    "status 1 and one line; no half memory; with room again the build goes on to the same bits",
)
@pytest.mark.parametrize("room", [0, 20_000, 80_000, 120_000])
def test_a_full_disk_while_building_a_memory(tiny, tmp_path, small_disk, room):
    disk, leave = small_disk
    leave(room)
    given = [*memory_flags(tiny, disk / "memory"), "--teacher_cache_dir", str(disk / "cache")]
    ended = in_child("memory", given, tmp_path / "out")
    assert ended.status in (1, 2), ended.printed[-2000:]
    assert "Traceback" not in ended.printed
    assert not (disk / "memory" / "memory.json").exists()
    (disk / "filler").unlink()
    assert main(["memory", *given]) == 0
    one, other = (load_file(each / "memory.safetensors") for each in (disk / "memory", tiny.memory_exclude))
    assert torch.equal(one["centroids"], other["centroids"])


@fault(
    "a quota on the size of files: the weights or the optimizer cannot be written",
    "status 1 and one line that names the folder",
)
@pytest.mark.parametrize("size", [20_000, 150_000])
def test_a_quota(tiny, tmp_path, size):
    folder = tmp_path / "run"
    ended = in_child("distill", flags(tiny, folder), tmp_path / "out", when_saving(1, limit_files(size)))
    failed(ended, str(folder))
    assert find_checkpoint(str(folder), "auto") is None
    assert not (folder / "model.safetensors").exists()


@pytest.fixture
def locked(tmp_path):
    """A folder that cannot be written, not even by root."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.geteuid():
        yield folder
        return
    with mounted(folder, "ro"):
        yield folder


@fault(
    "a folder that cannot be written, for every command that writes one",
    "status 2 and one line, before any work",
)
@pytest.mark.parametrize("command", ["teacher", "distill", "memory", "evaluate"])
def test_a_folder_that_cannot_be_written(tiny, locked, capsys, command):
    given = {
        "teacher": [*tiny.data(), "--model_name_or_path", str(tiny.backbone)],
        "distill": tiny.distillation(locked / "run"),
        "memory": memory_flags(tiny, locked / "run"),
        "evaluate": [*tiny.data(), "--model_name_or_path", str(tiny.teacher)],
    }[command]
    assert main([command, *given, "--output_dir", str(locked / "run")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"fsd-fast {command}: error: output_dir: {locked} is not writable"


@fault(
    "the run's folder is removed while it trains",
    "the run ends with a whole export, or with status 1 and one line; a new start is possible",
)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_folder_that_is_removed(tiny, whole, tmp_path, number):
    folder = tmp_path / "run"
    ended = in_child(
        "distill", flags(tiny, folder), tmp_path / "out", when_saving(number, lambda: shutil.rmtree(folder))
    )
    assert "Traceback" not in ended.printed
    if ended.status == 0:
        assert json.loads((folder / "all_results.json").read_text())
        one, other = (load_file(each / "model.safetensors") for each in (folder, whole))
        assert all(torch.equal(one[name], other[name]) for name in other)
    else:
        failed(ended)
        assert main(["distill", *flags(tiny, folder, "--overwrite_output_dir", "true")]) == 0


@fault("the folder is replaced by a file while the run trains", "status 1 and one line that names it")
def test_a_folder_that_becomes_a_file(tiny, tmp_path):
    folder = tmp_path / "run"

    def replace():
        shutil.rmtree(folder)
        folder.write_text("")

    ended = in_child("distill", flags(tiny, folder), tmp_path / "out", when_saving(2, replace))
    failed(ended, str(folder))


@fault("the teacher's folder is removed while the student trains", "the run ends as if nothing had happened")
def test_a_teacher_that_is_removed(tiny, whole, tmp_path):
    teacher, folder = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(tiny.teacher, teacher)
    given = flags(tiny, folder, "--teacher_model_name_or_path", str(teacher))
    ended = in_child("distill", given, tmp_path / "out", when_saving(1, lambda: shutil.rmtree(teacher)))
    assert ended.status == 0, ended.printed[-2000:]
    one, other = (load_file(each / "model.safetensors") for each in (folder, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)
