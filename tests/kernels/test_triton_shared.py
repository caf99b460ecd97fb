"""What the Triton kernels share: rounding of operands, precision of products, tuning, and heuristics for GPUs."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fsd_kernels import _triton as shared
from fsd_kernels.gram import plan as gram_plan
from fsd_kernels.intra_cka import triton as intra_kernels
from fsd_kernels.kmeans import triton as kmeans_kernels
from tests.interpreted import DEVICE, on_triton, round_like


@triton.jit
def round_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < size)
    tl.store(y_ptr + index, shared.round_to_tf32(x), mask=index < size)


@on_triton
def test_operands_are_rounded_to_tf32() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-500, 500)
    special = torch.tensor([0.0, -0.0, 1.0, -(1.0 + 2.0**-11), float("inf"), -float("inf"), float("nan")])
    x = torch.cat([x.clamp(-1e38, 1e38), special]).to(DEVICE)
    rounded = torch.empty_like(x)
    round_kernel[(1,)](x, rounded, x.numel(), BLOCK=1024)
    expected = torch.from_numpy(round_like(x.cpu().numpy(), 10)).to(DEVICE)
    # Halves go away from 0, in the emulation to the even neighbour.
    expected[-4] = -(1.0 + 2.0**-10)
    assert torch.equal(rounded[:-1], expected[:-1])
    assert rounded[-1].isnan()


def test_tuning_takes_the_fastest_and_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"a": 3.0, "b": 1.0, "c": float("inf")}
    calls: list[str] = []
    asked: list[str] = []

    def alternatives() -> list[str]:
        asked.append("asked")
        return list(times)

    def choose() -> str:
        return shared.pick("key", "a", alternatives, calls.append)

    monkeypatch.setattr(shared, "INTERPRETED", False)
    monkeypatch.setattr(shared, "_tuned", {})
    monkeypatch.setattr(shared, "_milliseconds", lambda call: times[call.args[0]])
    assert choose() == "a"
    assert asked == []
    monkeypatch.setenv("FSD_AUTOTUNE", "1")
    assert choose() == "b"
    times["b"] = 9.0
    assert choose() == "b"
    assert asked == ["asked"]
    assert calls == []


def test_precision_follows_torch() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert shared.dot_precision() == "ieee"
        torch.set_float32_matmul_precision("high")
        assert shared.dot_precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_heuristics_of_the_losses_fill_the_gpu_and_fit_it(name: str) -> None:
    target = shared.TARGETS[name]
    for dtype in (torch.float32, torch.bfloat16):
        forward = intra_kernels.forward_config(128, dtype, target)
        # The stages of a tile of all rows.
        stages = forward.num_stages * 128 * forward.block_d * dtype.itemsize
        assert forward.block_s == 128
        assert stages <= target.shared_memory
        few, many = (intra_kernels.backward_config(128, 768, items, dtype, target) for items in (2, 1000))
        assert few.parts == 4
        assert many.parts == 1
    wide = gram_plan.forward_config(134, 98304, torch.float32, "tf32", target)
    assert wide.tiles
    assert 64 <= wide.parts <= 2 * target.multiprocessors
    # Both tiles of 128 rows and their Gram would not fit beside the others.
    many = [
        gram_plan.forward_config(334, 98304, torch.float32, "tf32", target, skipped) for skipped in (0, 301)
    ]
    for config in many:
        assert not config.tiles
        assert 64 <= 6 * config.parts <= target.multiprocessors


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_heuristics_of_k_means_fill_the_gpu_and_fit_it(name: str, precision: str) -> None:
    target = shared.TARGETS[name]
    for rows, clusters, width in (
        (4096, 100, 98304),
        (4096, 300, 98304),
        (32, 100, 98304),
        (393_000, 300, 1024),
    ):
        config = kmeans_kernels.assign_config(rows, clusters, width, torch.float32, precision, target)
        programs = shared.cdiv(rows, config.block_n) * config.parts
        assert 2 * programs >= target.multiprocessors
        assert config.parts == 1 or programs <= 2 * target.multiprocessors
        # Accumulators leave a quarter of 65,536 registers to everything else.
        assert config.block_n * sum(config.blocks) <= 49_152
    few = kmeans_kernels.assign_config(32, 300, 98304, torch.float32, precision, target)
    assert few.block_n == 32  # all rows: the centroids are read once
    many = kmeans_kernels.assign_config(393_000, 300, 1024, torch.float32, precision, target)
    assert many.parts == 1  # nothing of the size of N x K in memory
    update = kmeans_kernels.update_config(100, 98304, torch.float32, target)
    assert 100 * shared.cdiv(98304, update.block_f) >= target.multiprocessors
