"""One sample through the whole road: teacher, memory, distillation, evaluation, all on tiny models."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertModel

from fsd_fast.commands import distill as commands
from fsd_fast.commands import run
from fsd_fast.commands.parsing import parse
from fsd_fast.losses import STRUCTURES as FSD_METHODS
from fsd_fast.models.families import layer_stack
from fsd_fast.models.fingerprint import model_fingerprint
from fsd_fast.models.student import load_classifier
from fsd_fast.models.teacher import Teacher
from fsd_fast.training.record import read_record
from fsd_fast.training.trainer import FSDTrainer
from tests.tiny import (
    CENTROIDS,
    COMMON,
    HIDDEN,
    SEQUENCE,
    TRAINING,
    history,
    load_cleanly,
    losses,
    memory_flags,
    save_backbone,
    tiny,
    without_source,
    write_mnli,
    write_rte,
    write_stsb,
)

__all__ = ["tiny"]

STRUCTURES = {
    "vkd": set(),
    "fsd_i": {"loss_intra"},
    "fsd_l": {"loss_local"},
    "fsd_g": {"loss_global", "global_memory", "global_distance", "global_cosine"},
}
STRUCTURES["fsd_il"] = STRUCTURES["fsd_i"] | STRUCTURES["fsd_l"]
STRUCTURES["fsd_ilg"] = STRUCTURES["fsd_il"] | STRUCTURES["fsd_g"]


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that the commands make."""
    made = []

    class Recorded(FSDTrainer):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            made.append(self)

    monkeypatch.setattr(commands, "FSDTrainer", Recorded)
    return made


@pytest.mark.parametrize("pad_features", ["exclude", "include"])
@pytest.mark.parametrize("method", list(FSD_METHODS))
def test_the_whole_road(tiny, tmp_path, method, pad_features):
    figures = run("distill", tiny.distillation(tmp_path / "run", method, pad_features))
    entries = [entry for entry in history(tmp_path / "run") if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    for entry in entries:
        terms = {name for name in entry if name.startswith(("loss_", "global_"))}
        assert terms == {"loss_vkd", "loss_hard", "loss_soft"} | STRUCTURES[method]
        # The integrated loss, put together by hand from what was logged [eq. 11].
        structures = entry.get("loss_intra", 0) + entry.get("loss_local", 0)
        structures += 1e-4 * entry.get("loss_global", 0)
        assert entry["loss_vkd"] == pytest.approx((entry["loss_hard"] + entry["loss_soft"]) / 2, rel=1e-5)
        assert entry["loss"] == pytest.approx(entry["loss_vkd"] + 4 * structures, rel=1e-5)

    # The exported student, scored by itself, is the student that was trained.
    scored = run(
        "evaluate",
        [
            *(*tiny.data(pad_features), "--model_name_or_path", str(tmp_path / "run"), "--use_cpu", "true"),
            *("--output_dir", str(tmp_path / "scores")),
        ],
    )
    assert scored["eval_accuracy"] == figures["eval_accuracy"]
    assert scored["eval_loss"] == pytest.approx(figures["eval_loss"], rel=1e-5)
    written = json.loads((tmp_path / "scores" / "evaluate_results.json").read_text())
    assert written["eval_accuracy"] == figures["eval_accuracy"]


@pytest.fixture(scope="module")
def full_run(tiny, tmp_path_factory):
    """A run of 6 steps with TensorBoard and a checkpoint every 3; dropout is on."""
    folder = tmp_path_factory.mktemp("full") / "run"
    flags = [*tiny.distillation(folder, steps=6), "--report_to", "tensorboard", "--save_strategy", "steps"]
    run("distill", [*flags, "--save_steps", "3", "--save_total_limit", "2"])
    return folder


def test_the_exported_student_is_a_plain_model(tiny, full_run):
    (found,) = load_cleanly(full_run)
    assert (found["class"], found["layers"]) == ("BertForSequenceClassification", 2)
    assert found["id2label"] == {"0": "entailment", "1": "not_entailment"}
    assert torch.tensor(found["logits"]).shape == (1, 2)
    card = (full_run / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "2-layer student for rte, distilled by fsd_ilg" in card
    assert "| eval_accuracy |" in card
    assert not any("memory" in name for name in weights(full_run))
    assert not list(full_run.glob(".*")), "nothing of the export is left behind"


def test_the_student_memory_is_in_the_checkpoint_alone(tiny, full_run):
    checkpoint = weights(full_run / "checkpoint-6")
    assert checkpoint["student_memory.centroids"].shape == (CENTROIDS, SEQUENCE * HIDDEN)
    student = {name.removeprefix("student."): value for name, value in checkpoint.items()}
    del student["student_memory.centroids"]
    assert same(student, weights(full_run))


def test_files_of_a_run(full_run):
    results = json.loads((full_run / "all_results.json").read_text())
    expected = {"train_loss", "train_runtime", "train_samples", "eval_accuracy", "eval_loss", "epoch"}
    assert expected <= results.keys()
    assert results["train_samples"] == 24
    settings = read_record(full_run / "fsd_arguments.json").facts
    assert (settings["student_layers"], settings["layer_pairs"]) == (2, "3:1")
    assert settings["parameters"] == sum(value.numel() for value in weights(full_run).values())


def test_loss_components_are_in_tensorboard(full_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # The last evaluation has a file of its own.
    (folder,) = {path.parent for path in full_run.rglob("events.out.tfevents.*")}
    accumulator = EventAccumulator(str(folder)).Reload()
    logged = [entry for entry in history(full_run) if "loss" in entry]
    for name in {"loss", "loss_hard", "loss_soft", *STRUCTURES["fsd_ilg"]}:
        scalars = {event.step: event.value for event in accumulator.Scalars(f"train/{name}")}
        assert scalars == pytest.approx({entry["step"]: entry[name] for entry in logged}, rel=1e-5), name


def test_tensorboard_is_the_default(tmp_path):
    _, _, arguments = parse("teacher", ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true"])
    assert arguments.report_to == ["tensorboard"]


def test_resuming_changes_nothing(tiny, full_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(full_run / "checkpoint-3", folder / "checkpoint-3")
    flags = [*tiny.distillation(folder, steps=6), "--resume_from_checkpoint", "last"]
    run("distill", flags)
    assert same(weights(folder), weights(full_run))
    assert losses(folder) == losses(full_run)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tiny, tmp_path):
    for name, seed in (("one", "1"), ("again", "1"), ("other", "2")):
        run("distill", [*tiny.distillation(tmp_path / name, steps=2), "--seed", seed])
    assert same(weights(tmp_path / "one"), weights(tmp_path / "again"))
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "other"))


@pytest.mark.parametrize("method", ["vkd", "fsd_ilg"])
def test_loss_goes_down(tiny, tmp_path, method):
    flags = [*tiny.distillation(tmp_path / "run", method, steps=40, batch=24), "--learning_rate", "2e-3"]
    run("distill", flags)
    values = losses(tmp_path / "run")
    assert sum(values[-5:]) < 0.7 * sum(values[:5])


def encoder_layers(state):
    """Everything but the head: embeddings and encoder layers, by their names in a bare model."""
    return {
        name.removeprefix("bert."): value
        for name, value in state.items()
        if not name.startswith(("classifier.", "cls."))
    }


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_first_layers_come_from_the_pretrained_model(tiny, tmp_path, layers):
    flags = tiny.distillation(tmp_path / "run", "vkd", steps=1)
    run("distill", [*flags, "--learning_rate", "0", "--student_layers", str(layers)])
    student, pretrained = encoder_layers(weights(tmp_path / "run")), weights(tiny.backbone)
    kept = {
        name: value
        for name, value in pretrained.items()
        if not name.startswith("encoder.layer.") or int(name.split(".")[2]) < layers
    }
    assert same(student, kept)
    assert not same(student, {name: encoder_layers(weights(tiny.teacher))[name] for name in kept})


def test_copying_the_teacher_takes_its_layers_and_its_head(tiny, tmp_path):
    flags = without_source(tiny.distillation(tmp_path / "run", "vkd", steps=1))
    run("distill", [*flags, "--learning_rate", "0", "--copy_teacher", "true"])
    student, teacher = weights(tmp_path / "run"), weights(tiny.teacher)
    assert same(student, {name: teacher[name] for name in student})
    assert "classifier.weight" in student
    assert "bert.encoder.layer.2.output.dense.weight" not in student


def test_a_student_starts_from_what_its_teacher_was_fine_tuned_from(tiny, tmp_path, caplog):
    flags = without_source(tiny.distillation(tmp_path / "run", "vkd", steps=1))
    run("distill", [*flags, "--learning_rate", "0"])
    student, pretrained = encoder_layers(weights(tmp_path / "run")), weights(tiny.backbone)
    assert same(student, {name: pretrained[name] for name in student})
    assert f"the student starts from {tiny.backbone}, which the teacher was fine-tuned from" in caplog.text
    record = read_record(tmp_path / "run" / "fsd_arguments.json")
    assert record.arguments["model_name_or_path"] == str(tiny.backbone)


def test_a_teacher_without_a_record_does_not_say_where_students_start(tiny, tmp_path):
    shutil.copytree(tiny.teacher, tmp_path / "teacher")
    (tmp_path / "teacher" / "fsd_arguments.json").unlink()
    flags = without_source(tiny.distillation(tmp_path / "run", "vkd"))
    with pytest.raises(ValueError, match="model_name_or_path: expected the pre-trained model"):
        run("distill", [*flags, "--teacher_model_name_or_path", str(tmp_path / "teacher")])


def test_a_student_defaults_to_half_of_its_teacher(tiny, tmp_path):
    flags = tiny.distillation(tmp_path / "run", "vkd", steps=1)
    at = flags.index("--student_layers")
    run("distill", flags[:at] + flags[at + 2 :])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["num_hidden_layers"] == 2


def test_the_teacher_stays_as_it_is(tiny, tmp_path, trainers):
    before = model_fingerprint(Teacher.from_pretrained(str(tiny.teacher)).model)
    flags = without_source(tiny.distillation(tmp_path / "run", steps=3))
    run("distill", [*flags, "--copy_teacher", "true"])
    (trainer,) = trainers
    assert model_fingerprint(trainer.teacher.teacher.model) == before
    assert all(p.grad is None and not p.requires_grad for p in trainer.teacher.teacher.model.parameters())
    assert not trainer.teacher.teacher.model.training
    # Nothing that walks the trained module reaches it.
    own = {id(p) for p in trainer.distillation.parameters()}
    assert not own & {id(p) for p in trainer.teacher.teacher.model.parameters()}


def test_a_teacher_that_could_learn_is_refused(tiny):
    inputs = {"input_ids": torch.tensor([[2, 5, 3]])}
    for spoil, what in (
        (lambda model: model.train(), "training mode"),
        (lambda model: model.classifier.bias.requires_grad_(True), "classifier.bias"),
        (lambda model: setattr(model.classifier.bias, "grad", torch.zeros(2)), "classifier.bias"),
    ):
        teacher = Teacher.from_pretrained(str(tiny.teacher))
        assert not teacher.hidden_states(inputs)[0].requires_grad
        spoil(teacher.model)
        for use in (teacher.hidden_states, teacher.penultimate):
            with pytest.raises(RuntimeError, match=what):
                use(inputs)


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
@pytest.mark.parametrize("layers", [1, 4])
def test_penultimate_is_the_last_hidden_state_but_one(tmp_path, family, layers):
    teacher = Teacher.from_pretrained(str(save_backbone(tmp_path, family=family, layers=layers, labels=2)))
    inputs = {
        "input_ids": torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    _, hidden = teacher.hidden_states(inputs)
    assert len(hidden) == teacher.num_layers + 1 == layers + 1
    assert not torch.equal(hidden[-2], hidden[-1])
    last, runs = layer_stack(teacher.model)[1][-1], []
    last.register_forward_hook(lambda *_: runs.append(0))
    assert torch.equal(teacher.penultimate(inputs), hidden[-2])
    assert runs == []
    # Nothing is left behind that would stop the next whole forward.
    assert torch.equal(teacher.hidden_states(inputs)[1][-1], hidden[-1])
    assert runs == [0]


def test_student_memory_started_from_the_teacher(tiny, tmp_path, trainers):
    flags = [*tiny.distillation(tmp_path / "run", "fsd_g", steps=2), "--student_memory_init", "teacher"]
    run("distill", [*flags, "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2"])
    centroids = load_file(tiny.memory_exclude / "memory.safetensors")["centroids"]
    steps = [
        weights(tmp_path / "run" / f"checkpoint-{i}")["student_memory.centroids"] - centroids for i in (1, 2)
    ]
    # AdamW's first step moves an entry by the memory's learning rate, so the start shows: the teacher's centroids.
    assert 0 < steps[0].abs().max() <= 3.03e-2
    assert steps[1].abs().max() > steps[0].abs().max()
    assert torch.equal(trainers[0].teacher_memory, centroids), "the teacher's own memory is a constant"


def test_accumulated_halves_equal_one_batch(tmp_path):
    backbone = save_backbone(tmp_path / "backbone", dropout=0.0)
    data = write_rte(tmp_path / "RTE")
    common = [*("--task_name", "rte", "--data_dir", str(data), *COMMON), *TRAINING]
    teacher = tmp_path / "teacher"
    run(
        "teacher",
        [*common, "--model_name_or_path", str(backbone), "--output_dir", str(teacher), "--max_steps", "1"],
    )
    results = {}
    for batch, accumulated in (("8", "1"), ("4", "2")):
        folder = tmp_path / f"run{batch}"
        # One step of plain gradient descent with rate 1, unclipped: the change of the weights is the gradient.
        run(
            "distill",
            [
                *(*common, "--teacher_model_name_or_path", str(teacher), "--output_dir", str(folder)),
                *("--model_name_or_path", str(backbone), "--student_layers", "2", "--method", "vkd"),
                *("--optim", "sgd", "--learning_rate", "1", "--max_grad_norm", "0", "--max_steps", "1"),
                *("--lr_scheduler_type", "constant", "--logging_steps", "1"),
                *("--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulated),
            ],
        )
        results[batch] = (weights(folder), [entry for entry in history(folder) if "loss" in entry])
    (whole, (log,)), (halves, (half_log,)) = results["8"], results["4"]
    start = encoder_layers(weights(backbone))
    moved = {
        name: value for name, value in encoder_layers(whole).items() if not torch.equal(value, start[name])
    }
    assert len(moved) > 20
    for name in whole:
        torch.testing.assert_close(halves[name], whole[name], rtol=1e-4, atol=1e-6, msg=name)
    for name in ("loss", "loss_vkd", "loss_hard", "loss_soft"):
        assert half_log[name] == pytest.approx(log[name], rel=1e-5), name


def test_last_batch_of_one_sample(tiny, tmp_path):
    # 24 samples and one: the fourth batch of 8 holds a single sample, which has no others to be compared with.
    data = write_rte(tmp_path / "RTE", train=25)
    flags = [*tiny.distillation(tmp_path / "run", "fsd_ilg", steps=4), "--data_dir", str(data)]
    run("distill", [*flags, "--student_memory_init", "normal"])
    last = [entry for entry in history(tmp_path / "run") if "loss" in entry][3]
    assert last["loss_local"] == 0
    assert all(value == value for value in last.values()), "no NaN"
    assert all(bool(value.isfinite().all()) for value in weights(tmp_path / "run").values())


def test_backends_agree(tiny, tmp_path):
    found = {}
    for backend in ("eager", "reference"):
        run("distill", [*tiny.distillation(tmp_path / backend, steps=4), "--backend", backend])
        found[backend] = losses(tmp_path / backend)
    assert len(found["eager"]) == 4
    assert found["eager"] == pytest.approx(found["reference"], rel=1e-4)


def test_layerwise_pairs(tiny, tmp_path):
    flags = tiny.distillation(tmp_path / "run", "fsd_ilg", steps=1)
    run("distill", [*flags, "--layer_pairs", "4:2,3:1,0:0"])
    (pairs,) = losses(tmp_path / "run")
    run("distill", [*tiny.distillation(tmp_path / "other", "fsd_ilg", steps=1)])
    (penultimate,) = losses(tmp_path / "other")
    assert pairs != pytest.approx(penultimate, rel=1e-3)
    assert read_record(tmp_path / "run" / "fsd_arguments.json").facts["layer_pairs"] == "4:2,3:1,0:0"


def test_regression(tiny, tmp_path):
    data = ["--task_name", "stsb", "--data_dir", str(write_stsb(tmp_path / "STS-B")), *COMMON]
    teacher, memory = tmp_path / "teacher", tmp_path / "memory"
    run(
        "teacher",
        [
            *(*data, *TRAINING, "--model_name_or_path", str(tiny.backbone), "--output_dir", str(teacher)),
            *("--max_steps", "10", "--learning_rate", "1e-3"),
        ],
    )
    run("memory", [*memory_flags(tiny, memory), *data, "--teacher_model_name_or_path", str(teacher)])
    flags = [*tiny.distillation(tmp_path / "run", steps=3), *data, "--memory_path", str(memory)]
    figures = run("distill", [*flags, "--teacher_model_name_or_path", str(teacher)])
    assert figures["eval_combined_score"] == pytest.approx(
        (figures["eval_pearson"] + figures["eval_spearmanr"]) / 2
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert len(config.get("id2label", {"0": "LABEL_0"})) == 1
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").config.num_labels == 1
    for entry in history(tmp_path / "run"):
        if "loss" in entry:
            assert entry["loss_vkd"] == pytest.approx((entry["loss_hard"] + entry["loss_soft"]) / 2, rel=1e-5)


def test_matched_and_mismatched_are_kept_apart(tiny, tmp_path):
    data = ["--task_name", "mnli", "--data_dir", str(write_mnli(tmp_path / "MNLI")), *COMMON]
    folder = tmp_path / "teacher"
    flags = [*data, *TRAINING, "--model_name_or_path", str(tiny.backbone), "--output_dir", str(folder)]
    figures = run("teacher", [*flags, "--max_steps", "40", "--learning_rate", "1e-3"])
    matched = figures["eval_validation_matched_accuracy"]
    mismatched = figures["eval_validation_mismatched_accuracy"]
    # The mismatched rows are all contradictions, which the training rows never are.
    assert matched > 0.4
    assert mismatched == 0
    results = json.loads((folder / "all_results.json").read_text())
    assert results["eval_validation_matched_accuracy"] == matched
    assert results["eval_validation_mismatched_accuracy"] == mismatched
    assert "eval_accuracy" not in results
    card = (folder / "README.md").read_text()
    assert "| eval_validation_matched_accuracy |" in card
    assert "| eval_validation_mismatched_accuracy | 0.0000 |" in card
    found = run("evaluate", [*data, "--model_name_or_path", str(folder), "--use_cpu", "true"])
    assert found["eval_validation_matched_accuracy"] == matched


@pytest.mark.parametrize("family", ["distilbert", "roberta"])
def test_other_families(tiny, tmp_path, family):
    backbone = save_backbone(tmp_path / "backbone", family=family)
    if family == "distilbert":
        # Its own tokenizer makes no token types, which the model does not take.
        path = backbone / "tokenizer_config.json"
        config = json.loads(path.read_text()) | {"model_input_names": ["input_ids", "attention_mask"]}
        path.write_text(json.dumps(config))
    teacher, memory = tmp_path / "teacher", tmp_path / "memory"
    flags = [*tiny.data(), *TRAINING, "--model_name_or_path", str(backbone), "--output_dir", str(teacher)]
    run("teacher", [*flags, "--max_steps", "2"])
    run("memory", [*memory_flags(tiny, memory), "--teacher_model_name_or_path", str(teacher)])
    run(
        "distill",
        [
            *(*tiny.distillation(tmp_path / "run"), "--memory_path", str(memory)),
            *("--teacher_model_name_or_path", str(teacher), "--model_name_or_path", str(backbone)),
        ],
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.config.model_type == family
    assert model.config.num_hidden_layers == 2
    assert sorted(load_classifier(str(backbone), ("a", "b"), 2).state_dict()) == sorted(model.state_dict())


@pytest.mark.parametrize("layers", [2, 4, None])
def test_weights_are_float32_however_they_were_saved(tiny, tmp_path, layers):
    half = BertModel.from_pretrained(tiny.backbone).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.bfloat16}
    model = load_classifier(str(tmp_path), ("a", "b"), layers)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_best_checkpoint_is_exported(tiny, tmp_path):
    # The rate is so large that a good checkpoint is not the last one, and seed 0's best is none of the ends.
    folder = tmp_path / "run"
    flags = [
        *tiny.distillation(folder, steps=6),
        "--learning_rate",
        "3e-2",
        "--load_best_model_at_end",
        "true",
    ]
    for kind in ("eval", "save"):
        flags += [f"--{kind}_strategy", "steps", f"--{kind}_steps", "1"]
    flags += ["--save_total_limit", "6", "--metric_for_best_model", "loss"]
    figures = run("distill", flags)
    scored = {entry["step"]: entry["eval_loss"] for entry in history(folder)[:-2] if "eval_loss" in entry}
    best = min(scored, key=scored.get)
    assert best != 6
    assert figures["eval_loss"] == pytest.approx(scored[best], rel=1e-5)
    checkpoint = weights(folder / f"checkpoint-{best}")
    exported = weights(folder)
    assert all(torch.equal(checkpoint[f"student.{name}"], value) for name, value in exported.items())


def test_a_narrower_student(tiny, tmp_path):
    backbone = save_backbone(tmp_path / "backbone", layers=3, hidden=16)
    flags = [*tiny.distillation(tmp_path / "run"), "--model_name_or_path", str(backbone)]
    run("distill", [*flags, "--save_strategy", "steps", "--save_steps", "3"])
    memory = weights(tmp_path / "run" / "checkpoint-3")["student_memory.centroids"]
    assert memory.shape == (CENTROIDS, SEQUENCE * 16)


def test_a_classifier_of_fewer_layers_is_trained_without_a_teacher(tiny, tmp_path):
    flags = [*tiny.data(), *TRAINING, "--model_name_or_path", str(tiny.backbone), "--num_layers", "2"]
    run(
        "teacher", [*flags, "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--learning_rate", "0"]
    )
    pretrained = weights(tiny.backbone)
    student = encoder_layers(weights(tmp_path / "run"))
    assert not any(name.startswith("encoder.layer.2") for name in student)
    assert same(student, {name: pretrained[name] for name in student})


def test_json_arguments(tiny, tmp_path):
    flags = tiny.distillation(tmp_path / "flags", "fsd_il")
    values = dict(zip((name.removeprefix("--") for name in flags[::2]), flags[1::2], strict=True))
    for name, value in values.items():
        if value in ("true", "false"):
            values[name] = value == "true"
        elif name in ("max_seq_length", "max_steps", "logging_steps", "student_layers") or "batch" in name:
            values[name] = int(value)
    values |= {"learning_rate": 1e-3, "output_dir": str(tmp_path / "json")}
    (tmp_path / "run.json").write_text(json.dumps(values))
    run("distill", flags)
    run("distill", [str(tmp_path / "run.json")])
    assert same(weights(tmp_path / "flags"), weights(tmp_path / "json"))
    # true, as a JSON file says it, means the newest checkpoint; here there is none.
    (tmp_path / "run.json").write_text(json.dumps(values | {"resume_from_checkpoint": True}))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        run("distill", [str(tmp_path / "run.json")])
