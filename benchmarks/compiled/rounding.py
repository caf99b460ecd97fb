"""``python -m benchmarks rounding``: errors of ``gram`` under several ways to feed the tensor cores, emulated on a CPU.

Gamma = Z Z^T with Z = T [m; h], where m are K centroids and h B samples. The ways to compute Gamma and its backward:

- centred: Z in float32, rounded to bfloat16 or not at all; the matrix of the backward rounded once.
- raw: [m; h] multiplied as it is, Gamma = T ([m; h] [m; h]^T) T^T. The matrix of the backward is one bfloat16 term, or
  two (its rounding and what that leaves).
- tf32x3: float32 as two tf32 terms and three products, of [m; h] as it is or after the first centroid is subtracted
  from every row; that centroid is then one more row.

Products of a part of F, one token wide, are summed in float32 and the parts in float64. Tensor cores truncate where
they accumulate, which is not emulated. The truth is float64 on the same inputs. Errors are relative, in the Euclidean
norm: of the student's Gamma, and of the gradients of L_L, F_MM, F^E and F^C at a sixteenth of the features.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.tables import Table, markdown
from fsd_kernels import structure

Round = Callable[[Tensor], Tensor]
BATCH, TOKENS, WIDTH = 32, 128, 768
_OFFSET, _OUTLIERS = 10.0, 4
# Every sixteenth token has its gradient compared: a column of it depends on the same column of the features alone.
_STRIDE = 16
_LOSSES = ("L_L", "F_MM", "F^E", "F^C")


class Rows(NamedTuple):
    """K centroids above B samples, [K + B, S, D]."""

    student: Tensor
    teacher: Tensor
    num_centroid: int


class Way(NamedTuple):
    """A way to compute products."""

    gamma: Callable[[Tensor, Tensor, int], Tensor]
    """([m; h] [K + B, S, D], T, K) to Gamma."""
    gradient: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    """([m; h], T, dGamma + dGamma^T, K) to the gradient of [m; h]."""


def bf16(x: Tensor) -> Tensor:
    """Round to bfloat16."""
    return x.to(torch.bfloat16).float()


def tf32(x: Tensor) -> Tensor:
    """Round float32 to the 10 bits of mantissa that tf32 has, ties away from 0."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def exact(x: Tensor) -> Tensor:
    """Round nothing."""
    return x


def transform(num_centroid: int, batch: int) -> Tensor:
    """T [N, K + B] float64: Z = T [m; h] = [m - mu_m, mu_m, h - mu_h, mu_h - mu_m]."""
    k, b = num_centroid, batch
    eye = torch.eye(k + b, dtype=torch.float64)
    mean_m, mean_h = eye[:k].mean(0, keepdim=True), eye[k:].mean(0, keepdim=True)
    return torch.cat([eye[:k] - mean_m, mean_m, eye[k:] - mean_h, mean_h - mean_m])


def centring(num_centroid: int, batch: int) -> Tensor:
    """C [N, N] float64: Z = C [m - s_m, s_m, h - s_h, s_h - s_m], whatever the shifts s_m and s_h."""
    k, b = num_centroid, batch
    eye = torch.eye(k + b + 2, dtype=torch.float64)
    mean_m, mean_h = eye[:k].mean(0), eye[k + 1 : -1].mean(0)
    matrix = eye.clone()
    matrix[:k] -= mean_m
    matrix[k] += mean_m
    matrix[k + 1 : -1] -= mean_h
    matrix[-1] += mean_h - mean_m
    return matrix


def gram_of(x: Tensor, product: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> Tensor:
    """X X^T [N, N] float64 of X [N, S, D]: the products of one token in X's dtype, their sum in float64."""
    total = x.new_zeros((len(x), len(x)), dtype=torch.float64)
    for token in range(x.shape[1]):
        total += product(x[:, token], x[:, token].mT)
    return total


def _scaled(a: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix with rows whose largest entry is 1, float32, and what to multiply its rows by."""
    scale = a.abs().amax(-1, keepdim=True)
    return (a / torch.where(scale > 0, scale, 1.0)).float(), scale


def _apply(a: Tensor, x: Tensor) -> Tensor:
    """A X for A [N, M] and X [M, S, D]."""
    return (a.to(x.dtype) @ x.flatten(1)).unflatten(1, x.shape[1:])


def centred(rounded: Round) -> Way:
    """Rows are centred in float32 and rounded before they are multiplied."""

    def rows(x: Tensor, t: Tensor) -> Tensor:
        return rounded(_apply(t, x.float()))

    def gradient(x: Tensor, t: Tensor, d_gamma: Tensor, _: int) -> Tensor:
        a, scale = _scaled(t.mT @ d_gamma)
        return _apply(rounded(a), rows(x, t)) * scale.float()[:, :, None]

    return Way(lambda x, t, _: gram_of(rows(x, t)), gradient)


def raw(terms: int) -> Way:
    """Rows of 16 bits are multiplied as they are; the matrix of the backward is ``terms`` bfloat16 numbers."""

    def gamma(x: Tensor, t: Tensor, _: int) -> Tensor:
        return t @ gram_of(x.float()) @ t.mT

    def gradient(x: Tensor, t: Tensor, d_gamma: Tensor, _: int) -> Tensor:
        a, scale = _scaled(t.mT @ d_gamma @ t)
        high = bf16(a)
        result = _apply(high, x.float())
        if terms == 2:
            result += _apply(bf16(a - high), x.float())
        return result * scale.float()[:, :, None]

    return Way(gamma, gradient)


def _tf32x3(a: Tensor, b: Tensor) -> Tensor:
    """A B of float32 matrices as three products of tf32 terms."""
    a_high, b_high = tf32(a), tf32(b)
    return a_high @ b_high + (a_high @ tf32(b - b_high) + tf32(a - a_high) @ b_high)


def tf32x3(shifting: int) -> Way:
    """float32 rows as two tf32 terms, after the mean of the first ``shifting`` rows of m, and of h, is subtracted."""

    def rows(x: Tensor, num_centroid: int) -> Tensor:
        """[m - s_m, s_m, h - s_h, s_h - s_m], the rows that are multiplied; the shifts are 0 if none is subtracted."""
        memory, features = x[:num_centroid], x[num_centroid:]
        shifts = [
            each[:shifting].mean(0, keepdim=True) if shifting else torch.zeros_like(each[:1])
            for each in (memory, features)
        ]
        return torch.cat([memory - shifts[0], shifts[0], features - shifts[1], shifts[1] - shifts[0]])

    def gamma(x: Tensor, t: Tensor, num_centroid: int) -> Tensor:
        finish = centring(num_centroid, len(x) - num_centroid)
        return finish @ gram_of(rows(x, num_centroid), _tf32x3) @ finish.mT

    def gradient(x: Tensor, t: Tensor, d_gamma: Tensor, num_centroid: int) -> Tensor:
        finish = centring(num_centroid, len(x) - num_centroid)
        a, scale = _scaled(t.mT @ d_gamma @ finish)
        product = _tf32x3(a, rows(x, num_centroid).flatten(1)).unflatten(1, x.shape[1:])
        return product * scale.float()[:, :, None]

    return Way(gamma, gradient)


def truth() -> Way:
    """The formula in float64."""
    return Way(
        lambda x, t, _: t @ gram_of(x.double()) @ t.mT,
        lambda x, t, d_gamma, _: _apply(t.mT @ d_gamma @ t, x.double()),
    )


WAYS: dict[str, tuple[torch.dtype, Way]] = {
    "bf16, centred (today)": (torch.bfloat16, centred(bf16)),
    "bf16, raw, one term": (torch.bfloat16, raw(1)),
    "bf16, raw, two terms": (torch.bfloat16, raw(2)),
    "fp32, centred (today)": (torch.float32, centred(exact)),
    "fp32, tf32x3 raw": (torch.float32, tf32x3(0)),
    "fp32, tf32x3, one row subtracted": (torch.float32, tf32x3(1)),
    "fp32, tf32x3, mean of 4 rows": (torch.float32, tf32x3(4)),
    "fp32, tf32x3, mean of 8 rows": (torch.float32, tf32x3(8)),
    "fp32, tf32x3, mean of 16 rows": (torch.float32, tf32x3(16)),
}
"""By name: dtype of the features, and the way."""


def outcome(way: Way, rows: Rows) -> tuple[Tensor, list[Tensor]]:
    """The student's Gamma, and the gradients of the four losses at every sixteenth token."""
    k = rows.num_centroid
    t = transform(k, len(rows.student) - k)
    # ``gram`` returns float32; what follows is exact, to see the error of ``gram`` alone.
    dtype = torch.float64 if rows.student.dtype == torch.float64 else torch.float32
    student, teacher = (way.gamma(x, t, k).to(dtype).double() for x in (rows.student, rows.teacher))
    student.requires_grad_()
    values = structure(student, teacher, k, backend="reference")
    gradients = []
    for value in values:
        (d_gamma,) = torch.autograd.grad(value, student, retain_graph=True)
        found = way.gradient(rows.student[:, ::_STRIDE], t, d_gamma + d_gamma.mT, k)
        gradients.append(found.double())
    return student.detach(), gradients


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def errors(rows: Rows) -> Iterator[tuple[str, list[float]]]:
    """Yield every way with its errors: of Gamma, and of the four gradients."""
    truths: dict[torch.dtype, tuple[Tensor, list[Tensor]]] = {}
    for name, (dtype, way) in WAYS.items():
        rounded = rows._replace(student=rows.student.to(dtype), teacher=rows.teacher.to(dtype))
        if dtype not in truths:
            as_double = rounded._replace(student=rounded.student.double(), teacher=rounded.teacher.double())
            truths[dtype] = outcome(truth(), as_double)
        gamma, gradients = outcome(way, rounded)
        wanted_gamma, wanted = truths[dtype]
        pairs = zip(gradients, wanted, strict=True)
        yield name, [_error(gamma, wanted_gamma), *(_error(*pair) for pair in pairs)]


def drawn(num_centroid: int, case: str, tokens: int = TOKENS, width: int = WIDTH) -> Rows:
    """Random rows: "no offset", "outlier dimensions" (of 50 standard deviations) or "offset of 10 sigma"."""
    generator = torch.Generator().manual_seed(num_centroid)
    shape = (num_centroid + BATCH, tokens, width)
    teacher = torch.randn(shape, generator=generator)
    student = 0.7 * teacher + 0.5 * torch.randn(shape, generator=generator)
    offset = torch.zeros(width)
    if case == "outlier dimensions":
        dimensions = torch.randperm(width, generator=generator)[:_OUTLIERS]
        offset[dimensions] = 50 * torch.randn(_OUTLIERS, generator=generator)
    elif case == "offset of 10 sigma":
        offset = _OFFSET * torch.randn(width, generator=generator)
    return Rows(student + offset, teacher + offset, num_centroid)


def hidden_states(num_centroid: int, layers: tuple[int, int] = (3, 5), texts: int = 192) -> Rows:
    """Hidden states of the built-in backbone on reviews: a student's layer and a teacher's, 0 in padding.

    A centroid is the mean of two texts that are not in the batch.
    """
    from transformers import AutoModel, AutoTokenizer

    from fsd_fast.data import get_task, load_task_dataset, resolve_model

    path = resolve_model("minilm")
    task = get_task("reviews")
    samples = load_task_dataset(task, None)["train"].select(range(texts))
    columns = [list(samples[name]) for name in task.text_columns]
    tokens = AutoTokenizer.from_pretrained(path)(
        *columns, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    model = AutoModel.from_pretrained(path).eval()
    mask = tokens["attention_mask"].bool()[:, :, None]
    with torch.no_grad():
        states = model(**tokens, output_hidden_states=True).hidden_states
    generator = torch.Generator().manual_seed(0)
    pairs = BATCH + torch.randint(texts - BATCH, (2, num_centroid), generator=generator)
    student, teacher = (torch.where(mask, states[layer].float(), 0.0) for layer in layers)

    def with_centroids(x: Tensor) -> Tensor:
        return torch.cat([(x[pairs[0]] + x[pairs[1]]) / 2, x[:BATCH]])

    return Rows(with_centroids(student), with_centroids(teacher), num_centroid)


CASES = ("no offset", "outlier dimensions", "offset of 10 sigma", "MiniLM, hidden states")


def table(case: str, num_centroid: int) -> Table:
    """The errors of every way in one case."""
    rows = hidden_states(num_centroid) if case == CASES[-1] else drawn(num_centroid, case)
    lines = [["products", "Gamma", *_LOSSES]]
    return lines + [[name, *(f"{error:.1e}" for error in found)] for name, found in errors(rows)]


def main(argv: Sequence[str]) -> int:
    """Print a table for every case."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks rounding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--centroids", type=int, default=100, help="K, at least 2 (default %(default)s)")
    parser.add_argument("--case", choices=CASES, action="append", help="repeatable (default: all)")
    options = parser.parse_args(argv)
    if options.centroids < 2:
        raise ValueError(f"--centroids: expected at least 2, got {options.centroids}")
    for case in options.case or CASES:
        print(f"{case}, K = {options.centroids}\n\n{markdown(table(case, options.centroids))}\n", flush=True)
    return 0
