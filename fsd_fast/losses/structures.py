"""The structure losses, as modules named as in the paper.

    L_I = mean_i -log CKA(X_i, Y_i)              tokens of one sample against each other             [eq. 6]
    L_L = -log CKA(h_S, h_T)                     samples of the batch against each other             [eq. 7]
    L_G = gamma_m F^E + (1 - gamma_m) F^C + F_MM samples and centroids of two memories               [eq. 8-10]

Features are hidden states ``[B, S, D]``: B samples, S tokens, D hidden; h is a sample flattened to S * D.
The teacher's features and memory are constants. CKA of linear kernels is never negative, so the paper's
absolute value around it changes nothing and is not computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fsd_fast.losses._checks import check_choice, check_unit_interval
from fsd_fast.losses.defaults import BACKEND, DEFAULTS, DistanceScale, Estimator, Measure, Reduction
from fsd_fast.losses.distances import scaled_structures
from fsd_fast.losses.gather import Gathers, joined_inter_structure, mean_over_processes, own_positions
from fsd_fast.losses.measures import check_measure, intra_losses, local_loss
from fsd_kernels import GramBasis, InterStructure, frozen_gram, inter_structure, intra_cka

PadFeatures = Literal["include", "exclude"]
Features = Tensor | Sequence[Tensor]


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


def pair_layers(student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
    """Pair the student's layers with the teacher's, checked: [B, S, D_s] and [B, S, D_t] each."""
    students, teachers = _as_layers("student", student), _as_layers("teacher", teacher)
    if len(students) != len(teachers):
        raise ValueError(f"teacher: expected {len(students)} layers like the student, got {len(teachers)}")
    for student_layer, teacher_layer in zip(students, teachers, strict=True):
        if student_layer.shape[:2] != teacher_layer.shape[:2]:
            raise ValueError(
                f"teacher: expected [B, S, D] with B, S = {list(student_layer.shape[:2])} like the student, "
                f"got {list(teacher_layer.shape)}"
            )
    return list(zip(students, teachers, strict=True))


class _StructureLoss(Gathers, nn.Module):
    """What the structure losses share: padding policy, backend, and whether the batches of processes are joined."""

    def __init__(self, pad_features: PadFeatures, backend: str) -> None:
        super().__init__()
        check_choice("pad_features", pad_features, get_args(PadFeatures))
        self.pad_features = pad_features
        self.backend = backend

    def _mask(self, attention_mask: Tensor | None) -> Tensor | None:
        return attention_mask if self.pad_features == "exclude" else None

    @property
    def _inter_structure(self) -> Callable[..., InterStructure]:
        return joined_inter_structure if self.gather else inter_structure

    def extra_repr(self) -> str:
        """Show the settings in repr."""
        return f"pad_features={self.pad_features!r}, backend={self.backend!r}, gather={self.gather}"


class _MeasuredLoss(_StructureLoss):
    """What L_I and L_L share: how two structures are compared."""

    def __init__(
        self, pad_features: PadFeatures, backend: str, measure: Measure, estimator: Estimator
    ) -> None:
        super().__init__(pad_features, backend)
        check_choice("measure", measure, get_args(Measure))
        check_choice("estimator", estimator, get_args(Estimator))
        check_measure(measure, estimator)
        self.measure: Measure = measure
        self.estimator: Estimator = estimator

    @property
    def is_neg_log_cka(self) -> bool:
        """Whether structures are compared by -log CKA, as in the paper."""
        return (self.measure, self.estimator) == ("cka", "biased")

    def extra_repr(self) -> str:
        """Show the settings in repr."""
        return f"{super().extra_repr()}, measure={self.measure!r}, estimator={self.estimator!r}"


class IntraFeatureLoss(_MeasuredLoss):
    """L_I: how the tokens of one sample relate to each other.

    "mean_log" is the paper's mean_i -log CKA_i [eq. 6]. "log_mean" is the released code's
    -log(mean_i CKA_i + 1e-8), which by Jensen's inequality is never larger. With another measure or estimator the loss
    is the mean over samples of what ``fsd_fast.losses.measures`` says.

    Args:
        reduction: "mean_log" or "log_mean".
        pad_features: "include": all S positions are rows. "exclude": only positions with attention mask 1 are.
        backend: "auto", "triton", "eager" or "reference".
        measure: "cka", or "gram", the squared distance of normalised Gram matrices.
        estimator: "biased" (the paper), or "unbiased": CKA from the unbiased estimator of HSIC.

    Raises:
        ValueError: A setting is none of the named values, or two do not go together.
    """

    def __init__(
        self,
        reduction: Reduction = DEFAULTS.intra_reduction,
        pad_features: PadFeatures = "include",
        backend: str = BACKEND,
        *,
        measure: Measure = DEFAULTS.measure,
        estimator: Estimator = DEFAULTS.estimator,
    ) -> None:
        super().__init__(pad_features, backend, measure, estimator)
        check_choice("reduction", reduction, get_args(Reduction))
        if not self.is_neg_log_cka:
            if reduction == "log_mean":
                raise ValueError(
                    f"reduction: 'log_mean' is a mean of CKA; expected 'mean_log' with measure {measure!r} and "
                    f"estimator {estimator!r}"
                )
            if backend == "triton":
                raise ValueError(
                    f"backend: L_I with measure {measure!r} and estimator {estimator!r} has no Triton kernel; expected "
                    "auto, eager or reference, got 'triton'"
                )
        self.reduction = reduction

    def forward(self, student: Features, teacher: Features, attention_mask: Tensor | None = None) -> Tensor:
        """Return the loss, a float32 scalar (float64 for float64 features).

        Args:
            student: [B, S, D_s], or a sequence of such layers, over which the loss is averaged.
            teacher: [B, S, D_t], or as many layers; a constant.
            attention_mask: [B, S], 1 = keep; used under pad_features="exclude".

        A sample without structure and an empty batch contribute 0. Fewer than two rows (four for the unbiased
        estimator) and equal rows have none; for measure "gram" only rows of zeros.

        Raises:
            TypeError: Features are not floating tensors.
            ValueError: Shapes, devices or the numbers of layers do not fit.
        """
        pairs = pair_layers(student, teacher)
        if pairs[0][0].shape[0] == 0:
            return sum(
                (layer.float().sum() for layer, _ in pairs), start=torch.zeros((), device=pairs[0][0].device)
            )
        if not self.is_neg_log_cka:
            mask = self._mask(attention_mask)
            losses = [intra_losses(*pair, mask, self.measure, self.backend) for pair in pairs]
            return torch.stack(losses).mean()
        students, teachers = zip(*pairs, strict=True)
        cka = intra_cka(students, teachers, self._mask(attention_mask), backend=self.backend)
        if self.reduction == "mean_log":
            return cka.neg_log.mean()
        one_minus_cka = cka.one_minus_cka.mean(dim=1)
        if self.gather:
            one_minus_cka = mean_over_processes(one_minus_cka, cka.one_minus_cka.shape[1])
        # Near CKA = 1 the logarithm of CKA would round; near CKA = 0, 1e-8 - 1 would, to -1.
        near = one_minus_cka < 0.5
        log1p = torch.log1p(1e-8 - torch.where(near, one_minus_cka, 0.0))
        log = torch.log(torch.where(near, 1.0, 1 - one_minus_cka) + 1e-8)
        return -torch.where(near, log1p, log).mean()


class LocalInterFeatureLoss(_MeasuredLoss):
    """L_L = -log CKA(h_S, h_T): how the samples of a batch relate to each other [eq. 7].

    With another measure or estimator it is what ``fsd_fast.losses.measures`` says.

    Args:
        pad_features: "include": all S positions count. "exclude": positions with attention mask 0 count as zeros.
        backend: "auto", "triton", "eager" or "reference".
        measure: "cka", or "gram", the squared distance of normalised Gram matrices.
        estimator: "biased" (the paper), or "unbiased": CKA from the unbiased estimator of HSIC.

    Raises:
        ValueError: A setting is none of the named values, or two do not go together.
    """

    def __init__(
        self,
        pad_features: PadFeatures = "include",
        backend: str = BACKEND,
        *,
        measure: Measure = DEFAULTS.measure,
        estimator: Estimator = DEFAULTS.estimator,
    ) -> None:
        super().__init__(pad_features, backend, measure, estimator)

    @property
    def minimum_batch(self) -> int:
        """Samples below which there is no structure to compare: HSIC_1 needs four, the others two."""
        return 4 if self.estimator == "unbiased" else 2

    def forward(self, student: Features, teacher: Features, attention_mask: Tensor | None = None) -> Tensor:
        """Return the loss, a float32 scalar (float64 for float64 features).

        The unbiased estimator sees no structure in fewer than four samples: the loss is 0 there.

        Args:
            student: [B, S, D_s], or a sequence of such layers, over which the loss is averaged.
            teacher: [B, S, D_t], or as many layers; a constant.
            attention_mask: [B, S], 1 = keep; used under pad_features="exclude".

        Raises:
            TypeError: Features are not floating tensors.
            ValueError: The batch has one sample (nothing to compare it with), or shapes, devices or the
                numbers of layers do not fit.
        """
        pairs = pair_layers(student, teacher)
        if pairs[0][0].shape[0] == 1 and not self.gather:
            raise ValueError(
                "student: L_L compares the samples of a batch and needs at least 2, got a batch of 1"
            )
        mask = self._mask(attention_mask)
        if self.is_neg_log_cka:
            values = [self._inter_structure(*pair, mask=mask, backend=self.backend).local for pair in pairs]
        else:
            values = [local_loss(*pair, mask, self.measure, self.backend, self.gather) for pair in pairs]
        return values[0] if len(values) == 1 else torch.stack(values).mean()


class GlobalInterFeatureOutput(NamedTuple):
    """What ``GlobalInterFeatureLoss`` returns; scalars."""

    loss: Tensor
    """L_G = gamma_m F^E + (1 - gamma_m) F^C + F_MM."""
    memory: Tensor
    """F_MM = -log CKA of the two memories."""
    distance: Tensor
    """F^E, the mean squared difference of Euclidean distances between samples and centroids."""
    cosine: Tensor
    """F^C, the mean squared difference of cosine similarities between samples and centroids."""


class GlobalInterFeatureLoss(_StructureLoss):
    """L_G = gamma_m F^E + (1 - gamma_m) F^C + F_MM: samples against the memory of the training set [eq. 8-10].

    Unless ``backend`` is "reference", the cosine of a sample and a centroid counts as 0 if one is more than 1024 times
    (in float32) as long as the other.

    Args:
        gamma_m: Weight of the Euclidean term against the cosine term, in [0, 1].
        pad_features: "include": all S positions count and features are as wide as the memories. "exclude":
            positions with attention mask 0 count as zeros, and features padded only to their batch's longest
            sample end in zeros.
        backend: "auto", "triton", "eager" or "reference".
        distance_scale: "none" (the paper), or "mean": in F^E distances are divided by their mean over samples and
            centroids, on each side.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        gamma_m: float = DEFAULTS.gamma_m,
        pad_features: PadFeatures = "include",
        backend: str = BACKEND,
        *,
        distance_scale: DistanceScale = DEFAULTS.distance_scale,
    ) -> None:
        super().__init__(pad_features, backend)
        check_unit_interval("gamma_m", gamma_m)
        check_choice("distance_scale", distance_scale, get_args(DistanceScale))
        self.gamma_m = gamma_m
        self.distance_scale = distance_scale
        self._cached_basis: tuple[weakref.ref[Tensor], int, GramBasis] | None = None

    def _basis(self, memory: Tensor, student: Tensor, teacher: Tensor) -> GramBasis:
        """The teacher memory with its own block of Gamma, computed once for as long as it stays unchanged.

        Where processes join their batches, it is that of this process's columns.
        """
        cached = self._cached_basis
        if torch.compiler.is_compiling():
            # A compiled graph cannot see whether the memory changed since, so it computes the block every time.
            basis = self._frozen_gram(memory, teacher)
        elif cached is not None and cached[0]() is memory and cached[1] == memory._version:
            basis = cached[2]
        else:
            basis = self._frozen_gram(memory, teacher)
            self._cached_basis = (weakref.ref(memory), memory._version, basis)
        return basis if student.dtype != torch.float64 else GramBasis(basis.memory, basis.gram.double())

    def _frozen_gram(self, memory: Tensor, teacher: Tensor) -> GramBasis:
        rows = own_positions(memory, teacher.shape[2]) if self.gather else memory
        return frozen_gram(rows, backend=self.backend)

    def structures(
        self,
        student: Tensor,
        student_memory: Tensor,
        teacher: Tensor,
        teacher_memory: Tensor,
        attention_mask: Tensor | None = None,
    ) -> InterStructure:
        """Return F_MM, F^E, F^C and, from the same pass over the features, L_L. Arguments as in ``forward``."""
        ((student, teacher),) = pair_layers(student, teacher)
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
        basis, mask = self._basis(teacher_memory, student, teacher), self._mask(attention_mask)
        if self.distance_scale == "none":
            return self._inter_structure(student, teacher, student_memory, basis, mask, backend=self.backend)
        return scaled_structures(student, teacher, student_memory, basis, mask, self.backend, self.gather)

    def combine(self, structures: InterStructure) -> GlobalInterFeatureOutput:
        """Weigh F_MM, F^E and F^C into L_G."""
        loss = self.gamma_m * structures.distance + (1 - self.gamma_m) * structures.cosine + structures.memory
        return GlobalInterFeatureOutput(loss, structures.memory, structures.distance, structures.cosine)

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
