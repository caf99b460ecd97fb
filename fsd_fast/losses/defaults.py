"""The defaults of the losses: one place for the modules and for the flags of ``distill``.

``pad_features`` alone differs by intent: the modules follow the paper ("include"), ``distill`` leaves padding out
("exclude").
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Reduction = Literal["mean_log", "log_mean"]


class LossDefaults(NamedTuple):
    """Weights and settings of L = L_VKD + beta (gamma_i L_I + gamma_l L_L + gamma_g L_G) [eq. 1-11]."""

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
    reduction: Reduction = "mean_log"
    """Of L_I over the samples: the paper's."""


DEFAULTS = LossDefaults()
