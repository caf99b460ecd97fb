"""Named parts of a training step, timed while a profile asks for it and free of cost otherwise.

with section("teacher"):
    ...
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


class SectionTimes:
    """Exclusive wall-clock time of sections: what a section spends in sections within it counts there alone.

    Args:
        synchronize: Waits for the device. Called where a section begins and ends, so that the time of work that was
            only enqueued counts where it belongs; None: nothing to wait for.

    Attributes:
        seconds: Name -> exclusive seconds.
        calls: Name -> number of entries.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize
        self._open: list[str] = []
        self._since = 0.0
        self.seconds: dict[str, float] = {}
        self.calls: Counter[str] = Counter()

    def _charge(self) -> None:
        """Charge the time since the last boundary to the innermost open section."""
        if self._synchronize is not None:
            self._synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time what runs inside, and show it under this name in a trace of torch.profiler."""
        self._charge()
        self._open.append(name)
        self.calls[name] += 1
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self._charge()
            self._open.pop()


_active: SectionTimes | None = None


def section(name: str) -> AbstractContextManager[None]:
    """A part of a training step by name; does nothing unless ``record`` is active."""
    if _active is None or torch.compiler.is_compiling():
        return nullcontext()
    return _active.measure(name)


@contextmanager
def record(times: SectionTimes) -> Iterator[SectionTimes]:
    """Time every section that runs inside."""
    global _active
    outer, _active = _active, times
    try:
        yield times
    finally:
        _active = outer
