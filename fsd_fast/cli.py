"""The commands: ``fsd-fast COMMAND ...`` and ``[deepspeed] train_ds.py COMMAND ...`` are the same.

=============  ====================================================================
``fetch``      get the built-in data and backbone
``teacher``    fine-tune a classifier on the hard labels
``memory``     cluster the teacher's features into its memory
``distill``    train a student next to its teacher
``evaluate``   score a saved classifier
``predict``    write a classifier's predictions for a test set
``sweep``      many runs from one file, and a table of results
``table``      mean, deviation and differences of a sweep's results
``analyze``    compare a student with its teacher, layer by layer, in a report
``demo``       all of it on the built-in task, with a table at the end
``env``        versions, devices and backends of this machine
=============  ====================================================================

The exit status is 0; 2 where the input is refused, which is before any work; 1 where the work fails; 130 after an
interrupt, 143 after SIGTERM. See ``fsd_fast.commands.failures`` for what is printed then.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from fsd_fast import __version__
from fsd_fast.commands import COMMANDS, prepare
from fsd_fast.commands.failures import fail, stop
from fsd_fast.commands.launcher import rank, split_launcher_rank


def _usage() -> str:
    lines = ["usage: fsd-fast COMMAND [FILE.json] [flags]", "", "commands:"]
    lines += [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", "fsd-fast COMMAND --help lists a command's flags.", "fsd-fast --version"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit status.

    Args:
        arguments: The command line without the program's name; None takes the process's own.
    """
    listed = split_launcher_rank(sys.argv[1:] if arguments is None else arguments)
    if not listed or listed[0] in ("-h", "--help"):
        print(_usage())
        return 0 if listed else 2
    if listed[0] == "--version":
        print(f"fsd-fast {__version__}")
        return 0
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # It lists every layer of a model that is loaded as not sharded, where nothing was to be.
    logging.getLogger("transformers.distributed.tensor_parallel").setLevel(logging.ERROR)
    command, working = listed[0], False
    try:
        work = prepare(command, listed[1:])
        working = True
        figures = work()
    except KeyboardInterrupt as interrupt:
        return stop(command, interrupt)
    except Exception as error:
        return fail(command, error, working)
    from fsd_fast.distributed import end_process, leave_processes

    several = leave_processes()
    if rank() == 0 and figures:
        from fsd_fast.commands.figures import figures_table

        print(figures_table(figures))
    if several:
        end_process()
    return 0
