"""The released procedure that builds a memory, written from its description."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.memory.features import TaskFeatures
from fsd_fast.memory.features import MemoryIdentity, flatten_features


def released_procedure(features: TaskFeatures, generator: torch.Generator) -> Tensor:
    """Build centroids [K, F] in three epochs of two passes; each pass runs the whole teacher over all samples.

    First pass of an epoch: every example is compared with all centroids, and its number is added to the list of the
    nearest one. In the first epoch the centroids are drawn anew for every example, from running statistics that restart
    at every batch. Second pass: every list is searched for every example, and the example enters the average of each
    cluster that lists it; the averages' counts restart at every batch. All S positions count.
    """
    identity = features.identity("include")
    centroids = torch.zeros(identity.num_centroid, identity.features)
    features.teacher.all_layers = True
    try:
        for epoch in range(3):
            members = _assign(features, identity, centroids, generator if epoch == 0 else None)
            centroids = _average(features, identity, members)
    finally:
        features.teacher.all_layers = False
    return centroids


def _assign(
    features: TaskFeatures, identity: MemoryIdentity, centroids: Tensor, generator: torch.Generator | None
) -> list[list[int]]:
    """First pass: the samples of each cluster. With a generator, centroids are drawn for every example."""
    members: list[list[int]] = [[] for _ in range(identity.num_centroid)]
    for batch in features.batches("include"):
        flat = flatten_features(batch, identity)
        mean, square = torch.zeros(identity.features), torch.zeros(identity.features)
        for count, (sample, example) in enumerate(zip(batch.sample_index.tolist(), flat, strict=True), 1):
            if generator is not None:
                mean += (example - mean) / count
                square += (example.square() - square) / count
                deviation = (square - mean.square()).clamp_(min=0).sqrt_()
                drawn = torch.randn(centroids.shape, generator=generator)
                centroids = mean + deviation * drawn
            members[int((centroids - example).square().sum(dim=1).argmin())].append(sample)
    return members


def _average(features: TaskFeatures, identity: MemoryIdentity, members: list[list[int]]) -> Tensor:
    """Second pass: running averages [K, F] that are not means, since their counts restart at every batch."""
    averages = torch.zeros(identity.num_centroid, identity.features)
    for batch in features.batches("include"):
        counts = [1] * identity.num_centroid
        for sample, example in zip(
            batch.sample_index.tolist(), flatten_features(batch, identity), strict=True
        ):
            for cluster, samples in enumerate(members):
                if sample in samples:
                    counts[cluster] += 1
                    averages[cluster] += (example - averages[cluster]) / counts[cluster]
    return averages
