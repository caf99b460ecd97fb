"""The between-sample structures of the batch that all processes hold together (``--gather_features``).

N samples are spread over W processes, B_r on process r. Everything that compares samples is read off Gamma = Z Z^T
(``fsd_kernels.gram``), which is a sum over the F = S * D columns of the features. So process r takes the columns of the
positions r, r + W, r + 2 W, ... of all N samples, forms Gamma of these, and the W matrices are added up:

    h_r [B_r, F]  --all to all-->  its columns [N, F / W]  --gram-->  Gamma_r  --all reduce-->  Gamma = sum_r Gamma_r

No process ever holds all features: it gets as many numbers as it gives, N F / W = B F. The memories are in every
process already; each reads the same columns of them. In the backward pass the columns of the gradient return to their
owners.

Values are those of the joined batch, in every process. Gradients are W times those of the joined batch's loss, since
what wraps the module (DistributedDataParallel, DeepSpeed) takes the mean over the processes of the gradients, in which
each process has the part of its own samples and columns. ``sent_bytes`` counts what is sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fsd_fast.distributed import Collectives, exchange_integers
from fsd_kernels import GramBasis, InterStructure, gram, inter_structure, structure


class Gathers:
    """A loss that can compare the samples of all processes.

    Attributes:
        gather: Whether it does; ``gather_features`` sets it.
    """

    gather = False


def gather_features(module: nn.Module) -> None:
    """Let the losses in a module go over the samples of all processes.

    Args:
        module: Any module; the structure losses among its submodules are switched, others left as they are.
    """
    for each in module.modules():
        if isinstance(each, Gathers):
            each.gather = True


def gathers(module: nn.Module) -> bool:
    """Whether a loss in a module goes over the samples of all processes."""
    return any(isinstance(each, Gathers) and each.gather for each in module.modules())


class _ExchangePositions(torch.autograd.Function):
    """[B, S, D] of this process's samples -> [N, S / W, D], its positions of all samples; gradients go back."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, batches: list[int]) -> Tensor:
        world, own = len(batches), features.shape[0]
        ctx.batches = batches
        sent = features.unflatten(1, (-1, world)).movedim(2, 0).flatten(0, 1).contiguous()
        received = features.new_empty(sum(batches), *sent.shape[1:])
        dist.all_to_all_single(received, sent, batches, [own] * world)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), world, own = gradients, len(ctx.batches), ctx.batches[dist.get_rank()]
        received = gradient.new_empty(world * own, *gradient.shape[1:])
        dist.all_to_all_single(received, gradient.contiguous(), [own] * world, ctx.batches)
        return received.unflatten(0, (world, own)).movedim(0, 2).flatten(1, 2), None


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over the processes.

    Its gradient is that of the sum of the processes' losses. These are equal, so it is W times the own gradient and
    nothing is sent.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * dist.get_world_size()


@torch.compiler.disable
def mean_over_processes(means: Tensor, samples: int) -> Tensor:
    """The mean over the joined batch of a mean over each process's own samples.

    Args:
        means: Any shape; differentiable.
        samples: Over how many samples this process took them.
    """
    if Collectives().world_size == 1:
        return means
    total = sum(batch for (batch,) in exchange_integers(samples))
    return _SumOverProcesses.apply(means * (samples / max(total, 1)))


@torch.compiler.disable
def joined_inter_structure(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor | None = None,
    teacher_memory: GramBasis | None = None,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> InterStructure:
    """L_L, F_MM, F^E and F^C of the joined batch; all processes call it together.

    Arguments are as for ``fsd_kernels.inter_structure``, but features are [B, S, D] and the teacher's memory is the
    basis of its ``own_positions``. B and S may differ between the processes; shorter samples end in zeros.
    """
    if Collectives().world_size == 1:
        return inter_structure(student, teacher, student_memory, teacher_memory, mask, backend=backend)
    own, given = gammas(student, teacher, student_memory, teacher_memory, mask, backend=backend, gather=True)
    result = structure(own, given, 0 if student_memory is None else len(student_memory), backend=backend)
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return InterStructure(*(value.to(dtype) for value in result))


def gammas(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor | None = None,
    teacher_memory: GramBasis | None = None,
    mask: Tensor | None = None,
    *,
    backend: str | None,
    gather: bool,
) -> tuple[Tensor, Tensor]:
    """Gamma of the student, differentiable, and of the teacher, in one dtype; see ``fsd_kernels.gram``.

    Arguments are as for ``joined_inter_structure``. With ``gather`` both are those of the joined batch, and all
    processes call it together.
    """
    if gather and Collectives().world_size > 1:
        return _joined_gammas(student, teacher, student_memory, teacher_memory, mask, backend)
    own = gram(student, student_memory, mask, backend=backend)
    given = gram(teacher.detach(), teacher_memory, mask, backend=backend)
    return own, given.to(own.dtype)


@torch.compiler.disable
def _joined_gammas(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor | None,
    teacher_memory: GramBasis | None,
    mask: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    sizes = exchange_integers(*student.shape[:2])
    batches, length = [batch for batch, _ in sizes], max(rows for _, rows in sizes)
    memory = None if student_memory is None else own_positions(student_memory, student.shape[2])
    own = gram(_exchanged(student, mask, batches, length), memory, backend=backend)
    with torch.no_grad():
        given = gram(_exchanged(teacher.detach(), mask, batches, length), teacher_memory, backend=backend)
    total = _SumOverProcesses.apply(torch.stack([own, given.to(own.dtype)]))
    return total[0], total[1].detach()


def own_positions(memory: Tensor, hidden_size: int) -> Tensor:
    """The columns of this process's positions of a memory [K, S * D], as [K, ceil(S / W) * D].

    The same whatever length a batch has: shorter features end in zeros at the end of these columns too.
    """
    world = Collectives().world_size
    if world == 1:
        return memory
    positions = _whole_rounds(memory.unflatten(1, (-1, hidden_size)), world)
    return positions[:, dist.get_rank() :: world].flatten(1)


def _exchanged(features: Tensor, mask: Tensor | None, batches: list[int], length: int) -> Tensor:
    """This process's positions of all samples, flattened; dropped ones, and those beyond a sample's end, are 0."""
    if mask is not None:
        features = features.masked_fill(~mask.bool().unsqueeze(-1), 0.0)
    features = nn.functional.pad(features, (0, 0, 0, length - features.shape[1]))
    return _ExchangePositions.apply(_whole_rounds(features, len(batches)), batches).flatten(1)


def _whole_rounds(rows: Tensor, world: int) -> Tensor:
    """Rows [n, S, D] with S filled up with zeros to a multiple of the number of processes."""
    return nn.functional.pad(rows, (0, 0, 0, -rows.shape[1] % world))


def sent_bytes(
    batch: int, widths: Iterable[int], processes: int, centroids: int = 0, element_size: int = 4
) -> int:
    """Bytes that one process sends in the forward and backward pass of one pair of layers.

    Args:
        batch: Samples B of each process.
        widths: F = S * D of the student and of the teacher.
        processes: W.
        centroids: K; 0 without memories.
        element_size: Bytes of a feature.
    """
    student, teacher = widths
    exchanged = batch * (2 * student + teacher) * element_size * (processes - 1) // processes
    side = processes * batch + 1 + (centroids + 1 if centroids else 0)
    # A ring sends every entry twice, but for the part that a process ends up with.
    return exchanged + 2 * 2 * side * side * 8 * (processes - 1) // processes
