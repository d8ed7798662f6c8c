"""Sections as one HTML page, one PDF, and files: pictures as PNG, tables as CSV."""

from __future__ import annotations

import base64
import csv
import io
import textwrap
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from service import __version__
from service.paper.sections import Section, shown
from service.results import figures

TITLE: Final = "DDPNOpt, figure by figure"
PAGE_INCHES: Final = (8.27, 11.69)
LINE_LETTERS: Final = 95
PAGE_LINES: Final = 62
DPI: Final = 110


def save(sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write report.html, report.pdf, and a file for each picture and table; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {picture.name: _png(picture.figure) for part in sections for picture in part.pictures}
    made = f"Made by ddpsweep {__version__} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    written = []
    for name, content in images.items():
        written.append(folder / f"{name}.png")
        written[-1].write_bytes(content)
    for table in (table for part in sections for table in part.tables):
        written.append(folder / f"{table.name}.csv")
        with written[-1].open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([table.columns, *table.rows])
    written += [folder / "report.html", folder / "report.pdf"]
    written[-2].write_text(_html(sections, images, made), encoding="utf-8")
    with PdfPages(written[-1]) as pdf, mpl.rc_context({"pdf.fonttype": figures.PDF_FONTS}):
        for figure in _pages(sections, made):
            pdf.savefig(figure)
    return written


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _html(sections: Sequence[Section], images: dict[str, bytes], made: str) -> str:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True)
    environment.filters["shown"] = shown
    encoded = {name: base64.b64encode(content).decode() for name, content in images.items()}
    return environment.get_template("report.html").render(
        title=TITLE, made=made, sections=sections, images=encoded
    )


def _pages(sections: Sequence[Section], made: str) -> Iterator[Figure]:
    contents = [made, "", *(f"· {part.title}" for part in sections)]
    yield from _text_pages(TITLE, contents)
    for part in sections:
        lines = [f"· {finding}" for finding in part.findings]
        lines += [
            "",
            *part.remarks,
            "",
            *part.notes,
            "",
            *(f"{picture.name}.png: {picture.caption}" for picture in part.pictures),
            *(f"{table.name}.csv: {table.caption}" for table in part.tables),
        ]
        yield from _text_pages(part.title, lines)
        for picture in part.pictures:
            yield picture.figure


def _text_pages(title: str, lines: Sequence[str]) -> Iterator[Figure]:
    wrapped = [piece for line in lines for piece in (textwrap.wrap(line, LINE_LETTERS) or [""])]
    for start in range(0, max(len(wrapped), 1), PAGE_LINES):
        figure = Figure(figsize=PAGE_INCHES)
        figure.text(0.08, 0.95, title, fontsize=14, weight="bold", va="top")
        text = "\n".join(wrapped[start : start + PAGE_LINES])
        figure.text(0.08, 0.91, text, fontsize=9, va="top", linespacing=1.4, parse_math=False)
        yield figure
