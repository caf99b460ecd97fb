"""One k-means iteration as an op: assign every point to its nearest centroid, then average the points."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.speed import baselines, inputs, peers
from benchmarks.speed.contenders import ValueContender
from benchmarks.speed.inputs import Inputs, Sizes
from benchmarks.speed.ops import Build, Op, Provider, on_gpu, value_of
from fsd_kernels import nearest, update

# Peers whose memory NumPy or C++ allocates.
_UNSEEN_MEMORY = ("scikit-learn", "faiss-cpu")


def _iteration(backend: str) -> Callable[[Inputs], Tensor]:
    def iteration(tensors: Inputs) -> Tensor:
        labels = nearest(tensors["points"], tensors["centroids"], backend=backend)
        sums, counts = update(tensors["points"], labels, len(tensors["centroids"]), backend=backend)
        return sums / counts[:, None]

    return iteration


def _peer(build: Callable[[Inputs], peers.Iteration]) -> Build:
    return lambda tensors, _: ValueContender(build(tensors), tensors)


def _gate_sizes(sizes: Sizes) -> Sizes:
    return sizes._replace(rows=min(sizes.rows, 16))


def kmeans_op() -> Op:
    """The op "kmeans"."""
    base = Sizes(rows=128, width=768, centroids=100, points=1024)
    growth = [base._replace(points=points) for points in (512, 1024, 2048)]
    growth += [base._replace(centroids=centroids) for centroids in (50, 200, 400)]
    growth += [base._replace(rows=rows) for rows in (32, 64, 256)]
    return Op(
        "kmeans",
        "one k-means iteration: assignment and update",
        ("points", "rows", "width", "centroids"),
        inputs.points,
        {"biased": value_of(_iteration("reference"))},
        {
            "ours": Provider(value_of(_iteration("auto")), ours=True, note="eager on a CPU, Triton on a GPU"),
            "ours-eager": Provider(
                on_gpu(value_of(_iteration("eager")), "on a CPU it is what 'ours' runs"), ours=True
            ),
            "plain": Provider(value_of(baselines.lloyd_iteration), note="addmm, index_add"),
            **{
                name: Provider(_peer(build), note="peer", memory=name not in _UNSEEN_MEMORY)
                for name, build in peers.KMEANS_PEERS.items()
            },
        },
        {
            "paper": [base._replace(centroids=centroids) for centroids in (100, 300)],
            "small": [Sizes(rows=16, width=32, centroids=5, points=64)],
            "growth": growth,
        },
        "kmeans",
        modes=("full",),
        discrete=True,
        gate_sizes=_gate_sizes,
    )
