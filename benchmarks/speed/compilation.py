"""torch.compile of a loss, with a limit on its time."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.speed.inputs import Inputs
from benchmarks.speed.peers import Unavailable

# The first compilation of a process takes half a minute.
COMPILE_SECONDS = 90.0
# Number of shapes that one function is compiled for. Beyond torch's own limit it would run uncompiled without a word.
_COMPILED_SHAPES = 256


class _TimeUp(BaseException):
    """Not an Exception: a compiler that catches those must not take it for an error of its own."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise ``_TimeUp`` in the main thread if the block takes longer."""

    def stop(*_: object) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compiled(
    loss: Callable[[Inputs], Tensor],
    seconds: float = COMPILE_SECONDS,
    compiler: Callable[..., Callable[[Inputs], Tensor]] = torch.compile,
) -> Callable[[Inputs], Tensor]:
    """Compile a loss anew for every shape.

    Args:
        loss: Maps inputs to a scalar.
        seconds: Longest time of a call, compilation included.
        compiler: Compiles a function.

    Returns:
        The compiled loss; it raises ``Unavailable`` where compilation fails or takes too long.
    """
    run_compiled = compiler(loss, dynamic=False)

    def run(tensors: Inputs) -> Tensor:
        limits = {"recompile_limit": _COMPILED_SHAPES, "accumulated_recompile_limit": _COMPILED_SHAPES}
        try:
            with _time_limit(seconds), torch._dynamo.config.patch(limits):
                return run_compiled(tensors)
        except _TimeUp:
            raise Unavailable(f"torch.compile takes more than {seconds:g} s") from None
        except torch._dynamo.exc.TorchDynamoException as error:
            first = str(error).strip().splitlines()[0]
            raise Unavailable(f"torch.compile fails: {first}") from error

    return run
