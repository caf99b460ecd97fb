"""What is measured: ops, their shapes, their providers and their modes.

An op names its truth (the reference, run in float64), its minimal cost (``fsd_kernels.cost``) and its providers.
A provider turns a set of inputs into a contender, or raises ``Unavailable`` with the reason.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.speed import baselines, inputs, peers, step
from benchmarks.speed.contenders import MODES, Contender, LossContender, ValueContender
from benchmarks.speed.harness import Timed
from benchmarks.speed.inputs import Inputs, Sizes
from benchmarks.speed.peers import Unavailable
from fsd_fast.losses import (
    FeatureStructureLoss,
    GlobalInterFeatureLoss,
    IntraFeatureLoss,
    LocalInterFeatureLoss,
)
from fsd_kernels import cost, nearest, update
from fsd_kernels.intra_cka.eager import pieces

Build = Callable[[Inputs, Sizes], Contender]

DIFFERENTIABLE = ("student", "student_memory")


@dataclass(frozen=True)
class Provider:
    """An implementation under test."""

    build: Build
    truth: str = "biased"
    """Which of the op's truths it is judged by."""
    ours: bool = False
    """Whether the project's own, stricter limit holds."""
    note: str = ""
    memory: bool = True
    """Whether its memory is torch's, which the harness sees."""


@dataclass(frozen=True)
class Bound:
    """Part of an op's work, timed in the same rounds as its providers."""

    build: Callable[[Inputs, Sizes], IntraProducts]
    note: str


@dataclass(frozen=True)
class Op:
    """One thing to measure."""

    name: str
    title: str
    letters: tuple[str, ...]
    """The sizes that a case of it has."""
    make_inputs: Callable[[Sizes, int, bool], Inputs]
    """Of sizes, seed and whether features have outlier dimensions."""
    truths: dict[str, Build]
    """By name; run on float64 inputs."""
    providers: dict[str, Provider]
    shapes: dict[str, list[Sizes]]
    cost_name: str | None
    """Its name in ``fsd_kernels.cost``; None where no minimum is stated."""
    modes: tuple[str, ...] = MODES
    bounds: dict[str, Bound] = field(default_factory=dict)
    """Parts of the CPU path's work by name, timed on a CPU; they compute no loss that the gate could judge."""
    discrete: bool = False
    """Whether its value depends on choices between what may be equal up to rounding."""
    gate_sizes: Callable[[Sizes], Sizes] = field(default=lambda sizes: sizes)
    """The sizes at which the gate judges, where those of the case would take float64 too long."""

    def minimum(self, sizes: Sizes, mode: str, dtype: torch.dtype) -> cost.Cost | None:
        """Minimal bytes and flops of a mode."""
        if self.cost_name is None:
            return None
        shape = cost.Shape(
            batch=sizes.batch,
            rows=sizes.rows,
            width=sizes.width,
            centroids=sizes.centroids,
            points=sizes.points,
            dtype=dtype,
        )
        stages = cost.minimum(self.cost_name, shape)
        return stages[mode] if mode in stages else cost.total(stages)


# What torch.compile may take for a case, its run included; the first one of a process takes half a minute.
_COMPILE_SECONDS = 90.0
# How many shapes one function is compiled for; beyond torch's own number it would run uncompiled, and not say so.
_COMPILED_SHAPES = 256

# Beyond this many flops of the minimum the reference in float64 takes longer than all that is timed; its Euclidean
# distances, which are not products, are what is slow. The paper's shapes are judged as they are.
_GATE_FLOPS, _GATE_FLOPS_DISTANCES = 60e9, 1e9


def _smaller(op: str, whole: list[Sizes]) -> Callable[[Sizes], Sizes]:
    """Fewer tokens, and so fewer features, until the reference can judge; samples and centroids stay."""
    limit = _GATE_FLOPS_DISTANCES if op in ("global", "fsd_ilg") else _GATE_FLOPS

    def sizes_of(sizes: Sizes) -> Sizes:
        while sizes.rows > 8 and sizes not in whole:
            shape = cost.Shape(
                sizes.batch, sizes.rows, sizes.width, centroids=sizes.centroids, points=sizes.points
            )
            if cost.total(cost.minimum(op, shape)).flops <= limit:
                break
            sizes = sizes._replace(rows=sizes.rows // 2)
        return sizes

    return sizes_of


# ---------------------------------------------------------------------------------------------- losses

LossMaker = Callable[[str], Callable[[Inputs], Tensor]]


class IntraProducts:
    """The matrix products of L_I alone, as the CPU path multiplies them: both Grams, a triangle of each, and G Y."""

    def __init__(self, tensors: Inputs, sizes: Sizes) -> None:
        self.sides = tensors["teacher"], tensors["student"]
        self.gradient = self.sides[1].new_ones((sizes.batch, sizes.rows, sizes.rows))

    def _forward(self, _: None) -> list[Tensor]:
        return [
            torch.bmm(x[samples, : strip.stop], x[samples, strip].mT)
            for x in self.sides
            for samples, strip in pieces(x)
        ]

    def _backward(self, _: None) -> Tensor:
        return torch.bmm(self.gradient, self.sides[1])

    def _full(self, _: None) -> Tensor:
        self._forward(None)
        return self._backward(None)

    def timed(self, mode: str) -> Timed:
        """Return what to time in "forward", "backward" or "full"."""
        return Timed(
            lambda: None, {"forward": self._forward, "backward": self._backward}.get(mode, self._full)
        )


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


def _fsd_ilg(backend: str) -> Callable[[Inputs], Tensor]:
    module = FeatureStructureLoss(
        "fsd_ilg",
        beta=1.0,
        gamma_i=baselines.GAMMA_I,
        gamma_l=baselines.GAMMA_L,
        gamma_g=baselines.GAMMA_G,
        gamma_m=baselines.GAMMA_M,
        backend=backend,
    )

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
    """The same on features that all have one vector in common, which CKA does not see, of three times their energy."""

    def built(tensors: Inputs, sizes: Sizes) -> Contender:
        shifted = dict(tensors)
        for name in ("student", "teacher"):
            features = tensors[name]
            common = torch.randn(features.shape[-1], generator=torch.Generator().manual_seed(0))
            shifted[name] = features + (3**0.5 * features.std() * common.to(features))
        return build(shifted, sizes)

    return built


class _TimeUp(BaseException):
    """Not an Exception: a compiler that catches those must not take it for an error of its own."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise ``_TimeUp`` in the main thread where the block takes longer."""

    def stop(*_: object) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _compiled(loss: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    compiled: Callable[[Inputs], Tensor] = torch.compile(loss, dynamic=False)

    def run(tensors: Inputs) -> Tensor:
        limits = {"recompile_limit": _COMPILED_SHAPES, "accumulated_recompile_limit": _COMPILED_SHAPES}
        try:
            with _at_most(_COMPILE_SECONDS), torch._dynamo.config.patch(limits):  # type: ignore[attr-defined]
                return compiled(tensors)
        except _TimeUp:
            raise Unavailable(f"torch.compile takes more than {_COMPILE_SECONDS:g} s") from None
        except torch._dynamo.exc.TorchDynamoException as error:
            first = str(error).strip().splitlines()[0]
            raise Unavailable(f"torch.compile fails: {first}") from error

    return run


def _on_gpu(build: Build, why: str) -> Build:
    def checked(tensors: Inputs, sizes: Sizes) -> Contender:
        if next(iter(tensors.values())).device.type != "cuda":
            raise Unavailable(why)
        return build(tensors, sizes)

    return checked


def _loss_providers(
    ours: LossMaker, baseline: Callable[[baselines.Cka], Callable[[Inputs], Tensor]], op: str
) -> dict[str, Provider]:
    plain = baseline(baselines.plain_cka)
    # One compiled function for all cases: it is compiled anew for a new shape, not for every contender.
    compiled = _compiled(plain)
    providers = {
        "ours": Provider(_contender(lambda: ours("auto")), ours=True, note="eager on a CPU, Triton on a GPU"),
        "ours-eager": Provider(
            _on_gpu(_contender(lambda: ours("eager")), "on a CPU it is what 'ours' runs"), ours=True
        ),
        "reference": Provider(_contender(lambda: ours("reference")), note="the formula as it reads"),
        "released": Provider(
            _contender(lambda: baseline(baselines.released_cka)),
            note="six Grams per CKA, centring by products",
        ),
        "plain": Provider(_contender(lambda: plain), note="batched torch, two Grams, autograd"),
        "compiled": Provider(_contender(lambda: compiled), note="torch.compile of plain"),
    }
    if op in ("intra", "local"):
        providers["ours-offset"] = Provider(
            _with_offset(providers["ours"].build), ours=True, note="ours where features must be centred first"
        )
        for name, (estimator, build) in peers.cka_peers(op).items():
            providers[name] = Provider(_contender(build), truth=estimator, note=f"peer, {estimator} CKA")
    return providers


def _loss_op(
    name: str,
    title: str,
    ours: LossMaker,
    baseline: Callable[[baselines.Cka], Callable[[Inputs], Tensor]],
    memories: bool,
) -> Op:
    paper, small, growth = _loss_shapes({"global": (100, 300), "fsd_ilg": (100,)}.get(name, ()))
    truths: dict[str, Build] = {"biased": _contender(lambda: ours("reference"))}
    if name in ("intra", "local"):
        truths["unbiased"] = _contender(lambda: baseline(baselines.unbiased_cka))
    return Op(
        name,
        title,
        ("batch", "rows", "width", "centroids") if memories else ("batch", "rows", "width"),
        inputs.with_memories if memories else inputs.features,
        truths,
        _loss_providers(ours, baseline, name),
        {"paper": paper, "small": small, "growth": growth},
        name,
        bounds={"products": Bound(IntraProducts, "its three products alone: no loss")}
        if name == "intra"
        else {},
        gate_sizes=_smaller(name, paper),
    )


def _loss_shapes(centroids: tuple[int, ...]) -> tuple[list[Sizes], list[Sizes], list[Sizes]]:
    """The paper's shapes, a small one for the tests, and those that differ from the first in one size each."""
    base = Sizes(32, 128, 768, 100)
    paper = [base._replace(width=width) for width in (768, 384)]
    if centroids:
        paper = [sizes._replace(centroids=k) for sizes in paper for k in centroids]
    small = [Sizes(8, 16, 32, 6)]
    growth = [base._replace(batch=batch) for batch in (8, 16, 32, 64, 128, 256)]
    growth += [base._replace(rows=rows) for rows in (32, 64, 256, 512)]
    growth += [base._replace(width=width) for width in (256, 512, 1024)]
    if centroids:
        growth += [base._replace(centroids=k) for k in (50, 200, 300, 500, 1000)]
    return paper, small, growth


# --------------------------------------------------------------------------------------------- k-means


def _kmeans(backend: str) -> Callable[[Inputs], Tensor]:
    def iteration(tensors: Inputs) -> Tensor:
        labels = nearest(tensors["points"], tensors["centroids"], backend=backend)
        sums, counts = update(tensors["points"], labels, len(tensors["centroids"]), backend=backend)
        return sums / counts[:, None]

    return iteration


def _value(function: Callable[[Inputs], Tensor]) -> Build:
    return lambda tensors, _: ValueContender(function, tensors)


def _peer_iteration(build: Callable[[Inputs], peers.Iteration]) -> Build:
    return lambda tensors, _: ValueContender(build(tensors), tensors)


def _kmeans_op() -> Op:
    return Op(
        "kmeans",
        "one k-means iteration: assignment and update",
        ("points", "rows", "width", "centroids"),
        inputs.points,
        {"biased": _value(_kmeans("reference"))},
        {
            "ours": Provider(_value(_kmeans("auto")), ours=True, note="eager on a CPU, Triton on a GPU"),
            "ours-eager": Provider(
                _on_gpu(_value(_kmeans("eager")), "on a CPU it is what 'ours' runs"), ours=True
            ),
            "plain": Provider(_value(baselines.lloyd_iteration), note="addmm, index_add"),
            **{
                name: Provider(
                    _peer_iteration(build), note="peer", memory=name not in ("scikit-learn", "faiss-cpu")
                )
                for name, build in peers.KMEANS_PEERS.items()
            },
        },
        {
            "paper": [Sizes(rows=128, width=768, centroids=k, points=1024) for k in (100, 300)],
            "small": [Sizes(rows=16, width=32, centroids=5, points=64)],
            "growth": [
                *(Sizes(rows=128, width=768, centroids=100, points=n) for n in (512, 1024, 2048)),
                *(Sizes(rows=128, width=768, centroids=k, points=1024) for k in (50, 200, 400)),
                *(Sizes(rows=rows, width=768, centroids=100, points=1024) for rows in (32, 64, 256)),
            ],
        },
        "kmeans",
        modes=("full",),
        discrete=True,
        gate_sizes=lambda sizes: sizes._replace(rows=min(sizes.rows, 16)),
    )


# ------------------------------------------------------------------------------------ the training step


def _training_step(method: str, backend: str, teacher_gradients: bool = False) -> Build:
    return lambda tensors, sizes: step.TrainingStep(tensors, sizes, method, teacher_gradients, backend)


def _step_op() -> Op:
    methods = ("fsd_ilg", "vkd", "fsd_i", "fsd_l", "fsd_g")
    names = {"fsd_ilg": "ours", "vkd": "vkd-only"}
    return Op(
        "step",
        "a whole training step: teacher, student, losses, optimiser",
        ("batch", "rows", "width", "centroids"),
        step.inputs,
        {method: _training_step(method, "reference") for method in methods},
        {
            **{
                names.get(method, f"ours-{method}"): Provider(
                    _training_step(method, "auto"), truth=method, note=f"method {method}", memory=False
                )
                for method in methods
            },
            "released": Provider(
                _training_step("released", "auto"),
                truth="fsd_ilg",
                note="teacher without gradients",
                memory=False,
            ),
            "released-teacher-grad": Provider(
                _training_step("released", "auto", True),
                truth="fsd_ilg",
                note="teacher with gradients, as released",
                memory=False,
            ),
        },
        {
            "paper": [Sizes(32, 128, 768, 100), Sizes(32, 128, 384, 100)],
            "small": [Sizes(4, 8, 32, 5)],
            "growth": [],
        },
        None,
        modes=("full",),
        gate_sizes=lambda sizes: Sizes(4, 8, 32, min(5, sizes.centroids)),
    )


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        _loss_op("intra", "L_I, intra-feature CKA", _intra, baselines.intra, memories=False),
        _loss_op("local", "L_L, local inter-feature CKA", _local, baselines.local, memories=False),
        _loss_op("global", "L_G, global inter-feature structure", _global, baselines.global_, memories=True),
        _loss_op("fsd_ilg", "L_I, L_L and L_G together", _fsd_ilg, baselines.fsd_ilg, memories=True),
        _kmeans_op(),
        _step_op(),
    )
}
"""Every op by name."""
