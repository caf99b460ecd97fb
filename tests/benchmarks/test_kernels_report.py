"""The compiled-code report: a few real kernels for GPUs that are not here, and kernels that it has to refuse."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.compiled import kernels_report
from benchmarks.compiled.cases import Case, cases
from benchmarks.compiled.json_cache import JsonCache
from benchmarks.compiled.kernels_report import CompiledKernel
from benchmarks.compiled.launches import Launch, record
from benchmarks.compiled.machine_code import ProductLoop, compile_launch, product_loops
from benchmarks.paths import ROOT
from fsd_kernels._triton import TARGETS


@triton.jit
def _stores_nothing(x_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.load(x_ptr + tl.arange(0, BLOCK))


@triton.jit
def _adds_atomically(x_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.atomic_add(x_ptr + tl.arange(0, BLOCK), tl.full((BLOCK,), 1.0, dtype=tl.float32))
    tl.store(x_ptr, 1.0)


@triton.jit
def _holds_too_much(x_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + rows[:, None] * BLOCK + rows[None, :])
    tl.store(x_ptr + rows[:, None] * BLOCK + rows[None, :], tl.dot(x, x, input_precision="tf32"))


def compiled(kernel: Any, target: str, **keywords: Any) -> CompiledKernel:
    """The report's description of one launch."""
    launch = Launch(kernel, (torch.empty(1 << 18),), {"num_warps": 4, **keywords})
    case = Case("case", "tf32", "high", lambda: None)
    return kernels_report.describe(launch, case, target, compile_launch(launch, target))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_subset_compiles_to_what_it_should_be(target: str, tmp_path: Path) -> None:
    chosen = [
        case
        for case in cases(rows=(32,), centroids=(50,))
        if case.dtype == "bf16" and case.name in ("S=32", "K=50")
    ]
    cache = JsonCache(tmp_path / "cache.json")
    rows = kernels_report.compile_cases([target], chosen, cache)
    kernels = {row.kernel: row for row in rows}
    assert {"_gram_fwd_kernel", "_gram_sum_kernel", "_gram_rows_kernel", "_gram_bwd_kernel"} < set(kernels)
    assert [problem for row in rows for problem in row.problems()] == []
    for name in ("_gram_fwd_kernel", "_gram_bwd_kernel"):
        assert kernels[name].matrix > 0
        assert kernels[name].registers > 0
        assert kernels[name].resident > 0
    assert kernels["_gram_sum_kernel"].matrix == 0
    # The second report reads the counts that the first one wrote.
    marked = {key: {**counts, "stores": 77} for key, counts in cache.read().items()}
    for key, counts in marked.items():
        cache.keep(key, counts)
    again = kernels_report.compile_cases([target], chosen, cache)
    assert again == [row._replace(stores=77) for row in rows]


def product_loops_of(name: str) -> dict[str, list[ProductLoop]]:
    """The loops with products of each kernel of a case, in bfloat16 for sm_90."""
    chosen = [case for case in cases(rows=(128,)) if case.dtype == "bf16" and case.name == name]
    rows = kernels_report.compile_cases(["sm_90"], chosen, JsonCache(None))
    return {row.kernel: [ProductLoop(*numbers) for numbers in row.loops] for row in rows}


def check_copied(loop: ProductLoop) -> None:
    """Both operands come from memory by asynchronous copies and pass no register."""
    assert loop.copies > 0
    assert loop.products > 0
    assert (loop.from_registers, loop.stores, loop.conversions) == (0, 0, 0)


def test_16_bit_rows_of_gram_go_from_memory_to_the_tensor_cores() -> None:
    """On sm_90, forward and backward; where a program of the backward holds all rows, its loop stores results."""
    few, many = product_loops_of("K=100"), product_loops_of("K=300")
    for loop in (*few["_gram_fwd_kernel"], *many["_gram_fwd_kernel"], *many["_gram_bwd_kernel"]):
        check_copied(loop)
    assert len(few["_gram_fwd_kernel"]) >= 1
    assert len(many["_gram_fwd_kernel"]) >= 1
    (backward,) = few["_gram_bwd_kernel"]
    assert backward.copies > 0
    assert backward.from_registers == 0


def test_16_bit_points_go_from_memory_to_the_tensor_cores() -> None:
    """On sm_90; the centroids, which are shifted and rounded, are the operands in registers."""
    (loop,) = product_loops_of("k-means N=4096 K=100")["_kmeans_assign_kernel"][:1]
    assert loop.copies > 0
    assert loop.stores == 0
    assert loop.from_registers == loop.products


def test_16_bit_features_go_from_memory_to_the_tensor_cores() -> None:
    """On sm_90 no loop with products moves features through registers; the backward's rounds and stores its result."""
    loops = product_loops_of("S=128")
    forward, (backward,) = loops["_intra_cka_fwd_kernel"], loops["_intra_cka_bwd_kernel"]
    assert len(forward) == 2  # a side each
    for loop in forward:
        check_copied(loop)
    assert backward.copies > 0
    assert backward.from_registers == 0
    # 128 x 64 results of 256 threads, two of them in a conversion and eight in a store.
    assert backward.conversions == 16
    assert backward.stores == 4


_LOOPS = """
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0020*/              @!P0 STS.128 [R1], R4 ;
.L_x_2:
        /*0030*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, !UPT ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0060*/                   F2FP.BF16.F32.PACK_AB R1, R2, R3 ;
        /*0070*/              @P1  BRA `(.L_x_2) ;
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0090*/              @P2  BRA `(.L_x_1) ;
        /*00a0*/                   BRA `(.L_x_3) ;
.L_x_3:
        /*00b0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
.L_x_4:
        /*00c0*/                   STS [R1], R4 ;
        /*00d0*/                   BRA `(.L_x_4) ;
"""


def test_innermost_loops_with_products_are_read() -> None:
    assert product_loops(_LOOPS) == [
        ProductLoop(copies=1, products=2, from_registers=1, stores=0, conversions=1)
    ]


def test_the_extremes_in_the_docs_are_those_of_the_whole_table() -> None:
    folder = ROOT / "docs" / "results"
    lines = (folder / "kernels_report.md").read_text(encoding="utf-8").splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    rows = []
    for cells in table[1:]:
        read = {
            name: cell.replace("-", "") if name == "kind" else cell
            for name, cell in zip(table[0], cells, strict=True)
        }
        numbers = {name: int(read[name]) for name in ("registers", "spills", "shared", "resident")}
        rows.append(SimpleNamespace(**{**read, **numbers}))
    text = (folder / "kernels_summary.md").read_text(encoding="utf-8")
    assert kernels_report.summary(rows) in text  # type: ignore[arg-type]


def test_an_empty_kernel_is_refused() -> None:
    assert "no store" in compiled(_stores_nothing, "sm_90", BLOCK=128).problems()


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_atomics_are_refused(target: str) -> None:
    assert any("atomics" in problem for problem in compiled(_adds_atomically, target, BLOCK=128).problems())


def test_spilled_registers_are_refused() -> None:
    assert any(
        "spills" in problem
        for problem in compiled(_holds_too_much, "sm_80", BLOCK=128, num_warps=2).problems()
    )


GOOD = CompiledKernel(
    kernel="k", cases="c", dtype="tf32", target="sm_80", tile="64x64", warps=4, stages=3, registers=64, spills=0,
    shared=1024, stores=1, matrix=8, kind="HMMA", atomics=0, needs_matrix=True, resident=8, loops=[],
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"shared": TARGETS["sm_80"].shared_memory + 1}, "shared memory"),
        ({"matrix": 0}, "no matrix instruction"),
        ({"spills": 101}, "101 spills"),
        ({"stores": 0}, "no store"),
        ({"atomics": 2}, "2 atomics"),
    ],
)
def test_every_problem_is_named(change: dict[str, int], problem: str) -> None:
    assert GOOD.problems() == []
    assert any(problem in found for found in GOOD._replace(**change).problems())
    assert GOOD._replace(matrix=0, needs_matrix=False).problems() == []
    assert GOOD._replace(spills=kernels_report.SPILLS).problems() == []


def test_the_summary_has_the_extremes() -> None:
    rows = [
        GOOD,
        GOOD._replace(registers=80, shared=512, kind="IMMA", resident=4),
        GOOD._replace(target="gfx942", kind="", spills=3),
    ]
    lines = kernels_report.summary(rows).splitlines()
    assert lines[2:] == [
        "| k | sm_80 | 2 | 80 | 0 | 1024 | HMMA IMMA | 4 |",
        "| k | gfx942 | 1 | 64 | 3 | 1024 | - | 8 |",
    ]


@pytest.mark.parametrize("target", list(TARGETS))
def test_every_case_launches_kernels(target: str) -> None:
    for case in cases(rows=(32, 256), centroids=(0, 50)):
        # Whole points of all tasks take gigabytes.
        if "N=4096" in case.name or "N=400000" in case.name:
            continue
        launches = record(TARGETS[target], case.run)
        assert launches, case
        assert all(launch.kernel.__name__.endswith("_kernel") for launch in launches)


def test_the_table_has_a_line_for_each_kernel_and_the_cases_that_share_it() -> None:
    launch = Launch(_stores_nothing, (), {"num_warps": 4, "BLOCK": 64})
    read = {
        "registers": 64, "spills": 0, "shared": 0, "stores": 1, "matrix": 0, "kind": "", "atomics": 0,
        "needs_matrix": False, "loops": [[8, 4, 1, 2, 3], [8, 4, 0, 0, 0]],
    }  # fmt: skip
    first = kernels_report.describe(launch, Case("S=32", "fp32", "highest", lambda: None), "sm_90", read)
    second = Case("S=64", "fp32", "highest", lambda: None)
    both = kernels_report.describe(launch, second, "sm_90", read, first)
    assert kernels_report.describe(launch, second, "sm_90", read, both) == both
    lines = kernels_report.kernels_table([both]).splitlines()
    assert lines[2:] == [
        "| _stores_nothing | S=32, S=64 | fp32 | sm_90 | 64 | 4 | 64 | 0 | 0 | 1 | 0 | - | 32 | "
        "8 cp, 4 HGMMA (1 from registers), 2 sts, 3 cvt; 8 cp, 4 HGMMA, 0 sts, 0 cvt |"
    ]
