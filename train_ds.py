"""Entry for the deepspeed launcher: ``deepspeed [its flags] train_ds.py COMMAND [flags]``; see fsd_fast.cli."""

import sys

from fsd_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
