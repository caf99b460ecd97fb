"""SIGTERM, SIGINT and SIGHUP as requests: the work goes on to where it can be continued, saves, and stops there.

    with stoppable():
        for step in steps:
            ...
            if stop_requested() is not None:
                save()
                raise Stopped(stop_requested(), "saved in DIR; go on with --resume_from_checkpoint last")

Outside of the ``with`` block the signals do what they always do. The exit status of a command that was stopped is 128
plus the number of the signal, as a shell reports it: 143 for SIGTERM, 130 for SIGINT, 129 for SIGHUP.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """The work was stopped by a signal and can be continued.

    Like any interrupt it is no ``Exception``: what handles errors and goes on must not go on.

    Args:
        number: The signal.
        place: Where the work stands, and how to go on.
    """

    def __init__(self, number: signal.Signals, place: str) -> None:
        super().__init__(f"stopped by {number.name}: {place}")
        self.number, self.place = number, place

    @property
    def status(self) -> int:
        """The exit status of a command that was stopped so."""
        return 128 + int(self.number)


_requested: signal.Signals | None = None


def stop_requested() -> signal.Signals | None:
    """The signal that asked this process to stop; None where none did, or outside of ``stoppable``."""
    return _requested


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Take SIGTERM, SIGINT and SIGHUP as requests to stop, inside of the ``with`` block.

    A second SIGINT interrupts at once, unless a launcher started the process: launchers send signals twice. A signal
    that the process was started to ignore, as ``nohup`` does with SIGHUP, stays ignored. In a thread other than the
    main one nothing changes: Python delivers signals to the main thread alone.
    """
    global _requested
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, launched = os.getpid(), "RANK" in os.environ

    def request(number: int, _: FrameType | None) -> None:
        global _requested
        if os.getpid() != owner:  # a worker that was forked meanwhile
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif _requested is None:
            _requested = signal.Signals(number)
            if os.environ.get("RANK", "0") == "0":
                # Not by print, which a signal may have interrupted.
                os.write(2, f"{_requested.name}: stopping where the work can be continued\n".encode())
        elif number == signal.SIGINT == _requested and not launched:
            raise KeyboardInterrupt

    before = {each: signal.getsignal(each) for each in SIGNALS}
    taken = [each for each, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    earlier, _requested = _requested, None
    try:
        for each in taken:
            signal.signal(each, request)
        yield
    finally:
        for each in taken:
            signal.signal(each, before[each])
        _requested = earlier
