"""Half precision and accumulation: which numbers they change, and by how much."""

import pytest
import torch

from fsd_fast.commands import run
from tests.tiny import history, losses, save_backbone, tiny

__all__ = ["tiny"]


def curve(folder, name="loss", window=20):
    """The means of a logged figure over windows of steps."""
    values = [entry[name] for entry in history(folder) if name in entry]
    return [sum(values[at : at + window]) / window for at in range(0, len(values), window)]


@pytest.mark.parametrize("method", ["vkd", "fsd_ilg"])
def test_bfloat16_follows_the_curve_of_float32(tiny, tmp_path, method):
    for name, flags in (("float32", []), ("bfloat16", ["--bf16", "true"])):
        start = tiny.distillation(tmp_path / name, method, steps=200)
        run("distill", [*start, *flags, "--learning_rate", "5e-4", "--save_strategy", "no"])
    full, half = curve(tmp_path / "float32"), curve(tmp_path / "bfloat16")
    # Both fall; rounding moves them by far less.
    assert full[-1] < 0.9 * full[0]
    for step, (exact, rounded) in enumerate(zip(full, half, strict=True)):
        assert rounded == pytest.approx(exact, rel=0.05), f"window {step}"
    assert losses(tmp_path / "float32") != losses(tmp_path / "bfloat16"), "bf16 changed nothing"


def test_the_losses_are_float32_under_bfloat16(tiny, tmp_path, monkeypatch):
    from fsd_fast.losses import FeatureStructureLoss

    seen = []
    forward = FeatureStructureLoss.forward

    def watched(self, *arguments, **keywords):
        output = forward(self, *arguments, **keywords)
        seen.append((output.loss.dtype, {value.dtype for value in output.components.values()}))
        return output

    monkeypatch.setattr(FeatureStructureLoss, "forward", watched)
    run("distill", [*tiny.distillation(tmp_path / "run", steps=2), "--bf16", "true"])
    assert seen == [(torch.float32, {torch.float32})] * 2


def test_accumulation_equals_the_large_batch_where_samples_are_not_compared(tiny, tmp_path):
    """VKD and L_I are means over samples. L_L and L_G's terms of the batch compare the samples of a micro-batch."""
    steps = 4
    start = ["--save_strategy", "no", "--num_train_epochs", "2", "--dataloader_drop_last", "true"]
    common = [*start, "--train_sampling_strategy", "sequential"]
    # Dropout would draw other numbers for a micro-batch.
    backbone = save_backbone(tmp_path / "backbone", dropout=0.0)
    common += ["--model_name_or_path", str(backbone)]
    found = {}
    for method in ("fsd_i", "fsd_l"):
        for name, batch, accumulated in (("large", 8, 1), ("accumulated", 4, 2)):
            flags = tiny.distillation(tmp_path / f"{method}_{name}", method, steps=steps, batch=batch)
            run("distill", [*flags, *common, "--gradient_accumulation_steps", str(accumulated)])
            found[method, name] = losses(tmp_path / f"{method}_{name}")
    assert found["fsd_i", "accumulated"] == pytest.approx(found["fsd_i", "large"], rel=1e-4)
    assert found["fsd_l", "accumulated"] != pytest.approx(found["fsd_l", "large"], rel=1e-2)
