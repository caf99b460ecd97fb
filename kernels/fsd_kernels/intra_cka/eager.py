"""Intra-feature CKA from restructured torch operations, with the backward written by hand.

Per layer pair and sample, with K_c = C K C the teacher's and L_c = C L C the student's centred Gram matrix:

    R = K_c - rho L_c,  rho = <K_c, L_c> / |L_c|^2      (Frobenius products: R is what L_c does not explain)
    |K_c|^2 = rho^2 |L_c|^2 + |R|^2,   CKA = rho |L_c| / |K_c|
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
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fsd_kernels._numerics import CKA_FLOOR, MOST_ENERGY, compute_dtype, rounding_energy

# Features of one side worked on at once: few chunks make few small operations, small ones stay in the cache.
_CHUNK_ELEMENTS = 1 << 22
# Features whose strips are multiplied one after the other: the caches hold what all of them read.
_CACHED_ELEMENTS = 3 << 19
# Columns of a strip of a Gram: narrower ones multiply less twice, but more slowly.
_STRIP = 32
# Where the trace of a sample's centred Gram lies outside, Grams are scaled.
_SAFE = 1e-3, 1e12
# No trace below 2^-e counts as one, for G is as large as it is small, and no Gram is divided by more than 2^e.
_EXPONENT = {torch.float32: 120, torch.float64: 1000}


def _chunks(batch: int, elements: int, most: int) -> list[slice]:
    """Cut ``batch`` samples of so many elements each into about equal parts of ``most``, the last the smallest."""
    parts = max(1, min(batch, -(-batch * elements // most)))
    step = max(1, -(-batch // parts))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def _view(buffer: Tensor, *shape: int) -> Tensor:
    """The beginning of a flat buffer as a tensor of ``shape``."""
    return buffer[: math.prod(shape)].view(shape)


def strips(rows: int) -> list[slice]:
    """The strips of columns in which a Gram of so many rows is multiplied, each down from the diagonal."""
    return [slice(start, min(start + _STRIP, rows)) for start in range(0, rows, _STRIP)]


def pieces(features: Tensor) -> Iterator[tuple[slice, slice]]:
    """The (samples, strip) in which the Grams of [b, S, D] are multiplied, in their order."""
    batch, rows, width = features.shape
    for samples in _chunks(batch, rows * width, _CACHED_ELEMENTS):
        for strip in strips(rows):
            yield samples, strip


def _grams(grams: Tensor, sides: Sequence[Tensor]) -> None:
    """Write the Grams [n, b, S, S] of n features [b, S, D]."""
    cuts = strips(grams.shape[-1])
    # Into a part of ``grams`` itself bmm would multiply one sample after the other. All is multiplied before it is
    # copied: whatever follows a product finds the caches emptied.
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
    counts = [max(2, tokens.shape[1])] * len(tokens)
    if kept is not None:
        tokens = tokens.masked_fill(~kept[some][:, :, None], 0.0)
        counts = kept[some].sum(dim=1).clamp(min=2).tolist()
    norms = torch.linalg.vector_norm(tokens, dim=(1, 2)).tolist()
    sums = torch.linalg.vector_norm(tokens.sum(dim=1), dim=1).tolist()
    with_offset = [
        norm**2 > MOST_ENERGY * (norm**2 - total**2 / count) * (count / (count - 1))
        for norm, total, count in zip(norms, sums, counts, strict=True)
    ]
    return 2 * sum(with_offset) > len(with_offset)


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
    _grams(gram[None], [centred])
    return mean.square().sum(dim=(1, 2))


def _column_means(grams: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean columns [..., S, 1] and the means [..., 1, 1] of symmetric [..., S, S], 0 where dropped."""
    if kept is None:
        column = grams.mean(dim=-1, keepdim=True)
        # The mean of no rows is 0, not NaN.
        return column, column.mean(dim=-2, keepdim=True) if grams.shape[-1] else column.sum(
            dim=-2, keepdim=True
        )
    count = _count(kept, grams.shape[-1])
    column = grams.sum(dim=-1, keepdim=True) / count
    return column, column.sum(dim=-2, keepdim=True) / count


def _centre_far(
    gram: Tensor, features: Tensor, kept: Tensor | None, far: list[int]
) -> tuple[list[float], list[float]]:
    """Replace the Grams of samples ``far`` in [b, S, S], rows centred first; returns their traces and |mean row|^2."""
    again = gram.new_empty((len(far), *gram.shape[1:]))
    removed = _grams_of_centred(again, features[far], None if kept is None else kept[far])
    gram[far] = again
    return _trace(again).tolist(), removed.tolist()


def _centred_grams(
    grams: Tensor, sides: tuple[Tensor, Tensor], kept: Tensor | None
) -> tuple[list[list[float]], list[bool], list[bool]]:
    """Write the centred Grams [2, b, S, S] of two [b, S, D].

    Returns their traces, which samples have structure on both sides, and which are finite on both. One number per
    sample is Python's: a tensor so small takes longer.
    """
    samples, rows = grams.shape[1:3]
    numbers = [rows] * samples if kept is None else kept.sum(dim=1).clamp(min=1).tolist()
    dropped = None if kept is None else ~(kept[:, :, None] & kept[:, None, :])
    guessed = _likely_has_offset(sides[0], kept)
    if guessed:
        removed = [_grams_of_centred(g, x, kept).tolist() for g, x in zip(grams, sides, strict=True)]
    else:
        removed = [[0.0] * samples for _ in sides]
        _grams(grams, [features.to(grams.dtype) for features in sides])
        if dropped is not None:
            grams.masked_fill_(dropped, 0.0)
    column, mean = _column_means(grams, kept)
    uncentred, means = _trace(grams).tolist(), mean.flatten(1).tolist()
    traces = [
        [trace - n * mean_energy for trace, n, mean_energy in zip(*side, strict=True)]
        for side in ((uncentred[0], numbers, means[0]), (uncentred[1], numbers, means[1]))
    ]
    if not guessed:
        # Of each side the samples that must be centred after all: their mean outweighs what sets their tokens apart.
        far = [
            [i for i, trace in enumerate(own) if not uncentred[side][i] <= MOST_ENERGY * trace]
            for side, own in enumerate(traces)
        ]
        for side, own in enumerate(far):
            if own:
                for i, *found in zip(own, *_centre_far(grams[side], sides[side], kept, own), strict=True):
                    (traces[side][i], removed[side][i]), means[side][i] = found, 0.0
        if any(far):
            column, mean = _column_means(grams, kept)
    grams -= column
    grams += mean - column.mT
    if dropped is not None:
        grams.masked_fill_(dropped, 0.0)
    floor, least = rounding_energy(grams.dtype), math.ldexp(1.0, -_EXPONENT[grams.dtype])
    energies = [
        [n * (m + r) for n, m, r in zip(numbers, means[side], removed[side], strict=True)]
        for side in range(2)
    ]
    there = [
        [trace > max(least, floor * energy) for trace, energy in zip(*side, strict=True)]
        for side in zip(traces, energies, strict=True)
    ]
    finite = [math.isfinite(sum(numbers)) for numbers in zip(*traces, *energies, strict=True)]
    exist = [all(sides) for sides in zip(finite, *there, strict=True)]
    return traces, exist, finite


def _scale(grams: Tensor, traces: list[list[float]], exist: list[bool]) -> list[float]:
    """Multiply Grams [2, b, S, S] of these traces by powers of 2, where they need it; returns those of the second side.

    That keeps the fourth powers of the features out of overflow and underflow. Few need it, and it is another pass.
    """
    if all(_SAFE[0] < own[i] < _SAFE[1] for own in traces for i, there in enumerate(exist) if there):
        return [1.0] * len(exist)
    most = _EXPONENT[grams.dtype]
    powers = [
        [
            math.ldexp(1.0, -min(most, math.frexp(trace)[1])) if there else 1.0
            for trace, there in zip(own, exist, strict=True)
        ]
        for own in traces
    ]
    grams *= grams.new_tensor(powers)[..., None, None]
    return powers[1]


def _products(grams: Tensor) -> list[list[float]]:
    """<K_c, L_c> and |L_c|^2 of each sample of [2, b, S, S], float64 over sums of at most 8 rows.

    Equal Grams have equal products, so rho is exactly 1 and R exactly 0.
    """
    samples, rows = grams.shape[1:3]
    each = math.gcd(rows, 8)
    parts = grams.view(2, samples * (rows // each), each * rows).transpose(0, 1)
    products = torch.bmm(parts, parts.mT)[:, :, 1].view(samples, rows // each, 2)
    return products.sum(dim=1, dtype=torch.float64).T.tolist()


def _balance(gram: Tensor, kept: Tensor | None) -> None:
    """Take out of every row of [b, S, S] the mean over kept columns that rounding left in it.

    A mean of the rounding's size would bring back an offset common to all tokens.
    """
    left, _ = _column_means(gram, kept)
    gram -= left if kept is None else left * kept[:, None]


def _results(
    exist: list[bool], products: list[list[float]], rest: list[float], factors: list[float]
) -> list[tuple[float, float, float]]:
    """(1 - CKA, -log CKA, what makes G of R) of each sample, given <K_c, L_c>, |L_c|^2 and |R|; 0 without structure."""
    found = []
    for there, mixed, own, unexplained, factor in zip(exist, *products, rest, factors, strict=True):
        if not there:
            found.append((0.0, 0.0, 0.0))
            continue
        length = math.sqrt(own)
        given = math.hypot(mixed / length, unexplained)
        cka = mixed / (length * given)
        distance = (unexplained / given) ** 2 / (1 + cka)
        neg_log = -math.log1p(-distance) if distance < 0.5 else -math.log(max(cka, CKA_FLOOR))
        found.append((distance, neg_log, factor / (given * length)))
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
        for part in chunks:
            kept = None if mask is None else mask[part]
            grams, result = _view(buffer, 2, part.stop - part.start, rows, rows), gradient[p, part]
            traces, exist, finite = _centred_grams(grams, (teacher[part], student[part]), kept)
            factors = _scale(grams, traces, exist)
            products = _products(grams)
            rho = [mixed / own if there else 0.0 for there, mixed, own in zip(exist, *products, strict=True)]
            torch.addcmul(grams[0], grams[1], result.new_tensor(rho)[:, None, None], value=-1, out=result)
            rest = torch.linalg.vector_norm(result.flatten(1), dim=1).tolist()
            found = _results(exist, products, rest, factors)
            if not all(finite):
                found = [
                    values if whole else (math.nan,) * 3 for values, whole in zip(found, finite, strict=True)
                ]
            values += [(distance, neg_log) for distance, neg_log, _ in found]
            result *= result.new_tensor([scale for *_, scale in found])[:, None, None]
            _balance(result, kept)
    distance, neg_log = gradient.new_tensor(values).view(pairs, batch, 2).unbind(dim=2)
    return distance.contiguous(), neg_log.contiguous(), gradient


def backward(
    students: Sequence[Tensor], mask: Tensor | None, gradient: Tensor, coefficient: Tensor
) -> list[Tensor]:
    """Return dY [B, S, D] per layer pair: 2 c G Y, with c = ``coefficient`` [P, B] and rows of G that sum to 0."""
    results = []
    for p, student in enumerate(students):
        result = torch.empty_like(student, memory_format=torch.contiguous_format)
        for part in _chunks(len(student), student.shape[1] * student.shape[2], _CHUNK_ELEMENTS):
            own = student[part].to(gradient.dtype)
            if mask is not None:
                own = own.masked_fill(~mask[part, :, None], 0.0)
            weighted = gradient[p, part] * (2 * coefficient[p, part])[:, None, None]
            if result.dtype == own.dtype:
                torch.bmm(weighted, own, out=result[part])
            else:
                result[part] = torch.bmm(weighted, own)
            # What is not finite in a kept row reaches the dropped rows too, as 0 times NaN.
            if mask is not None and not bool(coefficient[p, part].isfinite().all()):
                result[part].masked_fill_(~mask[part, :, None], 0.0)
        results.append(result)
    return results
