"""``fsd-fast memory``: cluster the teacher's features into its memory."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from fsd_fast.clustering.checkpoint import discard_state
from fsd_fast.commands._common import Work, check_model, check_outputs, load_data
from fsd_fast.commands.flags import DataArguments, flag
from fsd_fast.commands.values import Range
from fsd_fast.data import get_task, resolve_model
from fsd_fast.distributed import Collectives
from fsd_fast.memory.features import (
    FeatureBatch,
    feature_batches,
    local_sample_indices,
    memory_identity,
    open_feature_cache,
    tokens_digest,
)
from fsd_fast.memory.plot import PLOT_FILE, plot_memory, sample_numbers
from fsd_fast.memory.teacher_memory import STATE_FOLDER, TeacherMemory
from fsd_fast.models.loading import load_tokenizer
from fsd_fast.models.teacher import Teacher
from fsd_fast.training.checkpoints import check_output_dir
from fsd_kernels import resolve_backend


@dataclass
class MemoryArguments:
    """The ``memory`` command: cluster the teacher's penultimate features of the training set."""

    teacher_model_name_or_path: str = flag("The fine-tuned teacher.")
    output_dir: str = flag("Folder for memory.safetensors and memory.json.", writes=True)
    num_centroid: int | None = flag(
        "Centroids K. Default: 300 for MNLI and QQP, 100 for the others.", None, numbers=Range(minimum=1)
    )
    per_device_batch_size: int = flag("Samples of one teacher pass.", 32, numbers=Range(minimum=1))
    memory_refine: int = flag(
        "Exact Lloyd epochs after the two passes; each is one more pass.", 0, numbers=Range(minimum=0)
    )
    feature_cache_dir: str | None = flag(
        "Folder for the teacher's features: written as the teacher runs, read instead of running it again, now and "
        "in later builds.",
        None,
        writes=True,
    )
    plot: bool = flag("Draw cluster sizes and a t-SNE of the memory into memory_plot.png.", False)
    seed: int = flag(
        "Seed of the sketch and of the first centroids.", 42, numbers=Range(minimum=0, maximum=2**32 - 1)
    )
    use_cpu: bool = flag("Use the CPU even where there is a GPU.", False)
    overwrite_output_dir: bool = flag("Replace a memory that is already there.", False)


ARGUMENTS = (DataArguments, MemoryArguments)


def prepare(data_arguments: DataArguments, arguments: MemoryArguments) -> Work:
    """Build the teacher memory."""
    folder = Path(arguments.output_dir)
    # An unfinished build is continued where it was killed.
    if not (folder / STATE_FOLDER).is_dir():
        check_output_dir(str(folder), None, arguments.overwrite_output_dir)
    task = get_task(data_arguments.task_name)
    path = resolve_model(arguments.teacher_model_name_or_path)
    tokenizer = load_tokenizer(path)
    check_model(path, tokenizer, task, data_arguments.max_seq_length)
    teacher_model = Teacher.from_pretrained(path)
    check_outputs(teacher_model, task)
    data = load_data(data_arguments, tokenizer)
    identity = memory_identity(
        teacher_model,
        task,
        data_arguments.max_seq_length,
        data_arguments.pad_features,
        arguments.num_centroid,
    )
    if len(data.train) < identity.num_centroid:
        raise ValueError(
            f"num_centroid: expected at most the {len(data.train)} training samples, got {identity.num_centroid}"
        )
    state = PartialState(cpu=arguments.use_cpu)
    resolve_backend(None, state.device, "kmeans")
    teacher_model.to(state.device)
    samples = local_sample_indices(data.train)

    batch_size = arguments.per_device_batch_size
    tokens = tokens_digest(data.train)
    layout = {
        "samples": hashlib.sha256(samples.tobytes()).hexdigest(),
        "tokens": tokens,
        "batch_size": batch_size,
        "device": state.device.type,
    }

    cache = None
    if arguments.feature_cache_dir is not None:
        cache = open_feature_cache(
            arguments.feature_cache_dir, teacher_model, data.train, identity, samples, batch_size, tokens
        )

    def features_of(chosen: np.ndarray[Any, np.dtype[np.int64]], first: int = 0) -> Iterator[FeatureBatch]:
        return feature_batches(
            teacher_model, data.train, data.collator, chosen, batch_size, state.device, first, cache
        )

    def work() -> dict[str, float]:
        if arguments.overwrite_output_dir:
            discard_state(folder / STATE_FOLDER)
        if cache is not None:
            Collectives().agree(cache.create if state.is_main_process else lambda: None)
        built = TeacherMemory.build(
            functools.partial(features_of, samples),
            identity,
            seed=arguments.seed,
            refine=arguments.memory_refine,
            num_samples=len(samples),
            state_dir=folder / STATE_FOLDER,
            layout=layout,
        )
        if state.is_main_process:
            built.save_pretrained(folder)
            if arguments.plot:
                if cache is not None:
                    cache.scan()
                plot_memory(built, features_of(sample_numbers(len(data.train))), folder / PLOT_FILE)
        discard_state(folder / STATE_FOLDER)
        return {
            "memory_inertia": built.inertia,
            "memory_samples": float(len(data.train)),
            "memory_teacher_passes": built.teacher_passes,
        }

    return work
