"""The exported student: whole or without weights, readable as the umask says, with a card of plain text."""

import os
import shutil
import stat

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertTokenizer

from fsd_fast.models.student import load_classifier
from fsd_fast.training import export
from fsd_fast.training.export import export_student, model_card
from tests.faults.registry import fault
from tests.tiny import save_backbone

LABELS = ("entailment", "not_entailment")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = save_backbone(tmp_path_factory.mktemp("export") / "backbone")
    return load_classifier(str(folder), LABELS), BertTokenizer.from_pretrained(folder)


def write(student, folder, state=None):
    model, tokenizer = student
    export_student(model, model.state_dict() if state is None else state, tokenizer, folder, "# card\n")
    return folder


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_mode_of_the_umask(student, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write(student, tmp_path / "run")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {mode}, modes


@fault(
    "an export over an earlier one is killed at any of its files",
    "no mixture of the two: the folder has no weights, and evaluate refuses it",
)
def test_an_export_killed_at_any_file_leaves_no_weights(student, tmp_path, monkeypatch):
    folder = write(student, tmp_path / "run")
    files = {path.name for path in folder.iterdir()}
    move = shutil.move
    for survived in range(len(files)):
        write(student, folder)
        moved = []

        def killed(source, target, survived=survived, moved=moved):
            if len(moved) == survived:
                raise KeyboardInterrupt
            moved.append(move(source, target))

        monkeypatch.setattr(export.shutil, "move", killed)
        with pytest.raises(KeyboardInterrupt):
            write(student, folder)
        monkeypatch.setattr(export.shutil, "move", move)
        assert len(moved) == survived
        assert not list(folder.glob("*.safetensors*")), "old weights next to a new configuration"
        with pytest.raises(OSError):
            AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_refused_export_leaves_the_earlier_one(student, tmp_path):
    folder = write(student, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RuntimeError, match=r"classifier\.bias"):
        write(student, folder, {k: v for k, v in student[0].state_dict().items() if k != "classifier.bias"})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@fault(
    "a killed export has left its scratch folder",
    "the next export removes it",
)
def test_what_a_killed_export_left_is_cleared(student, tmp_path):
    folder = tmp_path / "run"
    (folder / ".export-k3x9").mkdir(parents=True)
    (folder / ".export-k3x9" / "model.safetensors").write_bytes(b"half")
    write(student, folder)
    assert not list(folder.glob(".export-*"))


def test_weights_of_an_earlier_model_in_parts_are_removed(student, tmp_path):
    folder = tmp_path / "run"
    student[0].save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    write(student, folder)
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
    loaded = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in student[0].state_dict().items())


@fault(
    "names with HTML, Markdown or folders go into the model card",
    "it shows them as plain text, and names no folder",
)
def test_the_card_is_plain_text_and_names_no_folder():
    rows = {
        "teacher_model_name_or_path": "/home/someone/secret/teacher-12",
        "memory_path": "C:\\Users\\someone\\memory",
        "model_name_or_path": "google/bert_uncased",
        "note|s": "a | b\nc <img src=x onerror=alert(1)> & more",
        "seed": 42,
    }
    card = model_card(
        "2-layer <b>student</b>\n# other", "rte", rows, {"eval_accuracy": 0.5}, dict(enumerate(LABELS))
    )
    assert "| teacher_model_name_or_path | teacher-12 |" in card
    assert "| memory_path | memory |" in card
    assert "| model_name_or_path | google/bert_uncased |" in card
    assert "| note\\|s | a \\| b c &lt;img src=x onerror=alert(1)&gt; &amp; more |" in card
    assert "| seed | 42 |" in card
    assert "\n# 2-layer &lt;b&gt;student&lt;/b&gt; # other\n" in card
    assert "Logits: 0 = entailment, 1 = not_entailment." in card
    assert "Logits: one, the score." in model_card("t", "stsb", {}, {}, {0: "LABEL_0"})
    for word in ("someone", "secret", "<img", "<b>"):
        assert word not in card
