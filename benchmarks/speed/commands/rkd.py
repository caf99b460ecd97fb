"""``python -m benchmarks rkd``: angle-wise RKD read off B x B Gram matrices, against the usual form.

The usual form builds the vectors between all pairs of samples, [B, B, F], normalises them and multiplies them; it runs
without gradients on the teacher's side. Both run forward + backward at the paper's shape (batch 32, 128 tokens, width
768: F = 98,304). Before they are timed, both are compared with the plain formula in float64, on fewer tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.speed import harness, results
from benchmarks.speed.harness import Measurement, Timed
from benchmarks.speed.inputs import Sizes
from benchmarks.tables import Table, aligned
from fsd_fast.losses import RelationalLoss
from fsd_fast.losses.reference import rkd_angle

PAPER = Sizes(batch=32, rows=128, width=768, centroids=0, points=0)
OURS, USUAL = "Gram", "usual form"
_GATE_ROWS = 4
_GATE = 1e-3

Loss = Callable[[Tensor, Tensor], Tensor]


def usual_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """L_A of features [B, S, D] from normalised vectors between all pairs, mean over distinct triplets."""

    def cosines(features: Tensor) -> Tensor:
        rows = features.flatten(1)
        units = functional.normalize(rows[None] - rows[:, None], dim=2)
        return torch.bmm(units, units.transpose(1, 2))

    with torch.no_grad():
        given = cosines(teacher)
    batch = len(student)
    # Triplets that are not distinct add 0: both cosines are 0, or both are 1.
    total = functional.smooth_l1_loss(cosines(student), given, reduction="sum")
    return total / (batch * (batch - 1) * (batch - 2))


def contenders() -> dict[str, Loss]:
    """The two forms by name."""
    relational = RelationalLoss(distance_weight=0.0, angle_weight=1.0)
    return {OURS: lambda student, teacher: relational(student, teacher).loss, USUAL: usual_angle}


def inputs(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """A differentiable student [B, S, D], and a teacher that partly follows it."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (2, sizes.batch, sizes.rows, sizes.width)
    student, noise = torch.randn(shape, generator=generator, device=device)
    return student.clone().requires_grad_(), student + noise


def _run(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(student, teacher)
    return value.detach(), torch.autograd.grad(value, student)[0]


def check(sizes: Sizes, device: torch.device) -> None:
    """Compare value and gradient of both with the plain formula in float64.

    Raises:
        ValueError: One is wrong; it is named.
    """
    student, teacher = inputs(sizes._replace(rows=_GATE_ROWS), device)
    exact = student.detach().double().requires_grad_()
    truth = rkd_angle(exact.flatten(1), teacher.double().flatten(1))
    expected = truth.detach(), torch.autograd.grad(truth, exact)[0]
    for name, loss in contenders().items():
        for found, wanted in zip(_run(loss, student, teacher), expected, strict=True):
            error = float((found.double() - wanted).abs().max() / wanted.abs().max())
            if not error <= _GATE:
                raise ValueError(
                    f"{name}: expected the plain formula to {_GATE:g}, got an error of {error:.2g}"
                )


def measure(
    sizes: Sizes, device: torch.device, seconds: float, min_rounds: int = 3
) -> tuple[Measurement, dict[str, int]]:
    """Time both forms, forward + backward, and return the measurement and the peak memory of each in bytes."""
    student, teacher = inputs(sizes, device)

    def timed_call(loss: Loss) -> Timed:
        return Timed(lambda: None, lambda _: _run(loss, student, teacher))

    timed = {name: timed_call(loss) for name, loss in contenders().items()}
    measured = harness.measure(
        {name: [call] for name, call in timed.items()},
        harness.make_clock(device),
        seconds=seconds,
        min_rounds=min_rounds,
    )
    return measured, {name: harness.peak_memory(call, device) for name, call in timed.items()}


def table(measured: Measurement, peaks: dict[str, int]) -> Table:
    """Table of times, in milliseconds and relative to ours, and of peak memory."""
    lines = [["form", "ms", "quartiles", "x Gram", "peak MiB", "x Gram"]]
    for name, samples in measured.samples.items():
        time = harness.spread(samples)
        ratio = harness.ratio(samples, measured.samples[OURS])
        lines.append(
            [
                name,
                f"{time.median * 1e3:.1f}",
                f"{time.low * 1e3:.1f} to {time.high * 1e3:.1f}",
                f"{ratio.median:.1f}",
                f"{peaks[name] / 2**20:.0f}",
                f"{peaks[name] / peaks[OURS]:.1f}",
            ]
        )
    return lines


def main(argv: Sequence[str]) -> int:
    """Print time and memory of both forms."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks rkd",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="time for all rounds (default %(default)g)"
    )
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's choice)")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    check(PAPER, device)
    measured, peaks = measure(PAPER, device, options.seconds)
    busy = ", the machine was busy" if measured.canary.noisy else ""
    print(
        f"angle-wise RKD, forward + backward, batch {PAPER.batch}, F = {PAPER.rows * PAPER.width}, float32; "
        f"{results.device_name(device)}, {torch.get_num_threads()} threads; "
        f"{len(measured.samples[OURS])} rounds{busy}"
    )
    print(aligned(table(measured, peaks)))
    return 0
