"""The losses of feature structure distillation, as modules named as in the paper.

    L_VKD = alpha CE(z_S, labels) + (1 - alpha) tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau))    [eq. 1-3]
    L_I   = mean_i -log CKA(X_i, Y_i)              tokens of one sample against each other            [eq. 6]
    L_L   = -log CKA(h_T, h_S)                     samples of the batch against each other            [eq. 7]
    L_G   = gamma_m F^E + (1 - gamma_m) F^C + F_MM samples and centroids of two memories              [eq. 8-10]
    L     = L_VKD + beta (gamma_i L_I + gamma_l L_L + gamma_g L_G)                                    [eq. 11]

Features are hidden states ``[B, S, D]``: B samples, S tokens, D hidden; h is a sample flattened to S * D.
The teacher's features and memory are constants. CKA of linear kernels is never negative, so the paper's
absolute value around it changes nothing and is not computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsd_kernels import GramBasis, InterStructure, frozen_gram, inter_structure, intra_cka

PadFeatures = Literal["include", "exclude"]
Reduction = Literal["mean_log", "log_mean"]
Features = Tensor | Sequence[Tensor]

METHODS: dict[str, tuple[bool, bool, bool]] = {
    "vkd": (False, False, False),
    "fsd_i": (True, False, False),
    "fsd_l": (False, True, False),
    "fsd_g": (False, False, True),
    "fsd_il": (True, True, False),
    "fsd_ilg": (True, True, True),
}
"""Method name -> whether it uses (L_I, L_L, L_G)."""


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _check_unit(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a weight in [0, 1], got {value}")


def _as_layers(name: str, features: Features) -> list[Tensor]:
    layers = [features] if isinstance(features, Tensor) else list(features)
    if not layers:
        raise ValueError(f"{name}: expected [B, S, D] features or a sequence of them, got an empty sequence")
    for layer in layers:
        if not isinstance(layer, Tensor):
            raise TypeError(f"{name}: expected tensors [B, S, D], got {type(layer).__name__}")
        if layer.ndim != 3:
            raise ValueError(f"{name}: expected features [B, S, D], got shape {list(layer.shape)}")
    return layers


def _pairs(student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
    students, teachers = _as_layers("student", student), _as_layers("teacher", teacher)
    if len(students) != len(teachers):
        raise ValueError(f"teacher: expected {len(students)} layers like the student, got {len(teachers)}")
    for own, given in zip(students, teachers, strict=True):
        if own.shape[:2] != given.shape[:2]:
            raise ValueError(
                f"teacher: expected [B, S, D] with B, S = {list(own.shape[:2])} like the student, "
                f"got {list(given.shape)}"
            )
    return list(zip(students, teachers, strict=True))


class _StructureLoss(nn.Module):
    """What the structure losses share: the padding policy and the backend."""

    def __init__(self, pad_features: PadFeatures, backend: str) -> None:
        super().__init__()
        _check_choice("pad_features", pad_features, get_args(PadFeatures))
        self.pad_features = pad_features
        self.backend = backend

    def _mask(self, attention_mask: Tensor | None) -> Tensor | None:
        return attention_mask if self.pad_features == "exclude" else None

    def extra_repr(self) -> str:
        """Show the settings in repr."""
        return f"pad_features={self.pad_features!r}, backend={self.backend!r}"


class IntraFeatureLoss(_StructureLoss):
    """L_I: how the tokens of one sample relate to each other, compared by CKA.

    "mean_log" is the paper's mean_i -log CKA_i [eq. 6]. "log_mean" is the released code's
    -log(mean_i CKA_i + 1e-8), which by Jensen's inequality is never larger.

    Args:
        reduction: "mean_log" or "log_mean".
        pad_features: "include": all S positions are rows. "exclude": only positions with attention mask 1 are.
        backend: "auto", "triton", "eager" or "reference".

    Raises:
        ValueError: ``reduction`` or ``pad_features`` is none of the named values.
    """

    def __init__(
        self,
        reduction: Reduction = "mean_log",
        pad_features: PadFeatures = "include",
        backend: str = "auto",
    ) -> None:
        super().__init__(pad_features, backend)
        _check_choice("reduction", reduction, get_args(Reduction))
        self.reduction = reduction

    def forward(self, student: Features, teacher: Features, attention_mask: Tensor | None = None) -> Tensor:
        """Return the loss, a float32 scalar (float64 for float64 features).

        Args:
            student: [B, S, D_s], or a sequence of such layers, over which the loss is averaged.
            teacher: [B, S, D_t], or as many layers; a constant.
            attention_mask: [B, S], 1 = keep; used under pad_features="exclude".

        A sample without structure (fewer than two rows, or equal rows) and an empty batch contribute 0.

        Raises:
            TypeError: Features are not floating tensors.
            ValueError: Shapes, devices or the numbers of layers do not fit.
        """
        pairs = _pairs(student, teacher)
        if pairs[0][0].shape[0] == 0:
            return sum(
                (own.float().sum() for own, _ in pairs), start=torch.zeros((), device=pairs[0][0].device)
            )
        students, teachers = [own for own, _ in pairs], [given for _, given in pairs]
        cka = intra_cka(students, teachers, self._mask(attention_mask), backend=self.backend)
        if self.reduction == "mean_log":
            return cka.neg_log.mean()
        distance = cka.distance.mean(dim=1)
        # Near CKA = 1 the logarithm of 1 - distance would round; near CKA = 0, 1e-8 - 1 would, to -1.
        near = distance < 0.5
        log1p = torch.log1p(1e-8 - torch.where(near, distance, 0.0))
        log = torch.log(torch.where(near, 1.0, 1 - distance) + 1e-8)
        return -torch.where(near, log1p, log).mean()


class LocalInterFeatureLoss(_StructureLoss):
    """L_L = -log CKA(h_T, h_S): how the samples of a batch relate to each other [eq. 7].

    Args:
        pad_features: "include": all S positions count. "exclude": positions with attention mask 0 count as zeros.
        backend: "auto", "triton", "eager" or "reference".

    Raises:
        ValueError: ``pad_features`` is none of the named values.
    """

    def __init__(self, pad_features: PadFeatures = "include", backend: str = "auto") -> None:
        super().__init__(pad_features, backend)

    def forward(self, student: Features, teacher: Features, attention_mask: Tensor | None = None) -> Tensor:
        """Return the loss, a float32 scalar (float64 for float64 features).

        Args:
            student: [B, S, D_s], or a sequence of such layers, over which the loss is averaged.
            teacher: [B, S, D_t], or as many layers; a constant.
            attention_mask: [B, S], 1 = keep; used under pad_features="exclude".

        Raises:
            TypeError: Features are not floating tensors.
            ValueError: The batch has one sample (nothing to compare it with), or shapes, devices or the
                numbers of layers do not fit.
        """
        pairs = _pairs(student, teacher)
        if pairs[0][0].shape[0] == 1:
            raise ValueError(
                "student: L_L compares the samples of a batch and needs at least 2, got a batch of 1"
            )
        mask = self._mask(attention_mask)
        values = [inter_structure(own, given, mask=mask, backend=self.backend).local for own, given in pairs]
        return values[0] if len(values) == 1 else torch.stack(values).mean()


class GlobalInterFeatureOutput(NamedTuple):
    """What ``GlobalInterFeatureLoss`` returns; scalars."""

    loss: Tensor
    """L_G = gamma_m F^E + (1 - gamma_m) F^C + F_MM."""
    memory_cka: Tensor
    """F_MM = -log CKA of the two memories."""
    distance: Tensor
    """F^E, the mean squared difference of Euclidean distances between samples and centroids."""
    cosine: Tensor
    """F^C, the mean squared difference of cosine similarities between samples and centroids."""


class GlobalInterFeatureLoss(_StructureLoss):
    """L_G = gamma_m F^E + (1 - gamma_m) F^C + F_MM: samples against the memory of the training set [eq. 8-10].

    Args:
        gamma_m: Weight of the Euclidean term against the cosine term, in [0, 1].
        pad_features: "include": all S positions count and features are as wide as the memories. "exclude":
            positions with attention mask 0 count as zeros, and features padded only to their batch's longest
            sample end in zeros.
        backend: "auto", "triton", "eager" or "reference".

    Raises:
        ValueError: ``gamma_m`` or ``pad_features`` is out of range.
    """

    def __init__(
        self, gamma_m: float = 0.5, pad_features: PadFeatures = "include", backend: str = "auto"
    ) -> None:
        super().__init__(pad_features, backend)
        _check_unit("gamma_m", gamma_m)
        self.gamma_m = gamma_m
        self._known: tuple[weakref.ref[Tensor], int, GramBasis] | None = None

    def _basis(self, memory: Tensor, student: Tensor) -> GramBasis:
        """The teacher memory with its own block of Gamma, computed once for as long as it stays unchanged."""
        known = self._known
        if torch.compiler.is_compiling():
            # A compiled graph cannot see whether the memory changed since, so it computes the block every time.
            basis = frozen_gram(memory, backend=self.backend)
        elif known is not None and known[0]() is memory and known[1] == memory._version:
            basis = known[2]
        else:
            basis = frozen_gram(memory, backend=self.backend)
            self._known = (weakref.ref(memory), memory._version, basis)
        return basis if student.dtype != torch.float64 else GramBasis(basis.memory, basis.gram.double())

    def structures(
        self,
        student: Tensor,
        student_memory: Tensor,
        teacher: Tensor,
        teacher_memory: Tensor,
        attention_mask: Tensor | None = None,
    ) -> InterStructure:
        """Return F_MM, F^E, F^C and, from the same pass over the features, L_L. Arguments as in ``forward``."""
        ((student, teacher),) = _pairs(student, teacher)
        for name, memory, features in (
            ("student_memory", student_memory, student),
            ("teacher_memory", teacher_memory, teacher),
        ):
            width = features.shape[1] * features.shape[2]
            fits = memory.ndim == 2 and (
                memory.shape[1] == width
                if self.pad_features == "include"
                else memory.shape[1] >= width and memory.shape[1] % features.shape[2] == 0
            )
            if not fits:
                raise ValueError(
                    f"{name}: expected [K, S * D] = [K, {width}] for features {list(features.shape)} under "
                    f"pad_features={self.pad_features!r}, got {list(memory.shape)}"
                )
        if student_memory.shape[0] != teacher_memory.shape[0]:
            raise ValueError(
                f"student_memory: expected {teacher_memory.shape[0]} centroids like teacher_memory, "
                f"got {student_memory.shape[0]}"
            )
        return inter_structure(
            student,
            teacher,
            student_memory,
            self._basis(teacher_memory, student),
            self._mask(attention_mask),
            backend=self.backend,
        )

    def combine(self, structures: InterStructure) -> GlobalInterFeatureOutput:
        """Weigh F_MM, F^E and F^C into L_G."""
        loss = (
            self.gamma_m * structures.distance
            + (1 - self.gamma_m) * structures.cosine
            + structures.memory_cka
        )
        return GlobalInterFeatureOutput(loss, structures.memory_cka, structures.distance, structures.cosine)

    def forward(
        self,
        student: Tensor,
        student_memory: Tensor,
        teacher: Tensor,
        teacher_memory: Tensor,
        attention_mask: Tensor | None = None,
    ) -> GlobalInterFeatureOutput:
        """Return L_G and its three terms.

        Args:
            student: [B, S, D_s].
            student_memory: [K, S * D_s], trained along with the student.
            teacher: [B, S, D_t]; a constant.
            teacher_memory: [K, S * D_t]; a constant. What L_G needs of it alone is computed once and kept.
            attention_mask: [B, S], 1 = keep; used under pad_features="exclude".

        Raises:
            TypeError: An argument is not a floating tensor.
            ValueError: Shapes or devices do not fit; the message names the memory and the width expected.
        """
        return self.combine(self.structures(student, student_memory, teacher, teacher_memory, attention_mask))


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

    def __init__(self, alpha: float = 0.5, temperature: float = 10.0) -> None:
        super().__init__()
        _check_unit("alpha", alpha)
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
        if labels.shape != student_logits.shape[:1]:
            raise ValueError(f"labels: expected [B] = [{len(student_logits)}], got {list(labels.shape)}")
        own, given = student_logits.float(), teacher_logits.detach().float()
        if own.shape[1] == 1:
            hard = functional.mse_loss(own[:, 0], labels.to(own.dtype))
            soft = functional.mse_loss(own, given)
        else:
            if labels.is_floating_point():
                raise TypeError(f"labels: expected class numbers (an integer dtype), got {labels.dtype}")
            hard = functional.cross_entropy(own, labels)
            soft = self.temperature**2 * functional.kl_div(
                functional.log_softmax(own / self.temperature, dim=1),
                functional.log_softmax(given / self.temperature, dim=1),
                reduction="batchmean",
                log_target=True,
            )
        return self.alpha * hard + (1 - self.alpha) * soft, hard, soft

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return L_VKD, a float32 scalar.

        Args:
            student_logits: [B, C].
            teacher_logits: [B, C]; a constant.
            labels: [B], class numbers; for C = 1 the targets.

        Raises:
            TypeError: Class labels are not integers.
            ValueError: Shapes do not fit.
        """
        return self.components(student_logits, teacher_logits, labels)[0]


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
        pad_features: "include" or "exclude", for all structures.
        backend: "auto", "triton", "eager" or "reference".

    Raises:
        ValueError: A name is unknown (the known ones are listed) or a weight is out of range.
    """

    def __init__(
        self,
        method: str = "fsd_ilg",
        *,
        alpha: float = 0.5,
        temperature: float = 10.0,
        beta: float = 4.0,
        gamma_i: float = 1.0,
        gamma_l: float = 1.0,
        gamma_g: float = 1e-3,
        gamma_m: float = 0.5,
        reduction: Reduction = "mean_log",
        pad_features: PadFeatures = "include",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_choice("method", method, list(METHODS))
        for name, weight in (
            ("beta", beta),
            ("gamma_i", gamma_i),
            ("gamma_l", gamma_l),
            ("gamma_g", gamma_g),
        ):
            if not weight >= 0:
                raise ValueError(f"{name}: expected a weight >= 0, got {weight}")
        self.method = method
        self.uses_intra, self.uses_local, self.uses_global = METHODS[method]
        self.beta, self.gamma_i, self.gamma_l, self.gamma_g = beta, gamma_i, gamma_l, gamma_g
        self.logits = LogitDistillationLoss(alpha, temperature)
        self.intra = IntraFeatureLoss(reduction, pad_features, backend)
        self.local = LocalInterFeatureLoss(pad_features, backend)
        self.global_ = GlobalInterFeatureLoss(gamma_m, pad_features, backend)

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

        Raises:
            TypeError: An argument is not of the expected kind.
            ValueError: Something that the method needs is missing, or shapes do not fit.
        """
        loss, hard, soft = self.logits.components(student_logits, teacher_logits, labels)
        components = {"loss_vkd": loss, "loss_hard": hard, "loss_soft": soft}
        structures = torch.zeros_like(loss)
        pairs = _pairs(student_features, teacher_features) if self.uses_intra or self.uses_local else []
        shared: Tensor | None = None
        if self.uses_global:
            needed = (student_penultimate, student_memory, teacher_penultimate, teacher_memory)
            if any(tensor is None for tensor in needed):
                raise ValueError(
                    f"method {self.method!r} uses L_G: expected student_penultimate, student_memory, "
                    "teacher_penultimate and teacher_memory"
                )
            read = self.global_.structures(*needed, attention_mask)  # type: ignore[arg-type]
            output, shared = self.global_.combine(read), read.local
            structures = structures + self.gamma_g * output.loss
            components |= {
                "loss_global": output.loss,
                "global_memory_cka": output.memory_cka,
                "global_distance": output.distance,
                "global_cosine": output.cosine,
            }
        if self.uses_intra:
            intra = self.intra([own for own, _ in pairs], [given for _, given in pairs], attention_mask)
            structures = structures + self.gamma_i * intra
            components["loss_intra"] = intra
        if self.uses_local:
            terms = []
            for own, given in pairs:
                if shared is not None and own is student_penultimate and given is teacher_penultimate:
                    terms.append(shared)
                elif own.shape[0] == 1:
                    terms.append(torch.zeros_like(loss))
                else:
                    terms.append(self.local(own, given, attention_mask))
            local = terms[0] if len(terms) == 1 else torch.stack(terms).mean()
            structures = structures + self.gamma_l * local
            components["loss_local"] = local
        loss = loss + self.beta * structures
        return FeatureStructureOutput(loss, {name: value.detach() for name, value in components.items()})
