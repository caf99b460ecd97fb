"""Published packages that compute L_I, L_L or a k-means iteration; ``requirements.txt`` pins their versions.

A peer that is not installed or cannot run a case raises ``Unavailable``; its row shows the reason. Two packages import
plotting or training frameworks at their top. Only their computing modules are loaded, so these frameworks need not be
installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed.inputs import Inputs


class Unavailable(RuntimeError):
    """A provider cannot run a case, for the reason in the message."""


def _module(package: str, distribution: str, submodule: str = "") -> ModuleType:
    """Import a package, or one of its modules without running the package's ``__init__``."""
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{distribution} is not installed (benchmarks/requirements.txt)")
    try:
        if not submodule:
            return importlib.import_module(package)
        name = f"_peer_{package}"
        if name not in sys.modules:
            spec = importlib.util.find_spec(package)
            stub = ModuleType(name)
            stub.__path__ = list(spec.submodule_search_locations or []) if spec is not None else []
            sys.modules[name] = stub
        return importlib.import_module(f"{name}.{submodule}")
    except ImportError as error:
        raise Unavailable(f"{distribution} cannot be imported: {error}") from error


def _neg_log(cka: Tensor) -> Tensor:
    return -cka.abs().log().mean()


def _grams(x: Tensor) -> Tensor:
    return torch.bmm(x, x.mT)


def _flat(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Student and teacher of L_L, each [1, B, F]."""
    return inputs["student"].flatten(1)[None], inputs["teacher"].flatten(1)[None]


def _per_sample(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs["student"], inputs["teacher"]


Pick = Callable[[Inputs], tuple[Tensor, Tensor]]
Loss = Callable[[Inputs], Tensor]


def _pytorch_cka(pick: Pick) -> Loss:
    hsic = _module("cka", "pytorch-cka").hsic

    def loss(inputs: Inputs) -> Tensor:
        student, teacher = pick(inputs)
        # It returns the HSIC of every student sample with every teacher sample; the loss takes the matching ones.
        cross, student_hsic, teacher_hsic = hsic(_grams(student), _grams(teacher))
        return _neg_log(cross.diagonal() / (student_hsic * teacher_hsic).sqrt())

    return loss


def _cka_pytorch(pick: Pick) -> Loss:
    hsic = _module("cka_pytorch", "cka-pytorch", "hsic").hsic1

    def loss(inputs: Inputs) -> Tensor:
        student, teacher = (_grams(x) for x in pick(inputs))
        return _neg_log(hsic(student, teacher) / (hsic(student, student) * hsic(teacher, teacher)).sqrt())

    return loss


def _ckatorch(pick: Pick) -> Loss:
    # The default, method="fro_norm", detaches the Grams and passes no gradient.
    cka = _module("ckatorch", "ckatorch", "core").cka_base

    def loss(inputs: Inputs) -> Tensor:
        pairs = zip(*pick(inputs), strict=True)
        return _neg_log(torch.stack([cka(student, teacher, method="hsic") for student, teacher in pairs]))

    return loss


CKA_PEERS = ("pytorch-cka", "cka-pytorch", "ckatorch")


def cka_peers(op: str) -> dict[str, tuple[str, Callable[[], Loss]]]:
    """Peers of L_I ("intra") or L_L ("local"): name -> (estimator of CKA, function that builds the loss)."""
    pick = _per_sample if op == "intra" else _flat
    return {
        "pytorch-cka": ("unbiased", lambda: _pytorch_cka(pick)),
        "cka-pytorch": ("unbiased", lambda: _cka_pytorch(pick)),
        "ckatorch": ("biased", lambda: _ckatorch(pick)),
    }


# ------------------------------------------------------------------------------- one k-means iteration

Iteration = Callable[[Inputs], Tensor]


def _on_cpu(inputs: Inputs, distribution: str) -> tuple[Any, Any]:
    if inputs["points"].device.type != "cpu":
        raise Unavailable(f"{distribution} runs on the CPU only")
    return inputs["points"].numpy(), inputs["centroids"].numpy()


def _scikit_learn(_: Inputs) -> Iteration:
    try:
        from sklearn.cluster._k_means_lloyd import lloyd_iter_chunked_dense
    except ImportError as error:
        raise Unavailable(f"scikit-learn's inner Lloyd kernel cannot be imported: {error}") from error

    def iteration(inputs: Inputs) -> Tensor:
        points, centroids = _on_cpu(inputs, "scikit-learn")
        updated = np.zeros_like(centroids)
        labels = np.zeros(len(points), dtype=np.int32)
        lloyd_iter_chunked_dense(
            points,
            np.ones(len(points), dtype=points.dtype),
            centroids,
            updated,
            np.zeros(len(centroids), dtype=points.dtype),
            labels,
            np.zeros(len(centroids), dtype=points.dtype),
            torch.get_num_threads(),
            update_centers=True,
        )
        return torch.from_numpy(updated)

    return iteration


def _faiss(_: Inputs) -> Iteration:
    faiss = _module("faiss", "faiss-cpu")

    def iteration(inputs: Inputs) -> Tensor:
        points, centroids = _on_cpu(inputs, "faiss-cpu")
        faiss.omp_set_num_threads(torch.get_num_threads())
        number, width = centroids.shape
        kmeans = faiss.Kmeans(
            width, number, niter=1, max_points_per_centroid=1 << 30, min_points_per_centroid=1
        )
        kmeans.train(points, init_centroids=centroids)
        return torch.from_numpy(kmeans.centroids)

    return iteration


def _fastkmeans(inputs: Inputs) -> Iteration:
    module = _module("fastkmeans", "fastkmeans")
    if inputs["points"].device.type != "cpu":
        raise Unavailable("fastkmeans rounds points to float16 on a GPU")

    def iteration(inputs: Inputs) -> Tensor:
        points, centroids = _on_cpu(inputs, "fastkmeans")
        model = module.FastKMeans(points.shape[1], len(centroids), niter=1, gpu=False, seed=0)
        # It seeds the global generators, and draws its first centroids with that seed.
        state = np.random.get_state()  # noqa: NPY002
        with torch.random.fork_rng(devices=[]):
            model.train(points)
        np.random.set_state(state)  # noqa: NPY002
        return torch.from_numpy(model.centroids)

    return iteration


def _fast_pytorch_kmeans(_: Inputs) -> Iteration:
    kmeans = _module("fast_pytorch_kmeans", "fast-pytorch-kmeans").KMeans

    def iteration(inputs: Inputs) -> Tensor:
        model = kmeans(len(inputs["centroids"]), max_iter=1)
        model.fit_predict(inputs["points"], centroids=inputs["centroids"])
        centroids: Tensor = model.centroids
        return centroids

    return iteration


def _flash_kmeans(inputs: Inputs) -> Iteration:
    if inputs["points"].device.type != "cuda":
        raise Unavailable("flash-kmeans needs a GPU")
    step = _module("flash_kmeans", "flash-kmeans").batch_kmeans_Euclid

    def iteration(inputs: Inputs) -> Tensor:
        points, centroids = inputs["points"][None], inputs["centroids"][None]
        result = step(points, centroids.shape[1], max_iters=1, init_centroids=centroids)
        updated: Tensor = result[1][0]
        return updated

    return iteration


KMEANS_PEERS: dict[str, Callable[[Inputs], Iteration]] = {
    "scikit-learn": _scikit_learn,
    "faiss-cpu": _faiss,
    "fastkmeans": _fastkmeans,
    "fast-pytorch-kmeans": _fast_pytorch_kmeans,
    "flash-kmeans": _flash_kmeans,
}
