"""The flags of a training method: which one, its weights and its settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from fsd_fast.commands.flags import flag
from fsd_fast.commands.values import Range
from fsd_fast.losses import DEFAULTS, METHODS, LossSettings
from fsd_fast.losses.defaults import BACKEND, METHOD

# The squares that Adam keeps of gradients weighted like this stay within float32.
_WEIGHTS = Range(minimum=0, maximum=1e6)


@dataclass
class LossArguments:
    """The loss: a method, its weights and its settings."""

    method: str = flag(
        "The loss. Letters i, l, g of the fsd methods stand for the structures L_I, L_L, L_G. A method refuses the "
        "settings that it does not read.",
        METHOD,
        choices=tuple(METHODS),
    )
    layer_pairs: str | None = flag(
        "Hidden states compared by L_I, L_L, pkd and rkd: 'penultimate', 'layerwise', or a list 'T:S,T:S'. L_G "
        "always uses the penultimate pair. Default: 'layerwise' for pkd, else 'penultimate'.",
        None,
    )
    alpha: float = flag(
        "Weight of the hard labels in L_VKD.", DEFAULTS.alpha, numbers=Range(minimum=0, maximum=1)
    )
    temperature: float = flag(
        "Temperature tau of L_VKD.", DEFAULTS.temperature, numbers=Range(minimum=1e-3, maximum=1e6)
    )
    beta: float = flag("Weight of the structures against L_VKD.", DEFAULTS.beta, numbers=_WEIGHTS)
    gamma_i: float = flag("Weight of L_I.", DEFAULTS.gamma_i, numbers=_WEIGHTS)
    gamma_l: float = flag("Weight of L_L.", DEFAULTS.gamma_l, numbers=_WEIGHTS)
    gamma_g: float = flag("Weight of L_G.", DEFAULTS.gamma_g, numbers=_WEIGHTS)
    gamma_m: float = flag(
        "Weight of the Euclidean term in L_G against the cosine term.",
        DEFAULTS.gamma_m,
        numbers=Range(minimum=0, maximum=1),
    )
    intra_reduction: Literal["mean_log", "log_mean"] = flag(
        "L_I: mean over samples of -log CKA (the paper), or -log of the mean CKA (the released code).",
        DEFAULTS.intra_reduction,
    )
    measure: Literal["cka", "gram"] = flag(
        "How L_I and L_L compare structures. cka: -log CKA (the paper). gram: the squared distance of normalised Gram "
        "matrices.",
        DEFAULTS.measure,
    )
    estimator: Literal["biased", "unbiased"] = flag(
        "CKA in L_I and L_L. biased: the paper's. unbiased: 1 - CKA from the unbiased estimator of HSIC.",
        DEFAULTS.estimator,
    )
    distance_scale: Literal["none", "mean"] = flag(
        "Distances in L_G. none: as they are (the paper). mean: divided by their mean, on each side; L_G then is of "
        "the other losses' size, and gamma_g near 1 fits.",
        DEFAULTS.distance_scale,
    )
    structure_schedule: Literal["constant", "linear", "cosine"] = flag(
        "Weight of all terms beside L_VKD over the training, after the warm-up: constant, or falling to 0.",
        DEFAULTS.structure_schedule,
    )
    structure_warmup_ratio: float = flag(
        "Part of the training in which that weight rises linearly from 0 to 1.",
        DEFAULTS.structure_warmup_ratio,
        numbers=Range(minimum=0, maximum=1),
    )
    pkd_weight: float = flag(
        "Weight of pkd's normalised [CLS] states against L_VKD.", DEFAULTS.pkd_weight, numbers=_WEIGHTS
    )
    rkd_distance_weight: float = flag(
        "Weight of rkd's distances against L_VKD; 0 leaves them out.",
        DEFAULTS.rkd_distance_weight,
        numbers=_WEIGHTS,
    )
    rkd_angle_weight: float = flag(
        "Weight of rkd's angles against L_VKD; 0 leaves them out.",
        DEFAULTS.rkd_angle_weight,
        numbers=_WEIGHTS,
    )
    minilm_weight: float = flag(
        "Weight of minilm's self-attention relations against L_VKD.", DEFAULTS.minilm_weight, numbers=_WEIGHTS
    )
    minilm_relation_heads: int = flag(
        "Relation heads of minilm; a divisor of the widths of both models.",
        DEFAULTS.minilm_relation_heads,
        numbers=Range(minimum=1),
    )
    gather_features: bool = flag(
        "Compare the samples of all processes: the structures are then those of one process with the joined batch. "
        "Without it each of n processes compares its own samples, and L_L is the mean over n batches.",
        DEFAULTS.gather_features,
    )
    backend: Literal["auto", "triton", "eager", "reference"] = flag(
        "Kernels of the structure losses.", BACKEND
    )

    def settings(self) -> LossSettings:
        """The weights and settings of the losses."""
        return LossSettings(*(getattr(self, name) for name in LossSettings._fields))


def check_settings(method: str, *groups: Any) -> None:
    """Check that no flag is changed that a method does not read though others do.

    Args:
        method: A key of ``METHODS``.
        *groups: Dataclasses of flags.

    Raises:
        ValueError: One is; the message names the methods that read it.
    """
    for group in groups:
        for field in dataclasses.fields(group):
            readers = [name for name, entry in METHODS.items() if field.name in entry.settings]
            value = getattr(group, field.name)
            if readers and method not in readers and value != field.default:
                raise ValueError(
                    f"{field.name}: method {method!r} does not read it, but {', '.join(readers)}; expected the default "
                    f"{field.default!r}, got {value!r}"
                )
