"""``FSDTrainer``: transformers' Trainer with the teacher's signals added to every training batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from fsd_fast.models.distillation import DistillationModel
from fsd_fast.models.teacher import Teacher, TeacherSignals


class FSDTrainer(Trainer):
    """Trains a ``DistillationModel`` next to a frozen teacher.

    Everything but the loss is Trainer's: the loop, DeepSpeed, resuming, logging, evaluation, checkpoints.
    Evaluation runs the student alone.

    Args:
        *arguments: As for Trainer.
        teacher: The frozen teacher.
        teacher_memory: Centroids [K, S * D_t]; None where the method uses none.
        **keywords: As for Trainer; ``model`` is a ``DistillationModel``.
    """

    def __init__(
        self, *arguments: Any, teacher: Teacher, teacher_memory: Tensor | None = None, **keywords: Any
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.distillation: DistillationModel = self.accelerator.unwrap_model(self.model)
        half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        self.teacher = teacher.to(self.args.device, half)
        if self.args.torch_compile:
            self.teacher.compile(backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)
        self.teacher_memory = None if teacher_memory is None else teacher_memory.to(self.args.device)
        # The loss is a mean over the batch: Trainer itself divides it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def signals(self, inputs: dict[str, Tensor]) -> TeacherSignals:
        """Run the teacher on a batch and keep what the losses read."""
        logits, hidden = self.teacher.hidden_states(inputs)
        loss = self.distillation.loss
        uses_features = loss.uses_intra or loss.uses_local
        return TeacherSignals(
            logits,
            tuple(hidden[layer] for layer, _ in self.distillation.layer_pairs) if uses_features else (),
            hidden[self.teacher.num_layers - 1] if loss.uses_global else None,
            self.teacher_memory,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the integrated loss while training, the hard-label loss while evaluating."""
        if not model.training:
            outputs = model(**inputs)
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]
        outputs = model(**inputs, teacher=self.signals(inputs))
        # Added up on the device: nothing waits for it before the next log entry.
        for name, value in outputs["components"].items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with each loss component's mean since the last entry."""
        if "loss" in logs and self._steps:
            values = torch.stack(list(self._sums.values())).float() / self._steps
            values = self.accelerator.reduce(values, reduction="mean")
            logs = {**logs, **dict(zip(self._sums, values.tolist(), strict=True))}
            self._sums, self._steps = {}, 0
        super().log(logs, start_time)

    def gathered_state(self) -> dict[str, Tensor] | None:
        """Gather the ``DistillationModel`` state; call it on all processes. ZeRO-3 gives it to the first alone."""
        return self.accelerator.get_state_dict(self.deepspeed if self.is_deepspeed_enabled else self.model)
