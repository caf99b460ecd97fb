"""The losses L_I, L_L, L_G and their sum as ops, and the products of L_I as a bound on its time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.speed import baselines, inputs, peers
from benchmarks.speed.compilation import compiled
from benchmarks.speed.contenders import Contender, LossContender
from benchmarks.speed.harness import Timed
from benchmarks.speed.inputs import Inputs, Sizes
from benchmarks.speed.ops import Bound, Build, Op, Provider, cost_shape, on_gpu
from fsd_fast.losses import (
    FeatureStructureLoss,
    GlobalInterFeatureLoss,
    IntraFeatureLoss,
    LocalInterFeatureLoss,
)
from fsd_kernels import cost
from fsd_kernels.intra_cka.eager import pieces

DIFFERENTIABLE = ("student", "student_memory")

LossMaker = Callable[[str], Callable[[Inputs], Tensor]]
BaselineMaker = Callable[[baselines.Cka], Callable[[Inputs], Tensor]]

# Beyond this many minimal flops the reference in float64 takes longer than everything that is timed. Its Euclidean
# distances are slow, since they are not computed as products. The paper's shapes are always judged as they are.
_GATE_FLOPS, _GATE_FLOPS_DISTANCES = 60e9, 1e9


def _gate_sizes(op: str, always: list[Sizes]) -> Callable[[Sizes], Sizes]:
    """Halve the tokens until the reference can judge; keep samples and centroids, and the cases in ``always``."""
    limit = _GATE_FLOPS_DISTANCES if op in ("global", "fsd_ilg") else _GATE_FLOPS

    def smaller(sizes: Sizes) -> Sizes:
        while sizes.rows > 8 and sizes not in always:
            if cost.total(cost.minimum(op, cost_shape(sizes))).flops <= limit:
                break
            sizes = sizes._replace(rows=sizes.rows // 2)
        return sizes

    return smaller


class IntraProducts:
    """The matrix products of L_I alone, as the CPU path computes them: a triangle of both Grams, and G Y."""

    def __init__(self, tensors: Inputs, sizes: Sizes) -> None:
        self.sides = tensors["teacher"], tensors["student"]
        self.gradient = self.sides[1].new_ones((sizes.batch, sizes.rows, sizes.rows))

    def _forward(self, _: object) -> list[Tensor]:
        return [
            torch.bmm(x[samples, : strip.stop], x[samples, strip].mT)
            for x in self.sides
            for samples, strip in pieces(x)
        ]

    def _backward(self, _: object) -> Tensor:
        return torch.bmm(self.gradient, self.sides[1])

    def _full(self, _: object) -> Tensor:
        self._forward(None)
        return self._backward(None)

    def timed(self, mode: str) -> Timed:
        """Return the call to time in "forward", "backward" or "full"."""
        calls: dict[str, Callable[[object], object]] = {
            "forward": self._forward,
            "backward": self._backward,
            "full": self._full,
        }
        return Timed(lambda: None, calls[mode])


def _intra(backend: str) -> Callable[[Inputs], Tensor]:
    module = IntraFeatureLoss(backend=backend)
    return lambda tensors: module(tensors["student"], tensors["teacher"])


def _local(backend: str) -> Callable[[Inputs], Tensor]:
    module = LocalInterFeatureLoss(backend=backend)
    return lambda tensors: module(tensors["student"], tensors["teacher"])


def _global(backend: str) -> Callable[[Inputs], Tensor]:
    module = GlobalInterFeatureLoss(baselines.GAMMA_M, backend=backend)
    names = ("student", "student_memory", "teacher", "teacher_memory")
    return lambda tensors: module(*(tensors[name] for name in names)).loss


def structures_loss(
    method: str, backend: str, alpha: float = 0.5, temperature: float = 10.0
) -> FeatureStructureLoss:
    """The project's loss of a method, with the weights of the baselines."""
    return FeatureStructureLoss(
        method,
        alpha=alpha,
        temperature=temperature,
        beta=1.0,
        gamma_i=baselines.GAMMA_I,
        gamma_l=baselines.GAMMA_L,
        gamma_g=baselines.GAMMA_G,
        gamma_m=baselines.GAMMA_M,
        backend=backend,
    )


def _fsd_ilg(backend: str) -> Callable[[Inputs], Tensor]:
    module = structures_loss("fsd_ilg", backend)

    def loss(tensors: Inputs) -> Tensor:
        student, teacher = tensors["student"], tensors["teacher"]
        logits = student.new_zeros((len(student), 2))
        labels = torch.zeros(len(student), dtype=torch.int64, device=student.device)
        output = module(
            logits,
            logits,
            labels,
            student,
            teacher,
            student_penultimate=student,
            teacher_penultimate=teacher,
            student_memory=tensors["student_memory"],
            teacher_memory=tensors["teacher_memory"],
        )
        # The structures alone: the logits are constants.
        value: Tensor = output.loss - output.components["loss_vkd"]
        return value

    return loss


def _contender(loss: Callable[[], Callable[[Inputs], Tensor]]) -> Build:
    return lambda tensors, _: LossContender(loss(), tensors, DIFFERENTIABLE)


def _with_offset(build: Build) -> Build:
    """Add one vector, with three times the features' energy, to all features: CKA does not change, its cost may."""

    def built(tensors: Inputs, sizes: Sizes) -> Contender:
        shifted = dict(tensors)
        for name in ("student", "teacher"):
            features = tensors[name]
            common = torch.randn(features.shape[-1], generator=torch.Generator().manual_seed(0))
            shifted[name] = features + (3**0.5 * features.std() * common.to(features))
        return build(shifted, sizes)

    return built


def _providers(op: str, ours: LossMaker, baseline: BaselineMaker) -> dict[str, Provider]:
    plain = baseline(baselines.plain_cka)
    # One function for all contenders, so that it is compiled once for each shape.
    plain_compiled = compiled(plain)
    providers = {
        "ours": Provider(_contender(lambda: ours("auto")), ours=True, note="eager on a CPU, Triton on a GPU"),
        "ours-eager": Provider(
            on_gpu(_contender(lambda: ours("eager")), "on a CPU it is what 'ours' runs"), ours=True
        ),
        "reference": Provider(_contender(lambda: ours("reference")), note="the formula as it reads"),
        "released": Provider(
            _contender(lambda: baseline(baselines.released_cka)),
            note="six Grams per CKA, centring by products",
        ),
        "plain": Provider(_contender(lambda: plain), note="batched torch, two Grams, autograd"),
        "compiled": Provider(_contender(lambda: plain_compiled), note="torch.compile of plain"),
    }
    if op in ("intra", "local"):
        providers["ours-offset"] = Provider(
            _with_offset(providers["ours"].build), ours=True, note="ours where features must be centred first"
        )
        for name, (estimator, build) in peers.cka_peers(op).items():
            providers[name] = Provider(_contender(build), truth=estimator, note=f"peer, {estimator} CKA")
    return providers


def _shapes(centroids: tuple[int, ...]) -> dict[str, list[Sizes]]:
    """The paper's shapes, a small one for the tests, and shapes that differ from the first one in one size."""
    base = Sizes(32, 128, 768, 100)
    paper = [base._replace(width=width) for width in (768, 384)]
    if centroids:
        paper = [sizes._replace(centroids=k) for sizes in paper for k in centroids]
    growth = [base._replace(batch=batch) for batch in (8, 16, 32, 64, 128, 256)]
    growth += [base._replace(rows=rows) for rows in (32, 64, 256, 512)]
    growth += [base._replace(width=width) for width in (256, 512, 1024)]
    if centroids:
        growth += [base._replace(centroids=k) for k in (50, 200, 300, 500, 1000)]
    return {"paper": paper, "small": [Sizes(8, 16, 32, 6)], "growth": growth}


def _op(
    name: str, title: str, ours: LossMaker, baseline: BaselineMaker, centroids: tuple[int, ...] = ()
) -> Op:
    """A loss as an op; ``centroids`` are the K of its paper shapes, empty where it has no memories."""
    shapes = _shapes(centroids)
    truths: dict[str, Build] = {"biased": _contender(lambda: ours("reference"))}
    if name in ("intra", "local"):
        truths["unbiased"] = _contender(lambda: baseline(baselines.unbiased_cka))
    bounds = {"products": Bound(IntraProducts, "its three products alone: no loss")}
    return Op(
        name,
        title,
        ("batch", "rows", "width", "centroids") if centroids else ("batch", "rows", "width"),
        inputs.with_memories if centroids else inputs.features,
        truths,
        _providers(name, ours, baseline),
        shapes,
        name,
        bounds=bounds if name == "intra" else {},
        gate_sizes=_gate_sizes(name, shapes["paper"]),
    )


def loss_ops() -> list[Op]:
    """The ops "intra", "local", "global" and "fsd_ilg"."""
    return [
        _op("intra", "L_I, intra-feature CKA", _intra, baselines.intra),
        _op("local", "L_L, local inter-feature CKA", _local, baselines.local),
        _op("global", "L_G, global inter-feature structure", _global, baselines.global_, (100, 300)),
        _op("fsd_ilg", "L_I, L_L and L_G together", _fsd_ilg, baselines.fsd_ilg, (100,)),
    ]
