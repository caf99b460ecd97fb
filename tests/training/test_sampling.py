"""The order of samples under ``group_by_length``: by seed and epoch, whatever else draws random numbers."""

import pytest
import torch

from fsd_fast.commands import run
from fsd_fast.training.sampling import SeededLengthGroups
from tests.tiny import history, tiny

__all__ = ["tiny"]

LENGTHS = [5, 9, 2, 7, 7, 3, 8, 1, 6, 4, 9, 2] * 4


def order(epoch, seed=0):
    sampler = SeededLengthGroups(3, LENGTHS, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_seed_and_epoch_decide_the_order():
    first = order(0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert order(0) == first
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert sorted(first) == list(range(len(LENGTHS)))
    assert order(1) != first
    assert order(0, seed=1) != first
    spread = [max(LENGTHS[place] for place in batch) - min(LENGTHS[place] for place in batch)
              for batch in torch.tensor(first).split(3)]  # fmt: skip
    assert sum(spread) / len(spread) < 2, "samples of a batch have about one length"


@pytest.mark.parametrize("command", ["teacher", "distill"])
def test_a_run_resumed_amid_an_epoch_sees_the_same_batches(tiny, tmp_path, command):
    """Checkpoints after every step of three epochs; resumed in the second, with other evaluations than before."""

    def losses(name, *more):
        flags = tiny.distillation(tmp_path / name, "vkd", steps=9, batch=8)
        if command == "teacher":
            flags = [
                *tiny.data(),
                "--model_name_or_path",
                str(tiny.backbone),
                "--max_steps",
                "9",
                "--use_cpu",
                "true",
            ]
            flags += ["--logging_steps", "1", "--per_device_train_batch_size", "8", "--report_to", "none"]
            flags += ["--output_dir", str(tmp_path / name)]
        saving = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "20"]
        run(command, [*flags, *saving, "--train_sampling_strategy", "group_by_length", *more])
        return [entry["loss"] for entry in history(tmp_path / name) if "loss" in entry]

    whole = losses("whole", "--eval_strategy", "no")
    steps = 5
    cut = losses("cut", "--eval_strategy", "steps", "--eval_steps", "1")
    assert cut == whole, "evaluation draws no random numbers of the training"
    again = losses(
        "cut",
        "--eval_strategy",
        "no",
        "--resume_from_checkpoint",
        str(tmp_path / "cut" / f"checkpoint-{steps}"),
    )
    assert again == whole
