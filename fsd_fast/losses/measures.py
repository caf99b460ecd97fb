"""Other measures of two structures, read off the same Gram matrices as CKA.

K and L are the Gram matrices of teacher and student over n rows: the tokens of a sample, or the samples of a batch.

    measure="cka", estimator="unbiased":  1 - CKA_1,   CKA_1 = <K_u, L_u> / (|K_u| |L_u|)
    measure="gram":                       |K / |K| - L / |L||^2

K_u is K with its diagonal set to 0 and U-centred: for i != j, with r the row sums and s the sum of all entries,

    K_u,ij = K_ij - (r_i + r_j) / (n - 2) + s / ((n - 1)(n - 2))

<K_u, L_u> / (n (n - 3)) is HSIC_1, the unbiased estimator of HSIC (Song, Smola, Gretton, Bedo, Borgwardt, JMLR 2012).
With many more features than rows CKA is near 1 even for rows that have nothing to do with each other, since K and L
both approach a multiple of the identity; CKA_1 is 0 on average there. It may be negative, and so its loss is 1 - CKA_1,
from 0 to 2, in place of -log CKA.

The Gram distance is that of the normalised feature Gram matrices, after the idea of Bhattarai et al. (arXiv
2509.25253). Rows are not centred: their inner products themselves are compared. With centred rows it would be
2 (1 - CKA).

Both are computed as squared distances of matrices of norm 1, so that nothing cancels where student and teacher agree.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fsd_fast.losses import reference
from fsd_fast.losses.defaults import Estimator, Measure
from fsd_fast.losses.gather import gammas
from fsd_kernels import resolve_backend

# Entries of the Gram matrices of tokens that are in memory at once: more, and the backward computes them again.
_MOST_ENTRIES = 2**21


class Structure(NamedTuple):
    """Gram matrices of n rows each, [P, n, n], and what tells structure from rounding."""

    gram: Tensor
    """Products of the rows: of centred ones for CKA. Dropped rows are 0."""
    exists: Tensor
    """[P]: False where the rows are equal up to rounding."""


def check_measure(measure: Measure, estimator: Estimator) -> None:
    """Check that a measure has an estimator.

    Raises:
        ValueError: It has not.
    """
    if measure == "gram" and estimator == "unbiased":
        raise ValueError("estimator: measure 'gram' has no 'unbiased' form; expected 'biased'")


def _unit(matrices: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices [P, n, n] divided by their norms, and which have a norm above ``rounding`` [P]; 0 where not."""
    # Dividing by the largest entry first keeps fourth powers of the features within range.
    largest = matrices.detach().abs().amax(dim=(1, 2), keepdim=True)
    scaled = matrices / torch.where(largest == 0, 1.0, largest)
    squares = scaled.square().sum(dim=(1, 2))
    # A comparison with NaN is false: what is not finite exists, and the loss is NaN.
    vanishes = (squares.detach().sqrt() * largest[:, 0, 0] <= rounding) | (squares.detach() == 0)
    norm = torch.where(vanishes, 1.0, squares).sqrt()
    return scaled / norm[:, None, None], ~vanishes


def _squared_distance(
    student: Tensor, teacher: Tensor, exists: Tensor, rounding: tuple[Tensor, Tensor]
) -> Tensor:
    """|K / |K| - L / |L||^2 of [P, n, n], [P]; 0, without a gradient, where one of them vanishes."""
    own, own_exists = _unit(student, rounding[0])
    given, given_exists = _unit(teacher, rounding[1])
    defined = exists & own_exists & given_exists
    difference = torch.where(defined[:, None, None], own - given, 0.0)
    return difference.square().sum(dim=(1, 2))


def _u_centred(grams: Tensor, kept: Tensor) -> Tensor:
    """K_u of [P, n, n] over the kept rows, kept [P, n]; 0 for fewer than four of them."""
    pairs = kept[:, :, None] & kept[:, None]
    pairs = pairs & ~torch.eye(kept.shape[1], dtype=torch.bool, device=kept.device)
    number = kept.sum(dim=1)[:, None].to(grams.dtype)
    enough = (number >= 4)[..., None]
    number = torch.where(number >= 4, number, 4.0)
    hollow = torch.where(pairs, grams, 0.0)
    rows = hollow.sum(dim=2) / (number - 2)
    level = hollow.sum(dim=(1, 2))[:, None, None] / ((number - 1) * (number - 2))[..., None]
    return torch.where(pairs & enough, hollow - rows[:, :, None] - rows[:, None] + level, 0.0)


def _compare(student: Structure, teacher: Structure, kept: Tensor, measure: Measure, eps: float) -> Tensor:
    """The loss of each pair of Gram matrices, [P]."""
    exists = student.exists & teacher.exists
    if measure == "gram":
        nothing = student.gram.new_zeros(len(student.gram))
        return _squared_distance(student.gram, teacher.gram, exists, (nothing, nothing))
    sizes = [side.gram.detach().flatten(1) for side in (student, teacher)]
    rounding = tuple(64 * eps * torch.linalg.vector_norm(size, dim=1) for size in sizes)
    own, given = _u_centred(student.gram, kept), _u_centred(teacher.gram, kept)
    return _squared_distance(own, given, exists, (rounding[0], rounding[1])) / 2


def _eps(features: Tensor) -> float:
    return torch.finfo(torch.float64 if features.dtype == torch.float64 else torch.float32).eps


def _has_structure(energy: Tensor, mean_energy: Tensor, rows: Tensor, eps: float) -> Tensor:
    """False where the centred energy of rows is rounding of their mean's, as for CKA."""
    return ~(energy.detach() <= (8 * eps) ** 2 * rows * mean_energy.detach())


def _token_structure(features: Tensor, kept: Tensor, measure: Measure, eps: float) -> Structure:
    """Gram matrices of the tokens of [b, S, D]."""
    rows = features if features.dtype == torch.float64 else features.float()
    rows = torch.where(kept[..., None], rows, 0.0)
    if measure == "gram":
        grams = rows @ rows.transpose(1, 2)
        return Structure(grams, kept.any(dim=1))
    number = kept.sum(dim=1).clamp(min=1)
    mean = rows.sum(dim=1, keepdim=True) / number[:, None, None]
    rows = torch.where(kept[..., None], rows - mean, 0.0)
    grams = rows @ rows.transpose(1, 2)
    energy = grams.diagonal(dim1=1, dim2=2).sum(dim=1)
    return Structure(grams, _has_structure(energy, mean.square().sum(dim=(1, 2)), number, eps))


def _token_losses(student: Tensor, teacher: Tensor, kept: Tensor, measure: Measure) -> Tensor:
    """The loss of each sample of [b, S, D_s] and [b, S, D_t], [b]."""
    eps = _eps(student)
    own = _token_structure(student, kept, measure, eps)
    given = _token_structure(teacher.to(own.gram.dtype), kept, measure, eps)
    return _compare(own, given, kept, measure, eps)


def intra_losses(
    student: Tensor, teacher: Tensor, mask: Tensor | None, measure: Measure, backend: str
) -> Tensor:
    """The loss of each sample, [B], whose rows are its kept tokens.

    Args:
        student: [B, S, D_s], differentiable.
        teacher: [B, S, D_t]; a constant.
        mask: [B, S], 1 = keep; None keeps all.
        measure: "cka" (its unbiased estimator) or "gram".
        backend: "reference" for the plain formulas, anything else for batched products.
    """
    teacher = teacher.detach()
    kept = (
        torch.ones(student.shape[:2], dtype=torch.bool, device=student.device) if mask is None else mask != 0
    )
    with torch.autocast(student.device.type, enabled=False):
        if resolve_backend(backend, student.device, "gram") == "reference":
            plain = reference.gram_distance if measure == "gram" else reference.unbiased_cka_loss
            return torch.stack(
                [plain(x[k], y[k].to(x.dtype)) for x, y, k in zip(student, teacher, kept, strict=True)]
            )
        samples = max(1, _MOST_ENTRIES // student.shape[1] ** 2)
        if len(student) <= samples:
            return _token_losses(student, teacher, kept, measure)
        chunks = zip(student.split(samples), teacher.split(samples), kept.split(samples), strict=True)
        return torch.cat(
            [checkpoint(_token_losses, *chunk, measure, use_reentrant=False) for chunk in chunks]
        )


def _sample_structure(gamma: Tensor, measure: Measure, eps: float) -> Structure:
    """The Gram matrix of a batch's samples from that of ``gram``: centred rows, then their mean."""
    centred, to_mean, mean = gamma[:-1, :-1], gamma[-1, :-1], gamma[-1, -1]
    if measure == "gram":
        raw = centred + to_mean[:, None] + to_mean + mean
        return Structure(raw[None], torch.ones(1, dtype=torch.bool, device=gamma.device))
    energy = centred.diagonal().sum()
    number = torch.full_like(mean, len(centred))
    return Structure(centred[None], _has_structure(energy, mean, number, eps)[None])


def local_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None, measure: Measure, backend: str, gather: bool
) -> Tensor:
    """The loss of a batch whose rows are its flattened samples; a scalar.

    Args:
        student: [B, S, D_s], differentiable.
        teacher: [B, S, D_t]; a constant.
        mask: [B, S], 1 = keep: other positions count as zeros; None keeps all.
        measure: "cka" (its unbiased estimator) or "gram".
        backend: Of the Gram matrices: "auto", "triton", "eager" or "reference".
        gather: Whether the batch is that of all processes together.
    """
    teacher = teacher.detach()
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    if not gather and resolve_backend(backend, student.device, "gram") == "reference":
        if mask is not None:
            dropped = (mask == 0)[..., None]
            student, teacher = student.masked_fill(dropped, 0.0), teacher.masked_fill(dropped, 0.0)
        plain = reference.gram_distance if measure == "gram" else reference.unbiased_cka_loss
        with torch.autocast(student.device.type, enabled=False):
            return plain(student.flatten(1).to(dtype), teacher.flatten(1).to(dtype))
    eps = _eps(student)
    own, given = (
        _sample_structure(gamma, measure, eps)
        for gamma in gammas(student, teacher, mask=mask, backend=backend, gather=gather)
    )
    kept = torch.ones(own.gram.shape[:2], dtype=torch.bool, device=student.device)
    return _compare(own, given, kept, measure, eps)[0].to(dtype)
