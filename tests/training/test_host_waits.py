"""A training step never waits for the device: nothing of ours reads a tensor of the model's on the host.

``item``, ``tolist``, ``cpu``, ``numpy``, ``bool``, ``int`` and ``float`` of a tensor on a GPU make the host wait for
all that was queued. On a CPU they cost nothing, but it is the same code that runs, so here each call between two log
entries is recorded with the line that made it. What may read tensors is listed with the reason. What transformers reads
inside of the models' forward passes is its own.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fsd_fast.commands import distill as command
from fsd_fast.commands import run
from fsd_fast.losses import METHODS
from fsd_fast.training.trainer import FSDTrainer
from tests.tiny import ROOT, Tiny, tiny

__all__ = ["tiny"]

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")
ALLOWED = {
    "fsd_fast/cache/teacher_cache.py": "reads its own index, which is in the host's memory",
    "fsd_fast/cache/shards.py": "compares checksums of mapped files",
    "fsd_fast/losses/logits.py": "looks at the labels' range on a CPU alone",
    "fsd_fast/training/finite.py": "looks at each loss on a CPU, on a GPU only before anything is logged",
    "kernels/fsd_kernels/_checks.py": "looks at the values of a mask on a CPU alone",
    "kernels/fsd_kernels/gram/eager.py": "the CPU's own implementation chooses by what it finds",
    "kernels/fsd_kernels/structure/eager.py": "the CPU's own implementation chooses by what it finds",
    "kernels/fsd_kernels/intra_cka/eager.py": "the CPU's own implementation chooses by what it finds",
}


def caller() -> str | None:
    """The line that made a call, as "file:line", torch's own lines left out; None if it is a library's."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT / "fsd_fast") or path.is_relative_to(ROOT / "kernels"):
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
        if not path.is_relative_to(Path(torch.__file__).parent):
            return None
    return None


@contextmanager
def recorded_reads(found: list[str]) -> Iterator[None]:
    """Record who reads a tensor on the host."""

    def recording(name: str) -> Any:
        method = getattr(Tensor, name)

        def read(self: Tensor, *arguments: Any, **keywords: Any) -> Any:
            found.append(f"{name} by {caller()}")
            return method(self, *arguments, **keywords)

        return read

    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(Tensor, name, recording(name))
        yield


def reads_of_a_run(flags: list[str]) -> list[str]:
    """What reads tensors in the second and third step of a run, from the batch to the loss's gradient."""
    found: list[str] = []

    class Watched(FSDTrainer):
        def training_step(self, *arguments: Any) -> Tensor:
            if self.state.global_step == 0:  # what is computed once and kept
                return super().training_step(*arguments)
            with recorded_reads(found):
                return super().training_step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "FSDTrainer", Watched)
        run("distill", flags)
    return found


@pytest.mark.parametrize("method", [*METHODS])
def test_no_step_reads_a_tensor_on_the_host(tiny: Tiny, tmp_path: Path, method: str) -> None:
    flags = [*tiny.distillation(tmp_path / "run", method), "--logging_steps", "100", "--fidelity", "false"]
    flags += ["--minilm_relation_heads", "4"] if method == "minilm" else []
    check(reads_of_a_run(flags))


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_no_cached_step_reads_a_tensor_on_the_host(tiny: Tiny, tmp_path: Path, update: str) -> None:
    flags = [*tiny.distillation(tmp_path / "run"), "--student_memory_update", update]
    flags += ["--logging_steps", "100", "--fidelity", "false", "--teacher_cache_dir", str(tmp_path / "cache")]
    run("distill", flags)
    found = reads_of_a_run([*flags, "--overwrite_output_dir", "true"])
    assert any("teacher_cache.py" in each for each in found), "the cache is read"
    check(found)


def check(found: list[str]) -> None:
    ours = {each for each in found if not each.endswith(" by None")}
    assert sorted(each for each in ours if each.partition(" by ")[2].rpartition(":")[0] not in ALLOWED) == []


def test_the_test_sees_a_read() -> None:
    found: list[str] = []
    with recorded_reads(found):
        float(torch.ones(()))
        torch.ones(2).tolist()
        bool(torch.ones(()) > 0)
    assert [each.partition(" ")[0] for each in found] == ["__float__", "tolist", "__bool__"]
