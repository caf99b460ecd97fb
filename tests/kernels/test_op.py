"""What every op shares: registration with torch, the way past the dispatcher, the choice of the backend."""

from __future__ import annotations

import importlib
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fsd_kernels
from fsd_kernels import _backend, assign, frozen_gram, gram, inter_structure, intra_cka, structure, update
from fsd_kernels.kmeans import eager as kmeans_eager
from tests.interpreted import normal, on_triton
from tests.kernel_cases import (
    Function,
    bert_features,
    centroids,
    make_generator,
    ragged_mask,
    value_and_gradient,
)

# --- registration ----------------------------------------------------------------------------------------------------


def op_calls(dtype: torch.dtype, masked: bool) -> dict[str, tuple[Any, ...]]:
    batch, rows, width, teacher_width, count = 3, 4, 5, 6, 2
    student, teacher = (
        bert_features(batch, rows, width, dtype=dtype),
        bert_features(batch, rows, teacher_width, dtype=dtype),
    )
    memory = centroids(count, rows, width, dtype=dtype)
    mask = ragged_mask(batch, rows, lengths=[4, 2, 1]).bool() if masked else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    teacher_memory = centroids(count, rows, teacher_width, dtype=dtype)
    gamma_s, gamma_t = gram(student, memory), gram(teacher, teacher_memory)
    noise = torch.Generator().manual_seed(0)
    flat = student.flatten(1)
    pair_gradient = torch.randn(1, batch, rows, rows, dtype=wide, generator=noise)
    neg_log, d_neg_log = torch.rand(2, 1, batch, dtype=wide, generator=noise)
    return {
        "intra_cka_forward": ([student.clone().requires_grad_()], [teacher], mask, "eager"),
        "intra_cka_backward": ([student], mask, pair_gradient, neg_log, None, d_neg_log, "eager"),
        "gram_forward": (
            flat.clone().requires_grad_(),
            memory.clone().requires_grad_(),
            None,
            mask,
            "eager",
        ),
        "gram_backward": (flat, memory, mask, torch.randn_like(gamma_s), True, True, "eager"),
        "structure_forward": (gamma_s.clone().requires_grad_(), gamma_t, count, "eager"),
        "structure_backward": (
            torch.randn(4, *gamma_s.shape, dtype=wide, generator=noise),
            torch.randn(4, dtype=wide, generator=noise),
            "eager",
        ),
        "inter_structure_forward": (
            flat.clone().requires_grad_(),
            memory.clone().requires_grad_(),
            teacher.flatten(1),
            teacher_memory,
            frozen_gram(teacher_memory).gram,
            mask,
            "eager",
        ),
        "inter_structure_backward": (
            torch.randn(4, *gamma_s.shape, dtype=gamma_s.dtype, generator=noise),
            torch.randn(4, dtype=wide, generator=noise),
            flat,
            memory,
            mask,
            True,
            True,
            "eager",
        ),
    }


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", op_calls(torch.float32, False))
def test_opcheck(name: str, dtype: torch.dtype, masked: bool) -> None:
    op = getattr(torch.ops.fsd_kernels, name).default
    torch.library.opcheck(op, op_calls(dtype, masked)[name])


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("name", ["gram_backward", "inter_structure_backward"])
def test_opcheck_of_a_gradient_that_is_not_needed(name: str, needs: tuple[bool, bool]) -> None:
    op = getattr(torch.ops.fsd_kernels, name)
    arguments = list(op_calls(torch.float32, True)[name])
    arguments[-3:-1] = needs
    torch.library.opcheck(op.default, tuple(arguments))
    d_features, d_memory = op(*arguments)
    assert (d_features.numel() > 0, d_memory.numel() > 0) == needs


def public_ops() -> dict[str, tuple[Function, list[Tensor]]]:
    f32 = torch.float32
    student, teacher = bert_features(4, 5, 6, seed=1, dtype=f32), bert_features(4, 5, 8, seed=2, dtype=f32)
    memory, teacher_memory = centroids(3, 5, 6, dtype=f32), centroids(3, 5, 8, dtype=f32)
    mask = ragged_mask(4, 5, lengths=[5, 2, 1, 4])
    basis, gamma_t = frozen_gram(teacher_memory), gram(teacher, teacher_memory)
    return {
        "intra_cka": (lambda x: tuple(intra_cka([x, x], [teacher, teacher], mask)), [student]),
        "gram": (lambda x, m: gram(x, m, mask), [student, memory]),
        "structure": (lambda x: tuple(structure(x, gamma_t.float(), 3)), [gram(student, memory).float()]),
        "inter_structure": (
            lambda x, m: tuple(inter_structure(x, teacher, m, basis, mask)),
            [student, memory],
        ),
        "frozen_gram": (lambda x, m: gram(x, frozen_gram(m * 2), mask), [student, memory]),
    }


@pytest.mark.parametrize("name", public_ops())
def test_compiled_equals_uncompiled(name: str) -> None:
    function, inputs = public_ops()[name]
    expected = value_and_gradient(function, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual = value_and_gradient(compiled, inputs)
    for value, truth in zip(sum(actual, []), sum(expected, []), strict=True):
        assert torch.equal(value, truth)


@pytest.mark.parametrize("name", ["intra_cka", "inter_structure"])
def test_tensors_that_are_no_plain_ones_go_through_the_registered_op(name: str) -> None:
    # Fake tensors hold no numbers: the implementation would raise where it reads some.
    function, inputs = public_ops()[name]
    expected = function(*inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(each).requires_grad_() for each in inputs]
        values = function(*fakes)
        gradients = torch.autograd.grad([each.sum() for each in values], fakes)
    assert [each.shape for each in values] == [each.shape for each in expected]
    assert [each.shape for each in gradients] == [each.shape for each in inputs]


@pytest.mark.parametrize("name", ["intra_cka", "inter_structure"])
def test_a_second_derivative_is_refused(name: str) -> None:
    function, inputs = public_ops()[name]
    leaves = [each.clone().requires_grad_() for each in inputs]
    gradients = torch.autograd.grad(function(*leaves)[0].sum(), leaves, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(sum(each.sum() for each in gradients if each is not None), leaves)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("name", ["intra_cka", "gram", "structure", "inter_structure"])
def test_autocast_changes_nothing(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSD_BACKEND", backend)
    function, inputs = public_ops()[name]
    expected = value_and_gradient(function, inputs)

    def forward(*tensors: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            assert (inputs[0].flatten(1) @ inputs[0].flatten(1).T).dtype == torch.bfloat16
            return function(*tensors)

    actual = value_and_gradient(forward, inputs)
    for value, truth in zip(sum(actual, []), sum(expected, []), strict=True):
        assert value.dtype == truth.dtype
        assert torch.equal(value, truth)


def test_autocast_changes_no_sum_of_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    # The form of other devices is a product, which autocast would take in bfloat16.
    monkeypatch.setattr(kmeans_eager, "_add_rows", kmeans_eager._add_products)
    points = torch.randn(60, 300, generator=make_generator(0))
    labels = torch.arange(60) % 7
    sums, _ = update(points, labels, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert (points @ points.T).dtype == torch.bfloat16
        assert torch.equal(update(points, labels, 7)[0], sums)


@on_triton
def test_registered_ops_compile_in_one_graph() -> None:
    x, y = normal(2, 5, 16, seed=1), normal(2, 5, 16, seed=2)
    memories = normal(3, 80, seed=3), normal(3, 80, seed=4)

    def loss(student: Tensor) -> Tensor:
        intra = intra_cka(student, y, backend="triton").neg_log.sum()
        return intra + torch.stack(inter_structure(student, y, *memories, backend="triton")).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(ours).backward()
    loss(plain).backward()
    assert torch.equal(ours.grad, plain.grad)  # type: ignore[arg-type]


# --- backends --------------------------------------------------------------------------------------------------------


def ran(monkeypatch: pytest.MonkeyPatch, backend: str | None) -> set[str]:
    """The implementations that ``intra_cka`` and ``inter_structure`` use for a ``backend`` argument."""
    used = set()

    def spy(op: str, chosen: str) -> types.ModuleType:
        used.add(chosen)
        return _backend.implementation(op, chosen)

    for name in ("intra_cka.api", "gram.api", "structure.api", "_op"):
        monkeypatch.setattr(importlib.import_module(f"fsd_kernels.{name}"), "implementation", spy)
    student, memory = bert_features(2, 3, 4), centroids(2, 3, 4)
    intra_cka(student, student, backend=backend)
    inter_structure(student, student, memory, memory, backend=backend)
    return used


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_backend_by_argument_and_by_environment(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran(monkeypatch, backend) == {backend}
    monkeypatch.setenv("FSD_BACKEND", backend)
    assert ran(monkeypatch, None) == {backend}
    assert ran(monkeypatch, "auto") == {backend}
    monkeypatch.setenv("FSD_BACKEND", "reference" if backend == "eager" else "eager")
    assert ran(monkeypatch, backend) == {backend}  # the argument wins


def test_auto_is_eager_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran(monkeypatch, None) == {"eager"}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ran(monkeypatch, "auto") == {"eager"}


def test_unknown_backends_are_named_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    student = bert_features(2, 3, 4)
    with pytest.raises(ValueError, match=r"backend: 'cuda' is not one of auto, triton, eager, reference"):
        intra_cka(student, student, backend="cuda")
    monkeypatch.setenv("FSD_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"FSD_BACKEND: 'fast' is not one of auto, triton, eager, reference"):
        gram(student)
    gram(student, backend="eager")  # not asked for, so not looked at


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_triton_never_falls_back(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend = "triton" if by == "argument" else None
    if by == "environment":
        monkeypatch.setenv("FSD_BACKEND", "triton")
    student = bert_features(2, 3, 4, dtype=torch.float32)
    gamma = torch.eye(3)
    calls: dict[str, Callable[[], object]] = {
        "intra_cka": lambda: intra_cka(student, student, backend=backend),
        "gram": lambda: gram(student, backend=backend),
        "structure": lambda: structure(gamma, gamma, backend=backend),
    }
    for op, call in calls.items():
        with pytest.raises(RuntimeError, match=rf"{op}: backend 'triton' .*on the CPU.*TRITON_INTERPRET"):
            call()
    with pytest.raises(RuntimeError, match="on the CPU"):
        inter_structure(student, student, backend=backend)


def test_auto_falls_back_once_with_a_warning_that_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> types.ModuleType:
        raise ImportError(f"no triton for {name}")

    monkeypatch.setattr(_backend.importlib, "import_module", missing)
    monkeypatch.setattr(_backend, "_fallback_reasons", set())
    gpu = torch.device("cuda", 0)
    with pytest.warns(RuntimeWarning, match=r"gram: using backend 'eager', because .*no triton for"):
        assert _backend.resolve_backend("auto", gpu, "gram") == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backend.resolve_backend(None, gpu, "gram") == "eager"
    with pytest.raises(RuntimeError, match="no triton for"):
        _backend.resolve_backend("triton", gpu, "gram")


def test_auto_is_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend.importlib, "import_module", lambda name: types.ModuleType(name))
    assert _backend.resolve_backend("auto", torch.device("cuda", 0), "gram") == "triton"
    assert _backend.resolve_backend("eager", torch.device("cuda", 0), "gram") == "eager"


def test_everything_public_is_exported() -> None:
    assert sorted(fsd_kernels.__all__) == list(fsd_kernels.__all__)
    assert all(hasattr(fsd_kernels, name) for name in fsd_kernels.__all__)


def test_triton_k_means_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="kmeans: backend 'triton' was asked for, but"):
        assign(torch.ones(2, 2), torch.ones(1, 2), backend="triton")
