"""A run of the speed benchmarks: the flags that say how to measure, the machine, and the result so far."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.speed import checks, harness, report, results
from benchmarks.speed.inputs import Sizes
from benchmarks.speed.measure import Machine, Settings, measure_op
from benchmarks.speed.ops import Op
from benchmarks.speed.results import Result, Row
from benchmarks.tables import aligned

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every measuring command has."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument(
        "--precision", choices=("ieee", "tf32"), default="ieee", help="precision of float32 products on a GPU"
    )
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's choice)")
    parser.add_argument("--seconds", type=float, default=6.0, help="per case and mode (default %(default)g)")
    parser.add_argument("--min-rounds", type=int, default=5)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result and, next to it, its report"
    )


def _settings(options: argparse.Namespace) -> Settings:
    """Set torch's threads and precision as the options say; return how to measure."""
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a GPU, torch finds none")
    if options.precision == "tf32":
        if device.type != "cuda":
            raise ValueError("--precision tf32: a CPU has no tf32 products; expected ieee, or --device cuda")
        torch.set_float32_matmul_precision("high")
    return Settings(device, DTYPES[options.dtype], seconds=options.seconds, min_rounds=options.min_rounds)


def _measured_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    clock = harness.make_clock(device, dtype)
    return Machine(clock, harness.ceilings(device, clock, dtype=dtype))


class Run:
    """One run on one machine.

    Args:
        options: The flags of ``add_settings``.
        machine: Clock and rates of the device; None: measured now.

    Raises:
        ValueError: A flag does not fit the machine.
    """

    def __init__(self, options: argparse.Namespace, machine: Machine | None = None) -> None:
        self.options = options
        self.settings = _settings(options)
        device = self.settings.device
        self.machine = machine or _measured_machine(device, self.settings.dtype)
        ceilings = self.machine.ceilings
        environment = results.environment(device) | {"dtype": options.dtype, "precision": options.precision}
        self.result = Result(environment, ceilings._asdict(), [])
        print(
            f"{environment['device']}, {torch.get_num_threads()} threads: "
            f"{ceilings.matmul / 1e9:.0f} GFLOP/s in a product, {ceilings.copy / 1e9:.1f} GB/s in a copy"
        )

    def measure(
        self,
        op: Op,
        cases: Sequence[Sizes],
        providers: Sequence[str] | None = None,
        modes: Sequence[str] | None = None,
        settings: Settings | None = None,
    ) -> None:
        """Measure an op and print every case; ``settings`` replace the run's own."""

        def show(rows: list[Row]) -> None:
            self.result.rows.extend(rows)
            print(f"\n{report.text(self.result, rows)}", flush=True)

        chosen = self.settings if settings is None else settings
        measure_op(op, cases, chosen, self.machine, providers=providers, modes=modes, report=show)

    def check(self, targets: Sequence[checks.Check] = checks.CHECKS) -> None:
        """Check the targets and print them as a table."""
        self.result.checks.extend(checks.evaluate(self.result, targets))
        print(f"\n{aligned(report.checks_table(self.result.checks))}")

    def save(self, path: Path) -> None:
        """Write the result and its report."""
        results.save(self.result, path)
        print(f"\nwrote {path} and {report.write(self.result, path)}")


def print_comparison(before: Result, after: Result) -> None:
    """Print the times that changed by more than the spread."""
    lines = results.compare(before, after)
    print("\n".join(lines) if lines else "nothing moved beyond the spread")
