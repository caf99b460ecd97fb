"""The teacher of a command: loaded when it must run, and the cache of its outputs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fsd_fast.cache.identity import CacheIdentity, read_record
from fsd_fast.cache.teacher_cache import TeacherCache
from fsd_fast.commands._common import TaskData, align_outputs
from fsd_fast.commands.flags import DataArguments, flag
from fsd_fast.data import LENGTH_COLUMN, tokens_digest
from fsd_fast.distributed import Collectives
from fsd_fast.files import exclusive_folder
from fsd_fast.losses import Requirements
from fsd_fast.models.fingerprint import settings_digest, weights_digest
from fsd_fast.models.loading import read_config, skeleton
from fsd_fast.models.student import parameter_count
from fsd_fast.models.teacher import Teacher, TeacherDescription
from fsd_fast.models.whole_weights import whole_weights
from fsd_fast.training.checkpoints import check_writable
from fsd_fast.training.teacher_source import CachedTeacher, RunningTeacher, TeacherSource

logger = logging.getLogger(__name__)


@dataclass
class CacheArguments:
    """The teacher's outputs on disk."""

    teacher_cache_dir: str | None = flag(
        "Folder for the teacher's logits and hidden states of the training set: written as the teacher runs, read "
        "instead of running it again, now and in later runs.",
        None,
    )
    teacher_cache_dtype: Literal["float32", "bfloat16"] = flag(
        "How the hidden states are stored: float32 as they are, bfloat16 in half the room.", "float32"
    )


class LazyTeacher:
    """A teacher that is loaded when it is called for the first time.

    Args:
        path: Its folder or Hub name.
        data: The task whose classes its outputs follow.
        device: Where it runs; None leaves that to the caller.
    """

    def __init__(self, path: str, data: TaskData, device: torch.device | None = None) -> None:
        self._path, self._data, self._device = path, data, device
        self._teacher: Teacher | None = None

    def __call__(self) -> Teacher:
        """Return the teacher.

        Raises:
            OSError, ValueError: See ``Teacher.from_pretrained`` and ``align_outputs``.
        """
        if self._teacher is None:
            with whole_weights():
                teacher = Teacher.from_pretrained(self._path)
                align_outputs(teacher, self._data.task)
            self._teacher = teacher if self._device is None else teacher.to(self._device)
        return self._teacher


@dataclass(frozen=True)
class OpenedTeacher:
    """A teacher that a command may run, and its cache.

    Attributes:
        load: Gives the teacher.
        description: What memories record of it.
        cache: Its outputs on disk; None where no folder was given.
    """

    load: LazyTeacher
    description: TeacherDescription
    cache: TeacherCache | None

    def source(self, requires: Requirements) -> TeacherSource:
        """Where a trainer gets what an objective requires of this teacher."""
        if self.cache is None:
            return RunningTeacher(self.load(), requires)
        return CachedTeacher(self.cache, self.load)

    def parameters(self) -> int:
        """The number of the teacher's parameters."""
        return parameter_count(skeleton(read_config(self.description.name)))


def open_teacher(
    path: str,
    data: TaskData,
    data_arguments: DataArguments,
    arguments: CacheArguments,
    layers: tuple[int, ...],
    *,
    precision: str = "float32",
    device: torch.device | None = None,
) -> OpenedTeacher:
    """Open a teacher and its cache, on all processes together; it is loaded unless the cache is whole.

    Args:
        path: The teacher's folder or Hub name.
        data: The task, tokenized.
        data_arguments: Padding and S.
        arguments: Where the cache is.
        layers: Indices of the hidden states that the command reads.
        precision: Of the matrix products that the command would run the teacher with.
        device: Where the teacher runs; None leaves that to the caller.

    Raises:
        ValueError: The teacher has other classes; the cache is of something else or damaged; its disk has not enough
            room.
        OSError: The teacher cannot be loaded, or the cache's folder cannot be written and lacks samples.
    """
    load = LazyTeacher(path, data, device)
    if arguments.teacher_cache_dir is None:
        return OpenedTeacher(load, load().describe(), None)
    collectives, folder = Collectives(), Path(arguments.teacher_cache_dir)
    weights, config = weights_digest(path), read_config(path)
    record = collectives.run_on_all_ranks(lambda: read_record(folder))
    known = weights is not None and record is not None and record.weights == weights
    if known and record is not None and record.identity.task_name == data.task.name:
        fingerprint = record.identity.teacher_fingerprint
    else:
        fingerprint = load().describe().fingerprint
    wanted = CacheIdentity(
        task_name=data.task.name,
        teacher_fingerprint=fingerprint,
        teacher_config=settings_digest(path),
        tokens=tokens_digest(data.train),
        layers=tuple(sorted(layers)),
        num_samples=len(data.train),
        max_seq_length=data_arguments.max_seq_length,
        hidden_size=int(config.hidden_size),
        num_labels=data.task.num_labels,
        pad_features=data_arguments.pad_features,
        precision=precision,
        dtype=arguments.teacher_cache_dtype,
    )
    cache = collectives.run_on_all_ranks(lambda: TeacherCache(folder, wanted, weights))
    if not cache.is_whole():
        load()
        collectives.run_on_all_ranks(lambda: _check_room(cache, torch.tensor(data.train[LENGTH_COLUMN])))
    description = TeacherDescription(
        path, fingerprint, int(config.num_hidden_layers), int(config.hidden_size), data.task.num_labels
    )
    return OpenedTeacher(load, description, cache)


def _check_room(cache: TeacherCache, lengths: torch.Tensor) -> None:
    """Say how much a cache will take, and check that its disk has the room."""
    check_writable("teacher_cache_dir", str(cache.folder))
    needed, free = cache.missing_bytes(lengths), cache.free_bytes()
    if needed > free:
        raise ValueError(
            f"teacher_cache_dir: {cache.folder} needs {needed:,} bytes for the teacher's outputs; its disk has "
            f"{free:,} free"
        )
    if Collectives().rank == 0:
        logger.warning(
            "teacher_cache_dir: the outputs of %d of %d samples are missing in %s and will take %.1f MB (%.1f MB free)",
            *(len(cache.missing()), cache.identity.num_samples, cache.folder, needed / 1e6, free / 1e6),
        )


@contextlib.contextmanager
def writer_lock(cache: TeacherCache, *, required: bool) -> Iterator[bool]:
    """Keep other runs from writing to a cache while the block lasts; called on all processes together.

    Args:
        cache: The cache; its folder and record are made where they are missing. A whole cache is not locked.
        required: Whether it is an error that another run is writing there.

    Yields:
        Whether this run may write.

    Raises:
        BlockingIOError: Another run is writing there, and ``required`` is set.
        OSError: The folder cannot be written.
    """
    collectives = Collectives()
    with contextlib.ExitStack() as locks:

        def lock() -> bool:
            if collectives.rank or cache.is_whole():
                return False
            try:
                locks.enter_context(exclusive_folder(cache.folder, "teacher_cache_dir"))
            except BlockingIOError as error:
                if required:
                    raise
                logger.warning("%s: this run reads what is there and writes nothing", error)
                return False
            cache.create()
            return True

        writes = bool(collectives.broadcast_json(collectives.run_on_all_ranks(lock)))
        # Another run may have written since the cache was opened.
        collectives.run_on_all_ranks(cache.scan)
        yield writes
