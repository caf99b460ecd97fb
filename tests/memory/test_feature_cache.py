"""The teacher-feature cache: what is read is what was written, once, whole, and for this run only."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fsd_fast import files
from fsd_fast.cache.feature_cache import FeatureCache, FeatureIdentity
from fsd_fast.commands import run
from fsd_fast.memory.teacher_memory import TeacherMemory
from fsd_fast.models.teacher import Teacher
from tests.faults.registry import fault
from tests.tiny import SEQUENCE, memory_flags, tiny

__all__ = ["tiny"]
S, D, N = 6, 4, 20


def identity(**changes: Any) -> FeatureIdentity:
    fields: dict[str, Any] = {
        "task_name": "rte",
        "teacher_fingerprint": "ab" * 32,
        "layer": 5,
        "max_seq_length": S,
        "hidden_size": D,
        "pad_features": "exclude",
        "dtype": "float32",
        "num_samples": N,
        "tokens": "cd" * 32,
    }
    return FeatureIdentity(**(fields | changes))


def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Numbers, features and masks of all samples but the last in ragged batches; NaN at padding."""
    generator = torch.Generator().manual_seed(0)
    for index in torch.randperm(N - 1, generator=generator).split(7):
        lengths = index % S + 1
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        features = torch.randn(len(index), mask.shape[1], D, generator=generator)
        yield index, features.masked_fill(mask[:, :, None] == 0, float("nan")), mask


def filled(folder: Path, **changes: Any) -> FeatureCache:
    cache = FeatureCache(folder, identity(**changes))
    cache.create()
    for index, features, mask in batches():
        cache.write(index, features, mask)
    return cache


def expected() -> Tensor:
    """Features of every sample, ``[N, S, D]``."""
    everything = torch.zeros(N, S, D)
    for index, features, mask in batches():
        everything[index, : mask.shape[1]] = features.masked_fill(mask[:, :, None] == 0, 0)
    return everything


# --- what comes back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reopened", [False, True])
def test_samples_come_back_in_any_batch(tmp_path: Path, reopened: bool) -> None:
    cache = filled(tmp_path / "new" / "cache")
    if reopened:
        cache = FeatureCache(tmp_path / "new" / "cache", identity())
    shuffled = torch.randperm(N - 1, generator=torch.Generator().manual_seed(1))
    for index in (*shuffled.split(4), torch.tensor([3, 3])):
        found = cache.read(index)
        assert found is not None
        longest = int((index % S + 1).max())
        assert torch.equal(found, expected()[index, :longest])
    assert cache.read(torch.tensor([0, N - 1])) is None
    assert cache.holds(torch.arange(N - 1))
    assert not cache.holds(torch.tensor([N - 1]))
    # Padding takes no room.
    stored = [load_file(path) for path in (tmp_path / "new" / "cache").glob("*.safetensors")]
    positions = sum(shard["features"].shape[0] for shard in stored)
    assert positions == int((torch.arange(N - 1) % S + 1).sum())


def test_under_include_padding_is_kept(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, identity(pad_features="include", dtype="bfloat16"))
    cache.create()
    features = torch.randn(3, S, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    cache.write(torch.tensor([4, 0, 2]), features, torch.zeros(3, S))
    found = cache.read(torch.tensor([2, 4]))
    assert found is not None
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, features[[2, 0]])


def test_tokens_may_stand_behind_padding(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, identity())
    cache.create()
    features = torch.ones(2, 4, D)
    cache.write(torch.tensor([1, 2]), features, torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]]))
    found = cache.read(torch.tensor([1, 2]))
    assert found is not None
    assert found[:, :, 0].tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    short = cache.read(torch.tensor([2]))
    assert short is not None
    assert short.shape == (1, 2, D)


def test_shards_of_another_process_are_found(tmp_path: Path) -> None:
    first = filled(tmp_path)
    second = FeatureCache(tmp_path, identity())
    # Every second number, as where two processes share the samples: a view.
    first.write(torch.arange(N)[1::2], torch.ones(N // 2, 2, D), None)
    assert not second.holds(torch.tensor([N - 1]))
    second.scan()
    assert second.holds(torch.arange(N))


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [item.name for item in dataclasses.fields(FeatureIdentity)])
def test_a_cache_of_another_run_is_refused(tmp_path: Path, field: str) -> None:
    filled(tmp_path)
    other = {"str": "other", "int": 99}[str(FeatureIdentity.__annotations__[field])]
    if field == "dtype":
        other = "bfloat16"
    message = f"feature_cache_dir: .* was made for another run: {field} is .*, expected {other!r}. Choose"
    with pytest.raises(ValueError, match=message):
        FeatureCache(tmp_path, identity(**{field: other}))


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    FeatureCache(tmp_path / "folder", identity())
    (tmp_path / "folder" / "thesis.txt").write_text("x")
    for path in (tmp_path / "folder", tmp_path / "folder" / "thesis.txt"):
        with pytest.raises(ValueError, match="neither a feature cache nor an empty folder"):
            FeatureCache(path, identity())
    (tmp_path / "folder" / "features.json").write_text("[1]")
    with pytest.raises(
        ValueError,
        match=r"features\.json: expected a JSON object, got list\. It is not the identity of a feature cache",
    ):
        FeatureCache(tmp_path / "folder", identity())


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _flip(path: Path, name: str) -> None:
    """Change one bit of a tensor."""
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    begin = json.loads(content[8 : 8 + header])[name]["data_offsets"][0]
    content[8 + header + begin] ^= 1
    path.write_bytes(content)


def _foreign(path: Path) -> None:
    save_file(load_file(path), path, metadata={"identity": "ef" * 32})


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _zero,
        lambda path: _flip(path, "features"),
        lambda path: _flip(path, "sample_index"),
        lambda path: _flip(path, "lengths"),
        _foreign,
        lambda path: path.write_bytes(b""),
    ],
    ids=["cut", "zero", "features", "index", "lengths", "foreign", "empty"],
)
def test_a_damaged_shard_is_never_loaded(tmp_path: Path, damage: Any) -> None:
    filled(tmp_path)
    index, features, mask = next(batches())
    [path] = [
        path for path in tmp_path.glob("*.safetensors") if torch.equal(load_file(path)["sample_index"], index)
    ]
    damage(path)

    def reopened() -> FeatureCache:
        cache = FeatureCache(tmp_path, identity())
        assert cache.read(index) is None
        return cache

    with pytest.warns(RuntimeWarning, match=f"{path.name} is damaged .*: its samples are computed again"):
        cache = reopened()
    assert not cache.holds(index[:1])
    others = torch.tensor([number for number in range(N - 1) if number not in index])
    assert torch.equal(cache.read(others), expected()[others])  # type: ignore[arg-type]
    cache.write(index, features, mask)
    again = FeatureCache(tmp_path, identity()).read(index)
    assert again is not None
    assert torch.equal(again, expected()[index, : again.shape[1]])


@fault(
    "a writer of the feature cache is killed",
    "what it left half-written is not looked at",
)
def test_what_a_killed_writer_leaves_is_not_looked_at(tmp_path: Path) -> None:
    filled(tmp_path)
    for name in (".0123.safetensors.tmp", ".0123.safetensors", ".features.json.tmp"):
        (tmp_path / name).write_bytes(b"half")
    assert FeatureCache(tmp_path, identity()).holds(torch.arange(N - 1))


def test_a_full_disk_leaves_whole_shards_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FeatureCache(tmp_path, identity())
    cache.create()
    (first, second, _) = list(batches())
    cache.write(*first)

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(OSError, match="feature cache cannot be written") as caught:
            cache.write(*second)
    assert caught.value.errno == 28
    assert not list(tmp_path.glob(".*"))
    again = FeatureCache(tmp_path, identity())
    assert again.holds(first[0])
    assert not again.holds(second[0][:1])
    assert not cache.holds(second[0][:1])


@fault(
    "the disk has not enough room for the cache",
    "refused before the teacher runs",
)
def test_room_is_asked_for_before_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100 * D * 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    cache = FeatureCache(tmp_path / "not" / "yet", identity())
    cache.check_room(100)
    with pytest.raises(ValueError, match="needs 1,616 bytes for the features; its disk has 1,600 free"):
        cache.check_room(101)
    assert not (tmp_path / "not").exists()


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the teacher has run over."""
    penultimate, sizes = Teacher.penultimate, []

    def counted(self: Teacher, inputs: dict[str, Tensor]) -> Tensor:
        sizes.append(len(inputs["input_ids"]))
        return penultimate(self, inputs)

    monkeypatch.setattr(Teacher, "penultimate", counted)
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

    cached = ["--feature_cache_dir", str(tmp_path / "cache")]
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
    flags += ["--feature_cache_dir", str(tmp_path / "cache")]
    write, written = FeatureCache.write, []

    def dying(self: FeatureCache, *arguments: Any) -> None:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(arguments)
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "write", dying)
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
    cached = ["--feature_cache_dir", str(tmp_path / "cache")]
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
    flags = [*memory_flags(tiny, tmp_path / "other", "include"), "--feature_cache_dir", str(tmp_path / "new")]
    with pytest.raises(ValueError, match=f"needs {24 * SEQUENCE * 32 * 4:,} bytes .* 1,000 free"):
        run("memory", flags)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "other").exists()
    assert ran == []
    # A cache that is there already needs no room.
    run("memory", [*memory_flags(tiny, tmp_path / "again"), *cached])


def test_a_cache_has_one_writer_and_any_number_of_readers(tiny: Any, tmp_path: Path, ran: list[int]) -> None:
    cached = ["--feature_cache_dir", str(tmp_path / "cache")]
    with files.exclusive_folder(tmp_path / "cache", "feature_cache_dir"):
        with pytest.raises(BlockingIOError, match=r"^feature_cache_dir: .* is being written by process"):
            run("memory", [*memory_flags(tiny, tmp_path / "memory"), *cached])
        assert ran == []
        # The memory's own folder is free again.
        assert not any((tmp_path / "memory").iterdir())
    run("memory", [*memory_flags(tiny, tmp_path / "memory"), *cached])
    assert not list((tmp_path / "cache").glob(".*"))
    ran.clear()
    with files.exclusive_folder(tmp_path / "cache", "feature_cache_dir"):
        run("memory", [*memory_flags(tiny, tmp_path / "again"), *cached])
    assert ran == []


def _other_teacher(tiny: Any, folder: Path) -> str:
    teacher = Teacher.from_pretrained(str(tiny.teacher))
    shutil.copytree(tiny.teacher, folder / "teacher", ignore=shutil.ignore_patterns("checkpoint-*"))
    with torch.no_grad():
        next(teacher.model.parameters())[0, 0] += 1
    teacher.model.save_pretrained(folder / "teacher")
    return str(folder / "teacher")


@fault(
    "features are NaN or infinite",
    "not cached; the build is refused",
)
def test_features_that_are_not_finite_are_not_kept(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    penultimate = Teacher.penultimate

    def poisoned(self: Teacher, inputs: dict[str, Tensor]) -> Tensor:
        features = penultimate(self, inputs)
        features[2, 1, 0] = float("nan")
        return features

    monkeypatch.setattr(Teacher, "penultimate", poisoned)
    flags = [*memory_flags(tiny, tmp_path / "memory"), "--feature_cache_dir", str(tmp_path / "cache")]
    with pytest.raises(ValueError, match=r"sample \d+ has a NaN"):
        run("memory", flags)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["features.json"]
    assert not (tmp_path / "memory" / "memory.json").exists()
