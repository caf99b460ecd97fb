"""The table of docs/faults.md, from the tests of faults: ``python -m tools.faults_page`` writes it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "faults.md"
_BEGIN, _END = "<!-- table: begin -->", "<!-- table: end -->"
# Room of the tests -> what the table calls it.
_TITLES = {
    "faults": "Runs",
    "training": "Checkpoints and exports",
    "memory": "Memories",
    "cache": "Teacher caches",
}
_OTHER = "Files, models and data"


class Fault(NamedTuple):
    """A line of the table."""

    happens: str
    holds: str
    slow: bool
    test: str
    """Path and name, as pytest takes it."""


def faults() -> Iterator[Fault]:
    """The faults that tests are marked with, in the order of their files."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                for call in node.decorator_list:
                    if isinstance(call, ast.Call) and ast.unparse(call.func) == "fault":
                        happens, holds = (str(ast.literal_eval(each)) for each in call.args)
                        slow = any(each.arg == "slow" for each in call.keywords)
                        yield Fault(happens, holds, slow, f"{path.relative_to(ROOT).as_posix()}::{node.name}")


def table() -> str:
    """The table as Markdown, a part for each room."""
    rooms: dict[str, list[Fault]] = {title: [] for title in (*_TITLES.values(), _OTHER)}
    for each in faults():
        rooms[_TITLES.get(each.test.split("/")[1], _OTHER)].append(each)
    parts = []
    for title, listed in rooms.items():
        lines = ["| what happens | what holds | |", "|---|---|---|"]
        lines += [f"| {each.happens} | {each.holds} | {'slow' if each.slow else ''} |" for each in listed]
        parts.append(f"### {title}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def page(text: str) -> str:
    """Return the page ``text`` with the table of the tests as they are now.

    Raises:
        ValueError: The page has no place for it.
    """
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{PAGE}: expected {_BEGIN} and {_END}")
    return f"{before}{begin}\n\n{table()}\n\n{end}{after}"


def main() -> None:
    """Write the table."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"written: {PAGE}\n")


if __name__ == "__main__":
    main()
