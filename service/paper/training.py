"""Fig. 4b: the training of single cells, as curves with their spread."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from service.paper.results import Results, stacked
from service.paper.sections import Picture, Section, Table, Value
from service.results import figures

METRICS: Final = ("train_loss", "accuracy")
CELLS: Final = {"sgd": (0.6, 1e-3), "rmsprop": (0.01, 1e-5)}
"""Learning rate and ε of the paper's two examples."""
COLOURS: Final = {"baseline": "tab:red", "ddpnopt": "tab:blue"}

Curves = dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]
"""By method: steps (P,) and values (runs, P), NaN where a run has left."""


def section(results: Results) -> Section:
    """Build the section."""
    shown = {
        (grid["baseline"], metric): _curves(results, sweep, position, grid["baseline"], metric)
        for sweep in results.sweeps.values()
        for position, grid in enumerate(sweep["spec"]["grids"])
        if grid["baseline"] in CELLS
        for metric in METRICS
    }
    findings = [compared(*key, curves) for key, curves in shown.items()]
    table = Table(
        "fig4b",
        "mean and standard deviation over the seeds at each point",
        ("baseline", "metric", "method", "step", "n", "mean", "sd"),
        tuple(row for key, curves in shown.items() for row in _rows(*key, curves)),
    )
    picture = Picture("fig4b", "Mean over the seeds, with one standard deviation", _figure(shown))
    return Section(
        results.preset.name, results.preset.title, tuple(findings), (picture,), (table,), results.notes()
    )


def _curves(results: Results, sweep: dict[str, Any], position: int, baseline: str, metric: str) -> Curves:
    rate, reg = CELLS[baseline]
    found: dict[str, list[dict[str, Any]]] = {"baseline": [], "ddpnopt": []}
    for curve in results.client.curves(sweep["id"], metric=metric, grid=position):
        if curve["learning_rate"] == rate and curve["vxx_reg"] in (None, reg):
            found[curve["method"]].append(curve)
    return {method: stacked(sweep["spec"], metric, own) for method, own in found.items()}


def compared(baseline: str, metric: str, curves: Curves) -> str:
    """Say how the runs that came to their end differ from one method to the other."""
    rate, reg = CELLS[baseline]
    ends = {method: values[np.isfinite(values[:, -1]), -1] for method, (_, values) in curves.items()}
    told = "; ".join(
        f"{'DDPNOpt' if method == 'ddpnopt' else figures.BASELINES[baseline]} {_summed_up(end)} "
        f"({len(end)} of {len(curves[method][1])} seeds)"
        for method, end in ends.items()
    )
    said = f"{figures.BASELINES[baseline]} at learning rate {rate:g}, ε {reg:g}, {figures.VALUES[metric]}"
    if any(len(end) < 2 for end in ends.values()):
        return f"{said} at the end: {told}: too few to compare the spread."
    smaller = np.std(ends["ddpnopt"], ddof=1) < np.std(ends["baseline"], ddof=1)
    return f"{said} at the end: {told}; the spread is {'smaller' if smaller else 'not smaller'} with DDPNOpt."


def _summed_up(end: np.ndarray[Any, Any]) -> str:
    """Return mean ± standard deviation, as far as there are any."""
    if not len(end):
        return "diverged"
    return f"{end.mean():.3g} ± {end.std(ddof=1):.2g}" if len(end) > 1 else f"{end[0]:.3g}"


def _rows(baseline: str, metric: str, curves: Curves) -> list[tuple[Value, ...]]:
    rows: list[tuple[Value, ...]] = []
    for method, (steps, values) in curves.items():
        for step, column in zip(steps.tolist(), values.T, strict=True):
            own = column[np.isfinite(column)]
            mean = float(own.mean()) if len(own) else None
            spread = float(own.std(ddof=1)) if len(own) > 1 else None
            rows.append((baseline, metric, method, step, len(own), mean, spread))
    return rows


def _figure(shown: dict[tuple[str, str], Curves]) -> Figure:
    baselines = list(dict.fromkeys(baseline for baseline, _ in shown))
    figure = Figure(figsize=(4 * len(baselines), 5), layout="constrained")
    axes = figure.subplots(len(METRICS), len(baselines), squeeze=False)
    for column, baseline in enumerate(baselines):
        for line, metric in zip(axes, METRICS, strict=True):
            _draw(line[column], baseline, metric, shown[baseline, metric])
        rate, reg = CELLS[baseline]
        axes[0][column].set_title(f"learning rate {rate:g}, ε = {reg:g}", fontsize=9)
    return figure


def _draw(ax: Axes, baseline: str, metric: str, curves: Curves) -> None:
    for method, (points, curve) in curves.items():
        name = "DDPNOpt" if method == "ddpnopt" else figures.BASELINES[baseline]
        spread_there = np.isfinite(curve).sum(axis=0) > 1
        steps, values = points[spread_there], curve[:, spread_there]
        mean, spread = np.nanmean(values, axis=0), np.nanstd(values, axis=0, ddof=1)
        ax.plot(steps, mean, label=name, color=COLOURS[method])
        ax.fill_between(steps, mean - spread, mean + spread, color=COLOURS[method], alpha=0.2, linewidth=0)
    ax.set(xlabel="iterations", ylabel=figures.TITLES[metric].partition(" (")[0])
    ax.legend(fontsize=8, frameon=False)
