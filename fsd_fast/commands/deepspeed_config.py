"""Checks of a DeepSpeed configuration before anything is loaded.

DeepSpeed passes over keys that it does not know, transformers compares its numbers with the flags when training starts,
and what an export needs of ZeRO 3 would show after the last step.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fsd_fast.untrusted import shorten

AUTO = "auto"
# As DeepSpeed 0.18 and 0.19 read them.
_BLOCKS = frozenset(
    """activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger
    communication_data_type compile compression_training csv_monitor curriculum_learning data_efficiency
    data_types dataloader_drop_last disable_allgather disable_python_gc dump_state elasticity flops_profiler
    fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor
    hybrid_engine log_level memory_breakdown monitor_config nebula optimizer pipeline prescale_gradients
    scheduler seq_parallel_communication_data_type sparse_attention sparse_gradients steps_per_print tensorboard
    timers torch_autocast train_batch_size train_micro_batch_size_per_gpu wall_clock_breakdown wandb
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization""".split()
)
_REFUSED = {
    "amp": "apex is not supported; take the block out and use --bf16 true",
    "bfloat16": "an old name; call the block bf16",
    "zero_optimization.cpu_offload": 'deprecated; write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'deprecated; write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_params": 'deprecated; write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": 'deprecated; write "pin_memory" into "offload_optimizer"',
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "deprecated; write stage3_gather_16bit_weights_on_model_save"
    ),
    "compression_training": "its losses and masks are not those of distill; take the block out",
    "curriculum_learning": "Trainer chooses the samples; take the block out",
}
_OPTIMIZERS = ("adagrad", "adam", "adamw", "lamb", "lion", "muadam", "muadamw", "musgd", "muon")
_SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
# Key -> the flag that gives the same number.
_SHARED = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.weight_decay": "weight_decay",
    "optimizer.params.eps": "adam_epsilon",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
}


def check_config(content: Mapping[str, Any], flag: Callable[[str], Any], where: str) -> None:
    """Check the content of a DeepSpeed configuration against the flags of the run.

    Args:
        content: The JSON object.
        flag: Gives the value of a flag by its name, its default where it was not given.
        where: Names the file, for messages.

    Raises:
        ValueError: A key is unknown or deprecated, a value is not one that DeepSpeed knows or not that of its flag, or
            the student could not be exported. The message names the key and says what to write.
    """
    _check_keys(content, where)
    for key, name in _SHARED.items():
        value = _at(content, key)
        if value not in (None, AUTO) and value != flag(name):
            raise ValueError(
                f"{where}: {key}: expected {AUTO!r} or the {flag(name)!r} of --{name}, got {shorten(value)}"
            )
    _check_total(content, flag, where)
    _check_types(content, where)
    _check_zero(content, where)


def _at(content: Mapping[str, Any], key: str) -> Any:
    value: Any = content
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _check_keys(content: Mapping[str, Any], where: str) -> None:
    for key, reason in _REFUSED.items():
        if _at(content, key) is not None:
            raise ValueError(f"{where}: {key}: {reason}")
    for key in content:
        if key not in _BLOCKS:
            near = difflib.get_close_matches(key, _BLOCKS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where}: {shorten(key)}: DeepSpeed knows no such key{hint}")
    for key in ("bf16", "fp16", "optimizer", "scheduler", "zero_optimization"):
        if key in content and not isinstance(content[key], Mapping):
            raise ValueError(f"{where}: {key}: expected an object, got {shorten(content[key])}")


def _check_total(content: Mapping[str, Any], flag: Callable[[str], Any], where: str) -> None:
    """Check the batch of one step over all processes."""
    value = content.get("train_batch_size")
    processes = os.environ.get("WORLD_SIZE", "1")
    factors = (
        flag("per_device_train_batch_size"),
        flag("gradient_accumulation_steps"),
        int(processes) if processes.isdecimal() else 1,
    )
    expected = factors[0] * factors[1] * factors[2]
    if value not in (None, AUTO, expected):
        raise ValueError(
            f"{where}: train_batch_size: expected {AUTO!r} or {expected} = {factors[0]} samples "
            f"x {factors[1]} accumulated x {factors[2]} processes, got {shorten(value)}"
        )


def _check_types(content: Mapping[str, Any], where: str) -> None:
    """Check the names of the optimizer and the schedule, and that there is one dtype."""
    optimizer = _at(content, "optimizer.type")
    if "optimizer" in content and not (
        isinstance(optimizer, str)
        and (optimizer.lower() in _OPTIMIZERS or isinstance(getattr(torch.optim, optimizer, None), type))
    ):
        raise ValueError(
            f"{where}: optimizer.type: expected one of {', '.join(_OPTIMIZERS)} or of torch.optim, "
            f"got {shorten(optimizer)}; without the block Trainer's optimizer is used, see --optim"
        )
    schedule = _at(content, "scheduler.type")
    if "scheduler" in content and schedule not in _SCHEDULERS:
        raise ValueError(
            f"{where}: scheduler.type: expected one of {', '.join(_SCHEDULERS)}, got {shorten(schedule)}; without the "
            "block Trainer's schedule is used, see --lr_scheduler_type"
        )
    if _at(content, "bf16.enabled") is True and _at(content, "fp16.enabled") is True:
        raise ValueError(f"{where}: bf16.enabled, fp16.enabled: expected one of them, got both")


def _check_zero(content: Mapping[str, Any], where: str) -> None:
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"{where}: zero_optimization.stage: expected 0, 1, 2 or 3, got {shorten(stage)}")
    if stage < 3 and _at(zero, "offload_param.device") not in (None, "none"):
        raise ValueError(f"{where}: zero_optimization.offload_param: expected stage 3, got stage {stage}")
    if stage == 0 and _at(zero, "offload_optimizer.device") not in (None, "none"):
        raise ValueError(
            f"{where}: zero_optimization.offload_optimizer: expected stage 1, 2 or 3, got stage 0"
        )
    if stage == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise ValueError(
            f"{where}: zero_optimization.stage3_gather_16bit_weights_on_model_save: expected true, without which the "
            f"trained weights cannot be exported, got {shorten(zero.get('stage3_gather_16bit_weights_on_model_save'))}"
        )
    offloads = _at(zero, "offload_optimizer.device") not in (None, "none")
    if offloads and "optimizer" not in content and content.get("zero_force_ds_cpu_optimizer") is not False:
        raise ValueError(
            f"{where}: zero_force_ds_cpu_optimizer: expected false, with which Trainer's optimizer runs on the CPU, or "
            f"an optimizer block, got {shorten(content.get('zero_force_ds_cpu_optimizer'))}"
        )
