"""Commands in a forked child, which can be killed or starved without the tests; it starts at once."""

import contextlib
import os
import resource
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from fsd_fast import cli


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit status, negative for a signal, and the last line on stderr."""

    status: int
    printed: str

    @property
    def last_line(self):
        lines = [line for line in self.printed.splitlines() if line.strip()]
        return lines[-1] if lines else ""


def in_child(command, flags, printed_to, prepare=lambda: None):
    """Run a command in a child after ``prepare``, with its output in a file; return how it ended."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # torch's threads: the child starts none of them anew
        child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            # OpenMP's threads are not forked: a parallel loop would wait for those of the parent for ever.
            torch.set_num_threads(1)
            file = os.open(printed_to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout = sys.stderr = open(file, "w", buffering=1, closefd=False)  # noqa: SIM115
            prepare()
            status = cli.main([command, *flags])
            sys.stderr.flush()
        os._exit(status)
    _, status = os.waitpid(child, 0)
    status = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return Ended(status, Path(printed_to).read_text(errors="replace"))


def kill_at_call(owner, name, call):
    """Return what makes a child kill itself at the n-th call (from 1) of a function."""

    def prepare():
        original, calls = getattr(owner, name), [0]

        def killed(*arguments, **keywords):
            calls[0] += 1
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        setattr(owner, name, killed)

    return prepare


def at_files(folder, act):
    """Return what makes a child call ``act`` whenever Python is about to write, rename or remove a file in a folder.

    What safetensors and torch write by themselves does not come by here.
    """

    def prepare():
        def hook(event, arguments):
            if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
                return
            reads = event == "open" and not (int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
            if not reads and str(folder) in str(arguments[0]):
                act()

        sys.addaudithook(hook)

    return prepare


def kill_at_file(folder, number):
    """Return what makes a child kill itself at the n-th such file (from 1)."""
    left = [number]

    def act():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return at_files(folder, act)


def limit_files(size):
    """Return what makes every write beyond ``size`` bytes of a file fail in a child."""

    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare
