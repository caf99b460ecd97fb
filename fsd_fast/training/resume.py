"""Whether a run may be continued with other settings than those it was started with."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fsd_fast.training.record import RECORD_FILE, Record, read_record

logger = logging.getLogger(__name__)

# How long the run is, and what is logged, saved and evaluated when. None of it changes a step that is made.
_FREE = frozenset(
    {
        "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory",
        "dataloader_prefetch_factor", "disable_tqdm", "do_eval", "eval_accumulation_steps", "eval_delay",
        "early_stopping_patience", "early_stopping_threshold", "eval_on_start", "eval_steps", "eval_strategy",
        "greater_is_better", "include_num_input_tokens_seen",
        "load_best_model_at_end", "max_eval_samples", "max_steps", "metric_for_best_model", "num_train_epochs",
        "per_device_eval_batch_size", "report_to", "run_name", "skip_memory_metrics", "teacher_cache_dir",
    }
)  # fmt: skip
_FREE_PREFIXES = ("logging_", "log_", "save_", "trackio_", "project")
# They are part of what a checkpoint holds: of the weights' shapes, the optimizer's and the schedule's state, the place
# in the data.
_FIXED = frozenset(
    {
        "adam_beta1", "adam_beta2", "adam_epsilon", "command", "data_seed", "dataloader_drop_last",
        "gradient_accumulation_steps", "heldout_samples", "label_column", "label_type",
        "learning_rate", "lr_scheduler_kwargs", "lr_scheduler_type", "max_seq_length",
        "max_train_samples", "method", "num_centroid", "num_layers", "optim", "optim_args",
        "per_device_train_batch_size", "seed", "student_layers", "subset_seed", "task_name",
        "text_columns", "train_file", "train_sampling_strategy", "warmup_steps", "weight_decay",
        "world_size",
    }
)  # fmt: skip
# Facts that a checkpoint depends on, beside the flags. Runs of earlier versions lack some of them.
_FACTS = ("layer_pairs", "num_centroid", "student_layers", "teacher_fingerprint", "train_data", "world_size")


# How a batch is spread over processes and accumulated parts.
_LAYOUT = ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps")
# How DeepSpeed cuts the optimizer's state into files, by the names that ``_deepspeed_settings`` gives.
_CUT = frozenset(
    {"deepspeed", "deepspeed.zero_optimization.stage", "deepspeed.zero_optimization.sub_group_size"}
)


def check_resumed(record: Record, checkpoint: str, allowed: Iterable[str] | None) -> Record:
    """Check that a run goes on as it began, and put into its record what was changed.

    Args:
        record: Of the run that is about to go on.
        checkpoint: The checkpoint that it goes on from; the record of its beginning lies beside it.
        allowed: Further flags that may differ (``--allow_changes``).

    The layout of a batch may change where its size does not, but under DeepSpeed: 2 processes of 16 samples may go on
    as one of 32. Configurations of DeepSpeed are compared by what is in them, wherever they lie.

    Returns:
        The record with the fact ``resumed``: each resumption's checkpoint, and what differed as [before, now].

    Raises:
        ValueError: A setting differs that may not; every one is listed with both values. Or ``allowed`` names one
            that a checkpoint itself holds.
    """
    allowed = set(allowed or ())
    kept = sorted(allowed & _FIXED)
    if kept:
        raise ValueError(
            f"allow_changes: {', '.join(kept)}: the checkpoint itself holds what depends on it; start a new run instead"
        )
    path = Path(checkpoint).absolute().parent / RECORD_FILE
    if not path.is_file():
        logger.warning("%s: not found, so it cannot be checked that the run goes on as it began", path)
        return _resumed(record, [], checkpoint, {})
    before = read_record(path)
    known = [name for name in _FACTS if name in before.facts and name in record.facts]
    changed = _changes(_comparable(before, known), _comparable(record, known))
    configurations = [_deepspeed_settings(each) for each in (before, record)]
    if all(configurations):
        changed.pop("deepspeed", None)
        changed |= _changes(*configurations)
    layout = _LAYOUT if _same_batch(before, record) else ()
    refused = {
        name: values
        for name, values in changed.items()
        if name not in layout
        and name not in _FREE
        and not (_flag(name) in allowed and name not in _CUT)
        and not name.startswith(_FREE_PREFIXES)
    }
    if refused:
        listed = _listed(refused, refused)
        names = " ".join(sorted({_flag(name) for name in refused if name not in _FIXED | _CUT}))
        advice = f"; --allow_changes {names} allows what a checkpoint does not hold" if names else ""
        if any(configurations) and refused.keys() & {*_CUT, "world_size"}:
            advice += "; a checkpoint of DeepSpeed is cut for its number of processes and its stage of ZeRO"
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} belongs to a run with other settings: {listed}{advice}"
        )
    if changed.keys() & set(layout):
        logger.warning("the run goes on in another layout of processes: %s", _listed(changed, layout))
    return _resumed(record, before.facts.get("resumed", []), checkpoint, changed)


def _same_batch(before: Record, now: Record) -> bool:
    """Whether two runs make their steps of the same samples, spread in whatever way over processes and parts.

    DeepSpeed's checkpoints are cut for their number of processes.
    """
    batches = []
    for record in (before, now):
        settings = {**record.arguments, **record.facts}
        if settings.get("deepspeed") is not None or not all(name in settings for name in _LAYOUT):
            return False
        batches.append(math.prod(int(settings[name]) for name in _LAYOUT))
    return batches[0] == batches[1]


def _deepspeed_settings(record: Record) -> dict[str, Any]:
    """Every number and word of a run's DeepSpeed configuration as deepspeed.block.name; empty without DeepSpeed."""
    found: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}.{key}", inner)
        else:
            found[name] = value

    given = record.facts.get("deepspeed_config", record.arguments.get("deepspeed"))
    if isinstance(given, dict):
        add("deepspeed", given)
    return found


def _flag(name: str) -> str:
    """The flag by which a setting is given."""
    return name.partition(".")[0]


def _listed(changed: Mapping[str, list[Any]], names: Iterable[str]) -> str:
    return "; ".join(
        f"{name} was {changed[name][0]!r}, now {changed[name][1]!r}" for name in names if name in changed
    )


def _comparable(record: Record, known: Iterable[str]) -> dict[str, Any]:
    """The settings of a run, with the known facts in place of what was left to a default."""
    arguments = {name: value for name, value in record.arguments.items() if name != "output_dir"}
    facts = {name: record.facts[name] for name in known}
    return {**arguments, **facts, "command": record.command}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {
        name: [before.get(name, "the default"), now.get(name, "the default")]
        for name in sorted(before.keys() | now.keys())
        if before.get(name, "the default") != now.get(name, "the default")
    }


def _resumed(record: Record, earlier: list[Any], checkpoint: str, changed: dict[str, list[Any]]) -> Record:
    entry = {"checkpoint": Path(checkpoint).name, "changed": changed}
    return dataclasses.replace(record, facts={**record.facts, "resumed": [*earlier, entry]})
