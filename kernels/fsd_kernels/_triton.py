"""Shared by the Triton implementations: limits of the target, precision of products, launch guard, tuning.

Tile sizes come from heuristics, pure functions of shape, dtype and a ``Target``. They run without a GPU, so that the
report of compiled code can ask for the configurations of any GPU. ``FSD_AUTOTUNE=1`` instead times the heuristic's
choice and its neighbours at the first use of a shape.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsd_kernels import _numerics

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""True if kernels run in Triton's interpreter. Fixed when triton is first imported."""


class Target(NamedTuple):
    """The limits of one GPU generation that the heuristics look at."""

    backend: str
    """"cuda" or "hip"."""
    arch: int | str
    """Compute capability times ten, or the gfx name."""
    warp_size: int
    shared_memory: int
    """Bytes of shared memory that one program may use."""
    multiprocessors: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166_912, 108),
    "sm_90": Target("cuda", 90, 32, 232_448, 132),
    "sm_100": Target("cuda", 100, 32, 232_448, 148),
    "gfx942": Target("hip", "gfx942", 64, 65_536, 304),
}

# The constants of ``_numerics`` for kernels, whose arithmetic is float32.
CKA_FLOOR = tl.constexpr(_numerics.CKA_FLOOR)
FLOORED = tl.constexpr(_numerics.NEG_LOG_FLOORED)
ROUNDING = tl.constexpr(_numerics.rounding_energy(torch.float32))
NORM_ROUNDING = tl.constexpr(_numerics.norm_rounding(torch.float32))
MAXIMUM_LENGTH_RATIO = tl.constexpr(_numerics.maximum_length_ratio(_numerics.norm_rounding(torch.float32)))

# Set explicitly, so that code does not depend on the defaults of the Triton version.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}

# The shortest edge of a tile that Triton accepts in a tensor-core product.
MIN_TILE = 16

_TRITON_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@functools.lru_cache(maxsize=64)
def _gpu_target(index: int) -> Target:
    with torch.cuda.device(index):
        kind = triton.runtime.driver.active.get_current_target()
    limits = triton.runtime.driver.active.utils.get_device_properties(index)
    shared_memory, multiprocessors = limits["max_shared_mem"], limits["multiprocessor_count"]
    return Target(kind.backend, kind.arch, kind.warp_size, shared_memory, multiprocessors)


def target_of(device: torch.device) -> Target:
    """The limits of ``device``; those of sm_90 on a CPU, in the interpreter."""
    if device.type == "cpu":
        return TARGETS["sm_90"]
    return _gpu_target(torch.cuda.current_device() if device.index is None else device.index)


def triton_type(name: str, dtype: torch.dtype) -> tl.dtype:
    """The Triton type of a torch dtype.

    Raises:
        TypeError: The dtype is not float16, bfloat16 or float32.
    """
    if dtype not in _TRITON_TYPES:
        raise TypeError(
            f"{name}: the Triton path takes float16, bfloat16 or float32, got {dtype}; "
            "pass backend='eager' for float64"
        )
    return _TRITON_TYPES[dtype]


def dot_type(*dtypes: torch.dtype) -> torch.dtype:
    """The type that operands are rounded to after centring in float32: the one that all share, or float32."""
    return dtypes[0] if len(set(dtypes)) == 1 else torch.float32


def dot_precision() -> str:
    """Precision of float32 products: "ieee", or "tf32" where torch's float32 matmul precision allows it."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def product_precision(target: Target, *dtypes: torch.dtype) -> str:
    """Precision of the products of features of these types.

    float32: "tf32" where torch's float32 matmul precision allows it, else three tf32 products of two terms each
    ("tf32x3"), or "ieee" where there are none: on AMD GPUs, and on NVIDIA GPUs before sm_80. Products of 16-bit numbers
    are exact: "ieee" for every setting, so that a kernel is compiled once.
    """
    if torch.float32 not in dtypes:
        return "ieee"
    precision = dot_precision()
    has_terms = target.backend == "cuda" and int(target.arch) >= 80
    return "tf32x3" if precision == "ieee" and has_terms else precision


def kernel_dot_type(dtype: torch.dtype) -> tl.dtype:
    """``dtype`` for a kernel's dot. The interpreter multiplies bfloat16 as bit patterns, so it gets float32."""
    return tl.float32 if INTERPRETED else _TRITON_TYPES[dtype]


RAW_OPERANDS = tl.constexpr(not INTERPRETED)
"""True if 16-bit tiles can be multiplied; the interpreter takes bfloat16 for bit patterns."""


@triton.jit
def round_to_tf32(x):  # type: ignore[no-untyped-def]
    """float32 rounded to the 10 bits of mantissa that tf32 has, ties away from 0; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), x)


@triton.jit
def operand(x, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Convert float32 to the type of a dot's operands.

    Tensor cores truncate float32 to tf32; rounding first halves the error and removes its bias. The interpreter
    multiplies in float32, so that no mistake hides behind a rounding of 1e-3.
    """
    if RAW_OPERANDS and PRECISION == "tf32" and DOT_TYPE == tl.float32:
        x = round_to_tf32(x)
    return x.to(DOT_TYPE)


@triton.jit
def round_to(x, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 rounded to a type of 16 bits, to the nearest, ties to even.

    The interpreter would truncate to bfloat16 and cannot multiply it: there the result is float32 that holds the
    rounded number.
    """
    if RAW_OPERANDS:
        rounded = x.to(TYPE)
    elif TYPE == tl.float16:
        rounded = x.to(tl.float16).to(tl.float32)
    else:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        rounded = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return rounded


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least ``size``, and at least 1."""
    return 1 << max(0, size - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """The quotient rounded up."""
    return -(-a // b)


@contextlib.contextmanager
def launch_guard(tensor: Tensor) -> Iterator[None]:
    """Launch on ``tensor``'s GPU, whichever is current."""
    if tensor.device.type == "cuda":
        with torch.cuda.device_of(tensor):
            yield
    else:
        yield


def small_shared_memory(target: Target) -> bool:
    """True if tiles have to be halved: on AMD GPUs, and on NVIDIA GPUs other than data-centre ones."""
    return target.shared_memory < TARGETS["sm_80"].shared_memory - 4096


ConfigT = TypeVar("ConfigT", bound=Hashable)
NamedConfigT = TypeVar("NamedConfigT", bound=Any)
_tuned: dict[Hashable, Any] = {}


def neighbours(config: NamedConfigT, edge: str) -> list[NamedConfigT]:
    """The configuration and its neighbours, which FSD_AUTOTUNE=1 times.

    Half, the same and twice the tile size called ``edge``, with other numbers of warps and stages. Everything that
    decides which program adds what stays.
    """
    configs = [config]
    chosen = getattr(config, edge)
    for size in (chosen // 2, chosen, chosen * 2):
        for num_warps in (4, 8):
            for num_stages in (2, 3, 4):
                changed = {edge: size, "num_warps": num_warps, "num_stages": num_stages}
                other = config._replace(**changed)
                if size >= MIN_TILE and other != config:
                    configs.append(other)
    return configs


def pick(
    key: Hashable,
    config: ConfigT,
    alternatives: Callable[[], Sequence[ConfigT]],
    run: Callable[[ConfigT], object],
) -> ConfigT:
    """Choose ``config``, or the fastest of ``alternatives()`` with ``FSD_AUTOTUNE=1``.

    Args:
        key: Names kernel, shape and dtype. A choice is made once per key and process.
        config: The heuristic's choice.
        alternatives: Makes the list of configurations that are timed; called only when tuning.
        run: Launches the kernel with a configuration; timed only when tuning.
    """
    if INTERPRETED or os.environ.get("FSD_AUTOTUNE") != "1":
        return config
    if key not in _tuned:
        configs = alternatives()
        times = [_milliseconds(functools.partial(run, each)) for each in configs]
        _tuned[key] = configs[times.index(min(times))]
    chosen: ConfigT = _tuned[key]
    return chosen


def _milliseconds(call: Callable[[], object]) -> float:
    """Median time of ``call``; infinite where the GPU lacks the resources for it."""
    try:
        return float(triton.testing.do_bench(call, return_mode="median"))
    except triton.runtime.errors.OutOfResources:
        return float("inf")
