"""Every method on every kind of task, on tiny models; and what a method asks of models and flags."""

import json

import pytest
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from fsd_fast.commands import run
from fsd_fast.commands.parsing import parse
from fsd_fast.losses import METHODS
from fsd_fast.models.teacher import Teacher
from fsd_fast.training.record import read_record
from tests.tiny import (
    COMMON,
    TRAINING,
    history,
    losses,
    save_backbone,
    tiny,
    without_source,
    write_stsb,
)

__all__ = ["tiny"]

SST_WORDS = "one two three four five six".split()


def write_sst(folder, rows=24):
    """An SST-2 folder: one sentence, positive where it says good."""
    folder.mkdir()
    for name in ("train", "dev"):
        lines = ["sentence\tlabel"]
        lines += [
            f"{SST_WORDS[i % 6]} {('bad', 'good')[i % 2]} {SST_WORDS[(i // 2) % 6]}\t{i % 2}"
            for i in range(rows)
        ]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def has_memory(method):
    return "memory_path" in METHODS[method].settings


@pytest.fixture(scope="module")
def tasks(tiny, tmp_path_factory):
    """Kind of task -> the flags of its data, its teacher and its memory."""
    base = tmp_path_factory.mktemp("tasks")
    found = {"pair": (tiny.data(), tiny.teacher, tiny.memory_exclude)}
    for kind, name, folder in (
        ("single", "sst2", write_sst(base / "SST-2")),
        ("regression", "stsb", write_stsb(base / "STS-B")),
    ):
        data = ["--task_name", name, "--data_dir", str(folder), *COMMON, "--pad_features", "exclude"]
        teacher, memory = base / f"{kind}_teacher", base / f"{kind}_memory"
        run(
            "teacher",
            [
                *(*data, *TRAINING, "--model_name_or_path", str(tiny.backbone), "--max_steps", "20"),
                *(
                    "--output_dir",
                    str(teacher),
                    "--learning_rate",
                    "2e-3",
                    "--per_device_train_batch_size",
                    "12",
                ),
            ],
        )
        run(
            "memory",
            [
                *(*data, "--teacher_model_name_or_path", str(teacher), "--num_centroid", "4"),
                *("--output_dir", str(memory), "--use_cpu", "true"),
            ],
        )
        found[kind] = data, teacher, memory
    return found


def distillation(tiny, tasks, kind, method, output, steps, *more):
    data, teacher, memory = tasks[kind]
    flags = [
        *(*data, *TRAINING, "--output_dir", str(output), "--method", method, "--student_layers", "2"),
        *("--teacher_model_name_or_path", str(teacher), "--model_name_or_path", str(tiny.backbone)),
        *("--max_steps", str(steps), "--per_device_train_batch_size", "12", "--logging_steps", "1"),
        *("--learning_rate", "2e-3"),
    ]
    if has_memory(method):
        flags += ["--memory_path", str(memory)]
    if method == "minilm":
        flags += ["--minilm_relation_heads", "8"]
    return [*flags, *more]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["single", "pair", "regression"])
def test_every_method_trains_on_every_kind_of_task(tiny, tasks, tmp_path, kind, method):
    folder = tmp_path / "run"
    figures = run("distill", distillation(tiny, tasks, kind, method, folder, 24))
    values = losses(folder)
    assert sum(values[-4:]) < 0.9 * sum(values[:4])
    norms = [entry["grad_norm"] for entry in history(folder) if "grad_norm" in entry]
    assert len(norms) == 24
    assert all(0 < norm < float("inf") for norm in norms)
    # That this package is not needed for it is tested of one run, in test_training.
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert type(model) is BertForSequenceClassification
    assert (model.config.num_hidden_layers, model.config.num_labels) == (2, 1 if kind == "regression" else 2)
    assert {"eval_loss"} < figures.keys()


TERMS = {
    "finetune": {"loss_hard"},
    "pkd": {"loss_vkd", "loss_hard", "loss_soft", "loss_patient"},
    "rkd": {"loss_vkd", "loss_hard", "loss_soft", "loss_distance", "loss_angle"},
    "minilm": {"loss_vkd", "loss_hard", "loss_soft", "loss_relations"},
}


@pytest.mark.parametrize("method", TERMS)
def test_the_loss_is_put_together_from_what_is_logged(tiny, tasks, tmp_path, method):
    flags = distillation(tiny, tasks, "pair", method, tmp_path / "run", 3)
    weights = {"loss_patient": 3.0, "loss_distance": 2.0, "loss_angle": 5.0, "loss_relations": 0.5}
    for flag, value in (
        ("pkd_weight", "loss_patient"),
        ("rkd_distance_weight", "loss_distance"),
        ("rkd_angle_weight", "loss_angle"),
        ("minilm_weight", "loss_relations"),
    ):
        if flag in METHODS[method].settings:
            flags += [f"--{flag}", str(weights[value])]
    run("distill", flags)
    for entry in [entry for entry in history(tmp_path / "run") if "loss" in entry]:
        assert {name for name in entry if name.startswith("loss_")} == TERMS[method]
        total = entry["loss_vkd"] if "loss_vkd" in entry else entry["loss_hard"]
        total += sum(weights[name] * entry[name] for name in TERMS[method] & weights.keys())
        assert entry["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        ["--estimator", "unbiased"],
        ["--measure", "gram", "--distance_scale", "mean", "--gamma_g", "1"],
        ["--structure_schedule", "cosine", "--structure_warmup_ratio", "0.2"],
    ],
    ids=lambda flags: flags[1],
)
def test_options_of_the_structures_train(tiny, tasks, tmp_path, more):
    run("distill", distillation(tiny, tasks, "pair", "fsd_ilg", tmp_path / "run", 24, *more))
    entries = [entry for entry in history(tmp_path / "run") if "loss" in entry]
    assert all(0 < entry["grad_norm"] < float("inf") for entry in entries)
    vkd = [entry["loss_vkd"] for entry in entries]
    assert sum(vkd[-4:]) < 0.9 * sum(vkd[:4])
    intra = [entry["loss_intra"] for entry in entries]
    assert sum(intra[-4:]) < sum(intra[:4])


def test_the_structures_weigh_what_the_schedule_says(tiny, tmp_path):
    flags = [*tiny.distillation(tmp_path / "run", "fsd_i", steps=8), "--structure_schedule", "linear"]
    run("distill", [*flags, "--structure_warmup_ratio", "0.5", "--gradient_accumulation_steps", "2"])
    entries = [entry for entry in history(tmp_path / "run") if "loss" in entry]
    weights = [(entry["loss"] - entry["loss_vkd"]) / (4 * entry["loss_intra"]) for entry in entries]
    assert weights == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25], abs=1e-3)


def test_finetune_needs_no_teacher(tiny, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(Teacher, "from_pretrained", refuse)
    # Without the comparison of their predictions nothing of the teacher is read but its configuration.
    with_teacher = [*tiny.distillation(tmp_path / "one", "finetune", steps=4), "--fidelity", "false"]
    run("distill", with_teacher)
    at = with_teacher.index("--teacher_model_name_or_path")
    alone = with_teacher[:at] + with_teacher[at + 2 :]
    alone[alone.index(str(tmp_path / "one"))] = str(tmp_path / "two")
    run("distill", alone)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    record = read_record(tmp_path / "two" / "fsd_arguments.json")
    assert (record.facts["teacher_parameters"], record.arguments["teacher_model_name_or_path"]) == (
        None,
        None,
    )
    assert "trained without a teacher" in (tmp_path / "two" / "README.md").read_text()
    # A record repeats its run.
    run("distill", [str(tmp_path / "two" / "fsd_arguments.json"), "--output_dir", str(tmp_path / "three")])
    assert losses(tmp_path / "three") == losses(tmp_path / "two")


def test_pkd_pairs_layers_and_the_others_compare_the_penultimate(tiny, tmp_path):
    pairs = {}
    for method in ("pkd", "rkd"):
        run("distill", [*tiny.distillation(tmp_path / method, method, steps=1), "--student_layers", "3"])
        facts = json.loads((tmp_path / method / "fsd_arguments.json").read_text())["facts"]
        pairs[method] = facts["layer_pairs"]
    assert pairs == {"pkd": "1:1,3:2", "rkd": "3:2"}


def test_minilm_takes_students_of_another_width(tiny, tmp_path):
    narrow = save_backbone(tmp_path / "narrow", hidden=16)
    for method in ("minilm", "rkd"):
        flags = [*tiny.distillation(tmp_path / method, method, steps=2), "--model_name_or_path", str(narrow)]
        run("distill", [*flags, *(["--minilm_relation_heads", "4"] if method == "minilm" else [])])
        assert len(losses(tmp_path / method)) == 2


def refused(tiny, tmp_path, method, *more):
    with pytest.raises(ValueError) as error:
        run("distill", [*tiny.distillation(tmp_path / "run", method, steps=1), *more])
    assert not (tmp_path / "run").exists()
    message = str(error.value)
    assert "\n" not in message
    return message


def test_pkd_needs_a_student_as_wide_as_its_teacher(tiny, tmp_path):
    narrow = save_backbone(tmp_path / "narrow", hidden=16)
    message = refused(tiny, tmp_path, "pkd", "--model_name_or_path", str(narrow))
    assert "'pkd'" in message
    assert "expected a student as wide as its teacher, 32, got 16; rkd, minilm and the fsd methods" in message


def test_minilm_names_the_heads_that_divide(tiny, tmp_path):
    message = refused(tiny, tmp_path, "minilm")
    assert "minilm_relation_heads: expected a divisor of 32" in message
    assert "(1, 2, 4, 8, 16, 32), got 48" in message


SETTINGS = [
    ("vkd", "gamma_g", "0.5", "fsd_g, fsd_ilg"),
    ("finetune", "alpha", "0.2", "vkd, fsd_i, "),
    ("fsd_g", "layer_pairs", "layerwise", "fsd_i, fsd_l, fsd_il, fsd_ilg, pkd, rkd"),
    ("fsd_l", "intra_reduction", "log_mean", "fsd_i, fsd_il, fsd_ilg"),
    ("fsd_il", "memory_path", "runs/memory", "fsd_g, fsd_ilg"),
    ("fsd_il", "student_memory_init", "teacher", "fsd_g, fsd_ilg"),
    ("vkd", "student_memory_update", "ema", "fsd_g, fsd_ilg"),
    ("rkd", "beta", "1", "fsd_i, fsd_l"),
    ("pkd", "backend", "eager", "rkd"),
    ("minilm", "pkd_weight", "1", "pkd"),
    ("pkd", "rkd_angle_weight", "1", "rkd"),
    ("fsd_g", "estimator", "unbiased", "fsd_i, fsd_l, fsd_il, fsd_ilg;"),
    ("rkd", "measure", "gram", "fsd_i, fsd_l, fsd_il, fsd_ilg;"),
    ("fsd_il", "distance_scale", "mean", "fsd_g, fsd_ilg;"),
    ("vkd", "structure_schedule", "linear", "fsd_ilg, pkd, rkd, minilm;"),
]


@pytest.mark.parametrize(("method", "name", "value", "readers"), SETTINGS)
def test_settings_that_a_method_does_not_read_are_refused(tiny, tmp_path, method, name, value, readers):
    more = ["--memory_path", str(tiny.memory_exclude)] if method == "fsd_g" else []
    message = refused(tiny, tmp_path, method, *more, f"--{name}", value)
    assert message.startswith(f"{name}: method {method!r} does not read it, but ")
    assert readers in message
    assert f"got {value}" in message.replace("'", "").replace(".0", "")


def test_every_setting_of_a_method_is_a_flag(tmp_path):
    groups = parse("distill", ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true"])
    flags = {name for group in groups for name in vars(group)}
    for name, method in METHODS.items():
        assert method.settings <= flags, name


def test_a_method_with_a_teacher_says_which_does_without(tiny, tmp_path):
    flags = tiny.distillation(tmp_path / "run", "vkd", steps=1)
    at = flags.index("--teacher_model_name_or_path")
    with pytest.raises(
        ValueError, match=r"--teacher_model_name_or_path must be given .*'vkd'; method finetune"
    ):
        run("distill", flags[:at] + flags[at + 2 :])
    alone = without_source(tiny.distillation(tmp_path / "run", "finetune", steps=1))
    at = alone.index("--teacher_model_name_or_path")
    with pytest.raises(ValueError, match=r"model_name_or_path: expected the pre-trained model .*got none"):
        run("distill", alone[:at] + alone[at + 2 :])


def test_rkd_without_any_relation_is_refused(tiny, tmp_path):
    message = refused(tiny, tmp_path, "rkd", "--rkd_distance_weight", "0", "--rkd_angle_weight", "0")
    assert "expected a weight above 0, got 0 for both" in message


def test_rkd_of_angles_needs_three_samples(tiny, tmp_path):
    message = refused(tiny, tmp_path, "rkd", "--per_device_train_batch_size", "2")
    assert "per_device_train_batch_size: method 'rkd'" in message
    assert "at least 3, got 2" in message
