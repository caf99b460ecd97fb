"""Packaging of two import packages: ``fsd_kernels`` (from kernels/) and ``fsd_fast``."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="fsd_fast",
    version="0.1.0",
    description="Feature structure distillation with Centered Kernel Alignment, fused and memory-lean",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # The folder kernels/ holds no __init__.py: a top-level package called "kernels" would shadow the
    # one of that name that transformers imports.
    package_dir={"fsd_fast": "fsd_fast", "fsd_kernels": "kernels/fsd_kernels"},
    packages=find_packages(include=["fsd_fast", "fsd_fast.*"]) + find_packages("kernels"),
    package_data={"fsd_fast": ["py.typed"], "fsd_kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.9",
        "triton>=3.6; sys_platform == 'linux'",
        "transformers>=5.10",
        "deepspeed>=0.18",
        "accelerate>=1.10",
        "datasets>=4.0",
        "numpy>=2",
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "matplotlib>=3.9",
        "tqdm>=4.66",
    ],
    extras_require={
        "demo": ["tensorboard>=2.18"],
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
            "tensorboard>=2.18",
            "types-tqdm>=4.66",
        ],
    },
    entry_points={"console_scripts": ["fsd-fast=fsd_fast.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
