"""DeepSpeed configurations: checked against the flags before anything is loaded; messages say what to write."""

import json

import pytest

from fsd_fast.cli import main
from fsd_fast.commands.deepspeed_config import check_config
from tests.tiny import ROOT

FLAGS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 1.0,
    "learning_rate": 2e-5,
    "weight_decay": 0.0,
    "adam_epsilon": 1e-8,
    "bf16": True,
    "fp16": False,
}
FILES = [*ROOT.glob("ds_config*.json"), *(ROOT / "docs" / "examples").glob("ds_config*.json")]
ZERO_3 = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}


def check(content):
    check_config(content, FLAGS.__getitem__, "ds.json")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_our_own_are_valid(path):
    check(json.loads(path.read_text()))


def test_numbers_that_are_those_of_the_flags_are_accepted(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    check({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2})
    check({"bf16": {"enabled": True}, "fp16": {"enabled": False}, "gradient_clipping": 1.0})
    check({"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}, "zero_optimization": ZERO_3})
    check({"optimizer": {"type": "SGD"}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu: expected 'auto' or the 8 of "
         "--per_device_train_batch_size, got 4"),
        ({"gradient_accumulation_steps": 1}, "expected 'auto' or the 2 of --gradient_accumulation_steps, got 1"),
        ({"train_batch_size": 8}, "expected 'auto' or 16 = 8 samples x 2 accumulated x 1 processes, got 8"),
        ({"gradient_clipping": 0.5}, "gradient_clipping: expected 'auto' or the 1.0 of --max_grad_norm, got 0.5"),
        ({"bf16": {"enabled": False}}, "bf16.enabled: expected 'auto' or the True of --bf16, got False"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: expected 'auto' or the False of --fp16, got True"),
        ({"bf16": True}, "bf16: expected an object, got True"),
        ({"amp": {"enabled": True}}, "amp: apex is not supported"),
        ({"bfloat16": {"enabled": True}}, "bfloat16: an old name; call the block bf16"),
        ({"zero_optimisation": {"stage": 2}}, "DeepSpeed knows no such key; did you mean zero_optimization?"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: expected 0, 1, 2 or 3, got 4"),
        ({"zero_optimization": {"stage": True}}, "expected 0, 1, 2 or 3, got True"),
        ({"zero_optimization": {"stage": 3}}, "stage3_gather_16bit_weights_on_model_save: expected true"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, 'write "offload_optimizer": {"device": "cpu"}'),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "expected stage 3, got stage 2"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "expected stage 1, 2 or 3, got stage 0"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
         "zero_force_ds_cpu_optimizer: expected false"),
        ({"optimizer": {"type": "AdamWW"}}, "optimizer.type: expected one of adagrad, adam, adamw"),
        ({"optimizer": {}}, "optimizer.type: expected one of"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "optimizer.params.lr: expected 'auto' or the 2e-05"),
        ({"scheduler": {"type": "Linear"}}, "scheduler.type: expected one of LRRangeTest, OneCycle, WarmupLR"),
    ],
)  # fmt: skip
def test_every_message_says_what_to_write(content, message):
    with pytest.raises(ValueError, match=r"^ds\.json: ") as error:
        check(content)
    assert message in str(error.value)


def test_a_configuration_is_checked_before_anything_is_loaded(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    (tmp_path / "ds.json").write_text('{"zero_optimisation": {"stage": 2}}')
    flags = ["--model_name_or_path", "nothing", "--output_dir", str(tmp_path / "run")]
    assert main(["teacher", *flags, "--deepspeed", str(tmp_path / "ds.json")]) == 2
    assert (
        f"error: {tmp_path / 'ds.json'}: 'zero_optimisation': DeepSpeed knows no" in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_one_process_of_accelerate_in_place_of_several_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert main(["teacher", "--model_name_or_path", "nothing", "--output_dir", str(tmp_path / "run")]) == 2
    assert "torchrun --nproc_per_node N train_ds.py teacher ..." in capsys.readouterr().err
