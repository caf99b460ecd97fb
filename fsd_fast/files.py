"""Files that are whole or not there: written under another name in the same folder, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file so that it is either there in full or as it was before.

    Without ``sync`` the system writes it out when it likes, much faster: that holds if the process dies, but not if
    the machine does, so the content must tell on its own whether it is whole.

    Raises:
        OSError: It cannot be written; nothing of it stays behind.
    """
    # One name: what a killed process leaves is overwritten by the next.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, and the folder for it, such that it is never seen half-written.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """List every field in which two records differ, as "name is 1, expected 2; ..."; empty where none does."""
    return "; ".join(
        f"{name} is {found.get(name)!r}, expected {expected.get(name)!r}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    )
