"""Several processes of one process group, forked from the test."""

import multiprocessing
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist


def in_processes(world, work, folder):
    """Call ``work(rank)`` in so many processes of a gloo group; return what each gave, in the order of their ranks.

    What it gives must be made of numbers and NumPy arrays.
    """
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def run(rank):
        torch.set_num_threads(1)
        try:
            store = f"file://{folder}/store-{world}"
            dist.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
            )
            queue.put((rank, work(rank), None))
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            queue.put((rank, None, traceback.format_exc()))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's threads
        processes = [context.Process(target=run, args=(rank,)) for rank in range(world)]
        for process in processes:
            process.start()
    found = {}
    for _ in range(world):
        rank, result, error = queue.get(timeout=120)
        assert error is None, f"process {rank}:\n{error}"
        found[rank] = result
    for process in processes:
        process.join(60)
    return [found[rank] for rank in range(world)]
