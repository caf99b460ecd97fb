"""Signals to the processes of a launcher."""

import os

import psutil

from tests.launch import finish


def worker(launcher, rank):
    """The number of the process of a rank."""
    for process in psutil.Process(launcher.pid).children(recursive=True):
        words = process.cmdline()
        is_worker = "train_ds.py" in words and not {"torch.distributed.run", "--num_accelerators"} & set(
            words
        )
        if is_worker and process.environ().get("RANK") == str(rank):
            return process.pid
    raise AssertionError(f"no process of rank {rank}")


def signal_while_training(launcher, number, rank=None):
    """Send a signal to the launcher, or to the process of a rank, once a few steps are done; return what came of it.

    What was printed until then is left out. The job must end within a minute.
    """
    for line in launcher.stdout:
        if "loss_vkd" in line:
            break
    os.kill(launcher.pid if rank is None else worker(launcher, rank), number)
    return finish(launcher, 60)
