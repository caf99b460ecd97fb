"""The weights and settings of all methods, with their defaults: one place for the losses and for the flags.

``pad_features`` alone differs by intent: the modules follow the paper ("include"), ``distill`` leaves padding out
("exclude").
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Reduction = Literal["mean_log", "log_mean"]
Measure = Literal["cka", "gram"]
Estimator = Literal["biased", "unbiased"]
DistanceScale = Literal["none", "mean"]
ScheduleKind = Literal["constant", "linear", "cosine"]


class LossSettings(NamedTuple):
    """Weights and settings of L_VKD, of the structures and of the baselines; a method reads some of them.

    L = L_VKD + beta (gamma_i L_I + gamma_l L_L + gamma_g L_G) [eq. 1-11] is the paper's method. The baselines add
    their own terms to L_VKD, see ``fsd_fast.losses.baselines``.
    """

    alpha: float = 0.5
    """Of the hard labels in L_VKD."""
    temperature: float = 10.0
    """tau of L_VKD."""
    beta: float = 4.0
    """Of the structures against L_VKD."""
    gamma_i: float = 1.0
    """Of L_I."""
    gamma_l: float = 1.0
    """Of L_L."""
    gamma_g: float = 1e-4
    """Of L_G, whose Euclidean term is four to five orders of magnitude larger than the other losses."""
    gamma_m: float = 0.5
    """Of the Euclidean term in L_G against the cosine term."""
    intra_reduction: Reduction = "mean_log"
    """Of L_I over the samples: the paper's."""
    measure: Measure = "cka"
    """Of L_I and L_L: the paper's."""
    estimator: Estimator = "biased"
    """Of CKA in L_I and L_L: the paper's."""
    distance_scale: DistanceScale = "none"
    """Of the distances in L_G: the paper's."""
    structure_schedule: ScheduleKind = "constant"
    """Of the weight of all terms beside L_VKD over the training: the paper's."""
    structure_warmup_ratio: float = 0.0
    """Part of the training in which that weight rises from 0."""
    pkd_weight: float = 100.0
    """Of PKD's patient term: beta of Sun et al. (2019), who choose it from 10, 100, 500 and 1000."""
    rkd_distance_weight: float = 25.0
    """Of RKD's distance-wise term: lambda of Park et al. (2019) for classification."""
    rkd_angle_weight: float = 50.0
    """Of RKD's angle-wise term: lambda of Park et al. (2019) for classification."""
    minilm_weight: float = 1.0
    """Of MiniLM's self-attention relations."""
    minilm_relation_heads: int = 48
    """Relation heads of MiniLM: Wang et al. (2021), for teachers of BERT-base's size."""
    gather_features: bool = False
    """Whether the structures go over the samples of all processes."""


DEFAULTS = LossSettings()
METHOD = "fsd_ilg"
"""The method by default: all structures."""
BACKEND = "auto"
"""The backend by default: Triton kernels on a GPU, torch operations elsewhere."""
