"""Command line of the benchmarks.

python -m benchmarks OP[,OP] [...]       measure intra, local, global, fsd_ilg, kmeans, step or all
python -m benchmarks --check             measure what the table of numbers needs and hold it
python -m benchmarks cost [...]          predict bytes, flops, launches and times of a device that is not here
python -m benchmarks report FILE         write the Markdown report of a result
python -m benchmarks compare A B         what moved beyond the spread
python -m benchmarks kernels-report | traffic | mutate | memory | kernel-times [...]
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.speed import checks as table
from benchmarks.speed import harness, report, results
from benchmarks.speed.measure import Settings, measure_op
from benchmarks.speed.registry import OPS
from benchmarks.speed.results import WRONG, Result, Row
from fsd_kernels import cost

MODULES = {
    "kernels-report": "compiled.kernels_report",
    "traffic": "compiled.traffic",
    "mutate": "compiled.mutate",
    "memory": "memory.command",
    "kernel-times": "speed.kernel_times",
}
# How many times the seconds of a case ``make bench`` gives one of a step, whose time spreads by more than the 5 % that
# are asked about, and one of growth.
_STEP, _GROWTH = 15, 1 / 4
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32")
    parser.add_argument(
        "--precision", choices=("ieee", "tf32"), default="ieee", help="of float32 products on a GPU"
    )
    parser.add_argument("--threads", type=int, help="of torch; as many as it chooses by default")
    parser.add_argument("--seconds", type=float, default=6.0, help="per case and mode (default %(default)g)")
    parser.add_argument("--min-rounds", type=int, default=5)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result and, next to it, its report"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", nargs="?", default="all", help=f"some of {', '.join(OPS)}, or all")
    parser.add_argument("--providers", help="comma-separated; all of the op's by default")
    parser.add_argument("--without", help="comma-separated providers to leave out")
    parser.add_argument("--mode", help="comma-separated: forward, backward, full")
    parser.add_argument("--shapes", choices=("paper", "small", "growth"), default="paper")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 where a result is wrong or a number missed"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="show what moved against an earlier result"
    )
    _settings(parser)
    return parser


class Run:
    """One run on one machine: its clock, its ceilings and what has been measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        if options.threads is not None:
            if options.threads < 1:
                raise ValueError(f"--threads: expected at least 1, got {options.threads}")
            torch.set_num_threads(options.threads)
        device = torch.device(options.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: no GPU is to be had here")
        if options.precision == "tf32":
            if device.type != "cuda":
                raise ValueError(
                    "--precision tf32: a CPU has no tf32 products; expected ieee, or --device cuda"
                )
            torch.set_float32_matmul_precision("high")
        self.settings = Settings(
            device, _DTYPES[options.dtype], seconds=options.seconds, min_rounds=options.min_rounds
        )
        self.clock = harness.make_clock(device, self.settings.dtype)
        self.ceilings = harness.ceilings(device, self.clock, dtype=self.settings.dtype)
        environment = results.environment(device) | {"dtype": options.dtype, "precision": options.precision}
        self.result = Result(environment, self.ceilings._asdict(), [])
        print(
            f"{self.result.environment['device']}, {torch.get_num_threads()} threads: "
            f"{self.ceilings.matmul / 1e9:.0f} GFLOP/s in a product, {self.ceilings.copy / 1e9:.1f} GB/s in a copy"
        )

    def measure(
        self,
        op: str,
        cases: Sequence[object],
        providers: Sequence[str] | None = None,
        modes: Sequence[str] | None = None,
    ) -> None:
        """Measure and print an op's cases."""

        def show(rows: list[Row]) -> None:
            self.result.rows.extend(rows)
            print(f"\n{report.text(self.result, rows)}", flush=True)

        measure_op(
            OPS[op],
            cases,  # type: ignore[arg-type]
            self.settings,
            self.clock,
            self.ceilings,
            providers=providers,
            modes=modes,
            report=show,
        )

    def finish(self, options: argparse.Namespace, checked: bool) -> None:
        """Write and compare what was asked for."""
        if checked:
            self.result.checks.extend(table.evaluate(self.result))
            print(f"\n{report.aligned(report.checks_table(self.result.checks))}")
        if options.json is not None:
            results.save(self.result, options.json)
            print(f"\nwrote {options.json} and {report.write(self.result, options.json)}")
        if getattr(options, "compare", None) is not None:
            _print_comparison(results.load(options.compare), self.result)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _measure(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    chosen = list(OPS) if options.op == "all" else _names(options.op) or []
    for op in chosen:
        if op not in OPS:
            raise ValueError(f"OP: expected some of {', '.join(OPS)}, or all; got {op!r}")
    run = Run(options)
    whole_table = options.check and options.op == "all"
    if whole_table:
        asked = run.settings
        for needed in table.NEEDED:
            run.settings = asked._replace(min_rounds=max(asked.min_rounds, needed.rounds))
            run.measure(needed.op, needed.cases, needed.providers, ["full"])
    else:
        providers = _names(options.providers)
        if providers is None and options.shapes == "growth":
            providers = ["ours"]
        modes = _names(options.mode)
        left_out = _names(options.without) or []
        for op in chosen:
            own = [name for name in providers or OPS[op].providers if name not in left_out]
            # Of several ops each is measured in the modes that it has.
            own_modes = (
                modes if modes is None or len(chosen) == 1 else [m for m in modes if m in OPS[op].modes]
            )
            run.measure(op, OPS[op].shapes[options.shapes], own, own_modes)
            if options.json is not None:
                # What is measured so far, should the rest be interrupted.
                results.save(run.result, options.json)
    run.finish(options, options.check)
    if not options.check:
        return 0
    wrong = any(row.status == WRONG for row in run.result.rows)
    failed = any(check.passed is False for check in run.result.checks)
    missing = whole_table and any(check.passed is None for check in run.result.checks)
    return 1 if wrong or failed or missing else 0


def _print_comparison(before: Result, after: Result) -> None:
    lines = results.compare(before, after)
    print("\n".join(lines) if lines else "nothing moved beyond the spread")


def _compare(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(argv)
    _print_comparison(results.load(options.before), results.load(options.after))
    return 0


def _report(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report")
    parser.add_argument("file", type=Path, help="a result")
    options = parser.parse_args(argv)
    print(f"wrote {report.write(results.load(options.file), options.file)}")
    return 0


def _bench(argv: Sequence[str]) -> int:
    """Run everything that this machine can, hold it against the table, and write result and report.

    Forward and whole passes. Beside a memory the reference, which takes seconds for its distances, judges and is not
    timed; torch.compile, which takes half a minute for a shape, is timed on the first of an op. A training step gets 15
    times the time per case, growth a fourth of it, and what is left of growth when the time is up is left out, which is
    said. Ends with 1 if the gate refuses one of ours; a number of the table that is missed is in the report, and
    ``--check`` is what ends with 1 for it.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks bench", description=_bench.__doc__)
    _settings(parser)
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="after which no case of growth is begun (default 20)"
    )
    parser.set_defaults(min_rounds=3, seconds=4.0)
    options = parser.parse_args(argv)
    begin = time.monotonic()
    run = Run(options)
    asked = run.settings
    for op in OPS.values():
        run.settings = asked._replace(seconds=(_STEP if op.name == "step" else 1) * asked.seconds)
        slow = {"reference"} if "centroids" in op.letters else set()
        modes = [mode for mode in op.modes if mode != "backward"]
        for case in op.shapes["paper"]:
            run.measure(op.name, [case], [name for name in op.providers if name not in slow], modes)
            slow.add("compiled")
    run.settings = asked._replace(seconds=_GROWTH * asked.seconds, memory=False)
    cases = [
        (place, name, case)
        for name in table.GROWTH_OPS
        for place, case in enumerate(OPS[name].shapes["growth"])
    ]
    # All ops' growth with one size, then with the next. A case takes no more than half a minute, the report as long.
    growth = sorted(cases, key=lambda each: each[0])
    end = begin + 60 * (options.minutes - 1)
    for done, (_, name, case) in enumerate(growth):
        if time.monotonic() > end:
            print(f"\nthe time is up: {len(growth) - done} of {len(growth)} cases of growth are left out")
            break
        run.measure(name, [case], ["ours"], ["full"])
    if options.json is None:
        options.json = results.default_path(run.result)
    run.finish(options, True)
    return int(
        any(row.status == WRONG and OPS[row.op].providers[row.provider].ours for row in run.result.rows)
    )


def _device(name: str) -> cost.Device:
    if name in cost.DEVICES:
        return cost.DEVICES[name]
    if name != "cpu":
        raise ValueError(f"--device: expected {', '.join(cost.DEVICES)} or cpu, got {name!r}")
    cpu = torch.device("cpu")
    measured = harness.ceilings(cpu, harness.make_clock(cpu))
    return cost.Device(
        f"{results.device_name(cpu)}, {torch.get_num_threads()} threads, measured now",
        measured.copy,
        {"fp32": measured.matmul},
    )


def _cost(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cost")
    parser.add_argument("--device", default="h100", help=f"{', '.join(cost.DEVICES)} or cpu (measured)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rows", type=int, default=128, help="tokens per sample")
    parser.add_argument("--width", type=int, default=768, help="hidden size")
    parser.add_argument("--teacher-width", type=int, default=0, help="0: as the student's")
    parser.add_argument("--centroids", type=int, default=100)
    parser.add_argument("--points", type=int, default=4096)
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32")
    parser.add_argument("--precision", choices=("tf32", "ieee"), default="tf32", help="of float32 products")
    options = parser.parse_args(argv)
    device = _device(options.device)
    dtype = _DTYPES[options.dtype]
    shape = cost.Shape(
        options.batch,
        options.rows,
        options.width,
        options.teacher_width,
        options.centroids,
        options.points,
        dtype=dtype,
    )
    print(
        f"Prediction for {device.name}: nothing was run on it. Times are a lower bound from its peak rates, without "
        "launch overhead."
    )
    lines = [["op", "stage", "MB", "GFLOP", "launches", "memory us", "matmul us", "roofline us"]]

    def add(op: str, stages: dict[str, cost.Cost]) -> None:
        for name, stage in {**stages, "total": cost.total(stages)}.items():
            own = stages if name == "total" else {name: stage}
            lines.append(
                [
                    op,
                    name,
                    f"{stage.bytes / 1e6:.1f}",
                    f"{stage.flops / 1e9:.2f}",
                    str(stage.launches),
                    f"{device.memory_seconds(own) * 1e6:.1f}",
                    f"{device.matmul_seconds(own, dtype, options.precision) * 1e6:.1f}",
                    f"{device.seconds(own, dtype, options.precision) * 1e6:.1f}",
                ]
            )

    for op in cost.OPS:
        add(f"{op}, minimum", cost.minimum(op, shape))
        if device.target is not None:
            add(f"{op}, kernels", cost.triton(op, shape, device.target, options.precision))
    print(report.aligned(lines))
    return 0


def _module(name: str) -> Callable[[Sequence[str]], int]:
    def run(argv: Sequence[str]) -> int:
        module = importlib.import_module(f"benchmarks.{MODULES[name]}")
        return int(module.main(list(argv)))

    return run


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "cost": _cost,
    "report": _report,
    "compare": _compare,
    "bench": _bench,
    **{name: _module(name) for name in MODULES},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 where a check failed, 2 where an argument is wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(arguments[0]) if arguments else None
    try:
        return command(arguments[1:]) if command is not None else _measure(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
