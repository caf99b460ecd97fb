"""Machine code of the Triton kernels, for GPUs that are not here: ``python -m benchmarks kernels-report``.

The configurations that the heuristics choose are compiled ahead of time, with the specialisation that a launch would
get. The report gives each kernel's registers, spills, shared memory, stores, matrix instructions and atomics, and an
estimate of the warps that a multiprocessor holds. For sm_90 it also counts, in each innermost loop with products, the
copies from memory to shared memory that pass no register (cp), the products and those whose left operand comes from
registers, stores to shared memory (sts) and conversions (cvt). No kernel runs and nothing is timed.

The command exits with 1 if a kernel spills in more than 100 instructions, needs more shared memory than the target has,
stores nothing, uses atomics, or has no matrix instruction although it multiplies tf32 or 16-bit matrices.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tqdm import tqdm

from benchmarks.compiled.cases import Case, cases
from benchmarks.compiled.json_cache import JsonCache
from benchmarks.compiled.launches import Launch, record, specialise
from benchmarks.compiled.machine_code import READER, ProductLoop, compile_launch, resident_warps
from benchmarks.paths import CACHE as CACHE_FOLDER
from benchmarks.tables import markdown
from fsd_kernels._triton import INTERPRETED, TARGETS

CACHE = JsonCache(CACHE_FOLDER / "kernels_report.json")

RANK = {name: place for place, name in enumerate(TARGETS)}

# Spilling instructions that do no harm: on an H200 ``gram`` takes 61 us with 33 of them in four warps, and 73 us with
# none in eight (K = 100, bfloat16).
SPILLS = 100


class CompiledKernel(NamedTuple):
    """One compiled kernel: where it is used, its configuration, and the counts read off its machine code."""

    kernel: str
    cases: str
    dtype: str
    target: str
    tile: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    stores: int
    matrix: int
    kind: str
    atomics: int
    needs_matrix: bool
    resident: int
    loops: list[list[int]]
    """A ``ProductLoop`` for every innermost loop with products on sm_90."""

    @property
    def loop(self) -> str:
        """The product loops in words; empty on other targets than sm_90."""
        return "; ".join(ProductLoop(*numbers).text() for numbers in self.loops)

    def problems(self) -> list[str]:
        """Say why this kernel is not acceptable."""
        found = []
        if self.spills > SPILLS:
            found.append(f"{self.spills} spills")
        if self.shared > TARGETS[self.target].shared_memory:
            found.append(f"{self.shared} bytes of shared memory, {self.target} has less")
        if not self.stores:
            found.append("no store")
        if self.needs_matrix and not self.matrix:
            found.append("no matrix instruction")
        if self.atomics:
            found.append(f"{self.atomics} atomics")
        return found


def _key(launch: Launch, target: str) -> str:
    parts = (launch.kernel.cache_key, tuple(specialise(launch)), target, triton.__version__, READER)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def compile_cases(
    targets: Sequence[str], chosen: Sequence[Case], cache: JsonCache = CACHE
) -> list[CompiledKernel]:
    """Compile every distinct kernel of the cases for every target; the counts are kept in ``cache``."""
    cached = cache.read()
    kernels: dict[str, CompiledKernel] = {}
    before = torch.get_float32_matmul_precision()
    try:
        pairs = [(target, case) for target in targets for case in chosen]
        # The bar shows on a terminal only. Compiling everything takes about 40 minutes.
        for target, case in tqdm(pairs, desc="compile", unit="case", disable=None):
            torch.set_float32_matmul_precision(case.precision)
            for launch in record(TARGETS[target], case.run):
                key = _key(launch, target)
                if key not in cached:
                    cached[key] = compile_launch(launch, target)
                    cache.keep(key, cached[key])
                kernels[key] = describe(launch, case, target, cached[key], kernels.get(key))
    finally:
        torch.set_float32_matmul_precision(before)
    return list(kernels.values())


def describe(
    launch: Launch, case: Case, target: str, read: dict[str, Any], before: CompiledKernel | None = None
) -> CompiledKernel:
    """Describe a compiled launch.

    Args:
        launch: The launch.
        case: The case that made it.
        target: The target it is compiled for.
        read: The counts of ``compile_launch``.
        before: The same kernel's description from earlier cases; this case's name is added to theirs.
    """
    warps = launch.keywords["num_warps"]
    names = [] if before is None else before.cases.split(", ")
    return CompiledKernel(
        kernel=launch.kernel.__name__,
        cases=", ".join(dict.fromkeys([*names, case.name])),
        dtype=case.dtype,
        target=target,
        tile=_tile(launch.keywords),
        warps=warps,
        stages=launch.keywords.get("num_stages", 3),
        resident=resident_warps(target, read["registers"], read["shared"], warps),
        **{
            name: read[name]
            for name in (
                "registers", "spills", "shared", "stores", "matrix", "kind", "atomics", "needs_matrix", "loops",
            )
        },
    )  # fmt: skip


def _tile(keywords: dict[str, Any]) -> str:
    """Rows x columns of a program's tile, or "3*64+16x32" for four tiles of rows, of which the last has 16."""
    if keywords.get("TILES", 0) > 1:
        return f"{keywords['TILES'] - 1}*{keywords['BLOCK']}+{keywords['LAST']}x{keywords['BLOCK_F']}"
    return "x".join(str(value) for name, value in keywords.items() if name.startswith("BLOCK"))


COLUMNS = (
    "kernel", "cases", "dtype", "target", "tile", "warps", "registers", "spills", "shared", "stores", "matrix",
    "kind", "resident", "loop",
)  # fmt: skip


def kernels_table(kernels: Sequence[CompiledKernel]) -> str:
    """Return a Markdown table of all kernels."""
    ordered = sorted(kernels, key=lambda each: (each.kernel, each.cases, each.dtype, RANK[each.target]))
    return markdown(
        [list(COLUMNS), *([str(getattr(each, name)) or "-" for name in COLUMNS] for each in ordered)]
    )


def summary(kernels: Sequence[CompiledKernel]) -> str:
    """Return a Markdown table of each kernel's extremes over its configurations, for every target."""
    groups: dict[tuple[str, str], list[CompiledKernel]] = {}
    for each in kernels:
        groups.setdefault((each.kernel, each.target), []).append(each)
    table = [
        [
            "kernel", "target", "compiled", "most registers", "spills", "most shared", "matrix", "least resident",
        ]
    ]  # fmt: skip
    for (kernel, target), group in sorted(groups.items(), key=lambda item: (item[0][0], RANK[item[0][1]])):
        kinds = " ".join(sorted({each.kind for each in group} - {""})) or "-"
        cells = (
            kernel.strip("_"), target, len(group), max(each.registers for each in group),
            sum(each.spills for each in group), max(each.shared for each in group), kinds,
            min(each.resident for each in group),
        )  # fmt: skip
        table.append([str(cell) for cell in cells])
    return markdown(table)


def _traffic_status() -> int:
    """Count the bytes moved, in a process of its own: Triton's interpreter is chosen when triton is imported."""
    command = [sys.executable, "-m", "benchmarks", "traffic"]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode


def main(argv: Sequence[str]) -> int:
    """Print the report; return 1 if a kernel is not acceptable or moves too many bytes."""
    parser = argparse.ArgumentParser(prog="kernels-report", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--kernels", default="", help="only cases whose name contains this, e.g. S=128")
    parser.add_argument("--output", type=Path, help="write the table to this file too")
    parser.add_argument("--no-traffic", action="store_true", help="leave out the bytes moved")
    options = parser.parse_args(argv)
    if INTERPRETED:
        print("kernels-report compiles kernels: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    kernels = compile_cases(options.targets, [case for case in cases() if options.kernels in case.name])
    table = kernels_table(kernels)
    print(f"{table}\n\n{summary(kernels)}")
    if options.output is not None:
        title = f"# Compiled kernels\n\n`make kernels-report`, triton {triton.__version__}; see ../kernels.md.\n\n"
        options.output.write_text(f"{title}{table}\n")
    bad = [(each, problem) for each in kernels for problem in each.problems()]
    for each, problem in bad:
        print(f"{each.kernel} ({each.cases}, {each.dtype}, {each.target}): {problem}", file=sys.stderr)
    print(f"{len(kernels)} kernels compiled with triton {triton.__version__}, {len(bad)} problems")
    moved_too_much = False if options.no_traffic else _traffic_status() != 0
    return int(bool(bad) or moved_too_much)
