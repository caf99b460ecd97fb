"""The trainers: losses that do not depend on how a batch is cut, and runs that stop where a number is not finite."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fsd_fast.commands import distill as distill_command
from fsd_fast.commands import run
from fsd_fast.commands import teacher as teacher_command
from fsd_fast.data import TASKS
from fsd_fast.metrics import hard_label_loss
from fsd_fast.training.trainer import ClassifierTrainer, FSDTrainer
from tests.faults.registry import fault
from tests.tiny import COMMON, TRAINING, history, save_backbone, tiny, write_mnli, write_rte, write_stsb

__all__ = ["tiny"]


def first_step(folder):
    return next(entry for entry in history(folder) if "loss" in entry)


def fine_tune(folder, backbone, task, data, *more):
    """One step of plain gradient descent without a clip, logged."""
    flags = [*("--task_name", task, "--data_dir", str(data), *COMMON), *TRAINING]
    flags += ["--model_name_or_path", str(backbone), "--output_dir", str(folder), "--max_steps", "1"]
    flags += ["--optim", "sgd", "--lr_scheduler_type", "constant", "--logging_steps", "1", *more]
    run("teacher", flags)
    return first_step(folder)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("task", ["rte", "stsb"])
def test_accumulated_batches_of_a_teacher_equal_one_large_batch(tmp_path, task, family):
    data = {"rte": write_rte, "stsb": write_stsb}[task](tmp_path / task)
    backbone = save_backbone(tmp_path / "backbone", family=family, dropout=0.0)
    if family == "distilbert":
        path = backbone / "tokenizer_config.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"model_input_names": ["input_ids", "attention_mask"]})
        )
    found = []
    for batch, accumulated in ((16, 1), (4, 4)):
        sizes = [
            "--per_device_train_batch_size",
            str(batch),
            "--gradient_accumulation_steps",
            str(accumulated),
        ]
        found.append(fine_tune(tmp_path / f"run{batch}", backbone, task, data, *sizes))
    whole, cut = found
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("batch", [3, 5, 64])
def test_the_evaluation_loss_does_not_depend_on_the_batches(tiny, batch):
    flags = [*tiny.data(), "--model_name_or_path", str(tiny.teacher), "--use_cpu", "true"]
    figures = run("evaluate", [*flags, "--per_device_eval_batch_size", str(batch)])
    whole = run("evaluate", [*flags, "--per_device_eval_batch_size", "12"])
    assert figures["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6)
    assert figures["eval_accuracy"] == whole["eval_accuracy"]


def test_an_evaluation_drops_no_sample(tiny, tmp_path):
    flags = [*tiny.data(), *TRAINING, "--model_name_or_path", str(tiny.teacher), "--max_steps", "1"]
    flags += [
        "--learning_rate",
        "0",
        "--per_device_eval_batch_size",
        "5",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    flags += ["--per_device_train_batch_size", "12"]
    figures = run("teacher", [*flags, "--dataloader_drop_last", "true"])
    whole = run("evaluate", [*tiny.data(), "--model_name_or_path", str(tiny.teacher), "--use_cpu", "true"])
    for name in ("eval_loss", "eval_accuracy"):
        assert figures[name] == pytest.approx(whole[name], rel=1e-6)


@pytest.mark.parametrize(("task", "logits", "labels"), [("rte", 2, [0, 1, 1]), ("stsb", 1, [0.5, 4.5, 2.0])])
def test_the_evaluation_loss_is_torchs(task, logits, labels):
    z = np.random.default_rng(0).normal(size=(3, logits)) * 30
    given, truth = torch.from_numpy(z), torch.tensor(labels)
    expected = (
        torch.nn.functional.cross_entropy(given, truth)
        if logits > 1
        else (given[:, 0] - truth).square().mean()
    )
    assert hard_label_loss(TASKS[task], z, np.asarray(labels)) == pytest.approx(float(expected), rel=1e-12)


def test_components_are_averaged_as_the_loss_is(tiny, tmp_path):
    # Ten batches of three: accumulation over 7 leaves a group of 3, and an entry covers one group of each.
    data = write_rte(tmp_path / "RTE", train=30)
    flags = [*tiny.distillation(tmp_path / "run", "vkd", steps=4, batch=3), "--data_dir", str(data)]
    run("distill", [*flags, "--gradient_accumulation_steps", "7", "--logging_steps", "2"])
    entries = [entry for entry in history(tmp_path / "run") if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    for entry in entries:
        assert entry["loss_vkd"] == pytest.approx(entry["loss"], rel=1e-5)
        assert entry["loss_vkd"] == pytest.approx((entry["loss_hard"] + entry["loss_soft"]) / 2, rel=1e-5)


def test_weight_decay_leaves_the_student_memory_alone(tiny, tmp_path):
    moved = {}
    for decay in ("0", "1"):
        folder = tmp_path / decay
        flags = [*tiny.distillation(folder, "fsd_g", steps=1), "--optim", "sgd", "--learning_rate", "0.1"]
        run("distill", [*flags, "--weight_decay", decay, "--gamma_g", "0", "--save_strategy", "steps"])
        from safetensors.torch import load_file

        moved[decay] = load_file(folder / "checkpoint-1" / "model.safetensors")
    memory = "student_memory.centroids"
    assert torch.equal(moved["0"][memory], moved["1"][memory])
    weight = "student.bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(moved["0"][weight], moved["1"][weight]), "the student's own weights do decay"


def spoiling(trainer_class, step, spoil):
    """A trainer whose parameters are spoilt after training step number ``step``."""

    class Spoilt(trainer_class):
        def training_step(self, model, inputs, *more):
            loss = super().training_step(model, inputs, *more)
            if self.state.global_step + 1 == step:
                spoil(self.accelerator.unwrap_model(model))
            return loss

    return Spoilt


def set_weights_to_nan(model):
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)


def set_a_gradient_to_inf(model):
    next(parameter for parameter in model.parameters() if parameter.grad is not None).grad.fill_(math.inf)


SAVING = [
    "--save_strategy",
    "steps",
    "--save_steps",
    "1",
    "--save_total_limit",
    "1",
    "--eval_strategy",
    "steps",
]


@fault(
    "a loss becomes NaN",
    "the run stops at that step in one line; nothing of it is logged or saved",
)
@pytest.mark.parametrize("logging", ["1", "5"])
@pytest.mark.parametrize("name", ["teacher", "distill"])
def test_training_stops_at_the_first_loss_that_is_not_finite(tiny, tmp_path, monkeypatch, name, logging):
    folder = tmp_path / "run"
    if name == "distill":
        flags = tiny.distillation(folder, "fsd_ilg", steps=6)
        monkeypatch.setattr(distill_command, "FSDTrainer", spoiling(FSDTrainer, 3, set_weights_to_nan))
    else:
        flags = [
            *tiny.data(),
            *TRAINING,
            "--model_name_or_path",
            str(tiny.backbone),
            "--output_dir",
            str(folder),
        ]
        flags += ["--max_steps", "6", "--per_device_train_batch_size", "8"]
        monkeypatch.setattr(
            teacher_command, "ClassifierTrainer", spoiling(ClassifierTrainer, 3, set_weights_to_nan)
        )
    flags += ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "1"]
    with pytest.raises(FloatingPointError) as error:
        run(name, [*flags, "--logging_steps", logging])
    message = str(error.value)
    assert "step 4: the loss is nan" in message
    assert str(folder / "checkpoint-2") in message
    assert "--learning_rate" in message
    numbers = message.split("training samples ")[1].split(";")[0].split(", ")
    assert len({int(number) for number in numbers}) == 8
    assert all(0 <= int(number) < 24 for number in numbers)
    assert ("loss_intra = nan" in message) == (name == "distill")
    # What was good is still there, and nothing of the failed run looks like a finished one.
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (folder / "model.safetensors").exists()
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    assert all(math.isfinite(entry.get("loss", 0)) for entry in state["log_history"])


@pytest.mark.parametrize("clip", ["1", "0"])
def test_training_stops_at_a_gradient_that_is_not_finite_before_the_step(tiny, tmp_path, monkeypatch, clip):
    made = []
    base = spoiling(FSDTrainer, 2, set_a_gradient_to_inf)

    class Recorded(base):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            made.append(self)

    monkeypatch.setattr(distill_command, "FSDTrainer", Recorded)
    flags = [*tiny.distillation(tmp_path / "run", "vkd", steps=4), "--max_grad_norm", clip]
    with pytest.raises(FloatingPointError, match=r"step 2: the gradient's norm is (inf|nan)"):
        run("distill", flags)
    assert all(bool(p.isfinite().all()) for p in made[0].distillation.parameters())


def test_losses_of_a_gpu_are_read_before_anything_is_logged_or_saved(tmp_path):
    from transformers import TrainerControl

    from fsd_fast.training.finite import FiniteCheck

    check = FiniteCheck(str(tmp_path))
    meta = torch.tensor(math.nan)

    class OnGpu:
        """A scalar that says it is on a GPU: looking at it would make the host wait."""

        device = torch.device("cuda")

        def detach(self):
            return self

        def float(self):
            return meta

        def __float__(self):
            return math.nan

    check.add(3, "the loss", OnGpu())
    check.on_step_end(None, None, TrainerControl())
    for wish in ("should_log", "should_evaluate", "should_save"):
        check = FiniteCheck(str(tmp_path))
        check.add(3, "the loss", OnGpu())
        with pytest.raises(FloatingPointError, match="step 3: the loss is nan; no checkpoint was saved"):
            check.on_step_end(None, None, TrainerControl(**{wish: True}))


BEST = [
    "--load_best_model_at_end",
    "true",
    "--save_strategy",
    "steps",
    "--eval_strategy",
    "steps",
    "--save_steps",
    "2",
]


@pytest.mark.parametrize("metric", [None, "accuracy", "eval_validation_mismatched_accuracy", "loss"])
def test_the_best_model_of_mnli(tiny, tmp_path, metric):
    data = ["--task_name", "mnli", "--data_dir", str(write_mnli(tmp_path / "MNLI")), *COMMON]
    folder = tmp_path / "run"
    flags = [*data, *TRAINING, *BEST, "--eval_steps", "2", "--max_steps", "4", "--save_total_limit", "3"]
    flags += [
        "--model_name_or_path",
        str(tiny.backbone),
        "--output_dir",
        str(folder),
        "--learning_rate",
        "1e-3",
    ]
    run("teacher", flags + ([] if metric is None else ["--metric_for_best_model", metric]))
    state = json.loads((folder / "trainer_state.json").read_text())
    name = {
        None: "eval_validation_matched_accuracy",
        "accuracy": "eval_validation_matched_accuracy",
        "loss": "eval_validation_matched_loss",
    }.get(metric, metric)
    scores = [entry[name] for entry in state["log_history"] if name in entry]
    assert state["best_metric"] == (min(scores) if metric == "loss" else max(scores))


def test_a_metric_that_does_not_exist_is_refused_at_the_start(tiny, tmp_path):
    flags = [*tiny.distillation(tmp_path / "run", "vkd"), *BEST, "--metric_for_best_model", "f1"]
    with pytest.raises(
        ValueError, match=r"metric_for_best_model: task 'rte' reports accuracy, loss; got 'f1'"
    ):
        run("distill", [*flags, "--eval_steps", "2"])
    assert not (tmp_path / "run").exists()


def test_a_folder_of_the_users_is_not_taken_for_a_checkpoint(tiny, tmp_path):
    folder = tmp_path / "run"
    for name in ("checkpoint-analysis", "checkpoint-7"):
        (folder / name).mkdir(parents=True)
        (folder / name / "notes.txt").write_text("mine")
    (folder / "all_results.json").write_text('{"half')
    run("distill", [*tiny.distillation(folder, "vkd", steps=1), "--overwrite_output_dir", "true"])
    assert (folder / "checkpoint-analysis" / "notes.txt").read_text() == "mine"
    assert not (folder / "checkpoint-7").exists()
    results = json.loads((folder / "all_results.json").read_text())
    assert {"train_loss", "eval_loss", "eval_accuracy"} <= results.keys()
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_labels == 2
