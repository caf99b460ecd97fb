"""The cost model against hand values, against torch's flop counter, and against bytes counted in the interpreter."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import main
from benchmarks.speed import baselines
from fsd_kernels import cost
from fsd_kernels.gram import eager as gram
from fsd_kernels.intra_cka import eager as intra

ROOT = Path(__file__).resolve().parents[2]
PAPER = cost.Shape(batch=32, rows=128, width=768, centroids=100)


@pytest.mark.parametrize(
    ("op", "centroids", "megabytes", "gigaflops"),
    [
        ("intra", 100, 54.5, 2.4),
        ("local", 100, 50.3, 0.60),
        ("global", 100, 208, 6.4),
        ("global", 300, 522, 42.9),
    ],
)
def test_minimum_by_hand(op: str, centroids: int, megabytes: float, gigaflops: float) -> None:
    whole = cost.total(cost.minimum(op, dataclasses.replace(PAPER, centroids=centroids)))
    assert whole.bytes / 1e6 == pytest.approx(megabytes, rel=0.005)
    assert whole.flops / 1e9 == pytest.approx(gigaflops, rel=0.01)


def test_minimum_stages_by_hand() -> None:
    shape = cost.Shape(batch=2, rows=3, width=5, teacher_width=7, centroids=4, dtype=torch.bfloat16)
    forward, backward = cost.minimum("intra", shape).values()
    assert (forward.read, forward.written) == (2 * 3 * (5 + 7) * 2, 2 * 9 * 4)
    assert (backward.read, backward.written) == (2 * (3 * 5 * 2 + 9 * 4), 2 * 3 * 5 * 2)
    assert forward.flops == 2 * 2 * 9 * (5 + 7)
    assert backward.flops == 2 * 2 * 9 * 5
    forward, backward = cost.minimum("global", shape).values()
    assert forward.read == (2 + 4) * (15 + 21) * 2
    assert forward.flops == 2 * 15 * (16 + 8) + 2 * 21 * 8
    assert backward.flops == 2 * 15 * (16 + 2 * 8)


def test_fsd_ilg_reads_the_features_once() -> None:
    parts = {op: cost.total(cost.minimum(op, PAPER)) for op in ("intra", "inter", "fsd_ilg")}
    assert parts["fsd_ilg"].flops == parts["intra"].flops + parts["inter"].flops
    gram_bytes = 2 * 32 * 128**2 * 4
    assert parts["fsd_ilg"].bytes == parts["inter"].bytes + gram_bytes


def test_layer_pairs_multiply_the_minimum() -> None:
    one, five = (cost.total(cost.minimum("intra", dataclasses.replace(PAPER, pairs=p))) for p in (1, 5))
    assert (five.bytes, five.flops) == (5 * one.bytes, 5 * one.flops)


@pytest.mark.parametrize(
    ("op", "centroids", "dtype", "device", "memory", "matmul"),
    [
        ("intra", 100, torch.float32, "h100", 16.3, 4.9),
        ("intra", 100, torch.bfloat16, "h100", 8.8, 2.44),
        ("intra", 100, torch.float32, "a100", 27.3, 15.5),
        ("local", 100, torch.float32, "a100", 25.2, 3.9),
        ("global", 100, torch.bfloat16, "h100", 31, 6.5),
        ("global", 300, torch.float32, "a100", 261, 275),
        ("kmeans", 100, torch.float32, "h100", 997, 164),
        ("kmeans", 100, torch.float32, "a100", 1670, 519),
    ],
)
def test_bounds_by_hand(
    op: str, centroids: int, dtype: torch.dtype, device: str, memory: float, matmul: float
) -> None:
    stages = cost.minimum(op, dataclasses.replace(PAPER, centroids=centroids, dtype=dtype))
    model = cost.DEVICES[device]
    assert model.memory_seconds(stages) * 1e6 == pytest.approx(memory, rel=0.01)
    assert model.matmul_seconds(stages, dtype) * 1e6 == pytest.approx(matmul, rel=0.015)


def test_roofline_takes_the_larger_time_of_every_stage() -> None:
    device = cost.Device("toy", 10.0, {"fp32": 100.0})
    stages = {"a": cost.Cost(30, 20, 100), "b": cost.Cost(5, 5, 1000)}
    assert device.seconds(stages, torch.float32) == pytest.approx(5 + 10)
    assert device.peak(torch.bfloat16) == 100
    assert cost.DEVICES["h100"].peak(torch.float32, "ieee") < cost.DEVICES["h100"].peak(torch.float32, "tf32")


def _counted(run: object) -> int:
    with FlopCounterMode(display=False) as counter:
        run()  # type: ignore[operator]
    return counter.get_total_flops()


SHAPES = [
    cost.Shape(4, 10, 24, 36, 5),
    cost.Shape(3, 7, 40, 40, 9),
    cost.Shape(8, 16, 32, 8, 4),
    cost.Shape(3, 190, 8, 5, 3),  # its Grams are made of strips
]


@pytest.mark.parametrize("shape", SHAPES)
def test_eager_intra_flops_are_counted_ones(shape: cost.Shape) -> None:
    # Without an offset, for which the Grams would be made twice.
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(shape.batch, shape.rows, shape.width, generator=generator)
    teacher = torch.randn(shape.batch, shape.rows, shape.teacher_width, generator=generator)
    expected = cost.eager("intra", shape)
    assert _counted(lambda: intra.forward([student], [teacher], None)) == expected["forward"]
    g, c = torch.ones(1, shape.batch, shape.rows, shape.rows), torch.ones(1, shape.batch)
    assert _counted(lambda: intra.backward([student], None, g, c, c, c)) == expected["backward"]


@pytest.mark.parametrize(
    "shape", [*SHAPES, cost.Shape(70, 4, 8, 6, 140)]
)  # Gamma of the last is made of strips too
@pytest.mark.parametrize("op", ["local", "global"])
def test_eager_gram_flops_are_counted_ones(op: str, shape: cost.Shape) -> None:
    memories = op == "global"
    # Without an offset, for which the Gram would be made twice.
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(shape.batch, shape.student_features, generator=generator)
    teacher = torch.randn(shape.batch, shape.teacher_features, generator=generator)
    widths = (shape.student_features, shape.teacher_features)
    own, given = (torch.randn(shape.centroids, width, generator=generator) for width in widths)
    known = gram.forward([(given[:0], given, None)], None)[0][:-1, :-1] if memories else None
    own, given = (own, given) if memories else (None, None)  # type: ignore[assignment]
    expected = cost.eager(op, shape)
    sides = [(student, own, None), (teacher, given, known)]
    gamma, _ = gram.forward(sides, None)
    forward = _counted(lambda: gram.forward(sides, None))
    assert forward == expected["forward"]
    assert (
        _counted(lambda: gram.backward(student, own, None, gamma[None], None, (True, memories)))
        == expected["backward"]
    )


@pytest.mark.parametrize("op", ["intra", "local", "global", "inter", "fsd_ilg"])
def test_eager_multiplies_little_more_than_the_minimum(op: str) -> None:
    minimum = cost.total(cost.minimum(op, PAPER)).flops
    asked = sum(cost.eager(op, PAPER).values())
    # The minimum makes no use of symmetry, which saves more than a third of the two Grams of L_I, and a fourth of the
    # student memory's.
    saved = 2 * 2 * 32 * 32 * (96 + 64 + 32) * 768 if op in ("intra", "fsd_ilg") else 0
    saved += 2 * (100**2 - 64**2 - 36 * 100) * 128 * 768 if op in ("inter", "fsd_ilg") else 0
    assert minimum - saved <= asked <= 1.2 * minimum
    if op == "intra":
        # And the products of both Grams with both.
        assert asked == minimum - saved + 32 * 2 * 4 * 128**2


def _flops_of(loss: object, leaves: tuple[str, ...], inputs: dict[str, torch.Tensor]) -> int:
    tracked = {name: x.requires_grad_(name in leaves) for name, x in inputs.items()}

    def run() -> None:
        torch.autograd.grad(loss(tracked), [tracked[name] for name in leaves])  # type: ignore[operator]

    return _counted(run)


def test_released_formulation_has_six_grams_and_twelve_centring_products() -> None:
    batch, rows, width = 2, 6, 10
    gram_flops, product = 2 * batch * rows**2 * width, 2 * batch * rows**3
    inputs = {name: torch.ones(batch, rows, width) for name in ("student", "teacher")}
    loss = baselines.intra(baselines.released_cka)
    # Three of the six Grams hold the student; a Gram's backward is two products, of each centring one.
    assert _flops_of(loss, ("student",), inputs) == (6 + 3 * 2) * gram_flops + (12 + 3 * 2) * product
    both = _flops_of(loss, ("student", "teacher"), inputs)
    assert both == (6 + 6 * 2) * gram_flops + (12 + 6 * 2) * product


def test_released_flops_at_the_papers_shape() -> None:
    with torch.device("meta"):
        features = {name: torch.empty(32, 128, 768) for name in ("student", "teacher")}
    loss = baselines.intra(baselines.released_cka)
    assert _flops_of(loss, ("student",), features) / 1e9 == pytest.approx(12.1, rel=0.005)
    assert _flops_of(loss, ("student", "teacher"), features) / 1e9 == pytest.approx(17.7, rel=0.005)
    features["teacher"].requires_grad_(False)
    flops = _flops_of(baselines.local(baselines.released_cka), ("student",), features)
    assert flops / 1e9 == pytest.approx(2.4, rel=0.01)


_INTERPRETED = """
import json, sys, torch
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/kernels"]
from benchmarks.compiled import traffic
from fsd_kernels.gram import triton as gram
from fsd_kernels.intra_cka import triton as intra
from fsd_kernels.kmeans import triton as kmeans
torch.set_num_threads(1)
traffic.UNIFORM.clear()  # every program runs: parts need not be of equal size
counted = []
for batch, rows, width in json.loads(sys.argv[2]):
    x = torch.ones(batch, rows, width)
    with traffic.counting() as totals:
        _, _, g = intra.forward([x], [x], None)
        values = torch.ones(1, batch)
        intra.backward([x], None, g, values, values, values)
    counted.append({name: part.issued for name, part in totals.items()})
for batch, rows, width, centroids in json.loads(sys.argv[3]):
    x, memory = torch.ones(batch, rows * width), torch.ones(centroids, rows * width)
    known = torch.zeros(centroids + 1, centroids + 1)
    with traffic.counting() as totals:
        gamma, _ = gram.forward([(x, memory, None), (x, memory, known)], None)
        gram.backward(x, memory, None, gamma.expand(4, -1, -1), torch.ones(4), (True, True))
    counted.append({name: part.issued for name, part in totals.items()})
for points, rows, width, centroids in json.loads(sys.argv[4]):
    x, c = torch.ones(points, rows * width), torch.ones(centroids, rows * width)
    sums, counts = torch.zeros(centroids, rows * width), torch.zeros(centroids, dtype=torch.int64)
    with traffic.counting() as totals:
        kmeans.assign(x, c)
        kmeans.update_(sums, counts, x, torch.arange(points) % centroids)
    counted.append({name: part.issued for name, part in totals.items()})
print(json.dumps(counted))
"""

_KERNELS = {
    "_intra_cka_fwd_kernel": ("intra_forward",),
    "_intra_cka_mean_kernel": ("intra_means",),
    "_intra_cka_tile_kernel": ("intra_tiles",),
    "_intra_cka_finish_kernel": ("intra_finish",),
    "_intra_cka_bwd_kernel": ("intra_backward",),
    "_intra_cka_bwd_tile_kernel": ("intra_backward",),
    "_gram_fwd_kernel": ("gram",),
    "_gram_sum_kernel": ("gram_sum",),
    "_gram_centre_kernel": ("gram_centre",),
    "_gram_symmetric_kernel": ("gram_symmetric",),
    "_gram_rows_kernel": ("gram_rows",),
    "_gram_bwd_kernel": ("gram_backward",),
    "_kmeans_assign_kernel": ("assign",),
    "_kmeans_nearest_kernel": ("nearest",),
    "_kmeans_update_kernel": ("update",),
}


def test_bytes_are_those_counted_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    intras = [(18, 16, 32), (3, 24, 32), (1, 150, 16)]
    grams = [(6, 8, 32, 10), (4, 2, 64, 200)]
    clusterings = [(64, 8, 64, 20), (160, 2, 32, 150)]
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            _INTERPRETED,
            str(ROOT),
            json.dumps(intras),
            json.dumps(grams),
            json.dumps(clusterings),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counted = json.loads(done.stdout.splitlines()[-1])
    predicted = [cost.triton("intra", cost.Shape(*sizes), precision="ieee") for sizes in intras]
    predicted += [
        cost.triton("inter", cost.Shape(b, s, d, centroids=k), precision="ieee") for b, s, d, k in grams
    ]
    predicted += [
        cost.triton("kmeans", cost.Shape(rows=s, width=d, centroids=k, points=n), precision="ieee")
        for n, s, d, k in clusterings
    ]
    seen = set()
    for kernels, stages in zip(counted, predicted, strict=True):
        for kernel, issued in kernels.items():
            model = sum(stages[name].bytes for name in _KERNELS[kernel] if name in stages)
            # Addresses and strides of the layers, which the model leaves out, are some bytes a program.
            assert model == pytest.approx(issued, rel=0.03), kernel
            seen.add(kernel)
    assert len(seen) >= 11


def test_kernels_of_the_paper_shape_come_near_the_minimum() -> None:
    pytest.importorskip("triton")
    # L_I reads the Grams' 2 MB per side three times, and G's as often as the backward has parts, from the cache.
    half = dataclasses.replace(PAPER, dtype=torch.bfloat16)
    for op, shape, target, limit in (
        ("intra", PAPER, "sm_90", 1.15),
        ("intra", PAPER, "sm_80", 1.15),
        ("intra", half, "sm_90", 1.25),
        ("intra", half, "sm_80", 1.25),
        ("inter", PAPER, "sm_90", 1.25),
        ("inter", PAPER, "sm_80", 1.25),
    ):
        least = cost.total(cost.minimum(op, shape)).bytes
        assert least <= cost.total(cost.triton(op, shape, target)).bytes <= limit * least, (op, target)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="op: expected one of intra"):
        cost.minimum("cka", PAPER)
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        cost.Shape(batch=0)
    with pytest.raises(TypeError, match=r"torch\.int32"):
        cost.Shape(dtype=torch.int32)
    with pytest.raises(ValueError, match="target"):
        cost.triton("intra", PAPER, "sm_1")


def test_command_prints_a_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "--device", "a100", "--batch", "32", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "Prediction for A100 80GB SXM: nothing was run on it" in printed
    line = next(
        line for line in printed.splitlines() if line.startswith("intra, minimum") and " total " in line
    )
    assert line.split()[-3:] == ["14.7", "7.7", "14.7"]
    assert main(["cost", "--device", "abacus"]) == 2
