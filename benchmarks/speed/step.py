"""A whole training step: teacher, student, losses, clipping and optimiser, for BERT-base and MiniLM shapes.

Our step runs the project's own modules. The released step is written from its formulas: the same models, with the
released formulation of every structure. Its teacher runs without gradients or, as in the released code, with them; its
gradients are then computed and accumulate in its parameters.

Weights are random and dropout is off. Neither changes the time, and both steps then compute the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.speed import baselines
from benchmarks.speed.contenders import Outcome
from benchmarks.speed.harness import Timed
from benchmarks.speed.inputs import Inputs, Sizes, with_memories
from benchmarks.speed.losses import structures_loss
from benchmarks.speed.ops import Build, Op, Provider
from fsd_fast.losses import STRUCTURES, FeatureStructureObjective, Signals
from fsd_fast.memory.student_memory import StudentMemory
from fsd_fast.models.teacher import Teacher
from fsd_fast.training.distillation import DistillationModel

_ALPHA, _TEMPERATURE = 0.5, 10.0
_LEARNING_RATE, _CLIP = 3e-5, 1.0


class Encoders(NamedTuple):
    """The encoders of a teacher and of its student, which has fewer layers."""

    name: str
    teacher_layers: int
    student_layers: int
    heads: int
    intermediate: int
    vocabulary: int


ENCODERS = {
    768: Encoders("BERT-base", 12, 6, 12, 3072, 30522),
    384: Encoders("MiniLM", 6, 3, 12, 1536, 30522),
    32: Encoders("tiny", 3, 2, 2, 64, 100),
}
"""By hidden size."""


def _classifier(sizes: Sizes, layers: int, seed: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    encoders = ENCODERS[sizes.width]
    config = BertConfig(
        vocab_size=encoders.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=layers,
        num_attention_heads=encoders.heads,
        intermediate_size=encoders.intermediate,
        max_position_embeddings=max(512, sizes.rows),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = BertForSequenceClassification(config)
    return model


class TrainingStep:
    """One repeatable training step.

    Args:
        inputs: ``input_ids`` [B, S], ``labels`` [B], ``student_memory`` and ``teacher_memory`` [K, S * D].
        sizes: Sizes of the case.
        method: A method of ``FeatureStructureLoss``, or "released".
        teacher_gradients: Whether the teacher runs with gradients, as in the released code.
        backend: Backend of our losses.
    """

    def __init__(
        self,
        inputs: Inputs,
        sizes: Sizes,
        method: str,
        teacher_gradients: bool = False,
        backend: str = "auto",
    ) -> None:
        encoders = ENCODERS[sizes.width]
        device, dtype = inputs["student_memory"].device, inputs["student_memory"].dtype
        self.method, self.teacher_gradients = method, teacher_gradients
        self.ids, self.labels = inputs["input_ids"], inputs["labels"]
        self.teacher_memory = inputs["teacher_memory"]
        teacher = _classifier(sizes, encoders.teacher_layers, 0).to(device, dtype)
        student = _classifier(sizes, encoders.student_layers, 1).to(device, dtype).train()
        self.layers = encoders.teacher_layers - 1, encoders.student_layers - 1
        uses_memory = method == "released" or STRUCTURES[method][2]
        self.memory = StudentMemory(sizes.centroids, sizes.rows, sizes.width).to(device, dtype)
        with torch.no_grad():
            self.memory.centroids.copy_(inputs["student_memory"])
        self.teacher = teacher.eval()
        self.student = student
        self.ours: tuple[Teacher, DistillationModel] | None = None
        if method != "released":
            loss = structures_loss(method, backend, alpha=_ALPHA, temperature=_TEMPERATURE)
            objective = FeatureStructureObjective(loss, [self.layers], self.layers)
            model = DistillationModel(student, objective, self.memory if uses_memory else None)  # type: ignore[arg-type]
            self.ours = Teacher(teacher, "teacher"), model  # type: ignore[arg-type]
        self.parameters = [*student.parameters(), *([self.memory.centroids] if uses_memory else [])]
        # Fused, as in transformers' Trainer.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=_LEARNING_RATE, fused=True)

    def _our_loss(self, teacher: Teacher, model: DistillationModel) -> Tensor:
        logits, hidden = teacher.hidden_states({"input_ids": self.ids})
        layer = self.layers[0]
        signals = Signals(logits, {layer: hidden[layer]}, self.teacher_memory)
        loss: Tensor = model(input_ids=self.ids, labels=self.labels, teacher=signals)["loss"]
        return loss

    def _released_loss(self) -> Tensor:
        with torch.set_grad_enabled(self.teacher_gradients):
            teacher = self.teacher(input_ids=self.ids, output_hidden_states=True)
        student = self.student(input_ids=self.ids, output_hidden_states=True)
        hard = functional.cross_entropy(student.logits, self.labels)
        soft = functional.kl_div(
            functional.log_softmax(student.logits / _TEMPERATURE, dim=1),
            functional.softmax(teacher.logits / _TEMPERATURE, dim=1),
            reduction="batchmean",
        )
        structures = baselines.fsd_ilg(baselines.released_cka)(
            {
                "student": student.hidden_states[self.layers[1]],
                "teacher": teacher.hidden_states[self.layers[0]],
                "student_memory": self.memory.centroids,
                "teacher_memory": self.teacher_memory,
            }
        )
        return _ALPHA * hard + (1 - _ALPHA) * _TEMPERATURE**2 * soft + structures

    def _backward(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._our_loss(*self.ours) if self.ours is not None else self._released_loss()
        loss.backward()
        return loss.detach()

    def _step(self, _: None) -> None:
        self._backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, _CLIP)
        self.optimizer.step()

    def outcome(self) -> Outcome:
        """Return the loss and the gradients of all trained parameters; no step is taken."""
        value = self._backward()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        of_model = len(list(self.student.parameters()))
        flat = torch.cat([gradient.flatten() for gradient in gradients[:of_model]])
        return Outcome(value, (flat, *gradients[of_model:]))

    def timed(self, mode: str) -> Timed:
        """Return a whole step as the call to time."""
        return Timed(lambda: None, self._step)


def inputs(sizes: Sizes, seed: int, outliers: bool = False) -> Inputs:
    """``input_ids``, ``labels`` and two memories; ``outliers`` gives the memories outlier dimensions."""
    generator = torch.Generator().manual_seed(seed)
    memories = with_memories(sizes._replace(batch=1), seed, outliers)
    vocabulary = ENCODERS[sizes.width].vocabulary
    return {
        "input_ids": torch.randint(vocabulary, (sizes.batch, sizes.rows), generator=generator),
        "labels": torch.randint(2, (sizes.batch,), generator=generator),
        "student_memory": memories["student_memory"],
        "teacher_memory": memories["teacher_memory"],
    }


def _step(method: str, backend: str, teacher_gradients: bool = False) -> Build:
    return lambda tensors, sizes: TrainingStep(tensors, sizes, method, teacher_gradients, backend)


def _gate_sizes(sizes: Sizes) -> Sizes:
    return Sizes(4, 8, 32, min(5, sizes.centroids))


def step_op() -> Op:
    """The op "step"."""
    names = {
        "fsd_ilg": "ours",
        "vkd": "vkd-only",
        "fsd_i": "ours-fsd_i",
        "fsd_l": "ours-fsd_l",
        "fsd_g": "ours-fsd_g",
    }
    providers = {
        name: Provider(_step(method, "auto"), truth=method, note=f"method {method}", memory=False)
        for method, name in names.items()
    }
    released = {
        "released": (False, "teacher without gradients"),
        "released-teacher-grad": (True, "teacher with gradients, as released"),
    }
    for name, (teacher_gradients, note) in released.items():
        build = _step("released", "auto", teacher_gradients)
        providers[name] = Provider(build, truth="fsd_ilg", note=note, memory=False)
    return Op(
        "step",
        "a whole training step: teacher, student, losses, optimiser",
        ("batch", "rows", "width", "centroids"),
        inputs,
        {method: _step(method, "reference") for method in names},
        providers,
        {
            "paper": [Sizes(32, 128, 768, 100), Sizes(32, 128, 384, 100)],
            "small": [Sizes(4, 8, 32, 5)],
            "growth": [],
        },
        None,
        modes=("full",),
        gate_sizes=_gate_sizes,
    )
