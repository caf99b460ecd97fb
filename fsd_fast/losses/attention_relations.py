"""MiniLMv2's self-attention relations (Wang, Bao, Huang, Dong, Wei, Findings of ACL 2021).

    A_r: a layer's queries, keys or values, all heads joined, then split into R relation heads of width d: [S, d] each
    R(A_r) = softmax(A_r A_r^T / sqrt(d))                                                              [S, S]
    L = sum over Q, K, V of  mean over relation heads and tokens t of  KL(R_T[t] || R_S[t])

The second version of MiniLM is used, and not the first (Wang et al., NeurIPS 2020), because relation heads are free of
the models' own heads: teacher and student may differ in width and in number of heads, and a relation is S x S in both.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fsd_fast.losses.objective import Projections


def _log_relations(vectors: Tensor, heads: int, kept: Tensor | None) -> Tensor:
    """Log softmax of the scaled products of [B, S, W], [B, heads, S, S]; over kept tokens alone."""
    batch, rows, width = vectors.shape
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    if kept is not None:
        vectors = vectors.masked_fill(~kept[..., None], 0.0)
    split = vectors.view(batch, rows, heads, width // heads).transpose(1, 2)
    scores = split @ split.transpose(2, 3) / (width // heads) ** 0.5
    if kept is not None:
        scores = scores.masked_fill(~kept[:, None, None], torch.finfo(scores.dtype).min)
    return functional.log_softmax(scores, dim=3)


def _divergence(student: Tensor, teacher: Tensor, heads: int, kept: Tensor | None) -> Tensor:
    """KL(R_T || R_S) of [B, S, W_s] and [B, S, W_t]: mean over heads and kept tokens, then over samples."""
    own, given = (_log_relations(vectors, heads, kept) for vectors in (student, teacher))
    terms = given.exp() * (given.to(own.dtype) - own)
    if kept is None:
        return terms.sum(dim=3).mean()
    rows = terms.masked_fill(~(kept[:, None, None] & kept[:, None, :, None]), 0.0).sum(dim=(1, 2, 3))
    return (rows / (heads * kept.sum(dim=1).clamp(min=1))).mean()


def attention_relation_loss(
    student: Projections, teacher: Projections, heads: int, attention_mask: Tensor | None = None
) -> Tensor:
    """L of MiniLMv2: the sum of the divergences of Q-Q, K-K and V-V relations.

    Args:
        student: Queries, keys and values of one layer, [B, S, W]; differentiable.
        teacher: Those of the teacher, [B, S, W'], W' free; constants.
        heads: R, the number of relation heads; it divides every width.
        attention_mask: [B, S], 1 = keep. Dropped tokens relate to nothing, whatever they hold, as in the models'
            own attention.

    Returns:
        A float32 scalar (float64 for a float64 student).

    Raises:
        ValueError: ``heads`` does not divide a width, or B or S differ.
    """
    kept = None if attention_mask is None else attention_mask != 0
    total = student.query.new_zeros(
        (), dtype=torch.float64 if student.query.dtype == torch.float64 else torch.float32
    )
    with torch.autocast(student.query.device.type, enabled=False):
        for name, own, given in zip(Projections._fields, student, teacher, strict=True):
            if own.shape[:2] != given.shape[:2]:
                raise ValueError(
                    f"teacher.{name}: expected [B, S, W] with B, S = {list(own.shape[:2])} like the student, "
                    f"got {list(given.shape)}"
                )
            for side, vectors in (("student", own), ("teacher", given)):
                if vectors.shape[2] % heads:
                    raise ValueError(
                        f"heads: expected a divisor of {vectors.shape[2]}, the width of {side}.{name}, got {heads}"
                    )
            total = total + _divergence(own, given.detach(), heads, kept)
    return total
