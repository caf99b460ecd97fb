"""The teacher's features of a training set: whose they are, and the one iterator over them.

A feature vector is a hidden state ``[S, D]`` of one layer, flattened to F = S*D numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor

from fsd_fast.cache.teacher_cache import TeacherCache
from fsd_fast.data import LENGTH_COLUMN, SAMPLE_COLUMN, PadCollator, Task
from fsd_fast.files import differences
from fsd_fast.models.caching import compute_batch
from fsd_fast.models.teacher import Teacher, TeacherDescription

PAD_POLICIES = ("include", "exclude")


@dataclass
class FeatureBatch:
    """Hidden states of one encoder layer for a batch of samples.

    Attributes:
        features: ``[b, S_b, D]``, floating.
        attention_mask: ``[b, S_b]``, 1 = token, 0 = padding; None: no padding.
        sample_index: int64 ``[b]``: the samples' places in the data set, each occurring once over all processes.
        computed: False where they were read from a cache and the teacher was not run.
    """

    features: Tensor
    attention_mask: Tensor | None
    sample_index: Tensor
    computed: bool = True


@dataclass(frozen=True)
class MemoryIdentity:
    """Whose features a memory was made of. A run that uses it must agree in every field.

    Attributes:
        task_name: The task whose training set was clustered.
        teacher: The teacher's name or path.
        teacher_fingerprint: sha256 of its parameters, see ``model_fingerprint``.
        layer: Index of the hidden states, 0 = embeddings.
        max_seq_length: S.
        hidden_size: D.
        num_centroid: K.
        pad_features: "include" (all S positions count, the paper) or "exclude" (padding is zero).
    """

    task_name: str
    teacher: str
    teacher_fingerprint: str
    layer: int
    max_seq_length: int
    hidden_size: int
    num_centroid: int
    pad_features: str

    def __post_init__(self) -> None:
        if self.pad_features not in PAD_POLICIES:
            raise ValueError(
                f"pad_features: expected one of {', '.join(PAD_POLICIES)}, got {self.pad_features!r}"
            )
        for name in ("max_seq_length", "hidden_size", "num_centroid"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def features(self) -> int:
        """F = S*D, the length of a flattened feature vector."""
        return self.max_seq_length * self.hidden_size

    def check(self, expected: MemoryIdentity, where: str) -> None:
        """Raise ValueError that lists every field in which this differs from ``expected``.

        The teacher's name alone makes no difference: a folder may have been moved, and the fingerprint tells.
        """
        found, wanted = dataclasses.asdict(self), dataclasses.asdict(expected)
        if {**found, "teacher": None} != {**wanted, "teacher": None}:
            raise ValueError(f"{where} was built for another run: {differences(found, wanted)}")


def flatten_features(batch: FeatureBatch, identity: MemoryIdentity) -> Tensor:
    """Flattened features ``[b, S_b*D]`` of a batch, padding treated as ``identity.pad_features`` says.

    Under "include" every one of the S positions counts and S_b must be S. Under "exclude" padding positions
    are zero, and a batch may be shorter than S: what is missing is zero too.

    Raises:
        ValueError: Shapes that do not fit.
    """
    features, mask = batch.features, batch.attention_mask
    if features.ndim != 3 or features.shape[2] != identity.hidden_size:
        raise ValueError(
            f"features: expected [b, S, D] with D = {identity.hidden_size}, got {list(features.shape)}"
        )
    length = features.shape[1]
    if length > identity.max_seq_length or (
        identity.pad_features == "include" and length != identity.max_seq_length
    ):
        raise ValueError(
            f"features: {length} positions, expected "
            f"{'exactly' if identity.pad_features == 'include' else 'at most'} max_seq_length = "
            f"{identity.max_seq_length} with pad_features = {identity.pad_features!r}"
        )
    if identity.pad_features == "exclude" and mask is not None:
        if mask.shape != features.shape[:2]:
            raise ValueError(
                f"attention_mask: expected [b, S] = {list(features.shape[:2])}, got {list(mask.shape)}"
            )
        # Not a product: a masked position may hold NaN.
        features = features.masked_fill(mask.to(features.device)[:, :, None] == 0, 0)
    return features.flatten(1)


def memory_identity(
    teacher: TeacherDescription, task: Task, max_seq_length: int, pad_features: str, num_centroid: int | None
) -> MemoryIdentity:
    """What a memory for this teacher, task and padding policy must be; K defaults to the paper's for the task."""
    return MemoryIdentity(
        task_name=task.name,
        teacher=teacher.name,
        teacher_fingerprint=teacher.fingerprint,
        layer=teacher.num_layers - 1,
        max_seq_length=max_seq_length,
        hidden_size=teacher.hidden_size,
        num_centroid=task.default_num_centroid if num_centroid is None else num_centroid,
        pad_features=pad_features,
    )


def local_sample_indices(dataset: Dataset) -> Tensor:
    """Places int64 ``[n]`` of this process's samples in the data set, each sample in exactly one process.

    In order of length, so that a batch padded to its own longest wastes little.
    """
    state = PartialState()
    order = np.argsort(np.asarray(dataset[LENGTH_COLUMN]), kind="stable").astype(np.int64)
    return torch.from_numpy(order[state.process_index :: state.num_processes].copy())


def feature_batches(
    teacher: Callable[[], Teacher],
    dataset: Dataset,
    collator: PadCollator,
    sample_index: Tensor,
    *,
    batch_size: int,
    device: torch.device,
    first_batch: int = 0,
    cache: TeacherCache | None = None,
    write: bool = True,
) -> Iterator[FeatureBatch]:
    """The teacher's penultimate features of chosen samples, computed or from a cache.

    Args:
        teacher: Gives the teacher, on ``device``; called only where a batch must be computed.
        dataset: Tokenized samples.
        collator: Pads a batch of them.
        sample_index: Places of the samples in the data set, int64 ``[n]``; batches take them in this order.
        batch_size: Samples of a batch; the last may have fewer.
        device: Where the features are given.
        first_batch: Batches left out at the start.
        cache: Where the teacher's outputs are read where it holds them, opened for the penultimate layer alone; None:
            the teacher always runs.
        write: Whether outputs that the cache does not hold are written to it.

    Yields:
        Batches in order; a cached one has its padding zeroed under "exclude" and no mask.

    Raises:
        OSError: The cache cannot be written.
        ValueError: The cache is to keep numbers that are not finite.
    """
    for index in sample_index.split(batch_size)[first_batch:]:
        stored = None if cache is None else cache.read(index)
        if stored is not None:
            [features] = stored.hidden_states.values()
            yield FeatureBatch(features.to(device).float(), None, index, computed=False)
            continue
        inputs = collator([dataset[place] for place in index.tolist()])
        inputs = {name: value.to(device) for name, value in inputs.items() if name != SAMPLE_COLUMN}
        if cache is None:
            features = teacher().penultimate(inputs)
        else:
            [features] = compute_batch(teacher(), cache, inputs, index, write=write).hidden_states.values()
            features = features.float()
        yield FeatureBatch(features, inputs.get("attention_mask"), index)
