"""Seeded cases: a few of each kind in ``make test``, all of them in ``make fuzz``."""

import os
import random

ALL = os.environ.get("FSD_FUZZ") == "all"
COUNTS = {
    "losses": 3000,
    "flags": 2500,
    "JSON files of flags": 1000,
    "TSV files": 2000,
    "memories": 1000,
    "checkpoints": 1000,
    "records": 1000,
}
"""Kind -> cases of ``make fuzz``."""
QUICK = 25


def fuzz(kind, case):
    """Call ``case`` with a generator for each seed of a kind; a failure names the seed."""
    for seed in range(COUNTS[kind] if ALL else COUNTS[kind] // QUICK):
        try:
            case(random.Random(f"{kind} {seed}"))
        except Exception as error:
            raise AssertionError(f"{kind}, case {seed}: {type(error).__name__}: {error}") from error


def mutated(content, generator):
    """Bytes with one fault: a bit, some bytes, a cut, a block twice or missing, or something of another kind."""
    place, size = generator.randrange(len(content)), generator.randrange(1, 40)
    inserted = [
        b"9",
        b"-",
        b"e99",
        b"0" * 30,
        b"[" * 50,
        b'"',
        b"}",
        b"null",
        b"\0",
        b"\xff\xfe",
        b"\t",
        b"\r",
        b"\n",
    ]
    return generator.choice(
        [
            content[:place] + bytes([content[place] ^ (1 << generator.randrange(8))]) + content[place + 1 :],
            content[:place] + generator.randbytes(size) + content[place + size :],
            content[:place],
            content[: place + size] + content[place:],
            content[:place] + content[place + size :],
            content[:place] + generator.choice(inserted) + content[place:],
        ]
    )
