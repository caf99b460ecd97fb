"""A report as one HTML file: no script, nothing loaded from elsewhere, every text escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #5d6b7a; --line: #d9e0e7; --paper: #ffffff;
  --ground: #f3f6f9; --accent: #2f6090; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4eaf0; --soft: #9aa8b6; --line: #33404d; --paper: #1b242d;
  --ground: #121920; --accent: #7fb2e0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 0 0 .35rem; }
p { margin: 0 0 1rem; }
.lead, .note { color: var(--soft); }
.note { max-width: 46rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: .8rem; margin: 1.5rem 0; }
.card, section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: .85rem 1rem; }
.card b { display: block; font-size: 1.45rem; font-weight: 600; color: var(--accent); line-height: 1.25; }
.card span { color: var(--soft); font-size: .88rem; }
section { padding: 1.3rem 1.4rem; margin: 0 0 1.1rem; }
img { display: block; max-width: 100%; height: auto; margin: .4rem auto; background: #ffffff; border-radius: 6px; }
img.single { width: 40rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .95rem; }
table.pairs { width: auto; min-width: 26rem; }
th, td { text-align: left; padding: .38rem .7rem .38rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number { text-align: right; white-space: nowrap; }
th.number { text-align: right; }
details summary { cursor: pointer; color: var(--accent); }
footer { color: var(--soft); font-size: .88rem; margin-top: 1.5rem; }
"""


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: Its heading.
        note: What a reader should know about it.
        image: A PNG file.
        header: Headings of a table; columns after the first are numbers.
        rows: Rows of the table.
        folded: Whether the table is folded away until it is asked for.
        wide: Whether the image has the width of the page.
    """

    title: str
    note: str = ""
    image: Path | None = None
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default_factory=list)
    folded: bool = False
    wide: bool = False


def html_report(
    title: str, lead: str, cards: Mapping[str, str], sections: Sequence[Section], footer: str
) -> str:
    """Return a report.

    Args:
        title: Its title.
        lead: A line below it.
        cards: Name -> the figures that stand out.
        sections: Its parts; images become part of the text.
        footer: A line at the end.

    Raises:
        OSError: An image cannot be read.
    """
    boxes = "".join(
        f'<div class="card"><b>{_text(value)}</b><span>{_text(name)}</span></div>'
        for name, value in cards.items()
    )
    parts = "\n".join(map(_section, sections))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{_text(title)}</h1>\n<p class="lead">{_text(lead)}</p>\n<div class="cards">{boxes}</div>\n'
        f"{parts}\n<footer>{_text(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    return html.escape(str(text), quote=True)


def _section(section: Section) -> str:
    note = f'<p class="note">{_text(section.note)}</p>' if section.note else ""
    image = ""
    if section.image is not None:
        data = base64.b64encode(section.image.read_bytes()).decode()
        size = "" if section.wide else ' class="single"'
        image = f'<img{size} alt="{_text(section.title)}" src="data:image/png;base64,{data}">'
    table = _table(section.header, section.rows) if section.rows else ""
    if section.folded and table:
        table = f"<details><summary>Show all {len(section.rows)}</summary>{table}</details>"
    return f"<section>\n<h2>{_text(section.title)}</h2>\n{note}{image}{table}\n</section>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # Two columns are a name and its value; of more, all but the first are numbers.
    several = max(map(len, rows)) > 2
    number, table = (' class="number"', "") if several else ("", ' class="pairs"')

    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{number if place else ''}>{_text(text)}</{tag}>" for place, text in enumerate(texts)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{cells('th', header)}</tr></thead>" if header else ""
    return f'<div class="scroll"><table{table}>{head}<tbody>{body}</tbody></table></div>'
