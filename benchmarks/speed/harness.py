"""Timing: providers in turn within one run, ratios pair by pair, ceilings and a contention canary from the same run.

    round 1:  canary A B C    round 2:  canary B C A    ...

A sample of a provider is one timed call (or the mean of a few, where a call is short), after one that is not timed:
otherwise a provider would pay for what the one before it left behind, such as a heap that has been given back to the
system, where a gradient's 3,000 new pages cost as much as its arithmetic. The ratio of B to A is taken
round by round, b_1 / a_1, b_2 / a_2, ..., so that a slow moment of the machine falls on both. Medians stand for
the middle, the quartiles for the spread.

The canary is a fixed matrix product timed at the start of every round. Where its times spread, or where the
process did not get the processor time it asked for, something else was running: the rows are marked. It is also the
product rate that a round's times are held against, so that a slow moment falls on both there too.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A canary whose quartiles are further apart than this, against its median, or that got less than this share of
# the processor, means a noisy run.
CANARY_SPREAD = 0.10
CANARY_SHARE = 0.90

# A call that takes longer than so many seconds is warmed up by one call, and no untimed one precedes it later, against
# which that debt is small.
_LONG = 0.5

# 2.4 GFLOP: as many as L_I has at the paper's shape.
_CANARY_SIZE = 1064
_L2_FLUSH_BYTES = 2 << 30
# Before every call a GPU is kept busy so long (and its cache emptied): the CPU then enqueues the call ahead of it, as
# in a training step, and what is timed is what the GPU does.
_AHEAD = 4e-3

# The profiler that ``peak_memory`` reads would write four lines of its own for every call.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


class Timed(NamedTuple):
    """One thing to time: ``call(setup())``, of which only the call counts."""

    setup: Callable[[], Any]
    call: Callable[[Any], object]


class Spread(NamedTuple):
    """Median and quartiles of a list of samples."""

    median: float
    low: float
    high: float

    @property
    def relative(self) -> float:
        """Distance of the quartiles against the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def spread(samples: Sequence[float]) -> Spread:
    """Return the median and the quartiles of at least one sample."""
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(middle, low, high)


def ratio(slower: Sequence[float], faster: Sequence[float]) -> Spread:
    """Median and quartiles of slower_i / faster_i, round by round.

    Raises:
        ValueError: The two were not timed in the same rounds.
    """
    if len(slower) != len(faster):
        raise ValueError(f"faster: expected {len(slower)} samples like the slower, got {len(faster)}")
    return spread([a / b for a, b in zip(slower, faster, strict=True)])


@dataclass(frozen=True)
class Canary:
    """The fixed product's times and the share of the processor that it got, one per round."""

    seconds: Sequence[float] = ()
    shares: Sequence[float] = ()
    flops: int = 0
    """Of the product."""

    def percent(self, flops: int, seconds: Sequence[float]) -> float:
        """Median percentage that so many flops in these times, one per round, are of the product's rate."""
        rates = [flops / own / (self.flops / each) for own, each in zip(seconds, self.seconds, strict=True)]
        return 100 * statistics.median(rates)

    @property
    def noisy(self) -> bool:
        """Whether something else ran on the machine."""
        if not self.seconds:
            return False
        return self.spread > CANARY_SPREAD or self.share < CANARY_SHARE

    @property
    def spread(self) -> float:
        """Relative distance of the quartiles of its times."""
        return spread(self.seconds).relative if self.seconds else 0.0

    @property
    def share(self) -> float:
        """Median share of the processor time it asked for."""
        return statistics.median(self.shares) if self.shares else 1.0


@dataclass(frozen=True)
class Measurement:
    """Samples in seconds by provider, all from the same rounds."""

    samples: Mapping[str, list[float]]
    canary: Canary = field(default_factory=Canary)
    host: Mapping[str, list[float]] = field(default_factory=dict)
    """On a GPU, the seconds that the CPU took to enqueue them."""


class CpuClock:
    """Wall-clock time of calls that run on the CPU."""

    shortest = 5e-3
    """Seconds that a sample lasts at least, by repeating its call."""

    canary_flops = 2 * _CANARY_SIZE**3

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._a = torch.randn(_CANARY_SIZE, _CANARY_SIZE, generator=generator)
        self._out = torch.empty_like(self._a)

    def time(self, timed: Timed, repeats: int) -> float:
        """Return the mean time of ``repeats`` calls."""
        elapsed = 0.0
        for _ in range(repeats):
            state = timed.setup()
            start = time.perf_counter()
            result = timed.call(state)
            elapsed += time.perf_counter() - start
            del result, state
        return elapsed / repeats

    def canary(self) -> tuple[float, float]:
        """Time the fixed product; returns (seconds, share of the processor it got)."""
        torch.mm(self._a, self._a, out=self._out)
        start, busy = time.perf_counter(), time.process_time()
        for _ in range(2):
            torch.mm(self._a, self._a, out=self._out)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        return seconds / 2, busy / (seconds * torch.get_num_threads())


class CudaClock:
    """Time between two events on the current stream, with a cold L2 cache and the CPU ahead before every call.

    ``host`` is the time that the CPU took to enqueue a call of the last sample: what limits where it exceeds the GPU's.
    """

    shortest = 5e-4

    canary_flops = 2 * (4 * _CANARY_SIZE) ** 3

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator(device).manual_seed(0)
        size = 4 * _CANARY_SIZE
        self._a = torch.randn(size, size, generator=generator, device=device).to(dtype)
        self._flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.uint8, device=device)
        self._flushes = 1
        self.host = 0.0
        nothing = Timed(lambda: None, lambda _: self._flush.zero_())
        self.time(nothing, 1)
        self._flushes = max(1, round(_AHEAD / self.time(nothing, 5)))

    def time(self, timed: Timed, repeats: int) -> float:
        """Return the mean time of ``repeats`` calls."""
        events = []
        self.host = 0.0
        for _ in range(repeats):
            state = timed.setup()
            for _ in range(self._flushes):
                self._flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            begin = time.perf_counter()
            timed.call(state)
            self.host += (time.perf_counter() - begin) / repeats
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / (1e3 * repeats)

    def canary(self) -> tuple[float, float]:
        """Time the fixed product; a GPU's share cannot be seen from inside and counts as 1."""
        return self.time(Timed(lambda: None, lambda _: self._a @ self._a), 2), 1.0


Clock = CpuClock | CudaClock


def make_clock(device: torch.device, dtype: torch.dtype = torch.float32) -> Clock:
    """Return the clock of a device; a GPU's canary is a product in ``dtype``."""
    return CudaClock(device, dtype) if device.type == "cuda" else CpuClock()


def measure(
    contestants: Mapping[str, Sequence[Timed]],
    clock: Clock,
    *,
    seconds: float = 6.0,
    min_rounds: int = 5,
    max_rounds: int = 40,
) -> Measurement:
    """Time the contestants in turn, round after round.

    Args:
        contestants: By name, the same work on one or more sets of inputs; rounds walk through the sets.
        clock: Of the device.
        seconds: Rounds go on until this much time has been spent or ``max_rounds`` are done.
        min_rounds: Rounds in any case.
        max_rounds: Rounds at most.

    Returns:
        As many samples for each contestant as there were rounds; the warm-up is not among them.
    """
    repeats: dict[str, int] = {}
    long: set[str] = set()
    for name, sets in contestants.items():
        first = [clock.time(timed, 1) for timed in sets]
        if first[-1] <= _LONG:
            first.append(clock.time(sets[0], 1))
        repeats[name] = max(1, min(50, round(clock.shortest / max(first[-1], 1e-7))))
        if first[-1] > _LONG:
            long.add(name)
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    host: dict[str, list[float]] = {}
    canary_seconds: list[float] = []
    canary_shares: list[float] = []
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for round_ in range(max_rounds):
            if round_ >= min_rounds and time.perf_counter() - begin > seconds:
                break
            second, share = clock.canary()
            canary_seconds.append(second)
            canary_shares.append(share)
            # Each comes first, and after each other one, in its turn.
            first_one = round_ % max(1, len(names))
            for name in names[first_one:] + names[:first_one]:
                sets = contestants[name]
                timed = sets[round_ % len(sets)]
                if name not in long:
                    clock.time(timed, 1)
                samples[name].append(clock.time(timed, repeats[name]))
                if isinstance(clock, CudaClock):
                    host.setdefault(name, []).append(clock.host)
    finally:
        if collecting:
            gc.enable()
    return Measurement(samples, Canary(canary_seconds, canary_shares, clock.canary_flops), host)


class Ceilings(NamedTuple):
    """What the machine itself reached in this run."""

    matmul: float
    """Flops per second of a large square product."""
    copy: float
    """Bytes per second, read and written, of a large copy."""


def ceilings(
    device: torch.device, clock: Clock, size: int | None = None, dtype: torch.dtype = torch.float32
) -> Ceilings:
    """Measure the matrix-product rate and the copy bandwidth of a device; the best of several tries."""
    large = device.type == "cuda"
    size = size or (8192 if large else 2048)
    # A GPU's clock depends on the numbers that it multiplies.
    a = torch.randn(size, size, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    out = torch.empty_like(a)
    product = Timed(lambda: None, lambda _: torch.mm(a, a, out=out))
    source = torch.ones(
        (1 << 30 if large else 1 << 27) if size >= 2048 else size * size, dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    copy = Timed(lambda: None, lambda _: target.copy_(source))
    clock.time(product, 1), clock.time(copy, 1)
    return Ceilings(
        2 * size**3 / min(clock.time(product, 1) for _ in range(5)),
        2 * source.numel() / min(clock.time(copy, 1) for _ in range(5)),
    )


def peak_memory(timed: Timed, device: torch.device) -> int:
    """Bytes that a call holds at most, beyond what was there before it; its results count.

    On the CPU from the events that torch's allocator reports to the profiler; memory that others allocate (NumPy,
    faiss, a BLAS's own buffers) is not seen. On a GPU from the caching allocator's statistics.
    """
    state = timed.setup()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        timed.call(state)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        result = timed.call(state)
    kineto = profiler.profiler.kineto_results if profiler.profiler is not None else None
    if kineto is None:
        raise RuntimeError("the profiler returned no events")
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
