"""What the Triton kernels compile to, for GPUs that are not there: ``python -m benchmarks kernels-report``.

The launchers are run on CPU tensors with a recorder in place of every kernel and a named target in place of the
GPU, so that exactly the configurations which the heuristics choose are compiled, with the specialisation that a launch
would get. Of the machine code are read: registers, spills, shared memory, stores, matrix instructions, atomics; and
from them the warps that fit on a multiprocessor. Nothing is run and nothing is timed.

The report ends with 1 if a kernel spills in more than 100 instructions, needs more shared memory than the target
has, stores nothing, uses atomics, or lacks matrix instructions where it multiplies matrices in anything but
IEEE float32.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.compiled.json_cache import JsonCache
from benchmarks.paths import CACHE as CACHE_FOLDER
from fsd_kernels._triton import INTERPRETED, TARGETS, Target

CACHE = JsonCache(CACHE_FOLDER / "kernels_report.json")
OPS = ("intra_cka", "gram", "structure", "kmeans")
# Changes when what is read off the machine code does, and so makes the cache start anew.
READER = 3

RANK = {name: place for place, name in enumerate(TARGETS)}

# Local-memory instructions that are no problem: on an H200 ``gram`` takes 61 us with 33 of them in four warps, and
# 73 us without any in eight (K = 100, bfloat16).
SPILLS = 100

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")

# Registers, shared memory and warps of one multiprocessor.
REGISTERS = 65_536
RESIDENT = {"sm_80": (167_936, 64), "sm_90": (233_472, 64), "sm_100": (233_472, 64), "gfx942": (65_536, 32)}

# Matrix instructions by target: wgmma, tcgen05, mma.sync, mfma.
MATRIX = r"\b(?:HGMMA|UTC\w*MMA|HMMA|IMMA)\b"


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Case(NamedTuple):
    """A shape, and the call that launches its kernels."""

    name: str
    dtype: str
    precision: str
    run: Callable[[], None]


class Row(NamedTuple):
    """What one compiled kernel is made of."""

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


class _Recorder:
    """Stands in for a kernel: ``recorder[grid](...)`` notes the launch instead of making it."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **keywords: Any) -> None:
            self.launches.append(Launch(self.kernel, arguments, keywords))

        return launch


def record(target: Target, run: Callable[[], None]) -> list[Launch]:
    """The launches that ``run`` makes on ``target``; no kernel runs."""
    launches: list[Launch] = []
    replaced = []
    for op in OPS:
        module = importlib.import_module(f"fsd_kernels.{op}.triton")
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                replaced.append((module, name, value))
                setattr(module, name, _Recorder(value, launches))
        if hasattr(module, "target_of"):
            replaced.append((module, "target_of", module.target_of))
            module.target_of = lambda device: target  # type: ignore[attr-defined]
    try:
        run()
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)
    return launches


def cases(
    rows: tuple[int, ...] = (32, 64, 128, 256, 512), centroids: tuple[int, ...] = (0, 50, 100, 300)
) -> Iterator[Case]:
    """The paper's shapes (batch 32, width 768, 128 tokens), other lengths, masks and few samples.

    Of k-means: 4,096 whole points, also with padding left out, one batch of them, and the sketches of a large task.
    """
    intra = importlib.import_module("fsd_kernels.intra_cka.triton")
    gram = importlib.import_module("fsd_kernels.gram.triton")
    structure = importlib.import_module("fsd_kernels.structure.triton")
    kmeans = importlib.import_module("fsd_kernels.kmeans.triton")

    def intra_run(batch: int, tokens: int, dtype: torch.dtype, masked: bool) -> None:
        x = torch.empty(batch, tokens, 768, dtype=dtype)
        mask = torch.ones(batch, tokens, dtype=torch.bool) if masked else None
        intra.forward([x], [x], mask)
        intra.backward([x], mask, torch.empty(1, batch, tokens, tokens), torch.empty(1, batch))

    def gram_run(num_centroid: int, dtype: torch.dtype, masked: bool, known: bool) -> None:
        features = torch.empty(32, 128 * 768, dtype=dtype)
        memory = torch.empty(num_centroid, 128 * 768, dtype=dtype) if num_centroid else None
        basis = torch.empty(num_centroid + 1, num_centroid + 1) if known else None
        mask = torch.ones(32, 128, dtype=torch.bool) if masked else None
        gamma: Tensor = gram.forward(features, memory, basis, mask)
        if not known:
            gram.backward(features, memory, mask, gamma, (True, True))

    def structure_run() -> None:
        gamma = torch.empty(134, 134)
        _, gradients = structure.forward(gamma, gamma, 100)
        structure.backward(gradients, torch.empty(4))

    def kmeans_run(points: int, width: int, features: int, clusters: int, dtype: torch.dtype) -> None:
        x = torch.empty(points, width, dtype=dtype)
        # Centroids are float32 as sums and means are, or rounded to the points' own dtype for the tensor cores. Zeros:
        # of more centroids than a program holds, torch takes the mean.
        for centroid_dtype in dict.fromkeys((torch.float32, dtype)):
            kmeans.assign(x, torch.zeros(clusters, features, dtype=centroid_dtype))
        sums, counts = torch.empty(clusters, features), torch.zeros(clusters, dtype=torch.int64)
        kmeans.update_(sums, counts, x, torch.zeros(points, dtype=torch.int64))

    def later(run: Callable[..., None], *arguments: object) -> Callable[[], None]:
        return functools.partial(run, *arguments)

    kinds = (
        ("fp32", "highest", torch.float32),
        ("tf32", "high", torch.float32),
        ("bf16", "highest", torch.bfloat16),
        ("fp16", "highest", torch.float16),
    )
    for label, precision, dtype in kinds:
        for tokens in rows:
            yield Case(f"S={tokens}", label, precision, later(intra_run, 32, tokens, dtype, False))
        yield Case("S=128 masked", label, precision, later(intra_run, 32, 128, dtype, True))
        yield Case("S=128 B=2", label, precision, later(intra_run, 2, 128, dtype, False))
        for number in centroids:
            yield Case(f"K={number}", label, precision, later(gram_run, number, dtype, False, False))
            if number:
                yield Case(
                    f"K={number} known",
                    label,
                    precision,
                    later(gram_run, number, dtype, False, True),
                )
        for number in (100, 300):
            yield Case(f"K={number} masked", label, precision, later(gram_run, number, dtype, True, False))
        for number in (*(k for k in centroids if k), 1000):
            name, sizes = f"k-means N=4096 K={number}", (4096, 128 * 768, 128 * 768, number)
            yield Case(name, label, precision, later(kmeans_run, *sizes, dtype))
        for name, sizes in (
            ("k-means N=4096 K=100 narrow", (4096, 64 * 768, 128 * 768, 100)),
            ("k-means N=32 K=100", (32, 128 * 768, 128 * 768, 100)),
            ("k-means N=400000 K=300 sketch", (400_000, 2048, 2048, 300)),
        ):
            yield Case(name, label, precision, later(kmeans_run, *sizes, dtype))
    yield Case("K=100", "fp32", "highest", structure_run)


_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.uint8: "*u8", torch.float64: "*fp64",
}  # fmt: skip


def specialise(
    launch: Launch,
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any], dict[str, Any]]:
    """(signature, constants, attributes, options) that Triton's launcher derives from a call's arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    options = {name: launch.keywords[name] for name in OPTIONS if name in launch.keywords}
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    given |= {name: value for name, value in launch.keywords.items() if name not in OPTIONS}
    for index, parameter in enumerate(launch.kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, options


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def _read_nvidia(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    matrix = re.findall(MATRIX, code)
    return {
        "registers": int(registers[1]) if registers else 0,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "stores": len(re.findall(r"\b(?:STG|UTMASTG)\b", code)),
        "matrix": len(matrix),
        "kind": "+".join(sorted(set(matrix))),
        # On sm_100 every kernel with matrix instructions sets and clears the bits of its tensor memory's allocation
        # in shared memory (ATOMS.OR, ATOMS.AND, integers): these touch no result.
        "atomics": len(re.findall(r"\b(?:ATOM|ATOMG|RED|REDG)\b|\bATOMS\b(?!\.(?:OR|AND)\b)", code)),
    }


def _read_amd(code: str) -> dict[str, Any]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", code)
        return int(found[1]) if found else 0

    matrix = re.findall(r"\bv_mfma\w*", code)
    return {
        "registers": number("vgpr_count"),
        # Scalar registers spill into lanes of vector registers, not into memory.
        "spills": number("vgpr_spill_count") + len(re.findall(r"\bscratch_(?:load|store)", code)),
        "stores": len(re.findall(r"\b(?:global|buffer|flat)_store", code)),
        "matrix": len(matrix),
        "kind": "mfma" if matrix else "",
        "atomics": len(re.findall(r"\b(?:global|buffer|flat|ds)_atomic|\bds_add", code)),
    }


def _resident_warps(target: str, registers: int, shared: int, warps: int) -> int:
    """Warps of one kernel that a multiprocessor holds at a time."""
    memory, most = RESIDENT[target]
    by_memory = memory // (shared + 1024) if shared else most
    if TARGETS[target].backend == "hip":
        # 512 registers per lane of each of four SIMD units, in groups of 8; a workgroup's waves spread over them.
        per_unit = 512 // max(8, 8 * -(-registers // 8))
        return warps * max(0, min(4 * per_unit // warps, memory // shared if shared else most, most // warps))
    per_warp = 32 * 8 * -(-max(1, registers) // 8)
    return warps * max(0, min(REGISTERS // (per_warp * warps), by_memory, most // warps))


def compile_launch(launch: Launch, target: str) -> dict[str, Any]:
    """Compile one recorded launch for a named target and read its machine code."""
    signature, constants, attributes, options = specialise(launch)
    limits = TARGETS[target]
    compiled = triton.compile(
        ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget(limits.backend, limits.arch, limits.warp_size),
        options=options,
    )
    code = compiled.asm
    read = _read_amd(code["amdgcn"]) if limits.backend == "hip" else _read_nvidia(code["cubin"])
    read["shared"] = compiled.metadata.shared
    products = re.findall(r"tt\.dot [^\n]*", code["ttir"])
    read["needs_matrix"] = any("f16" in line or "inputPrecision = tf32" in line for line in products)
    return read


def _key(launch: Launch, target: str) -> str:
    parts = (launch.kernel.cache_key, specialise(launch), target, triton.__version__, READER)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def report(targets: list[str], chosen: list[Case], cache: JsonCache = CACHE) -> list[Row]:
    """Compile every distinct kernel of the cases for every target; results are kept in ``cache``."""
    known = cache.read()
    rows: dict[str, Row] = {}
    before = torch.get_float32_matmul_precision()
    try:
        pairs = [(target, case) for target in targets for case in chosen]
        # On a terminal only: compiling everything takes about 40 minutes.
        for target, case in tqdm(pairs, desc="compile", unit="case", disable=None):
            torch.set_float32_matmul_precision(case.precision)
            for launch in record(TARGETS[target], case.run):
                key = _key(launch, target)
                if key not in known:
                    known[key] = compile_launch(launch, target)
                    cache.keep(key, known[key])
                rows[key] = _row(launch, case, target, known[key], rows.get(key))
    finally:
        torch.set_float32_matmul_precision(before)
    return list(rows.values())


def _row(launch: Launch, case: Case, target: str, read: dict[str, Any], before: Row | None) -> Row:
    names = (
        case.name
        if before is None or case.name in before.cases.split(", ")
        else f"{before.cases}, {case.name}"
    )
    warps = launch.keywords["num_warps"]
    return Row(
        kernel=launch.kernel.__name__, cases=before.cases if before and names == case.name else names,
        dtype=case.dtype, target=target, tile=_tile(launch.keywords), warps=warps,
        stages=launch.keywords.get("num_stages", 3),
        registers=read["registers"], spills=read["spills"], shared=read["shared"], stores=read["stores"],
        matrix=read["matrix"], kind=read["kind"], atomics=read["atomics"], needs_matrix=read["needs_matrix"],
        resident=_resident_warps(target, read["registers"], read["shared"], warps),
    )  # fmt: skip


def _tile(keywords: dict[str, Any]) -> str:
    """Rows x columns of a program's tile; "3*64+16x32" for one that holds four tiles of rows."""
    if keywords.get("TILES", 0) > 1:
        return f"{keywords['TILES'] - 1}*{keywords['BLOCK']}+{keywords['LAST']}x{keywords['BLOCK_F']}"
    return "x".join(str(value) for name, value in keywords.items() if name.startswith("BLOCK"))


COLUMNS = (
    "kernel", "cases", "dtype", "target", "tile", "warps", "registers", "spills", "shared", "stores", "matrix",
    "kind", "resident",
)  # fmt: skip


def markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    ordered = sorted(rows, key=lambda row: (row.kernel, row.cases, row.dtype, RANK[row.target]))
    for row in ordered:
        lines.append("| " + " | ".join(str(getattr(row, name)) or "-" for name in COLUMNS) + " |")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """The extremes over all configurations of each kernel on each target, as a Markdown table."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.target), []).append(row)
    lines = [
        "| kernel | target | compiled | most registers | spills | most shared | matrix | least resident |",
        "|" + "---|" * 8,
    ]
    for (kernel, target), own in sorted(groups.items(), key=lambda item: (item[0][0], RANK[item[0][1]])):
        kinds = " ".join(sorted({row.kind for row in own} - {""})) or "-"
        cells = (
            kernel.strip("_"), target, len(own), max(row.registers for row in own), sum(row.spills for row in own),
            max(row.shared for row in own), kinds, min(row.resident for row in own),
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Print the report; 1 if a kernel is not acceptable."""
    parser = argparse.ArgumentParser(prog="kernels-report", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--kernels", default="", help="only cases whose name contains this, e.g. S=128")
    parser.add_argument("--output", type=Path, help="write the table to this file too")
    parser.add_argument("--no-traffic", action="store_true", help="leave out the bytes moved")
    arguments = parser.parse_args(argv)
    if INTERPRETED:
        print("kernels-report compiles kernels: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    chosen = [case for case in cases() if arguments.kernels in case.name]
    rows = report(arguments.targets, chosen)
    table = markdown(rows)
    print(f"{table}\n\n{summary(rows)}")
    if arguments.output is not None:
        title = f"# Compiled kernels\n\n`make kernels-report`, triton {triton.__version__}; see ../KERNELS.md.\n\n"
        arguments.output.write_text(f"{title}{table}\n")
    bad = [(row, problem) for row in rows for problem in row.problems()]
    for row, problem in bad:
        print(f"{row.kernel} ({row.cases}, {row.dtype}, {row.target}): {problem}", file=sys.stderr)
    print(f"{len(rows)} kernels compiled with triton {triton.__version__}, {len(bad)} problems")
    if not arguments.no_traffic:
        command = [sys.executable, "-m", "benchmarks.compiled.traffic"]
        bad += [()] * subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode  # type: ignore[list-item]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
