"""Tables 6 to 8: each baseline at its best learning rate, and its partner there."""

from __future__ import annotations

from typing import Any, Final

from service.paper import published
from service.paper.results import Results
from service.paper.sections import Section, Table, Value
from service.results import figures
from service.results.statistics import Heatmap

METRICS: Final = ("train_loss", "accuracy")


def section(results: Results) -> Section:
    """Build the section of a preset whose sweeps have one grid of one learning rate each."""
    panels = {
        (sweep["spec"]["grids"][0]["baseline"], metric): results.client.heatmap(sweep["id"], metric=metric)
        for sweep in results.sweeps.values()
        for metric in METRICS
    }
    return Section(
        results.preset.name,
        results.preset.title,
        tuple(_finding(panel) for panel in panels.values()),
        (),
        (
            Table(
                "tables6-8",
                "means over the seeds; ε is not told in the paper, whose one number stands in every row",
                (
                    *("baseline", "learning_rate", "metric", "vxx_reg", "n", "baseline_mean", "ddpnopt_mean"),
                    *("improvement", "ci_low", "ci_high", "state", "paper_baseline", "paper_ddpnopt"),
                ),
                tuple(row for panel in panels.values() for row in _rows(panel)),
            ),
        ),
        results.notes(),
    )


def _published(panel: Heatmap) -> dict[str, Any]:
    """Return the paper's values by method; none for a baseline that it has not got."""
    return {
        row.method: getattr(row, panel.metric)
        for row in published.best_tuned()
        if row.baseline == panel.baseline and row.learning_rate == panel.learning_rate[0]
    }


def _finding(panel: Heatmap) -> str:
    paper, cells = _published(panel), panel.cells
    better = sum((cell.improvement or 0.0) > 0 for cell in cells)
    sure = sum(cell.state in figures.SURE for cell in cells)
    alone = next((cell.baseline_mean for cell in cells if cell.baseline_mean is not None), None)
    said = "every run diverged" if alone is None else f"{alone:.3g}"
    theirs = f" (the paper: {paper['baseline']:g}, DDPNOpt {paper['ddpnopt']:g})" if paper else ""
    return (
        f"{figures.BASELINES[panel.baseline]} at {panel.learning_rate[0]:g}, {figures.VALUES[panel.metric]}: "
        f"{said}{theirs}; DDPNOpt is better for {better} of {len(cells)} values of ε, {sure} of the "
        "differences are sure."
    )


def _rows(panel: Heatmap) -> list[tuple[Value, ...]]:
    paper = _published(panel)
    return [
        (
            *(panel.baseline, cell.learning_rate, panel.metric, cell.vxx_reg, cell.n),
            *(cell.baseline_mean, cell.ddpnopt_mean, cell.improvement, cell.ci_low, cell.ci_high),
            *(cell.state, paper.get("baseline"), paper.get("ddpnopt")),
        )
        for cell in panel.cells
    ]
