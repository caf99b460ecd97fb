"""Ways to damage a file: faults in its bytes, and files that are hostile as a whole."""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

DEEP = json.loads("[" * 20 + "]" * 20)
# One of every kind that JSON has, and what is large, small or out of range.
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63 - 1,
    0.5,
    1e308,
    -1e308,
    "",
    "../../x",
    "\ud800",
    [],
    [1],
    {},
    {"a": 1},
    DEEP,
]


def mutated(content: bytes, generator: random.Random) -> bytes:
    """The content with one fault: a bit, some bytes, a cut, a block twice, missing, or moved."""
    place, size = generator.randrange(len(content)), generator.randrange(1, 40)
    kind = generator.randrange(6)
    if kind == 0:
        changed = bytes([content[place] ^ (1 << generator.randrange(8))])
        return content[:place] + changed + content[place + 1 :]
    if kind == 1:
        return content[:place] + generator.randbytes(size) + content[place + size :]
    if kind == 2:
        return content[:place]
    if kind == 3:
        return content[: place + size] + content[place:]
    if kind == 4:
        return content[:place] + content[place + size :]
    digit = generator.choice([b"9", b"-", b"e99", b"0" * 30, b"[", b'"', b"}", b"null"])
    return content[:place] + digit + content[place + 1 :]


def header_mutated(content: bytes, generator: random.Random) -> bytes:
    """A safetensors file with a fault in its header."""
    size = int.from_bytes(content[:8], "little")
    header = mutated(content[8 : 8 + size], generator)
    length = len(header) if generator.random() < 0.8 else generator.choice([0, 2**63, 2**64 - 1, size + 1])
    return length.to_bytes(8, "little") + header + content[8 + size :]


def headers() -> Iterator[bytes]:
    """Safetensors files that are hostile as a whole."""

    def whole(header: Any, values: bytes = b"") -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + values

    def tensor(dtype: str, shape: list[Any], offsets: list[Any]) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    yield b""
    yield b"\xff" * 8
    yield struct.pack("<Q", 2**63) + b"{}"
    yield whole(b"[" * 100_000)
    yield whole(b'{"centroids":' * 10_000)
    yield whole({})
    yield whole([])
    for dtype in ("F64", "I64", "BOOL", "F8_E4M3", "F4", "C64", "U16", "X", "", 5):
        yield whole({"centroids": tensor(dtype, [3, 32], [0, 4 * 3 * 32])}, bytes(4 * 3 * 32))  # type: ignore[arg-type]
    for shape in ([2**62, 2**62], [2**63], [-1, 5], [3, 2**40], [3, 1.5], [], ["a"], [0, 2**62], [10**30]):
        yield whole({"centroids": tensor("F32", shape, [0, 4 * 3 * 32])}, bytes(4 * 3 * 32))
    for offsets in ([0, 2**63], [-8, 0], [8, 0], [0], [0, 4 * 3 * 32 + 4], ["0", "4"], [10**30, 10**31]):
        yield whole({"centroids": tensor("F32", [3, 32], offsets)}, bytes(4 * 3 * 32))
    yield whole({"__metadata__": {"a": 1}, "centroids": tensor("F32", [0], [0, 0])})
    yield whole({"__metadata__": {"a": "b"}})
    twice = json.dumps({"centroids": tensor("F32", [1], [0, 4])})
    yield whole((twice[:-1] + "," + twice[1:]).encode(), bytes(4))


HOSTILE = list(headers())


def within_a_second(run: Callable[[], Any]) -> Any:
    started = time.process_time()
    try:
        return run()
    finally:
        assert time.process_time() - started < 1
