"""Files that are whole or not there: written under another name in the same folder, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

_MAXIMUM_JSON_BYTES = 1 << 20


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


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that someone may have written by hand.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is larger than 1 MiB, not UTF-8, not JSON, nested beyond Python's limit, not an object, names a
            key twice in one object, or holds NaN or Infinity, which are not JSON.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: expected a JSON file, got a folder or device")
    if path.stat().st_size > _MAXIMUM_JSON_BYTES:
        raise ValueError(f"{path}: expected at most 1 MiB of JSON, got {path.stat().st_size:,} bytes")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = (
            sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        )
        if twice:
            raise ValueError(f"the key {twice[0]!r} occurs twice")
        return dict(pairs)

    def refuse(literal: str) -> NoReturn:
        raise ValueError(f"{literal} is not JSON; expected a finite number")

    try:
        content = json.loads(
            path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique, parse_constant=refuse
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got line {error.lineno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, got byte {error.object[error.start]:#x}") from None
    except RecursionError:
        raise ValueError(f"{path}: JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """List every field in which two records differ, as "name is 1, expected 2; ..."; empty where none does."""
    return "; ".join(
        f"{name} is {found.get(name)!r}, expected {expected.get(name)!r}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    )
