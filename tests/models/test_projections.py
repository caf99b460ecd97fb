"""Queries, keys and values of the last layer: caught in every family that has them, refused in the others."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fsd_fast.commands import run
from fsd_fast.losses import AttentionRelationObjective, LogitDistillationLoss, Signals
from fsd_fast.models.families import REFUSED
from fsd_fast.models.projections import ProjectionRecorder, record_projections
from fsd_fast.models.student import load_classifier
from fsd_fast.models.teacher import Teacher
from fsd_fast.training.distillation import DistillationModel
from fsd_fast.training.trainer import FSDTrainer
from tests.tiny import tiny
from tools.families import FAMILIES, LABELS, batch, save_tiny

__all__ = ["tiny"]

# Attention is softmax(Q K^T / sqrt(d)) there, without positions in it.
PLAIN = {"ALBERT", "BERT", "CamemBERT", "DistilBERT", "ELECTRA", "MobileBERT", "RoBERTa", "XLM-RoBERTa"}
TAKEN = PLAIN | {
    "BigBird", "DeBERTa-v2, -v3", "GPT-2", "Llama", "ModernBERT", "MPNet", "Qwen3", "RoFormer",
}  # fmt: skip
NOT_TAKEN = {"DeBERTa", "Longformer", "SqueezeBERT"}


def load(name, folder):
    model = AutoModelForSequenceClassification.from_pretrained(
        save_tiny(name, folder), attn_implementation="eager"
    )
    return model.eval()


def test_every_family_that_the_engine_takes_is_tried():
    engine = {name for name, (model_type, _) in FAMILIES.items() if model_type not in REFUSED}
    assert engine - {"BART", "T5"} == TAKEN | NOT_TAKEN


@pytest.mark.parametrize("name", sorted(PLAIN | {"GPT-2"}))
def test_what_is_caught_is_what_the_attention_reads(tmp_path, name):
    model, inputs = load(name, tmp_path), batch(tmp_path)
    recorder = record_projections(model, name, 2)
    with torch.no_grad():
        attention = model(**inputs, output_attentions=True).attentions[-1]
    query, key, _ = recorder.take()
    heads = attention.shape[1]
    split = [each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (query, key)]
    scores = split[0] @ split[1].transpose(2, 3) / split[0].shape[3] ** 0.5
    dropped = ~inputs["attention_mask"].bool()[:, None, None]
    if name == "GPT-2":
        dropped = dropped | torch.ones(scores.shape[2:]).triu(1).bool()
    own = scores.masked_fill(dropped, -1e9).softmax(dim=3)
    kept = inputs["attention_mask"].bool()[:, None, :, None].expand_as(attention)
    torch.testing.assert_close(own[kept], attention[kept], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(TAKEN))
def test_families_with_projections_are_taken(tmp_path, name):
    model, inputs = load(name, tmp_path), batch(tmp_path)
    recorder = record_projections(model, name, 2)
    model(**inputs)
    caught = recorder.take()
    for vectors in caught:
        assert vectors.shape[:2] == inputs["input_ids"].shape
        assert vectors.requires_grad
    width = caught.query.shape[2]
    assert width == (16 if name == "MobileBERT" else 32)
    assert len({tuple(vectors.shape) for vectors in caught}) == (2 if name in ("Llama", "Qwen3") else 1)
    different = [
        not torch.equal(caught.query, other) for other in caught[1:] if other.shape == caught.query.shape
    ]
    assert all(different)


@pytest.mark.parametrize("name", sorted(NOT_TAKEN))
def test_families_without_them_are_refused(tmp_path, name):
    model = load(name, tmp_path)
    with pytest.raises(ValueError, match=rf"{name}: method 'minilm' does not take model family .*: expected"):
        record_projections(model, name, 1)


def test_the_last_call_counts_where_layers_share_their_weights(tmp_path):
    model, inputs = load("ALBERT", tmp_path), batch(tmp_path)
    recorder = ProjectionRecorder(model, "albert")
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
        attention = model.albert.encoder.albert_layer_groups[0].albert_layers[0].attention
        expected = attention.query(hidden[-2])
    torch.testing.assert_close(recorder.take().query, expected)


def test_projections_are_taken_once(tmp_path):
    recorder = record_projections(load("BERT", tmp_path), "bert", 2)
    with pytest.raises(RuntimeError, match="has not been run since"):
        recorder.take()


def test_heads_that_do_not_divide_are_refused_by_name(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"minilm_relation_heads: expected a divisor of 16, the width of the key .*\(1, 2, 4, 8, 16\)",
    ):
        record_projections(load("Llama", tmp_path), "llama", 32)


def test_teacher_and_student_of_other_families_share_their_relations(tmp_path):
    """DistilBERT learns from BERT: other names of the projections, another width, another number of heads."""
    teacher = Teacher(load("BERT", tmp_path / "teacher"), "teacher")
    teacher.record_projections(4)
    folder = save_tiny("DistilBERT", tmp_path / "student", dim=48, n_heads=3)
    student = load_classifier(str(folder), LABELS, 1)
    objective = AttentionRelationObjective(LogitDistillationLoss(), relation_heads=4)
    model = DistillationModel(student, objective)
    inputs = batch(tmp_path / "teacher")
    logits, _ = teacher.hidden_states(inputs)
    signals = Signals(logits, {}, projections=teacher.projections.take())
    assert not signals.projections.query.requires_grad
    output = model(**inputs, labels=torch.tensor([0, 2]), teacher=signals)
    output["loss"].backward()
    assert output["components"]["loss_relations"] > 0
    weights = dict(student.distilbert.transformer.layer[-1].attention.named_parameters())
    assert all(weights[f"{name}.weight"].grad.abs().sum() > 0 for name in ("q_lin", "k_lin", "v_lin"))


def test_a_student_compiles_whole_with_its_relations(tmp_path):
    folder = save_tiny("BERT", tmp_path)
    student, inputs = load_classifier(str(folder), LABELS, 1).eval(), batch(folder)
    objective = AttentionRelationObjective(LogitDistillationLoss(), relation_heads=4)
    model = DistillationModel(student, objective)
    teacher = Teacher.from_pretrained(str(folder))
    teacher.record_projections(4)
    logits, _ = teacher.hidden_states(inputs)
    signals = Signals(logits, {}, projections=teacher.projections.take())
    labels = torch.tensor([0, 2])
    plain = model(**inputs, labels=labels, teacher=signals)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")(**inputs, labels=labels, teacher=signals)
    torch.testing.assert_close(compiled["loss"], plain["loss"])
    assert compiled["components"].keys() == plain["components"].keys()


@pytest.mark.parametrize(
    "more", [["--activation_checkpointing"], ["--torch_compile", "--torch_compile_backend", "eager"]]
)
def test_relations_reach_the_student_through_wrapped_layers(tiny, tmp_path, more):
    flags = [*tiny.distillation(tmp_path / "run", "minilm", steps=2), "--minilm_relation_heads", "4"]
    plain = run("distill", flags)
    flags[flags.index(str(tmp_path / "run"))] = str(tmp_path / "other")
    assert run("distill", [*flags, *more])["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)


def test_the_trainer_needs_a_teacher_where_the_method_does(tmp_path):
    model = DistillationModel(
        load_classifier(str(save_tiny("BERT", tmp_path)), LABELS, 1),
        AttentionRelationObjective(LogitDistillationLoss(), relation_heads=4),
    )
    with pytest.raises(ValueError, match="teacher: the method requires one, got None"):
        FSDTrainer(model=model, teacher=None)
