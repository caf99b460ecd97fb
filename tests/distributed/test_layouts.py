"""The same losses over 50 steps, however a batch of 16 samples is spread over processes and stages of ZeRO.

docs/distributed.md has the table of what is exact and what is not; ``make test-distributed`` runs this.
"""

import json
import shutil

import pytest

from fsd_fast.commands import run
from fsd_fast.losses import METHODS
from tests.launch import remove_build_locks, run_deepspeed, run_torchrun
from tests.tiny import ROOT, history, save_backbone, tiny, write_rte

__all__ = ["tiny"]

pytestmark = [
    pytest.mark.launcher,
    pytest.mark.slow,
    pytest.mark.layouts,
    pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed builds its CPU communication with g++"),
]
STEPS, BATCH = 50, 16
TOLERANCE = 2e-4
COMPARES_SAMPLES = ("fsd_l", "fsd_il", "fsd_ilg")
"""Methods whose loss of a batch is that of its parts only where the parts are joined."""
PER_PROCESS = ("rkd",)
"""Methods whose processes are never joined."""


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    """48 samples: three steps an epoch; and a model without dropout, whose masks depend on how a batch is cut."""
    folder = tmp_path_factory.mktemp("data")
    return write_rte(folder / "RTE", train=48), save_backbone(folder / "steady", dropout=0.0), folder


def runs(tiny, data, folder, methods, processes, accumulated, *more):
    """[command, flags] for each method."""
    rte, steady, _ = data
    listed = []
    for method in methods:
        flags = tiny.distillation(
            folder / method, method, steps=STEPS, batch=BATCH // processes // accumulated
        )
        flags += ["--data_dir", str(rte), "--model_name_or_path", str(steady), "--learning_rate", "2e-4"]
        flags += ["--gradient_accumulation_steps", str(accumulated), "--train_sampling_strategy", "random"]
        if method == "minilm":
            flags += ["--minilm_relation_heads", "4"]
        if method.startswith("fsd"):
            flags += ["--gather_features", "true"]
        if method in ("fsd_g", "fsd_ilg"):
            flags += ["--student_memory_init", "normal"]
        listed.append(["distill", [*flags, *more]])
    return listed


def losses(folder):
    return [entry["loss"] for entry in history(folder) if "loss" in entry]


@pytest.fixture(scope="module")
def alone(tiny, data, tmp_path_factory):
    """Losses of one process, by method, with the whole batch and with four parts of it."""
    found = {}
    for accumulated in (1, 4):
        folder = tmp_path_factory.mktemp("alone")
        for command, flags in runs(tiny, data, folder, METHODS, 1, accumulated):
            run(command, flags)
        found[accumulated] = {method: losses(folder / method) for method in METHODS}
    return found


def config(tmp_path, stage, offload):
    """A configuration like those at the root, for a stage of ZeRO."""
    content = json.loads((ROOT / ("ds_config_zero3.json" if stage == 3 else "ds_config.json")).read_text())
    content["zero_optimization"]["stage"] = stage
    if offload:
        content["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        # Trainer's optimizer, which leaves the student memory out of weight decay, in place of DeepSpeed's own.
        content["zero_force_ds_cpu_optimizer"] = False
    (tmp_path / "ds_config.json").write_text(json.dumps(content))
    return ["--deepspeed", str(tmp_path / "ds_config.json")]


EVERY, SOME = tuple(METHODS), ("vkd", "fsd_ilg", "rkd")
# rkd needs three samples in each process.
NOT_RKD, SOME_NOT_RKD = tuple(name for name in METHODS if name != "rkd"), ("vkd", "fsd_ilg")
LAYOUTS = [  # stage of ZeRO, offload, processes, accumulated, methods
    *((None, False, processes, 1, EVERY) for processes in (2, 4)),
    *((None, False, processes, 4, NOT_RKD) for processes in (2, 4)),
    *((stage, False, 2, 1, EVERY) for stage in (0, 1, 2, 3)),
    *((stage, True, 2, 1, SOME) for stage in (1, 2, 3)),
    (2, False, 2, 4, SOME_NOT_RKD),
    (3, False, 2, 4, SOME_NOT_RKD),
    (3, False, 1, 1, SOME),
    (3, False, 4, 1, SOME),
]


def name_of(layout):
    stage, offload, processes, accumulated, *_ = layout
    kind = "DDP" if stage is None else f"ZeRO {stage}{' offload' if offload else ''}"
    return f"{kind}, {processes} processes, {accumulated} accumulated"


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_the_losses_are_those_of_one_process(tiny, data, alone, tmp_path, layout):
    stage, offload, processes, accumulated, methods = layout
    more = [] if stage is None else config(tmp_path, stage, offload)
    listed = runs(tiny, data, tmp_path, methods, processes, accumulated, *more)
    (tmp_path / "runs.json").write_text(json.dumps(listed))
    script = "tests/distributed/several_runs.py"
    if stage is None:
        run_torchrun(processes, [tmp_path / "runs.json"], script=script)
    else:
        remove_build_locks()
        run_deepspeed(processes, [tmp_path / "runs.json"], script=script)
    wrong = {}
    for method in methods:
        found, expected = losses(tmp_path / method), alone[accumulated][method]
        assert len(found) == len(expected) == STEPS
        worst = max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True))
        print(f"{name_of(layout)}: {method} {worst:.1e}")
        exact = processes == 1 or method not in PER_PROCESS
        if (worst < TOLERANCE) != exact:
            wrong[method] = worst
    assert not wrong


@pytest.mark.parametrize("method", METHODS)
def test_accumulated_parts_are_the_batch_where_no_samples_are_compared(alone, method):
    whole, parts = alone[1][method], alone[4][method]
    worst = max(abs(one - other) / abs(one) for one, other in zip(whole, parts, strict=True))
    assert (worst < TOLERANCE) == (method not in (*COMPARES_SAMPLES, *PER_PROCESS))
