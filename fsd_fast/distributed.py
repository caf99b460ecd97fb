"""Reductions over the processes of ``torch.distributed``; with one process each of them is the identity.

Every process must make the same calls in the same order. ``run_on_all_ranks`` keeps it that way when one of them
fails: an error in one process becomes an error in all, instead of a collective that waits for ever.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another process failed, and that process says why."""


class Collectives:
    """The processes that share a computation: all of the process group, or this one where there is none."""

    def __init__(self) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.world_size: int = dist.get_world_size() if joined else 1
        self.rank: int = dist.get_rank() if joined else 0

    def _staged(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` contiguous and on a device that the process group's backend can reach."""
        on_gpu = "nccl" in dist.get_backend()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        return tensor.to(device).contiguous()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its sum over the processes."""
        if self.world_size > 1:
            staged = self._staged(tensor)
            dist.all_reduce(staged)
            tensor.copy_(staged)
        return tensor

    def broadcast_(self, tensor: Tensor, rank: int = 0) -> Tensor:
        """Replace ``tensor`` by the one of process ``rank``."""
        if self.world_size > 1:
            staged = self._staged(tensor)
            dist.broadcast(staged, rank)
            tensor.copy_(staged)
        return tensor

    def broadcast_json(self, value: Any) -> Any:
        """Return the first process's value, made of what JSON can hold."""
        if self.world_size == 1:
            return value
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        [length, *_] = self.gather_sizes(text.shape[0])
        if self.rank:
            text = torch.empty(length, dtype=torch.uint8)
        return json.loads(bytes(self.broadcast_(text).tolist()))

    def gather_sizes(self, size: int) -> list[int]:
        """Return ``size`` of every process, in the order of their ranks."""
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = size
        return [int(value) for value in self.sum_(sizes)]

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenate ``[n_r, ...]`` over the processes, in the order of their ranks; ``n_r`` may differ."""
        return rows if self.world_size == 1 else torch.cat(list(self._shards(rows)))

    def gather_rows_to_first(self, rows: Tensor) -> Tensor | None:
        """Like ``gather_rows``, for the first process only: None on the others, which hold a shard at a time."""
        if self.world_size == 1:
            return rows
        shards = [shard for shard in self._shards(rows) if self.rank == 0]
        return torch.cat(shards) if shards else None

    def _shards(self, rows: Tensor) -> Iterator[Tensor]:
        for rank, size in enumerate(self.gather_sizes(rows.shape[0])):
            shard = rows.clone() if rank == self.rank else rows.new_empty(size, *rows.shape[1:])
            yield self.broadcast_(shard, rank)

    def run_on_all_ranks(self, stage: Callable[[], T]) -> T:
        """Run ``stage``, which makes no collective call, in every process; raise in all if it raised in one.

        Raises:
            Exception: What ``stage`` raised here.
            PeerError: It raised in another process.
        """
        error: Exception | None = None
        result: T | None = None
        try:
            result = stage()
        except Exception as caught:
            error = caught
        failed = [rank for rank, flag in enumerate(self.gather_sizes(int(error is not None))) if flag]
        if error is not None:
            raise error
        if failed:
            raise PeerError(f"stopped because process {failed[0]} of {self.world_size} failed; see its error")
        return result  # type: ignore[return-value]


def exchange_integers(*values: int) -> list[tuple[int, ...]]:
    """Give every process all processes' integers, in the order of their ranks, without waiting for a GPU."""
    group = _cpu_group()
    if group is None:
        return [values]
    own = torch.tensor(values, dtype=torch.int64)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own, group=group)
    return [tuple(each.tolist()) for each in found]


_cpu_groups: dict[Any, Any] = {}


def _cpu_group() -> Any:
    """All processes, communicating through the CPU; None where there is one alone. All call it together at first."""
    if Collectives().world_size == 1:
        return None
    world = dist.group.WORLD
    if world not in _cpu_groups:
        _cpu_groups.clear()  # what belonged to a process group that was left
        _cpu_groups[world] = dist.new_group(backend="gloo")
    return _cpu_groups[world]


class LateAny:
    """Tells whether a flag is set in any process, one call late, so that nobody waits for the others or for a GPU.

    All processes get the same answer to the same call. The flags travel through the CPU, whatever else the processes
    communicate through.
    """

    def __init__(self) -> None:
        self._group = _cpu_group()
        self._flag = torch.zeros((), dtype=torch.int32)
        self._work: Any = None

    def exchange(self, flag: bool) -> bool:
        """Give this process's flag; return whether any process gave a set one in the call before this.

        With one process the answer is its own flag, at once.
        """
        if self._group is None:
            return flag
        found = self.finish()
        self._flag.fill_(int(flag))
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return found

    def finish(self) -> bool:
        """Wait for the exchange that is under way, and return its answer."""
        if self._work is None:
            return False
        self._work.wait()
        self._work = None
        return bool(self._flag)


def leave_processes() -> bool:
    """Leave the process group, if this process is in one, at the end of its work; tell whether it had others in it."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    several = dist.get_world_size() > 1
    dist.destroy_process_group()
    return several


def end_process() -> NoReturn:
    """End a process of several, whose work is done, with status 0: its exit handlers run, and nothing after them.

    Threads of communication libraries may still run while an interpreter ends, also once the group is left. Now and
    then that aborts a process whose work is done, and the launcher would report a failed run.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
