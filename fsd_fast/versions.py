"""The installed versions of the packages that this one builds on."""

from __future__ import annotations

import importlib.metadata

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "accelerate", "datasets", "numpy", "safetensors")


def installed_versions() -> dict[str, str]:
    """Return package -> version for the packages that are installed, without importing them."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
