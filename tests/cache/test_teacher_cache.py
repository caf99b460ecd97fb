"""The store of a teacher's outputs: what is read is what was written, once, whole, and for this run only."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fsd_fast import files
from fsd_fast.cache import teacher_cache
from fsd_fast.cache.identity import CacheIdentity
from fsd_fast.cache.teacher_cache import CachedBatch, TeacherCache
from tests.faults.registry import fault

S, D, C, N = 6, 4, 3, 20
LAYERS = (2, 5)


def identity(**changes: Any) -> CacheIdentity:
    fields: dict[str, Any] = {
        "task_name": "rte",
        "teacher_fingerprint": "ab" * 32,
        "teacher_config": "ba" * 32,
        "tokens": "cd" * 32,
        "layers": LAYERS,
        "num_samples": N,
        "max_seq_length": S,
        "hidden_size": D,
        "num_labels": C,
        "pad_features": "exclude",
        "precision": "float32",
        "dtype": "float32",
    }
    return CacheIdentity(**(fields | changes))


Batch = tuple[Tensor, Tensor, dict[int, Tensor], Tensor]


def batches() -> Iterator[Batch]:
    """Indices, logits, hidden states and masks of all samples but the last in ragged batches; NaN at padding."""
    generator = torch.Generator().manual_seed(0)
    for index in torch.randperm(N - 1, generator=generator).split(7):
        lengths = index % S + 1
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        layers = {layer: torch.randn(len(index), mask.shape[1], D, generator=generator) for layer in LAYERS}
        layers = {k: v.masked_fill(mask[:, :, None] == 0, float("nan")) for k, v in layers.items()}
        yield index, torch.randn(len(index), C, generator=generator), layers, mask


def filled(folder: Path, **changes: Any) -> TeacherCache:
    cache = TeacherCache(folder, identity(**changes))
    cache.create()
    for batch in batches():
        cache.write(*batch)
    return cache


def expected(dtype: torch.dtype = torch.float32) -> CachedBatch:
    """Logits [N, C] and features [N, S, D] of every sample, zero at padding."""
    logits = torch.zeros(N, C)
    layers = {layer: torch.zeros(N, S, D, dtype=dtype) for layer in LAYERS}
    for index, own, states, mask in batches():
        logits[index] = own
        for layer, values in states.items():
            kept = values.masked_fill(mask[:, :, None] == 0, 0).to(dtype)
            layers[layer][index, : mask.shape[1]] = kept
    return CachedBatch(logits, layers)


def check_read(cache: TeacherCache, index: Tensor, positions: int | None = None) -> None:
    found = cache.read(index, positions)
    assert found is not None
    dtype = getattr(torch, cache.identity.dtype)
    length = int((index % S + 1).max()) if positions is None else positions
    assert torch.equal(found.logits, expected().logits[index])
    assert found.hidden_states.keys() == set(cache.layers)
    for layer, values in found.hidden_states.items():
        assert values.dtype == dtype
        assert torch.equal(values, expected(dtype).hidden_states[layer][index, :length])


# --- what comes back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reopened", [False, True])
def test_samples_come_back_in_any_batch(tmp_path: Path, reopened: bool, dtype: str) -> None:
    cache = filled(tmp_path / "new" / "cache", dtype=dtype)
    if reopened:
        cache = TeacherCache(tmp_path / "new" / "cache", identity(dtype=dtype))
    shuffled = torch.randperm(N - 1, generator=torch.Generator().manual_seed(1))
    for index in (*shuffled.split(4), torch.tensor([3, 3])):
        check_read(cache, index)
        check_read(cache, index, S)
    assert cache.read(torch.tensor([0, N - 1])) is None
    assert cache.holds(torch.arange(N - 1))
    assert not cache.holds(torch.tensor([N - 1]))
    assert cache.missing().tolist() == [N - 1]
    with pytest.raises(ValueError, match="positions: expected at least the 6 of the longest sample, got 5"):
        cache.read(torch.tensor([S - 1]), 5)
    # Padding takes no room.
    stored = [load_file(path) for path in (tmp_path / "new" / "cache").glob("*.safetensors")]
    positions = sum(shard["hidden_states.5"].shape[0] for shard in stored)
    assert positions == int((torch.arange(N - 1) % S + 1).sum())


def test_a_run_may_read_fewer_layers_than_there_are(tmp_path: Path) -> None:
    filled(tmp_path)
    for layers in ((5,), ()):
        cache = TeacherCache(tmp_path, identity(layers=layers))
        assert cache.identity.layers == LAYERS
        check_read(cache, torch.tensor([4, 1]))
        # What it writes has all layers.
        index = torch.tensor([N - 1])
        cache.write(index, torch.ones(1, C), dict.fromkeys(LAYERS, torch.ones(1, 2, D)), None)
        assert TeacherCache(tmp_path, identity()).is_whole()


def test_under_include_padding_is_kept(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, identity(pad_features="include"))
    cache.create()
    generator = torch.Generator().manual_seed(0)
    states = {layer: torch.randn(3, S, D, generator=generator) for layer in LAYERS}
    cache.write(torch.tensor([4, 0, 2]), torch.zeros(3, C), states, torch.zeros(3, S))
    found = cache.read(torch.tensor([2, 4]))
    assert found is not None
    for layer, values in found.hidden_states.items():
        assert torch.equal(values, states[layer][[2, 0]])


def test_tokens_may_stand_behind_padding(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, identity(layers=(5,)))
    cache.create()
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]])
    cache.write(torch.tensor([1, 2]), torch.zeros(2, C), {5: torch.ones(2, 4, D)}, mask)
    found = cache.read(torch.tensor([1, 2]))
    assert found is not None
    assert found.hidden_states[5][:, :, 0].tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    short = cache.read(torch.tensor([2]))
    assert short is not None
    assert short.hidden_states[5].shape == (1, 2, D)


def test_a_sample_is_written_once(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    shards = len(list(tmp_path.glob("*.safetensors")))
    everything = dict.fromkeys(LAYERS, torch.zeros(2, 1, D))
    cache.write(torch.tensor([0, 1]), torch.zeros(2, C), everything, None)
    assert len(list(tmp_path.glob("*.safetensors"))) == shards
    # One of these is new, and it is there twice, as at the end of an epoch of several processes.
    everything = dict.fromkeys(LAYERS, torch.ones(3, 1, D))
    cache.write(torch.tensor([N - 1, 0, N - 1]), torch.ones(3, C), everything, None)
    check_read(cache, torch.tensor([0]))
    found = TeacherCache(tmp_path, identity()).read(torch.tensor([N - 1]))
    assert found is not None
    assert found.logits.tolist() == [[1] * C]


def test_shards_of_another_process_are_found(tmp_path: Path) -> None:
    first = TeacherCache(tmp_path, identity())
    first.create()
    second = TeacherCache(tmp_path, identity())
    # Every second number, as where two processes share the samples: a view.
    for number, cache in enumerate((first, second)):
        index = torch.arange(N)[number::2]
        states = {layer: torch.full((N // 2, 2, D), float(number)) for layer in LAYERS}
        cache.write(index, torch.zeros(N // 2, C), states, None)
    assert not first.holds(torch.tensor([N - 1]))
    first.scan()
    assert first.is_whole()
    found = first.read(torch.tensor([1, 0]))
    assert found is not None
    assert found.hidden_states[2][:, 0, 0].tolist() == [1, 0]


def test_only_so_many_shards_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "_MAXIMUM_OPEN", 2)
    cache = filled(tmp_path)
    for index in torch.randperm(N - 1, generator=torch.Generator().manual_seed(1)).split(4):
        check_read(cache, index)
        assert len(cache._open) <= 2


def open_files() -> set[str]:
    descriptors = Path("/proc/self/fd")
    return {os.readlink(path) for path in descriptors.iterdir() if path.is_symlink() and path.exists()}


def test_files_are_closed_with_the_cache(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    check_read(cache, torch.tensor([0]))
    assert any(str(tmp_path) in name for name in open_files())
    del cache
    gc.collect()
    assert not any(str(tmp_path) in name for name in open_files())


def test_a_file_that_is_cut_off_while_it_is_read_costs_its_samples(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    check_read(cache, torch.tensor([0]))
    for path in tmp_path.glob("*.safetensors"):
        os.truncate(path, path.stat().st_size // 2)
    with pytest.warns(RuntimeWarning, match=r"is damaged \('it ends after [0-9,]+ bytes'\)"):
        assert cache.read(torch.tensor([0])) is None
    assert not cache.holds(torch.tensor([0]))


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(CacheIdentity) if f.name != "layers"])
def test_a_cache_of_another_run_is_refused(tmp_path: Path, field: str) -> None:
    filled(tmp_path, precision="bfloat16")
    other: Any = {"dtype": "bfloat16", "precision": "float16"}.get(field)
    if other is None:
        other = 99 if isinstance(getattr(identity(), field), int) else "ef" * 32
    message = f"^teacher_cache_dir: .* was made for another run: {field} is .*, expected {other!r}. Choose"
    with pytest.raises(ValueError, match=message):
        TeacherCache(tmp_path, identity(**({"precision": "bfloat16"} | {field: other})))


def test_layers_that_are_missing_are_named(tmp_path: Path) -> None:
    filled(tmp_path)
    message = (
        "holds the hidden states of layers 2,5, the run also reads 0,4; make a cache of all of them in another "
        "folder: fsd-fast cache --layers 0,2,4,5"
    )
    with pytest.raises(ValueError, match=message):
        TeacherCache(tmp_path, identity(layers=(0, 4, 5)))


def test_what_was_computed_in_float32_serves_a_run_in_half_precision(tmp_path: Path) -> None:
    filled(tmp_path)
    cache = TeacherCache(tmp_path, identity(precision="bfloat16"))
    assert cache.identity.precision == "float32"
    check_read(cache, torch.tensor([0, 1]))


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    TeacherCache(tmp_path / "folder", identity())
    (tmp_path / "folder" / "thesis.txt").write_text("x")
    for path in (tmp_path / "folder", tmp_path / "folder" / "thesis.txt"):
        with pytest.raises(ValueError, match="neither a teacher cache nor an empty folder"):
            TeacherCache(path, identity())
    (tmp_path / "folder" / "teacher_cache.json").write_text("[1]")
    message = (
        r"teacher_cache\.json: expected a JSON object, got list; remove the cache or choose another folder"
    )
    with pytest.raises(ValueError, match=message):
        TeacherCache(tmp_path / "folder", identity())


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


def shard_of(folder: Path, index: Tensor) -> Path:
    [path] = [p for p in folder.glob("*.safetensors") if torch.equal(load_file(p)["sample_index"], index)]
    return path


DAMAGES: dict[str, tuple[Any, int]] = {
    "cut": (_cut, 7),
    "zero": (_zero, 7),
    "foreign": (_foreign, 7),
    "empty": (lambda path: path.write_bytes(b""), 7),
    # One bit costs the sample it is in.
    "logits": (lambda path: _flip(path, "logits"), 1),
    "layer 2": (lambda path: _flip(path, "hidden_states.2"), 1),
    "layer 5": (lambda path: _flip(path, "hidden_states.5"), 1),
}
INDEX_DAMAGES = {
    name: (lambda path, name=name: _flip(path, name), 7) for name in ("sample_index", "lengths", "checksums")
}


def check_lost(cache: TeacherCache, path: Path, lost: int) -> None:
    """Check that a cache finds the damage of the first batch's shard, and is whole once that is written again."""
    index, *values = next(batches())
    with pytest.warns(RuntimeWarning, match=f"{path.name} is damaged .*: its samples are computed again"):
        assert cache.read(index) is None
    assert len(cache.missing()) == 1 + lost
    others = torch.tensor([number for number in range(N - 1) if number not in index])
    check_read(cache, others)
    cache.write(index, *values)
    check_read(TeacherCache(cache.folder, identity()), index)


@pytest.mark.parametrize(("damage", "lost"), [*DAMAGES.values()], ids=[*DAMAGES])
def test_a_shard_damaged_after_it_was_found_is_not_read(tmp_path: Path, damage: Any, lost: int) -> None:
    filled(tmp_path)
    cache = TeacherCache(tmp_path, identity())
    path = shard_of(tmp_path, next(batches())[0])
    damage(path)
    check_lost(cache, path, lost)


def test_a_shard_removed_after_it_was_found_is_not_missed(tmp_path: Path) -> None:
    filled(tmp_path)
    index = next(batches())[0]
    path = shard_of(tmp_path, index)
    unread, reading = TeacherCache(tmp_path, identity()), TeacherCache(tmp_path, identity())
    check_read(reading, index[:1])
    path.unlink()
    # What is mapped stays.
    check_read(reading, index)
    check_lost(unread, path, 7)


@pytest.mark.parametrize(
    ("damage", "lost"), [*DAMAGES.values(), *INDEX_DAMAGES.values()], ids=[*DAMAGES, *INDEX_DAMAGES]
)
def test_a_damaged_shard_is_never_loaded(tmp_path: Path, damage: Any, lost: int) -> None:
    filled(tmp_path)
    index, *values = next(batches())
    path = shard_of(tmp_path, index)
    damage(path)

    def read_anew() -> TeacherCache:
        cache = TeacherCache(tmp_path, identity())
        assert cache.read(index) is None
        return cache

    with pytest.warns(RuntimeWarning, match=f"{path.name} is damaged .*: its samples are computed again"):
        cache = read_anew()
    assert len(cache.missing()) == 1 + lost
    check_read(cache, torch.tensor([number for number in range(N - 1) if number not in index]))
    cache.write(index, *values)
    check_read(TeacherCache(tmp_path, identity()), index)


def test_every_checksum_can_be_compared(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    assert sorted(cache.verify()) == list(range(N - 1))
    index = next(batches())[0]
    _flip(shard_of(tmp_path, index), "hidden_states.2")
    # This run does not read the damaged layer, and verify looks at it all the same.
    cache = TeacherCache(tmp_path, identity(layers=()))
    with pytest.warns(RuntimeWarning, match=f"the numbers of sample {int(index[0])} have another checksum"):
        whole = sorted(cache.verify())
    assert whole == sorted({*range(N - 1)} - {int(index[0])})
    assert cache.missing().tolist() == sorted([int(index[0]), N - 1])


@fault(
    "a writer of the teacher cache is killed",
    "what it left half-written is not looked at",
)
def test_what_a_killed_writer_leaves_is_not_looked_at(tmp_path: Path) -> None:
    filled(tmp_path)
    for name in (".0123.safetensors.tmp", ".0123.safetensors", ".teacher_cache.json.tmp"):
        (tmp_path / name).write_bytes(b"half")
    assert TeacherCache(tmp_path, identity()).holds(torch.arange(N - 1))


def test_a_full_disk_leaves_whole_shards_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TeacherCache(tmp_path, identity())
    cache.create()
    (first, second, _) = list(batches())
    cache.write(*first)

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(OSError, match="teacher cache cannot be written") as caught:
            cache.write(*second)
    assert caught.value.errno == 28
    assert not list(tmp_path.glob(".*"))
    again = TeacherCache(tmp_path, identity())
    assert again.holds(first[0])
    assert not again.holds(second[0][:1])
    assert not cache.holds(second[0][:1])


@pytest.mark.parametrize("where", ["logits", "layer"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_written(tmp_path: Path, where: str, number: float) -> None:
    cache = TeacherCache(tmp_path, identity())
    cache.create()
    index, logits, states, mask = next(batches())
    spoilt = logits if where == "logits" else states[5][:, 0]
    spoilt[3, 1] = number
    name = "logits" if where == "logits" else "hidden states of layer 5"
    message = (
        f"^teacher_cache_dir: .* the teacher's {name} of training sample {int(index[3])} have a NaN or Inf"
    )
    with pytest.raises(ValueError, match=message):
        cache.write(index, logits, states, mask)
    assert not list(tmp_path.glob("*.safetensors"))
    assert len(cache.missing()) == N


def test_the_room_that_is_needed_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = torch.arange(N) % S + 1
    for changes, per_position in (({}, 2 * D * 4), ({"dtype": "bfloat16"}, 2 * D * 2)):
        cache = TeacherCache(tmp_path / "not" / "yet", identity(**changes))
        index_and_logits = N * (8 * 5 + 4 * C)
        assert cache.missing_bytes(lengths) == int(lengths.sum()) * per_position + index_and_logits
        cache = TeacherCache(tmp_path / "not" / "yet", identity(**changes, pad_features="include"))
        assert cache.missing_bytes(lengths) == N * S * per_position + index_and_logits
    usage = shutil.disk_usage(tmp_path)._replace(free=123)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert cache.free_bytes() == 123
    assert not (tmp_path / "not").exists()
    # It is what the files take, less their headers, which are below 1 KB each.
    whole = filled(tmp_path / "cache")
    written = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    needed = TeacherCache(tmp_path / "none", identity()).missing_bytes(lengths) - whole.missing_bytes(lengths)
    assert needed < written < needed + 3 * 1024
