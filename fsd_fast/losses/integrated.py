"""The integrated loss, and the methods that are parts of it [paper, eq. 11]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fsd_fast.losses._checks import check_choice, check_weights
from fsd_fast.losses.defaults import BACKEND, DEFAULTS, METHOD, DistanceScale, Estimator, Measure, Reduction
from fsd_fast.losses.logits import LogitDistillationLoss
from fsd_fast.losses.structures import (
    Features,
    GlobalInterFeatureLoss,
    IntraFeatureLoss,
    LocalInterFeatureLoss,
    PadFeatures,
    pair_layers,
)
from fsd_fast.sections import section

STRUCTURES: dict[str, tuple[bool, bool, bool]] = {
    "vkd": (False, False, False),
    "fsd_i": (True, False, False),
    "fsd_l": (False, True, False),
    "fsd_g": (False, False, True),
    "fsd_il": (True, True, False),
    "fsd_ilg": (True, True, True),
}
"""Method of the paper -> whether it uses (L_I, L_L, L_G)."""


class FeatureStructureOutput(NamedTuple):
    """What ``FeatureStructureLoss`` returns."""

    loss: Tensor
    """The integrated loss L."""
    components: dict[str, Tensor]
    """Every term by name, detached scalars: those of L_VKD, and of the structures that the method uses."""


class FeatureStructureLoss(nn.Module):
    """L = L_VKD + beta (gamma_i L_I + gamma_l L_L + gamma_g L_G) [eq. 11].

    Args:
        method: "vkd", "fsd_i", "fsd_l", "fsd_g", "fsd_il" or "fsd_ilg": which structures are used.
        alpha: Weight of the hard labels in L_VKD.
        temperature: tau of L_VKD.
        beta: Weight of the structures against L_VKD.
        gamma_i: Weight of L_I.
        gamma_l: Weight of L_L.
        gamma_g: Weight of L_G.
        gamma_m: Weight of the Euclidean term in L_G.
        reduction: "mean_log" or "log_mean", for L_I.
        pad_features: "include" (the paper's, the default of the modules) or "exclude" (the default of ``distill``),
            for all structures.
        backend: "auto", "triton", "eager" or "reference".
        measure: "cka" or "gram", for L_I and L_L.
        estimator: "biased" or "unbiased", for L_I and L_L.
        distance_scale: "none" or "mean", for L_G.

    Raises:
        ValueError: A name is unknown (the known ones are listed) or a weight is out of range.
    """

    def __init__(
        self,
        method: str = METHOD,
        *,
        alpha: float = DEFAULTS.alpha,
        temperature: float = DEFAULTS.temperature,
        beta: float = DEFAULTS.beta,
        gamma_i: float = DEFAULTS.gamma_i,
        gamma_l: float = DEFAULTS.gamma_l,
        gamma_g: float = DEFAULTS.gamma_g,
        gamma_m: float = DEFAULTS.gamma_m,
        reduction: Reduction = DEFAULTS.intra_reduction,
        pad_features: PadFeatures = "include",
        backend: str = BACKEND,
        measure: Measure = DEFAULTS.measure,
        estimator: Estimator = DEFAULTS.estimator,
        distance_scale: DistanceScale = DEFAULTS.distance_scale,
    ) -> None:
        super().__init__()
        check_choice("method", method, list(STRUCTURES))
        check_weights(beta=beta, gamma_i=gamma_i, gamma_l=gamma_l, gamma_g=gamma_g)
        self.method = method
        self.uses_intra, self.uses_local, self.uses_global = STRUCTURES[method]
        self.beta, self.gamma_i, self.gamma_l, self.gamma_g = beta, gamma_i, gamma_l, gamma_g
        self.logits = LogitDistillationLoss(alpha, temperature)
        self.intra = IntraFeatureLoss(reduction, pad_features, backend, measure=measure, estimator=estimator)
        self.local = LocalInterFeatureLoss(pad_features, backend, measure=measure, estimator=estimator)
        self.global_ = GlobalInterFeatureLoss(gamma_m, pad_features, backend, distance_scale=distance_scale)

    def extra_repr(self) -> str:
        """Show the settings in repr."""
        return (
            f"method={self.method!r}, beta={self.beta}, gamma_i={self.gamma_i}, gamma_l={self.gamma_l}, "
            f"gamma_g={self.gamma_g}"
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        student_features: Features = (),
        teacher_features: Features = (),
        attention_mask: Tensor | None = None,
        *,
        student_penultimate: Tensor | None = None,
        teacher_penultimate: Tensor | None = None,
        student_memory: Tensor | None = None,
        teacher_memory: Tensor | None = None,
        structure_weight: Tensor | float = 1.0,
    ) -> FeatureStructureOutput:
        """Return the integrated loss and every component.

        In a batch of one sample there is nothing to compare it with: L_L is 0 there.

        Args:
            student_logits: [B, C].
            teacher_logits: [B, C]; a constant.
            labels: [B].
            student_features: [B, S, D_s] or a sequence of layers, for L_I and L_L (averaged over layers).
            teacher_features: [B, S, D_t] or as many layers; a constant.
            attention_mask: [B, S], 1 = keep.
            student_penultimate: [B, S, D_s], for L_G. Where the very same tensors are among the features, L_L
                and L_G share one pass over them.
            teacher_penultimate: [B, S, D_t], for L_G; a constant.
            student_memory: [K, S * D_s], for L_G; trained.
            teacher_memory: [K, S * D_t], for L_G; a constant.
            structure_weight: A further factor of beta, as a schedule gives it.

        Raises:
            TypeError: An argument is not of the expected kind.
            ValueError: Something that the method needs is missing, or shapes do not fit.
        """
        with section("loss_vkd"):
            loss, hard, soft = self.logits.components(student_logits, teacher_logits, labels)
        components = {"loss_vkd": loss, "loss_hard": hard, "loss_soft": soft}
        structures = torch.zeros_like(loss)
        pairs = pair_layers(student_features, teacher_features) if self.uses_intra or self.uses_local else []
        shared: Tensor | None = None
        if self.uses_global:
            needed = (student_penultimate, student_memory, teacher_penultimate, teacher_memory)
            if any(tensor is None for tensor in needed):
                raise ValueError(
                    f"method {self.method!r} uses L_G: expected student_penultimate, student_memory, "
                    "teacher_penultimate and teacher_memory"
                )
            with section("loss_global"):
                read = self.global_.structures(*needed, attention_mask)  # type: ignore[arg-type]
                output, shared = self.global_.combine(read), read.local
            structures = structures + self.gamma_g * output.loss
            components |= {
                "loss_global": output.loss,
                "global_memory": output.memory,
                "global_distance": output.distance,
                "global_cosine": output.cosine,
            }
        if self.uses_intra:
            with section("loss_intra"):
                intra = self.intra(*zip(*pairs, strict=True), attention_mask)
            structures = structures + self.gamma_i * intra
            components["loss_intra"] = intra
        if self.uses_local:
            terms = []
            for student_layer, teacher_layer in pairs:
                is_penultimate = student_layer is student_penultimate and teacher_layer is teacher_penultimate
                if shared is not None and is_penultimate and self.local.is_neg_log_cka:
                    terms.append(shared)
                elif student_layer.shape[0] == 1 and not self.local.gather:
                    terms.append(torch.zeros_like(loss))
                else:
                    with section("loss_local"):
                        terms.append(self.local(student_layer, teacher_layer, attention_mask))
            local = terms[0] if len(terms) == 1 else torch.stack(terms).mean()
            structures = structures + self.gamma_l * local
            components["loss_local"] = local
        loss = loss + self.beta * structures * structure_weight
        return FeatureStructureOutput(loss, {name: value.detach() for name, value in components.items()})
