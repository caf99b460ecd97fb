"""The weight of the structures over the training, and distances on a common scale in L_G."""

import math

import pytest
import torch

from fsd_fast.losses import (
    FeatureStructureLoss,
    FeatureStructureObjective,
    GlobalInterFeatureLoss,
    LogitDistillationLoss,
    PatientObjective,
    Signals,
    StructureSchedule,
)

F64 = torch.float64


def random(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves)


# ------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1, 1]),
        ("linear", 0.0, [1, 0.75, 0.5, 0.25, 0]),
        ("cosine", 0.0, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]),
        ("constant", 0.5, [0, 0.5, 1, 1, 1]),
        ("linear", 0.5, [0, 0.5, 1, 0.5, 0]),
        ("cosine", 0.5, [0, 0.5, 1, 0.5, 0]),
        ("linear", 1.0, [0, 0.25, 0.5, 0.75, 1]),
    ],
)
def test_weights(kind, warmup, expected):
    schedule = StructureSchedule(kind, warmup)
    assert [schedule.weight(part / 4) for part in range(5)] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            StructureSchedule("step"),
            "structure_schedule: expected one of constant, linear, cosine, got 'step'",
        ),
        (StructureSchedule("linear", 1.5), r"structure_warmup_ratio: expected a weight in \[0, 1\], got 1.5"),
    ],
)
def test_schedules_out_of_range_are_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        PatientObjective(LogitDistillationLoss(), [(1, 1)], schedule=schedule)


def objectives(schedule):
    return {
        "fsd_il": FeatureStructureObjective(FeatureStructureLoss("fsd_il"), [(1, 1)], (1, 1), schedule),
        "pkd": PatientObjective(LogitDistillationLoss(), [(1, 1)], schedule=schedule),
    }


@pytest.mark.parametrize("name", ["fsd_il", "pkd"])
def test_the_weight_scales_all_terms_but_the_logits(name):
    sides = [
        Signals(
            random(4, 2, seed=i, dtype=torch.float32), {1: random(4, 5, 6, seed=10 + i, dtype=torch.float32)}
        )
        for i in range(2)
    ]
    labels = torch.tensor([0, 1, 1, 0])
    constant = objectives(None)[name]
    whole, components = constant(*sides, labels, None)
    objective = objectives(StructureSchedule("linear"))[name]
    for progress in (0.0, 0.25, 1.0):
        objective.set_progress(progress)
        loss, terms = objective(*sides, labels, None)
        expected = components["loss_vkd"] + (1 - progress) * (whole - components["loss_vkd"])
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        # What is logged is not weighted.
        assert terms == components
    constant.set_progress(0.7)
    assert torch.equal(constant(*sides, labels, None).loss, whole)


def test_the_weight_follows_the_module_and_is_not_rounded():
    objective = objectives(StructureSchedule("linear"))["pkd"]
    objective.set_progress(0.3)
    before = objective.structure_weight.item()
    objective.bfloat16()
    assert objective.structure_weight.dtype == torch.float32
    assert objective.structure_weight.item() == before
    assert objective.to("meta").structure_weight.device.type == "meta"
    assert objective.state_dict() == {}


def test_a_compiled_objective_sees_the_weight_change():
    sides = [
        Signals(
            random(4, 2, seed=i, dtype=torch.float32), {1: random(4, 5, 6, seed=10 + i, dtype=torch.float32)}
        )
        for i in range(2)
    ]
    objective = objectives(StructureSchedule("linear"))["pkd"]
    torch._dynamo.reset()
    compiled = torch.compile(objective, fullgraph=True, backend="eager")
    labels = torch.tensor([0, 1, 1, 0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for progress in (0.0, 0.5, 1.0):
            objective.set_progress(progress)
            torch.testing.assert_close(
                compiled(*sides, labels, None).loss, objective(*sides, labels, None).loss
            )


# -------------------------------------------------------------------------------------- relative distances

B, S, D, WIDE, K = 5, 4, 3, 7, 3
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])


def features(dtype=F64, offset=0.0):
    """Student, its memory, teacher, its memory."""
    shapes = ((B, S, D), (K, S * D), (B, S, WIDE), (K, S * WIDE))
    return [(random(*shape, seed=i) + offset).to(dtype) for i, shape in enumerate(shapes)]


def by_pairs(student, student_memory, teacher, teacher_memory):
    """F^E with relative distances, sample by sample and centroid by centroid."""
    sides = []
    for rows, memory in ((student.flatten(1), student_memory), (teacher.flatten(1), teacher_memory)):
        table = torch.stack(
            [torch.stack([(row - centroid).square().sum().sqrt() for centroid in memory]) for row in rows]
        )
        sides.append(table / (table.sum() / (B * K)))
    return sum((sides[0][i, j] - sides[1][i, j]) ** 2 for i in range(B) for j in range(K)) / (B * K)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [0.0, 20.0])
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_relative_distances_are_the_formula(backend, offset, masked):
    student, student_memory, teacher, teacher_memory = features(offset=offset)
    leaves = student.requires_grad_(), student_memory.requires_grad_()
    module = GlobalInterFeatureLoss(0.5, "exclude", backend, distance_scale="mean")
    output = module(student, student_memory, teacher, teacher_memory, MASK if masked else None)
    dropped = (MASK == 0)[..., None] & torch.tensor(masked)
    truth = by_pairs(
        student.masked_fill(dropped, 0.0), student_memory, teacher.masked_fill(dropped, 0.0), teacher_memory
    )
    torch.testing.assert_close(output.distance, truth, rtol=1e-9, atol=0)
    for value, expected in zip(gradients(output.distance, leaves), gradients(truth, leaves), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-12)
    plain = GlobalInterFeatureLoss(0.5, "exclude", backend)(
        student, student_memory, teacher, teacher_memory, MASK if masked else None
    )
    torch.testing.assert_close(output.memory, plain.memory, rtol=1e-9, atol=0)
    torch.testing.assert_close(output.cosine, plain.cosine, rtol=1e-9, atol=1e-15)
    assert not torch.allclose(output.distance, plain.distance)
    torch.testing.assert_close(output.loss, 0.5 * output.distance + 0.5 * output.cosine + output.memory)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_float32_relative_distances(backend):
    student, student_memory, teacher, teacher_memory = features(torch.float32, offset=20.0)
    exact = [tensor.double() for tensor in (student, student_memory, teacher, teacher_memory)]
    leaves = student.requires_grad_(), student_memory.requires_grad_()
    output = GlobalInterFeatureLoss(backend=backend, distance_scale="mean")(
        student, student_memory, teacher, teacher_memory
    )
    assert output.distance.dtype == output.loss.dtype == torch.float32
    truth_leaves = exact[0].requires_grad_(), exact[1].requires_grad_()
    truth = by_pairs(*exact)
    assert abs(output.distance.item() - truth.item()) < 1e-5 * truth.item()
    for value, expected in zip(
        gradients(output.distance, leaves), gradients(truth, truth_leaves), strict=True
    ):
        assert (value.double() - expected).abs().max() < 2e-5 * expected.abs().max()


def test_relative_distances_do_not_depend_on_the_scale_of_a_side():
    student, student_memory, teacher, teacher_memory = features()
    module = GlobalInterFeatureLoss(distance_scale="mean")
    one = module(student, student_memory, teacher, teacher_memory)
    other = module(student * 7, student_memory * 7, teacher / 3, teacher_memory / 3)
    torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_sample_at_its_centroid_has_a_finite_gradient(dtype):
    student, student_memory, teacher, teacher_memory = features(dtype)
    student_memory[1] = student[2].flatten()
    leaves = student.requires_grad_(), student_memory.requires_grad_()
    output = GlobalInterFeatureLoss(distance_scale="mean")(student, student_memory, teacher, teacher_memory)
    reference = GlobalInterFeatureLoss(backend="reference", distance_scale="mean")(
        student, student_memory, teacher, teacher_memory
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(output.distance, reference.distance, rtol=tolerance, atol=0)
    for value, expected in zip(
        gradients(output.distance, leaves), gradients(reference.distance, leaves), strict=True
    ):
        assert value.isfinite().all()
        torch.testing.assert_close(value, expected, rtol=10 * tolerance, atol=tolerance)


def test_short_batches_end_in_zeros_and_no_batch_is_zero():
    student, student_memory, teacher, teacher_memory = features()
    module = GlobalInterFeatureLoss(0.5, "exclude", distance_scale="mean")
    full = torch.zeros(B, S, D, dtype=F64), torch.zeros(B, S, WIDE, dtype=F64)
    full[0][:, :2], full[1][:, :2] = student[:, :2], teacher[:, :2]
    short = module(student[:, :2], student_memory, teacher[:, :2], teacher_memory)
    torch.testing.assert_close(
        short, module(full[0], student_memory, full[1], teacher_memory), rtol=1e-10, atol=0
    )
    for backend in ("eager", "reference"):
        module = GlobalInterFeatureLoss(0.5, "exclude", backend, distance_scale="mean")
        empty = module(student[:0], student_memory, teacher[:0], teacher_memory)
        assert empty.distance == 0
        assert empty.memory > 0


def test_features_that_are_not_finite_show():
    student, student_memory, teacher, teacher_memory = features()
    student[0, 0, 0] = torch.nan
    module = GlobalInterFeatureLoss(distance_scale="mean")
    assert module(student, student_memory, teacher, teacher_memory).distance.isnan()


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="distance_scale: expected one of none, mean, got 'max'"):
        GlobalInterFeatureLoss(distance_scale="max")


def test_relative_distances_compile_without_a_break():
    given = features(torch.float32)
    leaf = given[0].requires_grad_()
    module = GlobalInterFeatureLoss(distance_scale="mean")
    expected = module(leaf, *given[1:]).loss
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(leaf, *given[1:]).loss
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(
        *(gradients(loss, [leaf])[0] for loss in (compiled, expected)), rtol=1e-4, atol=1e-6
    )
