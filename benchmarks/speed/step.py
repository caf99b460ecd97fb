"""A whole training step: teacher, student, losses, clipping and optimiser, for BERT-base and MiniLM shapes.

Ours is the project's own modules with a method's structures on. The released step is written from its formulas:
the same models and the released formulation of every structure, with the teacher run without gradients or, as
released, with them, so that they are back-propagated into it and pile up there.

Weights are random and dropout is off: neither changes the time, and both steps then give the same numbers.
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
from fsd_fast.losses import METHODS, FeatureStructureLoss, FeatureStructureObjective, Signals
from fsd_fast.memory.student_memory import StudentMemory
from fsd_fast.models.teacher import Teacher
from fsd_fast.training.distillation import DistillationModel

_ALPHA, _TEMPERATURE = 0.5, 10.0
_LEARNING_RATE, _CLIP = 3e-5, 1.0


class Shape(NamedTuple):
    """The encoder of a teacher and of its student, which keeps fewer layers."""

    name: str
    teacher_layers: int
    student_layers: int
    heads: int
    intermediate: int
    vocabulary: int


SHAPES = {
    768: Shape("BERT-base", 12, 6, 12, 3072, 30522),
    384: Shape("MiniLM", 6, 3, 12, 1536, 30522),
    32: Shape("tiny", 3, 2, 2, 64, 100),
}
"""By hidden size."""


def _classifier(sizes: Sizes, layers: int, seed: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    shape = SHAPES[sizes.width]
    config = BertConfig(
        vocab_size=shape.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
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
    """One step of training, repeatable.

    Args:
        inputs: ``input_ids`` [B, S], ``labels`` [B], ``student_memory`` and ``teacher_memory`` [K, S * D].
        sizes: Of the case.
        method: A method of ``FeatureStructureLoss``, or "released".
        teacher_gradients: Whether the teacher is run with gradients, as released.
        backend: Of the losses.
    """

    def __init__(
        self,
        inputs: Inputs,
        sizes: Sizes,
        method: str,
        teacher_gradients: bool = False,
        backend: str = "auto",
    ) -> None:
        shape = SHAPES[sizes.width]
        device, dtype = inputs["student_memory"].device, inputs["student_memory"].dtype
        self.method, self.teacher_gradients = method, teacher_gradients
        self.ids, self.labels = inputs["input_ids"], inputs["labels"]
        self.teacher_memory = inputs["teacher_memory"]
        teacher = _classifier(sizes, shape.teacher_layers, 0).to(device, dtype)
        student = _classifier(sizes, shape.student_layers, 1).to(device, dtype).train()
        self.layers = shape.teacher_layers - 1, shape.student_layers - 1
        uses_memory = method == "released" or METHODS[method][2]
        self.memory = StudentMemory(sizes.centroids, sizes.rows, sizes.width).to(device, dtype)
        with torch.no_grad():
            self.memory.centroids.copy_(inputs["student_memory"])
        self.teacher = teacher.eval()
        self.student = student
        self.ours: tuple[Teacher, DistillationModel] | None = None
        if method != "released":
            loss = FeatureStructureLoss(
                method,
                alpha=_ALPHA,
                temperature=_TEMPERATURE,
                beta=1.0,
                gamma_i=baselines.GAMMA_I,
                gamma_l=baselines.GAMMA_L,
                gamma_g=baselines.GAMMA_G,
                gamma_m=baselines.GAMMA_M,
                backend=backend,
            )
            objective = FeatureStructureObjective(loss, [self.layers], self.layers)
            model = DistillationModel(student, objective, self.memory if uses_memory else None)  # type: ignore[arg-type]
            self.ours = Teacher(teacher, "teacher"), model  # type: ignore[arg-type]
        self.parameters = [*student.parameters(), *([self.memory.centroids] if uses_memory else [])]
        # Fused as in transformers' Trainer.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=_LEARNING_RATE, fused=True)

    def _our_loss(self, teacher: Teacher, model: DistillationModel) -> Tensor:
        logits, hidden = teacher.hidden_states({"input_ids": self.ids})
        layer = self.layers[0]
        signals = Signals(logits, {layer: hidden[layer]}, self.teacher_memory)
        loss: Tensor = model(input_ids=self.ids, labels=self.labels, teacher=signals)["loss"]
        return loss

    def _released_loss(self) -> Tensor:
        with torch.set_grad_enabled(self.teacher_gradients):
            given = self.teacher(input_ids=self.ids, output_hidden_states=True)
        own = self.student(input_ids=self.ids, output_hidden_states=True)
        hard = functional.cross_entropy(own.logits, self.labels)
        soft = functional.kl_div(
            functional.log_softmax(own.logits / _TEMPERATURE, dim=1),
            functional.softmax(given.logits / _TEMPERATURE, dim=1),
            reduction="batchmean",
        )
        structures = baselines.fsd_ilg(baselines.released_cka)(
            {
                "student": own.hidden_states[self.layers[1]],
                "teacher": given.hidden_states[self.layers[0]],
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
        """Return the loss and the gradients of all trained parameters, without taking a step."""
        value = self._backward()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = [torch.cat([g.flatten() for g in gradients[: len(list(self.student.parameters()))]])]
        return Outcome(value, (*flat, *gradients[len(list(self.student.parameters())) :]))

    def timed(self, mode: str) -> Timed:
        """Return what to time: a whole step."""
        return Timed(lambda: None, self._step)


def inputs(sizes: Sizes, seed: int, outliers: bool = False) -> Inputs:
    """``input_ids``, ``labels`` and the two memories; ``outliers`` are those of the memories."""
    generator = torch.Generator().manual_seed(seed)
    memories = with_memories(sizes._replace(batch=1), seed, outliers)
    vocabulary = SHAPES[sizes.width].vocabulary
    return {
        "input_ids": torch.randint(vocabulary, (sizes.batch, sizes.rows), generator=generator),
        "labels": torch.randint(2, (sizes.batch,), generator=generator),
        "student_memory": memories["student_memory"],
        "teacher_memory": memories["teacher_memory"],
    }
