"""What a part of the report is made of, whoever shows it: words, tables and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from matplotlib.figure import Figure

Value: TypeAlias = str | float | int | None


@dataclass(frozen=True, slots=True)
class Table:
    """Numbers with a heading; also written as CSV.

    Attributes:
        name: of its file.
        caption: what it shows.
        columns: their names.
        rows: a value for each column; None where there is none.
    """

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure.

    Attributes:
        name: of its file.
        caption: what it shows.
        figure: matplotlib's.
    """

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True, slots=True)
class Section:
    """One figure or table of the paper, as it came out here.

    Attributes:
        name: of the preset.
        title: as in the paper.
        findings: one sentence each: what agrees, what does not.
        pictures: of ours, and of the paper's beside it where it has numbers.
        tables: of both.
        notes: how it was made: setting, seeds, device, seconds, day.
        remarks: why it may differ from the paper.
    """

    name: str
    title: str
    findings: tuple[str, ...]
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def shown(value: Value) -> str:
    """Write a value as a table shows it."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
