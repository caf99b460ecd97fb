"""``fsd-fast cache``: fill a teacher cache, check it, and complete it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fsd_fast import files
from fsd_fast.cache.teacher_cache import TeacherCache
from fsd_fast.commands import run
from fsd_fast.models.teacher import Teacher
from tests.tiny import TEACHER_LAYERS, Tiny, memory_flags, tiny

__all__ = ["tiny"]


def fill(tiny: Tiny, cache: Path, *more: str) -> dict[str, float]:
    own = ["--teacher_model_name_or_path", str(tiny.teacher), "--teacher_cache_dir", str(cache)]
    return run("cache", [*tiny.data(), *own, "--use_cpu", "true", "--per_device_batch_size", "5", *more])


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "cache"
    figures = fill(tiny, folder, "--layers", "all")
    assert (figures["cache_samples"], figures["cache_computed"]) == (24, 24)
    assert figures["cache_bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return folder


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def test_every_layer_is_what_the_teacher_computes(tiny: Tiny, whole: Path) -> None:
    teacher = Teacher.from_pretrained(str(tiny.teacher))
    for path in whole.glob("*.safetensors"):
        shard = load_file(path)
        assert shard["logits"].shape == (len(shard["sample_index"]), 2)
        layers = {name for name in shard if name.startswith("hidden_states.")}
        assert layers == {f"hidden_states.{layer}" for layer in range(TEACHER_LAYERS + 1)}
        last = shard[f"hidden_states.{TEACHER_LAYERS}"]
        first = last[shard["lengths"].cumsum(0) - shard["lengths"]]
        # The head reads the last layer at the first token.
        with torch.no_grad():
            pooled = teacher.model.bert.pooler.activation(teacher.model.bert.pooler.dense(first))
            torch.testing.assert_close(teacher.model.classifier(pooled), shard["logits"])


def test_a_whole_cache_is_checked_and_left_as_it_is(tiny: Tiny, cache: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}

    def fail(name: str) -> None:
        raise AssertionError(f"the teacher {name} is loaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "from_pretrained", fail)
        assert fill(tiny, cache)["cache_computed"] == 0
        # Also while another run has the lock: there is nothing to write.
        with files.exclusive_folder(cache, "teacher_cache_dir"):
            fill(tiny, cache)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == before


def test_damaged_samples_are_computed_again_and_the_mended_ones_are_found(tiny: Tiny, cache: Path) -> None:
    damaged = sorted(cache.glob("*.safetensors"))[:2]
    content = bytearray(damaged[0].read_bytes())
    content[-1] ^= 1
    damaged[0].write_bytes(content)
    damaged[1].write_bytes(b"")
    lost = 5
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert fill(tiny, cache)["cache_computed"] == lost + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert fill(tiny, cache)["cache_computed"] == 0
    # The empty file is gone, the other one holds four whole samples.
    assert not damaged[1].exists() or damaged[1].stat().st_size > 0
    assert damaged[0].exists()


def test_what_is_missing_is_added(tiny: Tiny, cache: Path) -> None:
    next(cache.glob("*.safetensors")).unlink()
    message = r"^teacher_cache_dir: .* is being written by process"
    with files.exclusive_folder(cache, "teacher_cache_dir"), pytest.raises(BlockingIOError, match=message):
        fill(tiny, cache)
    assert 4 <= fill(tiny, cache)["cache_computed"] <= 5
    assert fill(tiny, cache)["cache_computed"] == 0


def test_memory_and_every_distillation_read_it(tiny: Tiny, cache: Path, tmp_path: Path) -> None:
    more = ["--teacher_cache_dir", str(cache)]

    def fail(name: str) -> None:
        raise AssertionError(f"the teacher {name} is loaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "from_pretrained", fail)
        assert run("memory", [*memory_flags(tiny, tmp_path / "memory"), *more])["memory_teacher_passes"] == 0
        for method in ("vkd", "fsd_ilg"):
            own = [*tiny.distillation(tmp_path / method, method), "--fidelity", "false"]
            pairs = [] if method == "vkd" else ["--layer_pairs", "layerwise"]
            run("distill", [*own, *more, *pairs])


def test_a_killed_fill_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    write, written = TeacherCache.write, []

    def dying(self: TeacherCache, *arguments: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(arguments)
        write(self, *arguments)

    def killed() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TeacherCache, "write", dying)
            fill(tiny, tmp_path / "cache")

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert fill(tiny, tmp_path / "cache")["cache_computed"] == 9


def test_a_full_disk_ends_it_and_keeps_what_is_whole(tiny: Tiny, tmp_path: Path) -> None:
    hidden_states, batches = Teacher.hidden_states, []

    def counted(self: Teacher, inputs: dict[str, Tensor]) -> Any:
        batches.append(inputs)
        return hidden_states(self, inputs)

    def full(source: Path, target: Path) -> None:
        if len(batches) == 3:
            raise OSError(28, "No space left on device")
        replace(source, target)

    replace = files.os.replace

    def filled() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Teacher, "hidden_states", counted)
            patch.setattr(files.os, "replace", full)
            fill(tiny, tmp_path / "cache")

    with pytest.raises(OSError, match="teacher cache cannot be written"):
        filled()
    assert fill(tiny, tmp_path / "cache")["cache_computed"] == 14


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("last", "layers: expected 'penultimate', 'all' or a list such as '0,3,5', got 'last'"),
        ("1,,2", "layers: expected 'penultimate'"),
        ("0,5", "layers: expected hidden states 0 to 4, got '0,5'"),
        ("-1", "layers: expected hidden states 0 to 4, got '-1'"),
    ],
)
def test_layers_that_do_not_exist_are_refused(tiny: Tiny, tmp_path: Path, layers: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        fill(tiny, tmp_path / "cache", f"--layers={layers}")
    assert not (tmp_path / "cache").exists()


def test_more_layers_than_a_cache_holds_need_another_folder(tiny: Tiny, tmp_path: Path) -> None:
    fill(tiny, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"fsd-fast cache --layers 0,3$"):
        fill(tiny, tmp_path / "cache", "--layers", "0")
