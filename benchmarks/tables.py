"""Tables of text: lines of cells, of which the first is the header."""

from __future__ import annotations

Table = list[list[str]]


def aligned(table: Table) -> str:
    """Pad every column to its widest cell."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)
    return "\n".join(line.rstrip() for line in lines)


def markdown(table: Table) -> str:
    """Write a table in Markdown."""
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])
