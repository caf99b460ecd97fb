"""The student's memory: K trainable centroids, which the deployed student does without."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fsd_fast.distributed import Collectives
from fsd_fast.memory.features import FeatureBatch, flatten_features
from fsd_fast.memory.teacher_memory import TeacherMemory
from fsd_kernels.kmeans import update_


class StudentMemory(nn.Module):
    """The student's memory: ``centroids`` ``[K, S*D]``, a parameter that the global inter-feature loss trains.

    With ``decay`` they are a buffer instead, and follow the student's recent features, see ``follow``.

    Args:
        num_centroid: K.
        max_seq_length: S.
        hidden_size: D of the student.
        init: "normal" (the paper: independent numbers from N(0, ``std``^2)), "teacher" (a copy of the teacher's
            centroids), or the centroids to start from, ``[K, S*D]``, such as ``cluster_means`` returns.
        teacher_memory: Needed for "teacher".
        std: Of "normal". 1 is the standard normal.
        generator: Of "normal", on the CPU; None: one seeded with 0.
        decay: In (0, 1): weight that a centroid keeps for each new sample of its cluster. None: trained by gradient.
        pad_features: With ``decay``, "include" or "exclude", as for the losses.

    Raises:
        ValueError: ``decay`` is out of range; an unknown ``init``; centroids of another shape; "teacher" without a
            memory or with one of another shape.
    """

    centroids: Tensor

    def __init__(
        self,
        num_centroid: int,
        max_seq_length: int,
        hidden_size: int,
        init: str | Tensor = "normal",
        *,
        teacher_memory: TeacherMemory | None = None,
        std: float = 1.0,
        generator: torch.Generator | None = None,
        decay: float | None = None,
        pad_features: str = "include",
    ) -> None:
        super().__init__()
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"decay: expected a number between 0 and 1, got {decay}")
        self.decay, self.pad_features = decay, pad_features
        shape = (num_centroid, max_seq_length * hidden_size)
        if isinstance(init, Tensor):
            if init.shape != shape:
                raise ValueError(f"init: expected centroids [K, S*D] = {list(shape)}, got {list(init.shape)}")
            centroids = init.detach().clone()
        elif init == "normal":
            generator = generator if generator is not None else torch.Generator().manual_seed(0)
            centroids = torch.randn(shape, generator=generator) * std
        elif init == "teacher":
            if teacher_memory is None:
                raise ValueError("teacher_memory: init = 'teacher' needs the teacher's memory, got None")
            if teacher_memory.centroids.shape != shape:
                raise ValueError(
                    f"teacher_memory: its centroids are {list(teacher_memory.centroids.shape)}; init = 'teacher' "
                    f"needs [K, S*D] = {list(shape)}, a student as wide as its teacher: use the means of its own "
                    "features, see cluster_means"
                )
            centroids = teacher_memory.centroids.clone()
        else:
            raise ValueError(f"init: expected 'normal', 'teacher' or centroids, got {init!r}")
        if decay is None:
            self.centroids = nn.Parameter(centroids)
        else:
            self.register_buffer("centroids", centroids)

    @torch.no_grad()
    def follow(self, features: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> None:
        """Move the centroids to the student's features of a batch, without a gradient.

            m_k <- d^n_k m_k + (1 - d^n_k) mean of h_S(x) over the n_k samples of the batch with label k

        so that a centroid is the mean of about 1 / (1 - d) recent samples of its cluster, however they are batched.
        The samples of all processes count.

        Args:
            features: h_S, hidden states ``[B, S_b, D]``, S_b <= S; positions beyond S_b count as zeros.
            labels: int64 ``[B]``: the samples' clusters in the teacher's memory.
            attention_mask: ``[B, S_b]``, 1 = token; under "exclude" the others count as zeros.

        Raises:
            ValueError: The memory is trained by gradient.
        """
        if self.decay is None:
            raise ValueError(
                "decay: expected a memory that was made with one; this one is trained by gradient"
            )
        if self.pad_features == "exclude" and attention_mask is not None:
            features = features.masked_fill(attention_mask[:, :, None] == 0, 0)
        flat = features.detach().flatten(1).to(self.centroids.dtype)
        # One row more holds the counts, so that processes exchange one tensor.
        sums = self.centroids.new_zeros(self.centroids.shape[0], self.centroids.shape[1] + 1)
        sums[:, : flat.shape[1]].index_add_(0, labels, flat)
        sums[:, -1] = labels.bincount(minlength=sums.shape[0])
        Collectives().sum_(sums)
        counts = sums[:, -1:]
        kept = self.decay**counts
        # Another tensor, not the same one changed: the backward of this batch still reads the centroids.
        self.centroids = kept * self.centroids + (1 - kept) * sums[:, :-1] / counts.clamp(min=1)


def cluster_means(batches: Iterable[FeatureBatch], memory: TeacherMemory, hidden_size: int) -> Tensor:
    """Average the student's features over the clusters of the teacher's: m_k = mean of h_S(x) over label(x) = k.

    Both memories then mean the same samples, centroid by centroid. Where a teacher's cluster is empty its centroid is a
    copy of the largest one's, and so is the student's.

    Args:
        batches: The student's hidden states of this process's samples, each sample of the memory once over all
            processes.
        memory: Gives the label of each sample, S and the padding policy.
        hidden_size: D of the student.

    Returns:
        ``[K, S*D]`` float32 on the CPU, equal on all processes.

    Raises:
        ValueError: The batches hold other samples than the memory, or features that do not fit.
    """
    identity = dataclasses.replace(memory.identity, hidden_size=hidden_size)
    sums = torch.zeros(identity.num_centroid, identity.features, dtype=torch.float64)
    counts = torch.zeros(identity.num_centroid, dtype=torch.int64)
    collectives = Collectives()

    def add_up() -> None:
        for batch in batches:
            features = flatten_features(batch, identity).float().cpu()
            update_(sums, counts, features, memory.labels_of(batch.sample_index))

    collectives.run_on_all_ranks(add_up)
    collectives.sum_(sums)
    collectives.sum_(counts)
    if counts.tolist() != memory.cluster_sizes:
        raise ValueError(
            f"teacher_memory: it was built on {memory.num_samples} samples, the student's features are of "
            f"{int(counts.sum())}; expected the same training set"
        )
    means = sums.div_(counts.clamp(min=1)[:, None]).float()
    means[counts == 0] = means[int(counts.argmax())].clone()
    return means
