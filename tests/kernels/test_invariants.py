"""What holds of the ops and losses whatever the data: one test, or one small group, for each invariant."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fsd_fast.losses import (
    FeatureStructureLoss,
    GlobalInterFeatureLoss,
    IntraFeatureLoss,
    LocalInterFeatureLoss,
)
from fsd_kernels import frozen_gram, gram, inter_structure, intra_cka, structure
from tests.interpreted import DEVICE, kept_mask, normal, on_triton
from tests.kernel_cases import bert_features, centroids, ragged_mask, value_and_gradient

BACKENDS = ["eager", "reference"]
F32, F64 = torch.float32, torch.float64
EXAMPLES = settings(max_examples=12, deadline=None, derandomize=True, database=None)


def every_structure(
    student: Tensor,
    memory: Tensor,
    teacher: Tensor,
    teacher_memory: Tensor,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> dict[str, Tensor]:
    """All values of ``intra_cka`` and ``inter_structure`` by name."""
    intra = intra_cka(student, teacher, mask, backend=backend)
    between = inter_structure(student, teacher, memory, teacher_memory, mask, backend=backend)
    values = {"intra_one_minus_cka": intra.one_minus_cka[0], "intra_neg_log": intra.neg_log[0]}
    return values | {f"inter_{name}": value for name, value in between._asdict().items()}


def gradients_of(values: dict[str, Tensor], *leaves: Tensor) -> dict[str, list[Tensor]]:
    """The gradient of each value, summed, with respect to each leaf; 0 where it does not depend on it."""
    result = {}
    for name, value in values.items():
        found: Any = [None] * len(leaves)
        if value.requires_grad:
            found = torch.autograd.grad(value.sum(), leaves, retain_graph=True, allow_unused=True)
        result[name] = [torch.zeros_like(y) if x is None else x for x, y in zip(found, leaves, strict=True)]
    return result


def sample(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student [5, 6, 7], its memory of 4 centroids, teacher [5, 6, 9], its memory."""
    return (
        bert_features(5, 6, 7, seed=1, dtype=dtype),
        centroids(4, 6, 7, seed=2, dtype=dtype),
        bert_features(5, 6, 9, seed=3, dtype=dtype),
        centroids(4, 6, 9, seed=4, dtype=dtype),
    )


def orthogonal(width: int, seed: int = 0) -> Tensor:
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return torch.linalg.qr(noise).Q


# --- student equal to teacher -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(masked: bool, dtype: torch.dtype) -> None:
    features, memory = bert_features(5, 9, 24, dtype=dtype), centroids(4, 9, 24, dtype=dtype)
    mask = ragged_mask(5, 9, lengths=[9, 1, 4, 0, 7]) if masked else None
    student, student_memory = features.clone().requires_grad_(), memory.clone().requires_grad_()
    values = every_structure(student, student_memory, features, memory, mask)
    for name, value in values.items():
        assert torch.equal(value, torch.zeros_like(value)), name
    for name, gradients in gradients_of(values, student, student_memory).items():
        for gradient in gradients:
            assert torch.equal(gradient, torch.zeros_like(gradient)), name


@pytest.mark.parametrize("pad_features", ["include", "exclude"])
def test_losses_of_a_student_equal_to_its_teacher(pad_features: Any) -> None:
    features, memory = bert_features(5, 9, 24, dtype=F32), centroids(4, 9, 24, dtype=F32)
    mask = ragged_mask(5, 9, lengths=[9, 2, 4, 3, 7])
    for module in (IntraFeatureLoss("mean_log", pad_features), LocalInterFeatureLoss(pad_features)):
        student = features.clone().requires_grad_()
        loss = module(student, features, mask)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss == 0
        assert gradient.abs().max() == 0
    # The released code adds 1e-8 inside the logarithm.
    student = features.clone().requires_grad_()
    loss = IntraFeatureLoss("log_mean", pad_features)(student, features, mask)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(-1e-8, rel=1e-6)
    assert gradient.abs().max() == 0
    student, student_memory = features.clone().requires_grad_(), memory.clone().requires_grad_()
    loss = GlobalInterFeatureLoss(0.5, pad_features)(student, student_memory, features, memory, mask).loss
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (student, student_memory)):
        assert gradient.abs().max() == 0


def test_cka_is_not_always_one() -> None:
    # Every promise of a zero above would hold of an op that returned zeros.
    values = every_structure(*sample())
    assert all((value > 1e-6).all() for value in values.values())


# --- invariances --------------------------------------------------------------------------------------------------


def test_the_reference_keeps_the_invariances_it_is_trusted_for() -> None:
    student, memory, teacher, teacher_memory = sample()
    base = every_structure(student, memory, teacher, teacher_memory, backend="reference")
    turned = every_structure(
        student @ orthogonal(7), memory, 3 * teacher + 1, teacher_memory, backend="reference"
    )
    for name in ("intra_one_minus_cka", "intra_neg_log", "inter_local"):
        torch.testing.assert_close(turned[name], base[name], rtol=1e-9, atol=1e-12)


def test_orthogonal_maps_of_the_features_change_nothing() -> None:
    student, memory, teacher, teacher_memory = sample()
    base = every_structure(student, memory, teacher, teacher_memory)
    tokens = intra_cka(student @ orthogonal(7), teacher @ orthogonal(9, 1))
    torch.testing.assert_close(tokens.neg_log[0], base["intra_neg_log"], rtol=1e-9, atol=0)
    # Between samples the map may mix all S * D features; F^E and F^C need it on the memory as well.
    rotation, teacher_rotation = orthogonal(42, 2), orthogonal(54, 3)
    between = inter_structure(
        student.flatten(1) @ rotation,
        teacher.flatten(1) @ teacher_rotation,
        memory @ rotation,
        teacher_memory @ teacher_rotation,
    )
    for name, value in between._asdict().items():
        torch.testing.assert_close(value, base[f"inter_{name}"], rtol=1e-8, atol=0)


@pytest.mark.parametrize("scale", [1e-10, 1e-6, 1e-3, 1e3, 1e6, 1e10])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_isotropic_scaling_changes_nothing(dtype: torch.dtype, scale: float) -> None:
    student, memory, teacher, teacher_memory = sample(dtype)
    leaves = student.clone().requires_grad_(), memory.clone().requires_grad_()
    scaled = (student * scale).requires_grad_(), (memory * scale).requires_grad_()
    base = every_structure(*leaves, teacher, teacher_memory)
    values = every_structure(*scaled, teacher / scale, teacher_memory / scale)
    base.pop("inter_distance")
    values.pop("inter_distance")  # a distance scales with the features
    for name in base:
        # 1 - cos of these features is about 1e-2, and F^C the square of a difference of two such.
        rtol = 1e-9 if dtype == F64 else 2e-4 if name == "inter_cosine" else 1e-5
        torch.testing.assert_close(values[name], base[name], rtol=rtol, atol=0)
    # f(c x) = f(x), so the gradient at c x is the one at x over c.
    truth, found = gradients_of(base, *leaves), gradients_of(values, *scaled)
    for name in base:
        rtol = 1e-9 if dtype == F64 else 2e-4 if name == "inter_cosine" else 1e-5
        for x, y in zip(found[name], truth[name], strict=True):
            assert x.isfinite().all()
            assert (x.double() * scale - y.double()).norm() <= rtol * y.double().norm(), name


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_euclidean_distances_scale_with_the_features(scale: float) -> None:
    inputs = sample(F32)
    base, scaled = (inter_structure(s, t, m, n) for s, m, t, n in (inputs, [scale * x for x in inputs]))
    torch.testing.assert_close(scaled.distance / scale**2, base.distance, rtol=2e-4, atol=0)


def test_row_permutation_changes_nothing() -> None:
    student, memory, teacher, teacher_memory = sample()
    mask = ragged_mask(5, 6, lengths=[6, 3, 5, 2, 4])
    base = every_structure(student, memory, teacher, teacher_memory, mask)
    tokens = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = intra_cka(student[:, tokens], teacher[:, tokens], mask[:, tokens])
    torch.testing.assert_close(moved.neg_log[0], base["intra_neg_log"], rtol=1e-9, atol=0)
    samples, rows = torch.tensor([4, 2, 0, 1, 3]), torch.tensor([2, 3, 1, 0])
    values = every_structure(
        student[samples], memory[rows], teacher[samples], teacher_memory[rows], mask[samples]
    )
    for name in base:
        expected = base[name][samples] if name.startswith("intra") else base[name]
        torch.testing.assert_close(values[name], expected, rtol=1e-9, atol=0)
    # Rows of one side alone are another structure.
    one_sided = intra_cka(student[:, tokens], teacher).neg_log[0]
    assert not torch.allclose(one_sided, intra_cka(student, teacher).neg_log[0], rtol=0.01)


# --- masks --------------------------------------------------------------------------------------------------------


# The reference computes in the features' dtype, and torch has no cdist in bfloat16.
@pytest.mark.parametrize(
    ("backend", "dtype"), [("eager", F32), ("eager", torch.bfloat16), ("reference", F32)]
)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_masked_positions_change_nothing_whatever_they_hold(
    dtype: torch.dtype, garbage: float, backend: str
) -> None:
    student, memory, teacher, teacher_memory = sample(dtype)
    mask = torch.tensor(
        [[1, 1, 0, 1, 0, 0]] * 2 + [[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
    )
    dropped = (mask == 0)[:, :, None]
    outcomes = []
    for filler in (0.0, garbage):
        filled = student.masked_fill(dropped, filler).requires_grad_()
        leaf = memory.clone().requires_grad_()
        values = every_structure(
            filled, leaf, teacher.masked_fill(dropped, filler), teacher_memory, mask, backend=backend
        )
        gradients = gradients_of(values, filled, leaf)
        for name, (d_own, _) in gradients.items():
            assert torch.equal(
                d_own.masked_select(dropped), torch.zeros_like(d_own.masked_select(dropped))
            ), name
        outcomes.append([*values.values(), *(x for pair in gradients.values() for x in pair)])
    for clean, dirty in zip(*outcomes, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, dirty)
    assert all((x != 0).any() for x in outcomes[0][:6])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8])
def test_masks_of_any_dtype_mean_the_same(dtype: torch.dtype) -> None:
    inputs, mask = sample(), ragged_mask(5, 6, lengths=[6, 3, 5, 2, 4])
    expected, actual = every_structure(*inputs, mask), every_structure(*inputs, mask.to(dtype))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_losses_ignore_what_padding_holds() -> None:
    student, memory, teacher, teacher_memory = sample(F32)
    mask = ragged_mask(5, 6, lengths=[6, 3, 5, 2, 4])
    module = FeatureStructureLoss("fsd_ilg", pad_features="exclude")
    logits, labels = torch.zeros(5, 2), torch.zeros(5, dtype=torch.long)
    for count in (5, 1):  # in a batch of one, L_L is left out: padding must not come back through that
        losses = []
        for filler in (0.0, float("nan")):
            dropped = (mask[-count:] == 0)[:, :, None]
            filled = student[-count:].masked_fill(dropped, filler).requires_grad_()
            teacher_filled = teacher[-count:].masked_fill(dropped, filler)
            loss = module(
                logits[:count], logits[:count], labels[:count], filled, teacher_filled, mask[-count:],
                student_penultimate=filled.clone(), teacher_penultimate=teacher_filled.clone(),
                student_memory=memory, teacher_memory=teacher_memory,
            ).loss  # fmt: skip
            (gradient,) = torch.autograd.grad(loss, filled)
            assert gradient.masked_select(dropped).abs().sum() == 0
            losses.append((loss, gradient))
        assert torch.equal(losses[0][0], losses[1][0])
        assert torch.equal(losses[0][1], losses[1][1])


@pytest.mark.parametrize("dtype", [F32, F64])
def test_under_exclude_padding_to_the_longest_sample_is_enough(dtype: torch.dtype) -> None:
    rows, longest, width, teacher_width = 8, 5, 6, 9
    student, teacher = (
        bert_features(4, rows, width, dtype=dtype),
        bert_features(4, rows, teacher_width, dtype=dtype),
    )
    memory, teacher_memory = (centroids(3, rows, d, dtype=dtype) for d in (width, teacher_width))
    mask = ragged_mask(4, rows, lengths=[5, 1, 3, 4])
    results = []
    for length in (rows, longest):
        cut, leaf = student[:, :length].clone().requires_grad_(), memory.clone().requires_grad_()
        teacher_cut, kept = teacher[:, :length], mask[:, :length]
        output = GlobalInterFeatureLoss(0.3, "exclude")(cut, leaf, teacher_cut, teacher_memory, kept)
        values = {
            "L_I": IntraFeatureLoss("mean_log", "exclude")(cut, teacher_cut, kept),
            "L_I, released": IntraFeatureLoss("log_mean", "exclude")(cut, teacher_cut, kept),
            "L_L": LocalInterFeatureLoss("exclude")(cut, teacher_cut, kept),
            **output._asdict(),
        }
        gradients = gradients_of(values, cut, leaf)
        results.append(
            [
                *values.values(),
                *(x[:, :longest] for x, _ in gradients.values()),
                *(y for _, y in gradients.values()),
            ]
        )
    rtol = 1e-10 if dtype == F64 else 2e-5
    for full, short in zip(*results, strict=True):
        assert (full - short).norm() <= rtol * full.norm()
    included = IntraFeatureLoss()(student, teacher, mask), IntraFeatureLoss()(student[:, :5], teacher[:, :5])
    assert not torch.isclose(*included, rtol=0.01)


# --- nothing to compare -------------------------------------------------------------------------------------------

MASK_OF_ONE = ragged_mask(3, 4, lengths=[1, 1, 1])
DEGENERATE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor | None]] = {
    "constant student": (lambda x: torch.full_like(x, 3.7), lambda x: x, None),
    "constant teacher": (lambda x: x, lambda x: torch.full_like(x, -1e3), None),
    "zero student": (torch.zeros_like, lambda x: x, None),
    "all zero": (torch.zeros_like, torch.zeros_like, None),
    "equal rows": (lambda x: x[:1, :1].expand_as(x), lambda x: x, None),
    "one row and sample": (lambda x: x[:1, :1], lambda x: x[:1, :1], None),
    "one token and sample kept": (lambda x: x[:1], lambda x: x[:1], MASK_OF_ONE[:1]),
    "everything masked": (lambda x: x, lambda x: x, torch.zeros(3, 4, dtype=torch.int64)),
    "empty batch": (lambda x: x[:0], lambda x: x[:0], None),
    "empty batch, masked": (lambda x: x[:0], lambda x: x[:0], MASK_OF_ONE[:0]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("case", DEGENERATE)
def test_without_structure_the_loss_and_its_gradient_are_zero(
    case: str, dtype: torch.dtype, backend: str
) -> None:
    change_student, change_teacher, mask = DEGENERATE[case]
    student = change_student(bert_features(3, 4, 5, dtype=dtype)).clone().requires_grad_()
    teacher = change_teacher(bert_features(3, 4, 8, dtype=dtype))
    intra = intra_cka(student, teacher, mask, backend=backend)
    local = inter_structure(student, teacher, mask=mask, backend=backend).local
    for name, value in (("one_minus_cka", intra.one_minus_cka), ("neg_log", intra.neg_log), ("local", local)):
        assert torch.equal(value, torch.zeros_like(value)), name
    for gradients in gradients_of(
        {"intra": intra.neg_log + intra.one_minus_cka, "local": local}, student
    ).values():
        assert torch.equal(gradients[0], torch.zeros_like(student))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", DEGENERATE)
def test_the_global_terms_are_defined_without_structure(case: str, backend: str) -> None:
    change_student, change_teacher, mask = DEGENERATE[case]
    student = change_student(bert_features(3, 4, 5, dtype=F32)).clone().requires_grad_()
    teacher = change_teacher(bert_features(3, 4, 8, dtype=F32))
    rows = student.shape[1]
    for memory in (centroids(3, rows, 5, dtype=F32), torch.zeros(3, rows * 5), torch.ones(3, rows * 5)):
        leaf = memory.clone().requires_grad_()
        values = inter_structure(
            student, teacher, leaf, centroids(3, rows, 8, dtype=F32), mask, backend=backend
        )._asdict()
        for name, gradients in gradients_of(values, student, leaf).items():
            assert values[name].isfinite(), name
            assert all(gradient.isfinite().all() for gradient in gradients), name
        if memory.unique().numel() == 1:  # centroids that are all the same have no structure either
            assert values["memory"] == 0
        if student.shape[0] == 0:
            assert values["distance"] == 0
            assert values["cosine"] == 0


def test_a_sample_that_lies_on_its_centroid_passes_no_gradient_but_no_nan() -> None:
    student = bert_features(3, 2, 4).requires_grad_()
    memory = student.detach().flatten(1)[:2].clone().requires_grad_()
    values = inter_structure(student, bert_features(3, 2, 5), memory, centroids(2, 2, 5))
    for gradients in gradients_of(values._asdict(), student, memory).values():
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("reduction", ["mean_log", "log_mean"])
def test_losses_of_an_empty_batch_are_zero(reduction: Any) -> None:
    student, teacher = torch.zeros(0, 4, 5, requires_grad=True), torch.zeros(0, 4, 8)
    for loss in (IntraFeatureLoss(reduction)(student, teacher), LocalInterFeatureLoss()(student, teacher)):
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss == 0
        assert gradient.shape == student.shape


@pytest.mark.parametrize("reduction", ["mean_log", "log_mean"])
def test_structures_that_share_nothing_have_a_finite_loss(reduction: Any) -> None:
    # K_T and K_S act on different rows: CKA is 0, and -log CKA stops at -log 1e-8.
    student, teacher = torch.zeros(1, 4, 1), torch.zeros(1, 4, 1)
    student[0, :2, 0], teacher[0, 2:, 0] = torch.tensor([1.0, -1.0]), torch.tensor([1.0, -1.0])
    student.requires_grad_()
    loss = IntraFeatureLoss(reduction)(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(8 * np.log(10), rel=1e-5)
    assert gradient.isfinite().all()


def test_below_its_floor_minus_log_cka_is_constant() -> None:
    # Of rank one each, with CKA = cos^2 of the columns = 1e-10.
    teacher = torch.tensor([0.0, 0.0, 1.0, -1.0], dtype=F64).view(1, 4, 1)
    student = torch.tensor([1.0, -1.0, 1e-5, -1e-5], dtype=F64).view(1, 4, 1).requires_grad_()
    for backend in BACKENDS:
        intra = intra_cka(student, teacher, backend=backend).neg_log.sum()
        rows = (student.view(4, 1), teacher.view(4, 1))
        between = inter_structure(*rows, *rows, backend=backend)
        for loss in (intra, between.local, between.memory):
            assert loss.item() == pytest.approx(8 * np.log(10))
            (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
            assert gradient.abs().max() == 0


# --- same bits, no seeds, dtypes, constants -----------------------------------------------------------------------


def test_repeated_calls_give_the_same_bits() -> None:
    inputs = bert_features(8, 16, 40, dtype=F32), centroids(6, 16, 40, dtype=F32)
    teacher, memory = bert_features(8, 16, 24, dtype=F32), centroids(6, 16, 24, dtype=F32)
    mask, first = ragged_mask(8, 16), None
    for _ in range(4):
        leaves = [x.clone().requires_grad_() for x in inputs]
        values = every_structure(*leaves, teacher, memory, mask)
        found = [*values.values(), *sum(gradients_of(values, *leaves).values(), [])]
        first = first or found
        assert all(torch.equal(x, y) for x, y in zip(first, found, strict=True))


@on_triton
def test_kernels_give_the_same_bits_whatever_the_mask_drops() -> None:
    mask = kept_mask("ragged", 3, 9)
    assert mask is not None
    student, teacher = normal(3, 9, 32, seed=1), normal(3, 9, 32, seed=2)
    memories = normal(4, 288, seed=3), normal(4, 288, seed=4)
    results = []
    for garbage in (float("nan"), 1e30):
        x = student.masked_fill(~mask[:, :, None], garbage).requires_grad_()
        m = memories[0].clone().requires_grad_()
        intra = intra_cka(x, teacher, mask, backend="triton")
        inter = inter_structure(x, teacher, m, memories[1], mask, backend="triton")
        (intra.neg_log.sum() + torch.stack(inter).sum()).backward()
        results.append([intra.one_minus_cka, intra.neg_log, torch.stack(inter), x.grad, m.grad])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_global_seed_is_touched(backend: str) -> None:
    def states() -> tuple[Any, ...]:
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002
        return torch.get_rng_state().tolist(), random.getstate(), (kind, keys.tolist(), *rest)

    student, memory, teacher, teacher_memory = sample(F32)
    before = states()
    leaves = student.requires_grad_(), memory.requires_grad_()
    gradients_of(every_structure(*leaves, teacher, teacher_memory, backend=backend), *leaves)
    gram(student, frozen_gram(memory, backend=backend), backend=backend)
    module = FeatureStructureLoss("fsd_ilg", backend=backend)
    module(
        torch.ones(5, 2), torch.ones(5, 2), torch.zeros(5, dtype=torch.long), student, teacher,
        student_penultimate=student, teacher_penultimate=teacher,
        student_memory=memory, teacher_memory=teacher_memory,
    ).loss.backward()  # fmt: skip
    assert states() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32, F64])
@pytest.mark.parametrize("memory_dtype", [torch.bfloat16, F32])
def test_gradients_have_the_dtype_of_their_input(memory_dtype: torch.dtype, dtype: torch.dtype) -> None:
    student, _, teacher, _ = sample(dtype)
    _, memory, _, teacher_memory = sample(memory_dtype)
    leaves = student.requires_grad_(), memory.requires_grad_()
    values = every_structure(*leaves, teacher.float(), teacher_memory.float())
    wide = F64 if dtype == F64 else F32
    for name, (d_student, d_memory) in gradients_of(values, *leaves).items():
        assert values[name].dtype == wide
        assert (d_student.dtype, d_memory.dtype) == (dtype, memory_dtype)
        assert d_student.shape == student.shape


@on_triton
def test_kernels_refuse_float64() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        intra_cka(x, x, backend="triton")
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        intra_cka(x.float(), x, backend="triton")
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        gram(x, backend="triton")
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        gram(x.float(), x.flatten(1), backend="triton")
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        structure(x[0, :, :3], x[1, :, :3], backend="triton")


def test_inputs_need_not_be_contiguous() -> None:
    student, teacher = bert_features(3, 6, 5, seed=1), bert_features(3, 6, 8, seed=2)
    memory, teacher_memory = centroids(4, 6, 5), centroids(4, 6, 8)
    mask = ragged_mask(3, 6, lengths=[6, 4, 2])

    def losses(x: Tensor, m: Tensor, t: Tensor, g: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        return *intra_cka(x, t, kept), *inter_structure(x, t, m, g, kept)

    expected = value_and_gradient(lambda x, m: losses(x, m, teacher, teacher_memory, mask), [student, memory])

    def strided(x: Tensor) -> Tensor:
        """The same values, laid out the other way round and with gaps."""
        gaps = x.permute(*reversed(range(x.ndim))).repeat_interleave(2, dim=0).contiguous()
        return gaps[::2].permute(*reversed(range(x.ndim)))

    views = [strided(x) for x in (teacher, teacher_memory, mask)]
    assert not any(view.is_contiguous() for view in views)
    actual = value_and_gradient(lambda x, m: losses(strided(x), strided(m), *views), [student, memory])
    for value, truth in zip(sum(actual, []), sum(expected, []), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)
    leaf = strided(student).requires_grad_()
    intra_cka(leaf, teacher).neg_log.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_teacher_gets_no_gradient(backend: str) -> None:
    inputs = [x.requires_grad_() for x in sample()]
    values = every_structure(*inputs, backend=backend)
    torch.stack([value.sum() for value in values.values()]).sum().backward()
    assert [x.grad is not None for x in inputs] == [True, True, False, False]
    basis = frozen_gram(inputs[3], backend=backend)
    assert not basis.memory.requires_grad
    assert not basis.gram.requires_grad
    student, memory, teacher, teacher_memory = inputs
    loss = inter_structure(student, teacher, memory, basis, backend=backend).distance
    assert torch.autograd.grad(loss, [teacher, teacher_memory], allow_unused=True) == (None, None)


# --- drawn examples -----------------------------------------------------------------------------------------------

sizes = st.integers(1, 6)


@EXAMPLES
@given(
    batch=sizes, rows=st.integers(1, 9), widths=st.tuples(sizes, sizes), count=sizes,
    seed=st.integers(0, 999), data=st.data(),
)  # fmt: skip
def test_drawn_masks_equal_cutting_and_zeroing(
    batch: int, rows: int, widths: tuple[int, int], count: int, seed: int, data: st.DataObject
) -> None:
    kept = st.lists(st.booleans(), min_size=rows, max_size=rows)
    mask = torch.tensor(data.draw(st.lists(kept, min_size=batch, max_size=batch)))
    student, teacher = (bert_features(batch, rows, d, seed=seed + d) for d in widths)
    memory, teacher_memory = (centroids(count, rows, d, seed=seed + d) for d in widths)
    dropped = ~mask[:, :, None]
    dirty = student.masked_fill(dropped, float("nan")), teacher.masked_fill(dropped, float("inf"))
    clean = student.masked_fill(dropped, 0.0), teacher.masked_fill(dropped, 0.0)
    intra = intra_cka(*dirty, mask)
    for i in range(batch):
        cut = intra_cka(student[i : i + 1, mask[i]], teacher[i : i + 1, mask[i]])
        torch.testing.assert_close(intra.neg_log[0, i], cut.neg_log[0, 0], rtol=1e-8, atol=1e-12)
    masked = inter_structure(*dirty, memory, teacher_memory, mask)
    zeroed = inter_structure(*clean, memory, teacher_memory)
    torch.testing.assert_close(torch.stack(masked), torch.stack(zeroed), rtol=1e-9, atol=1e-12)


@EXAMPLES
@given(batch=sizes, rows=st.integers(1, 9), seed=st.integers(0, 999), data=st.data())
def test_drawn_permutations_change_nothing(batch: int, rows: int, seed: int, data: st.DataObject) -> None:
    tokens = torch.tensor(data.draw(st.permutations(range(rows))))
    samples = torch.tensor(data.draw(st.permutations(range(batch))))
    student, teacher = bert_features(batch, rows, 4, seed=seed), bert_features(batch, rows, 6, seed=seed)
    memory, teacher_memory = centroids(3, rows, 4, seed=seed), centroids(3, rows, 6, seed=seed)
    mask = ragged_mask(batch, rows, seed=seed)
    base = every_structure(student, memory, teacher, teacher_memory, mask)
    moved = every_structure(
        student[samples][:, tokens],
        memory.view(3, rows, 4)[:, tokens].flatten(1),
        teacher[samples][:, tokens],
        teacher_memory.view(3, rows, 6)[:, tokens].flatten(1),
        mask[samples][:, tokens],
    )
    for name, value in base.items():
        expected = value[samples] if name.startswith("intra") else value
        torch.testing.assert_close(moved[name], expected, rtol=1e-8, atol=1e-12)


@EXAMPLES
@given(
    own=st.floats(-6, 6), their=st.floats(-6, 6), shift=st.floats(-100, 100), seed=st.integers(0, 999),
    shape=st.tuples(st.integers(2, 6), st.integers(2, 9)),
)  # fmt: skip
def test_drawn_scales_and_shifts_change_nothing(
    own: float, their: float, shift: float, seed: int, shape: tuple[int, int]
) -> None:
    student, teacher = bert_features(*shape, 5, seed=seed), bert_features(*shape, 7, seed=seed)
    changed = 10**own * (student + shift), 10**their * teacher
    base, scaled = intra_cka(student, teacher), intra_cka(*changed)
    torch.testing.assert_close(scaled.one_minus_cka, base.one_minus_cka, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(scaled.neg_log, base.neg_log, rtol=1e-7, atol=1e-12)
    local = inter_structure(student, teacher).local, inter_structure(*changed).local
    torch.testing.assert_close(local[1], local[0], rtol=1e-7, atol=1e-12)
