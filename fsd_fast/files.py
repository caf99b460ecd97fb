"""Files that are whole or not there, and folders that one process at a time writes.

A file is written under a name of its own in the same folder, then renamed. A folder in use is locked by ``.lock`` in
it: the system releases the lock when its holder ends, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import socket
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from fsd_fast.untrusted import shorten

LOCK_FILE = ".lock"
# What torch says where it cannot write: the file of its source that writes, or C++'s own words.
_TORCH_WRITER = re.compile("inline_container|iostream")
_TEMPORARY = re.compile(r"\..+\.(?P<host>[^.]+)\.(?P<process>\d+)\.[0-9a-f]{8}\.tmp")


# ----------------------------------------------------------------------------------------------- files


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40] or "localhost"


def temporary_path(path: Path) -> Path:
    """A new name beside ``path`` that says which process is writing it."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def write_atomically(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file so that it is either there in full or as it was before.

    Without ``sync`` the system writes it out when it likes, much faster: that holds if the process dies, but not if
    the machine does, so the content must tell on its own whether it is whole. A symbolic link at ``path`` is replaced,
    not followed.

    Raises:
        OSError: It cannot be written; nothing of it stays behind.
    """
    temporary = temporary_path(path)
    # Mode 0666 less the umask, like any new file.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def named_write_errors(folder: Path) -> Iterator[None]:
    """Name the folder where safetensors or torch fail to write a file in it; their own words name neither.

    Raises:
        OSError: In place of their errors.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{folder} could not be written: {error}") from error
    except RuntimeError as error:
        if _TORCH_WRITER.search(str(error)) is None:
            raise
        raise OSError(
            f"{folder} could not be written: is the disk full, or the folder gone? ({error})"
        ) from error


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
        f"{name} is {shorten(found.get(name))}, expected {shorten(expected.get(name))}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    )


# --------------------------------------------------------------------------------------------- folders


def is_scratch(name: str) -> bool:
    """Whether a file of this name is a lock or was being written, and holds nothing of its own."""
    return name == LOCK_FILE or _TEMPORARY.fullmatch(name) is not None


def remove_stale_temporaries(folder: Path) -> None:
    """Remove what processes of this machine that are no longer alive have left half-written in a folder."""
    for entry in list(os.scandir(folder)):
        found = _TEMPORARY.fullmatch(entry.name)
        if found is not None and found["host"] == _host() and not _is_alive(int(found["process"])):
            with contextlib.suppress(OSError):
                os.unlink(entry.path)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


class FolderLock:
    """A folder that this process alone writes, until the ``with`` block ends; see ``exclusive_folder``."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the folder free; the lock file goes."""
        if self._descriptor >= 0:
            # While it is locked: whoever locks it afterwards sees that it is no longer the file in the folder.
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


def exclusive_folder(folder: Path, what: str) -> FolderLock:
    """Make a folder and lock it, so that no other process writes it until the ``with`` block of the result ends.

    The lock is taken by the call itself. What dead processes have left half-written in the folder is removed.

    Args:
        folder: The folder.
        what: The argument that names it, for the error.

    Raises:
        BlockingIOError: Another process has the lock; the message says which.
        OSError: The folder cannot be written. (A file system without locks is used without, with a warning.)
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor, folder, what)
            if _is_at(descriptor, path):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {_host()}".encode())
                remove_stale_temporaries(folder)
                return FolderLock(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, what: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 100, 0).decode(errors="replace") or "another process"
        raise BlockingIOError(
            f"{what}: {folder} is being written by {holder}; wait for it, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        warnings.warn(
            f"{what}: the file system of {folder} has no locks; let no other process write there",
            RuntimeWarning,
            stacklevel=3,
        )


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name: its last holder may have removed it."""
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)
