"""Packaging of two import packages: ``fsd_kernels`` (from kernels/) and ``fsd_fast``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# The one place of the version; importing the package would need its dependencies.
VERSION = re.search(r'^__version__ = "(.+)"$', Path("fsd_fast/__init__.py").read_text(encoding="utf-8"), re.M)
if VERSION is None:
    raise RuntimeError('fsd_fast/__init__.py: expected a line __version__ = "..."')

EXTRAS = {
    "train": [
        "accelerate>=1.10",
        "datasets>=4.0",
        "huggingface_hub>=1.0",
        "pyyaml>=6",
        "safetensors>=0.5",
        "scikit-learn>=1.6",
        "scipy>=1.13",
        "tqdm>=4.66",
        "transformers>=5.10",
    ],
    "deepspeed": ["deepspeed>=0.18"],
    "plot": ["matplotlib>=3.9", "tensorboard>=2.18"],
    "docs": ["mkdocs>=1.6", "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
    "bench": ["pytest>=8", "pytest-benchmark>=5"],
    "dev": [
        "build>=1.2",
        "hypothesis>=6.100",
        "mypy>=1.15",
        "ninja>=1.11",
        "pytest>=8",
        "pytest-benchmark>=5",
        "pytest-xdist>=3.6",
        "ruff>=0.9",
        "types-tqdm>=4.66",
    ],
}
USERS = ("train", "deepspeed", "plot")

setup(
    name="fsd_fast",
    version=VERSION[1],
    description="Feature structure distillation with Centered Kernel Alignment, fused and memory-lean",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # The folder kernels/ holds no __init__.py: a top-level package called "kernels" would shadow the
    # one of that name that transformers imports.
    package_dir={"fsd_fast": "fsd_fast", "fsd_kernels": "kernels/fsd_kernels"},
    packages=find_packages(include=["fsd_fast", "fsd_fast.*"]) + find_packages("kernels"),
    package_data={"fsd_fast": ["py.typed"], "fsd_kernels": ["py.typed"]},
    # The kernels and the losses; commands and training need the extra "train".
    install_requires=["torch>=2.9", "triton>=3.6; sys_platform == 'linux'", "numpy>=2"],
    extras_require={**EXTRAS, "all": [each for name in USERS for each in EXTRAS[name]]},
    entry_points={"console_scripts": ["fsd-fast=fsd_fast.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Typing :: Typed",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
