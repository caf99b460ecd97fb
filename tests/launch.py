"""Commands in several processes on the CPU, started as the docs say: by the deepspeed launcher or by torchrun."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import ROOT

BIN = Path(sys.executable).parent
# DeepSpeed's CPU communication is built here once.
EXTENSIONS = ROOT / ".cache" / "torch_extensions"


def remove_build_locks():
    """A build that was killed leaves a lock that others wait for."""
    for lock in EXTENSIONS.rglob("lock"):
        lock.unlink()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start(command, **environment):
    """Start a process in a session of its own, with its output as text in a pipe."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env={
            **inherited,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",  # ninja, next to this Python
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, seconds=600):
    """Wait for a process that ``start`` has started; return its exit status and what it printed."""
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        pytest.fail(f"no end after {seconds} s:\n{printed[-6000:]}")
    return subprocess.CompletedProcess(process.args, process.returncode, printed)


def start_deepspeed(processes, arguments, script="train_ds.py"):
    launcher = [BIN / "deepspeed", "--num_accelerators", processes, "--master_port", free_port()]
    return start([*launcher, script, *arguments], DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=str(EXTENSIONS))


def start_torchrun(processes, arguments, script="train_ds.py"):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    return start([*launcher, script, *arguments])


def run_deepspeed(processes, arguments, **options):
    """Run a command under the deepspeed launcher; it must succeed. Returns what it printed."""
    return _succeeded(finish(start_deepspeed(processes, arguments, **options)))


def run_torchrun(processes, arguments, **options):
    """Run a command under torchrun; it must succeed. Returns what it printed."""
    return _succeeded(finish(start_torchrun(processes, arguments, **options)))


def _succeeded(done):
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
