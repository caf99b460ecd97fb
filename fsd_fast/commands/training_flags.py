"""What ``teacher`` and ``distill`` make of every flag of transformers' ``TrainingArguments``.

A flag is in ``HONOURED``, with the place where it takes effect, or in ``REFUSED``, with the reason, which is the error
message. So no flag is accepted and then ignored. A flag in neither table, of a transformers release that this one does
not know, is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fsd_fast.commands.values import Range


class Refusal(NamedTuple):
    """Why a flag is refused, and the one value that is accepted because it says what happens anyway."""

    reason: str
    accepted: Any = None


_TEST = "test rows are for 'evaluate' and 'predict'"
_UPLOAD = "nothing is uploaded; upload the run's folder with the Hub's own tools"
_FSDP = "FSDP is not supported; shard with --deepspeed"
_LIGER = "Liger's kernels are for language models"
_HALF = "the evaluation after training would round the weights that are exported"
_TENSORS = "metrics are computed from the logits and labels of all samples, as tensors"

REFUSED: dict[str, Refusal] = {
    "average_tokens_across_devices": Refusal("the loss is a mean over samples, not over tokens", True),
    "bf16_full_eval": Refusal(_HALF, False),
    "fp16_full_eval": Refusal(_HALF, False),
    "use_liger_kernel": Refusal(_LIGER, False),
    "liger_kernel_config": Refusal(_LIGER),
    "use_cache": Refusal("the cache of text generation has no use in a classifier", False),
    "prediction_loss_only": Refusal(_TENSORS, False),
    "eval_do_concat_batches": Refusal(_TENSORS, True),
    "eval_use_gather_object": Refusal(_TENSORS, False),
    "include_for_metrics": Refusal(_TENSORS, []),
    "batch_eval_metrics": Refusal(_TENSORS, False),
    "push_to_hub": Refusal(_UPLOAD, False),
    "hub_token": Refusal(f"{_UPLOAD}; a token does not belong into a run's files"),
    "hub_private_repo": Refusal(_UPLOAD),
    "hub_model_id": Refusal(_UPLOAD),
    "hub_strategy": Refusal(_UPLOAD, "every_save"),
    "hub_always_push": Refusal(_UPLOAD, False),
    "hub_revision": Refusal(_UPLOAD),
    "parallelism_config": Refusal("a Python object cannot be given as text; shard with --deepspeed"),
    "fsdp": Refusal(_FSDP),
    "fsdp_config": Refusal(_FSDP),
    "label_names": Refusal("the data's labels are always called 'labels'"),
    "length_column_name": Refusal("the data's lengths are always in the column 'length'", "length"),
    "do_train": Refusal("this command trains; 'evaluate' scores without training", True),
    "do_eval": Refusal("this command evaluates when training ends; --max_eval_samples shortens that", True),
    "do_predict": Refusal("the labelled splits alone are read; test splits have no labels", False),
    "enable_jit_checkpoint": Refusal("SIGTERM saves a checkpoint in any case", False),
    "local_rank": Refusal("the launcher gives each process its rank", -1),
}
"""Refused for every command that trains."""

REFUSED_BY: dict[str, dict[str, Refusal]] = {
    "teacher": {"test_file": Refusal(_TEST)},
    "distill": {
        "test_file": Refusal(_TEST),
        "label_smoothing_factor": Refusal("the teacher's logits are the soft labels", 0.0),
        "auto_find_batch_size": Refusal("a smaller batch is another loss: L_L compares its samples", False),
    },
    "memory": {
        "max_eval_samples": Refusal("a memory is made of the training set alone"),
        "test_file": Refusal(_TEST),
    },
    "cache": {
        "max_eval_samples": Refusal("a cache is made of the training set alone"),
        "test_file": Refusal(_TEST),
    },
    "evaluate": {"max_train_samples": Refusal("the evaluation splits alone are scored")},
    "predict": {
        **dict.fromkeys(("max_train_samples", "subset_seed"), Refusal("test sets alone are read")),
        **dict.fromkeys(("train_file", "validation_file"), Refusal("test sets alone are read")),
        "heldout_samples": Refusal("test sets alone are read", 0),
        "max_eval_samples": Refusal("a test set is predicted as a whole"),
    },
}
"""Refused for one command beside those of ``REFUSED``."""

_OPTIMIZER = "Trainer.create_optimizer"
_SCHEDULER = "Trainer.create_scheduler"
_LOOP = "Trainer's training loop"
_ACCELERATE = "TrainingArguments hands it to Accelerator"
_MODEL = "Trainer applies it to the model when training starts"
_LOG = "Trainer's logging"
_REPORT = "the reporter that --report_to names"
_EVALUATE = "Trainer's evaluation loop and its schedule"
_SAVE = "Trainer's checkpoints and their schedule"
_LOADER = "Trainer.get_train_dataloader and get_eval_dataloader"
_DDP = "Trainer hands it to DistributedDataParallel"

HONOURED: dict[str, str] = {
    "output_dir": "checkpoints and exported model",
    "resume_from_checkpoint": "training.checkpoints.find_checkpoint",
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _LOADER),
    **dict.fromkeys(("num_train_epochs", "max_steps", "gradient_accumulation_steps", "max_grad_norm"), _LOOP),
    **dict.fromkeys(("torch_empty_cache_steps", "auto_find_batch_size", "ignore_data_skip"), _LOOP),
    **dict.fromkeys(("restore_callback_states_from_checkpoint", "debug", "skip_memory_metrics"), _LOOP),
    "label_smoothing_factor": "Trainer.compute_loss, for teacher and classes",
    **dict.fromkeys(("learning_rate", "optim", "optim_args", "optim_target_modules"), _OPTIMIZER),
    **dict.fromkeys(("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"), _OPTIMIZER),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"), _SCHEDULER),
    **dict.fromkeys(("bf16", "fp16", "accelerator_config", "deepspeed"), _ACCELERATE),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _ACCELERATE),
    **dict.fromkeys(("tf32", "use_cpu"), "TrainingArguments sets it for the process"),
    **dict.fromkeys(("seed", "full_determinism"), "the command and Trainer seed the process"),
    **dict.fromkeys(("activation_checkpointing", "activation_checkpointing_kwargs"), _MODEL),
    **dict.fromkeys(("gradient_checkpointing", "gradient_checkpointing_kwargs"), _MODEL),
    "neftune_noise_alpha": _MODEL,
    **dict.fromkeys(("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node"), _LOG),
    **dict.fromkeys(("logging_nan_inf_filter", "include_num_input_tokens_seen", "disable_tqdm"), _LOG),
    **dict.fromkeys(("log_level", "log_level_replica"), _LOG),
    **dict.fromkeys(("report_to", "run_name"), _REPORT),
    **dict.fromkeys(("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), _REPORT),
    **dict.fromkeys(("eval_strategy", "eval_steps", "eval_delay", "eval_on_start"), _EVALUATE),
    "eval_accumulation_steps": _EVALUATE,
    **dict.fromkeys(("save_strategy", "save_steps", "save_total_limit", "save_only_model"), _SAVE),
    "save_on_each_node": _SAVE,
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _SAVE),
    **dict.fromkeys(("data_seed", "dataloader_drop_last", "dataloader_num_workers"), _LOADER),
    **dict.fromkeys(("dataloader_pin_memory", "dataloader_persistent_workers"), _LOADER),
    **dict.fromkeys(("dataloader_prefetch_factor", "dataloader_multiprocessing_context"), _LOADER),
    **dict.fromkeys(("dataloader_in_order", "remove_unused_columns", "train_sampling_strategy"), _LOADER),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"), _DDP),
    **dict.fromkeys(("ddp_static_graph", "ddp_backend", "ddp_timeout"), _DDP),
}
"""Name -> where the flag takes effect."""

_COUNT = Range(minimum=1)
_POSITIVE = Range(above=0)
_SEED = Range(minimum=0, maximum=2**32 - 1)
_NOT_NEGATIVE = Range(minimum=0)

RANGES: dict[str, Range] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "save_total_limit"), _COUNT),
    **dict.fromkeys(("torch_empty_cache_steps", "dataloader_prefetch_factor"), _COUNT),
    "ddp_bucket_cap_mb": _COUNT,
    "ddp_timeout": Range(minimum=1, maximum=10**8),
    "max_steps": Range(minimum=1, also=(-1,)),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps", "save_steps"), _POSITIVE),
    **dict.fromkeys(("warmup_steps", "max_grad_norm", "eval_delay"), _NOT_NEGATIVE),
    **dict.fromkeys(("dataloader_num_workers", "neftune_noise_alpha"), _NOT_NEGATIVE),
    "learning_rate": Range(minimum=0, maximum=1000),
    "weight_decay": Range(minimum=0, maximum=1000),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), Range(minimum=0, below=1)),
    "adam_epsilon": Range(minimum=0, maximum=1),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
}
"""Numbers that the flags of ``TrainingArguments`` take."""

CHOICES: dict[str, tuple[str, ...]] = {
    "debug": ("", "underflow_overflow"),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
}
"""Texts that flags of ``TrainingArguments`` take, where neither its types nor its metadata list them."""


def refusal_of(name: str, command: str) -> Refusal | None:
    """Return why a command refuses a flag of ``TrainingArguments``; None where it honours it."""
    refusal = REFUSED_BY.get(command, {}).get(name) or REFUSED.get(name)
    if refusal is None and name not in HONOURED:
        return Refusal("this release of fsd_fast does not know what the installed transformers makes of it")
    return refusal
