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
    """Undo what a shell does to its background jobs: they ignore SIGINT, and so would every process they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
