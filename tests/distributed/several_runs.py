"""Runs several commands one after the other in the processes of one launch: most of a tiny run is the launcher's start.

``python several_runs.py RUNS.json`` takes a list of [command, flags].
"""

import json
import sys
from pathlib import Path

import torch

from fsd_fast.commands import run
from fsd_fast.commands.launcher import split_launcher_rank
from fsd_fast.distributed import end_process, leave_processes

if __name__ == "__main__":
    torch.set_num_threads(1)
    (file,) = split_launcher_rank(sys.argv[1:])
    for command, flags in json.loads(Path(file).read_text()):
        run(command, flags)
    leave_processes()
    end_process()
