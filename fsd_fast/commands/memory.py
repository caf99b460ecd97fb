"""``fsd-fast memory``: cluster the teacher's features into its memory."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor

from fsd_fast.clustering.checkpoint import discard_checkpoint
from fsd_fast.commands._common import TaskData, Work, check_model, load_data, read_task
from fsd_fast.commands._teacher import CacheArguments, OpenedTeacher, open_teacher, writer_lock
from fsd_fast.commands.flags import DataArguments, flag
from fsd_fast.commands.values import Range
from fsd_fast.data import resolve_model, tokens_digest
from fsd_fast.distributed import Collectives
from fsd_fast.files import exclusive_folder
from fsd_fast.memory.build import CHECKPOINT_FOLDER
from fsd_fast.memory.features import (
    FeatureBatch,
    MemoryIdentity,
    feature_batches,
    local_sample_indices,
    memory_identity,
)
from fsd_fast.memory.plot import PLOT_FILE, plot_memory, plotted_samples
from fsd_fast.memory.teacher_memory import TeacherMemory
from fsd_fast.models.loading import load_tokenizer, read_config
from fsd_fast.shutdown import Stopped, stoppable
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
        "Exact Lloyd epochs after the two passes, at most. Passes in all: 4 for one epoch, 5 for two, and one more for "
        "each epoch that finds an empty cluster.",
        0,
        numbers=Range(minimum=0),
    )
    plot: bool = flag("Draw cluster sizes and a t-SNE of the memory into memory_plot.png.", False)
    seed: int = flag(
        "Seed of the sketch and of the first centroids.", 42, numbers=Range(minimum=0, maximum=2**32 - 1)
    )
    use_cpu: bool = flag("Use the CPU even where there is a GPU.", False)
    overwrite_output_dir: bool = flag("Start anew: replace a memory and discard an unfinished build.", False)


ARGUMENTS = (DataArguments, CacheArguments, MemoryArguments)


def prepare(
    data_arguments: DataArguments, cache_arguments: CacheArguments, arguments: MemoryArguments
) -> Work:
    """Check the input; return the work that builds the teacher memory."""
    _check_free(arguments)
    task, splits = read_task(data_arguments, needs=("train",))
    path = resolve_model(arguments.teacher_model_name_or_path)
    tokenizer = load_tokenizer(path)
    check_model(path, tokenizer, task, data_arguments.max_seq_length)
    data = load_data(data_arguments, task, splits, tokenizer)
    state = PartialState(cpu=arguments.use_cpu)
    resolve_backend(None, state.device, "kmeans")
    teacher = open_teacher(
        path,
        data,
        data_arguments,
        cache_arguments,
        (int(read_config(path).num_hidden_layers) - 1,),
        device=state.device,
    )
    identity = memory_identity(
        teacher.description,
        task,
        data_arguments.max_seq_length,
        data_arguments.pad_features,
        arguments.num_centroid,
    )
    if len(data.train) < identity.num_centroid:
        raise ValueError(
            f"num_centroid: expected at most the {len(data.train)} training samples, got {identity.num_centroid}"
        )
    builder = _Builder(arguments, teacher, data, identity, state)
    builder.lock()
    return builder.run


def _check_free(arguments: MemoryArguments) -> None:
    """Check that no finished memory is there; an unfinished one is continued where it was killed."""
    if not (Path(arguments.output_dir) / CHECKPOINT_FOLDER).is_dir():
        check_output_dir(arguments.output_dir, None, arguments.overwrite_output_dir, can_resume=False)


class _Builder:
    """A build whose input has been checked.

    Args:
        arguments: The command's flags.
        teacher: On the process's device, with the cache of its outputs.
        data: The task, tokenized.
        identity: Of the memory.
        state: The processes and this one's device.
    """

    def __init__(
        self,
        arguments: MemoryArguments,
        teacher: OpenedTeacher,
        data: TaskData,
        identity: MemoryIdentity,
        state: PartialState,
    ) -> None:
        self._arguments, self._teacher, self._data = arguments, teacher, data
        self._identity, self._process = identity, state
        self._folder = Path(arguments.output_dir)
        self._sample_index = local_sample_indices(data.train)
        self._tokens = tokens_digest(data.train)
        self._locks = ExitStack()
        self._writes_cache = False

    def lock(self) -> None:
        """Keep other builds out of the memory's folder, and out of the cache's where outputs are to be written.

        Raises:
            BlockingIOError: Another build is there.
            FileExistsError: Another build has ended there.
        """

        def lock_folder() -> None:
            if self._process.is_main_process:
                self._locks.enter_context(exclusive_folder(self._folder, "output_dir"))
                # Another build may have ended since it was checked.
                _check_free(self._arguments)

        try:
            Collectives().run_on_all_ranks(lock_folder)
            if self._teacher.cache is not None:
                self._writes_cache = self._locks.enter_context(
                    writer_lock(self._teacher.cache, required=True)
                )
        except BaseException:
            self._locks.close()
            raise

    def _features(self, sample_index: Tensor, first_batch: int = 0) -> Iterator[FeatureBatch]:
        return feature_batches(
            self._teacher.load,
            self._data.train,
            self._data.collator,
            sample_index,
            batch_size=self._arguments.per_device_batch_size,
            device=self._process.device,
            first_batch=first_batch,
            cache=self._teacher.cache,
            write=self._writes_cache,
        )

    def _layout(self) -> dict[str, Any]:
        """What the numbers depend on, beside the memory's identity and settings."""
        return {
            "samples": hashlib.sha256(self._sample_index.numpy().tobytes()).hexdigest(),
            "tokens": self._tokens,
            "batch_size": self._arguments.per_device_batch_size,
            "device": self._process.device.type,
        }

    def run(self) -> dict[str, float]:
        """``build``, which a signal stops at a batch, with its state kept.

        Raises:
            Stopped: By a signal; the same command continues the build.
        """
        with stoppable():
            try:
                return self.build()
            except Stopped as stopped:
                advice = "the same command continues the build, without --overwrite_output_dir"
                raise Stopped(stopped.number, f"{stopped.place}; {advice}") from None

    def build(self) -> dict[str, float]:
        """Build the memory, save it, and draw it if that was asked for; return its figures."""
        with self._locks:
            checkpoint_folder = self._folder / CHECKPOINT_FOLDER
            if self._arguments.overwrite_output_dir:
                discard_checkpoint(checkpoint_folder)
            memory = TeacherMemory.build(
                functools.partial(self._features, self._sample_index),
                self._identity,
                seed=self._arguments.seed,
                refine=self._arguments.memory_refine,
                num_samples=len(self._sample_index),
                tokens=self._tokens,
                checkpoint_dir=checkpoint_folder,
                layout=self._layout(),
            )
            if self._process.is_main_process:
                self._save(memory)
            discard_checkpoint(checkpoint_folder)
        return {
            "memory_inertia": memory.inertia,
            "memory_samples": float(len(self._data.train)),
            "memory_teacher_passes": memory.teacher_passes,
        }

    def _save(self, memory: TeacherMemory) -> None:
        memory.save_pretrained(self._folder)
        if self._arguments.plot:
            if self._teacher.cache is not None:
                self._teacher.cache.scan()
            chosen = plotted_samples(len(self._data.train))
            plot_memory(memory, self._features(chosen), self._folder / PLOT_FILE)
