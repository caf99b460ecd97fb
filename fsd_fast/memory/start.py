"""Where the student memory starts: the means of the fresh student's features over the teacher's clusters."""

from __future__ import annotations

import copy

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from fsd_fast.data import SAMPLE_COLUMN, PadCollator, tokens_digest
from fsd_fast.memory.features import feature_batches, local_sample_indices
from fsd_fast.memory.student_memory import StudentMemory, cluster_means
from fsd_fast.memory.teacher_memory import TeacherMemory
from fsd_fast.models.teacher import Teacher


def check_training_set(memory: TeacherMemory, dataset: Dataset, where: str) -> None:
    """Check that a memory was built on a training set, sample by sample.

    Raises:
        ValueError: It was built on other samples, or on other tokens.
    """
    places = torch.tensor(dataset[SAMPLE_COLUMN])
    same = torch.equal(places.sort().values, memory.sample_index)
    if not same or memory.tokens not in ("", tokens_digest(dataset)):
        raise ValueError(
            f"memory_path: {where} was built on {memory.num_samples} training samples, this run has {len(dataset)}"
            f"{'' if not same else ' with other tokens'}; --student_memory_init clusters needs the same ones. Build a "
            "memory of this training set, or take --student_memory_init normal"
        )


def start_from_clusters(
    student_memory: StudentMemory,
    memory: TeacherMemory,
    student: PreTrainedModel,
    dataset: Dataset,
    collator: PadCollator,
    *,
    batch_size: int,
    device: torch.device,
) -> None:
    """Run the fresh student over the training set once, and start its memory at ``cluster_means``.

    Args:
        student_memory: Its centroids are set, on all processes to the same bits.
        memory: The teacher's.
        student: Before its first step; it stays as it is.
        dataset: The tokenized training set.
        collator: Pads a batch of it.
        batch_size: Samples of one pass.
        device: Where the student runs.

    Raises:
        ValueError: The memory was built on other samples.
    """
    # A frozen copy in evaluation mode, so that the student itself keeps its mode and its gradients.
    snapshot = Teacher(copy.deepcopy(student), "the student").to(device)
    batches = feature_batches(
        lambda: snapshot,
        dataset,
        collator,
        local_sample_indices(dataset),
        batch_size=batch_size,
        device=device,
    )
    means = cluster_means(batches, memory, snapshot.hidden_size)
    with torch.no_grad():
        student_memory.centroids.copy_(means)
