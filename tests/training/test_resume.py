"""Resuming with other settings: what may change, what is refused, and what the record says of it."""

import json
import math

import pytest

from fsd_fast.commands import run
from fsd_fast.training.record import Record, write_record
from fsd_fast.training.resume import check_resumed
from tests.faults.registry import fault
from tests.tiny import TRAINING, history, memory_flags, tiny

__all__ = ["tiny"]

SAVING = ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "5"]


@pytest.fixture(scope="module")
def begun(tiny, tmp_path_factory):
    """A distillation of four steps with a checkpoint after two, as a run that was cut off there leaves it."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    run("distill", [*tiny.distillation(folder, "fsd_ilg", steps=4), *SAVING])
    return folder


def resume(tiny, begun, tmp_path, *changed, method="fsd_ilg"):
    import shutil

    folder = tmp_path / "run"
    if not folder.exists():
        shutil.copytree(begun, folder)
        shutil.rmtree(folder / "checkpoint-4")
    flags = [*tiny.distillation(folder, method, steps=4), *SAVING, "--resume_from_checkpoint", "last"]
    run("distill", [*flags, *changed])
    return folder


def record(folder):
    return json.loads((folder / "fsd_arguments.json").read_text())


@fault(
    "a run is resumed with other settings",
    "refused in one line that lists each with both values",
)
@pytest.mark.parametrize(
    ("flag", "value", "was", "now"),
    [
        ("learning_rate", "2e-3", "0.001", "0.002"),
        ("beta", "7", "4.0", "7.0"),
        ("temperature", "3", "10.0", "3.0"),
        ("per_device_train_batch_size", "4", "8", "4"),
        ("seed", "7", "42", "7"),
        ("layer_pairs", "3:1,2:1", "'3:1'", "'3:1,2:1'"),
        ("student_layers", "1", "2", "1"),
        ("max_grad_norm", "0.5", "1.0", "0.5"),
        ("gradient_accumulation_steps", "2", "1", "2"),
        ("weight_decay", "0.1", "0.0", "0.1"),
        ("adam_beta2", "0.9", "0.999", "0.9"),
        ("train_sampling_strategy", "random", "'group_by_length'", "'random'"),
        ("max_train_samples", "16", "None", "16"),
    ],
)
def test_another_setting_is_refused_and_named(tiny, begun, tmp_path, flag, value, was, now):
    before = record(begun)
    with pytest.raises(ValueError, match="belongs to a run with other settings") as error:
        resume(tiny, begun, tmp_path, f"--{flag}", value)
    assert f"{flag} was {was}, now {now}" in str(error.value)
    assert record(tmp_path / "run") == before, "a run that was refused leaves the record as it was"


def test_a_memory_of_another_size_is_refused(tiny, begun, tmp_path):
    run("memory", [*memory_flags(tiny, tmp_path / "memory"), "--num_centroid", "4"])
    other = ["--memory_path", str(tmp_path / "memory"), "--allow_changes", "memory_path"]
    with pytest.raises(ValueError, match="num_centroid was 5, now 4"):
        resume(tiny, begun, tmp_path, *other)


def test_another_method_is_refused(tiny, begun, tmp_path):
    with pytest.raises(ValueError, match="method was 'fsd_ilg', now 'vkd'"):
        resume(tiny, begun, tmp_path, method="vkd")


def test_length_logging_saving_and_evaluation_may_change(tiny, begun, tmp_path):
    free = ["--max_steps", "6", "--logging_steps", "2", "--save_steps", "3", "--eval_strategy", "steps"]
    free += ["--eval_steps", "3", "--per_device_eval_batch_size", "4", "--max_eval_samples", "8"]
    folder = resume(tiny, begun, tmp_path, *free)
    assert history(folder)[-1]["step"] == 6
    (resumed,) = record(folder)["facts"]["resumed"]
    assert resumed["checkpoint"] == "checkpoint-2"
    assert resumed["changed"]["max_steps"] == [4, 6]
    assert record(folder)["arguments"]["max_steps"] == 6


def test_a_named_setting_may_change_takes_effect_and_is_recorded(tiny, begun, tmp_path):
    folder = resume(tiny, begun, tmp_path, "--beta", "0", "--allow_changes", "beta")
    entries = {entry["step"]: entry for entry in history(folder) if "loss" in entry}
    assert entries[3]["loss"] == pytest.approx(entries[3]["loss_vkd"], rel=1e-5), (
        "without structures from step 3 on"
    )
    assert entries[2]["loss"] > 1.5 * entries[2]["loss_vkd"]
    (resumed,) = record(folder)["facts"]["resumed"]
    assert resumed == {"checkpoint": "checkpoint-2", "changed": {"beta": [4.0, 0.0]}}


def test_what_a_checkpoint_holds_never_changes(tiny, begun, tmp_path):
    with pytest.raises(ValueError, match="allow_changes: learning_rate: the checkpoint itself holds"):
        resume(tiny, begun, tmp_path, "--learning_rate", "2e-3", "--allow_changes", "beta", "learning_rate")


def deepspeed_record(stage, world_size=2, path="ds.json", **changes):
    content = {"zero_optimization": {"stage": stage, "overlap_comm": True, **changes}}
    arguments = {"deepspeed": path, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    return Record("distill", arguments, {"world_size": world_size, "deepspeed_config": content})


PLAIN = Record(
    "distill", {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}, {"world_size": 2}
)
CUT = "a checkpoint of DeepSpeed is cut for its number of processes and its stage of ZeRO"


@pytest.fixture
def deepspeed_checkpoint(tmp_path):
    """A checkpoint of two processes under ZeRO 2, as far as its record goes."""
    write_record(tmp_path / "fsd_arguments.json", deepspeed_record(2))
    return str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (deepspeed_record(3), "deepspeed.zero_optimization.stage was 2, now 3"),
        (deepspeed_record(2, world_size=1), "world_size was 2, now 1"),
        (deepspeed_record(2, world_size=4), "world_size was 2, now 4"),
        (deepspeed_record(2, sub_group_size=1000), "sub_group_size was 'the default', now 1000"),
        (PLAIN, "deepspeed was 'ds.json', now 'the default'"),
    ],
)
@pytest.mark.parametrize("allowed", [None, ["deepspeed"]])
def test_a_checkpoint_of_deepspeed_goes_on_in_its_layout_alone(deepspeed_checkpoint, now, said, allowed):
    with pytest.raises(ValueError, match="belongs to a run with other settings") as error:
        check_resumed(now, deepspeed_checkpoint, allowed)
    assert said in str(error.value)
    assert str(error.value).endswith(CUT), "nothing is advised that would not help"


def test_deepspeed_is_not_begun_in_the_middle_of_a_run(tmp_path):
    write_record(tmp_path / "fsd_arguments.json", PLAIN)
    with pytest.raises(ValueError, match=r"deepspeed was 'the default', now 'ds\.json'"):
        check_resumed(deepspeed_record(2), str(tmp_path / "checkpoint-4"), ["deepspeed"])


def test_configurations_of_deepspeed_are_compared_by_what_is_in_them(deepspeed_checkpoint):
    moved = check_resumed(deepspeed_record(2, path="elsewhere.json"), deepspeed_checkpoint, None)
    assert moved.facts["resumed"][0]["changed"] == {}
    other = deepspeed_record(2, overlap_comm=False)
    with pytest.raises(
        ValueError, match="overlap_comm was True, now False; --allow_changes deepspeed allows"
    ):
        check_resumed(other, deepspeed_checkpoint, None)
    found = check_resumed(other, deepspeed_checkpoint, ["deepspeed"])
    assert found.facts["resumed"][0]["changed"] == {"deepspeed.zero_optimization.overlap_comm": [True, False]}


def test_a_checkpoint_without_a_record_is_resumed_with_a_warning(tiny, begun, tmp_path, caplog):
    import shutil

    shutil.copytree(begun, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "fsd_arguments.json").unlink()
    resume(tiny, begun, tmp_path)
    assert "cannot be checked that the run goes on as it began" in caplog.text


def test_a_teacher_is_resumed_by_the_same_rules(tiny, tmp_path):
    folder = tmp_path / "run"
    flags = [*tiny.data(), *TRAINING, *SAVING, "--model_name_or_path", str(tiny.backbone)]
    flags += ["--output_dir", str(folder), "--max_steps", "2", "--per_device_train_batch_size", "8"]
    run("teacher", flags)
    more = [*flags, "--max_steps", "4", "--resume_from_checkpoint", "last"]
    with pytest.raises(ValueError, match="warmup_steps was 0, now 2"):
        run("teacher", [*more, "--warmup_steps", "2"])
    figures = run("teacher", more)
    assert math.isfinite(figures["train_loss"])
    assert history(folder)[-1]["step"] == 4
