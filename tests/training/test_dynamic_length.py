"""Batches padded to their own longest sample, under ``--pad_features exclude``: the same run as padded to S."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from fsd_fast.commands import _common, run
from fsd_fast.data import PadCollator
from fsd_fast.losses import METHODS, GlobalInterFeatureLoss
from tests.tiny import SEQUENCE, Tiny, history, save_backbone, tiny

__all__ = ["tiny"]


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained model without dropout, whose masks would depend on the length of a batch."""
    return Path(save_backbone(tmp_path_factory.mktemp("steady") / "backbone", dropout=0.0))


def trajectory(folder: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in entry.items() if not name.endswith(("_per_second", "padding_share"))}
        for entry in history(folder)
        if "loss" in entry
    ]


@pytest.mark.parametrize("method", [*METHODS])
def test_a_batch_padded_to_its_longest_sample_gives_the_same_run(
    tiny: Tiny, steady: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    more = ["--minilm_relation_heads", "4"] if method == "minilm" else []
    lengths: dict[str, set[int]] = {"own": set(), "full": set()}
    for name in ("own", "full"):
        collate = PadCollator.__call__

        def noted(
            self: PadCollator, samples: list[dict[str, object]], name: str = name, collate: Callable = collate
        ) -> dict[str, object]:
            batch = collate(self, samples)
            lengths[name].add(batch["input_ids"].shape[1])
            return batch

        with monkeypatch.context() as patch:
            patch.setattr(PadCollator, "__call__", noted)
            if name == "full":
                # Rounded up to a multiple of S, every batch has S positions.
                padded = functools.partial(PadCollator, pad_to_multiple_of=SEQUENCE)
                patch.setattr(_common, "PadCollator", padded)
            flags = tiny.distillation(tmp_path / name, method, steps=9, batch=3)
            flags += ["--model_name_or_path", str(steady), "--optim", "sgd", "--learning_rate", "0.01"]
            run("distill", [*flags, "--fidelity", "false", *more])
    assert lengths["full"] == {SEQUENCE}
    assert len(lengths["own"]) > 1
    assert max(lengths["own"]) < SEQUENCE
    own, full = trajectory(tmp_path / "own"), trajectory(tmp_path / "full")
    assert len(own) == 9
    for one, other in zip(own, full, strict=True):
        # The soft labels' term is tau^2 = 100 times a difference of logarithms: 100 times 6e-8 of rounding.
        assert one == pytest.approx(other, rel=2e-5, abs=6e-6)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "full"))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-6)


def products(positions: int, *, batch: int, centroids: int, maximum: int, width: int) -> int:
    """Multiplications of all matrix products in forward and backward of L_G, for so many of ``maximum`` positions."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(batch, positions, width, generator=generator, requires_grad=True)
    teacher = torch.randn(batch, positions, width, generator=generator)
    memory = torch.randn(centroids, maximum * width, generator=generator, requires_grad=True)
    fixed = torch.randn(centroids, maximum * width, generator=generator)
    loss = GlobalInterFeatureLoss(pad_features="exclude", backend="eager")
    mask = torch.ones(batch, positions, dtype=torch.bool)
    # The first call computes what belongs to the teacher's memory alone, and keeps it.
    loss(student, memory, teacher, fixed, mask).loss.backward()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        loss(student, memory, teacher, fixed, mask).loss.backward()
    total = 0
    for event in profiler.events():
        first = {"aten::mm": 0, "aten::addmm": 1}.get(event.name)
        if first is not None:
            (rows, inner), (_, columns) = event.input_shapes[first : first + 2]
            total += rows * inner * columns
    return total


def test_l_g_multiplies_only_the_columns_that_a_batch_has() -> None:
    batch, centroids, maximum, width = 6, 10, 64, 512
    rows, columns = batch + 2, 8192  # with the mean, in groups of four; columns of a slice
    short, middle, long = (
        products(positions, batch=batch, centroids=centroids, maximum=maximum, width=width)
        for positions in (16, 32, 64)
    )
    # Of the full width there are the memory's own Gram matrix and its gradient alone, once a step each. (A product with
    # itself takes all of a block of ten rows.)
    memory_alone = 2 * centroids**2 * maximum * width
    # For student and teacher: products of the features with themselves and with the memory; gradients of both sides.
    forward = 2 * rows * (rows + centroids)
    backward = batch * (batch + centroids) + centroids * batch
    for positions, found in ((16, short), (32, middle), (64, long)):
        assert positions * width % columns == 0
        expected = memory_alone + (forward + backward) * positions * width
        assert found == pytest.approx(expected, rel=0.02), positions
