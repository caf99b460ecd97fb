"""``distill`` with a teacher cache: the same losses as without, and a teacher that runs over each sample once.

The teacher's numbers for a sample depend in their last bits on how far its batch is padded. So losses are compared bit
by bit where every epoch has the same batches, and where all batches are padded alike; elsewhere up to rounding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fsd_fast import files
from fsd_fast.cache import shards, teacher_cache
from fsd_fast.cache.teacher_cache import TeacherCache
from fsd_fast.commands import run
from fsd_fast.losses import METHODS
from fsd_fast.models.teacher import Teacher
from fsd_fast.training import checkpoints
from fsd_fast.training.trainer import FSDTrainer
from tests.faults.registry import fault
from tests.tiny import Tiny, history, tiny

__all__ = ["tiny"]

CACHED = [method for method in METHODS if method not in ("finetune", "minilm")]
SEQUENTIAL = ["--train_sampling_strategy", "sequential"]
# Three epochs of four batches of seven, the last one of three.
STEPS, BATCH = 12, 7


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the teacher has run over."""
    hidden_states, sizes = Teacher.hidden_states, []

    def counted(self: Teacher, inputs: dict[str, Tensor]) -> Any:
        sizes.append(len(inputs["input_ids"]))
        return hidden_states(self, inputs)

    monkeypatch.setattr(Teacher, "hidden_states", counted)
    return sizes


@contextmanager
def no_teacher() -> Iterator[None]:
    """Loading a teacher is an error."""

    def fail(name: str) -> None:
        raise AssertionError(f"the teacher {name} is loaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "from_pretrained", fail)
        yield


def flags(
    tiny: Tiny,
    folder: Path,
    cache: Path | None,
    method: str = "fsd_ilg",
    *more: str,
    pad_features: str = "exclude",
) -> list[str]:
    own = tiny.distillation(folder, method, pad_features, steps=STEPS, batch=BATCH)
    own += ["--fidelity", "false"]
    return [*own, *([] if cache is None else ["--teacher_cache_dir", str(cache)]), *more]


def run_with(name: str, owner: Any, replacement: Any, own: list[str]) -> None:
    """Run ``distill`` while a function has another one in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, replacement)
        run("distill", own)


def trajectory(folder: Path) -> list[dict[str, float]]:
    """Every number that was logged of every step, but the clock's."""
    return [
        {name: value for name, value in entry.items() if not name.endswith("_per_second")}
        for entry in history(folder)
        if "loss" in entry
    ]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def check_same(one: Path, other: Path) -> None:
    """Check that two runs logged the same bits and ended with the same bits."""
    assert trajectory(one) == trajectory(other)
    assert len(trajectory(one)) == STEPS
    first, second = weights(one), weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that filled a cache, and the cache in it."""
    folder = tmp_path_factory.mktemp("whole")
    run("distill", flags(tiny, folder / "run", folder / "cache", "fsd_ilg", *SEQUENTIAL))
    return folder


# --- the same losses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "pad_features"), [*((method, "exclude") for method in CACHED), ("fsd_ilg", "include")]
)
def test_losses_have_the_same_bits_as_without_a_cache(
    tiny: Tiny, tmp_path: Path, ran: list[int], method: str, pad_features: str
) -> None:
    def own(name: str, cache: Path | None) -> list[str]:
        return flags(tiny, tmp_path / name, cache, method, *SEQUENTIAL, pad_features=pad_features)

    run("distill", own("without", None))
    assert sum(ran) == 3 * 24
    ran.clear()
    run("distill", own("filling", tmp_path / "cache"))
    check_same(tmp_path / "filling", tmp_path / "without")
    assert sum(ran) == 24
    ran.clear()
    with no_teacher():
        run("distill", own("reading", tmp_path / "cache"))
    check_same(tmp_path / "reading", tmp_path / "without")
    assert ran == []


def test_order_makes_no_difference_where_all_batches_are_padded_alike(tiny: Tiny, tmp_path: Path) -> None:
    # Eight divides the training set: the logits depend on the number of samples in a batch.
    more = ["--layer_pairs", "layerwise", "--per_device_train_batch_size", "8"]
    for name, cache in (("without", None), ("filling", tmp_path / "cache"), ("reading", tmp_path / "cache")):
        run("distill", flags(tiny, tmp_path / name, cache, "fsd_il", *more, pad_features="include"))
    check_same(tmp_path / "filling", tmp_path / "without")
    check_same(tmp_path / "reading", tmp_path / "without")


@pytest.fixture(scope="module")
def complete(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of all layers, filled in order of length by batches of another size."""
    folder = tmp_path_factory.mktemp("complete") / "cache"
    own = ["--teacher_model_name_or_path", str(tiny.teacher), "--teacher_cache_dir", str(folder)]
    own += ["--layers", "all", "--per_device_batch_size", "5", "--use_cpu", "true"]
    run("cache", [*tiny.data(), *own])
    return folder


@pytest.mark.parametrize(
    ("method", "sampling"),
    [("vkd", "random"), ("pkd", "random"), ("fsd_ilg", "random"), ("fsd_ilg", "group_by_length")],
)
def test_in_any_order_losses_are_the_same_up_to_rounding(
    tiny: Tiny, tmp_path: Path, complete: Path, method: str, sampling: str
) -> None:
    more = ["--train_sampling_strategy", sampling]
    run("distill", flags(tiny, tmp_path / "without", None, method, *more))
    run("distill", flags(tiny, tmp_path / "reading", complete, method, *more))
    for with_cache, without in zip(
        trajectory(tmp_path / "reading"), trajectory(tmp_path / "without"), strict=True
    ):
        # 12 steps of Adam make up to 3e-5 out of differences of 1e-6. L_soft is T^2 = 100 times a divergence of 1e-4,
        # made of log-probabilities that are rounded to 6e-8.
        assert with_cache == pytest.approx(without, rel=1e-4, abs=100 * 6e-8)


def test_a_rounded_cache_gives_the_same_run_while_it_is_filled_and_after(tiny: Tiny, tmp_path: Path) -> None:
    more = ["--teacher_cache_dtype", "bfloat16", *SEQUENTIAL]
    for name in ("filling", "reading"):
        run("distill", flags(tiny, tmp_path / name, tmp_path / "cache", "fsd_ilg", *more))
    check_same(tmp_path / "reading", tmp_path / "filling")
    run("distill", flags(tiny, tmp_path / "without", None, "fsd_ilg", *SEQUENTIAL))
    rounded, exact = trajectory(tmp_path / "reading"), trajectory(tmp_path / "without")
    assert rounded != exact
    assert [entry["loss"] for entry in rounded] == pytest.approx([entry["loss"] for entry in exact], rel=0.05)


@fault(
    "a run that fills a teacher cache is killed",
    "the same command goes on to the same bits",
)
@pytest.mark.parametrize("killed_in", [3, 6])
def test_a_run_that_was_killed_goes_on_with_the_same_bits(
    tiny: Tiny, tmp_path: Path, ran: list[int], killed_in: int
) -> None:
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    run("distill", flags(tiny, tmp_path / "whole", tmp_path / "cache1", "fsd_ilg", *saving))
    ran.clear()
    step, steps = FSDTrainer.training_step, iter(range(1, STEPS))

    def dying(self: FSDTrainer, *arguments: Any) -> Tensor:
        loss = step(self, *arguments)
        if next(steps) == killed_in:
            raise KeyboardInterrupt
        return loss

    own = flags(tiny, tmp_path / "cut", tmp_path / "cache2", "fsd_ilg", *saving)
    with pytest.raises(KeyboardInterrupt):
        run_with("training_step", FSDTrainer, dying, own)
    run("distill", [*own, "--resume_from_checkpoint", "last"])
    # Also what the killed step had computed is read.
    assert sum(ran) == 24
    check_same(tmp_path / "cut", tmp_path / "whole")


# --- what a cache is found to be ----------------------------------------------------------------------------------


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    """A copy of that cache."""
    return Path(shutil.copytree(whole / "cache", tmp_path / "cache"))


def first_shard(cache: Path) -> Path:
    return next(path for path in sorted(cache.glob("*.safetensors")) if 0 in load_file(path)["sample_index"])


def spoil_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_cache_is_mended_by_the_teacher(
    tiny: Tiny, whole: Path, cache: Path, tmp_path: Path, ran: list[int]
) -> None:
    spoil_last_byte(first_shard(cache))
    with pytest.warns(RuntimeWarning, match="is damaged .*: its samples are computed again"):
        run("distill", flags(tiny, tmp_path / "run", cache, "fsd_ilg", *SEQUENTIAL))
    # Its index is sound, so the cache was whole when the run began, and nobody locked it to write: once an epoch.
    assert sum(ran) == 3 * BATCH
    check_same(tmp_path / "run", whole / "run")


def test_a_half_written_cache_is_completed(
    tiny: Tiny, whole: Path, cache: Path, tmp_path: Path, ran: list[int]
) -> None:
    path = first_shard(cache)
    path.write_bytes(path.read_bytes()[:-1])
    (cache / ".0123.safetensors.localhost.1.01234567.tmp").write_bytes(b"half")
    with pytest.warns(RuntimeWarning, match=f"{path.name} is damaged"):
        run("distill", flags(tiny, tmp_path / "run", cache, "fsd_ilg", *SEQUENTIAL))
    assert sum(ran) == BATCH
    check_same(tmp_path / "run", whole / "run")
    with no_teacher():
        run("distill", flags(tiny, tmp_path / "again", cache, "fsd_ilg", *SEQUENTIAL))
    check_same(tmp_path / "again", whole / "run")


@fault(
    "the teacher cache is deleted while a run reads it",
    "the teacher is loaded; the same bits",
)
def test_a_cache_that_is_deleted_while_it_is_read_is_not_missed(
    tiny: Tiny, whole: Path, cache: Path, tmp_path: Path
) -> None:
    step, steps = FSDTrainer.training_step, []

    def deleting(self: FSDTrainer, *arguments: Any) -> Tensor:
        steps.append(1)
        if len(steps) == 3:
            shutil.rmtree(cache)
        return step(self, *arguments)

    own = flags(tiny, tmp_path / "run", cache, "fsd_ilg", *SEQUENTIAL)
    with pytest.warns(RuntimeWarning, match="is damaged"):
        run_with("training_step", FSDTrainer, deleting, own)
    check_same(tmp_path / "run", whole / "run")
    assert not cache.exists()


@fault(
    "the disk is full, or the folder gone, while a run fills a teacher cache",
    "training goes on without writing; the same bits",
)
@pytest.mark.parametrize("reason", ["No space left on device", "deleted"])
def test_training_goes_on_where_the_cache_can_no_longer_be_written(
    tiny: Tiny, whole: Path, tmp_path: Path, reason: str
) -> None:
    write, written = shards.write_shard, []

    def full(folder: Path, *arguments: Any) -> Path:
        written.append(folder)
        if len(written) < 2:
            return write(folder, *arguments)
        if reason == "deleted":
            shutil.rmtree(folder, ignore_errors=True)
            return write(folder, *arguments)
        raise OSError(28, reason)

    message = "teacher cache cannot be written .*. Training goes on and writes no more of it"
    own = flags(tiny, tmp_path / "run", tmp_path / "cache", "fsd_ilg", *SEQUENTIAL)
    with pytest.warns(RuntimeWarning, match=message) as caught:
        run_with("write_shard", teacher_cache, full, own)
    assert len([each for each in caught if "cannot be written" in str(each.message)]) == 1
    check_same(tmp_path / "run", whole / "run")
    assert len(written) == 2


@fault(
    "a teacher cache in a folder that cannot be written",
    "read if it is whole, else refused before any work",
)
def test_a_whole_cache_needs_no_leave_to_write(tiny: Tiny, whole: Path, cache: Path, tmp_path: Path) -> None:
    def denied(path: Any, mode: int) -> bool:
        return Path(path) != cache

    with pytest.MonkeyPatch.context() as patch, no_teacher():
        patch.setattr(checkpoints.os, "access", denied)
        run("distill", flags(tiny, tmp_path / "run", cache, "fsd_ilg", *SEQUENTIAL))
        check_same(tmp_path / "run", whole / "run")
        first_shard(cache).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.os, "access", denied)
        with pytest.raises(PermissionError, match=f"^teacher_cache_dir: {cache} is not writable"):
            run("distill", flags(tiny, tmp_path / "other", cache, "fsd_ilg"))
    assert not (tmp_path / "other").exists()


@fault(
    "another run is filling the teacher cache",
    "this one reads what is there and writes nothing; the same bits",
)
def test_runs_side_by_side_read_what_one_of_them_writes(
    tiny: Tiny, whole: Path, cache: Path, tmp_path: Path, ran: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    first_shard(cache).unlink()
    present = sorted(cache.iterdir())
    with files.exclusive_folder(cache, "teacher_cache_dir"):
        run("distill", flags(tiny, tmp_path / "run", cache, "fsd_ilg", *SEQUENTIAL))
        assert "is being written by process" in caplog.text
        assert "this run reads what is there and writes nothing" in caplog.text
    assert sum(ran) == 3 * BATCH
    assert sorted(cache.iterdir()) == present
    check_same(tmp_path / "run", whole / "run")
    # A whole cache is not locked.
    run("distill", flags(tiny, tmp_path / "mending", cache, "fsd_ilg", *SEQUENTIAL))
    with files.exclusive_folder(cache, "teacher_cache_dir"), no_teacher():
        run("distill", flags(tiny, tmp_path / "again", cache, "fsd_ilg", *SEQUENTIAL))


def test_what_other_processes_write_is_found_between_epochs(
    tiny: Tiny, whole: Path, cache: Path, tmp_path: Path, ran: list[int]
) -> None:
    hidden = first_shard(cache)
    hidden.rename(tmp_path / hidden.name)
    scan, scans = TeacherCache.scan, []

    def appearing(self: TeacherCache) -> None:
        scans.append(1)
        # The first two when the cache is opened and locked, the third after the first epoch.
        if len(scans) == 3:
            (tmp_path / hidden.name).rename(hidden)
        scan(self)

    with pytest.MonkeyPatch.context() as patch, files.exclusive_folder(cache, "teacher_cache_dir"):
        patch.setattr(TeacherCache, "scan", appearing)
        run("distill", flags(tiny, tmp_path / "run", cache, "fsd_ilg", *SEQUENTIAL))
    assert sum(ran) == BATCH
    check_same(tmp_path / "run", whole / "run")


def test_the_teachers_predictions_of_the_evaluation_splits_are_kept_too(
    tiny: Tiny, cache: Path, tmp_path: Path, ran: list[int]
) -> None:
    own = flags(tiny, tmp_path / "first", cache, "fsd_il", "--fidelity", "true")
    first = run("distill", own)
    assert sum(ran) == 12
    with no_teacher():
        own = flags(tiny, tmp_path / "second", cache, "fsd_il", "--fidelity", "true")
        second = run("distill", own)
    assert first["eval_teacher_agreement"] == second["eval_teacher_agreement"]
    without = run("distill", flags(tiny, tmp_path / "without", None, "fsd_il", "--fidelity", "true"))
    assert first["eval_teacher_agreement"] == without["eval_teacher_agreement"]


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layer_pairs", "layerwise"], "layers 3, the run also reads .*: fsd-fast cache --layers .*3"),
        (["--max_seq_length", "20"], "max_seq_length is 24, expected 20"),
        (["--max_train_samples", "20"], "num_samples is 24, expected 20; tokens is"),
        (["--teacher_cache_dtype", "bfloat16"], "dtype is 'float32', expected 'bfloat16'"),
    ],
)
def test_a_cache_of_another_run_is_refused(
    tiny: Tiny, cache: Path, tmp_path: Path, ran: list[int], more: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^teacher_cache_dir: {cache} .*{message}"):
        run("distill", flags(tiny, tmp_path / "run", cache, "fsd_il", *more))
    assert ran == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "message"), [("finetune", "reads no teacher"), ("minilm", "reads queries, keys and values")]
)
def test_methods_that_read_something_else_are_refused(
    tiny: Tiny, cache: Path, tmp_path: Path, method: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^teacher_cache_dir: method '{method}' {message}"):
        run("distill", flags(tiny, tmp_path / "run", cache, method))


def test_a_cache_of_another_padding_policy_is_refused(tiny: Tiny, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pad_features is 'exclude', expected 'include'"):
        run("distill", flags(tiny, tmp_path / "run", cache, "fsd_ilg", pad_features="include"))


def test_a_cache_of_another_teacher_is_refused(tiny: Tiny, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(tiny.teacher, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    other = ["--teacher_model_name_or_path", str(folder)]
    # Another place makes no difference, another activation function and other weights do.
    with no_teacher():
        run("distill", flags(tiny, tmp_path / "moved", cache, "fsd_il", *other))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="teacher_config is"):
        run("distill", flags(tiny, tmp_path / "other", cache, "fsd_il", *other))
    (folder / "config.json").write_text(json.dumps(config))
    model = Teacher.from_pretrained(str(folder)).model
    with torch.no_grad():
        model.classifier.bias[0] += 1
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="teacher_fingerprint is"):
        run("distill", flags(tiny, tmp_path / "other", cache, "fsd_il", *other))


def test_equal_weights_in_other_files_are_the_same_teacher(tiny: Tiny, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(tiny.teacher, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "note": "saved again"})
    run(
        "distill", flags(tiny, tmp_path / "run", cache, "fsd_il", "--teacher_model_name_or_path", str(folder))
    )
    assert not (tmp_path / "run" / "cache").exists()


@fault(
    "the disk has not enough room for the cache",
    "refused before the teacher runs",
)
def test_a_disk_that_is_too_small_is_refused(tiny: Tiny, tmp_path: Path, ran: list[int]) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ValueError, match=r"teacher_cache_dir: .* needs [\d,]+ bytes .* 1,000 free"):
            run("distill", flags(tiny, tmp_path / "run", tmp_path / "cache", "fsd_il"))
    assert ran == []
    assert not (tmp_path / "cache").exists()


def test_the_room_is_announced(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run("distill", flags(tiny, tmp_path / "run", tmp_path / "cache", "fsd_il"))
    assert f"the outputs of 24 of 24 samples are missing in {tmp_path / 'cache'} and will take" in caplog.text


@fault(
    "the teacher's outputs are NaN or infinite",
    "not cached; the run is refused",
)
def test_outputs_that_are_not_finite_are_not_written(tiny: Tiny, tmp_path: Path) -> None:
    hidden_states = Teacher.hidden_states

    def poisoned(self: Teacher, inputs: dict[str, Tensor]) -> Any:
        logits, states = hidden_states(self, inputs)
        logits[1, 0] = float("nan")
        return logits, states

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "hidden_states", poisoned)
        message = (
            "^teacher_cache_dir: expected finite numbers, the teacher's logits of training sample 1 have"
        )
        with pytest.raises(ValueError, match=message):
            run("distill", flags(tiny, tmp_path / "run", tmp_path / "cache", "fsd_il", *SEQUENTIAL))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["teacher_cache.json"]


def test_a_teacher_that_pads_nan_is_no_trouble(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    hidden_states = Teacher.hidden_states

    def padded(self: Teacher, inputs: dict[str, Tensor]) -> Any:
        logits, states = hidden_states(self, inputs)
        padding = inputs["attention_mask"][:, :, None] == 0
        return logits, tuple(layer.masked_fill(padding, float("nan")) for layer in states)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "hidden_states", padded)
        run("distill", flags(tiny, tmp_path / "run", tmp_path / "cache", "fsd_ilg", *SEQUENTIAL))
    check_same(tmp_path / "run", whole / "run")
