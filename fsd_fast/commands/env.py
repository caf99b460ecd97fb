"""``fsd-fast env``: versions, devices and backends of this machine, for a look before a run and for bug reports."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from fsd_fast import __version__
from fsd_fast.data.builtin import cache_dir
from fsd_fast.versions import PACKAGES, installed_versions
from fsd_kernels import resolve_backend

ARGUMENTS: tuple[type, ...] = ()
_OPS = ("intra_cka", "gram", "structure", "kmeans")
_VARIABLES = (
    "FSD_BACKEND",
    "FSD_CACHE_DIR",
    "FSD_AUTOTUNE",
    "FSD_DIRECT_LAUNCH",
    "FSD_DEBUG",
    "HF_HUB_OFFLINE",
    "TRITON_INTERPRET",
)


def prepare() -> Callable[[], dict[str, float]]:
    """Return the work: print the report."""

    def work() -> dict[str, float]:
        sections = report()
        width = max(len(name) for rows in sections.values() for name in rows)
        for title, rows in sections.items():
            print(title, *(f"  {name:<{width}}  {value}" for name, value in rows.items()), sep="\n")
        return {}

    return work


def report() -> dict[str, dict[str, str]]:
    """Return section -> name -> value. No package is imported for it that the commands do not need anyway."""
    installed = installed_versions()
    versions = {"fsd_fast": __version__, "python": platform.python_version()}
    versions |= {name: installed.get(name, "not installed") for name in PACKAGES}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "versions": versions,
        "devices": _devices(),
        "backends": {op: _backend(op, device) for op in _OPS},
        "build tools": {
            "C++ compiler": _tool(os.environ.get("CXX") or "c++", "g++", "clang++"),
            "ninja": _tool("ninja"),
            "deepspeed launcher": _tool("deepspeed"),
        },
        "environment": {
            "cache folder": _without_home(str(cache_dir())),
            **{name: _without_home(os.environ[name]) for name in _VARIABLES if name in os.environ},
        },
    }


def _devices() -> dict[str, str]:
    rows = {"platform": f"{platform.system()} {platform.machine()}", "threads": str(torch.get_num_threads())}
    if not torch.cuda.is_available():
        return rows | {"GPU": "none"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows[f"GPU {index}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"capability {properties.major}.{properties.minor}"
        )
    return rows


def _backend(op: str, device: torch.device) -> str:
    """Name the backend that ``auto`` takes for an op on a device, and why."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            backend = resolve_backend(None, device, op)
        except (ValueError, RuntimeError) as error:
            return f"none: {error}"
    if caught:
        return f"{backend}: {caught[0].message}"
    if os.environ.get("FSD_BACKEND", "auto") != "auto":
        return f"{backend}: FSD_BACKEND asks for it"
    return f"{backend}: {'there is a GPU' if device.type == 'cuda' else 'there is no GPU'}"


def _tool(*names: str) -> str:
    # Console scripts of this Python's environment need not be on the PATH.
    places = [os.environ.get("PATH", ""), str(Path(sys.executable).parent)]
    for name in names:
        for place in places:
            if found := shutil.which(name, path=place):
                beside = "" if place == places[0] else ", beside this Python and not on the PATH"
                return f"{_without_home(found)}{beside}"
    return "not found"


def _without_home(path: str) -> str:
    home = os.path.expanduser("~")
    return f"~{path.removeprefix(home)}" if home != "~" and path.startswith(f"{home}{os.sep}") else path
