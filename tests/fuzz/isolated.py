"""Fuzzing in a forked child: flags of training change the settings of a whole process."""

import multiprocessing
import traceback
import warnings


def isolated(work):
    """Call ``work`` in a child; its failure is this test's."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def run():
        try:
            work()
            queue.put("")
        except BaseException:
            queue.put(traceback.format_exc(limit=-4))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's threads
        child = context.Process(target=run)
        child.start()
    error = queue.get()
    child.join(60)
    assert not error, error[-3000:]
