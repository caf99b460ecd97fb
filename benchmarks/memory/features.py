"""The training samples of a task, and the features of a teacher that counts and times its forward passes.

The built-in backbone with a random head stands in for a fine-tuned teacher: its features are as wide and as correlated,
and nothing here depends on labels. As in the commands, padding is excluded by default and a batch is padded to its own
longest sample.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from fsd_fast.cache.identity import CacheIdentity
from fsd_fast.cache.teacher_cache import TeacherCache
from fsd_fast.data import (
    LENGTH_COLUMN,
    PadCollator,
    get_task,
    load_task_dataset,
    resolve_model,
    tokenize,
    tokens_digest,
)
from fsd_fast.memory.features import (
    FeatureBatch,
    MemoryIdentity,
    feature_batches,
    flatten_features,
    local_sample_indices,
    memory_identity,
)
from fsd_fast.models.families import STOPS_EARLY
from fsd_fast.models.fingerprint import settings_digest
from fsd_fast.models.loading import load_weights, read_config
from fsd_fast.models.teacher import Teacher

CLUSTERS, LENGTH, BATCH = 100, 128, 32
TASKS = {"rte": "RTE", "cola": "CoLA", "reviews": None}
"""The folder of each task's official GLUE files; None: the task is built in."""


class CountingTeacher(Teacher):
    """A teacher that counts the samples it runs on and adds up its seconds.

    With ``all_layers`` it runs its last layer too, as the released code does.
    """

    all_layers = False
    samples = 0
    seconds = 0.0

    def reset(self) -> None:
        """Start counting from 0."""
        self.samples, self.seconds = 0, 0.0

    def hidden_states(self, inputs: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return (logits [B, C], hidden states [B, S, D] of all layers)."""
        with self._counted(inputs):
            return super().hidden_states(inputs)

    def penultimate(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the hidden state [B, S, D] before the last layer."""
        if self.all_layers or self.model.config.model_type not in STOPS_EARLY:
            return self.hidden_states(inputs)[1][self.num_layers - 1]
        with self._counted(inputs):
            return super().penultimate(inputs)

    @contextlib.contextmanager
    def _counted(self, inputs: dict[str, Tensor]) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started
        self.samples += len(inputs["input_ids"])


class TaskFeatures:
    """The training samples of a task, in order of length, and the teacher that computes their features.

    Args:
        name: The task, one of ``TASKS``.
        glue: Folder of the official GLUE folders; None is enough for a built-in task.
        max_samples: Largest number of samples, spread evenly over the training set; None: all.
        model: Folder of the backbone; None: the built-in one.
        length: S, the largest number of tokens.
        num_centroid: K of a memory.
    """

    def __init__(
        self,
        name: str,
        glue: Path | None,
        max_samples: int | None = None,
        *,
        model: str | None = None,
        length: int = LENGTH,
        num_centroid: int = CLUSTERS,
    ) -> None:
        folder = TASKS[name]
        if folder is not None and glue is None:
            raise ValueError(f"glue: expected the folder of the official GLUE folders for {name}, got none")
        path = resolve_model("minilm") if model is None else model
        self.length, self.num_centroid = length, num_centroid
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.task = get_task(name)
        rows = load_task_dataset(self.task, None if folder is None or glue is None else glue / folder)[
            "train"
        ]
        if max_samples is not None and max_samples < len(rows):
            rows = rows.select(np.linspace(0, len(rows) - 1, max_samples).astype(int))
        tokens, _ = tokenize(rows, self.tokenizer, self.task, length)
        self.samples = tokens.select(np.argsort(tokens[LENGTH_COLUMN], kind="stable"))
        self.longest = int(max(tokens[LENGTH_COLUMN]))
        classifier, _ = load_weights(path, read_config(path), fresh_head=True)
        self.teacher = CountingTeacher(classifier, path)

    def __len__(self) -> int:
        return len(self.samples)

    def identity(self, pad_features: str, length: int | None = None) -> MemoryIdentity:
        """Return the identity of a memory of these features; ``length`` replaces S."""
        max_length = self.length if length is None else length
        return memory_identity(
            self.teacher.describe(), self.task, max_length, pad_features, self.num_centroid
        )

    def open_cache(self, folder: Path, identity: MemoryIdentity) -> TeacherCache:
        """Create a cache of the teacher's logits and penultimate features in a folder."""
        wanted = CacheIdentity(
            task_name=identity.task_name,
            teacher_fingerprint=identity.teacher_fingerprint,
            teacher_config=settings_digest(self.teacher.name),
            tokens=tokens_digest(self.samples),
            layers=(identity.layer,),
            num_samples=len(self),
            max_seq_length=identity.max_seq_length,
            hidden_size=identity.hidden_size,
            num_labels=int(self.teacher.model.config.num_labels),
            pad_features=identity.pad_features,
            precision="float32",
            dtype="float32",
        )
        cache = TeacherCache(folder, wanted)
        cache.create()
        return cache

    def batches(
        self, pad_features: str, first: int = 0, cache: TeacherCache | None = None
    ) -> Iterator[FeatureBatch]:
        """Yield the features from batch number ``first`` on."""
        return feature_batches(
            lambda: self.teacher,
            self.samples,
            PadCollator(self.tokenizer, pad_features, self.length),
            local_sample_indices(self.samples),
            batch_size=BATCH,
            device=torch.device("cpu"),
            first_batch=first,
            cache=cache,
        )

    def points(self) -> Tensor:
        """All features [N, S' D] without padding, where S' is the length of the longest sample."""
        identity = self.identity("exclude", self.longest)
        points = torch.zeros(len(self), identity.features)
        for batch in self.batches("exclude"):
            flat = flatten_features(batch, identity)
            points[batch.sample_index, : flat.shape[1]] = flat
        return points
