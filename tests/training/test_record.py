"""The record of a run, which repeats it; starting where a run may have been before; and runs that stop early."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import fsd_fast
from fsd_fast import cli
from fsd_fast.commands import demo, run
from fsd_fast.commands import distill as distill_command
from fsd_fast.commands.flags import RunArguments
from fsd_fast.commands.parsing import command_flags
from fsd_fast.training.record import RECORD_FILE, Record, make_record, read_record, write_record
from fsd_fast.training.trainer import FSDTrainer
from tests.tiny import TRAINING, history, losses, tiny, write_stsb

__all__ = ["tiny"]


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory):
    """A run with settings off their defaults, and a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("first") / "run"
    flags = [*tiny.distillation(folder, steps=4), "--adam_beta1", "0.8", "--optim", "adamw_torch"]
    flags += ["--train_sampling_strategy", "group_by_length", "--seed", "3", "--beta", "2.5"]
    flags += [
        "--weight_decay",
        "0.1",
        "--lr_scheduler_type",
        "cosine",
        "--lr_scheduler_kwargs",
        '{"num_cycles": 0.4}',
    ]
    flags += ["--gradient_checkpointing", "true", "--dataloader_num_workers", "0", "--save_strategy", "steps"]
    run("distill", [*flags, "--save_steps", "2", "--save_total_limit", "2"])
    return folder


def test_the_record_repeats_the_run(first, tmp_path):
    record = str(first / RECORD_FILE)
    assert cli.main(["distill", record, "--output_dir", str(tmp_path / "again")]) == 0
    assert same(weights(tmp_path / "again"), weights(first))
    assert losses(tmp_path / "again") == losses(first)
    again = read_record(tmp_path / "again" / RECORD_FILE)
    assert again.facts == read_record(first / RECORD_FILE).facts
    recorded = read_record(first / RECORD_FILE).arguments
    assert again.arguments == {**recorded, "output_dir": str(tmp_path / "again")}
    # Another value on the command line is another run.
    assert cli.main(["distill", record, "--output_dir", str(tmp_path / "other"), "--beta", "0.5"]) == 0
    assert not same(weights(tmp_path / "other"), weights(first))


def test_what_the_record_holds(tiny, first):
    record = read_record(first / RECORD_FILE)
    assert record.command == "distill"
    expected = {
        "adam_beta1": 0.8, "adam_beta2": 0.999, "optim": "adamw_torch", "seed": 3, "beta": 2.5, "alpha": 0.5,
        "train_sampling_strategy": "group_by_length", "weight_decay": 0.1, "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": 0.4}, "activation_checkpointing": True, "bf16": False, "max_steps": 4,
        "teacher_model_name_or_path": str(tiny.teacher), "memory_path": str(tiny.memory_exclude), "student_layers": 2,
        "layer_pairs": None, "report_to": [], "output_dir": str(first),
    }  # fmt: skip
    assert {name: record.arguments.get(name) for name in expected} == expected
    # Every flag of our own is there, but for those that say how a run starts.
    flags = command_flags("distill")
    own = {name for name, flag in flags.items() if "RunArguments" not in flag.group.__name__}
    assert own <= record.arguments.keys()
    assert not {"resume_from_checkpoint", "overwrite_output_dir", "hub_token", "local_rank", "do_eval"} & (
        record.arguments.keys()
    )
    for name, value in record.arguments.items():
        refusal = flags[name].refusal
        assert refusal is None or value == refusal.accepted, name
    facts = record.facts
    assert (facts["world_size"], facts["device"], facts["layer_pairs"]) == (1, "cpu", "3:1")
    assert facts["parameters"] == sum(value.numel() for value in weights(first).values())
    assert facts["threads"] == torch.get_num_threads()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["fsd_fast"] == fsd_fast.__version__
    card = (first / "README.md").read_text()
    for row in ("| beta | 2.5 |", "| layer_pairs | 3:1 |", f"| torch_version | {torch.__version__} |"):
        assert row in card


def test_the_record_is_there_before_the_first_step(tiny, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise ValueError("no step")

    monkeypatch.setattr(FSDTrainer, "training_step", stop)
    with pytest.raises(ValueError, match="no step"):
        run("distill", tiny.distillation(tmp_path / "run", "vkd"))
    assert read_record(tmp_path / "run" / RECORD_FILE).arguments["method"] == "vkd"


def test_records_are_checked(first, tmp_path, capsys):
    before = (first / RECORD_FILE).read_bytes()
    assert cli.main(["distill", str(first / RECORD_FILE)]) == 2
    assert f"output_dir: {first} holds a run already" in capsys.readouterr().err
    assert (first / RECORD_FILE).read_bytes() == before
    assert cli.main(["teacher", str(first / RECORD_FILE), "--output_dir", str(tmp_path / "run")]) == 2
    assert "expected the record of 'teacher', got the one of 'distill'" in capsys.readouterr().err
    for values in ({"command": "distill", "arguments": [], "facts": {}}, {"beta": 1}):
        path = tmp_path / "record.json"
        path.write_text(json.dumps(values))
        with pytest.raises(ValueError, match="expected the record of a run"):
            read_record(path)
    record = Record("distill", {"beta": 1.0}, {"versions": {"torch": "2"}, "parameters": 3})
    write_record(tmp_path / "record.json", record)
    assert read_record(tmp_path / "record.json") == record
    assert record.settings == {"beta": 1.0, "parameters": 3, "torch_version": "2"}


def test_auto_starts_where_there_is_nothing_and_continues_where_there_is_a_checkpoint(tiny, first, tmp_path):
    record, auto = str(first / RECORD_FILE), ["--resume_from_checkpoint", "auto"]
    folder = tmp_path / "run"
    assert cli.main(["distill", record, "--output_dir", str(folder), *auto]) == 0
    assert same(weights(folder), weights(first))
    # Killed after its second step, and queued again.
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "model.safetensors").unlink()
    shutil.copytree(first / "checkpoint-2", folder / "checkpoint-2", dirs_exist_ok=True)
    arguments = read_record(first / RECORD_FILE).arguments | {"output_dir": str(folder)}
    (tmp_path / "run.json").write_text(json.dumps(arguments | {"resume_from_checkpoint": "auto"}))
    steps = []

    class Counted(FSDTrainer):
        def training_step(self, *arguments, **keywords):
            steps.append(self.state.global_step)
            return super().training_step(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distill_command, "FSDTrainer", Counted)
        assert cli.main(["distill", str(tmp_path / "run.json")]) == 0
    assert steps == [2, 3]
    assert same(weights(folder), weights(first))
    # Killed before its first checkpoint.
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (folder / "model.safetensors").unlink()
    assert cli.main(["distill", str(tmp_path / "run.json"), "--overwrite_output_dir", "true"]) == 0
    assert same(weights(folder), weights(first))
    # How the run was started is no part of what repeats it.
    assert read_record(folder / RECORD_FILE).arguments == arguments


def test_a_record_holds_the_configuration_of_deepspeed(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    training = RunArguments(output_dir=str(tmp_path / "run"), use_cpu=True)
    assert "deepspeed_config" not in make_record("teacher", training).facts
    training.deepspeed = str(tmp_path / "ds.json")
    record = make_record("teacher", training)
    assert record.facts["deepspeed_config"] == {"zero_optimization": {"stage": 2}}
    assert record.arguments["deepspeed"] == str(tmp_path / "ds.json")


def test_the_demo_reads_the_records_of_its_runs(tmp_path):
    for name, arguments, facts in (
        ("teacher", {"num_layers": None}, {"num_layers": 6, "parameters": 10}),
        ("no teacher", {"num_layers": 3}, {"num_layers": 3, "parameters": 5}),
        ("vkd", {"student_layers": None}, {"student_layers": 3, "parameters": 5}),
    ):
        write_record(
            tmp_path / name.replace(" ", "_") / RECORD_FILE,
            Record("distill", arguments, {**facts, "versions": {}}),
        )
        row = demo._row(name, {"eval_accuracy": 0.5, "seconds": 2.0}, tmp_path)
        assert (row["layers"], row["parameters"]) == tuple(facts.values())


def test_auto_leaves_files_alone_that_are_no_run(tiny, tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "thesis.txt").write_text("")
    flags = [*tiny.distillation(folder, "vkd"), "--resume_from_checkpoint", "auto"]
    assert cli.main(["distill", *flags]) == 2
    assert f"holds files and no {RECORD_FILE}" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "thesis.txt"]


def test_a_run_without_a_whole_batch_is_not_exported(tiny, tmp_path, capsys):
    flags = [*tiny.distillation(tmp_path / "run", "vkd", batch=32), "--dataloader_drop_last", "true"]
    assert cli.main(["distill", *flags]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        "failed: no step was made, so nothing is exported: the 24 training samples are less than a batch"
        in line
    )
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_noise_on_the_embeddings_reaches_the_student_alone(tiny, tmp_path):
    for name, more in (("plain", []), ("noisy", ["--neftune_noise_alpha", "50"])):
        run("distill", [*tiny.distillation(tmp_path / name, steps=2), *more])
    plain, noisy = ([e for e in history(tmp_path / name) if "loss" in e] for name in ("plain", "noisy"))
    assert plain[0]["loss_hard"] != noisy[0]["loss_hard"]
    assert all(value == value for value in noisy[1].values())
    assert weights(tmp_path / "plain").keys() == weights(tmp_path / "noisy").keys()


def test_the_student_has_one_source(tiny, tmp_path, capsys):
    flags = [*tiny.distillation(tmp_path / "run", "vkd"), "--copy_teacher", "true"]
    assert cli.main(["distill", *flags]) == 2
    assert "model_name_or_path: --copy_teacher true starts the student" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_regression_has_no_labels_to_smooth(tiny, tmp_path, capsys):
    data = [
        "--task_name",
        "stsb",
        "--data_dir",
        str(write_stsb(tmp_path / "STS-B")),
        "--max_seq_length",
        "24",
    ]
    flags = [
        *data,
        *TRAINING,
        "--model_name_or_path",
        str(tiny.backbone),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert cli.main(["teacher", *flags, "--label_smoothing_factor", "0.1"]) == 2
    assert "label_smoothing_factor: expected 0 for a regression" in capsys.readouterr().err
