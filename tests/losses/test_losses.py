"""The loss modules against the paper's equations, put together here by hand from the reference ops."""

from __future__ import annotations

import dataclasses
import gc
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fsd_fast.losses.structures
from fsd_fast.commands.loss_flags import LossArguments
from fsd_fast.losses import (
    STRUCTURES,
    FeatureStructureLoss,
    FeatureStructureObjective,
    GlobalInterFeatureLoss,
    GlobalInterFeatureOutput,
    IntraFeatureLoss,
    LocalInterFeatureLoss,
    LogitDistillationLoss,
    Requirements,
)
from fsd_kernels import frozen_gram, inter_structure
from fsd_kernels.intra_cka.reference import sample_cka
from fsd_kernels.structure.reference import neg_log_cka
from tests.kernel_cases import bert_features, centroids, ragged_mask

B, S, D, D_T, K = 4, 5, 6, 8, 3
F32, F64 = torch.float32, torch.float64
MASK = ragged_mask(B, S, lengths=[5, 2, 3, 4])


def pair(seed: int = 0, dtype: torch.dtype = F64, width: int = D) -> tuple[Tensor, Tensor]:
    """Features [B, S, D] of a student and of a teacher that has something in common with it."""
    student = bert_features(B, S, width, seed=seed)
    mixing = torch.randn(width, D_T, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return student.to(dtype), (student @ mixing + bert_features(B, S, D_T, seed=seed + 1)).to(dtype)


def memories(dtype: torch.dtype = F64, rows: int = S) -> tuple[Tensor, Tensor]:
    return centroids(K, rows, D, seed=5, dtype=dtype), centroids(K, rows, D_T, seed=6, dtype=dtype)


def cka_by_hand(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """CKA_i of the tokens of every sample, [B]."""
    kept = torch.ones(student.shape[:2], dtype=torch.int64) if mask is None else mask
    return torch.stack(
        [sample_cka(s[k > 0], t[k > 0]) for s, t, k in zip(student, teacher, kept, strict=True)]
    )


def local_by_hand(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    kept = 1 if mask is None else mask[:, :, None]
    return neg_log_cka((student * kept).flatten(1), (teacher * kept).flatten(1))


def global_by_hand(
    student: Tensor, memory: Tensor, teacher: Tensor, teacher_memory: Tensor, gamma_m: float
) -> dict[str, Tensor]:
    """F_MM, F^E, F^C and L_G, pair by pair of samples and centroids."""
    euclid, cosine = [], []
    for h_s, h_t in zip(student.flatten(1), teacher.flatten(1), strict=True):
        for m_s, m_t in zip(memory, teacher_memory, strict=True):
            euclid.append(((h_t - m_t).norm() - (h_s - m_s).norm()) ** 2)
            cosine.append(
                (functional.cosine_similarity(h_t, m_t, 0) - functional.cosine_similarity(h_s, m_s, 0)) ** 2
            )
    f_mm = neg_log_cka(memory, teacher_memory)
    f_e, f_c = torch.stack(euclid).mean(), torch.stack(cosine).mean()
    loss = gamma_m * f_e + (1 - gamma_m) * f_c + f_mm
    return {"loss": loss, "memory": f_mm, "distance": f_e, "cosine": f_c}


def close(value: Tensor, truth: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(value, truth, rtol=rtol, atol=1e-12, check_dtype=False)


# --- L_I --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_features", ["include", "exclude"])
def test_intra_feature_loss_is_equation_6(pad_features: Any) -> None:
    student, teacher = pair()
    cka = cka_by_hand(student, teacher, MASK if pad_features == "exclude" else None)
    paper, released = -cka.log().mean(), -(cka.mean() + 1e-8).log()
    close(IntraFeatureLoss("mean_log", pad_features)(student, teacher, MASK), paper)
    close(IntraFeatureLoss("log_mean", pad_features)(student, teacher, MASK), released)
    assert released < paper - 1e-3  # Jensen
    close(IntraFeatureLoss(pad_features=pad_features, backend="reference")(student, teacher, MASK), paper)


@pytest.mark.parametrize("reduction", ["mean_log", "log_mean"])
def test_intra_feature_gradient_is_that_of_equation_6(reduction: Any) -> None:
    # The second pair has CKA below 1/2 on average, where "log_mean" takes its other branch.
    unrelated = (bert_features(B, 9, 40, seed=1) - bert_features(1, 1, 40), bert_features(B, 9, 2, seed=2))
    assert cka_by_hand(*unrelated).mean() < 0.5 < cka_by_hand(*pair()).mean()
    for student, teacher in (pair(), unrelated):
        student = student.clone().requires_grad_()
        cka = cka_by_hand(student, teacher)
        by_hand = -cka.log().mean() if reduction == "mean_log" else -(cka.mean() + 1e-8).log()
        (truth,) = torch.autograd.grad(by_hand, student)
        loss = IntraFeatureLoss(reduction)(student, teacher)
        close(loss, by_hand)
        close(torch.autograd.grad(loss, student)[0], truth)


@pytest.mark.parametrize("reduction", ["mean_log", "log_mean"])
def test_layers_are_averaged(reduction: Any) -> None:
    pairs = [pair(0), pair(3), pair(7)]
    students, teachers = [s for s, _ in pairs], tuple(t for _, t in pairs)
    intra, local = IntraFeatureLoss(reduction), LocalInterFeatureLoss()
    for module in (intra, local):
        each = torch.stack([module(*two) for two in pairs])
        assert each.max() > 1.01 * each.min()
        close(module(students, teachers), each.mean())
        close(module(students[:1], teachers[:1]), each[0])


# --- L_L and L_G ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_features", ["include", "exclude"])
def test_local_inter_feature_loss_is_equation_7(pad_features: Any) -> None:
    student, teacher = pair()
    student.requires_grad_()
    by_hand = local_by_hand(student, teacher, MASK if pad_features == "exclude" else None)
    loss = LocalInterFeatureLoss(pad_features)(student, teacher, MASK)
    close(loss, by_hand)
    close(torch.autograd.grad(loss, student)[0], torch.autograd.grad(by_hand, student)[0], 1e-8)


@pytest.mark.parametrize("gamma_m", [0.0, 0.3, 1.0])
def test_global_inter_feature_loss_is_equations_8_to_10(gamma_m: float) -> None:
    (student, teacher), (memory, given) = pair(), memories()
    leaves = student.requires_grad_(), memory.requires_grad_()
    by_hand = global_by_hand(student, memory, teacher, given, gamma_m)
    output = GlobalInterFeatureLoss(gamma_m)(student, memory, teacher, given, MASK)
    assert isinstance(output, GlobalInterFeatureOutput)
    for name, truth in by_hand.items():
        close(getattr(output, name), truth, 1e-8)
    truths = torch.autograd.grad(by_hand["loss"], leaves)
    for gradient, truth in zip(torch.autograd.grad(output.loss, leaves), truths, strict=True):
        close(gradient, truth, 1e-7)


def test_global_loss_under_exclude_zeroes_padding_and_fits_shorter_batches() -> None:
    (student, teacher), (memory, given) = pair(), memories(rows=S + 3)
    kept = MASK[:, :, None]
    padded = [functional.pad(x * kept, (0, 0, 0, 3)) for x in (student, teacher)]
    by_hand = global_by_hand(padded[0], memory, padded[1], given, 0.5)
    output = GlobalInterFeatureLoss(0.5, "exclude")(student, memory, teacher, given, MASK)
    for name, truth in by_hand.items():
        close(getattr(output, name), truth, 1e-8)


@pytest.fixture
def gram_calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The memories that ``frozen_gram`` was called with by the losses."""
    calls = []

    def counted(memory: Tensor, **kwargs: Any) -> Any:
        calls.append(memory)
        return frozen_gram(memory, **kwargs)

    monkeypatch.setattr(fsd_fast.losses.structures, "frozen_gram", counted)
    return calls


def test_what_depends_on_the_teacher_memory_alone_is_computed_once(gram_calls: list[Tensor]) -> None:
    (student, teacher), (memory, given) = pair(dtype=F32), memories(F32)
    module = GlobalInterFeatureLoss()
    first = module(student, memory, teacher, given).loss
    for _ in range(3):
        assert torch.equal(module(student, memory, teacher, given).loss, first)
        memory = memory + 0  # the student's memory changes at every step
    assert len(gram_calls) == 1

    given.mul_(torch.arange(1.0, K + 1)[:, None])
    changed = module(student, memory, teacher, given)
    assert len(gram_calls) == 2
    fresh = inter_structure(student, teacher, memory, given)
    close(changed.memory, fresh.memory, 1e-5)
    assert not torch.isclose(changed.loss, first, rtol=1e-3)

    other = memories(F32)[1] * 2
    module(student, memory, teacher, other)
    assert len(gram_calls) == 3
    assert gram_calls[2] is other


def test_another_memory_at_the_same_address_is_not_mistaken_for_the_old_one(gram_calls: list[Tensor]) -> None:
    (student, teacher), (memory, given) = pair(dtype=F32), memories(F32)
    module = GlobalInterFeatureLoss()
    for factor in (1.0, 2.0, 3.0):
        scaled = given * torch.linspace(1, factor, K)[:, None]
        loss = module(student, memory, teacher, scaled).distance
        close(loss, inter_structure(student, teacher, memory, scaled).distance, 1e-5)
        del scaled
        gc.collect()
    assert len(gram_calls) == 3


# --- L_VKD ------------------------------------------------------------------------------------------------------------


def logits(classes: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.Generator().manual_seed(0)
    own, given = (3 * torch.randn(B, classes, generator=noise) for _ in range(2))
    labels = torch.randint(classes, (B,), generator=noise)
    return own.to(dtype), given.to(dtype), labels


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.3, 5.0), (1.0, 10.0)])
@pytest.mark.parametrize("classes", [2, 3])
def test_vkd_is_equations_1_to_3(classes: int, alpha: float, temperature: float) -> None:
    own, given, labels = logits(classes)
    own.requires_grad_()
    p_t, p_s = (given / temperature).softmax(1), (own / temperature).softmax(1)
    kl = (p_t * (p_t / p_s).log()).sum(1).mean()
    ce = -own.softmax(1)[torch.arange(B), labels].log().mean()
    by_hand = alpha * ce + (1 - alpha) * temperature**2 * kl
    module = LogitDistillationLoss(alpha, temperature)
    loss = module(own, given.requires_grad_(), labels)
    close(loss, by_hand, 1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(loss, own, retain_graph=True)[0],
        torch.autograd.grad(by_hand, own)[0],
        rtol=1e-4,
        atol=1e-5,
    )
    assert torch.autograd.grad(loss, given, allow_unused=True) == (None,)
    total, hard, soft = module.components(own, given, labels)
    close(hard, functional.cross_entropy(own, labels))
    close(total, alpha * hard + (1 - alpha) * soft)


def test_one_logit_is_regression() -> None:
    own, given, _ = logits(1)
    labels = torch.tensor([0.5, 4.0, 2.5, 1.0])
    hard = ((own[:, 0] - labels) ** 2).mean()
    soft = ((own - given) ** 2).mean()
    for temperature in (1.0, 20.0):
        close(LogitDistillationLoss(0.3, temperature)(own, given, labels), 0.3 * hard + 0.7 * soft, 1e-6)
    whole = torch.tensor([1, 4, 2, 0])
    close(LogitDistillationLoss(1.0)(own, given, whole), ((own[:, 0] - whole) ** 2).mean(), 1e-6)


def test_regression_is_what_the_soft_term_tends_to() -> None:
    # tau^2 KL -> |z_S - z_T|^2 / (2 C) for centred logits as tau grows.
    own, given, labels = (x.double() if x.is_floating_point() else x for x in logits(3))
    own, given = own - own.mean(1, keepdim=True), given - given.mean(1, keepdim=True)
    loss = LogitDistillationLoss(0.0, 300.0)(own, given, labels)
    close(loss, ((own - given) ** 2).sum(1).mean() / 6, 0.05)


def test_vkd_in_half_precision_is_computed_in_float32() -> None:
    own, given, labels = logits(3, torch.bfloat16)
    loss = LogitDistillationLoss()(own, given, labels)
    assert loss.dtype == F32
    assert torch.equal(loss, LogitDistillationLoss()(own.float(), given.float(), labels))


# --- L ----------------------------------------------------------------------------------------------------------------

WEIGHTS: dict[str, float] = {"beta": 3.0, "gamma_i": 0.7, "gamma_l": 0.4, "gamma_g": 0.05, "gamma_m": 0.3}
VKD_TERMS = {"loss_vkd", "loss_hard", "loss_soft"}
GLOBAL_TERMS = {"loss_global", "global_memory", "global_distance", "global_cosine"}


def arguments(dtype: torch.dtype = F64, samples: int = B) -> dict[str, Any]:
    """Everything ``FeatureStructureLoss`` takes, with the penultimate layers last among the features."""
    own, given, labels = logits(2)
    (first, first_t), (last, last_t) = pair(3, dtype), pair(0, dtype)
    memory, given_memory = memories(dtype)
    last, last_t = last[:samples], last_t[:samples]
    return {
        "student_logits": own[:samples],
        "teacher_logits": given[:samples],
        "labels": labels[:samples],
        "student_features": [first[:samples], last],
        "teacher_features": [first_t[:samples], last_t],
        "attention_mask": MASK[:samples],
        "student_penultimate": last,
        "teacher_penultimate": last_t,
        "student_memory": memory,
        "teacher_memory": given_memory,
    }


def terms(module: FeatureStructureLoss, given: dict[str, Any]) -> dict[str, Tensor]:
    """L_VKD, L_I, L_L and L_G from the modules alone."""
    features = given["student_features"], given["teacher_features"], given["attention_mask"]
    return {
        "loss_vkd": LogitDistillationLoss(0.5, 10.0)(
            given["student_logits"], given["teacher_logits"], given["labels"]
        ),
        "loss_intra": IntraFeatureLoss("mean_log", module.intra.pad_features)(*features),
        "loss_local": LocalInterFeatureLoss(module.local.pad_features)(*features),
        "loss_global": GlobalInterFeatureLoss(WEIGHTS["gamma_m"], module.global_.pad_features)(
            given["student_penultimate"],
            given["student_memory"],
            given["teacher_penultimate"],
            given["teacher_memory"],
            given["attention_mask"],
        ).loss,
    }


@pytest.mark.parametrize("pad_features", ["include", "exclude"])
@pytest.mark.parametrize("method", STRUCTURES)
def test_integrated_loss_is_equation_11(method: str, pad_features: Any) -> None:
    module = FeatureStructureLoss(method, pad_features=pad_features, **WEIGHTS)
    given = arguments()
    for leaf in (given["student_logits"], given["student_memory"], *given["student_features"]):
        leaf.requires_grad_()
    output, expected = module(**given), terms(module, given)
    used = {name: letter in method.removeprefix("fsd_") for name, letter in zip(
        ("loss_intra", "loss_local", "loss_global"), "ilg", strict=True)} if method != "vkd" else {}  # fmt: skip
    total = expected["loss_vkd"].double()
    for (name, present), weight in zip(used.items(), ("gamma_i", "gamma_l", "gamma_g"), strict=False):
        total = total + present * WEIGHTS["beta"] * WEIGHTS[weight] * expected[name]
    close(output.loss, total, 1e-8)
    names = VKD_TERMS | {name for name, present in used.items() if present}
    if "loss_global" in names:
        names |= GLOBAL_TERMS
    assert set(output.components) == names
    for name in names & set(expected):
        close(output.components[name], expected[name], 1e-8)
    assert not any(value.requires_grad for value in output.components.values())


@pytest.mark.parametrize("weight", ["beta", "gamma_i", "gamma_l", "gamma_g"])
def test_weights_enter_linearly(weight: str) -> None:
    given = arguments()
    values = [
        FeatureStructureLoss("fsd_ilg", **(WEIGHTS | {weight: value}))(**given).loss
        for value in (0.0, 1.0, 3.0)
    ]
    close(values[2] - values[0], 3 * (values[1] - values[0]), 1e-8)
    assert values[1] > values[0]
    if weight == "beta":
        close(values[0], terms(FeatureStructureLoss(**WEIGHTS), given)["loss_vkd"], 1e-6)


def test_the_remaining_settings_reach_their_losses() -> None:
    module = FeatureStructureLoss(
        alpha=0.2,
        temperature=7.0,
        gamma_m=0.9,
        reduction="log_mean",
        pad_features="exclude",
        backend="reference",
    )
    assert (module.logits.alpha, module.logits.temperature) == (0.2, 7.0)
    assert (module.intra.reduction, module.global_.gamma_m) == ("log_mean", 0.9)
    for part in (module.intra, module.local, module.global_):
        assert (part.pad_features, part.backend) == ("exclude", "reference")
    assert "method='fsd_ilg', beta=4.0" in repr(module)


def test_one_pass_serves_local_and_global(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return inter_structure(*args, **kwargs)

    monkeypatch.setattr(fsd_fast.losses.structures, "inter_structure", counted)
    module = FeatureStructureLoss("fsd_ilg", pad_features="exclude", **WEIGHTS)
    results = []
    for share in (True, False):
        given = arguments()
        layers = [x.requires_grad_() for x in given["student_features"]]
        memory = given["student_memory"].requires_grad_()
        if not share:  # equal tensors, but not the same objects
            given["student_penultimate"] = given["student_penultimate"] * 1
        calls.clear()
        output = module(**given)
        assert len(calls) == (2 if share else 3)
        results.append(
            [output.loss, *output.components.values(), *torch.autograd.grad(output.loss, [*layers, memory])]
        )
    for shared, apart in zip(*results, strict=True):
        close(shared, apart, 1e-8)
    # The same student layer against another teacher layer is another pair.
    given = arguments()
    given["teacher_penultimate"] = given["teacher_penultimate"] * 1
    calls.clear()
    module(**given)
    assert len(calls) == 3


@pytest.mark.parametrize("share", [True, False])
def test_in_a_batch_of_one_the_local_loss_is_zero(share: bool) -> None:
    given = arguments(samples=1)
    if not share:
        given["student_penultimate"] = given["student_penultimate"].clone()
    module = FeatureStructureLoss("fsd_ilg", **WEIGHTS)
    output = module(**given)
    assert output.components["loss_local"] == 0
    without = FeatureStructureLoss("fsd_ilg", **(WEIGHTS | {"gamma_l": 0.0}))(**given)
    assert torch.equal(output.loss, without.loss)
    assert output.components["loss_global"] > 0
    alone = FeatureStructureLoss("fsd_l", **WEIGHTS)(**given)
    close(alone.loss, alone.components["loss_vkd"])


def test_one_layer_may_be_given_as_a_tensor() -> None:
    given = arguments()
    listed = given | {
        "student_features": given["student_features"][1:],
        "teacher_features": given["teacher_features"][1:],
    }
    bare = given | {
        "student_features": given["student_features"][1],
        "teacher_features": given["teacher_features"][1],
    }
    module = FeatureStructureLoss("fsd_ilg", **WEIGHTS)
    assert torch.equal(module(**listed).loss, module(**bare).loss)


def test_a_method_needs_only_what_it_uses() -> None:
    given = arguments()
    kept = {name: given[name] for name in ("student_logits", "teacher_logits", "labels")}
    assert FeatureStructureLoss("vkd")(**kept).loss.isfinite()
    for name in ("student_penultimate", "teacher_penultimate", "student_memory", "teacher_memory"):
        kept[name] = given[name]
    assert FeatureStructureLoss("fsd_g")(**kept).loss.isfinite()


def test_module_holds_no_state() -> None:
    # The teacher memory's block of Gamma is kept, but in no checkpoint.
    module = FeatureStructureLoss("fsd_ilg")
    module(**arguments())
    assert module.state_dict() == {}
    assert list(module.parameters()) == []


# --- compiled, under autocast -------------------------------------------------------------------------------------

Caller = Callable[[dict[str, Any]], Tensor]


def module_calls() -> dict[str, Caller]:
    intra, local = IntraFeatureLoss("mean_log", "exclude"), LocalInterFeatureLoss("exclude")
    released, between = IntraFeatureLoss("log_mean"), GlobalInterFeatureLoss(0.4, "exclude")
    vkd, whole = LogitDistillationLoss(), FeatureStructureLoss("fsd_ilg", **WEIGHTS)
    features = ("student_features", "teacher_features", "attention_mask")
    penultimate = (
        "student_penultimate", "student_memory", "teacher_penultimate", "teacher_memory", "attention_mask",
    )  # fmt: skip
    return {
        "IntraFeatureLoss": lambda given: intra(*(given[name] for name in features)),
        "IntraFeatureLoss, log_mean": lambda given: released(*(given[name] for name in features)),
        "LocalInterFeatureLoss": lambda given: local(*(given[name] for name in features)),
        "GlobalInterFeatureLoss": lambda given: between(*(given[name] for name in penultimate)).loss,
        "LogitDistillationLoss": lambda given: vkd(
            given["student_logits"], given["teacher_logits"], given["labels"]
        ),
        "FeatureStructureLoss": lambda given: whole(**given).loss,
    }


def loss_and_gradients(call: Caller) -> list[Tensor]:
    given = arguments(F32)
    leaves = [given["student_logits"], *given["student_features"], given["student_memory"]]
    for leaf in leaves:
        leaf.requires_grad_()
    loss = call(given)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [loss.detach(), *(x for x in found if x is not None)]


@pytest.mark.parametrize("name", module_calls())
def test_compiled_module_equals_uncompiled(name: str) -> None:
    call = module_calls()[name]
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = loss_and_gradients(call)  # with a teacher memory known before compilation, and then another
    for _ in range(2):
        for value, truth in zip(loss_and_gradients(compiled), expected, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-6, atol=1e-7)


def test_a_compiled_global_loss_sees_a_changed_memory() -> None:
    module = GlobalInterFeatureLoss()
    (student, teacher), (memory, given) = pair(dtype=F32), memories(F32)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        truth = inter_structure(student, teacher, memory, given).memory
        close(compiled(student, memory, teacher, given).memory, truth, 1e-5)
        given.mul_(torch.arange(1.0, K + 1)[:, None])


@pytest.mark.parametrize("name", module_calls())
def test_autocast_changes_no_loss(name: str) -> None:
    call = module_calls()[name]
    expected = loss_and_gradients(call)
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss_and_gradients(call)
    for value, truth in zip(actual, expected, strict=True):
        assert value.dtype == truth.dtype
        assert torch.equal(value, truth)


# --- errors -----------------------------------------------------------------------------------------------------------

X, Y = pair(dtype=F32)
M, N = memories(F32)
Z = torch.zeros(B, 2)
LABELS = torch.zeros(B, dtype=torch.long)
METHOD_NAMES = "vkd, fsd_i, fsd_l, fsd_g, fsd_il, fsd_ilg"

ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "reduction": (
        lambda: IntraFeatureLoss("sum"),  # type: ignore[arg-type]
        ValueError,
        r"reduction: expected one of mean_log, log_mean, got 'sum'",
    ),
    "pad_features of L_I": (
        lambda: IntraFeatureLoss(pad_features="drop"),  # type: ignore[arg-type]
        ValueError,
        r"pad_features: expected one of include, exclude, got 'drop'",
    ),
    "pad_features of L_L": (lambda: LocalInterFeatureLoss("no"), ValueError, r"pad_features: .*'no'"),  # type: ignore[arg-type]
    "pad_features of L_G": (lambda: GlobalInterFeatureLoss(0.5, "no"), ValueError, r"pad_features: .*'no'"),  # type: ignore[arg-type]
    "method": (
        lambda: FeatureStructureLoss("fsd"),
        ValueError,
        rf"method: expected one of {METHOD_NAMES}, got 'fsd'",
    ),
    "gamma_m": (
        lambda: GlobalInterFeatureLoss(1.5),
        ValueError,
        r"gamma_m: expected a weight in \[0, 1\], got 1.5",
    ),
    "alpha": (
        lambda: LogitDistillationLoss(-0.1),
        ValueError,
        r"alpha: expected a weight in \[0, 1\], got -0.1",
    ),
    "alpha, NaN": (lambda: LogitDistillationLoss(float("nan")), ValueError, r"alpha: .*got nan"),
    "temperature": (lambda: LogitDistillationLoss(0.5, 0.0), ValueError, r"temperature: .*above 0, got 0.0"),
    "beta": (lambda: FeatureStructureLoss(beta=-1.0), ValueError, r"beta: expected a weight >= 0, got -1.0"),
    "gamma_i": (lambda: FeatureStructureLoss(gamma_i=-1.0), ValueError, r"gamma_i: expected a weight >= 0"),
    "gamma_l": (lambda: FeatureStructureLoss(gamma_l=-1.0), ValueError, r"gamma_l: expected a weight >= 0"),
    "gamma_g": (lambda: FeatureStructureLoss(gamma_g=float("nan")), ValueError, r"gamma_g: .*got nan"),
    "backend": (
        lambda: IntraFeatureLoss(backend="gpu")(X, Y),
        ValueError,
        r"backend: 'gpu' is not one of auto, ",
    ),
    "student of two axes": (
        lambda: IntraFeatureLoss()(X[0], Y),
        ValueError,
        r"student: expected features \[B, S, D\], got shape \[5, 6\]",
    ),
    "teacher of two axes": (
        lambda: LocalInterFeatureLoss()(X, Y.flatten(1)),
        ValueError,
        r"teacher: .*got shape \[4, 40\]",
    ),
    "no layers": (lambda: IntraFeatureLoss()([], []), ValueError, r"student: .*got an empty sequence"),
    "layer counts": (
        lambda: IntraFeatureLoss()([X, X], [Y]),
        ValueError,
        r"teacher: expected 2 layers .*got 1",
    ),
    "layer counts of L_L": (
        lambda: LocalInterFeatureLoss()(X, [Y, Y]),
        ValueError,
        r"teacher: expected 1 layers .*got 2",
    ),
    "not a tensor": (
        lambda: IntraFeatureLoss()([[1.0]], Y),
        TypeError,
        r"student: expected tensors .*got list",
    ),  # type: ignore[list-item]
    "integers": (lambda: IntraFeatureLoss()(X.int(), Y), TypeError, r"student: .*got torch.int32"),
    "integer teacher": (
        lambda: LocalInterFeatureLoss()(X, Y.int()),
        TypeError,
        r"teacher: .*got torch.int32",
    ),
    "lengths": (
        lambda: IntraFeatureLoss()(X, Y[:, :3]),
        ValueError,
        r"teacher: expected \[B, S, D\] with B, S = \[4, 5\] .*got \[4, 3, 8\]",
    ),
    "samples": (lambda: LocalInterFeatureLoss()(X, Y[:3]), ValueError, r"B, S = \[4, 5\] .*got \[3, 5, 8\]"),
    "mask": (
        lambda: IntraFeatureLoss(pad_features="exclude")(X, Y, MASK[:, :2]),
        ValueError,
        r"mask: expected \[B, S\] = \[4, 5\] .*got \[4, 2\]",
    ),
    "mask of L_L": (
        lambda: LocalInterFeatureLoss("exclude")(X, Y, MASK[:2]),
        ValueError,
        r"mask: .*got \[2, 5\]",
    ),
    "batch of one": (
        lambda: LocalInterFeatureLoss()(X[:1], Y[:1]),
        ValueError,
        r"student: .*at least 2, got a batch of 1",
    ),
    "width of the student memory": (
        lambda: GlobalInterFeatureLoss()(X, M[:, :-1], Y, N),
        ValueError,
        r"student_memory: expected \[K, S \* D\] = \[K, 30\] for features \[4, 5, 6\] .*'include', got \[3, 29\]",
    ),
    "width of the teacher memory": (
        lambda: GlobalInterFeatureLoss()(X, M, Y, torch.cat([N, N], 1)),
        ValueError,
        r"teacher_memory: expected .*\[K, 40\] .*'include', got \[3, 80\]",
    ),
    "memory shorter than the features": (
        lambda: GlobalInterFeatureLoss(0.5, "exclude")(X, M[:, :24], Y, N),
        ValueError,
        r"student_memory: .*'exclude', got \[3, 24\]",
    ),
    "memory of part of a token": (
        lambda: GlobalInterFeatureLoss(0.5, "exclude")(X, torch.ones(K, 33), Y, N),
        ValueError,
        r"student_memory: .*'exclude', got \[3, 33\]",
    ),
    "memory of three axes": (
        lambda: GlobalInterFeatureLoss()(X, M.view(K, S, D), Y, N),
        ValueError,
        r"student_memory: .*got \[3, 5, 6\]",
    ),
    "centroids": (
        lambda: GlobalInterFeatureLoss()(X, M[:2], Y, N),
        ValueError,
        r"student_memory: expected 3 centroids like teacher_memory, got 2",
    ),
    "integer memory": (
        lambda: GlobalInterFeatureLoss()(X, M.int(), Y, N),
        TypeError,
        r"memory: .*got torch.int32",
    ),
    "logits": (
        lambda: LogitDistillationLoss()(Z, torch.zeros(B, 3), LABELS),
        ValueError,
        r"student_logits, teacher_logits: expected the same \[B, C\], got \[4, 2\] and \[4, 3\]",
    ),
    "logits of one axis": (
        lambda: LogitDistillationLoss()(Z[0], Z[0], LABELS),
        ValueError,
        r"\[B, C\], got \[2\] and",
    ),
    "labels": (
        lambda: LogitDistillationLoss()(Z, Z, LABELS[:2]),
        ValueError,
        r"labels: expected \[B\] = \[4\], got \[2\]",
    ),
    "labels of two axes": (
        lambda: LogitDistillationLoss()(Z, Z, LABELS[:, None]),
        ValueError,
        r"labels: .*got \[4, 1\]",
    ),
    "float labels": (
        lambda: LogitDistillationLoss()(Z, Z, LABELS.float()),
        TypeError,
        r"labels: expected class numbers \(an integer dtype\), got torch.float32",
    ),
    "no features": (
        lambda: FeatureStructureLoss("fsd_i")(Z, Z, LABELS),
        ValueError,
        r"student: .*empty sequence",
    ),
    "no memories": (
        lambda: FeatureStructureLoss("fsd_g")(Z, Z, LABELS, X, Y),
        ValueError,
        r"method 'fsd_g' uses L_G: expected student_penultimate, student_memory, teacher_penultimate and teach",
    ),
    "one memory": (
        lambda: FeatureStructureLoss("fsd_ilg")(
            Z, Z, LABELS, X, Y, student_penultimate=X, teacher_penultimate=Y, student_memory=M
        ),
        ValueError,
        r"method 'fsd_ilg' uses L_G",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument_and_what_was_expected(case: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()


def test_samples_without_a_label_leave_the_hard_term():
    logits, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    loss = LogitDistillationLoss(alpha=1.0)
    some = loss(logits, teacher, torch.tensor([2, -100, 0, -100]))
    assert torch.equal(some, torch.nn.functional.cross_entropy(logits[[0, 2]], torch.tensor([2, 0])))
    none = loss(logits, teacher, torch.full((4,), -100))
    none.backward()
    assert none == 0
    assert torch.equal(logits.grad, torch.zeros(4, 3))


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_that_are_no_class_are_refused(label):
    with pytest.raises(ValueError, match=rf"labels: expected class numbers from 0 to 2.*got \[0, {label}\]"):
        LogitDistillationLoss()(torch.randn(2, 3), torch.randn(2, 3), torch.tensor([0, label]))


def test_modules_and_flags_have_the_same_defaults():
    flags = {field.name: field.default for field in dataclasses.fields(LossArguments)}
    for module in (FeatureStructureLoss, LogitDistillationLoss, GlobalInterFeatureLoss, IntraFeatureLoss):
        for name, parameter in inspect.signature(module).parameters.items():
            if name not in ("pad_features", "reduction"):
                assert parameter.default == flags[name], (module, name)
    assert inspect.signature(IntraFeatureLoss).parameters["reduction"].default == flags["intra_reduction"]


def test_an_objective_asks_for_what_its_method_reads():
    pairs, last = [(2, 1), (4, 2)], (5, 3)
    wanted = {
        "vkd": Requirements((), (), False, 1),
        "fsd_i": Requirements((1, 2), (2, 4), False, 1),
        "fsd_l": Requirements((1, 2), (2, 4), False, 2),
        "fsd_g": Requirements((3,), (5,), True, 1),
        "fsd_il": Requirements((1, 2), (2, 4), False, 2),
        "fsd_ilg": Requirements((1, 2, 3), (2, 4, 5), True, 2),
    }
    assert wanted.keys() == STRUCTURES.keys()
    for method, requires in wanted.items():
        assert FeatureStructureObjective(FeatureStructureLoss(method), pairs, last).requires == requires
