"""Builds a memory of synthetic features in a process of its own and prints its figures as JSON; see ``memory``."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.load.synthetic import SyntheticFeatures
from benchmarks.resident import open_files, peak_resident_bytes, resident_bytes
from fsd_fast.memory.features import MemoryIdentity
from fsd_fast.memory.teacher_memory import TeacherMemory


def _build(samples: int, length: int, width: int, centroids: int) -> tuple[TeacherMemory, list[int], float]:
    """Build a memory as the command does; return it, the epochs of each restart, and the teacher's seconds."""
    identity = MemoryIdentity("mnli", "synthetic", "ab" * 32, 11, length, width, centroids, "include")
    features = SyntheticFeatures(identity, samples)
    with tempfile.TemporaryDirectory() as folder:
        memory = TeacherMemory.build(
            features.batches,
            identity,
            seed=0,
            progress=False,
            num_samples=samples,
            checkpoint_dir=Path(folder) / ".state",
        )
        memory.save_pretrained(folder)
        # A memory keeps the epochs of the best restart alone.
        stages = json.loads((Path(folder) / ".state" / "rank0.json").read_text(encoding="utf-8"))["stages"]
    return memory, stages["sketch_clustering"]["metadata"]["epochs"], features.seconds


def main(samples: int, length: int, width: int, centroids: int) -> None:
    """Build the memory and print what it took."""
    # Load code and buffers that do not depend on the sizes.
    _build(200, 8, 300, 20)
    before, files = resident_bytes(), open_files()
    memory, epochs, teacher = _build(samples, length, width, centroids)
    figures = {
        "samples": samples,
        "growth": peak_resident_bytes() - before,
        "seconds": memory.seconds,
        "teacher_seconds": teacher,
        "epochs": epochs,
        "files_left_open": open_files() - files,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
