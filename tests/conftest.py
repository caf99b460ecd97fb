"""What every test starts from: no backend chosen by the environment, and an interrupt that interrupts."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_backend_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FSD_BACKEND", raising=False)


@pytest.fixture(autouse=True, scope="session")
def _interrupts() -> Iterator[None]:
    """Undo what a shell and nohup do to background jobs: they ignore signals, and so would every process they start."""
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
