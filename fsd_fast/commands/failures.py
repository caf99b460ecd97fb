"""What is printed when a command fails: one line on stderr, the last that this package prints.

- ``fsd-fast COMMAND: error: ...``, exit status 2: the input was refused before any work.
- ``fsd-fast COMMAND: failed: ...``, exit status 1: the work could not be finished.
- ``fsd-fast COMMAND: stopped by SIGTERM: ...``, exit status 143 (130 for SIGINT): it can be continued.

``FSD_DEBUG=1`` prints the traceback above the line. Errors in the work that no input explains (``AttributeError``,
``KeyError``, ...) are faults of the program: their traceback is always printed, since a long run may not be repeated
for it.

Under a launcher all processes mostly fail alike. The first one prints at once and ends, upon which the launcher ends
the others. Those wait before they print, so that their line appears only where the first process did not fail.
"""

from __future__ import annotations

import os
import re
import sys
import time
import traceback

from fsd_fast.commands.launcher import local_rank, rank

REFUSED, FAILED, INTERRUPTED = 2, 1, 130

_FAULTS = (AssertionError, AttributeError, LookupError, NameError, NotImplementedError, TypeError)
# Their message stands alone; that of another error follows its type's name.
_SELF_EXPLAINING = (ValueError, OSError, RuntimeError, FloatingPointError)
_LONGEST = 1500
_SECONDS_FOR_FIRST, _SECONDS_FOR_LOCAL_FIRST, _SECONDS_FOR_PEER = 5.0, 10.0, 15.0
_CONNECTION = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|TCPStore", re.IGNORECASE
)


def fail(command: str, error: Exception, working: bool) -> int:
    """Print why a command failed, and return the exit status.

    Where other processes take part, this one ends here without leaving the process group: the others may wait in it.

    Args:
        command: The command.
        error: What it raised.
        working: Whether its input had been accepted.
    """
    status, word = (FAILED, "failed") if working else (REFUSED, "error")
    time.sleep(_patience(error))
    if not _is_peers(error) or rank() == 0:
        debugging = os.environ.get("FSD_DEBUG") == "1"
        fault = working and isinstance(error, _FAULTS)
        if debugging or fault:
            traceback.print_exception(error)
        print(f"fsd-fast {command}: {word}: {message_of(error)}", file=sys.stderr, flush=True)
    _leave(status)
    return status


def stop(command: str, interrupt: KeyboardInterrupt) -> int:
    """Print that a command was stopped, and return the exit status; ends a process of several as ``fail`` does."""
    if rank() == 0:
        print(f"fsd-fast {command}: {str(interrupt) or 'interrupted'}", file=sys.stderr, flush=True)
    status = int(getattr(interrupt, "status", INTERRUPTED))
    _leave(status)
    return status


def message_of(error: BaseException) -> str:
    """Return what an error says as one line: its own words, and its type where they need it."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error)
    # Arguments may hold bytes that are no UTF-8, which Python keeps as halves of characters.
    text = " ".join(text.encode(errors="backslashreplace").decode().split())
    if not isinstance(error, _SELF_EXPLAINING) or not text:
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _is_peers(error: Exception) -> bool:
    """Whether another process failed first and the error only says that it is gone."""
    distributed = sys.modules.get("fsd_fast.distributed")
    if distributed is not None and isinstance(error, distributed.PeerError):
        return True
    return isinstance(error, RuntimeError) and _CONNECTION.search(str(error)) is not None


def _patience(error: Exception) -> float:
    """Return the seconds to wait for a process that is nearer to the cause."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0.0
    if _is_peers(error):
        return _SECONDS_FOR_PEER
    if rank() == 0:
        return 0.0
    return _SECONDS_FOR_FIRST if local_rank() == 0 else _SECONDS_FOR_LOCAL_FIRST


def _leave(status: int) -> None:
    distributed = sys.modules.get("torch.distributed")
    if (
        distributed is not None
        and distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    ):
        # The group's threads may abort an interpreter that ends while others wait for this process, and leaving the
        # group would wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
