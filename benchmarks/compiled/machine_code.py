"""Compiles a recorded launch for a named target and reads its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.compiled.launches import Launch, specialise
from fsd_kernels._triton import TARGETS

READER = 3
"""Version of the reading below; another one makes the cache start anew."""

# Registers of one NVIDIA multiprocessor; shared memory and warps of a multiprocessor by target.
_REGISTERS = 65_536
_RESIDENT = {"sm_80": (167_936, 64), "sm_90": (233_472, 64), "sm_100": (233_472, 64), "gfx942": (65_536, 32)}

# NVIDIA's matrix instructions: wgmma, tcgen05, mma.sync.
_MATRIX = r"\b(?:HGMMA|UTC\w*MMA|HMMA|IMMA)\b"


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
    matrix = re.findall(_MATRIX, code)
    return {
        "registers": int(registers[1]) if registers else 0,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "stores": len(re.findall(r"\b(?:STG|UTMASTG)\b", code)),
        "matrix": len(matrix),
        "kind": "+".join(sorted(set(matrix))),
        # On sm_100 a kernel with matrix instructions allocates tensor memory with integer ATOMS.OR and ATOMS.AND in
        # shared memory; they do not affect results and are not counted.
        "atomics": len(re.findall(r"\b(?:ATOM|ATOMG|RED|REDG)\b|\bATOMS\b(?!\.(?:OR|AND)\b)", code)),
    }


def _read_amd(code: str) -> dict[str, Any]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", code)
        return int(found[1]) if found else 0

    matrix = re.findall(r"\bv_mfma\w*", code)
    return {
        "registers": number("vgpr_count"),
        # Scalar registers spill into lanes of vector registers, which costs no memory access.
        "spills": number("vgpr_spill_count") + len(re.findall(r"\bscratch_(?:load|store)", code)),
        "stores": len(re.findall(r"\b(?:global|buffer|flat)_store", code)),
        "matrix": len(matrix),
        "kind": "mfma" if matrix else "",
        "atomics": len(re.findall(r"\b(?:global|buffer|flat|ds)_atomic|\bds_add", code)),
    }


def compile_launch(launch: Launch, target: str) -> dict[str, Any]:
    """Compile one recorded launch for a named target; return the counts read off its machine code."""
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


def resident_warps(target: str, registers: int, shared: int, warps: int) -> int:
    """Estimate the warps of one kernel that a multiprocessor holds at a time.

    Args:
        target: A name in ``TARGETS``.
        registers: Registers of a thread.
        shared: Bytes of shared memory of a program.
        warps: Warps of a program.
    """
    memory, max_warps = _RESIDENT[target]
    if TARGETS[target].backend == "hip":
        # A lane of each of the four SIMD units has 512 registers, in groups of 8; a workgroup's waves use all units.
        per_unit = 512 // max(8, 8 * -(-registers // 8))
        by_memory = memory // shared if shared else max_warps
        return warps * max(0, min(4 * per_unit // warps, by_memory, max_warps // warps))
    by_memory = memory // (shared + 1024) if shared else max_warps
    per_warp = 32 * 8 * -(-max(1, registers) // 8)
    return warps * max(0, min(_REGISTERS // (per_warp * warps), by_memory, max_warps // warps))
