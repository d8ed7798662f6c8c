"""Heatmaps as one HTML file that needs no server and no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import plotly.io

from service.results import figures
from service.results.statistics import Heatmap


def save(panels: Sequence[Heatmap], path: Path) -> None:
    """Write panels, at least one, with plotly's script inside the file."""
    parts = [
        plotly.io.to_html(
            figures.plotly_figure(panel), full_html=False, include_plotlyjs=position == 0, validate=False
        )
        for position, panel in enumerate(panels)
    ]
    name = escape(panels[0].name)
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><h1>{name}</h1>'
    path.write_text(page + "".join(parts) + "</html>\n", encoding="utf-8")
