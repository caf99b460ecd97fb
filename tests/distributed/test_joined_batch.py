"""--gather_features: two processes with half a batch each train as one process with the whole batch."""

import pytest
import torch
from safetensors.torch import load_file

from fsd_fast.cli import main
from fsd_fast.commands import run
from tests.launch import run_torchrun
from tests.tiny import history, save_backbone, tiny

__all__ = ["tiny"]

STEPS = 50


@pytest.fixture(scope="module")
def steady(tiny, tmp_path_factory):
    """The pre-trained model without dropout, whose masks would depend on how a batch is cut."""
    return save_backbone(tmp_path_factory.mktemp("steady"), dropout=0.0)


def flags(tiny, steady, folder, batch, *more):
    given = tiny.distillation(folder, "fsd_ilg", steps=STEPS, batch=batch)
    given += [
        "--model_name_or_path",
        str(steady),
        "--intra_reduction",
        "log_mean",
        "--layer_pairs",
        "layerwise",
    ]
    # Adam divides by gradients that are 0 but for rounding; a plain step shows what the gradients are.
    return [*given, "--optim", "sgd", "--learning_rate", "1e-2", "--gather_features", "true", *more]


@pytest.mark.launcher
def test_the_losses_and_the_weights_are_those_of_one_process(tiny, steady, tmp_path):
    run("distill", flags(tiny, steady, tmp_path / "one", 8))
    run_torchrun(2, ["distill", *flags(tiny, steady, tmp_path / "two", 4)])
    one, two = ([e for e in history(tmp_path / name) if "loss" in e] for name in ("one", "two"))
    assert len(one) == len(two) == STEPS
    for alone, together in zip(one, two, strict=True):
        names = [name for name in alone if name.startswith(("loss", "global_", "grad_norm"))]
        assert len(names) > 8
        for name in names:
            assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), (alone["step"], name)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    start = load_file(steady / "model.safetensors")
    moved = 0
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-6, msg=name)
        before = start.get(name.removeprefix("bert."))
        moved += 0 if before is None else float((value - before).abs().max() > 1e-3)
    assert moved > 10, "the weights are no longer those of the start"


def test_a_method_without_structures_is_refused(tiny, tmp_path, capsys):
    assert main(["distill", *tiny.distillation(tmp_path / "run", "vkd"), "--gather_features", "true"]) == 2
    assert "gather_features: method 'vkd' does not read it, but fsd_i, fsd_l" in capsys.readouterr().err
