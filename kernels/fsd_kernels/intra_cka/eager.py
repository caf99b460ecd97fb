"""Intra-feature CKA from restructured torch operations, with the backward written by hand.

Per layer pair and sample, with K_T the teacher's and K_S the student's centred Gram matrix:

    R = K_T - rho K_S,  rho = <K_T, K_S> / |K_S|^2      (Frobenius products: R is what K_S does not explain)
    |K_T|^2 = rho^2 |K_S|^2 + |R|^2,   CKA = rho |K_S| / |K_T|
    1 - CKA = (|R| / |K_T|)^2 / (1 + CKA)               no difference of two numbers near 1
    G = d CKA / d K_S = R / (|K_T| |K_S|)
    dY = 2 c G Y,   c = -(d loss / d(1 - CKA)) - (d loss / d(-log CKA)) / CKA

Features are multiplied first and their Gram matrix is centred, so that they are read once. This would lose digits if
the mean token had more energy than the differences between tokens; the tokens of such a sample are centred before they
are multiplied. Float32 gradients then stay within about 1e-5 unless CKA is near 1. Gram matrices are symmetric: strips
of one triangle are copied to the other.

The backward need not centre Y because the rows of G sum to zero; ``_balance`` restores that after rounding. G
[P, B, S, S] is kept for the backward. Arithmetic is float32 (float64 for float64 features).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fsd_kernels._numerics import (
    CKA_FLOOR,
    MAXIMUM_ENERGY_RATIO,
    NEG_LOG_FLOORED,
    compute_dtype,
    rounding_energy,
)

# Elements of one side's features per chunk: large chunks mean fewer operations, small ones stay in the cache.
_CHUNK_ELEMENTS = 1 << 22
# Elements of features whose strips are multiplied one after the other, so that all strips find them in the cache.
_CACHED_ELEMENTS = 3 << 19
# Columns of a strip of a Gram matrix: narrower strips compute fewer entries twice, but run more slowly.
_STRIP = 32
# Gram matrices are scaled if the trace of a sample's centred one lies outside this range.
_SAFE = 1e-3, 1e12
# A trace below 2^-e counts as 0, because G grows as the trace shrinks. No Gram matrix is divided by more than 2^e.
_EXPONENT = {torch.float32: 120, torch.float64: 1000}


def _chunks(batch: int, elements: int, maximum: int) -> list[slice]:
    """Cut ``batch`` samples into about equal chunks of at most ``maximum`` elements, given the elements per sample."""
    count = max(1, min(batch, -(-batch * elements // maximum)))
    step = max(1, -(-batch // count))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def _view(buffer: Tensor, *shape: int) -> Tensor:
    """The beginning of a flat buffer as a tensor of ``shape``."""
    return buffer[: math.prod(shape)].view(shape)


def strips(rows: int) -> list[slice]:
    """The strips of columns in which a Gram matrix [rows, rows] is computed, each down to the diagonal."""
    return [slice(start, min(start + _STRIP, rows)) for start in range(0, rows, _STRIP)]


def pieces(features: Tensor) -> Iterator[tuple[slice, slice]]:
    """The (samples, strip) in which the Gram matrices of features [b, S, D] are computed, in order."""
    batch, rows, width = features.shape
    for samples in _chunks(batch, rows * width, _CACHED_ELEMENTS):
        for strip in strips(rows):
            yield samples, strip


def _grams(grams: Tensor, sides: Sequence[Tensor]) -> None:
    """Write the Gram matrices [n, b, S, S] of n features [b, S, D]."""
    cuts = strips(grams.shape[-1])
    # Writing into a slice of ``grams`` would make bmm multiply the samples one by one. All products come before all
    # copies, because a product leaves nothing else in the caches.
    products = {
        cut.start: grams.new_empty((*grams.shape[:2], cut.stop, cut.stop - cut.start)) for cut in cuts
    }
    for side, features in enumerate(sides):
        for samples, cut in pieces(features):
            left, right = features[samples, : cut.stop], features[samples, cut]
            torch.bmm(left, right.mT, out=products[cut.start][side, samples])
    for cut in cuts:
        product = products[cut.start]
        grams[:, :, : cut.stop, cut] = product
        grams[:, :, cut, : cut.start] = product[:, :, : cut.start].mT


def _count(kept: Tensor | None, rows: int) -> Tensor | int:
    """The number of rows that a mean is taken over: [b, 1, 1] with a mask."""
    return rows if kept is None else kept.sum(dim=1).clamp(min=1)[:, None, None]


def _trace(grams: Tensor) -> Tensor:
    """The traces of [..., S, S]."""
    return grams.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def _likely_has_offset(features: Tensor, kept: Tensor | None) -> bool:
    """True if most samples of [b, S, D] should be centred first, judged by about 8 tokens in about 8 samples."""
    batch, rows, _ = features.shape
    some = slice(None, None, max(1, batch // 8)), slice(None, None, max(1, rows // 8))
    tokens = features[some].float()
    counts = [max(2, tokens.shape[1])] * len(tokens)
    if kept is not None:
        tokens = tokens.masked_fill(~kept[some][:, :, None], 0.0)
        counts = kept[some].sum(dim=1).clamp(min=2).tolist()
    norms = torch.linalg.vector_norm(tokens, dim=(1, 2)).tolist()
    sums = torch.linalg.vector_norm(tokens.sum(dim=1), dim=1).tolist()
    with_offset = [
        norm**2 > MAXIMUM_ENERGY_RATIO * (norm**2 - total**2 / count) * (count / (count - 1))
        for norm, total, count in zip(norms, sums, counts, strict=True)
    ]
    return 2 * sum(with_offset) > len(with_offset)


def _grams_of_centred(gram: Tensor, features: Tensor, kept: Tensor | None) -> Tensor:
    """Write the Gram matrices [b, S, S] of [b, S, D], centring the rows first; return |mean row|^2, [b]."""
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
    _grams(gram[None], [centred])
    return mean.square().sum(dim=(1, 2))


def _column_means(grams: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean columns [..., S, 1] and means [..., 1, 1] of symmetric [..., S, S], over the kept entries."""
    if kept is None:
        column = grams.mean(dim=-1, keepdim=True)
        # The mean over no rows is 0, not NaN.
        return column, column.mean(dim=-2, keepdim=True) if grams.shape[-1] else column.sum(
            dim=-2, keepdim=True
        )
    count = _count(kept, grams.shape[-1])
    column = grams.sum(dim=-1, keepdim=True) / count
    return column, column.sum(dim=-2, keepdim=True) / count


def _recompute_centred(
    gram: Tensor, features: Tensor, kept: Tensor | None, samples: list[int]
) -> tuple[list[float], list[float]]:
    """Replace the Gram matrices of some samples in [b, S, S] by those of centred rows.

    Returns their traces and |mean row|^2.
    """
    recomputed = gram.new_empty((len(samples), *gram.shape[1:]))
    removed = _grams_of_centred(recomputed, features[samples], None if kept is None else kept[samples])
    gram[samples] = recomputed
    return _trace(recomputed).tolist(), removed.tolist()


def _centred_grams(
    grams: Tensor, sides: tuple[Tensor, Tensor], kept: Tensor | None
) -> tuple[list[list[float]], list[bool], list[bool]]:
    """Write the centred Gram matrices [2, b, S, S] of two sides [b, S, D].

    Returns their traces, for each sample if both sides have structure, and if both are finite. Numbers per sample are
    Python's, because operations on such small tensors take longer.
    """
    samples, rows = grams.shape[1:3]
    counts = [rows] * samples if kept is None else kept.sum(dim=1).clamp(min=1).tolist()
    dropped = None if kept is None else ~(kept[:, :, None] & kept[:, None, :])
    centre_first = _likely_has_offset(sides[0], kept)
    if centre_first:
        removed = [_grams_of_centred(g, x, kept).tolist() for g, x in zip(grams, sides, strict=True)]
    else:
        removed = [[0.0] * samples for _ in sides]
        _grams(grams, [features.to(grams.dtype) for features in sides])
        if dropped is not None:
            grams.masked_fill_(dropped, 0.0)
    column, mean = _column_means(grams, kept)
    uncentred, means = _trace(grams).tolist(), mean.flatten(1).tolist()
    traces = [
        [trace - count * mean_energy for trace, count, mean_energy in zip(*side, strict=True)]
        for side in ((uncentred[0], counts, means[0]), (uncentred[1], counts, means[1]))
    ]
    if not centre_first:
        # The samples of each side that must be centred after all: their mean outweighs the differences of their tokens.
        offset = [
            [
                i
                for i, trace in enumerate(traces[side])
                if not uncentred[side][i] <= MAXIMUM_ENERGY_RATIO * trace
            ]
            for side in range(2)
        ]
        for side, indices in enumerate(offset):
            if indices:
                found = _recompute_centred(grams[side], sides[side], kept, indices)
                for i, trace, mean_energy in zip(indices, *found, strict=True):
                    traces[side][i], removed[side][i], means[side][i] = trace, mean_energy, 0.0
        if any(offset):
            column, mean = _column_means(grams, kept)
    grams -= column
    grams += mean - column.mT
    if dropped is not None:
        grams.masked_fill_(dropped, 0.0)
    floor, minimum = rounding_energy(grams.dtype), math.ldexp(1.0, -_EXPONENT[grams.dtype])
    energies = [
        [
            count * (left + taken)
            for count, left, taken in zip(counts, means[side], removed[side], strict=True)
        ]
        for side in range(2)
    ]
    has_structure = [
        [trace > max(minimum, floor * energy) for trace, energy in zip(*side, strict=True)]
        for side in zip(traces, energies, strict=True)
    ]
    finite = [math.isfinite(sum(numbers)) for numbers in zip(*traces, *energies, strict=True)]
    defined = [all(flags) for flags in zip(finite, *has_structure, strict=True)]
    return traces, defined, finite


def _scale(grams: Tensor, traces: list[list[float]], defined: list[bool]) -> list[float]:
    """Multiply Gram matrices [2, b, S, S] by powers of 2 if a trace asks for it; return the student's factors.

    This keeps the fourth powers of the features from overflow and underflow. It is one more pass, which few need.
    """
    checked = (
        trace for side in traces for trace, is_defined in zip(side, defined, strict=True) if is_defined
    )
    if all(_SAFE[0] < trace < _SAFE[1] for trace in checked):
        return [1.0] * len(defined)
    maximum = _EXPONENT[grams.dtype]
    powers = [
        [
            math.ldexp(1.0, -min(maximum, math.frexp(trace)[1])) if is_defined else 1.0
            for trace, is_defined in zip(side, defined, strict=True)
        ]
        for side in traces
    ]
    grams *= grams.new_tensor(powers)[..., None, None]
    return powers[1]


def _products(grams: Tensor) -> list[list[float]]:
    """<K_T, K_S> and |K_S|^2 of each sample of [2, b, S, S], summed in float64 over groups of at most 8 rows.

    Equal matrices have equal products, so that rho is exactly 1 and R exactly 0.
    """
    samples, rows = grams.shape[1:3]
    group = math.gcd(rows, 8)
    groups = grams.view(2, samples * (rows // group), group * rows).transpose(0, 1)
    products = torch.bmm(groups, groups.mT)[:, :, 1].view(samples, rows // group, 2)
    return products.sum(dim=1, dtype=torch.float64).T.tolist()


def _balance(gram: Tensor, kept: Tensor | None) -> None:
    """Subtract from every row of [b, S, S] the mean over kept columns that rounding left in it.

    Even a mean of that size would bring a large offset common to all tokens back into the gradient.
    """
    means, _ = _column_means(gram, kept)
    gram -= means if kept is None else means * kept[:, None]


def _results(
    defined: list[bool], products: list[list[float]], rest_norms: list[float], factors: list[float]
) -> list[tuple[float, float, float]]:
    """(1 - CKA, -log CKA, factor that turns R into G) of each sample; 0 without structure.

    ``products`` are <K_T, K_S> and |K_S|^2, ``rest_norms`` |R|, ``factors`` the powers of 2 of the student's scaling.
    """
    found = []
    for is_defined, product, student_square, rest_norm, factor in zip(
        defined, *products, rest_norms, factors, strict=True
    ):
        if not is_defined:
            found.append((0.0, 0.0, 0.0))
            continue
        student_norm = math.sqrt(student_square)
        teacher_norm = math.hypot(product / student_norm, rest_norm)
        cka = product / (student_norm * teacher_norm)
        one_minus_cka = (rest_norm / teacher_norm) ** 2 / (1 + cka)
        neg_log = -math.log1p(-one_minus_cka) if one_minus_cka < 0.5 else -math.log(max(cka, CKA_FLOOR))
        found.append((one_minus_cka, neg_log, factor / (teacher_norm * student_norm)))
    return found


def forward(
    students: Sequence[Tensor], teachers: Sequence[Tensor], mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (1 - CKA [P, B], -log CKA [P, B], G [P, B, S, S])."""
    batch, rows = students[0].shape[:2]
    pairs = len(students)
    gradient = students[0].new_empty((pairs, batch, rows, rows), dtype=compute_dtype(students[0]))
    values: list[tuple[float, float]] = []
    for p, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        chunks = _chunks(batch, rows * max(student.shape[2], teacher.shape[2]), _CHUNK_ELEMENTS)
        buffer = gradient.new_empty(2 * (chunks[0].stop if chunks else 0) * rows**2)
        for samples in chunks:
            kept = None if mask is None else mask[samples]
            grams, result = _view(buffer, 2, samples.stop - samples.start, rows, rows), gradient[p, samples]
            traces, defined, finite = _centred_grams(grams, (teacher[samples], student[samples]), kept)
            factors = _scale(grams, traces, defined)
            products = _products(grams)
            rho = [
                product / student_square if is_defined else 0.0
                for is_defined, product, student_square in zip(defined, *products, strict=True)
            ]
            torch.addcmul(grams[0], grams[1], result.new_tensor(rho)[:, None, None], value=-1, out=result)
            rest_norms = torch.linalg.vector_norm(result.flatten(1), dim=1).tolist()
            found = _results(defined, products, rest_norms, factors)
            if not all(finite):
                found = [each if good else (math.nan,) * 3 for each, good in zip(found, finite, strict=True)]
            values += [each[:2] for each in found]
            result *= result.new_tensor([factor for *_, factor in found])[:, None, None]
            _balance(result, kept)
    one_minus_cka, neg_log = gradient.new_tensor(values).view(pairs, batch, 2).unbind(dim=2)
    return one_minus_cka.contiguous(), neg_log.contiguous(), gradient


def coefficients(neg_log: Tensor, d_one_minus_cka: Tensor | None, d_neg_log: Tensor | None) -> Tensor:
    """c [P, B]: minus the losses' derivatives by CKA.

    d(1 - CKA) = -d CKA and d(-log CKA) = -d CKA / CKA. On the floor -log CKA is constant.
    """
    coefficient = torch.zeros_like(neg_log) if d_one_minus_cka is None else -d_one_minus_cka
    if d_neg_log is not None:
        floored = neg_log >= NEG_LOG_FLOORED
        coefficient = coefficient - torch.where(floored, 0.0, d_neg_log * torch.exp(neg_log))
    return coefficient


def backward(
    students: Sequence[Tensor],
    mask: Tensor | None,
    gradient: Tensor,
    neg_log: Tensor,
    d_one_minus_cka: Tensor | None,
    d_neg_log: Tensor | None,
) -> list[Tensor]:
    """Return dY [B, S, D] per layer pair: 2 c G Y; the rows of G sum to 0. None: a loss without derivative."""
    coefficient = coefficients(neg_log, d_one_minus_cka, d_neg_log)
    results = []
    for p, student in enumerate(students):
        result = torch.empty_like(student, memory_format=torch.contiguous_format)
        for samples in _chunks(len(student), student.shape[1] * student.shape[2], _CHUNK_ELEMENTS):
            features = student[samples].to(gradient.dtype)
            if mask is not None:
                features = features.masked_fill(~mask[samples, :, None], 0.0)
            weighted = gradient[p, samples] * (2 * coefficient[p, samples])[:, None, None]
            if result.dtype == features.dtype:
                torch.bmm(weighted, features, out=result[samples])
            else:
                result[samples] = torch.bmm(weighted, features)
            # NaN of a kept row reaches the dropped rows too, as 0 times NaN.
            if mask is not None and not bool(coefficient[p, samples].isfinite().all()):
                result[samples].masked_fill_(~mask[samples, :, None], 0.0)
        results.append(result)
    return results
