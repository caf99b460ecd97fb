"""A run goes on in another layout of processes that makes the same steps: two processes for one, one for two."""

import json

import pytest

from fsd_fast.cli import main
from tests.launch import run_torchrun
from tests.tiny import losses, save_backbone, tiny

__all__ = ["tiny"]

pytestmark = pytest.mark.launcher
SAVING = ["--save_strategy", "steps", "--save_steps", "4", "--save_total_limit", "5"]


@pytest.fixture(scope="module")
def steady(tiny, tmp_path_factory):
    """The pre-trained model without dropout, whose masks would depend on how a batch is cut."""
    return save_backbone(tmp_path_factory.mktemp("steady"), dropout=0.0)


def flags(tiny, steady, folder, processes, steps, *more):
    given = tiny.distillation(folder, "fsd_ilg", steps=steps, batch=8 // processes)
    # The schedule must be that of the whole run from the beginning.
    given += [
        "--model_name_or_path",
        str(steady),
        "--gather_features",
        "true",
        "--lr_scheduler_type",
        "constant",
    ]
    return [*given, *SAVING, *more]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_the_losses_go_on_as_they_were(tiny, steady, tmp_path, before, after):
    assert main(["distill", *flags(tiny, steady, tmp_path / "whole", 1, 10)]) == 0
    folder = tmp_path / "run"
    for processes, steps, more in ((before, 4, []), (after, 10, ["--resume_from_checkpoint", "last"])):
        given = flags(tiny, steady, folder, processes, steps, *more)
        if processes == 1:
            assert main(["distill", *given]) == 0
        else:
            run_torchrun(processes, ["distill", *given])
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    (resumed,) = json.loads((folder / "fsd_arguments.json").read_text())["facts"]["resumed"]
    assert resumed["changed"]["world_size"] == [before, after]


def test_another_size_of_the_batch_is_refused(tiny, steady, tmp_path, capsys):
    assert main(["distill", *flags(tiny, steady, tmp_path / "run", 1, 4)]) == 0
    more = ["--resume_from_checkpoint", "last", "--gradient_accumulation_steps", "2"]
    assert main(["distill", *flags(tiny, steady, tmp_path / "run", 1, 6, *more)]) == 2
    assert "gradient_accumulation_steps was 1, now 2" in capsys.readouterr().err
