"""Predictions stand in the order of their samples, however training samples are ordered."""

import pytest

from fsd_fast.commands import run
from tests.tiny import tiny

__all__ = ["tiny"]


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_fidelity_does_not_depend_on_the_order_of_training(tiny, tmp_path, strategy):
    flags = tiny.distillation(tmp_path / "run", "vkd", steps=4)
    found = run("distill", [*flags, "--train_sampling_strategy", strategy])
    asked = [*tiny.data(), "--model_name_or_path", str(tmp_path / "run"), "--use_cpu", "true"]
    expected = run("evaluate", [*asked, "--teacher_model_name_or_path", str(tiny.teacher)])
    assert expected["eval_teacher_kl"] > 0
    for name in ("eval_teacher_agreement", "eval_teacher_kl", "eval_accuracy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
