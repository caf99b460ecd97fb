"""Compiles a recorded launch for a named target and reads its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.compiled.launches import Launch, specialise
from fsd_kernels._triton import TARGETS

READER = 4
"""Version of the reading below; another one makes the cache start anew."""

# Registers of one NVIDIA multiprocessor; shared memory and warps of a multiprocessor by target.
_REGISTERS = 65_536
_RESIDENT = {"sm_80": (167_936, 64), "sm_90": (233_472, 64), "sm_100": (233_472, 64), "gfx942": (65_536, 32)}

# NVIDIA's matrix instructions: wgmma, tcgen05, mma.sync.
_MATRIX = r"\b(?:HGMMA|UTC\w*MMA|HMMA|IMMA)\b"

# An instruction's address, its predicate if it has one, and its name with modifiers.
_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)(?P<rest>[^;]*)")
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_JUMP = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")


class ProductLoop(NamedTuple):
    """Instructions of an innermost loop that multiplies matrices on sm_90."""

    copies: int
    """Copies from memory to shared memory that pass no register: LDGSTS, UTMALDG."""
    products: int
    """HGMMA."""
    from_registers: int
    """Of these, those whose left operand is in registers."""
    stores: int
    """Stores to shared memory: STS, STSM."""
    conversions: int
    """Conversions between floating-point types: F2F, F2FP."""

    def text(self) -> str:
        """The numbers in a few words."""
        registers = f" ({self.from_registers} from registers)" if self.from_registers else ""
        return (
            f"{self.copies} cp, {self.products} HGMMA{registers}, {self.stores} sts, {self.conversions} cvt"
        )


def product_loops(code: str) -> list[ProductLoop]:
    """The innermost loops of disassembled code that hold HGMMA, in order."""
    lines = code.splitlines()
    labels: dict[str, int] = {}
    found: list[tuple[int, int]] = []
    for number, line in enumerate(lines):
        label, jump = _LABEL.match(line), _JUMP.search(line)
        if label:
            labels[label[1]] = number
        elif jump and jump[1] in labels:
            found.append((labels[jump[1]], number))
    loops = []
    for first, last in found:
        if any(first <= other[0] and other[1] < last for other in found):
            continue
        instructions = [match for line in lines[first:last] if (match := _INSTRUCTION.search(line))]
        names = [match["name"].split(".")[0] for match in instructions]
        products = [match["rest"] for match, name in zip(instructions, names, strict=True) if name == "HGMMA"]
        if products:
            loops.append(
                ProductLoop(
                    copies=sum(name in ("LDGSTS", "UTMALDG") for name in names),
                    products=len(products),
                    from_registers=sum(re.match(r"\s*R\d+, R\d+", rest) is not None for rest in products),
                    stores=sum(name in ("STS", "STSM") for name in names),
                    conversions=sum(name in ("F2F", "F2FP") for name in names),
                )
            )
    return loops


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
        "loops": [list(loop) for loop in product_loops(code)],
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
        "loops": [],
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
