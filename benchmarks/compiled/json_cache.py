"""Slow results that depend on nothing but their key, kept in one JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fsd_fast.files import write_atomically


class JsonCache:
    """A mapping from strings to JSON values in a file.

    The file is read again before every write, so that two commands at once keep each other's results.

    Args:
        path: The file; it and its folder are made at the first write. None: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """Return everything in the file."""
        return dict(json.loads(self.path.read_text())) if self.path is not None and self.path.exists() else {}

    def keep(self, key: str, value: object) -> None:
        """Add a result to the file."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps({**self.read(), key: value}).encode())
