"""Which implementation of an op runs: ``resolve_backend`` turns a request into one of three names.

=============  ==========================================================================================
request        meaning
=============  ==========================================================================================
``auto``       ``triton`` for tensors on a GPU, ``eager`` elsewhere. If Triton cannot run on a machine with a
               GPU it falls back to ``eager``, with one warning that names the reason.
``triton``     the fused kernels, or an error; there is no fallback.
``eager``      restructured torch operations: the CPU path.
``reference``  the paper's formulas in plain torch, differentiated by autograd: the oracle.
=============  ==========================================================================================

The request is the op's ``backend`` argument. If that is None or "auto", it is the environment variable
``FSD_BACKEND`` (default "auto").
"""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType

import torch

BACKENDS = ("auto", "triton", "eager", "reference")

_fallback_reasons: set[str] = set()


def _triton_problem(op: str, device: torch.device) -> str | None:
    """Say why the Triton implementation of ``op`` cannot run on ``device``; None if it can."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "tensors are on the CPU and TRITON_INTERPRET=1 is not set"
    try:
        importlib.import_module(f"fsd_kernels.{op}.triton")
    except ImportError as error:
        return f"fsd_kernels.{op}.triton cannot be imported ({error})"
    return None


# A compiled graph takes the answer as a constant, because it cannot trace an import. The attribute is all that
# torch.compiler.assume_constant_result sets, and that function would import the compiler.
_triton_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve_backend(backend: str | None, device: torch.device, op: str) -> str:
    """Turn a requested backend into "triton", "eager" or "reference".

    Args:
        backend: One of "auto", "triton", "eager", "reference", or None for "auto".
        device: The device that the op's tensors are on.
        op: The op's name, e.g. "intra_cka".

    Returns:
        "triton", "eager" or "reference".

    Raises:
        ValueError: The request, or ``FSD_BACKEND``, is not one of the four names.
        RuntimeError: "triton" was asked for and cannot run here; the message gives the reason.
    """
    source = "backend"
    request = backend or "auto"
    if request == "auto":
        source, request = "FSD_BACKEND", os.environ.get("FSD_BACKEND", "auto")
    if request not in BACKENDS:
        raise ValueError(f"{source}: {request!r} is not one of {', '.join(BACKENDS)}")
    if request in ("eager", "reference"):
        return request
    if request == "auto" and device.type == "cpu":
        return "eager"
    problem = _triton_problem(op, device)
    if problem is None:
        return "triton"
    if request == "triton":
        raise RuntimeError(f"{op}: backend 'triton' was asked for, but {problem}")
    if problem not in _fallback_reasons:
        _fallback_reasons.add(problem)
        warnings.warn(f"{op}: using backend 'eager', because {problem}", RuntimeWarning, stacklevel=3)
    return "eager"


def implementation(op: str, backend: str) -> ModuleType:
    """Return the module ``fsd_kernels.<op>.<backend>``, imported on first use."""
    return importlib.import_module(f"fsd_kernels.{op}.{backend}")
