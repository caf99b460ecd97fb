"""Shared by the tests of the ops and of the losses: features shaped like BERT's, memories, masks, comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]

HALF = [torch.bfloat16, torch.float16]
MASKS = ["none", "all", "ragged", "one token", "dropped sample", "holes"]
# B, S, D of student, D of teacher, K (0: no memory), tokens by which the memory is longer than the features.
INTER_SHAPES = {
    "odd": (3, 5, 7, 4, 3, 0),
    "powers of two": (4, 8, 16, 8, 2, 0),
    "no memory": (5, 3, 6, 6, 0, 0),
    "one centroid": (4, 3, 5, 6, 1, 0),
    "narrower features": (3, 4, 6, 5, 4, 3),
    "batch of one": (1, 6, 4, 9, 5, 0),
    "batch of one, no memory": (1, 6, 4, 9, 0, 0),
    "empty batch": (0, 4, 5, 6, 3, 0),
    "one token": (4, 1, 40, 33, 3, 2),
}


def outlier_mean(width: int, outliers: int = 3) -> Tensor:
    """The mean of BERT-shaped features: 20 to 50 (of either sign) in a few dims, fixed by the width, else 0."""
    generator = torch.Generator().manual_seed(width)
    dims = torch.randperm(width, generator=generator)[: min(outliers, width)]
    size = 20 + 30 * torch.rand(len(dims), generator=generator, dtype=torch.float64)
    sign = 1 - 2 * torch.randint(2, (len(dims),), generator=generator, dtype=torch.float64)
    mean = torch.zeros(width, dtype=torch.float64)
    mean[dims] = size * sign
    return mean


def bert_features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Features ``[..., D]`` of standard deviation 1 whose mean, in a few dims, is 20 to 50 times that."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (noise + outlier_mean(shape[-1])).to(dtype)


def centroids(count: int, rows: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A memory ``[K, S * D]`` near BERT-shaped features of the same width."""
    return bert_features(count, rows, width, seed=seed + 1000, dtype=dtype).flatten(1)


def ragged_mask(batch: int, rows: int, seed: int = 0, lengths: Sequence[int] | None = None) -> Tensor:
    """An attention mask ``[B, S]`` (int64, 1 = keep) of samples of 1 to S tokens, padded on the right."""
    if lengths is None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, rows + 1, (batch,), generator=generator).tolist()
    return (torch.arange(rows)[None] < torch.tensor(lengths).reshape(-1, 1)).long()


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in the Euclidean norm; the absolute error where the truth is 0."""
    value, truth = value.detach().double(), truth.detach().double()
    error, size = torch.linalg.vector_norm(value - truth), torch.linalg.vector_norm(truth)
    return float(error / size) if size > 0 else float(error)


def make_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layers(widths: Sequence[int], batch: int, rows: int, seed: int, **kwargs: Any) -> list[Tensor]:
    return [bert_features(batch, rows, width, seed=seed + i, **kwargs) for i, width in enumerate(widths)]


def make_mask(kind: str, batch: int, rows: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "all":
        return torch.ones(batch, rows, dtype=torch.int64)
    if kind == "ragged":
        return ragged_mask(batch, rows, seed=3)
    if kind == "one token":
        return ragged_mask(batch, rows, lengths=[1] * batch)
    if kind == "dropped sample":
        return ragged_mask(batch, rows, lengths=[0 if i == 0 else rows for i in range(batch)]).bool()
    return torch.rand(batch, rows, generator=torch.Generator().manual_seed(5)) < 0.6


def value_and_gradient(
    function: Function, inputs: Sequence[Tensor], scale: float = 1.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of ``function(*inputs)`` and the inputs' gradients for an upstream gradient that differs everywhere."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    total = torch.zeros((), dtype=torch.float64)
    for number, output in enumerate(outputs):
        weight = torch.rand(
            output.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64
        )
        total = total + scale * ((weight + 0.25 + number) * output.double()).sum()
    if not total.requires_grad:  # no sample has a structure
        return [output.detach() for output in outputs], [torch.zeros_like(leaf) for leaf in leaves]
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    pairs = zip(gradients, leaves, strict=True)
    return [output.detach() for output in outputs], [
        torch.zeros_like(y) if x is None else x for x, y in pairs
    ]


def assert_same(
    function: Callable[[str], Function], inputs: Sequence[Tensor], tolerance: float = 1e-10
) -> None:
    """eager equals reference, values and gradients."""
    values, gradients = value_and_gradient(function("eager"), inputs)
    true_values, true_gradients = value_and_gradient(function("reference"), inputs)
    for value, truth in zip([*values, *gradients], [*true_values, *true_gradients], strict=True):
        assert value.dtype == truth.dtype
        assert value.shape == truth.shape
        torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance)


def accuracy_case(seed: int, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """(student, student memory), (teacher, teacher memory), rounded to ``dtype``."""
    batch, rows, width, teacher_width, count = shape
    student, teacher = (
        bert_features(batch, rows, width, seed=seed),
        bert_features(batch, rows, teacher_width, seed=seed + 50),
    )
    memories = centroids(count, rows, width, seed=seed), centroids(count, rows, teacher_width, seed=seed + 50)
    return [student.to(dtype), memories[0].to(dtype)], [teacher.to(dtype), memories[1].to(dtype)]


def rms_errors(
    function: Callable[[Tensor, Tensor, Sequence[Tensor], str], Tensor],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    seeds: int = 4,
) -> dict[str, dict[str, float]]:
    """Root mean square, over seeds, of the relative errors of value and gradients: {"eager": {"value": ...}, ...}."""
    squares = {name: {"value": 0.0, "gradient": 0.0} for name in ("eager", "plain")}
    for seed in range(seeds):
        inputs, constants = accuracy_case(seed, dtype, shape)

        def run(kind: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
            cast = [x.to(kind) for x in constants]  # noqa: B023
            # Scaled so that no gradient is too small for float16.
            values, gradients = value_and_gradient(
                lambda x, m: function(x, m, cast, backend),
                [x.to(kind) for x in inputs],  # noqa: B023
                scale=4096.0,
            )
            return values[0], torch.cat([x.double().flatten() for x in gradients])

        truth = run(torch.float64, "reference")
        for name, result in (("eager", run(dtype, "eager")), ("plain", run(dtype, "reference"))):
            squares[name]["value"] += relative_error(result[0], truth[0]) ** 2
            squares[name]["gradient"] += relative_error(result[1], truth[1]) ** 2
    return {name: {k: (v / seeds) ** 0.5 for k, v in sums.items()} for name, sums in squares.items()}
