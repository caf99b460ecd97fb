"""Damaged and hostile files of a teacher cache: left out with a warning and made again, or refused in one line."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_safetensors

from fsd_fast.cache.identity import CacheIdentity
from fsd_fast.cache.shards import ShardIndex, crc32
from fsd_fast.cache.teacher_cache import CachedBatch, TeacherCache
from fsd_fast.untrusted import seal
from tests.damage import HOSTILE, VALUES, header_mutated, mutated, within_a_second
from tests.faults.registry import fault

S, D, C, N, LAYER = 4, 8, 2, 40, 5
IDENTITY = CacheIdentity(
    task_name="rte",
    teacher_fingerprint="ab" * 32,
    teacher_config="ba" * 32,
    tokens="cd" * 32,
    layers=(LAYER,),
    num_samples=N,
    max_seq_length=S,
    hidden_size=D,
    num_labels=C,
    pad_features="exclude",
    precision="float32",
    dtype="float32",
)


def filled_cache(folder: Path) -> tuple[torch.Tensor, CachedBatch]:
    """A cache of one shard; its samples and what it holds of them."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(N, generator=generator)[:6]
    batch = CachedBatch(
        torch.randn(6, C, generator=generator), {LAYER: torch.randn(6, S, D, generator=generator)}
    )
    cache = TeacherCache(folder, IDENTITY)
    cache.create()
    cache.write(index, *batch, None)
    return index, batch


def same(found: CachedBatch | None, expected: CachedBatch) -> bool:
    return (
        found is not None
        and torch.equal(found.logits, expected.logits)
        and torch.equal(found.hidden_states[LAYER], expected.hidden_states[LAYER])
    )


def read_cache(folder: Path, index: torch.Tensor) -> tuple[CachedBatch | None, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = within_a_second(lambda: TeacherCache(folder, IDENTITY).read(index))
    return found, [str(each.message) for each in caught]


@fault(
    "a shard of the teacher cache is cut, mutated or exchanged",
    "whole, or left out and computed again",
)
@pytest.mark.parametrize("change", [mutated, header_mutated])
def test_a_mutated_shard_is_whole_or_left_out(
    tmp_path: Path, change: Callable[[bytes, random.Random], bytes]
) -> None:
    index, batch = filled_cache(tmp_path)
    [path] = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    generator = random.Random(1)
    damaged = 0
    for _ in range(300):
        path.write_bytes(change(whole, generator))
        found, messages = read_cache(tmp_path, index)
        if found is None:
            assert len(messages) == 1
            assert messages[0].startswith(f"{path} is damaged (")
            assert len(messages[0]) < 600
            damaged += 1
        else:
            assert same(found, batch)
    assert damaged > 250


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_shard_is_left_out(tmp_path: Path, content: bytes) -> None:
    index, _ = filled_cache(tmp_path)
    [path] = tmp_path.glob("*.safetensors")
    path.write_bytes(content)
    found, [message] = read_cache(tmp_path, index)
    assert found is None
    assert f"{path} is damaged" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_index": torch.tensor([0, N])}, f"sample_index: expected values from 0 to {N - 1}"),
        ({"sample_index": torch.tensor([0, -1])}, "sample_index: expected values from 0"),
        ({"lengths": torch.tensor([3, -1])}, f"lengths: expected values from 0 to {S}"),
        ({"lengths": torch.tensor([1, 2**40])}, "lengths: expected values from 0"),
        ({"lengths": torch.tensor([1])}, r"lengths: expected I64 \[2\], got I64 \[1\]"),
        ({"sample_index": torch.tensor([0, 1.0])}, r"sample_index: expected I64 \['b'\], got F32 \[2\]"),
        ({"checksums": torch.zeros(2, 3, dtype=torch.int64)}, r"checksums: expected I64 \[2, 2\]"),
        ({"logits": torch.ones(2, C + 1)}, r"logits: expected F32 \[2, 2\]"),
        ({"hidden_states.5": torch.ones(3, D)}, r"hidden_states.5: expected F32 \[2, 8\], got F32 \[3, 8\]"),
        ({"hidden_states.5": torch.ones(2, D).double()}, "hidden_states.5: expected F32 .*, got F64"),
    ],
)
def test_a_shard_with_valid_checksums_and_wrong_numbers_is_left_out(
    tmp_path: Path, changes: dict[str, torch.Tensor], message: str
) -> None:
    filled_cache(tmp_path)
    values = {
        "sample_index": torch.tensor([0, 1]),
        "lengths": torch.tensor([1, 1]),
        "checksums": torch.zeros(2, 2, dtype=torch.int64),
        "logits": torch.ones(2, C),
        "hidden_states.5": torch.ones(2, D),
    } | changes
    index = torch.cat([values[name].flatten() for name in ShardIndex._fields])
    metadata = {"identity": IDENTITY.digest(), "index_crc32": f"{crc32(index):08x}"}
    path = tmp_path / "0000.safetensors"
    path.write_bytes(save_safetensors(values, metadata))
    with pytest.warns(RuntimeWarning, match=rf"0000.safetensors is damaged \(.*{message}"):
        cache = TeacherCache(tmp_path, IDENTITY)
    assert not cache.is_whole()


def test_a_pipe_among_the_shards_is_left_out(tmp_path: Path) -> None:
    index, batch = filled_cache(tmp_path)
    os.mkfifo(tmp_path / "0000.safetensors")
    found, [message] = read_cache(tmp_path, index)
    assert same(found, batch)
    assert "0000.safetensors is damaged ('it is not a file')" in message


def check_refused(folder: Path, index: torch.Tensor, batch: CachedBatch) -> bool:
    """Whether a cache is refused, in one short line that names its record; it is read as it was written otherwise."""
    try:
        found, _ = read_cache(folder, index)
    except ValueError as error:
        text = str(error)
        assert text.startswith(f"teacher_cache_dir: {folder}"), text
        assert "\n" not in text
        assert len(text) < 800
        return True
    assert same(found, batch)
    return False


@fault(
    "the record of a teacher cache is cut or mutated",
    "whole, or refused in one line",
)
def test_a_mutated_record_of_a_cache_is_whole_or_refused(tmp_path: Path) -> None:
    index, batch = filled_cache(tmp_path)
    path = tmp_path / "teacher_cache.json"
    whole = path.read_bytes()
    generator = random.Random(2)
    refused = 0
    for _ in range(250):
        path.write_bytes(mutated(whole, generator))
        refused += check_refused(tmp_path, index, batch)
    assert refused > 240


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_a_record_with_a_valid_checksum_and_wrong_values_is_refused(tmp_path: Path, value: Any) -> None:
    index, batch = filled_cache(tmp_path)
    path = tmp_path / "teacher_cache.json"
    record = {**IDENTITY.record(), "weights": None}
    for name in record:
        changed = record | {name: value}
        try:
            path.write_text(json.dumps(seal(changed)))
        except UnicodeEncodeError:
            continue
        assert check_refused(tmp_path, index, batch) or (name, value) == ("weights", None), name
    path.write_text(json.dumps(seal({name: value for name, value in record.items() if name != "layers"})))
    assert check_refused(tmp_path, index, batch)


def test_a_damaged_record_is_told_from_that_of_another_run(tmp_path: Path) -> None:
    filled_cache(tmp_path)
    path = tmp_path / "teacher_cache.json"
    record = json.loads(path.read_text()) | {"num_samples": N + 1}
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="its checksum is not that of its fields"):
        TeacherCache(tmp_path, IDENTITY)
    del record["checksum"]
    path.write_text(json.dumps(seal(record)))
    with pytest.raises(ValueError, match=f"was made for another run: num_samples is {N + 1}, expected {N}"):
        TeacherCache(tmp_path, IDENTITY)
    path.write_text(json.dumps(record | {"format": 0, "num_samples": N}))
    with pytest.raises(
        ValueError, match="expected a teacher cache of format 1, got 0; remove the cache or choose"
    ):
        TeacherCache(tmp_path, IDENTITY)
