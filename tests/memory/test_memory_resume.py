"""A memory build that is killed anywhere and started again: the same bits, and no batch read for nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fsd_fast import files
from fsd_fast.clustering import checkpoint as clustering_checkpoint
from fsd_fast.clustering.checkpoint import ClusteringCheckpoint, discard_checkpoint
from fsd_fast.commands import memory as memory_command
from fsd_fast.commands import run
from fsd_fast.files import exclusive_folder
from fsd_fast.memory import teacher_memory as memory
from fsd_fast.memory.features import FeatureBatch, MemoryIdentity
from fsd_fast.memory.teacher_memory import TeacherMemory
from fsd_fast.models.teacher import Teacher
from fsd_fast.untrusted import seal
from tests.faults.registry import fault
from tests.tiny import memory_flags, memory_identity, tiny

ROOT = Path(__file__).resolve().parents[2]
S, D, K, N, BATCH = 6, 16, 5, 70, 8
__all__ = ["tiny"]


def identity(**changes: Any) -> MemoryIdentity:
    return memory_identity(S, D, K, **changes)


def features() -> Tensor:
    """Groups that a sketch of two numbers mixes up, so that exact epochs have something to do."""
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(K, (N,), generator=generator)
    return 2 * torch.randn(K, S, D, generator=generator)[group] + torch.randn(N, S, D, generator=generator)


class Batches:
    """Batches of a shard that count themselves; with ``die_at``, the process is killed at that one."""

    def __init__(self, share: Tensor, die_at: int | None = None) -> None:
        self.share, self.die_at, self.made = share, die_at, 0

    def __call__(self, start: int) -> Iterator[FeatureBatch]:
        for index in self.share.split(BATCH)[start:]:
            if self.made == self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.made += 1
            yield FeatureBatch(features()[index], None, index)


def build(
    batches: Callable[[int], Iterator[FeatureBatch]], folder: Path | None, **changes: Any
) -> TeacherMemory:
    arguments: dict[str, Any] = {
        "seed": 3,
        "refine": 1,
        "sketch_width": 2,
        "restarts": 2,
        "progress": False,
        "save_every": 2,
        "checkpoint_dir": folder,
        "layout": {"batch_size": BATCH},
    }
    run_identity = changes.pop("identity", identity())
    return TeacherMemory.build(batches, run_identity, **(arguments | changes))


def report(built: TeacherMemory, made: int) -> dict[str, Any]:
    """Everything of a memory but how long it took; the centroids bit for bit."""
    epochs = [{**epoch, "seconds": 0} for epoch in built.epoch_stats]
    return {
        "centroids": built.centroids.numpy().tobytes().hex(),
        "inertia": built.inertia.hex(),
        "sizes": built.cluster_sizes,
        "epochs": json.loads(json.dumps(epochs)),
        "made": made,
    }


# --- killed -----------------------------------------------------------------------------------------------------


def _process(
    rank: int, world_size: int, folder: Path, die_at: int | None, write: int | None, name: str
) -> None:
    """One process of a build; killed at its ``die_at``-th batch, or half-way through its ``write``-th file."""
    if world_size > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store-{name}", rank=rank, world_size=world_size
        )
    writes = []
    whole = clustering_checkpoint.write_atomically

    def write_atomically(path: Path, content: bytes) -> None:
        writes.append(path)
        if len(writes) - 1 == write:
            files.temporary_path(path).write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        whole(path, content)

    clustering_checkpoint.write_atomically = write_atomically
    batches = Batches(torch.arange(N)[rank::world_size], die_at)
    # With two processes no exact epoch follows: the inertia is that of the second pass.
    built = build(batches, folder / "checkpoint", refine=int(world_size == 1))
    content = report(built, batches.made) | {"writes": len(writes)}
    (folder / f"{name}-{rank}.json").write_text(json.dumps(content))
    if world_size > 1:
        torch.distributed.destroy_process_group()


def _run(
    folder: Path,
    name: str,
    world_size: int = 1,
    victim: int = 0,
    die_at: int | None = None,
    write: int | None = None,
) -> list[dict[str, Any]]:
    """Run the processes of a build; if one is to be killed, the others go the same way, as under a launcher."""
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(
            target=_process,
            args=(rank, world_size, folder, *((die_at, write) if rank == victim else (None, None)), name),
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    if die_at is not None or write is not None:
        processes[victim].join()
        assert processes[victim].exitcode == -signal.SIGKILL, (name, die_at, write)
        for process in processes:
            process.kill()
            process.join()
        return []
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(world_size)]


def _same(found: list[dict[str, Any]], undisturbed: list[dict[str, Any]], most: int) -> None:
    for one, other in zip(found, undisturbed, strict=True):
        for name in ("centroids", "inertia", "sizes", "epochs"):
            assert one[name] == other[name], name
        assert one["made"] <= most


def _kill_and_continue(folder: Path) -> None:
    torch.set_num_threads(1)
    [alone] = undisturbed = _run(folder / "alone", "whole")
    batches = -(-N // BATCH)
    assert alone["made"] == 4 * batches  # two passes, one exact epoch, its labels
    for die_at in range(1, alone["made"], 6):
        own = folder / f"batch{die_at}"
        _run(own, "killed", die_at=die_at)
        # At most save_every batches are read again.
        _same(_run(own, "continued"), undisturbed, alone["made"] - die_at + 2)
    for write in range(0, alone["writes"], 5):
        own = folder / f"write{write}"
        _run(own, "killed", write=write)
        _run(own, "again", die_at=0) if write == 5 else None
        _same(_run(own, "continued"), undisturbed, alone["made"])
    pair = _run(folder / "pair", "whole", 2)
    for victim, die_at in ((0, 3), (1, 8)):
        own = folder / f"pair{die_at}"
        _run(own, "killed", 2, victim, die_at)
        found = _run(own, "continued", 2)
        _same(found, pair, pair[0]["made"])
        assert found[victim]["made"] <= pair[victim]["made"] - die_at + 2
    # Two processes do not go on with what one has left.
    _run(folder / "other", "killed", die_at=12)
    try:
        _run(folder / "other", "continued", 2)
    except AssertionError:
        return
    raise SystemExit("the checkpoint of one process was continued by two")


@fault(
    "a memory build is killed at several of its batches, with one process and with two",
    "continued, it ends with the same bits",
)
@pytest.mark.launcher
def test_a_killed_build_continues_to_the_same_bits(tmp_path: Path) -> None:
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "processes is 1, expected 2" in done.stderr


# --- what is found ----------------------------------------------------------------------------------------------


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """The checkpoint of a build that failed in the second pass."""

    def failing(start: int) -> Iterator[FeatureBatch]:
        for number, batch in enumerate(Batches(torch.arange(N))(start), start):
            if readings[0] == 2 and number == 5:
                raise OSError("power cut")
            readings[0] += number == 0
            yield batch

    readings = [0]
    with pytest.raises(OSError, match="power cut"):
        build(failing, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@fault(
    "a build is continued with other settings",
    "refused in one line that lists the differences",
)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "seed is 3, expected 4"),
        ({"refine": 0}, "refine is 1, expected 0"),
        ({"sketch_width": 5}, "sketch_width is 2, expected 5"),
        ({"layout": {"batch_size": 9}}, "batch_size is 8, expected 9"),
        ({"backend": "reference"}, "backend is 'eager', expected 'reference'"),
        ({"identity": identity(teacher_fingerprint="cd" * 32)}, "teacher_fingerprint is 'abab"),
    ],
)
def test_the_checkpoint_of_another_build_is_refused(
    left: Path, changes: dict[str, Any], message: str
) -> None:
    before = sorted(path.name for path in left.iterdir())
    with pytest.raises(ValueError, match=f"another, interrupted run left: {message}"):
        build(Batches(torch.arange(N)), left, **changes)
    assert sorted(path.name for path in left.iterdir()) == before


def test_the_backend_that_runs_is_held_and_not_its_name(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("FSD_BACKEND", "reference")
        with pytest.raises(ValueError, match="backend is 'eager', expected 'reference'"):
            build(Batches(torch.arange(N)), left)
    batches = Batches(torch.arange(N))
    build(batches, left, backend="eager")  # what "auto" was on the CPU
    assert batches.made == 5 + 9 + 9


def test_a_checkpoint_goes_on_where_it_was(left: Path) -> None:
    batches = Batches(torch.arange(N))
    built = build(batches, left, identity=identity(teacher="moved/teacher"))
    assert batches.made == 5 + 9 + 9  # batches 4 to 8 of the second pass, then the exact epoch and its labels
    assert torch.equal(built.centroids, build(Batches(torch.arange(N)), None).centroids)
    assert set(built.seconds) == {"pass_1", "sketch_clustering", "pass_2", "refine"}
    assert all(value >= 0 for value in built.seconds.values())
    discard_checkpoint(left)
    assert not left.exists()
    discard_checkpoint(left)


@pytest.mark.parametrize("stage", ["pass_1", "sketch_clustering", "pass_2"])
def test_a_damaged_part_is_made_again(left: Path, stage: str) -> None:
    part = next(left.glob(f"rank0-{stage}-*.safetensors"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=f"damaged or missing: stage {stage} is begun again"):
        built = build(Batches(torch.arange(N)), left)
    assert torch.equal(built.centroids, build(Batches(torch.arange(N)), None).centroids)


def test_a_checkpoint_that_is_none_is_refused(left: Path) -> None:
    (left / "rank0.json").write_text("[]")
    with pytest.raises(
        ValueError, match=r"rank0\.json: expected a JSON object, got list\. It is not the checkpoint of"
    ):
        build(Batches(torch.arange(N)), left)
    with pytest.raises(ValueError, match="save_every: expected at least 1, got 0"):
        ClusteringCheckpoint(None, save_every=0)


def test_seconds_of_all_runs_add_up(left: Path) -> None:
    manifest = json.loads((left / "rank0.json").read_text())
    manifest["stages"]["pass_1"]["seconds"] = 1000.0
    del manifest["checksum"]
    (left / "rank0.json").write_text(json.dumps(seal(manifest)))
    seconds = build(Batches(torch.arange(N)), left).seconds
    assert 1000 <= seconds["pass_1"] < 1100
    assert seconds["pass_2"] < 900


def test_a_full_disk_leaves_no_half_checkpoint(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(clustering_checkpoint.write_atomically.__globals__["os"], "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            build(Batches(torch.arange(N)), left)
    assert not list(left.glob(".*"))
    batches = Batches(torch.arange(N))
    assert torch.equal(build(batches, left).centroids, build(Batches(torch.arange(N)), None).centroids)
    assert batches.made == 5 + 9 + 9


# --- the command ------------------------------------------------------------------------------------------------


def test_the_memory_command_continues(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "memory"
    flags = [*memory_flags(tiny, folder), "--per_device_batch_size", "5"]
    penultimate, calls = Teacher.penultimate, []

    def counted(self: Teacher, inputs: dict[str, Tensor]) -> Tensor:
        calls.append(len(inputs["input_ids"]))
        return penultimate(self, inputs)

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Teacher, "penultimate", counted)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "write_atomically", full)
        with pytest.raises(OSError, match="No space left"):
            run("memory", flags)
    assert [path.name for path in folder.iterdir()] == [".state"]
    assert sum(calls) == 48  # two passes over 24 samples
    with pytest.raises(ValueError, match="seed is 42, expected 7"):
        run("memory", [*flags, "--seed", "7"])
    with pytest.raises(ValueError, match="batch_size is 5, expected 6"):
        run("memory", [*flags, "--per_device_batch_size", "6"])
    calls.clear()
    run("memory", flags)
    assert calls == []
    found = TeacherMemory.from_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["memory.json", "memory.safetensors"]
    run("memory", [*flags, "--output_dir", str(tmp_path / "whole")])
    assert torch.equal(found.centroids, TeacherMemory.from_pretrained(tmp_path / "whole").centroids)
    # A checkpoint of other settings gives way to --overwrite_output_dir true.
    ClusteringCheckpoint(folder / ".state", {"seed": 1}).stage("pass_1").finish(lambda: {"x": torch.zeros(1)})
    run("memory", [*flags, "--overwrite_output_dir", "true"])
    assert not (folder / ".state").exists()
    assert torch.equal(found.centroids, TeacherMemory.from_pretrained(folder).centroids)


def test_a_finished_memory_is_left_alone(tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    flags = memory_flags(tiny, folder)
    run("memory", flags)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError) as caught:
        run("memory", [*flags, "--seed", "7"])
    # The command has no --resume_from_checkpoint.
    assert str(caught.value) == (
        f"output_dir: {folder} holds a run already; start anew with --overwrite_output_dir true, or choose another "
        f"folder"
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_has_one_build_at_a_time(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "memory"
    flags = memory_flags(tiny, folder)
    with exclusive_folder(folder, "output_dir"):
        message = f"^output_dir: {folder} is being written by process {os.getpid()} on"
        with pytest.raises(BlockingIOError, match=message):
            run("memory", flags)
    # A lock that a killed process has left does not make the folder a finished one.
    (folder / ".lock").write_text("process 1 on nowhere")
    files.temporary_path(folder / "memory.json").write_bytes(b"half")
    run("memory", flags)
    found = TeacherMemory.from_pretrained(folder)
    # A build that ends while another one loads its teacher is not overwritten.
    other = tmp_path / "other"

    def ended_meanwhile(path: Path, what: str) -> Any:
        found.save_pretrained(other)
        return exclusive_folder(path, what)

    before = (folder / "memory.json").read_bytes()
    monkeypatch.setattr(memory_command, "exclusive_folder", ended_meanwhile)
    with pytest.raises(FileExistsError, match="holds a run already; start anew"):
        run("memory", memory_flags(tiny, other))
    assert (other / "memory.json").read_bytes() == before
    assert sorted(path.name for path in other.iterdir()) == ["memory.json", "memory.safetensors"]


def test_the_memory_command_draws(tiny: Any, tmp_path: Path) -> None:
    from matplotlib.image import imread

    run("memory", [*memory_flags(tiny, tmp_path / "memory"), "--plot", "true"])
    picture = imread(tmp_path / "memory" / "memory_plot.png")[..., :3]
    assert picture.shape[0] > 400
    for half in (picture[:, : picture.shape[1] // 2], picture[:, picture.shape[1] // 2 :]):
        coloured = (half.max(axis=2) - half.min(axis=2)) > 0.2
        assert np.mean(coloured) > 0.001  # bars on the left, points on the right
    memory_files = {"memory.json", "memory.safetensors", "memory_plot.png"}
    assert {path.name for path in (tmp_path / "memory").iterdir()} == memory_files


if __name__ == "__main__":
    _kill_and_continue(Path(sys.argv[1]))
