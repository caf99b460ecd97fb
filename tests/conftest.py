"""What every test starts from: no backend chosen by the environment."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_backend_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FSD_BACKEND", raising=False)
