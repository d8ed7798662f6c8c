"""Fig. 4a, Fig. 9 and Tables 9 and 10: heatmaps beside the paper's, cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from service.paper import compare, published
from service.paper.compare import PanelComparison
from service.paper.results import Results
from service.paper.sections import Picture, Section, Table, Value
from service.results import figures
from service.results.statistics import CellState, Heatmap

METRICS: Final = ("train_loss", "accuracy")
FALSE: Final = 0.05
"""Share of false ones among the cells that are said to differ (Benjamini-Hochberg, over a panel)."""
Numbers = Sequence[Sequence[float | None]]


def heatmaps(results: Results, metric: str) -> list[Heatmap]:
    """Return the panels of a preset's sweeps, one for each grid that has cells."""
    return [
        results.client.heatmap(sweep["id"], metric=metric, grid=grid)
        for sweep in results.sweeps.values()
        for grid, settings in enumerate(sweep["spec"]["grids"])
        if settings["vxx_reg"]
    ]


def tables(results: Results) -> Section:
    """Build the section of Tables 9 and 10: the numbers of Fig. 4a, which has the picture."""
    return _section(results, drawn=False)


def section(results: Results) -> Section:
    """Build the section of a preset whose sweeps are grids of the paper's Fig. 4a or 9."""
    return _section(results, drawn=True)


def _section(results: Results, *, drawn: bool) -> Section:
    panels = {metric: heatmaps(results, metric) for metric in METRICS}
    compared = {metric: compared_with_the_paper(found) for metric, found in panels.items()}
    findings: list[str] = []
    for metric in METRICS:
        findings += _findings(metric, panels[metric], compared[metric])
    name = results.preset.name
    return Section(
        name,
        results.preset.title,
        tuple(findings),
        (Picture(name, _caption(compared), beside(panels)),) if drawn else (),
        tuple(_table(name, metric, panels[metric], compared[metric]) for metric in METRICS),
        results.notes(),
    )


def compared_with_the_paper(panels: Sequence[Heatmap]) -> list[PanelComparison]:
    """Compare those panels of which the paper publishes numbers."""
    return [
        compare.panel(panel, reference)
        for panel in panels
        if (reference := published.grid(panel.baseline, panel.metric)) is not None
    ]


def _findings(metric: str, panels: Sequence[Heatmap], compared: Sequence[PanelComparison]) -> list[str]:
    cells = [cell for panel in panels for cell in panel.cells]
    positive = sum((cell.improvement or 0.0) > 0 for cell in cells)
    sure = sum(cell.state == CellState.BETTER for cell in cells)
    worse = sum(cell.state == CellState.WORSE for cell in cells)
    found = sum(cell.q_value is not None and cell.q_value < FALSE for cell in cells)
    said = [
        f"{figures.TITLES[metric]}: DDPNOpt is better in {positive} of {len(cells)} cells, "
        f"surely so in {sure}, surely worse in {worse}: by the 95 % interval of each cell alone. With the "
        f"false discoveries of a panel held to {FALSE:.0%}, {found} cells differ."
    ]
    if compared:
        total = sum(len(panel.cells) for panel in compared)
        agreeing = sum(panel.agreeing for panel in compared)
        there = sum(panel.published_positive for panel in compared)
        table = compared[0].table.replace("table", "Table ")
        said.append(
            f"{figures.TITLES[metric]}: the sign agrees with {table} in "
            f"{agreeing} of {total} cells, of which {there} are positive in the paper; surely on the other "
            f"side: {sum(panel.contradicting for panel in compared)}."
        )
        said += [
            f"{figures.BASELINES[panel.baseline]}, {figures.TITLES[metric]}: {panel.agreeing} of "
            f"{len(panel.cells)} signs agree, rank correlation of the improvements {_rho(panel)}; the "
            f"baseline alone, here and in the paper: {_alone(panel)}."
            for panel in compared
        ]
    return said


def _alone(panel: PanelComparison) -> str:
    return ", ".join(
        f"{'diverged' if row.ours is None else f'{row.ours:.3g}'} and {row.published:.3g} "
        f"at {row.learning_rate:g}"
        for row in panel.baselines
    )


def _rho(panel: PanelComparison) -> str:
    rho = panel.rank_correlation
    return "not defined" if rho is None else f"{rho:+.2f}"


def _caption(compared: dict[str, list[PanelComparison]]) -> str:
    what = "Improvement by the feedback: blue is better, red worse, in brackets where the interval holds zero"
    return f"{what}; the paper's values below ours." if any(compared.values()) else f"{what}."


def _table(name: str, metric: str, panels: Sequence[Heatmap], compared: Sequence[PanelComparison]) -> Table:
    references = {panel.baseline: published.grid(panel.baseline, metric) for panel in panels}
    rows: list[tuple[Value, ...]] = []
    for panel in panels:
        reference = references[panel.baseline]
        for cell in panel.cells:
            rate, reg = cell.learning_rate, cell.vxx_reg
            theirs: tuple[Value, ...] = (None, None)
            if reference is not None:
                theirs = (reference.alone[rate], reference.ddpnopt[rate, reg])
            rows.append(
                (
                    *(panel.baseline, rate, reg, cell.n, cell.n_diverged_baseline, cell.n_diverged_ddpnopt),
                    *(cell.baseline_mean, cell.ddpnopt_mean, cell.improvement, cell.ci_low, cell.ci_high),
                    *(cell.q_value, cell.state, *theirs),
                )
            )
    paper = "; the last two columns are the paper's" if any(references.values()) else ""
    return Table(
        f"{name}-{metric.replace('_', '-')}",
        f"{figures.TITLES[metric]}, cell by cell{paper}",
        (
            *("baseline", "learning_rate", "vxx_reg", "n", "diverged_baseline", "diverged_ddpnopt"),
            *("baseline_mean", "ddpnopt_mean", "improvement", "ci_low", "ci_high", "q_value", "state"),
            *("paper_baseline", "paper_ddpnopt"),
        ),
        tuple(rows),
    )


# --- the picture ---


def beside(panels: dict[str, list[Heatmap]]) -> Figure:
    """Draw a column for each panel and a row for each metric, the paper's numbers under ours."""
    known = any(published.grid(panel.baseline, panel.metric) for panel in panels[METRICS[0]])
    rows = [(metric, theirs) for metric in METRICS for theirs in ((False, True) if known else (False,))]
    columns = len(panels[METRICS[0]])
    figure = Figure(figsize=(max(4.2, 3.9 * columns), 2.5 * len(rows) + 0.3), layout="constrained")
    table = figure.subplots(len(rows), columns, squeeze=False)
    for line, (metric, theirs) in zip(table, rows, strict=True):
        for ax, panel in zip(line, panels[metric], strict=True):
            _draw(figure, ax, panel, theirs=theirs)
    return figure


def _draw(figure: Figure, ax: Axes, panel: Heatmap, *, theirs: bool) -> None:
    reference = published.grid(panel.baseline, panel.metric)
    if theirs and reference is None:
        ax.set_axis_off()
        return
    cells = [cell for _, line in figures.rows(panel) for cell in line]
    if theirs and reference is not None:
        values: list[float | None] = [reference.improvement(c.learning_rate, c.vxx_reg) for c in cells]
        digits = figures.digits_to(max(abs(value) for value in values if value is not None))
        labels = [f"{value:+.{digits}f}" for value in values if value is not None]
    else:
        values = [cell.improvement for cell in cells]
        labels = [figures.label(cell, figures.digits(panel)) for cell in cells]
    shape = (len(panel.learning_rate), len(panel.vxx_reg))
    numbers = np.array([np.nan if value is None else value for value in values]).reshape(shape)
    end = float(np.nanmax(np.abs(numbers))) if np.isfinite(numbers).any() else 1.0
    image = ax.imshow(numbers, cmap="RdBu", vmin=-end, vmax=end, aspect="auto")
    ax.set_facecolor("0.93")
    for i, label in enumerate(labels):
        row, column = divmod(i, shape[1])
        dark = abs(numbers[row, column]) > 0.65 * end
        ax.text(column, row, label, ha="center", va="center", fontsize=7, color="w" if dark else "k")
    ax.set_xticks(range(shape[1]), [f"{value:g}" for value in panel.vxx_reg], fontsize=7)
    ax.set_yticks(range(shape[0]), [f"{value:g}" for value in panel.learning_rate], fontsize=7)
    ax.set_xlabel(r"$V_{xx}$ regularisation $\epsilon$", fontsize=7)
    ax.set_ylabel("learning rate", fontsize=7)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    whose = "the paper" if theirs else "here"
    ax.set_title(f"{figures.title(panel)}, {whose}", fontsize=8)
    bar = figure.colorbar(mpl.cm.ScalarMappable(image.norm, image.cmap), ax=ax, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=6)
