"""``python -m benchmarks capture``: capture L_I and L_G + L_L, forward + backward, as CUDA graphs and replay them.

A loss passes if its capture succeeds, and if a replay into gradients that were filled with NaN writes the same bits as
a plain call. On a CPU, for a trial of the command, a second call stands in for the replay.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.speed import results
from benchmarks.speed.commands.kernel_times import PAPER, TINY, Call, inter_call, intra_call
from benchmarks.speed.inputs import Sizes
from benchmarks.speed.run import DTYPES
from benchmarks.tables import aligned

_WARM_UP = 3


class Capture(NamedTuple):
    """What became of one loss."""

    passed: bool
    reason: str
    """Why it did not pass; empty where it did."""


def _graph(call: Call) -> tuple[Sequence[Tensor], Callable[[], None]]:
    """Capture ``call``; return its static results and the function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    return found, graph.replay


def _second_call(call: Call) -> tuple[Sequence[Tensor], Callable[[], None]]:
    """The CPU's stand-in for ``_graph``."""
    found = call()

    def again() -> None:
        for kept, new in zip(found, call(), strict=True):
            kept.copy_(new)

    return found, again


def check(call: Call, device: torch.device) -> Capture:
    """Capture a loss, replay it, and compare the gradients' bits with those of a plain call."""
    wanted = call()
    try:
        found, replay = (_graph if device.type == "cuda" else _second_call)(call)
        for gradient in found:
            gradient.fill_(float("nan"))
        replay()
        same = all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    except RuntimeError as error:
        return Capture(False, f"{type(error).__name__}: {error}".splitlines()[0])
    return Capture(same, "" if same else "a replay has other bits than a plain call")


def losses(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    """The losses by name, as calls that return gradients."""
    return {
        "L_I": intra_call(sizes, dtype, device),
        f"L_G + L_L, K={sizes.centroids}": inter_call(sizes, dtype, device),
    }


def main(argv: Sequence[str]) -> int:
    """Print one line for each loss; return 1 if one does not pass."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks capture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to try the command")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome, again after each loss")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("capture needs a GPU, and none is to be had here", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    found: dict[str, Capture] = {}
    for name, call in losses(TINY if options.quick else PAPER, DTYPES[options.dtype], device).items():
        found[name] = check(call, device)
        if options.json is not None:
            content = {"losses": {loss: outcome._asdict() for loss, outcome in found.items()}}
            results.write_text(options.json, json.dumps(content, indent=1) + "\n")
    print(aligned([["loss", "captured"], *([name, each.reason or "yes"] for name, each in found.items())]))
    return int(not all(each.passed for each in found.values()))
