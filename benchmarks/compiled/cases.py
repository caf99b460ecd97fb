"""The shapes whose kernels are compiled: the paper's (batch 32, width 768, 128 tokens), and others around them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from fsd_kernels._numerics import norm_rounding
from fsd_kernels.gram import triton as gram
from fsd_kernels.intra_cka import triton as intra
from fsd_kernels.kmeans import triton as kmeans
from fsd_kernels.structure import triton as structure

BATCH, TOKENS, WIDTH = 32, 128, 768


class Kind(NamedTuple):
    """A dtype and a precision of products."""

    name: str
    dtype: torch.dtype
    precision: str
    """The argument of ``torch.set_float32_matmul_precision``."""


KINDS = (
    Kind("fp32", torch.float32, "highest"),
    Kind("tf32", torch.float32, "high"),
    Kind("bf16", torch.bfloat16, "highest"),
    Kind("fp16", torch.float16, "highest"),
)


class Case(NamedTuple):
    """A shape, and the call that launches its kernels."""

    name: str
    dtype: str
    precision: str
    run: Callable[[], None]


def _intra(batch: int, tokens: int, dtype: torch.dtype, masked: bool) -> None:
    x = torch.empty(batch, tokens, WIDTH, dtype=dtype)
    mask = torch.ones(batch, tokens, dtype=torch.bool) if masked else None
    intra.forward([x], [x], mask)
    values = torch.empty(1, batch)
    intra.backward([x], mask, torch.empty(1, batch, tokens, tokens), values, values, values)


def _gram(num_centroid: int, dtype: torch.dtype, masked: bool, frozen: bool) -> None:
    """The Gram of features and memory; with ``frozen`` the memory's own block is given, as the teacher's is."""
    features = torch.empty(BATCH, TOKENS * WIDTH, dtype=dtype)
    memory = torch.empty(num_centroid, TOKENS * WIDTH, dtype=dtype) if num_centroid else None
    block = torch.empty(num_centroid + 1, num_centroid + 1) if frozen else None
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool) if masked else None
    gram.forward([(features, memory, block)], mask)
    if not frozen:
        total = BATCH + 1 + (num_centroid + 1 if num_centroid else 0)
        gram.backward(features, memory, mask, torch.empty(4, total, total), torch.empty(4), (True, True))


def _structure() -> None:
    gamma = torch.empty(134, 134)
    _, gradients = structure.forward(gamma, gamma, 100, norm_rounding(torch.float32))
    structure.backward(gradients, torch.empty(4))


def _kmeans(points: int, width: int, features: int, clusters: int, dtype: torch.dtype) -> None:
    x = torch.empty(points, width, dtype=dtype)
    # Centroids are float32, as sums and means are, or rounded to the points' dtype for the tensor cores. They are zeros
    # because torch takes their mean where there are more than one program holds.
    for centroid_dtype in dict.fromkeys((torch.float32, dtype)):
        kmeans.assign(x, torch.zeros(clusters, features, dtype=centroid_dtype))
    sums, counts = torch.empty(clusters, features), torch.zeros(clusters, dtype=torch.int64)
    kmeans.update_(sums, counts, x, torch.zeros(points, dtype=torch.int64))


def _intra_cases(kind: Kind, rows: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], None]]]:
    for tokens in rows:
        yield f"S={tokens}", functools.partial(_intra, BATCH, tokens, kind.dtype, False)
    yield "S=128 masked", functools.partial(_intra, BATCH, 128, kind.dtype, True)
    yield "S=128 B=2", functools.partial(_intra, 2, 128, kind.dtype, False)


def _gram_cases(kind: Kind, centroids: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], None]]]:
    for number in centroids:
        yield f"K={number}", functools.partial(_gram, number, kind.dtype, False, False)
        if number:
            yield f"K={number} known", functools.partial(_gram, number, kind.dtype, False, True)
    for number in (100, 300):
        yield f"K={number} masked", functools.partial(_gram, number, kind.dtype, True, False)


def _kmeans_cases(kind: Kind, centroids: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], None]]]:
    """4,096 whole points, the same with padding left out, one batch of points, and the sketches of a large task."""
    whole, narrow = TOKENS * WIDTH, 64 * WIDTH
    sizes = {
        f"k-means N=4096 K={number}": (4096, whole, whole, number) for number in (*centroids, 1000) if number
    }
    sizes |= {
        "k-means N=4096 K=100 narrow": (4096, narrow, whole, 100),
        "k-means N=32 K=100": (32, whole, whole, 100),
        "k-means N=400000 K=300 sketch": (400_000, 2048, 2048, 300),
    }
    for name, each in sizes.items():
        yield name, functools.partial(_kmeans, *each, kind.dtype)


def cases(
    rows: tuple[int, ...] = (32, 64, 128, 256, 512), centroids: tuple[int, ...] = (0, 50, 100, 300)
) -> Iterator[Case]:
    """Yield the cases of all ops: other lengths and numbers of centroids, masks, few samples, a frozen memory."""
    for kind in KINDS:
        for name, run in (
            *_intra_cases(kind, rows),
            *_gram_cases(kind, centroids),
            *_kmeans_cases(kind, centroids),
        ):
            yield Case(name, kind.name, kind.precision, run)
    yield Case("K=100", "fp32", "highest", _structure)
