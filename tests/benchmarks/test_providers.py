"""The registered ops: their truths, their providers, their shapes, and what the performance targets need of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.speed import checks
from benchmarks.speed.commands.kernel_times import cases as kernel_cases
from benchmarks.speed.compilation import compiled
from benchmarks.speed.inputs import Inputs, Sizes
from benchmarks.speed.measure import measure_op
from benchmarks.speed.peers import Unavailable
from benchmarks.speed.registry import OPS
from benchmarks.speed.results import OK, UNAVAILABLE, WRONG
from fsd_kernels.intra_cka import reference as intra_reference
from fsd_kernels.structure import reference as structure_reference
from tests.benchmarks.helpers import CPU, QUICK, SMALL, machine


@pytest.mark.parametrize("name", sorted(OPS))
def test_growth_cases_differ_from_the_paper_shape_in_one_size(name: str) -> None:
    op = OPS[name]
    base = op.shapes["paper"][0]
    values: dict[str, set[int]] = {size: {getattr(base, size)} for size in op.size_names}
    for case in op.shapes["growth"]:
        changed = [size for size in op.size_names if getattr(case, size) != getattr(base, size)]
        assert len(changed) <= 1
        for size in changed:
            values[size].add(getattr(case, size))
    if name in checks.GROWTH_OPS:
        # A slope needs a range: each size is measured at three values or more, at least four times apart.
        assert all(len(each) >= 3 and max(each) >= 4 * min(each) for each in values.values())


def test_every_target_finds_its_rows_in_the_registry() -> None:
    for needed in checks.NEEDED:
        op = OPS[needed.op]
        assert set(needed.providers) <= set(op.providers)
        assert set(needed.cases) <= {*op.shapes["paper"], *op.shapes["growth"]}


@pytest.mark.parametrize("outliers", [False, True])
def test_truth_is_the_reference(outliers: bool) -> None:
    inputs = {name: x.double() for name, x in OPS["global"].make_inputs(SMALL, 0, outliers).items()}
    student, teacher = inputs["student"], inputs["teacher"]
    _, neg_log = intra_reference.forward([student], [teacher], None)
    features = {"student": student, "teacher": teacher}
    truth = OPS["intra"].truths["biased"](features, SMALL).outcome().value
    torch.testing.assert_close(truth, neg_log.mean())
    local, memory, distance, cosine = structure_reference.inter_structure(
        student.flatten(1), teacher.flatten(1), inputs["student_memory"], inputs["teacher_memory"], None
    )
    truth = OPS["local"].truths["biased"](features, SMALL).outcome().value
    torch.testing.assert_close(truth, local)
    truth = OPS["global"].truths["biased"](inputs, SMALL).outcome().value
    torch.testing.assert_close(truth, 0.5 * distance + 0.5 * cosine + memory)


def test_outliers_give_features_a_large_offset() -> None:
    plain, outlying = (OPS["intra"].make_inputs(SMALL, 0, outliers)["student"] for outliers in (False, True))
    assert plain.mean(dim=(0, 1)).abs().max() < 1
    assert 20 < outlying.mean(dim=(0, 1)).abs().max() < 51


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_provider_that_is_here_agrees_with_the_reference(name: str) -> None:
    op = OPS[name]
    # Compiling takes half a minute.
    providers = [provider for provider in op.providers if provider != "compiled"]
    settings = QUICK._replace(min_rounds=1, memory=name == "fsd_ilg")
    rows = measure_op(op, op.shapes["small"], settings, machine(), providers=providers, modes=op.modes[-1:])
    assert [(row.provider, row.reason) for row in rows if row.status == WRONG] == []
    assert not [row.provider for row in rows if row.status == UNAVAILABLE and not row.reason]
    by_name = {row.provider: row for row in rows}
    # What needs neither a GPU nor another package runs everywhere.
    for provider in {"ours", "reference", "released", "plain", "vkd-only"} & set(providers):
        assert by_name[provider].status == OK
    if name == "fsd_ilg":
        assert by_name["ours"].returned_bytes == 4 * (8 * 16 * 32 + 6 * 16 * 32)
        assert (by_name["ours"].peak_bytes or 0) >= (by_name["ours"].returned_bytes or 0)


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
def test_the_bound_multiplies_what_the_loss_multiplies(mode: str) -> None:
    op = OPS["intra"]
    inputs = op.make_inputs(SMALL, 0, False)
    timed = op.bounds["products"].build(inputs, SMALL).timed(mode)
    minimum = op.minimum(SMALL, mode, torch.float32)
    assert minimum is not None
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        timed.call(timed.setup())
    assert counter.get_total_flops() == minimum.flops


def test_unknown_providers_and_modes_are_named() -> None:
    with pytest.raises(ValueError, match="got 'theirs'"):
        measure_op(OPS["intra"], [SMALL], QUICK, machine(), providers=["theirs"])
    with pytest.raises(ValueError, match="got 'sideways'"):
        measure_op(OPS["intra"], [SMALL], QUICK, machine(), modes=["sideways"])


def test_a_compiler_that_takes_too_long_is_unavailable() -> None:
    def compiler(loss: Callable[[Inputs], Tensor], **_: object) -> Callable[[Inputs], Tensor]:
        def run(tensors: Inputs) -> Tensor:
            for _ in range(100):
                try:
                    time.sleep(0.1)
                except Exception:  # a compiler may catch what it takes for its own error, and go on
                    continue
            return loss(tensors)

        return run

    slow = compiled(lambda tensors: tensors["student"].sum(), seconds=0.2, compiler=compiler)
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"takes more than 0\.2 s"):
        slow({"student": torch.ones(3)})
    assert time.monotonic() - started < 5


def test_kernel_times_profiles_passes_that_run() -> None:
    sizes = Sizes(batch=4, rows=5, width=6, centroids=100, points=120)
    names = []
    for name, call in kernel_cases(torch.float32, CPU, sizes):
        call()
        names.append(name)
    assert names == [
        "L_I, forward",
        "L_I",
        "L_G + L_L, K=100, forward",
        "L_G + L_L, K=100",
        "L_G + L_L, K=300",
        "k-means, K=100",
    ]
