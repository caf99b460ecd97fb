"""What the kernel says of this process: its resident memory and its open files."""

from __future__ import annotations

import os
import re
from pathlib import Path


def resident_bytes() -> int:
    """The memory of this process that is in use now."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most memory that this process has had in use."""
    return _status("VmHWM")


def open_files() -> int:
    """Files, sockets and pipes that this process holds open."""
    # The folder is open too while it is listed.
    return len(os.listdir("/proc/self/fd")) - 1


def _status(name: str) -> int:
    found = re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise RuntimeError(f"/proc/self/status: expected a line {name}")
    return 1024 * int(found.group(1))
