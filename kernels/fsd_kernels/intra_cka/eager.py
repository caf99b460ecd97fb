"""Intra-feature CKA from restructured torch operations, with the backward written by hand.

Per layer pair and sample, with K_c = C K C the teacher's and L_c = C L C the student's centred Gram matrix:

    R = K_c - rho L_c,  rho = <K_c, L_c> / |L_c|^2      (Frobenius products: R is what L_c does not explain)
    1 - CKA = (|R| / |K_c|)^2 / (1 + CKA)               no difference of two numbers near 1
    G = d CKA / d L_c = R / (|K_c| |L_c|)
    dY = 2 c G Y,   c = dCKA_upstream - dNegLog_upstream / CKA

The Gram is centred, and not the features, where that loses little: a sample whose mean token would have more energy
than all that sets its tokens apart is centred before it is multiplied. That keeps float32 gradients within about
1e-5 unless CKA is near 1, and features without such an offset are read once. A Gram is symmetric: strips of one
triangle are copied to the other.

The rows of G sum to zero, which is why the backward need not centre Y; ``_balance`` sees to it that they still do
after rounding. G [P, B, S, S] is kept. Arithmetic is in float32 (float64 for float64 features), whatever the
features' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fsd_kernels._numerics import CKA_FLOOR, MOST_ENERGY, compute_dtype, rounding_energy

# Features of one side worked on at once: few chunks make few small operations, small ones stay in the cache.
_CHUNK_ELEMENTS = 1 << 22
# Columns of a strip of a Gram: narrower ones multiply less twice, but more slowly.
_STRIP = 48


def _chunks(batch: int, elements: int) -> list[slice]:
    """Cut ``batch`` samples of so many elements each into about equal parts, the last of them the smallest."""
    parts = max(1, min(batch, -(-batch * elements // _CHUNK_ELEMENTS)))
    step = max(1, -(-batch // parts))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def _view(buffer: Tensor, *shape: int) -> Tensor:
    """The beginning of a flat buffer as a tensor of ``shape``."""
    return buffer[: math.prod(shape)].view(shape)


def strips(rows: int) -> list[slice]:
    """The strips of columns in which a Gram of so many rows is multiplied, each down from the diagonal."""
    return [slice(start, min(start + _STRIP, rows)) for start in range(0, rows, _STRIP)]


def _grams(gram: Tensor, features: Tensor) -> None:
    """Write the Grams [b, S, S] of [b, S, D]."""
    for strip in strips(gram.shape[1]):
        # Into a part of ``gram`` itself bmm would multiply one sample after the other.
        product = torch.bmm(features[:, : strip.stop], features[:, strip].mT)
        gram[:, : strip.stop, strip] = product
        gram[:, strip, : strip.start] = product[:, : strip.start].mT


def _count(kept: Tensor | None, rows: int) -> Tensor | int:
    """How many rows a mean is over: [b, 1, 1], or all of them."""
    return rows if kept is None else kept.sum(dim=1).clamp(min=1)[:, None, None]


def _trace(grams: Tensor) -> Tensor:
    """The traces of [..., S, S]."""
    return grams.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def _likely_has_offset(features: Tensor, kept: Tensor | None) -> bool:
    """Whether most samples of [b, S, D] look like ones to centre first, by about 8 tokens of about 8 of them."""
    batch, rows, _ = features.shape
    some = slice(None, None, max(1, batch // 8)), slice(None, None, max(1, rows // 8))
    tokens = features[some].float()
    count: Tensor | int = max(2, tokens.shape[1])
    if kept is not None:
        tokens = tokens.masked_fill(~kept[some][:, :, None], 0.0)
        count = kept[some].sum(dim=1).clamp(min=2)
    energy = tokens.square().sum(dim=(1, 2))
    own = (energy - tokens.sum(dim=1).square().sum(dim=1) / count) * (count / (count - 1))
    return 2 * int((energy > MOST_ENERGY * own).sum()) > len(tokens)


def _grams_of_centred(gram: Tensor, features: Tensor, kept: Tensor | None) -> Tensor:
    """Write the Grams [b, S, S] of [b, S, D] whose rows are centred first; returns |mean row|^2, [b]."""
    dropped = None if kept is None else ~kept[:, :, None]
    centred = gram.new_empty(features.shape)
    if dropped is not None or features.dtype != gram.dtype:
        features = centred.copy_(features)
    if dropped is not None:
        features.masked_fill_(dropped, 0.0)
    mean = features.sum(dim=1, keepdim=True) / _count(kept, features.shape[1])
    torch.sub(features, mean, out=centred)
    if dropped is not None:
        centred.masked_fill_(dropped, 0.0)
    _grams(gram, centred)
    return mean.square().sum(dim=(1, 2))


def _centred_grams(grams: Tensor, sides: tuple[Tensor, Tensor], kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Write the centred Grams [2, b, S, S] of two [b, S, D]; returns their traces and |mean row|^2, [2, b] each."""
    count = _count(kept, grams.shape[2])
    dropped = None if kept is None else ~(kept[:, :, None] & kept[:, None, :])
    removed: Tensor | float = 0.0
    if _likely_has_offset(sides[0], kept):
        removed = torch.stack([_grams_of_centred(g, x, kept) for g, x in zip(grams, sides, strict=True)])
    else:
        for gram, features in zip(grams, sides, strict=True):
            _grams(gram, features.to(gram.dtype))
        if dropped is not None:
            grams.masked_fill_(dropped, 0.0)
    uncentred = _trace(grams)
    row_mean = grams.sum(dim=3, keepdim=True) / count
    mean_energy = row_mean.sum(dim=2, keepdim=True) / count
    grams -= row_mean
    grams += mean_energy - row_mean.mT
    if dropped is not None:
        grams.masked_fill_(dropped, 0.0)
    energy = _trace(grams)
    mean_energy = mean_energy.flatten(1) + removed
    near = uncentred <= MOST_ENERGY * energy
    if not near.all():
        for side, features in enumerate(sides):
            far = torch.nonzero(~near[side]).flatten()
            again = grams.new_empty((len(far), *grams.shape[2:]))
            own = None if kept is None else kept[far]
            mean_energy[side, far] = _grams_of_centred(again, features[far], own)
            grams[side, far], energy[side, far] = again, _trace(again)
    return energy, mean_energy


def _products(grams: Tensor) -> Tensor:
    """The Frobenius products [b, 2, 2] of Grams [2, b, S, S], summed row by row: shorter sums round less."""
    rows = grams.flatten(1, 2)
    return torch.bmm(rows.transpose(0, 1), rows.permute(1, 2, 0)).unflatten(0, grams.shape[1:3]).sum(dim=1)


def _balance(gram: Tensor, kept: Tensor | None) -> None:
    """Take out of every row of [b, S, S] the mean over kept columns that rounding left in it.

    A mean of the rounding's size would bring back an offset common to all tokens.
    """
    left = gram.sum(dim=2, keepdim=True) / _count(kept, gram.shape[1])
    gram -= left if kept is None else left * kept[:, None]


def forward(
    students: Sequence[Tensor], teachers: Sequence[Tensor], mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (1 - CKA [P, B], -log CKA [P, B], G [P, B, S, S])."""
    batch, rows = students[0].shape[:2]
    pairs = len(students)
    dtype = compute_dtype(students[0])
    rounding = rounding_energy(dtype)
    gradient = students[0].new_empty((pairs, batch, rows, rows), dtype=dtype)
    distance, cka = gradient.new_empty((2, pairs, batch))
    exists = torch.empty_like(distance, dtype=torch.bool)
    for p, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        chunks = _chunks(batch, rows * max(student.shape[2], teacher.shape[2]))
        buffer = gradient.new_empty(2 * (chunks[0].stop if chunks else 0) * rows**2)
        for part in chunks:
            samples = part.stop - part.start
            kept = None if mask is None else mask[part]
            units = _view(buffer, 2, samples, rows, rows)
            energy, mean_energy = _centred_grams(units, (teacher[part], student[part]), kept)
            count = rows if kept is None else kept.sum(dim=1)
            differ = energy > rounding * count * mean_energy
            # Dividing by the trace first keeps the fourth powers of the features out of overflow and underflow.
            units *= torch.where(differ, 1 / energy, 0.0)[..., None, None]
            torch.all(differ, dim=0, out=exists[p, part])
            products = _products(units)
            # Equal Grams have equal products, so rho is exactly 1 and R exactly 0.
            rho = torch.where(exists[p, part], products[:, 0, 1] / products[:, 1, 1], 0.0)
            result = torch.addcmul(units[0], units[1], rho[:, None, None], value=-1, out=gradient[p, part])
            norm = products.diagonal(dim1=1, dim2=2).sqrt()
            torch.div(products[:, 0, 1], norm[:, 0] * norm[:, 1], out=cka[p, part])
            sine = torch.linalg.vector_norm(result.flatten(1), dim=1) / norm[:, 0]
            torch.div(sine.square(), 1 + cka[p, part], out=distance[p, part])
            scale = torch.where(exists[p, part], 1 / (norm[:, 0] * norm[:, 1] * energy[1]), 0.0)
            result *= scale[:, None, None]
            _balance(result, kept)
    near = distance < 0.5
    log1p = -torch.log1p(-torch.where(near, distance, 0.0))
    neg_log = torch.where(near, log1p, -torch.log(cka.clamp(min=CKA_FLOOR)))
    return torch.where(exists, distance, 0.0), torch.where(exists, neg_log, 0.0), gradient


def backward(
    students: Sequence[Tensor], mask: Tensor | None, gradient: Tensor, coefficient: Tensor
) -> list[Tensor]:
    """Return dY [B, S, D] per layer pair: 2 c G Y, with c = ``coefficient`` [P, B] and rows of G that sum to 0."""
    results = []
    for p, student in enumerate(students):
        result = torch.empty_like(student, memory_format=torch.contiguous_format)
        for part in _chunks(len(student), student.shape[1] * student.shape[2]):
            own = student[part].to(gradient.dtype)
            if mask is not None:
                own = own.masked_fill(~mask[part, :, None], 0.0)
            weighted = gradient[p, part] * (2 * coefficient[p, part])[:, None, None]
            if result.dtype == own.dtype:
                torch.bmm(weighted, own, out=result[part])
            else:
                result[part] = torch.bmm(weighted, own)
        results.append(result)
    return results
