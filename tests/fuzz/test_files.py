"""Bytes of files: what is read is what was written, or is refused in one line that names the file."""

import dataclasses
import json
import logging

import pytest
import torch

from fsd_fast.data import get_task, load_task_dataset
from fsd_fast.memory.teacher_memory import TeacherMemory
from fsd_fast.training.manifest import MANIFEST_FILE, checkpoint_faults, seal_checkpoint
from fsd_fast.training.record import Record, read_record, write_record
from tests.fuzz.cases import fuzz, mutated
from tests.tiny import memory_identity, write_mnli, write_rte, write_stsb


def one_line(error, *names):
    text = str(error)
    assert "\n" not in text, text
    assert len(text) < 1500
    assert any(str(name) in text for name in names), text


def test_tsv_files(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    writers = {"rte": write_rte, "stsb": write_stsb, "mnli": write_mnli}
    whole = {name: writer(tmp_path / name, train=4, dev=3) for name, writer in writers.items()}
    contents = {name: {p.name: p.read_bytes() for p in folder.iterdir()} for name, folder in whole.items()}

    def case(generator):
        name = generator.choice(list(writers))
        folder, task = whole[name], get_task(name)
        file = generator.choice(sorted(contents[name]))
        content = contents[name][file]
        for _ in range(generator.randint(1, 3)):
            content = mutated(content, generator) if content else content
        (folder / file).write_bytes(content)
        try:
            splits = load_task_dataset(task, str(folder))
        except (ValueError, FileNotFoundError) as error:
            one_line(error, folder / file)
        else:
            for rows in splits.values():
                assert len(rows) > 0
                for row in rows:
                    assert all(isinstance(row[column], str) for column in task.text_columns)
                    assert row["label"] == row["label"]
        finally:
            (folder / file).write_bytes(contents[name][file])

    fuzz("TSV files", case)


def test_memories(tmp_path):
    memory = TeacherMemory(
        centroids=torch.randn(3, 8, generator=torch.Generator().manual_seed(0)),
        identity=memory_identity(2, 4, 3),
        seed=3,
        labels=torch.tensor([0, 0, 1, 2]),
        sample_index=torch.arange(4),
        num_samples=4,
        tokens="",
        inertia=1.5,
        cluster_sizes=[2, 1, 1],
        empty_clusters=0,
        epoch_stats=[],
        settings={"algorithm": "sketch"},
        teacher_passes=2.0,
        seconds={},
        versions={},
    )
    memory.save_pretrained(tmp_path)
    contents = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def case(generator):
        file = generator.choice(sorted(contents))
        content = mutated(contents[file], generator)
        (tmp_path / file).write_bytes(content)
        try:
            found = TeacherMemory.from_pretrained(tmp_path)
        except ValueError as error:
            one_line(error, *(tmp_path / name for name in contents))
        else:
            assert torch.equal(found.centroids, memory.centroids)
            assert found.cluster_sizes == memory.cluster_sizes
            assert found.identity == memory.identity
        finally:
            (tmp_path / file).write_bytes(contents[file])

    fuzz("memories", case)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-3"
    (folder / "global_step3").mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "global_step3/rank_0.pt"):
        (folder / name).write_bytes(name.encode() * 20)
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    seal_checkpoint(folder, resumable=True)
    return folder


def test_checkpoints(checkpoint):
    contents = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}

    def case(generator):
        path = generator.choice(sorted(contents))
        content = mutated(contents[path], generator)
        path.write_bytes(content)
        if generator.random() < 0.05:
            path.unlink()
            content = None
        faults = checkpoint_faults(checkpoint)
        path.write_bytes(contents[path])
        same = (
            path.name == MANIFEST_FILE
            and faults is None
            and json.loads(content) == json.loads(contents[path])
        )
        assert (faults is None) == (content == contents[path] or same), path
        if faults is not None:
            assert path.name in " ".join(faults.reasons)
            assert all("\n" not in reason for reason in faults.reasons)

    fuzz("checkpoints", case)


def test_records(tmp_path):
    path = tmp_path / "fsd_arguments.json"
    record = Record(
        "distill", {"beta": 4.0, "method": "fsd_ilg"}, {"world_size": 1, "versions": {"torch": "2"}}
    )
    write_record(path, record)
    content = path.read_bytes()

    def case(generator):
        path.write_bytes(mutated(content, generator))
        try:
            found = read_record(path)
        except ValueError as error:
            one_line(error, path)
        else:
            assert dataclasses.asdict(found).keys() == dataclasses.asdict(record).keys()

    fuzz("records", case)
