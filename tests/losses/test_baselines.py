"""The baselines against their papers' formulas, written here with loops over samples, heads and tokens."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

import fsd_fast.losses.relational
from fsd_fast.losses import (
    AttentionRelationObjective,
    FinetuneObjective,
    LogitDistillationLoss,
    PatientObjective,
    Projections,
    RelationalLoss,
    RelationalObjective,
    Requirements,
    Signals,
    attention_relation_loss,
    reference,
)

F64 = torch.float64
BACKENDS = ["reference", "eager"]


def random(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def bert_like(*shape, seed, offset=30.0):
    """Features with the same large mean in a few dimensions, as those of BERT."""
    features = random(*shape, seed=seed)
    features[..., :2] += offset
    return features


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


def relative_error(value, truth):
    return ((value.double() - truth).abs().max() / truth.abs().max()).item()


# ------------------------------------------------------------------------------------------------------ RKD


def huber(one, other):
    difference = abs(one - other)
    return difference**2 / 2 if difference <= 1 else difference - 0.5


def rkd_by_loops(student, teacher):
    """(L_D, L_A) of rows, from the definitions, pair by pair and triplet by triplet."""
    index = range(len(student))
    pairs = [(i, j) for i, j in itertools.product(index, index) if i != j]

    def distances(rows):
        found = {(i, j): torch.linalg.vector_norm(rows[i] - rows[j]) for i, j in pairs}
        mean = sum(found.values()) / len(pairs)
        return {pair: distance / mean for pair, distance in found.items()}

    def cosine(rows, i, j, k):
        return functional.cosine_similarity(rows[i] - rows[j], rows[k] - rows[j], dim=0)

    own, given = distances(student), distances(teacher)
    distance = sum(huber(own[pair], given[pair]) for pair in pairs) / len(pairs)
    triplets = list(itertools.permutations(index, 3))
    angle = sum(huber(cosine(student, *each), cosine(teacher, *each)) for each in triplets) / len(triplets)
    return distance, angle


def test_the_reference_is_the_papers_formula():
    student, teacher = random(5, 7).requires_grad_(), random(5, 9, seed=1) * torch.linspace(1, 9, 5)[:, None]
    found = reference.rkd_distance(student, teacher), reference.rkd_angle(student, teacher)
    for value, truth in zip(found, rkd_by_loops(student, teacher), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient(value, student), gradient(truth, student), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("distance_weight", "angle_weight"), [(1.0, 0.0), (0.0, 1.0), (2.0, 3.0)])
def test_relations_read_off_grams_are_the_usual_form(backend, distance_weight, angle_weight):
    student, teacher = bert_like(6, 4, 5, seed=0).requires_grad_(), bert_like(6, 4, 7, seed=1)
    output = RelationalLoss(distance_weight, angle_weight, backend=backend)(student, teacher)
    rows = student.flatten(1), teacher.flatten(1)
    terms = (
        reference.rkd_distance(*rows) if distance_weight else student.sum() * 0,
        reference.rkd_angle(*rows) if angle_weight else student.sum() * 0,
    )
    truth = distance_weight * terms[0] + angle_weight * terms[1]
    for value, expected in zip(output, (truth, *terms), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(
        gradient(output.loss, student), gradient(truth, student), rtol=1e-8, atol=1e-14
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_relations_keep_their_digits_beside_large_means(backend):
    exact, teacher = bert_like(8, 16, 24, seed=2), bert_like(8, 16, 32, seed=3)
    # What float32 can hold is the truth, so that rounding the input is no error.
    own, given = exact.float(), teacher.float()
    truth_leaf = own.double().requires_grad_()
    truth = RelationalLoss(1.0, 1.0, backend="reference")(truth_leaf, given.double())
    leaf = own.clone().requires_grad_()
    output = RelationalLoss(1.0, 1.0, backend=backend)(leaf, given)
    assert output.loss.dtype == torch.float32
    assert relative_error(output.distance.detach(), truth.distance.detach()) < 1e-5
    assert relative_error(output.angle.detach(), truth.angle.detach()) < 1e-5
    assert relative_error(gradient(output.loss, leaf), gradient(truth.loss, truth_leaf)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_samples_have_distance_zero_and_a_finite_gradient(backend, dtype):
    student, teacher = bert_like(6, 3, 5, seed=4).to(dtype), bert_like(6, 3, 5, seed=5).to(dtype)
    student[3] = student[1]
    teacher[0] = teacher[5]
    leaf = student.requires_grad_()
    output = RelationalLoss(1.0, 1.0, backend=backend)(leaf, teacher)
    truth_leaf = student.detach().double().requires_grad_()
    rows = truth_leaf.flatten(1), teacher.double().flatten(1)
    truth = reference.rkd_distance(*rows) + reference.rkd_angle(*rows)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert relative_error(output.loss.detach(), truth.detach()) < tolerance
    assert relative_error(gradient(output.loss, leaf), gradient(truth, truth_leaf)) < 2 * tolerance


def test_a_batch_of_equal_samples_has_no_relations():
    student = random(1, 3, 4).expand(5, 3, 4).clone().requires_grad_()
    output = RelationalLoss(1.0, 1.0)(student, student.detach())
    assert output.loss == 0
    assert torch.equal(gradient(output.loss, student), torch.zeros(5, 3, 4, dtype=F64))
    other = RelationalLoss(1.0, 1.0)(student, random(5, 3, 4, seed=1))
    assert other.loss > 0
    assert torch.equal(gradient(other.loss, student), torch.zeros(5, 3, 4, dtype=F64))


def test_relations_ignore_position_scale_and_rotation():
    student, teacher = random(6, 2, 5), random(6, 2, 5, seed=1)
    rotation, _ = torch.linalg.qr(random(10, 10, seed=2))
    moved = ((student.flatten(1) @ rotation) * 3 + random(10, seed=3)).view(6, 2, 5)
    loss = RelationalLoss()
    torch.testing.assert_close(loss(moved, teacher), loss(student, teacher), rtol=1e-10, atol=0)
    assert loss(moved, student).loss < 1e-25


@pytest.mark.parametrize(
    ("samples", "distance", "angle"), [(1, False, False), (2, False, False), (3, True, True)]
)
def test_few_samples(samples, distance, angle):
    student = random(samples, 2, 3).requires_grad_()
    output = RelationalLoss()(student, random(samples, 2, 3, seed=1))
    # Two samples have one distance, which is its own mean.
    assert (bool(output.distance > 1e-20), bool(output.angle > 0)) == (distance, angle)
    assert gradient(output.loss, student).isfinite().all()


def test_masked_positions_do_not_count_and_others_do():
    student, teacher = random(5, 4, 3).requires_grad_(), random(5, 4, 6, seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]])
    dropped = mask[..., None] == 0
    loss = RelationalLoss(pad_features="exclude")
    output = loss(student, teacher, mask)
    other = student.detach().masked_fill(dropped, torch.nan).requires_grad_()
    again = loss(other, teacher.masked_fill(dropped, torch.inf), mask)
    assert torch.equal(output.loss, again.loss)
    assert torch.equal(gradient(output.loss, student), gradient(again.loss, other))
    zeroed = RelationalLoss()(student.masked_fill(dropped, 0.0), teacher.masked_fill(dropped, 0.0))
    torch.testing.assert_close(output.loss, zeroed.loss, rtol=1e-12, atol=0)
    assert not torch.equal(RelationalLoss()(student, teacher, mask).loss, output.loss)


def test_features_that_are_not_finite_show():
    student, teacher = random(4, 2, 3), random(4, 2, 3, seed=1)
    student[1, 1, 2] = torch.nan
    assert RelationalLoss()(student, teacher).loss.isnan()
    assert RelationalLoss()(teacher, student).loss.isnan()


def test_many_samples_are_worked_through_in_parts(monkeypatch):
    student, teacher = random(9, 2, 3).requires_grad_(), random(9, 2, 4, seed=1)
    whole = RelationalLoss()(student, teacher)
    expected = gradient(whole.loss, student)
    monkeypatch.setattr(fsd_fast.losses.relational, "_MOST_COSINES", 2 * 81)
    parts = RelationalLoss()(student, teacher)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(parts.loss, student), expected, rtol=1e-11, atol=1e-15)


def test_relations_compile_without_a_break():
    student, teacher = random(5, 3, 4, dtype=torch.float32).requires_grad_(), random(5, 3, 4, seed=1)
    loss = RelationalLoss(backend="eager")
    expected = loss(student, teacher.float()).loss
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(student, teacher.float()).loss
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(gradient(compiled, student), gradient(expected, student))


# --------------------------------------------------------------------------------------------------- MiniLM


def relations_by_loops(student, teacher, heads, mask):
    """L of MiniLMv2, token by token."""
    total = 0.0
    for own, given in zip(student, teacher, strict=True):
        samples = []
        for i in range(len(own)):
            kept = mask[i].bool()
            rows = []
            for head in range(heads):
                log_relations = []
                for vectors in (own, given):
                    size = vectors.shape[2] // heads
                    part = vectors[i, kept, head * size : (head + 1) * size]
                    log_relations.append(torch.log_softmax(part @ part.T / math.sqrt(size), dim=1))
                for log_s, log_t in zip(*log_relations, strict=True):
                    rows.append((log_t.exp() * (log_t - log_s)).sum())
            samples.append(sum(rows) / len(rows))
        total = total + sum(samples) / len(samples)
    return total


def projections(width, values, seed, dtype=F64):
    shapes = width, values, values
    return Projections(
        *(random(3, 5, size, seed=seed + i, dtype=dtype).requires_grad_() for i, size in enumerate(shapes))
    )


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_relations_are_the_papers_formula(heads, masked):
    student, teacher = projections(12, 8, seed=0), projections(24, 4, seed=10)
    mask = MASK if masked else torch.ones_like(MASK)
    value = attention_relation_loss(student, teacher, heads, MASK if masked else None)
    truth = relations_by_loops(student, teacher, heads, mask)
    torch.testing.assert_close(value, truth, rtol=1e-12, atol=0)
    for leaf in student:
        torch.testing.assert_close(
            torch.autograd.grad(value, leaf, retain_graph=True)[0],
            torch.autograd.grad(truth, leaf, retain_graph=True)[0],
            rtol=1e-10,
            atol=1e-14,
        )
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(value, teacher.query)


def test_masked_tokens_relate_to_nothing():
    student, teacher = projections(8, 8, seed=0), projections(8, 8, seed=10)
    dropped = MASK[..., None] == 0
    spoilt = Projections(*(x.detach().masked_fill(dropped, torch.nan).requires_grad_() for x in student))
    value = attention_relation_loss(student, teacher, 2, MASK)
    again = attention_relation_loss(
        spoilt, Projections(*(x.detach().masked_fill(dropped, torch.inf) for x in teacher)), 2, MASK
    )
    assert torch.equal(value, again)
    for own, other in zip(
        torch.autograd.grad(value, student), torch.autograd.grad(again, spoilt), strict=True
    ):
        assert torch.equal(own, other)
        assert torch.equal(own.masked_select(dropped), torch.zeros_like(own).masked_select(dropped))


def test_a_sample_of_padding_alone_counts_as_zero():
    student, teacher = projections(8, 8, seed=0), projections(8, 8, seed=10)
    mask = MASK.clone()
    mask[2] = 0
    value = attention_relation_loss(student, teacher, 2, mask)
    first = [Projections(*(x[:2] for x in side)) for side in (student, teacher)]
    torch.testing.assert_close(value, attention_relation_loss(*first, 2, mask[:2]) * 2 / 3)
    assert all(found.isfinite().all() for found in torch.autograd.grad(value, student))


def test_equal_projections_have_loss_and_gradient_zero():
    student = projections(8, 8, seed=0)
    value = attention_relation_loss(student, student, 4, MASK)
    assert value == 0
    assert all(found.abs().max() < 1e-15 for found in torch.autograd.grad(value, student))


def test_autocast_does_not_round_the_relations():
    student, teacher = projections(8, 8, 0, torch.float32), projections(8, 8, 10, torch.float32)
    exact = [Projections(*(x.detach().double() for x in side)) for side in (student, teacher)]
    truth = attention_relation_loss(*exact, 2, MASK)
    with torch.autocast("cpu", torch.bfloat16):
        value = attention_relation_loss(student, teacher, 2, MASK)
    assert value.dtype == torch.float32
    assert relative_error(value.detach(), truth) < 1e-6


def test_relation_heads_must_divide_every_width():
    student, teacher = projections(8, 8, seed=0), projections(8, 6, seed=10)
    with pytest.raises(ValueError, match=r"heads: expected a divisor of 6, the width of teacher\.key, got 4"):
        attention_relation_loss(student, teacher, 4)
    short = Projections(*(x[:, :4] for x in teacher))
    with pytest.raises(ValueError, match=r"teacher\.query: .*B, S = \[3, 5\].*got \[3, 4, 8\]"):
        attention_relation_loss(student, short, 2)


# ----------------------------------------------------------------------------------------------- objectives

LOGITS = LogitDistillationLoss(0.3, 5.0)
LABELS = torch.tensor([0, 2, 1])


def signals(layers, seed, width=6, **more):
    states = {layer: random(3, 5, width, seed=seed + layer).requires_grad_() for layer in layers}
    return Signals(random(3, 3, seed=seed, dtype=torch.float32).requires_grad_(), states, **more)


def vkd(student, teacher):
    return LOGITS(student.logits, teacher.logits, LABELS)


def test_finetune_is_the_loss_on_the_labels():
    student = signals([], seed=0)
    nothing = Signals(torch.empty(3, 0), {})
    loss, components = FinetuneObjective()(student, nothing, LABELS, None)
    torch.testing.assert_close(loss, functional.cross_entropy(student.logits, LABELS))
    assert components == {"loss_hard": loss}
    scores = torch.tensor([1.0, -2.0, 0.5])
    regression, _ = FinetuneObjective()(Signals(torch.zeros(3, 1), {}), nothing, scores, None)
    assert regression == scores.square().mean()
    assert FinetuneObjective.requires == Requirements(teacher=False)


def test_pkd_compares_normalised_cls_states():
    student, teacher = signals([1, 2], seed=0), signals([2, 4], seed=10)
    objective = PatientObjective(LOGITS, [(2, 1), (4, 2)], weight=7.0)
    loss, components = objective(student, teacher, LABELS, MASK)
    squares = []
    for of_teacher, of_student in ((2, 1), (4, 2)):
        for i in range(3):
            own, given = student.hidden_states[of_student][i, 0], teacher.hidden_states[of_teacher][i, 0]
            squares.append((own / own.norm() - given / given.norm()).square().mean())
    patient = sum(squares) / len(squares)
    torch.testing.assert_close(loss.double(), vkd(student, teacher).double() + 7 * patient, rtol=1e-6, atol=0)
    torch.testing.assert_close(components["loss_patient"].double(), patient, rtol=1e-6, atol=0)
    state = student.hidden_states[1]
    found = gradient(loss, state)
    assert found[:, 0].abs().min() > 0
    assert found[:, 1:].abs().max() == 0
    assert objective.requires == Requirements((1, 2), (2, 4), cls_token=True)


@pytest.mark.parametrize(
    ("weights", "names", "batch"),
    [
        ((2.0, 3.0), {"loss_distance", "loss_angle"}, 3),
        ((2.0, 0.0), {"loss_distance"}, 2),
        ((0.0, 3.0), {"loss_angle"}, 3),
    ],
)
def test_rkd_averages_its_terms_over_the_layer_pairs(weights, names, batch):
    student, teacher = signals([1, 2], seed=0), signals([2, 4], seed=10, width=8)
    pairs = [(2, 1), (4, 2)]
    objective = RelationalObjective(LOGITS, pairs, RelationalLoss(*weights, "exclude"))
    loss, components = objective(student, teacher, LABELS, MASK)
    relations = [
        RelationalLoss(*weights, "exclude")(student.hidden_states[s], teacher.hidden_states[t], MASK)
        for t, s in pairs
    ]
    truth = vkd(student, teacher).double() + sum(each.loss for each in relations) / 2
    torch.testing.assert_close(loss.double(), truth, rtol=1e-7, atol=0)
    assert set(components) == {"loss_vkd", "loss_hard", "loss_soft"} | names
    assert objective.requires == Requirements((1, 2), (2, 4), minimum_batch=batch)


def test_minilm_adds_the_relations_of_the_last_layers():
    student = signals([], seed=0, projections=projections(8, 8, seed=0))
    teacher = signals([], seed=10, projections=projections(12, 12, seed=20))
    objective = AttentionRelationObjective(LOGITS, relation_heads=4, weight=5.0)
    loss, components = objective(student, teacher, LABELS, MASK)
    relations = attention_relation_loss(student.projections, teacher.projections, 4, MASK)
    torch.testing.assert_close(
        loss.double(), vkd(student, teacher).double() + 5 * relations, rtol=1e-7, atol=0
    )
    assert components["loss_relations"] == relations
    assert objective.requires == Requirements(relation_heads=4)
    with pytest.raises(ValueError, match="projections: expected queries, keys and values of both"):
        objective(student, signals([], seed=10), LABELS, MASK)


ERRORS = {
    "rkd weight": (lambda: RelationalLoss(-1.0), "distance_weight: expected a weight >= 0, got -1.0"),
    "rkd padding": (lambda: RelationalLoss(pad_features="no"), "pad_features: expected one of include"),
    "rkd shapes": (
        lambda: RelationalLoss()(random(3, 2, 4), random(4, 2, 4)),
        r"teacher: expected .*\[3, 2\]",
    ),
    "pkd weight": (lambda: PatientObjective(LOGITS, [(1, 1)], math.nan), "pkd_weight: .*got nan"),
    "pkd layers": (lambda: PatientObjective(LOGITS, []), "layer_pairs: expected at least one pair"),
    "rkd layers": (
        lambda: RelationalObjective(LOGITS, [], RelationalLoss()),
        "layer_pairs: expected at least",
    ),
    "minilm weight": (lambda: AttentionRelationObjective(LOGITS, 4, -1.0), "minilm_weight: .*got -1.0"),
    "minilm heads": (
        lambda: AttentionRelationObjective(LOGITS, 0),
        "minilm_relation_heads: .*at least 1, got 0",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()
