"""The emulation of products: its formula is that of ``gram``, and every way has the errors that its digits allow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.compiled import rounding
from fsd_kernels import gram, structure

CENTROIDS = 6


def _rows(case: str = "no offset") -> rounding.Rows:
    return rounding.drawn(CENTROIDS, case, tokens=16, width=32)


def test_the_truth_is_gram_and_its_gradient() -> None:
    rows = _rows("offset of 10 sigma")
    student, teacher = rows.student.double().requires_grad_(), rows.teacher.double()

    def gamma(x: Tensor) -> Tensor:
        return gram(x[CENTROIDS:], x[:CENTROIDS].flatten(1), backend="reference")

    found, gradients = rounding.outcome(rounding.truth(), rounding.Rows(student.detach(), teacher, CENTROIDS))
    wanted = gamma(student)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-10, atol=1e-10)
    values = structure(wanted, gamma(teacher), CENTROIDS, backend="reference")
    for value, gradient in zip(values, gradients, strict=True):
        (expected,) = torch.autograd.grad(value, student, retain_graph=True)
        expected = expected[:, ::16]
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("case", "way", "least", "most"),
    [
        ("no offset", "bf16, centred (today)", 1e-3, 1e-2),
        ("no offset", "bf16, raw, one term", 1e-4, 5e-3),
        ("no offset", "bf16, raw, two terms", 1e-8, 2e-5),
        ("offset of 10 sigma", "bf16, raw, two terms", 1e-6, 1e-3),
        ("offset of 10 sigma", "fp32, tf32x3 raw", 1e-6, 1e-3),
        ("offset of 10 sigma", "fp32, tf32x3, one row subtracted", 1e-9, 1e-5),
    ],
)
def test_errors_are_those_of_the_digits(case: str, way: str, least: float, most: float) -> None:
    found = dict(rounding.errors(_rows(case)))
    assert least < max(found[way][1:]) < most


def test_tf32_has_ten_bits() -> None:
    one = torch.tensor([1.0])
    assert rounding.tf32(one + 2**-10) == one + 2**-10
    assert rounding.tf32(one + 2**-12) == one
