"""L_VKD: hard labels and the teacher's softened predictions [paper, eq. 1-3]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsd_fast.losses._checks import check_unit_interval
from fsd_fast.losses.defaults import DEFAULTS

_NO_LABEL = -100


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log softmax(z_i)[y_i] over the samples that have a label, 0 where none has."""
    labelled = labels != _NO_LABEL
    eager = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    if eager and bool((labelled & ((labels < 0) | (labels >= logits.shape[1]))).any()):
        raise ValueError(
            f"labels: expected class numbers from 0 to {logits.shape[1] - 1}, or {_NO_LABEL} for none; "
            f"got {labels.tolist()}"
        )
    total = functional.cross_entropy(logits, labels, ignore_index=_NO_LABEL, reduction="sum")
    return total / labelled.sum().clamp(min=1)


def hard_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the labels; their mean squared error where there is one logit (a regression).

    Args:
        logits: [B, C].
        labels: [B], class numbers; for C = 1 the targets. A sample labelled -100 has no label, as in torch: the
            cross-entropy is the mean over the others, 0 where there are none.

    Returns:
        A float32 scalar.

    Raises:
        TypeError: Class labels are not integers.
        ValueError: Shapes do not fit, or, on a CPU, a label is no class. (On a GPU torch itself stops there.)
    """
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels: expected [B] = [{len(logits)}], got {list(labels.shape)}")
    logits = logits.float()
    if logits.shape[1] == 1:
        return functional.mse_loss(logits[:, 0], labels.to(logits.dtype))
    if labels.is_floating_point():
        raise TypeError(f"labels: expected class numbers (an integer dtype), got {labels.dtype}")
    return _cross_entropy(logits, labels)


class LogitDistillationLoss(nn.Module):
    """L_VKD: hard labels and the teacher's softened predictions [eq. 1-3].

    Classification (two or more logits): alpha CE(z_S, labels) + (1 - alpha) tau^2 KL(p_T || p_S) with
    p = softmax(z / tau), KL averaged over the batch.

    Regression (one logit): alpha MSE(z_S, labels) + (1 - alpha) MSE(z_S, z_T). The softmax of a single logit is
    always 1, so its KL term would be identically 0. With more logits tau^2 KL approaches a squared difference of
    logits as tau grows, and that is what one logit uses. tau plays no part.

    Args:
        alpha: Weight of the hard labels, in [0, 1].
        temperature: tau > 0.

    Raises:
        ValueError: ``alpha`` or ``temperature`` is out of range.
    """

    def __init__(self, alpha: float = DEFAULTS.alpha, temperature: float = DEFAULTS.temperature) -> None:
        super().__init__()
        check_unit_interval("alpha", alpha)
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, got {temperature}")
        self.alpha = alpha
        self.temperature = temperature

    def extra_repr(self) -> str:
        """Show the settings in repr."""
        return f"alpha={self.alpha}, temperature={self.temperature}"

    def components(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (L_VKD, hard-label term, soft-label term), unweighted terms; arguments as in ``forward``."""
        if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
            raise ValueError(
                f"student_logits, teacher_logits: expected the same [B, C], got {list(student_logits.shape)} "
                f"and {list(teacher_logits.shape)}"
            )
        hard = hard_label_loss(student_logits, labels)
        student, teacher = student_logits.float(), teacher_logits.detach().float()
        if student.shape[1] == 1:
            soft = functional.mse_loss(student, teacher)
        else:
            soft = self.temperature**2 * functional.kl_div(
                functional.log_softmax(student / self.temperature, dim=1),
                functional.log_softmax(teacher / self.temperature, dim=1),
                reduction="batchmean",
                log_target=True,
            )
        return self.alpha * hard + (1 - self.alpha) * soft, hard, soft

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return L_VKD, a float32 scalar.

        Args:
            student_logits: [B, C].
            teacher_logits: [B, C]; a constant.
            labels: [B], as for ``hard_label_loss``.

        Raises:
            TypeError: Class labels are not integers.
            ValueError: Shapes do not fit, or a label is no class.
        """
        return self.components(student_logits, teacher_logits, labels)[0]
