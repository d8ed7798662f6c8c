"""The heatmap as a plotly figure (a plain dictionary, for page and export), and the words of printed tables.

Blue is positive, red negative, symmetric about zero, as in the paper's Fig. 4a. A cell whose interval holds
zero is set in brackets and pale; a cell with diverged runs says how many.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, Final

from service.results.statistics import Cell, CellState, Heatmap, SummaryRow

TITLES: Final = {
    "train_loss": "training loss",
    "train_accuracy": "training accuracy (percent points)",
    "test_loss": "test loss",
    "accuracy": "test accuracy (percent points)",
}
VALUES: Final = TITLES | {"train_accuracy": "training accuracy (%)", "accuracy": "test accuracy (%)"}
BASELINES: Final = {
    "sgd": "SGD",
    "rmsprop": "RMSprop",
    "adam": "Adam",
    "kfac": "KFAC",
    "ekfac": "EKFAC",
    "sgd_vgr": "SGD-VGR",
    "emsa": "E-MSA",
    "vanilla_ddp": "Vanilla DDP",
}
PDF_FONTS: Final = 3
"""Matplotlib's kind of font in PDF files. With 42 its version 3.11 draws the letters of a ligature twice."""
SUBTITLE: Final = 50
"""Letters that fit a line under a panel's title."""
SURE: Final = frozenset({CellState.BETTER, CellState.WORSE})
PALE: Final = 0.35
"""How much of its colour an inconclusive cell keeps."""


RED_TO_BLUE: Final = (
    "#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#f7f7f7",
    "#d1e5f0", "#92c5de", "#4393c3", "#2166ac", "#053061",
)  # fmt: skip
"""ColorBrewer's RdBu, the one that matplotlib draws with; plotly's scale of that name runs the other way."""


def title(heatmap: Heatmap) -> str:
    """Return the panel's heading."""
    return f"DDPNOpt vs {BASELINES[heatmap.baseline]}: {TITLES[heatmap.metric]}"


def subtitle(grid: Heatmap | SummaryRow) -> list[str]:
    """Return the lines that say what the grid sets, for under the heading; none if nothing."""
    return textwrap.wrap(grid.setting, SUBTITLE)


def summary_title(baseline: str, metric: str) -> str:
    """Return the heading of a grid's summary."""
    return f"{BASELINES[baseline]}: {VALUES[metric]}"


def spread(row: SummaryRow) -> str:
    """Return mean ± standard deviation, as far as there are any."""
    if row.mean is None:
        return "·"
    return f"{row.mean:.4g}" if row.sd is None else f"{row.mean:.4g} ± {row.sd:.3g}"


def largest(heatmap: Heatmap) -> float:
    """Return the end of the symmetric colour scale."""
    shown = [abs(cell.improvement) for cell in heatmap.cells if cell.improvement is not None]
    return max(shown, default=0.0) or 1.0


def label(cell: Cell, digits: int) -> str:
    """Return what is written in a cell: the improvement, in brackets if inconclusive; diverged counts."""
    lost = f"div {cell.n_diverged_baseline}|{cell.n_diverged_ddpnopt}"
    diverged = cell.n_diverged_baseline or cell.n_diverged_ddpnopt
    if cell.improvement is None:
        return lost if diverged else "·"
    number = f"{cell.improvement:+.{digits}f}"
    number = number if cell.state in SURE else f"({number})"
    return f"{number}\n{lost}" if diverged else number


def digits(heatmap: Heatmap) -> int:
    """Return how many decimals the numbers get."""
    return digits_to(largest(heatmap))


def digits_to(end: float) -> int:
    """Return how many decimals numbers get of which the largest is `end`."""
    return 1 if end >= 10 else 2 if end >= 0.1 else 4


def rows(heatmap: Heatmap) -> list[tuple[float, list[Cell]]]:
    """Return the cells by learning rate."""
    width = len(heatmap.vxx_reg)
    return [
        (rate, list(heatmap.cells[i * width : (i + 1) * width]))
        for i, rate in enumerate(heatmap.learning_rate)
    ]


def hover(cell: Cell) -> str:
    """Return the long form of a cell."""
    if cell.improvement is None:
        return f"{cell.state}: {cell.n_ended} pairs ended"
    interval = "no interval" if cell.ci_low is None else f"95 % [{cell.ci_low:+.4f}, {cell.ci_high:+.4f}]"
    q_value = "" if cell.q_value is None else f", q = {cell.q_value:.2g}"
    return (
        f"{cell.state}: {cell.improvement:+.4f}, {interval}{q_value}<br>"
        f"baseline {cell.baseline_mean:.4f}, DDPNOpt {cell.ddpnopt_mean:.4f}, n = {cell.n}<br>"
        f"diverged: baseline {cell.n_diverged_baseline}, DDPNOpt {cell.n_diverged_ddpnopt}"
    )


def plotly_figure(heatmap: Heatmap) -> dict[str, Any]:
    """Return the figure as plotly's JSON."""
    by_rate = rows(heatmap)
    decimals = digits(heatmap)

    def table(of: Any) -> list[list[Any]]:
        return [[of(cell) for cell in line] for _, line in by_rate]

    def colour(cell: Cell) -> float | None:
        if cell.improvement is None:
            return None
        return cell.improvement * (1.0 if cell.state in SURE else PALE)

    return {
        "data": [
            {
                "type": "heatmap",
                "z": table(colour),
                "x": [f"{value:g}" for value in heatmap.vxx_reg],
                "y": [f"{value:g}" for value in heatmap.learning_rate],
                "text": table(lambda cell: label(cell, decimals).replace("\n", "<br>")),
                "texttemplate": "%{text}",
                "hovertext": table(hover),
                "hovertemplate": "learning rate %{y}, V_xx reg. %{x}<br>%{hovertext}<extra></extra>",
                "zmin": -largest(heatmap),
                "zmax": largest(heatmap),
                "colorscale": [[k / (len(RED_TO_BLUE) - 1), c] for k, c in enumerate(RED_TO_BLUE)],
                "xgap": 2,
                "ygap": 2,
                "colorbar": {"thickness": 12, "outlinewidth": 0},
            }
        ],
        "layout": {
            "title": {"text": _heading(heatmap), "font": {"size": 15}},
            "xaxis": _axis("V<sub>xx</sub> regularisation ε", heatmap.vxx_reg, falling=False),
            "yaxis": _axis("learning rate", heatmap.learning_rate, falling=True),
            "margin": {"l": 60, "r": 10, "t": 40 + 16 * len(subtitle(heatmap)), "b": 50},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "#f1f1f1",
            "font": {"family": "system-ui, sans-serif", "size": 13},
        },
    }


def _heading(heatmap: Heatmap) -> str:
    below = (f"<span style='font-size:11px'>{line}</span>" for line in subtitle(heatmap))
    return "<br>".join([title(heatmap), *below])


def _axis(name: str, values: Sequence[float], *, falling: bool) -> dict[str, Any]:
    """Return an axis of categories that is there before any cell is."""
    ends = [-0.5, len(values) - 0.5]
    return {
        "title": {"text": name},
        "type": "category",
        "categoryorder": "array",
        "categoryarray": [f"{value:g}" for value in values],
        "tickvals": list(range(len(values))),
        "ticktext": [f"{value:g}" for value in values],
        "range": ends[::-1] if falling else ends,
        "showgrid": False,
        "zeroline": False,
    }
