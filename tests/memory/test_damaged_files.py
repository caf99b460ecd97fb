"""Damaged and hostile files of a memory and an interrupted build.

What is read equals what was written, or is one ``ValueError`` that names the file. Chunks of a build are left out with
a warning and made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_safetensors

from fsd_fast.clustering.checkpoint import ClusteringCheckpoint
from fsd_fast.clustering.sketch import CountSketch
from fsd_fast.clustering.two_pass import cluster_stream
from fsd_fast.memory.teacher_memory import TeacherMemory
from fsd_fast.untrusted import seal
from tests.damage import DEEP, HOSTILE, VALUES, mutated, within_a_second
from tests.faults.registry import fault
from tests.tiny import memory_identity

S, D, K, N = 4, 8, 3, 40


def attempt(run: Callable[[], Any], where: Path) -> tuple[Any, str]:
    """The result and "", or None and the error: one short line that begins with a path in ``where``."""
    try:
        return within_a_second(run), ""
    except ValueError as error:
        text = str(error)
    assert text.startswith(str(where)), text
    assert "\n" not in text
    assert len(text) < 800
    return None, text


# --- the memory -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def memory() -> TeacherMemory:
    return TeacherMemory(
        centroids=torch.randn(K, S * D, generator=torch.Generator().manual_seed(0)),
        identity=memory_identity(S, D, K),
        seed=3,
        labels=torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([10, 20, 10])),
        sample_index=torch.arange(N),
        num_samples=N,
        tokens="",
        inertia=12.5,
        cluster_sizes=[10, 20, 10],
        empty_clusters=0,
        epoch_stats=[
            {
                "stage": "sketch", "epoch": 1, "inertia": 13.0, "empty_clusters": 0, "reseeded": 0, "shift": 0.5,
                "seconds": 0.1,
            }
        ],
        settings={"algorithm": "sketch", "restarts": 4},
        teacher_passes=2.0,
        seconds={"pass_1": 1.5},
        versions={"torch": "2"},
    )  # fmt: skip


def equal(found: TeacherMemory, expected: TeacherMemory) -> bool:
    pairs = [(getattr(found, item.name), getattr(expected, item.name)) for item in dataclasses.fields(found)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def check_memory(folder: Path, memory: TeacherMemory) -> str:
    """Read a memory; return the error, or "" where it is the one that was written."""
    found, text = attempt(lambda: TeacherMemory.from_pretrained(folder), folder)
    assert text.startswith(str(folder / "memory.")) or equal(found, memory)
    return text


@fault(
    "a memory whose files are cut, mutated or exchanged",
    "whole, or refused in one line that names the file",
)
@pytest.mark.parametrize("name", ["memory.json", "memory.safetensors"])
def test_a_mutated_memory_is_whole_or_refused(memory: TeacherMemory, tmp_path: Path, name: str) -> None:
    memory.save_pretrained(tmp_path)
    whole = (tmp_path / name).read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(250):
        content = mutated(whole, generator)
        (tmp_path / name).write_bytes(content)
        refused += check_memory(tmp_path, memory) != ""
    assert refused > 240


def fields_of(record: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values in a JSON record."""
    items = (
        record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    )
    for key, value in items:
        yield (*path, key)
        yield from fields_of(value, (*path, key))


def with_value(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(record))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copy


@fault(
    "a memory with any field of another type or value, under a valid seal",
    "refused in one line that names the file and the field",
)
def test_every_field_of_a_memory_is_checked_even_under_a_valid_seal(
    memory: TeacherMemory, tmp_path: Path
) -> None:
    memory.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "memory.json").read_text())
    del record["checksum"]
    errors = 0
    for path in fields_of(record):
        for value in VALUES:
            changed = with_value(record, path, value)
            (tmp_path / "memory.json").write_text(json.dumps(seal(changed)))
            found, text = attempt(lambda: TeacherMemory.from_pretrained(tmp_path), tmp_path)
            if text:
                # The field, or what it must agree with.
                names = [str(key) for key in path] + ["sha256", "cluster sizes", "centroids", "format"]
                assert any(name in text.removeprefix(str(tmp_path)) for name in names), (path, text)
                errors += 1
                continue
            # A value of the kind that the field takes.
            kind = type(_at(record, path))
            assert (
                isinstance(value, kind) or (kind is float and isinstance(value, int)) or path[0] == "settings"
            )
            found.save_pretrained(tmp_path / "again")
    assert errors > 350


def _at(record: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        record = record[key]
    return record


@fault(
    "a memory with a hostile tensor file: huge shapes, sizes of 2^63, wrong types",
    "refused at once, in one line",
)
@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_tensor_file_under_a_valid_hash_is_refused(
    memory: TeacherMemory, tmp_path: Path, content: bytes
) -> None:
    memory.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "memory.json").read_text())
    del record["checksum"]
    record["sha256"] = hashlib.sha256(content).hexdigest()
    (tmp_path / "memory.json").write_text(json.dumps(seal(record)))
    (tmp_path / "memory.safetensors").write_bytes(content)
    assert check_memory(tmp_path, memory).startswith(str(tmp_path / "memory.safetensors: "))


def test_a_huge_tensor_file_is_not_read(memory: TeacherMemory, tmp_path: Path) -> None:
    memory.save_pretrained(tmp_path)
    with (tmp_path / "memory.safetensors").open("r+b") as file:
        file.truncate(1 << 40)
    assert (
        "1,099,511,627,776 bytes are more than 3 centroids of 32 numbers and 40 labels take"
        in check_memory(tmp_path, memory)
    )


def test_a_memory_of_an_earlier_format_says_so(memory: TeacherMemory, tmp_path: Path) -> None:
    memory.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "memory.json").read_text()) | {"format": 1}
    del record["checksum"]
    (tmp_path / "memory.json").write_text(json.dumps(record))
    assert "expected a memory of format 3, got 1; build it again" in check_memory(tmp_path, memory)


# --- the checkpoint of a build ----------------------------------------------------------------------------------


KEY = {"seed": 1, "width": [1, 2]}


def points() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list((torch.randn(N, 6, generator=generator) + 4 * torch.arange(N)[:, None].remainder(K)).split(8))


def left_checkpoint(folder: Path) -> torch.Tensor:
    """The checkpoint of a build that ended, with all its stages; the centroids."""
    checkpoint = ClusteringCheckpoint(folder, KEY, save_every=2)
    return cluster_stream(points(), K, seed=0, sketch_width=4, restarts=2, checkpoint=checkpoint).centroids


def continued(folder: Path) -> torch.Tensor:
    checkpoint = ClusteringCheckpoint(folder, KEY, save_every=2)
    return cluster_stream(points(), K, seed=0, sketch_width=4, restarts=2, checkpoint=checkpoint).centroids


@fault(
    "the checkpoint of an interrupted build is cut or mutated",
    "the same bits, or refused in one line",
)
def test_a_mutated_checkpoint_gives_the_same_bits_or_is_refused(tmp_path: Path) -> None:
    expected = left_checkpoint(tmp_path)
    paths = sorted(tmp_path.iterdir())
    assert {path.name for path in paths} >= {"rank0.json", "rank0-pass_1-0.safetensors"}
    assert len(paths) >= 4
    wholes = {path: path.read_bytes() for path in paths}
    generator = random.Random(3)
    outcomes = {"refused": 0, "again": 0, "same": 0}
    for turn in range(100):
        path = tmp_path / "rank0.json" if turn % 2 else generator.choice(paths)
        for name in set(tmp_path.iterdir()) - set(paths):
            name.unlink()
        for name, whole in wholes.items():
            name.write_bytes(whole)
        path.write_bytes(mutated(wholes[path], generator))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found, text = attempt(lambda: continued(tmp_path), tmp_path)
        if text:
            assert path.name == "rank0.json"
            outcomes["refused"] += 1
            continue
        assert torch.equal(found, expected)
        outcomes["again" if caught else "same"] += 1
    assert outcomes["refused"] > 45
    assert outcomes["again"] > 20


@pytest.mark.parametrize(
    "path", [("tally",), ("stages", "pass_1", "seconds"), ("stages", "pass_1", "rows"), ("key", "seed")]
)
def test_a_changed_value_in_a_checkpoint_is_refused(tmp_path: Path, path: tuple[str, ...]) -> None:
    left_checkpoint(tmp_path)
    record = json.loads((tmp_path / "rank0.json").read_text())
    changed = with_value(record, path, {"computed_samples": 9} if path == ("tally",) else 9)
    (tmp_path / "rank0.json").write_text(json.dumps(changed))
    _, text = attempt(lambda: continued(tmp_path), tmp_path / "rank0.json")
    assert "its checksum is not that of its fields" in text
    assert "start anew (memory: --overwrite_output_dir true; in Python: discard_checkpoint)" in text


def test_a_huge_chunk_is_not_read(tmp_path: Path) -> None:
    expected = left_checkpoint(tmp_path)
    path = next(tmp_path.glob("rank0-pass_2-*.safetensors"))
    with path.open("r+b") as file:
        file.truncate(1 << 36)
    with pytest.warns(RuntimeWarning, match="damaged or missing: stage pass_2 is begun again"):
        found = within_a_second(lambda: continued(tmp_path))
    assert torch.equal(found, expected)


def test_every_field_of_a_checkpoint_is_checked_even_under_a_valid_seal(tmp_path: Path) -> None:
    left_checkpoint(tmp_path)
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    record = json.loads((tmp_path / "rank0.json").read_text())
    del record["checksum"]
    refused = 0
    for path in fields_of(record):
        for value in ("../../x", -1, DEEP):
            for file, content in whole.items():
                file.write_bytes(content)
            (tmp_path / "rank0.json").write_text(json.dumps(seal(with_value(record, path, value))))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                _, text = attempt(lambda: continued(tmp_path), tmp_path)
            refused += text != ""
    assert refused > 180
    assert not (tmp_path.parent.parent / "x").exists()


@fault(
    "names in a checkpoint of a build lead out of its folder",
    "nothing outside is read or written",
)
def test_names_in_a_checkpoint_never_leave_its_folder(tmp_path: Path) -> None:
    """Chunks have numbers and no names, so that no manifest can have another file read or removed."""
    folder = tmp_path / "checkpoint"
    left_checkpoint(folder)
    victim = tmp_path / "victim.safetensors"
    victim.write_bytes(b"mine")
    record = json.loads((folder / "rank0.json").read_text())
    del record["checksum"]
    record["stages"]["../victim"] = record["stages"]["pass_2"]
    record["stages"]["pass_2"] = record["stages"]["pass_2"] | {"complete": False, "batches": 1, "rows": 8}
    (folder / "rank0.json").write_text(json.dumps(seal(record)))
    continued(folder)
    assert victim.read_bytes() == b"mine"
    record["stages"]["pass_2"]["chunks"][0]["file"] = "../victim.safetensors"
    (folder / "rank0.json").write_text(json.dumps(seal(record)))
    with pytest.raises(
        ValueError, match=r"rank0.json: stages\['pass_2'\]: chunks\[0\]: unknown fields: 'file'"
    ):
        continued(folder)


@pytest.mark.parametrize(
    ("stage", "tensors", "message"),
    [
        (
            "pass_2",
            {"sums": torch.zeros(K, 7)},
            r"expected sums torch.float64 \[3, 6\], got torch.float32 \[3, 7\]",
        ),
        ("pass_2", {"other": torch.zeros(1)}, r"expected sums torch.float64 \[3, 6\], got nothing"),
        ("sketch_clustering", {"labels": torch.zeros(N - 1)}, r"expected labels torch.int64 \[40\]"),
        (
            "pass_1",
            {"norms": torch.zeros(N)},
            r"expected norms torch.float32 \[any, 1\], got torch.float32 \[40\]",
        ),
        (
            "pass_1",
            {"total": torch.zeros(6)},
            r"expected total torch.float64 \[any\], got torch.float32 \[6\]",
        ),
        (
            "pass_1",
            {
                "norms": torch.zeros(N, 1),
                "sketches": torch.zeros(N, 0),
                "sample_index": torch.zeros(N, 1, dtype=torch.int64),
            },
            "expected sketches of one width, at least 1, got 0",
        ),
        ("pass_1", {"total": torch.zeros(6).double()}, "rows: expected the 0 of its chunks, got 40"),
    ],
)
def test_tensors_of_another_kind_in_a_checkpoint_are_refused(
    tmp_path: Path, stage: str, tensors: dict[str, torch.Tensor], message: str
) -> None:
    left_checkpoint(tmp_path)
    content = save_safetensors(tensors)
    record = json.loads((tmp_path / "rank0.json").read_text())
    del record["checksum"]
    number = record["stages"][stage]["chunks"][0]["number"]
    (tmp_path / f"rank0-{stage}-{number}.safetensors").write_bytes(content)
    chunk = {"number": number, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    record["stages"][stage]["chunks"] = [chunk]
    (tmp_path / "rank0.json").write_text(json.dumps(seal(record)))
    with pytest.raises(ValueError, match=message) as caught:
        continued(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_chunk_under_a_valid_hash_is_refused(tmp_path: Path, content: bytes) -> None:
    left_checkpoint(tmp_path)
    record = json.loads((tmp_path / "rank0.json").read_text())
    del record["checksum"]
    number = record["stages"]["pass_2"]["chunks"][0]["number"]
    path = tmp_path / f"rank0-pass_2-{number}.safetensors"
    path.write_bytes(content)
    chunk = {"number": number, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    record["stages"]["pass_2"]["chunks"] = [chunk]
    (tmp_path / "rank0.json").write_text(json.dumps(seal(record)))
    _, text = attempt(lambda: continued(tmp_path), path)
    assert text


def test_a_sketch_of_another_width_is_refused(tmp_path: Path) -> None:
    """An incomplete first pass goes on with sketches as wide as those it has."""
    left_checkpoint(tmp_path)
    record = json.loads((tmp_path / "rank0.json").read_text())
    del record["checksum"]
    stage = record["stages"]["pass_1"]
    stage |= {"complete": False, "batches": 2, "rows": 16, "chunks": stage["chunks"][:1]}
    (tmp_path / "rank0.json").write_text(json.dumps(seal(record)))
    assert torch.equal(continued(tmp_path), left_checkpoint(tmp_path / "other"))
    (tmp_path / "rank0.json").write_text(json.dumps(seal(record)))
    checkpoint = ClusteringCheckpoint(tmp_path, KEY, save_every=2)
    assert CountSketch(6, 5, 0).width == 5
    with pytest.raises(ValueError, match="expected sketches of one width, at least 1, got 5 after 4"):
        cluster_stream(points(), K, seed=0, sketch_width=5, restarts=2, checkpoint=checkpoint)
