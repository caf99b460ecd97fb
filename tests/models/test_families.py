"""Which models are taken and what becomes of them: families, labels, weights, inputs, hidden states, precision."""

import json
import logging
import shutil
import time

import pytest
import torch
import transformers.integrations.deepspeed as hf_deepspeed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from fsd_fast.commands import run
from fsd_fast.data.builtin import BACKBONE_NAME, resolve_model
from fsd_fast.losses import FeatureStructureLoss, FeatureStructureObjective, Signals
from fsd_fast.models import families
from fsd_fast.models.families import layer_stack, with_layers
from fsd_fast.models.fingerprint import model_fingerprint
from fsd_fast.models.inputs import check_inputs, input_limits
from fsd_fast.models.labels import label_order, order_outputs
from fsd_fast.models.loading import load_tokenizer, read_config
from fsd_fast.models.student import load_classifier
from fsd_fast.models.teacher import Teacher
from fsd_fast.models.whole_weights import whole_weights
from fsd_fast.training import export
from fsd_fast.training.distillation import DistillationModel
from fsd_fast.training.export import check_export
from tests.faults.registry import fault
from tests.tiny import (
    TRAINING,
    memory_flags,
    save_backbone,
    save_tokenizer,
    tiny,
    without_source,
)
from tools.families import FAMILIES, LABELS, PAGE, batch, examine, line, page, save_tiny

__all__ = ["tiny"]

DOCUMENTED = [text for text in PAGE.read_text(encoding="utf-8").splitlines() if text.startswith("| ")][1:]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_family_does_what_its_line_says(tmp_path, name):
    assert line(examine(name, tmp_path)) in DOCUMENTED


def test_the_page_holds_these_families_and_no_others():
    assert [text.split(" | ")[0].removeprefix("| ") for text in DOCUMENTED] == list(FAMILIES)
    assert PAGE.read_text(encoding="utf-8") == page(DOCUMENTED)


def test_a_family_whose_outputs_have_another_form_is_refused(tmp_path, monkeypatch):
    # As if nothing were known about it: found out by running it.
    monkeypatch.delitem(families.REFUSED, "funnel")
    folder = save_tiny("Funnel", tmp_path)
    with pytest.raises(
        ValueError, match=r"'funnel' is not supported: expected 3 hidden states .* got 3 hidden states"
    ):
        Teacher.from_pretrained(str(folder))


def test_a_family_without_a_classifier_is_refused(tmp_path):
    folder = edit(save_tiny("BERT", tmp_path), model_type="vit")
    with pytest.raises(ValueError, match=r"'vit' is not supported: transformers has no sequence classifier"):
        Teacher.from_pretrained(str(folder))


def edit(folder, **settings):
    """Change a saved model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize("name", ["ALBERT", "ModernBERT"])
def test_commands_take_a_family(tiny, tmp_path, name):
    source = save_tiny(name, tmp_path / "source", labels=("a",))
    teacher, memory, student = tmp_path / "teacher", tmp_path / "memory", tmp_path / "student"
    start = ["--output_dir", str(teacher), "--model_name_or_path", str(source), "--max_steps", "1"]
    run("teacher", [*tiny.data(), *TRAINING, *start])
    run("memory", [*memory_flags(tiny, memory), "--teacher_model_name_or_path", str(teacher)])
    flags = [*tiny.distillation(student, steps=1), "--teacher_model_name_or_path", str(teacher)]
    flags += ["--model_name_or_path", str(source), "--student_layers", "1", "--memory_path", str(memory)]
    run("distill", flags)
    config = AutoModelForSequenceClassification.from_pretrained(student).config
    assert (config.num_hidden_layers, config.id2label) == (1, {0: "entailment", 1: "not_entailment"})


# Layers


def test_lists_with_an_entry_for_each_layer_are_cut_with_them():
    config = read_config_of("ModernBERT")
    config.layer_types = ["full_attention", "sliding_attention"]
    config.pos_att_type = ["c2p", "p2c"]
    config.eos_token_id = [1, 2]
    config.other = (8, 9)
    small = with_layers(config, 1)
    assert (small.num_hidden_layers, small.layer_types, small.other) == (1, ["full_attention"], (8,))
    assert (small.pos_att_type, small.eos_token_id) == (["c2p", "p2c"], [1, 2])
    assert (config.num_hidden_layers, len(config.layer_types)) == (2, 2)


def read_config_of(name):
    from transformers import AutoConfig

    model_type, settings = FAMILIES[name]
    return AutoConfig.for_model(model_type, **settings)


def test_layers_that_depend_on_their_number_are_refused(tmp_path):
    # Two groups share their weights among 3 layers as 0, 0, 1, among 2 layers as 0, 1, and one layer takes group 0.
    folder = save_tiny("ALBERT", tmp_path, num_hidden_layers=3, num_hidden_groups=2)
    assert load_classifier(str(folder), LABELS, 1).config.num_hidden_layers == 1
    with pytest.raises(ValueError, match=r"'albert' cannot be cut to 2 of 3 layers"):
        load_classifier(str(folder), LABELS, 2)


def test_a_stack_is_the_outermost_list_of_that_length(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(save_tiny("MobileBERT", tmp_path))
    assert len(model.mobilebert.encoder.layer[0].ffn) == len(model.mobilebert.encoder.layer) == 2
    assert layer_stack(model)[0] == "mobilebert.encoder.layer"
    bart = AutoModelForSequenceClassification.from_config(read_config_of("BART"))
    with pytest.raises(
        ValueError, match=r"one stack of 2 layers .* found model.encoder.layers, model.decoder.layers"
    ):
        layer_stack(bart)


def test_a_student_that_cannot_be_saved_is_refused_before_training(tiny, tmp_path, monkeypatch):
    folder = save_tiny("ModernBERT", tmp_path / "source", labels=("entailment", "not_entailment"))
    student = load_classifier(str(folder), LABELS[:2], 1)
    student.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match=r"(?s)a ModernBert\w+ like this cannot be exported: .*layer_types"):
        check_export(student, load_tokenizer(str(folder)))
    # Both commands that train try the export first.
    monkeypatch.setattr(families, "_NOT_PER_LAYER", (*families._NOT_PER_LAYER, "layer_types"))
    flags = [
        *tiny.data(),
        *TRAINING,
        "--output_dir",
        str(tmp_path / "run"),
        "--model_name_or_path",
        str(folder),
    ]
    with pytest.raises(ValueError, match="cannot be exported"):
        run("teacher", [*flags, "--num_layers", "1"])
    distill = ["--teacher_model_name_or_path", str(folder), "--method", "vkd"]
    with pytest.raises(ValueError, match="cannot be exported"):
        run("distill", [*flags, *distill])
    assert not (tmp_path / "run").exists()


def test_an_export_with_other_weights_is_refused(tmp_path, monkeypatch):
    folder = save_tiny("BERT", tmp_path)
    student, tokenizer = load_classifier(str(folder), LABELS), load_tokenizer(str(folder))
    check_export(student, tokenizer)
    export_student = export.export_student

    def spoiled(student, state, *rest):
        export_student(student, state | {"classifier.bias": state["classifier.bias"] + 1e-6}, *rest)

    monkeypatch.setattr(export, "export_student", spoiled)
    with pytest.raises(ValueError, match="other weights or logits"):
        check_export(student, tokenizer)


def test_trying_the_export_draws_no_random_number_of_the_run(tmp_path):
    folder = save_tiny("BERT", tmp_path)
    student, tokenizer = load_classifier(str(folder), LABELS), load_tokenizer(str(folder))
    before = torch.get_rng_state()
    check_export(student, tokenizer)
    assert torch.equal(torch.get_rng_state(), before)


# Labels


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (("entailment", "neutral", "contradiction"), [0, 1, 2]),
        (("CONTRADICTION", "Neutral", "entailment"), [2, 1, 0]),
        (("contradiction", "entailment", "neutral"), [1, 2, 0]),
        (("0", "1", "2"), [0, 1, 2]),
        (("2", "0", "1"), [1, 2, 0]),
        (("LABEL_0", "LABEL_1", "LABEL_2"), [0, 1, 2]),
    ],
)
def test_the_order_of_labels(names, order, caplog):
    with caplog.at_level(logging.WARNING):
        assert label_order(dict(enumerate(names)), LABELS, "teacher") == order
    assert [record.getMessage() for record in caplog.records] == (
        ["teacher: its outputs are named LABEL_0, LABEL_1, LABEL_2; assumed to be entailment (LABEL_0), neutral "
         "(LABEL_1), contradiction (LABEL_2)"] if names[0] == "LABEL_0" else []
    )  # fmt: skip


def test_hyphens_and_spaces_are_underscores():
    assert label_order({0: "Not-Entailment", 1: "entailment"}, ("entailment", "not_entailment"), "t") == [
        1,
        0,
    ]
    assert label_order({0: "not equivalent", 1: "equivalent"}, ("not_equivalent", "equivalent"), "t") == [
        0,
        1,
    ]


@pytest.mark.parametrize(
    "names", [("yes", "no", "maybe"), ("entailment", "neutral", "neutral"), ("1", "2", "3")]
)
def test_other_labels_are_refused_with_both_lists(names):
    with pytest.raises(ValueError, match="teacher: expected outputs named") as refused:
        label_order(dict(enumerate(names)), LABELS, "teacher")
    assert str(list(names)) in str(refused.value)
    assert str(list(LABELS)) in str(refused.value)


def permuted(teacher, folder):
    """The tiny teacher saved with its two classes the other way round: rows of the head and names."""
    shutil.copytree(teacher, folder)
    weights = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    names = {"0": "NOT_ENTAILMENT", "1": "Entailment"}
    return edit(folder, id2label=names, label2id={label: int(number) for number, label in names.items()})


def test_a_teacher_in_another_order_is_the_same_teacher(tiny, tmp_path):
    other = permuted(tiny.teacher, tmp_path / "teacher")
    flags = [*tiny.data(), "--use_cpu", "true", "--model_name_or_path"]
    own, given = run("evaluate", [*flags, str(tiny.teacher)]), run("evaluate", [*flags, str(other)])
    assert own["eval_accuracy"] == given["eval_accuracy"]
    assert own["eval_loss"] == pytest.approx(given["eval_loss"], rel=1e-6)
    # Its memory is the teacher's own, and the students are.
    for name, teacher in (("own", tiny.teacher), ("given", other)):
        out = without_source(tiny.distillation(tmp_path / name, "fsd_ilg", steps=2))
        run("distill", [*out, "--teacher_model_name_or_path", str(teacher), "--copy_teacher", "true"])
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "given"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    config = json.loads((tmp_path / "given" / "config.json").read_text())
    assert config["id2label"] == {"0": "entailment", "1": "not_entailment"}


def test_fine_tuning_starts_from_a_permuted_head(tiny, tmp_path):
    other = permuted(tiny.teacher, tmp_path / "teacher")
    model = load_classifier(str(other), ("entailment", "not_entailment"))
    assert torch.equal(
        model.classifier.weight, load_file(tiny.teacher / "model.safetensors")["classifier.weight"]
    )
    assert model.config.label2id == {"entailment": 0, "not_entailment": 1}


def test_fine_tuning_restarts_the_head_of_another_task(tiny, caplog):
    with caplog.at_level(logging.WARNING):
        model = load_classifier(str(tiny.teacher), ("negative", "positive"))
    assert "Its head is started afresh" in caplog.text
    saved = load_file(tiny.teacher / "model.safetensors")
    assert not torch.allclose(model.classifier.weight, saved["classifier.weight"])
    assert torch.equal(
        model.bert.embeddings.word_embeddings.weight, saved["bert.embeddings.word_embeddings.weight"]
    )


@pytest.mark.parametrize("command", ["evaluate", "memory", "distill"])
def test_a_teacher_of_other_classes_is_refused(tiny, tmp_path, command):
    other = shutil.copytree(tiny.teacher, tmp_path / "teacher")
    edit(other, id2label={"0": "negative", "1": "positive"}, label2id={"negative": 0, "positive": 1})
    with pytest.raises(
        ValueError, match=r"expected outputs named \['entailment', 'not_entailment'\] .*'negative'"
    ):
        run(command, flags_of(tiny, tmp_path, command, other))


def test_a_head_whose_last_layer_is_not_found_is_refused(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(save_tiny("BERT", tmp_path))

    class Twice(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.unused = inner, torch.nn.Linear(3, 3)

        def forward(self, features):
            return self.inner(features)

    model.classifier = Twice(model.classifier)
    with pytest.raises(ValueError, match="the last layer of its head was not found"):
        order_outputs(model, [2, 0, 1], "teacher")


# Weights


def flags_of(tiny, tmp_path, command, model):
    """Flags of a command that runs the classifier in the folder ``model``."""
    return {
        "evaluate": [*tiny.data(), "--use_cpu", "true", "--model_name_or_path", str(model)],
        "memory": [*memory_flags(tiny, tmp_path / "run"), "--teacher_model_name_or_path", str(model)],
        "distill": [*tiny.distillation(tmp_path / "run", "vkd"), "--teacher_model_name_or_path", str(model)],
    }[command]


def refusal(tiny, tmp_path, model, kind=ValueError):
    """What evaluate, memory and distill say about a classifier; they must say the same and write nothing."""
    said = set()
    for command in ("evaluate", "memory", "distill"):
        with pytest.raises(kind) as refused:
            run(command, flags_of(tiny, tmp_path, command, model))
        said.add(str(refused.value))
        assert not (tmp_path / "run").exists()
    (message,) = said
    assert str(model) in message
    return message


def rewritten(tiny, folder, change):
    """The tiny teacher with other weights: ``change`` edits them by name."""
    shutil.copytree(tiny.teacher, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_teacher_without_a_head_is_refused_with_the_command_that_makes_one(tiny, tmp_path):
    message = refusal(tiny, tmp_path, tiny.backbone)
    assert "no fine-tuned head (classifier.bias, classifier.weight missing" in message
    assert f"fsd-fast teacher --task_name X --model_name_or_path {tiny.backbone} --output_dir ..." in message


@fault(
    "a model lacks a layer or weights",
    "refused in one line that names them",
)
def test_missing_weights_are_refused(tiny, tmp_path):
    def drop(weights):
        for name in [name for name in weights if ".layer.2." in name]:
            del weights[name]

    folder = rewritten(tiny, tmp_path / "teacher", drop)
    assert "bert.encoder.layer.2.attention.output.LayerNorm.bias" in refusal(tiny, tmp_path, folder)
    with pytest.raises(
        ValueError, match=r"bert\.encoder\.layer\.2.* and 13 more missing or of another shape"
    ):
        load_classifier(str(folder), ("a", "b"))


def test_weights_of_another_shape_are_refused(tiny, tmp_path):
    folder = edit(shutil.copytree(tiny.teacher, tmp_path / "teacher"), intermediate_size=128)
    assert "missing or of another shape" in refusal(tiny, tmp_path, folder)
    with pytest.raises(ValueError, match="missing or of another shape"):
        load_classifier(str(folder), ("a", "b"))


def test_weights_of_another_family_are_refused(tiny, tmp_path):
    folder = edit(
        shutil.copytree(tiny.teacher, tmp_path / "teacher"), model_type="electra", embedding_size=32
    )
    assert "model_type 'electra'" in refusal(tiny, tmp_path, folder)


def test_more_layers_than_described_are_refused(tiny, tmp_path):
    folder = edit(shutil.copytree(tiny.teacher, tmp_path / "teacher"), num_hidden_layers=3)
    assert "belong to none of its 3 layers" in refusal(tiny, tmp_path, folder)
    backbone = edit(shutil.copytree(tiny.backbone, tmp_path / "backbone"), num_hidden_layers=3)
    with pytest.raises(ValueError, match="belong to none of its 3 layers"):
        load_classifier(str(backbone), ("a", "b"))


def test_a_pooler_may_start_afresh_in_training_alone(tiny, tmp_path):
    def drop(weights):
        for name in [name for name in weights if ".pooler." in name]:
            del weights[name]

    folder = rewritten(tiny, tmp_path / "teacher", drop)
    assert "bert.pooler.dense.bias" in refusal(tiny, tmp_path, folder)
    assert load_classifier(str(folder), ("entailment", "not_entailment")).config.num_labels == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected 1 to 1,000, got 1,000,000,000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected 1 to 1,000, got 0"),
        ({"num_hidden_layers": "six"}, "num_hidden_layers: expected a whole number, got 'six'"),
        ({"vocab_size": 10**9}, "vocab_size: expected at most 100,000,000, got 1,000,000,000"),
        ({"hidden_size": 10**6}, "config.json describes a model of "),
    ],
)
def test_settings_out_of_bounds_are_refused_at_once(tiny, tmp_path, settings, words):
    folder = edit(shutil.copytree(tiny.teacher, tmp_path / "teacher"), **settings)
    start = time.perf_counter()
    assert words in refusal(tiny, tmp_path, folder)
    assert time.perf_counter() - start < 3
    with pytest.raises(ValueError, match=words):
        load_classifier(str(folder), ("a", "b"))


@fault(
    "a configuration asks for a billion layers",
    "refused at once",
)
def test_a_list_for_a_billion_layers_is_never_made(tmp_path):
    folder = edit(save_tiny("ModernBERT", tmp_path), num_hidden_layers=10**9)
    with pytest.raises(ValueError, match="num_hidden_layers: expected 1 to 1,000"):
        read_config(str(folder))


@fault(
    "a model has pickled weights alone",
    "refused with advice; nothing is unpickled",
)
def test_pickles_are_not_read(tiny, tmp_path):
    folder = shutil.copytree(tiny.teacher, tmp_path / "teacher")
    (folder / "model.safetensors").unlink()
    assert "expected weights in model.safetensors, found none" in refusal(tiny, tmp_path, folder, OSError)
    torch.save({}, folder / "pytorch_model.bin")
    message = refusal(tiny, tmp_path, folder, OSError)
    assert "found the pickle pytorch_model.bin" in message
    assert "save_pretrained" in message


@fault(
    "the weights of a model are damaged",
    "refused in one line",
)
def test_damaged_weights_are_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny.teacher, tmp_path / "teacher")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    assert "damaged" in refusal(tiny, tmp_path, folder)


def test_shards_are_read_and_a_missing_one_is_named(tiny, tmp_path):
    folder = shutil.copytree(tiny.teacher, tmp_path / "teacher")
    whole = AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="50KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert model_fingerprint(Teacher.from_pretrained(str(folder)).model) == model_fingerprint(whole)
    shards[-1].unlink()
    assert f"{shards[-1]}: not found" in refusal(tiny, tmp_path, folder, OSError)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "damaged; expected JSON with a weight_map" in refusal(tiny, tmp_path, folder)


@pytest.mark.parametrize("missing", ["all", "config"])
def test_missing_files_are_named(tiny, tmp_path, missing):
    folder = shutil.copytree(tiny.teacher, tmp_path / "teacher")
    for name in (
        ("config.json",) if missing == "config" else ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
    ):
        (folder / name).unlink(missing_ok=True)
    message = refusal(tiny, tmp_path, folder, OSError)
    assert ("config.json" if missing == "config" else "no tokenizer; expected tokenizer.json") in message


@fault(
    "files of a tokenizer are missing",
    "refused in one line that names them",
)
def test_half_a_tokenizer_is_refused(tmp_path):
    folder = save_tiny("RoBERTa", tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))
    (folder / "vocab.json").write_text(json.dumps({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}))
    with pytest.raises(ValueError, match=r"its tokenizer cannot be loaded: .*merges"):
        load_tokenizer(str(folder))
    # This one would be loaded without a word.
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    with pytest.raises(OSError, match=r"the tokenizer lacks vocab\.txt"):
        load_tokenizer(str(folder))


@fault(
    "a model's configuration asks for its own code",
    "never run",
)
def test_code_of_a_model_is_never_run(tmp_path):
    folder = edit(save_tiny("BERT", tmp_path), auto_map={"AutoModelForSequenceClassification": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('this ran')\n")
    assert type(Teacher.from_pretrained(str(folder)).model).__name__ == "BertForSequenceClassification"


# Inputs


@pytest.mark.parametrize(("family", "positions"), [("bert", 66), ("distilbert", 66), ("roberta", 65)])
@pytest.mark.parametrize("command", ["teacher", "memory", "distill", "evaluate"])
def test_inputs_longer_than_the_model(tiny, tmp_path, family, positions, command):
    folder = save_backbone(tmp_path / "model", family=family, labels=2)
    drop_token_types(folder)
    flags = {
        "teacher": [*tiny.data(), "--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "run")]
    }.get(command) or flags_of(tiny, tmp_path, command, folder)
    with pytest.raises(
        ValueError, match=f"at most the {positions} positions of {folder}, got {positions + 1}"
    ):
        run(command, [*flags, "--max_seq_length", str(positions + 1)])
    # The longest that is accepted runs.
    model = Teacher.from_pretrained(str(folder))
    assert len(model.hidden_states({"input_ids": torch.full((1, positions), 5)})[1]) == 5
    with pytest.raises((IndexError, RuntimeError)):
        model.hidden_states({"input_ids": torch.full((1, positions + 1), 5)})


def drop_token_types(folder):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"model_input_names": ["input_ids", "attention_mask"]}
    path.write_text(json.dumps(config))


def test_the_student_is_checked_as_well(tiny, tmp_path):
    short = save_backbone(tmp_path / "short")
    model = edit(short, max_position_embeddings=16)
    with pytest.raises(ValueError, match=f"at most the 16 positions of {short}, got 24"):
        run("distill", [*tiny.distillation(tmp_path / "run", "vkd"), "--model_name_or_path", str(model)])


def test_sparse_attention_limits_the_length():
    config = read_config_of("BigBird")
    config.max_position_embeddings, config.num_random_blocks, config.block_size = 4096, 3, 64
    assert input_limits(config).positions == 704


def test_token_types_beyond_the_model(tiny, tmp_path):
    folder = save_tiny(
        "RoBERTa", tmp_path / "model", labels=LABELS[:2], vocab_size=64, pad_token_id=0, type_vocab_size=1
    )
    save_tokenizer(folder)
    message = refusal(tiny, tmp_path, folder)
    assert "expected token types below type_vocab_size 1, the tokenizer's go up to 1" in message
    # Single sentences have one type.
    check_inputs(str(folder), load_tokenizer(str(folder)), 24, pair=False)


def test_token_types_that_the_model_does_not_take(tiny, tmp_path):
    folder = save_backbone(tmp_path / "model", family="distilbert", labels=2)
    assert "makes token_type_ids, which the model does not take" in refusal(tiny, tmp_path, folder)


def test_token_ids_beyond_the_embeddings(tiny, tmp_path):
    folder = shutil.copytree(tiny.teacher, tmp_path / "teacher")
    for file in ("tokenizer.json", "vocab.txt"):
        (folder / file).unlink(missing_ok=True)
    save_tokenizer(folder, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(40))])
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = f"expected token ids below its {rows} embeddings, the tokenizer's go up to 44"
    for command in ("evaluate", "memory"):
        with pytest.raises(ValueError, match=words):
            run(command, flags_of(tiny, tmp_path, command, folder))


def test_padding_that_the_model_counts_from_or_looks_for(tmp_path):
    for name, settings, got in (
        ("RoBERTa", {"pad_token_id": 3}, "3"),
        ("GPT-2", {"pad_token_id": None}, "None"),
    ):
        folder = save_tiny(name, tmp_path / name, **settings)
        with pytest.raises(
            ValueError, match=f"expected pad_token_id 1 in config.json as in the tokenizer, got {got}"
        ):
            check_inputs(str(folder), load_tokenizer(str(folder)), 16, pair=True)


def test_a_tokenizer_pads_on_the_right_and_can_pad(tmp_path):
    folder = save_tiny("Llama", tmp_path)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "padding_side": "left"}))
    assert batch(folder)["attention_mask"].tolist() == [[1] * 5 + [0] * 4, [1] * 9]
    del config["pad_token"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="its tokenizer has no padding token"):
        load_tokenizer(str(folder))


# Hidden states


def graph_breaks():
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def test_a_compiled_run_has_no_graph_break(tiny, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flags = [*tiny.distillation(tmp_path / "run", "fsd_ilg", steps=2), "--torch_compile_backend", "eager"]
    run("distill", [*flags, "--torch_compile", "true"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2, "student and teacher"
    assert graph_breaks() == 0
    torch._dynamo.reset()
    run("distill", tiny.distillation(tmp_path / "plain", "fsd_ilg", steps=2))
    compiled, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "plain"))
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_lengths_do_not_compile_again_and_again(tmp_path):
    """The second length makes a graph for every length, of the student with its losses and of the teacher."""
    folder = save_tiny("BERT", tmp_path)
    objective = FeatureStructureObjective(
        FeatureStructureLoss("fsd_il", pad_features="exclude"), [(1, 1)], (1, 1)
    )
    student = DistillationModel(load_classifier(str(folder), LABELS, 1).eval(), objective)
    teacher = Teacher.from_pretrained(str(folder))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, teacher = torch.compile(student, backend="eager"), teacher.compile(backend="eager")
    generator = torch.Generator().manual_seed(0)
    for length in (9, 12, 7, 16, 5, 11, 14):
        ids = torch.randint(5, 20, (4, length), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            logits, hidden = teacher.hidden_states(inputs)
        signals = Signals(logits, {1: hidden[1]})
        compiled(**inputs, labels=torch.tensor([0, 2, 1, 0]), teacher=signals)["loss"].backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    torch._dynamo.reset()


def test_hidden_states_compile_whole_and_stay_the_same(tmp_path):
    folder = save_tiny("BERT", tmp_path)
    teacher, inputs = Teacher.from_pretrained(str(folder)), batch(folder)
    logits, hidden = Teacher.from_pretrained(str(folder)).hidden_states(inputs)
    torch._dynamo.reset()
    compiled = teacher.compile(fullgraph=True, backend="eager").hidden_states(inputs)
    assert torch.equal(compiled[0], logits)
    assert all(map(torch.equal, compiled[1], hidden))
    assert torch.equal(teacher.penultimate(inputs), hidden[1])


def test_a_student_compiles_whole_with_its_losses(tmp_path):
    folder = save_tiny("BERT", tmp_path)
    student, inputs = load_classifier(str(folder), LABELS, 1).eval(), batch(folder)
    objective = FeatureStructureObjective(FeatureStructureLoss("fsd_il"), [(1, 1)], (1, 1))
    model = DistillationModel(student, objective)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, inputs["input_ids"].shape[1], 32, generator=generator)
    signals = Signals(torch.randn(2, 3, generator=generator), {1: features})
    labels = torch.tensor([0, 2])
    plain = model(**inputs, labels=labels, teacher=signals)["loss"]
    torch._dynamo.reset()
    whole = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(**inputs, labels=labels, teacher=signals)["loss"], plain)


# Precision


def half_teacher():
    """A teacher on the built-in backbone if it is there, else on a small random model with an outlier."""
    try:
        path = resolve_model(BACKBONE_NAME)
    except FileNotFoundError:
        pytest.skip("the built-in backbone was not fetched")
    return Teacher(load_classifier(path, LABELS), path), load_tokenizer(path)


def test_half_precision_keeps_the_features_of_the_teacher():
    teacher, tokenizer = half_teacher()
    texts = ["a quiet, moving film", "it never comes together , and it never tries to", "good fun"]
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    exact_logits, exact = teacher.hidden_states(inputs)
    kept = inputs["attention_mask"].bool()

    def error(hidden):
        layer = teacher.num_layers - 1
        return ((hidden[layer].float() - exact[layer])[kept].norm() / exact[layer][kept].norm()).item()

    logits, hidden = teacher.to(torch.device("cpu"), torch.bfloat16).hidden_states(inputs)
    assert logits.dtype == exact_logits.dtype == torch.float32
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.float32}
    assert torch.equal(hidden[0], exact[0]), "embeddings and LayerNorms are not rounded"
    assert torch.equal(teacher.penultimate(inputs), hidden[-2])
    teacher.to(torch.device("cpu"))
    with torch.no_grad():
        whole = teacher.model.to(torch.bfloat16)(**inputs, output_hidden_states=True).hidden_states
    # Measured: 0.44 % under autocast, 0.84 % where all weights are rounded.
    assert 1e-4 < error(hidden) < 0.006
    assert error(hidden) < 0.7 * error(whole)


def test_a_teacher_saved_in_half_precision_is_float32(tiny, tmp_path):
    half = AutoModelForSequenceClassification.from_pretrained(tiny.teacher, dtype=torch.bfloat16)
    shutil.copytree(tiny.teacher, tmp_path / "half")
    half.save_pretrained(tmp_path / "half")
    loaded = Teacher.from_pretrained(str(tmp_path / "half")).model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_a_run_in_half_precision(tiny, tmp_path):
    figures = run("distill", [*tiny.distillation(tmp_path / "run", "fsd_ilg", steps=2), "--bf16", "true"])
    assert figures["train_loss"] > 0
    assert load_file(tmp_path / "run" / "model.safetensors")["classifier.weight"].dtype == torch.float32


# ZeRO-3


def test_models_are_loaded_whole_although_zero_3_is_configured(tmp_path):
    # Two private names of transformers are in use here; this fails when they go.
    assert hf_deepspeed._hf_deepspeed_config_weak_ref is None
    configured = hf_deepspeed.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        assert hf_deepspeed.is_deepspeed_zero3_enabled()
        with whole_weights():
            assert not hf_deepspeed.is_deepspeed_zero3_enabled()
        assert hf_deepspeed.is_deepspeed_zero3_enabled()
        with pytest.raises(KeyError), whole_weights():
            raise KeyError
        assert hf_deepspeed.is_deepspeed_zero3_enabled()
    finally:
        hf_deepspeed.unset_hf_deepspeed_config()
        del configured
    assert not hf_deepspeed.is_deepspeed_zero3_enabled()


def test_a_fresh_head_is_no_alarm(tmp_path, caplog):
    # transformers prints a table of missing weights, which a head that is to be trained always is.
    load_classifier(str(save_tiny("BERT", tmp_path)), LABELS, 1)
    backbone = save_backbone(tmp_path / "backbone")
    load_classifier(str(backbone), LABELS)
    assert "LOAD REPORT" not in caplog.text
