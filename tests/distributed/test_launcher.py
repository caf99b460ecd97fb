"""The commands under the deepspeed launcher: two processes on the CPU, ZeRO 2 and ZeRO 3."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fsd_fast.commands import run
from tests.launch import finish, remove_build_locks, run_deepspeed, run_torchrun, start_deepspeed
from tests.tiny import (
    CENTROIDS,
    HIDDEN,
    ROOT,
    SEQUENCE,
    history,
    load_cleanly,
    losses,
    memory_flags,
    save_backbone,
    tiny,
)

__all__ = ["tiny"]

pytestmark = [
    pytest.mark.launcher,
    pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed builds its CPU communication with g++"),
]


@pytest.fixture(scope="module", autouse=True)
def _no_lock_left_behind():
    remove_build_locks()


@pytest.fixture(scope="module")
def steady(tiny, tmp_path_factory):
    """The pre-trained model without dropout, so that a sum does not depend on who computes which part of it."""
    return save_backbone(tmp_path_factory.mktemp("steady"), dropout=0.0)


def distillation(tiny, steady, folder, batch, *more):
    flags = tiny.distillation(folder, "fsd_ilg", steps=4, batch=batch)
    return ["distill", *flags, "--model_name_or_path", str(steady), *more]


CHECKPOINTS = ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2"]


@pytest.fixture(scope="module")
def zero2(tiny, steady, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero2") / "run"
    return folder, run_deepspeed(2, distillation(tiny, steady, folder, 4, "--deepspeed", "ds_config.json"))


@pytest.fixture(scope="module")
def zero3(tiny, steady, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero3") / "run"
    flags = distillation(tiny, steady, folder, 4, "--deepspeed", "ds_config_zero3.json", *CHECKPOINTS)
    return folder, run_deepspeed(2, flags)


def close(one, other, tolerance):
    assert one.keys() == other.keys()
    for name in one:
        # Softmax does not see what all keys share: this gradient is 0 but for rounding, which Adam blows up.
        if name.endswith("key.bias"):
            continue
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance, msg=name)


def test_zero_2_and_zero_3_train_alike(zero2, zero3):
    (two, printed), (three, _) = zero2, zero3
    assert len(losses(two)) == 4
    assert losses(two) == pytest.approx(losses(three), rel=1e-5)
    close(load_file(two / "model.safetensors"), load_file(three / "model.safetensors"), 1e-4)
    assert json.loads((two / "fsd_arguments.json").read_text())["facts"]["world_size"] == 2
    # One process speaks for both.
    assert sum(bool(re.fullmatch(r"  accuracy +[\d.]+", line)) for line in printed.splitlines()) == 1


def test_weight_decay_leaves_the_student_memory_alone_under_deepspeed(tiny, steady, tmp_path):
    config = json.loads((ROOT / "ds_config.json").read_text())
    config["optimizer"] = {
        "type": "AdamW",
        "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True},
    }
    (tmp_path / "with_optimizer.json").write_text(json.dumps(config))
    flags = distillation(tiny, steady, tmp_path / "run", 4, "--weight_decay", "0.1", "--deepspeed")
    done = finish(start_deepspeed(2, [*flags, str(tmp_path / "with_optimizer.json")]))
    assert done.returncode != 0
    assert "weight_decay: the optimizer of the DeepSpeed configuration would let" in done.stdout
    assert not (tmp_path / "run").exists()


def test_two_processes_are_one_batch_of_twice_the_size(tiny, steady, zero2, tmp_path):
    command, *flags = distillation(tiny, steady, tmp_path / "run", 8)
    run(command, flags)
    (one, *_), (two, *_) = history(tmp_path / "run"), history(zero2[0])
    # L_L compares the samples of one process with each other: it alone sees where the batch is cut.
    assert two["loss_local"] != pytest.approx(one["loss_local"], rel=1e-3)
    for name in (
        "loss_hard",
        "loss_soft",
        "loss_intra",
        "global_memory",
        "global_distance",
        "global_cosine",
    ):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_the_exported_students_are_plain_models(zero2, zero3):
    folders = [zero2[0], zero3[0]]
    for folder, found in zip(folders, load_cleanly(*folders), strict=True):
        assert (found["class"], found["layers"]) == ("BertForSequenceClassification", 2)
        assert found["id2label"] == {"0": "entailment", "1": "not_entailment"}
        weights = load_file(folder / "model.safetensors")
        assert not any("memory" in name for name in weights)
        assert all(value.numel() > 0 and bool(value.isfinite().all()) for value in weights.values())
        assert (folder / "README.md").is_file()
        results = json.loads((folder / "all_results.json").read_text())
        assert {"eval_accuracy", "train_loss"} <= results.keys()


def test_resuming_from_a_zero_3_checkpoint(tiny, steady, zero3, tmp_path):
    full, _ = zero3
    folder = tmp_path / "run"
    shutil.copytree(full / "checkpoint-2", folder / "checkpoint-2")
    flags = distillation(tiny, steady, folder, 4, "--deepspeed", "ds_config_zero3.json", *CHECKPOINTS)
    run_deepspeed(2, [*flags, "--resume_from_checkpoint", "last"])
    assert losses(folder) == pytest.approx(losses(full), rel=1e-5)
    close(load_file(folder / "model.safetensors"), load_file(full / "model.safetensors"), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "config", "said"),
    [
        (2, "ds_config.json", "deepspeed.zero_optimization.stage was 3, now 2"),
        (1, "ds_config_zero3.json", "world_size was 2, now 1"),
    ],
)
def test_a_checkpoint_of_deepspeed_is_refused_in_another_layout(
    tiny, steady, zero3, tmp_path, processes, config, said
):
    full, _ = zero3
    folder = tmp_path / "run"
    shutil.copytree(full / "checkpoint-2", folder / "checkpoint-2")
    shutil.copy(full / "fsd_arguments.json", folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    flags = distillation(tiny, steady, folder, 8 // processes, "--deepspeed", config, *CHECKPOINTS)
    done = finish(start_deepspeed(processes, [*flags, "--resume_from_checkpoint", "last"]))
    assert done.returncode != 0
    assert said in done.stdout
    assert "cut for its number of processes and its stage of ZeRO" in done.stdout
    assert "Traceback" not in done.stdout
    assert {path: path.read_bytes() for path in before} == before


def test_a_memory_does_not_depend_on_the_number_of_processes(tiny, tmp_path):
    # Each process has 12 samples, in batches of 5, 5 and 2.
    cached = ["--teacher_cache_dir", str(tmp_path / "cache"), "--per_device_batch_size", "5"]
    run_deepspeed(2, ["memory", *memory_flags(tiny, tmp_path / "memory"), *cached])
    one = load_file(tiny.memory_exclude / "memory.safetensors")["centroids"]
    two = load_file(tmp_path / "memory" / "memory.safetensors")["centroids"]
    assert one.shape == (CENTROIDS, SEQUENCE * HIDDEN)
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
    first = json.loads((tiny.memory_exclude / "memory.json").read_text())
    second = json.loads((tmp_path / "memory" / "memory.json").read_text())
    assert second["num_samples"] == first["num_samples"] == 24
    assert second["cluster_sizes"] == first["cluster_sizes"]
    assert second["identity"] == first["identity"]
    assert second["inertia"] == pytest.approx(first["inertia"], rel=1e-5)
    assert (first["teacher_passes"], second["teacher_passes"]) == (2, 1)
    # What two processes have cached, one reads.
    run("memory", [*memory_flags(tiny, tmp_path / "again"), *cached])
    third = json.loads((tmp_path / "again" / "memory.json").read_text())
    assert (third["teacher_passes"], third["cluster_sizes"]) == (0, first["cluster_sizes"])


@pytest.mark.parametrize("processes", [2, 3])
def test_an_evaluation_is_the_same_on_several_processes(tiny, tmp_path, processes):
    # 12 samples in batches of 5: the last round is ragged, and some processes get samples twice.
    flags = [*tiny.data(), "--model_name_or_path", str(tiny.teacher), "--use_cpu", "true"]
    alone = run("evaluate", [*flags, "--per_device_eval_batch_size", "12"])
    folder = tmp_path / "together"
    more = ["--per_device_eval_batch_size", "5", "--output_dir", str(folder)]
    run_torchrun(processes, ["evaluate", *flags, *more])
    together = json.loads((folder / "evaluate_results.json").read_text())
    assert together["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-6)
    assert together["eval_accuracy"] == alone["eval_accuracy"]


def test_a_teacher_is_the_same_on_two_processes(tiny, steady, tmp_path):
    logs = []
    for processes, batch, accumulated in ((1, 8, 1), (2, 2, 2)):
        folder = tmp_path / f"run{processes}"
        flags = [*tiny.data(), "--use_cpu", "true", "--report_to", "none", "--output_dir", str(folder)]
        flags += [
            "--model_name_or_path",
            str(steady),
            "--max_steps",
            "2",
            "--logging_steps",
            "1",
            "--optim",
            "sgd",
        ]
        flags += [
            "--save_strategy",
            "no",
            "--per_device_train_batch_size",
            str(batch),
            "--learning_rate",
            "0",
        ]
        flags += ["--gradient_accumulation_steps", str(accumulated), "--dataloader_drop_last", "true"]
        flags += ["--max_train_samples", "8"]
        if processes == 1:
            run("teacher", flags)
        else:
            run_torchrun(processes, ["teacher", *flags])
        logs.append([entry for entry in history(folder) if "loss" in entry])
    for alone, together in zip(*logs, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
