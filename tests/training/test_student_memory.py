"""Where the student memory starts, and how it is trained."""

import pytest
import torch
from safetensors.torch import load_file

from fsd_fast.commands import distill as commands
from fsd_fast.commands import run
from fsd_fast.memory.student_memory import StudentMemory
from fsd_fast.memory.teacher_memory import TeacherMemory
from fsd_fast.models.student import load_classifier
from fsd_fast.training.trainer import FSDTrainer
from tests.tiny import HIDDEN, SEQUENCE, history, losses, tiny, write_rte

__all__ = ["tiny"]


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that the command makes."""
    made = []

    class Recorded(FSDTrainer):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            made.append(self)

    monkeypatch.setattr(commands, "FSDTrainer", Recorded)
    return made


def means_of_the_fresh_student(tiny, trainer, pad_features):
    """The means over the teacher's clusters, sample by sample and in float64."""
    memory = TeacherMemory.from_pretrained(tiny.memory(pad_features))
    student = load_classifier(str(tiny.backbone), (), 2).double().eval()
    sums = torch.zeros(memory.identity.num_centroid, SEQUENCE, HIDDEN, dtype=torch.float64)
    for place, label in zip(memory.sample_index.tolist(), memory.labels.tolist(), strict=True):
        batch = trainer.data_collator([trainer.train_dataset[place]])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        with torch.no_grad():
            features = student(**inputs, output_hidden_states=True).hidden_states[1][0]
        sums[label, : features.shape[0]] += features
    return sums.flatten(1) / torch.tensor(memory.cluster_sizes)[:, None]


@pytest.mark.parametrize("pad_features", ["exclude", "include"])
def test_it_starts_at_the_means_of_the_fresh_students_features(tiny, tmp_path, trainers, pad_features):
    flags = tiny.distillation(tmp_path / "run", "fsd_g", pad_features, steps=1)
    run("distill", [*flags, "--memory_learning_rate", "0"])
    found = trainers[0].distillation.student_memory.centroids.detach().double()
    expected = means_of_the_fresh_student(tiny, trainers[0], pad_features)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_memory_of_another_training_set_is_refused(tiny, tmp_path):
    flags = tiny.distillation(tmp_path / "run", "fsd_g")
    with pytest.raises(
        ValueError, match=r"was built on 24 training samples, this run has 16; .*_init normal"
    ):
        run("distill", [*flags, "--max_train_samples", "16"])
    other = write_rte(tmp_path / "RTE")
    path = other / "train.tsv"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="with other tokens"):
        run("distill", [*flags, "--data_dir", str(other)])
    assert not (tmp_path / "run").exists()
    run("distill", [*flags, "--max_train_samples", "16", "--student_memory_init", "normal"])


def test_it_has_a_learning_rate_of_its_own(tiny, tmp_path, trainers):
    moved = {}
    for rate in (None, "0", "1e-2"):
        flags = tiny.distillation(tmp_path / f"run{rate}", "fsd_g", steps=1)
        run("distill", flags if rate is None else [*flags, "--memory_learning_rate", rate])
        memory = trainers[-1].distillation.student_memory.centroids.detach().double()
        start = means_of_the_fresh_student(tiny, trainers[-1], "exclude")
        moved[rate] = float((memory - start).abs().max())
    # The first step of AdamW moves every entry by its learning rate; 3e-2 is the default.
    assert moved["0"] < 1e-5
    assert moved[None] == pytest.approx(3e-2, rel=0.05)
    assert moved["1e-2"] == pytest.approx(1e-2, rel=0.05)


def test_the_clip_takes_the_students_gradient_alone(tiny, tmp_path, trainers):
    def run_once(name, clip):
        flags = tiny.distillation(tmp_path / name, "fsd_g", steps=1)
        run("distill", [*flags, "--optim", "sgd", "--gamma_g", "1", "--max_grad_norm", clip])
        model = trainers[-1].distillation
        [entry] = [entry for entry in history(tmp_path / name) if "loss" in entry]
        weights = {key: value.detach().clone() for key, value in model.named_parameters()}
        return weights, entry["grad_norm"]

    free, norm = run_once("free", "1e9")
    clipped, same = run_once("clipped", "1e-12")
    assert norm == same
    fresh = load_classifier(str(tiny.backbone), (), 2).state_dict()
    name = "student.bert.encoder.layer.0.attention.self.query.weight"
    start = fresh[name.removeprefix("student.")]
    torch.testing.assert_close(clipped[name], start, rtol=0, atol=1e-9)
    assert not torch.equal(free[name], start)
    # The centroids move as far as without a clip, and their gradient is no part of the norm.
    assert torch.equal(clipped["student_memory.centroids"], free["student_memory.centroids"])
    update = {key: free[key] - clipped[key] for key in free if key.startswith("student.")}
    squares = sum(float(value.double().square().sum()) for value in update.values())
    assert squares**0.5 / 1e-3 == pytest.approx(norm, rel=1e-2)


def test_a_gradient_that_is_not_finite_names_the_memory(tiny, tmp_path, monkeypatch):
    class Poisoned(FSDTrainer):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            self.distillation.student_memory.centroids.register_hook(lambda gradient: gradient * float("nan"))

    monkeypatch.setattr(commands, "FSDTrainer", Poisoned)
    with pytest.raises(FloatingPointError, match="the gradient of the student memory"):
        run("distill", tiny.distillation(tmp_path / "run", "fsd_g", steps=2))


# --- following the student's features -----------------------------------------------------------------------------


@pytest.mark.parametrize("pad_features", ["exclude", "include"])
def test_centroids_follow_the_features_of_their_cluster(pad_features):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 8, generator=generator)
    memory = StudentMemory(3, 4, 2, start, decay=0.75, pad_features=pad_features)
    assert list(memory.parameters()) == []
    assert list(memory.state_dict()) == ["centroids"]
    features = torch.randn(4, 3, 2, generator=generator)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
    labels = torch.tensor([2, 0, 2, 2])
    memory.follow(features, labels, mask)
    counted = features * mask[:, :, None] if pad_features == "exclude" else features
    flat = torch.nn.functional.pad(counted.flatten(1), (0, 2))
    expected = start.clone()
    expected[0] = 0.75 * start[0] + 0.25 * flat[1]
    expected[2] = 0.75**3 * start[2] + (1 - 0.75**3) * flat[[0, 2, 3]].mean(0)
    torch.testing.assert_close(memory.centroids, expected)


def test_a_memory_trained_by_gradient_does_not_follow():
    with pytest.raises(ValueError, match="decay: expected a memory that was made with one"):
        StudentMemory(2, 2, 2).follow(torch.zeros(1, 2, 2), torch.tensor([0]))
    for decay in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="decay: expected a number between 0 and 1"):
            StudentMemory(2, 2, 2, decay=decay)


def test_a_run_whose_memory_follows_is_resumed_to_the_bit(tiny, tmp_path, trainers):
    ema = ["--student_memory_update", "ema", "--save_strategy", "steps", "--save_steps", "2"]
    for name in ("whole", "cut"):
        run(
            "distill",
            [*tiny.distillation(tmp_path / name, "fsd_g", steps=4), *ema, "--save_total_limit", "2"],
        )
    saved = load_file(tmp_path / "cut" / "checkpoint-2" / "model.safetensors")
    assert "student_memory.centroids" in saved
    # The last step's features are worked in as well, so the memory differs from that of the second step.
    final = trainers[0].distillation.student_memory.centroids
    assert not torch.equal(saved["student_memory.centroids"], final)
    flags = [*tiny.distillation(tmp_path / "cut", "fsd_g", steps=4), *ema, "--save_total_limit", "2"]
    run("distill", [*flags, "--resume_from_checkpoint", str(tmp_path / "cut" / "checkpoint-2")])
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert torch.equal(trainers[-1].distillation.student_memory.centroids, final)
