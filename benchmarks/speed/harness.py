"""Timing: providers in turn, ratios round by round, and the machine's own rates and contention from the same run.

    round 1:  canary A B C    round 2:  canary B C A    ...

A sample is one timed call, or the mean of several short ones. An untimed call comes first: without it a provider would
pay for the state that the one before it left. If the heap has been given back to the system, for example, the 3,000
new pages of a gradient cost as much as its arithmetic. The ratio of B to A is taken round by round, b_1 / a_1,
b_2 / a_2, ..., so that a slow moment of the machine affects both. Results are medians and quartiles.

The canary is a fixed matrix product, timed at the start of every round. If its times spread, or if the process got less
processor time than it asked for, something else was running; the rows of that run are marked as noisy. Product rates
are given relative to the canary of the same round, for the same reason as ratios.
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

# A run is noisy if the canary's quartiles are further apart than this part of its median, or if the canary got less
# than this share of the processor.
CANARY_SPREAD = 0.10
CANARY_SHARE = 0.90

# A call longer than this many seconds is warmed up once, and no untimed call precedes its samples: what the provider
# before it left costs little in comparison.
_LONG = 0.5

# 2.4 GFLOP, as L_I at the paper's shape.
_CANARY_SIZE = 1064
_L2_FLUSH_BYTES = 2 << 30
# Seconds for which a GPU is kept busy before every call, with writes that also empty its cache. Meanwhile the CPU
# enqueues the call, as in a training step, so that only the GPU's work is timed.
_AHEAD = 4e-3

# Without this the profiler that ``peak_memory`` uses prints four lines at every call.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


class Timed(NamedTuple):
    """One thing to time: ``call(setup())``. The setup is not timed."""

    setup: Callable[[], Any]
    call: Callable[[Any], object]


class Spread(NamedTuple):
    """Median and quartiles of a list of samples."""

    median: float
    low: float
    high: float

    @property
    def relative(self) -> float:
        """Distance between the quartiles, as a part of the median."""
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
        ValueError: The two have different numbers of rounds.
    """
    if len(slower) != len(faster):
        raise ValueError(f"faster: expected {len(slower)} samples like the slower, got {len(faster)}")
    return spread([a / b for a, b in zip(slower, faster, strict=True)])


@dataclass(frozen=True)
class Canary:
    """Times of the fixed product and the share of the processor that it got, one per round."""

    seconds: Sequence[float] = ()
    shares: Sequence[float] = ()
    flops: int = 0
    """Flops of the product."""

    def percent(self, flops: int, seconds: Sequence[float]) -> float:
        """Median over the rounds of a provider's flops per second, in percent of the product's."""
        pairs = zip(seconds, self.seconds, strict=True)
        rates = [(flops / provider) / (self.flops / canary) for provider, canary in pairs]
        return 100 * statistics.median(rates)

    @property
    def noisy(self) -> bool:
        """Whether something else was running on the machine."""
        if not self.seconds:
            return False
        return self.spread > CANARY_SPREAD or self.share < CANARY_SHARE

    @property
    def spread(self) -> float:
        """Distance between the quartiles of its times, as a part of the median."""
        return spread(self.seconds).relative if self.seconds else 0.0

    @property
    def share(self) -> float:
        """Median of the processor time it got over the time it asked for."""
        return statistics.median(self.shares) if self.shares else 1.0


@dataclass(frozen=True)
class Measurement:
    """Samples in seconds by provider; all providers took part in every round."""

    samples: Mapping[str, list[float]]
    canary: Canary = field(default_factory=Canary)
    host: Mapping[str, list[float]] = field(default_factory=dict)
    """Seconds that the CPU took to enqueue each sample; empty without a GPU."""


class CpuClock:
    """Wall-clock time of calls on the CPU."""

    shortest = 5e-3
    """Shortest sample in seconds; a shorter call is repeated."""

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
        """Time the fixed product; return (seconds, share of the processor)."""
        torch.mm(self._a, self._a, out=self._out)
        start, busy = time.perf_counter(), time.process_time()
        for _ in range(2):
            torch.mm(self._a, self._a, out=self._out)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        return seconds / 2, busy / (seconds * torch.get_num_threads())


class CudaClock:
    """Time between two events on the current stream; every call starts with a cold L2 cache, already enqueued.

    ``host`` is the time that the CPU took to enqueue a call of the last sample. Where it exceeds the GPU's time,
    the CPU sets the pace.
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
        """Time the fixed product; return (seconds, 1.0): a process cannot see its share of a GPU."""
        return self.time(Timed(lambda: None, lambda _: self._a @ self._a), 2), 1.0


Clock = CpuClock | CudaClock


def make_clock(device: torch.device, dtype: torch.dtype = torch.float32) -> Clock:
    """Return the clock of a device. ``dtype`` is that of a GPU's canary."""
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
        contestants: Calls by provider, one for each set of inputs; the rounds take the sets in turn.
        clock: The device's clock.
        seconds: Time after which no further round starts.
        min_rounds: Smallest number of rounds, whatever time they take.
        max_rounds: Largest number of rounds.

    Returns:
        One sample per round for each contestant, without the warm-up.
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
            # In every round another contestant comes first.
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
    """Rates that the machine itself reached in this run."""

    matmul: float
    """Flops per second of a large square product."""
    copy: float
    """Bytes per second, read and written, of a large copy."""


def ceilings(
    device: torch.device, clock: Clock, size: int | None = None, dtype: torch.dtype = torch.float32
) -> Ceilings:
    """Measure the product rate and the copy bandwidth of a device: the best of five tries."""
    large = device.type == "cuda"
    size = size or (8192 if large else 2048)
    # Random numbers: a GPU multiplies zeros or ones at a higher clock rate.
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
    """Largest number of bytes that a call holds, its results included, beyond those held before it.

    On the CPU the numbers are the events that torch's allocator reports to the profiler: memory that NumPy, faiss or a
    BLAS allocates is missing. On a GPU they are the caching allocator's statistics.
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
    """Total bytes of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
