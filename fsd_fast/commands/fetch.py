"""``fsd-fast fetch``: get the built-in data and backbone."""

from __future__ import annotations

from fsd_fast.commands._common import Work
from fsd_fast.data import builtin

ARGUMENTS: tuple[type, ...] = ()


def prepare() -> Work:
    """Get the built-in data and backbone, unless they are there.

    All of it happens here and no work is left: without a network it is refused like any missing input.
    """
    print("fetching the built-in data and backbone (90 MB) unless they are there", flush=True)
    try:
        builtin.fetch()
    except RuntimeError as error:
        raise ConnectionError(str(error)) from error
    return dict
