"""``evaluate``: the scores of a classifier, and how far it follows its teacher."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fsd_fast import cli
from fsd_fast.commands import run
from tests.tiny import TRAINING, history, save_backbone, tiny

__all__ = ["tiny"]


def flags(tiny, model, *more):
    return [*tiny.data(), "--model_name_or_path", str(model), "--use_cpu", "true", *map(str, more)]


@pytest.fixture(scope="module")
def student(tiny, tmp_path_factory):
    """A classifier of another depth, not trained."""
    return save_backbone(tmp_path_factory.mktemp("student") / "model", layers=2, labels=2, seed=5)


def test_a_teacher_agrees_with_itself(tiny):
    found = run("evaluate", flags(tiny, tiny.teacher, "--teacher_model_name_or_path", tiny.teacher))
    assert found["eval_teacher_agreement"] == 1
    assert found["eval_teacher_kl"] == 0
    without = run("evaluate", flags(tiny, tiny.teacher))
    assert {name for name in found if name.startswith("eval_teacher")} == found.keys() - without.keys()
    assert without["eval_accuracy"] == found["eval_accuracy"]


def test_the_logits_of_a_teacher_are_kept_and_read(tiny, student, tmp_path):
    kept = tmp_path / "kept"
    asked = flags(tiny, student, "--teacher_model_name_or_path", tiny.teacher, "--teacher_logits_dir", kept)
    first = run("evaluate", asked)
    assert 0 <= first["eval_teacher_agreement"] < 1
    assert first["eval_teacher_kl"] > 0
    (path,) = kept.iterdir()
    assert run("evaluate", asked)["eval_teacher_kl"] == first["eval_teacher_kl"]
    # What is there is what is read.
    logits = load_file(path)["logits"]
    assert logits.shape == (12, 2)
    save_file({"logits": -logits}, path)
    assert run("evaluate", asked)["eval_teacher_agreement"] == pytest.approx(
        1 - first["eval_teacher_agreement"]
    )
    # Another split has a file of its own.
    run("evaluate", [*asked, "--max_eval_samples", "5"])
    assert len(list(kept.iterdir())) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no tensors", "not a safetensors file"),
        ({"logits": np.zeros((3, 2), np.float32)}, "got torch.float32 [3, 2]"),
    ],
)
def test_damaged_logits_are_refused_and_named(tiny, student, tmp_path, capsys, content, words):
    kept = tmp_path / "kept"
    asked = flags(tiny, student, "--teacher_model_name_or_path", tiny.teacher, "--teacher_logits_dir", kept)
    run("evaluate", asked)
    (path,) = kept.iterdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    assert cli.main(["evaluate", *asked]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert str(path) in message
    assert words in message


def test_heldout_rows_are_a_split_of_their_own(tiny, tmp_path):
    more = ["--heldout_samples", "7", "--subset_seed", "1", "--output_dir", tmp_path / "scores"]
    found = run("evaluate", flags(tiny, tiny.teacher, *more, "--teacher_model_name_or_path", tiny.teacher))
    assert {"eval_heldout_accuracy", "eval_validation_accuracy", "eval_heldout_teacher_kl"} <= found.keys()
    assert json.loads((tmp_path / "scores" / "evaluate_results.json").read_text()) == found


def test_what_cannot_be_compared_is_refused(tiny, student, tmp_path, capsys):
    def message(*more):
        assert cli.main(["evaluate", *flags(tiny, student, *more)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "teacher_logits_dir: expected --teacher_model_name_or_path" in message(
        "--teacher_logits_dir", tmp_path / "kept"
    )
    other = save_backbone(tmp_path / "three", labels=3)
    assert "teacher_model_name_or_path: " in message("--teacher_model_name_or_path", other)
    assert "heldout_samples: expected fewer than the 24" in message("--heldout_samples", 24)


# --- checkpoints ------------------------------------------------------------------------------------------------


def checkpointed(tiny, folder, command, method="fsd_ilg"):
    """A run of three epochs with all its checkpoints; returns the accuracy and loss that it logged for each."""
    more = ["--save_strategy", "epoch", "--eval_strategy", "epoch", "--save_total_limit", "5"]
    if command == "distill":
        flags = tiny.distillation(folder, method, steps=-1)
    else:
        flags = [
            *tiny.data(),
            *TRAINING,
            "--model_name_or_path",
            str(tiny.backbone),
            "--output_dir",
            str(folder),
        ]
        flags += ["--learning_rate", "1e-3"]
    run(command, [*flags, *more, "--max_steps", "-1", "--num_train_epochs", "3"])
    return {entry["step"]: entry for entry in history(folder) if "eval_loss" in entry}


@pytest.mark.parametrize("command", ["teacher", "distill"])
def test_all_checkpoints_have_the_scores_that_were_logged(tiny, tmp_path, command):
    logged = checkpointed(tiny, tmp_path / "run", command)
    assert len(logged) == 3
    found = run("evaluate", flags(tiny, tmp_path / "run", "--all_checkpoints"))
    for step, entry in logged.items():
        assert found[f"checkpoint-{step}_eval_loss"] == pytest.approx(entry["eval_loss"], rel=1e-6)
        assert found[f"checkpoint-{step}_eval_accuracy"] == entry["eval_accuracy"]
    assert found["eval_loss"] == pytest.approx(found[f"checkpoint-{max(logged)}_eval_loss"], rel=1e-6)
    assert len({found[f"checkpoint-{step}_eval_loss"] for step in logged}) == 3


def test_checkpoints_that_cannot_be_scored_are_named(tiny, tmp_path, capsys):
    def message():
        assert cli.main(["evaluate", *flags(tiny, tmp_path / "run", "--all_checkpoints")]) != 0
        return capsys.readouterr().err.splitlines()[-1]

    checkpointed(tiny, tmp_path / "run", "distill", "vkd")
    first = min((tmp_path / "run").glob("checkpoint-*"))
    weights = (first / "model.safetensors").read_bytes()
    (first / "model.safetensors").write_bytes(weights[:-10])
    assert f"{first / 'model.safetensors'}: not a safetensors file" in message()
    save_file({"student.other": np.zeros(3, np.float32)}, first / "model.safetensors")
    assert f"{first / 'model.safetensors'}: expected the weights of the model in" in message()
    (first / "model.safetensors").unlink()
    assert f"{first}: expected the model in model.safetensors, found none" in message()
    (first / "manifest.json").unlink()
    assert f"{first}: manifest.json is missing: it was cut off" in message()
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert "all_checkpoints: " in message()
