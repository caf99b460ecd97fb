"""Early stopping, and the best model: where a run stops, what it exports, and that a resumed run agrees."""

import json

import pytest
import torch
from transformers import TrainerCallback

from fsd_fast import cli
from fsd_fast.commands import run
from fsd_fast.models.teacher import Teacher
from fsd_fast.training.early_stopping import EarlyStopping
from tests.tiny import TRAINING, history, tiny

__all__ = ["tiny"]

# Steps so large that the student gets worse.
STEPS = ["--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2"]
STEPS += ["--metric_for_best_model", "loss", "--learning_rate", "2e-2", "--lr_scheduler_type", "constant"]


def flags(tiny, folder, command, *more):
    if command == "distill":
        start = tiny.distillation(folder, "fsd_il", steps=60)
    else:
        start = [
            *tiny.data(),
            *TRAINING,
            "--model_name_or_path",
            str(tiny.backbone),
            "--output_dir",
            str(folder),
        ]
        start += ["--max_steps", "60", "--per_device_train_batch_size", "8"]
    return [*start, *STEPS, *more]


def evaluations(folder):
    """Step and loss of each evaluation; the exported model's own comes after them with the last step's number."""
    found = {}
    for entry in history(folder):
        if "eval_loss" in entry:
            found.setdefault(entry["step"], entry["eval_loss"])
    return list(found.items())


@pytest.mark.parametrize("command", ["teacher", "distill"])
def test_a_run_stops_after_patience_and_exports_its_best_model(tiny, tmp_path, command):
    figures = run(command, flags(tiny, tmp_path / "run", command, "--early_stopping_patience", "3"))
    found = evaluations(tmp_path / "run")
    losses = [loss for _, loss in found]
    best = losses.index(min(losses))
    # Three evaluations after the best one, and no further step.
    assert len(losses) == best + 4
    assert found[-1][0] < 60
    assert figures["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    evaluated = run("evaluate", [*tiny.data(), "--model_name_or_path", str(tmp_path / "run"), "--use_cpu"])
    assert evaluated["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["best_metric"] == min(losses)


def test_without_patience_the_run_goes_to_its_end(tiny, tmp_path):
    run("distill", flags(tiny, tmp_path / "run", "distill"))
    assert evaluations(tmp_path / "run")[-1][0] == 60


class _Killed(Exception):
    pass


def test_a_resumed_run_stops_where_it_would_have(tiny, tmp_path, monkeypatch):
    patience = ["--early_stopping_patience", "3"]
    run("distill", flags(tiny, tmp_path / "whole", "distill", *patience))
    whole = evaluations(tmp_path / "whole")
    # Cut off after the evaluation before the last: two of three are counted by then.
    last = whole[-2][0]

    def die(self, args, state, control, **_):
        if state.global_step == last:
            raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(EarlyStopping, "on_save", die, raising=False)
        with pytest.raises(_Killed):
            run("distill", flags(tiny, tmp_path / "cut", "distill", *patience, "--save_total_limit", "9"))
    (tmp_path / "cut" / f"checkpoint-{last}").rename(tmp_path / "cut" / "gone")
    more = [*patience, "--save_total_limit", "9", "--resume_from_checkpoint", "last"]
    run("distill", flags(tiny, tmp_path / "cut", "distill", *more))
    assert evaluations(tmp_path / "cut") == whole
    one, two = (Teacher.from_pretrained(str(tmp_path / name)).model.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_other_splits_count_neither_way():
    callback = EarlyStopping(2)

    class Arguments:
        metric_for_best_model = "validation_matched_accuracy"
        greater_is_better = True

    class State:
        best_metric = 0.9

    class Control:
        should_training_stop = False

    for metrics in ({"eval_validation_mismatched_accuracy": 0.1}, {"eval_validation_matched_accuracy": 0.5}):
        callback.on_evaluate(Arguments, State, Control, metrics)
    assert callback.early_stopping_patience_counter == 1
    assert isinstance(callback, TrainerCallback)
    callback.on_evaluate(Arguments, State, Control, {"eval_validation_matched_accuracy": 0.4})
    assert Control.should_training_stop


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--early_stopping_patience", "0"], "--early_stopping_patience: expected at least 1, got 0"),
        (["--early_stopping_patience", "1", "--eval_strategy", "no"], "load_best_model_at_end"),
        (["--early_stopping_threshold", "-1"], "--early_stopping_threshold: expected at least 0"),
    ],
)
def test_stopping_that_cannot_be_is_refused(tiny, tmp_path, capsys, more, words):
    assert cli.main(["distill", *flags(tiny, tmp_path / "run", "distill", *more)]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
