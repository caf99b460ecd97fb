"""``memory`` and the teacher cache: the teacher runs once, then never, and what is read gives the same memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fsd_fast import files
from fsd_fast.cache.teacher_cache import TeacherCache
from fsd_fast.commands import run
from fsd_fast.memory.teacher_memory import TeacherMemory
from fsd_fast.models.teacher import Teacher
from tests.tiny import SEQUENCE, memory_flags, tiny

__all__ = ["tiny"]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the teacher has run over."""
    sizes: list[int] = []

    def counting(name: str) -> None:
        method = getattr(Teacher, name)

        def counted(self: Teacher, inputs: dict[str, Tensor]) -> Any:
            sizes.append(len(inputs["input_ids"]))
            return method(self, inputs)

        monkeypatch.setattr(Teacher, name, counted)

    counting("penultimate")
    counting("hidden_states")
    return sizes


@pytest.mark.parametrize("pad_features", ["exclude", "include"])
def test_the_teacher_runs_once_and_then_never(
    tiny: Any, tmp_path: Path, ran: list[int], pad_features: str
) -> None:
    def build(name: str, *more: str) -> TeacherMemory:
        ran.clear()
        flags = memory_flags(tiny, tmp_path / name, pad_features)
        figures = run("memory", [*flags, "--per_device_batch_size", "5", *more])
        built = TeacherMemory.from_pretrained(tmp_path / name)
        assert figures["memory_teacher_passes"] == built.teacher_passes
        return built

    cached = ["--teacher_cache_dir", str(tmp_path / "cache")]
    without = build("without")
    assert (sum(ran), without.teacher_passes) == (48, 2)
    once = build("once", *cached)
    assert (sum(ran), once.teacher_passes) == (24, 1)
    assert torch.equal(once.centroids, without.centroids)
    assert once.inertia == without.inertia
    never = build("never", *cached, "--memory_refine", "2", "--plot", "true")
    assert (sum(ran), never.teacher_passes) == (0, 0)
    # Samples are found whatever the batches.
    other = build("other", *cached, "--per_device_batch_size", "7")
    assert sum(ran) == 0
    torch.testing.assert_close(other.centroids, without.centroids)


def test_a_killed_build_goes_on_from_its_cache(
    tiny: Any, tmp_path: Path, ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*memory_flags(tiny, tmp_path / "memory"), "--per_device_batch_size", "5"]
    flags += ["--teacher_cache_dir", str(tmp_path / "cache")]
    write, written = TeacherCache.write, []

    def dying(self: TeacherCache, *arguments: Any) -> None:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(arguments)
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TeacherCache, "write", dying)
        with pytest.raises(OSError, match="No space left"):
            run("memory", flags)
    assert sum(ran) == 20
    ran.clear()
    run("memory", flags)
    assert sum(ran) == 9
    whole = TeacherMemory.from_pretrained(tmp_path / "memory")
    run("memory", [*memory_flags(tiny, tmp_path / "whole"), "--per_device_batch_size", "5"])
    assert torch.equal(whole.centroids, TeacherMemory.from_pretrained(tmp_path / "whole").centroids)


def test_the_command_refuses_before_it_works(
    tiny: Any, tmp_path: Path, ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = ["--teacher_cache_dir", str(tmp_path / "cache")]
    run("memory", [*memory_flags(tiny, tmp_path / "memory"), *cached])
    ran.clear()
    for flags, difference in (
        (memory_flags(tiny, tmp_path / "other", "include"), "pad_features is 'exclude', expected 'include'"),
        (
            [*memory_flags(tiny, tmp_path / "other"), "--max_seq_length", "20"],
            f"max_seq_length is {SEQUENCE}, expected 20",
        ),
        (
            [*memory_flags(tiny, tmp_path / "other"), "--max_train_samples", "20"],
            "num_samples is 24, expected 20; tokens is",
        ),
        (
            [
                *memory_flags(tiny, tmp_path / "other"),
                "--teacher_model_name_or_path",
                _other_teacher(tiny, tmp_path),
            ],
            "teacher_fingerprint is ",
        ),
    ):
        with pytest.raises(ValueError, match=f"was made for another run: .*{difference}"):
            run("memory", [*flags, *cached])
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    flags = [*memory_flags(tiny, tmp_path / "other", "include"), "--teacher_cache_dir", str(tmp_path / "new")]
    with pytest.raises(ValueError, match=f"needs {24 * (SEQUENCE * 32 * 4 + 40):,} bytes .* 1,000 free"):
        run("memory", flags)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "other").exists()
    assert ran == []
    # A cache that is there already needs no room.
    run("memory", [*memory_flags(tiny, tmp_path / "again"), *cached])


def test_a_cache_has_one_writer_and_any_number_of_readers(tiny: Any, tmp_path: Path, ran: list[int]) -> None:
    cached = ["--teacher_cache_dir", str(tmp_path / "cache")]
    with files.exclusive_folder(tmp_path / "cache", "teacher_cache_dir"):
        with pytest.raises(BlockingIOError, match=r"^teacher_cache_dir: .* is being written by process"):
            run("memory", [*memory_flags(tiny, tmp_path / "memory"), *cached])
        assert ran == []
        # The memory's own folder is free again.
        assert not any((tmp_path / "memory").iterdir())
    run("memory", [*memory_flags(tiny, tmp_path / "memory"), *cached])
    assert not list((tmp_path / "cache").glob(".*"))
    ran.clear()
    with files.exclusive_folder(tmp_path / "cache", "teacher_cache_dir"):
        run("memory", [*memory_flags(tiny, tmp_path / "again"), *cached])
    assert ran == []


def _other_teacher(tiny: Any, folder: Path) -> str:
    teacher = Teacher.from_pretrained(str(tiny.teacher))
    shutil.copytree(tiny.teacher, folder / "teacher", ignore=shutil.ignore_patterns("checkpoint-*"))
    with torch.no_grad():
        next(teacher.model.parameters())[0, 0] += 1
    teacher.model.save_pretrained(folder / "teacher")
    return str(folder / "teacher")


def test_features_that_are_not_finite_are_not_kept(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_states = Teacher.hidden_states

    def poisoned(self: Teacher, inputs: dict[str, Tensor]) -> Any:
        logits, states = hidden_states(self, inputs)
        states[self.num_layers - 1][2, 1, 0] = float("nan")
        return logits, states

    monkeypatch.setattr(Teacher, "hidden_states", poisoned)
    flags = [*memory_flags(tiny, tmp_path / "memory"), "--teacher_cache_dir", str(tmp_path / "cache")]
    with pytest.raises(ValueError, match=r"hidden states of layer 3 of training sample \d+ have a NaN"):
        run("memory", flags)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["teacher_cache.json"]
    assert not (tmp_path / "memory" / "memory.json").exists()
