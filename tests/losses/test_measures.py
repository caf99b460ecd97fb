"""L_I and L_L with other measures: against formulas written here, and what unbiased CKA is for."""

import itertools
import math

import pytest
import torch

import fsd_fast.losses.measures
from fsd_fast.losses import (
    FeatureStructureLoss,
    FeatureStructureObjective,
    IntraFeatureLoss,
    LocalInterFeatureLoss,
    reference,
)

F64 = torch.float64
BACKENDS = ["reference", "eager"]
OTHER = [{"estimator": "unbiased"}, {"measure": "gram"}]


def random(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def bert_like(*shape, seed):
    """Features with the same large mean in a few dimensions, as those of BERT."""
    features = random(*shape, seed=seed)
    features[..., :2] += 30
    return features


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


def hsic_by_tuples(x, y):
    """HSIC_1 as a U-statistic: the mean of its kernel over ordered tuples of four different rows."""
    k, l = x @ x.T, y @ y.T  # noqa: E741
    tuples = list(itertools.permutations(range(len(x)), 4))
    return sum(k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in tuples) / len(tuples)


def unbiased_by_tuples(x, y):
    return 1 - hsic_by_tuples(x, y) / (hsic_by_tuples(x, x) * hsic_by_tuples(y, y)).sqrt()


def gram_by_entries(x, y):
    """Sum over pairs of rows of (<x_i, x_j> / |K| - <y_i, y_j> / |L|)^2."""
    norms = [
        torch.stack([(a @ b) ** 2 for a, b in itertools.product(rows, rows)]).sum().sqrt() for rows in (x, y)
    ]
    index = itertools.product(range(len(x)), repeat=2)
    return sum((x[i] @ x[j] / norms[0] - y[i] @ y[j] / norms[1]) ** 2 for i, j in index)


FORMULAS = {"unbiased": unbiased_by_tuples, "gram": gram_by_entries}


def formula(settings):
    return FORMULAS[settings.get("estimator", settings.get("measure"))]


@pytest.mark.parametrize("settings", OTHER, ids=str)
def test_the_references_are_the_formulas(settings):
    student, teacher = random(6, 5).requires_grad_(), random(6, 7, seed=1)
    plain = {"unbiased": reference.unbiased_cka_loss, "gram": reference.gram_distance}
    value = plain[settings.get("estimator", settings.get("measure"))](student, teacher)
    truth = formula(settings)(student, teacher)
    torch.testing.assert_close(value, truth, rtol=1e-11, atol=0)
    torch.testing.assert_close(gradient(value, student), gradient(truth, student), rtol=1e-9, atol=1e-13)


MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1, 0]])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", OTHER, ids=str)
def test_intra_is_the_mean_over_samples(settings, backend, masked):
    student, teacher = bert_like(3, 7, 5, seed=0).requires_grad_(), bert_like(3, 7, 9, seed=1)
    loss = IntraFeatureLoss(pad_features="exclude" if masked else "include", backend=backend, **settings)
    value = loss(student, teacher, MASK)
    kept = MASK.bool() if masked else torch.ones_like(MASK).bool()
    truth = sum(formula(settings)(student[i][kept[i]], teacher[i][kept[i]]) for i in range(3)) / 3
    torch.testing.assert_close(value, truth, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient(value, student), gradient(truth, student), rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", OTHER, ids=str)
def test_local_compares_the_flattened_samples(settings, backend, masked):
    student, teacher = bert_like(6, 7, 5, seed=0).requires_grad_(), bert_like(6, 7, 9, seed=1)
    mask = torch.cat([MASK, MASK.flip(0)])
    loss = LocalInterFeatureLoss("exclude" if masked else "include", backend, **settings)
    value = loss(student, teacher, mask)
    dropped = (mask == 0)[..., None] & torch.tensor(masked)
    rows = [side.masked_fill(dropped, 0.0).flatten(1) for side in (student, teacher)]
    truth = formula(settings)(*rows)
    torch.testing.assert_close(value, truth, rtol=1e-8, atol=0)
    torch.testing.assert_close(gradient(value, student), gradient(truth, student), rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("settings", OTHER, ids=str)
@pytest.mark.parametrize("kind", [IntraFeatureLoss, LocalInterFeatureLoss])
def test_float32_keeps_its_digits_beside_large_means(kind, settings):
    own, given = bert_like(8, 16, 24, seed=2).float(), bert_like(8, 16, 32, seed=3).float()
    exact = own.double().requires_grad_()
    truth = kind(backend="reference", **settings)(exact, given.double())
    leaf = own.clone().requires_grad_()
    value = kind(**settings)(leaf, given)
    assert value.dtype == torch.float32
    # Uncentred products of features like these agree in all but their last digits, of which the distance is made.
    tolerance = 2e-3 if settings.get("measure") == "gram" else 2e-5
    assert abs(value.item() - truth.item()) <= tolerance * truth.item()
    wanted = gradient(truth, exact)
    error = (gradient(value, leaf).double() - wanted).abs().max() / wanted.abs().max()
    assert error < tolerance


def test_dropped_tokens_do_not_hide_the_structure_of_the_others():
    """Beside a very large mean, which dropped tokens must not bring back into what counts as rounding."""
    own, given = random(3, 7, 5, seed=0) + 3000, random(3, 7, 9, seed=1)
    own = own.float()
    loss = IntraFeatureLoss(pad_features="exclude", estimator="unbiased")
    value, truth = loss(own, given.float(), MASK), loss(own.double(), given, MASK)
    assert truth > 0.1
    assert abs(value.item() - truth.item()) < 2e-2 * truth.item()


def test_independent_features_are_alike_for_biased_cka_alone():
    """With many more features than rows biased CKA is near 1 whatever the features are."""
    samples = random(32, 1, 4096, dtype=torch.float32), random(32, 1, 4096, seed=1, dtype=torch.float32)
    assert math.exp(-LocalInterFeatureLoss()(*samples)) > 0.99
    assert abs(1 - LocalInterFeatureLoss(estimator="unbiased")(*samples)) < 0.1
    tokens = random(8, 128, 768, dtype=torch.float32), random(8, 128, 768, seed=1, dtype=torch.float32)
    assert math.exp(-IntraFeatureLoss()(*tokens)) > 0.85
    assert abs(1 - IntraFeatureLoss(estimator="unbiased")(*tokens)) < 0.01


def test_unbiased_means_zero_on_average():
    values = [
        1
        - LocalInterFeatureLoss(estimator="unbiased")(
            random(8, 1, 40, seed=i), random(8, 1, 40, seed=1000 + i)
        )
        for i in range(200)
    ]
    mean, spread = torch.stack(values).mean(), torch.stack(values).std()
    assert abs(mean) < 3 * spread / 200**0.5
    assert min(values) < 0 < max(values)


@pytest.mark.parametrize("settings", OTHER, ids=str)
@pytest.mark.parametrize("kind", [IntraFeatureLoss, LocalInterFeatureLoss])
def test_student_equal_to_teacher_has_loss_and_gradient_zero(kind, settings):
    student = bert_like(6, 7, 5, seed=0).float().requires_grad_()
    value = kind(**settings)(student, student.detach())
    assert value == 0
    assert gradient(value, student).abs().max() == 0
    rotation, _ = torch.linalg.qr(random(5, 5, seed=2))
    turned = kind(**settings)(student.double() @ rotation * 3, student.double())
    assert abs(turned) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_fewer_than_four_rows_have_no_unbiased_structure(rows, backend):
    student, teacher = random(2, 6, 5).requires_grad_(), random(2, 6, 5, seed=1)
    mask = torch.zeros(2, 6, dtype=torch.long)
    mask[:, :rows] = 1
    value = IntraFeatureLoss(pad_features="exclude", backend=backend, estimator="unbiased")(
        student, teacher, mask
    )
    assert value == 0
    assert gradient(value, student).abs().max() == 0
    if rows >= 2:
        batch = student[:1].expand(rows, 6, 5) * random(rows, 6, 5, seed=2)
        value = LocalInterFeatureLoss(backend=backend, estimator="unbiased")(
            batch, teacher[:1].expand(rows, 6, 5)
        )
        assert value == 0
        assert gradient(value, student).abs().max() == 0


def constant(value=3.0):
    return torch.full((5, 6, 4), value)


def equally_far():
    """Rows at the corners of a regular simplex: U-centring leaves nothing."""
    return torch.eye(6).expand(5, 6, 6) * 2 + 7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", [constant(), constant(0.1), equally_far()], ids=["3", "0.1", "simplex"])
def test_rows_without_structure_have_loss_and_gradient_zero(features, backend):
    teacher = random(5, 6, 3, dtype=torch.float32)
    for dtype in (torch.float32, F64):
        leaf = features.to(dtype).clone().requires_grad_()
        value = IntraFeatureLoss(backend=backend, estimator="unbiased")(leaf, teacher)
        assert value == 0
        assert gradient(value, leaf).abs().max() == 0
        other = teacher.to(dtype).requires_grad_()
        value = IntraFeatureLoss(backend=backend, estimator="unbiased")(other, features)
        assert value == 0
        assert gradient(value, other).abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [IntraFeatureLoss, LocalInterFeatureLoss])
def test_rows_of_zeros_have_no_gram_distance(kind, backend):
    student, teacher = torch.zeros(4, 5, 3).requires_grad_(), random(4, 5, 3, dtype=torch.float32)
    value = kind(backend=backend, measure="gram")(student, teacher)
    assert value == 0
    assert gradient(value, student).abs().max() == 0


@pytest.mark.parametrize("settings", OTHER, ids=str)
@pytest.mark.parametrize("kind", [IntraFeatureLoss, LocalInterFeatureLoss])
def test_masked_positions_hold_anything_and_kept_ones_nothing_infinite(kind, settings):
    student, teacher = random(6, 7, 5).requires_grad_(), random(6, 7, 5, seed=1)
    mask = torch.cat([MASK, MASK.flip(0)])
    dropped = (mask == 0)[..., None]
    loss = kind(pad_features="exclude", **settings)
    value = loss(student, teacher, mask)
    spoilt = student.detach().masked_fill(dropped, torch.nan).requires_grad_()
    again = loss(spoilt, teacher.masked_fill(dropped, torch.inf), mask)
    assert torch.equal(value, again)
    assert torch.equal(gradient(value, student), gradient(again, spoilt))
    for bad in (torch.nan, torch.inf):
        broken = student.detach().clone()
        broken[0, 0, 0] = bad
        assert loss(broken, teacher, mask).isnan()
        assert loss(teacher, broken, mask).isnan()


@pytest.mark.parametrize("settings", OTHER, ids=str)
def test_many_samples_are_worked_through_in_chunks(settings, monkeypatch):
    student, teacher = random(7, 6, 5).requires_grad_(), random(7, 6, 4, seed=1)
    whole = IntraFeatureLoss(**settings)(student, teacher)
    expected = gradient(whole, student)
    monkeypatch.setattr(fsd_fast.losses.measures, "_MOST_ENTRIES", 2 * 36)
    chunks = IntraFeatureLoss(**settings)(student, teacher)
    torch.testing.assert_close(chunks, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(chunks, student), expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("settings", OTHER, ids=str)
def test_they_compile_without_a_break_and_ignore_autocast(settings):
    student, teacher = random(5, 6, 4, dtype=torch.float32).requires_grad_(), random(5, 6, 4, seed=1).float()

    def both(x, y):
        return IntraFeatureLoss(**settings)(x, y) + LocalInterFeatureLoss(**settings)(x, y)

    expected = both(student, teacher)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(student, teacher)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(gradient(compiled, student), gradient(expected, student), rtol=1e-4, atol=1e-7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(both(student, teacher), expected)


def test_layers_are_averaged_and_an_empty_batch_is_zero():
    student = [random(4, 6, 5), random(4, 6, 5, seed=1)]
    teacher = [random(4, 6, 3, seed=2), random(4, 6, 3, seed=3)]
    for loss in (IntraFeatureLoss(measure="gram"), LocalInterFeatureLoss(estimator="unbiased")):
        single = [loss(x, y) for x, y in zip(student, teacher, strict=True)]
        torch.testing.assert_close(loss(student, teacher), torch.stack(single).mean())
    assert IntraFeatureLoss(measure="gram")(torch.zeros(0, 6, 5), torch.zeros(0, 6, 3)) == 0


@pytest.mark.parametrize("settings", OTHER, ids=str)
def test_the_integrated_loss_uses_them_for_both_structures(settings):
    layers = random(5, 6, 4, dtype=torch.float32), random(5, 6, 4, seed=1, dtype=torch.float32)
    memories = random(3, 24, seed=2, dtype=torch.float32), random(3, 24, seed=3, dtype=torch.float32)
    logits, labels = torch.zeros(5, 2), torch.zeros(5, dtype=torch.long)
    module = FeatureStructureLoss("fsd_ilg", **settings)
    given = {
        "student_penultimate": layers[0], "teacher_penultimate": layers[1],
        "student_memory": memories[0], "teacher_memory": memories[1],
    }  # fmt: skip
    found = module(logits, logits, labels, *layers, **given).components
    torch.testing.assert_close(found["loss_intra"], IntraFeatureLoss(**settings)(*layers))
    torch.testing.assert_close(found["loss_local"], LocalInterFeatureLoss(**settings)(*layers))
    paper = FeatureStructureLoss("fsd_ilg")(logits, logits, labels, *layers, **given).components
    assert paper["loss_local"] != found["loss_local"]
    torch.testing.assert_close(paper["loss_global"], found["loss_global"])
    objective = FeatureStructureObjective(module, [(1, 1)], (1, 1))
    assert objective.requires.minimum_batch == (4 if "estimator" in settings else 2)


ERRORS = {
    "measure": (lambda: IntraFeatureLoss(measure="l2"), "measure: expected one of cka, gram, got 'l2'"),
    "estimator": (
        lambda: LocalInterFeatureLoss(estimator="no"),
        "estimator: expected one of biased, unbiased",
    ),
    "both": (
        lambda: LocalInterFeatureLoss(measure="gram", estimator="unbiased"),
        "estimator: measure 'gram' has no 'unbiased' form; expected 'biased'",
    ),
    "reduction": (
        lambda: IntraFeatureLoss("log_mean", estimator="unbiased"),
        "reduction: 'log_mean' is a mean of CKA; expected 'mean_log' with measure 'cka' and estimator 'unbiased'",
    ),
    "backend": (
        lambda: IntraFeatureLoss(backend="triton", measure="gram"),
        "backend: L_I with measure 'gram' .* has no Triton kernel; expected auto, eager or reference, got 'triton'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_setting(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()
