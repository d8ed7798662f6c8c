"""The heatmap as PNG, SVG or PDF, in the manner of the paper's Fig. 4a."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from service.results import figures
from service.results.statistics import Cell, Heatmap

FORMATS: Final = ("png", "svg", "pdf")
COLUMNS: Final = 4
"""Grids that stand side by side."""
CELL_INCHES: Final = 0.85
TITLE_INCHES: Final = 4.8
LEGEND_INCHES: Final = 6.4
"""Widths that the words need, however few the cells are."""
SUBTITLE_INCHES: Final = 0.17
"""Height of a line under a title."""


def save(panels: Sequence[Heatmap], path: Path) -> None:
    """Draw panels and write them in the format that the path's suffix names.

    One grid's panels stand side by side. Of several grids each has a column, and each metric a row, as in
    Fig. 4a.

    Args:
        panels: at least one.
        path: ends in .png, .svg or .pdf.
    """
    lines = _lines(panels)
    widest = max(len(panel.vxx_reg) for panel in panels)
    tallest = max(len(panel.learning_rate) for panel in panels)
    told = max(len(figures.subtitle(panel)) for panel in panels)
    columns = max(map(len, lines))
    figure = Figure(
        figsize=(
            max(LEGEND_INCHES, columns * max(TITLE_INCHES, CELL_INCHES * widest + 1.7)),
            len(lines) * (CELL_INCHES * tallest * 0.8 + 0.8 + SUBTITLE_INCHES * told) + 0.6,
        ),
        layout="constrained",
    )
    table = figure.subplots(len(lines), columns, squeeze=False)
    for row, line in zip(table, lines, strict=True):
        for ax in row[len(line) :]:
            ax.set_axis_off()
        for ax, panel in zip(row, line, strict=False):
            _draw(figure, ax, panel)
    figure.suptitle(f"{panels[0].name}   ({_seeds(panels[0])})", fontsize=11)
    figure.supxlabel(
        "positive (blue): DDPNOpt better · in brackets and pale: not sure · "
        "hatched: diverged runs (baseline|DDPNOpt)",
        fontsize=7,
        color="0.35",
    )
    # A fixed salt and no date: the same numbers give the same file.
    with mpl.rc_context({"svg.hashsalt": "ddpsweep", "pdf.fonttype": figures.PDF_FONTS}):
        figure.savefig(path, dpi=160, metadata=_no_date(path))


def _lines(panels: Sequence[Heatmap]) -> list[list[Heatmap]]:
    if len({panel.grid for panel in panels}) == 1:
        return [list(panels)]
    metrics = dict.fromkeys(panel.metric for panel in panels)
    rows = ([panel for panel in panels if panel.metric == metric] for metric in metrics)
    return [row[i : i + COLUMNS] for row in rows for i in range(0, len(row), COLUMNS)]


def _no_date(path: Path) -> dict[str, Any]:
    return {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})


def _seeds(panel: Heatmap) -> str:
    ended = {cell.n_ended for cell in panel.cells}
    return f"{min(ended)}–{max(ended)} pairs a cell" if len(ended) > 1 else f"{max(ended)} pairs a cell"


def _draw(figure: Figure, ax: Axes, panel: Heatmap) -> None:
    end = figures.largest(panel)
    colours = mpl.colormaps["RdBu"]
    scale = mpl.colors.Normalize(-end, end)
    for y, (_, line) in enumerate(figures.rows(panel)):
        for x, cell in enumerate(line):
            _draw_cell(ax, x, y, cell, colours, scale, figures.digits(panel))
    ax.set_xlim(-0.5, len(panel.vxx_reg) - 0.5)
    ax.set_ylim(len(panel.learning_rate) - 0.5, -0.5)
    ax.set_xticks(range(len(panel.vxx_reg)), [f"{value:g}" for value in panel.vxx_reg])
    ax.set_yticks(range(len(panel.learning_rate)), [f"{value:g}" for value in panel.learning_rate])
    ax.set_xlabel(r"$V_{xx}$ regularisation $\epsilon$")
    ax.set_ylabel("learning rate")
    ax.set_title("\n".join([figures.title(panel), *figures.subtitle(panel)]), fontsize=10)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(mpl.cm.ScalarMappable(scale, colours), ax=ax, fraction=0.05, pad=0.02)
    bar.set_label("improvement", fontsize=8)


def _draw_cell(ax: Axes, x: int, y: int, cell: Cell, colours: Any, scale: Any, digits: int) -> None:
    diverged = cell.n_diverged_baseline or cell.n_diverged_ddpnopt
    sure = cell.state in figures.SURE
    shade = 0.0 if cell.improvement is None else cell.improvement * (1.0 if sure else figures.PALE)
    face = "0.93" if cell.improvement is None else colours(scale(shade))
    ax.add_patch(
        Rectangle(
            (x - 0.48, y - 0.48),
            0.96,
            0.96,
            facecolor=face,
            edgecolor="0.45" if diverged else "none",
            hatch="////" if diverged else None,
            linewidth=0,
        )
    )
    dark = cell.improvement is not None and abs(scale(shade) - 0.5) > 0.33
    ax.text(
        x,
        y,
        figures.label(cell, digits),
        ha="center",
        va="center",
        fontsize=9,
        color="white" if dark else "black",
        fontweight="normal" if sure else "light",
    )
