"""Fig. 3 and Table 4: what an update costs in seconds and bytes, and how that grows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ddpnopt.probes import COST
from service.paper import published
from service.paper.results import Results
from service.paper.sections import Picture, Section, Table, Value
from service.results import figures

AXES: Final = {"B": "batch size", "X": "width", "L": "layers"}
UNITS: Final = {"seconds": ("ms per update", 1e3), "bytes": ("peak memory, MiB", 2.0**-20)}
"""What a measure is shown in, and its factor."""


@dataclass(frozen=True, slots=True)
class Cost:
    """One method on one net.

    Attributes:
        method: the baseline's name, `ddpnopt` for a partner.
        baseline: whose preconditioner.
        size: batch size B, width X and layers L.
        seconds, bytes: medians over the runs that did not diverge before.
    """

    method: str
    baseline: str
    size: dict[str, int]
    seconds: float
    bytes: float

    @property
    def label(self) -> str:
        """The method as shown; a DDPNOpt with its preconditioner."""
        name = figures.BASELINES[self.baseline]
        return f"DDPNOpt ({name})" if self.method == "ddpnopt" else name

    def of(self, measure: str) -> float:
        """Return the seconds or the bytes."""
        return float(getattr(self, measure))


@dataclass(frozen=True, slots=True)
class Growth:
    """How a measure grows along an axis: it goes with size^exponent.

    Attributes:
        label: of the method.
        method: as in Table 4.
        sizes: of the points of the fit.
        values: of the measure there.
        exponent: by least squares in log-log.
    """

    label: str
    method: str
    measure: str
    axis: str
    sizes: tuple[int, ...]
    values: tuple[float, ...]
    exponent: float


def fig3(results: Results) -> Section:
    """Build the section of costs over the batch size."""
    costs = sorted(_costs(results), key=lambda cost: (cost.label, cost.size["B"]))
    return Section(
        results.preset.name,
        results.preset.title,
        (*_ratios(costs), *_unmeasured(results)),
        (Picture("fig3", "Time and memory of an update over the batch size", _over_batches(costs)),),
        (_table("fig3", "an update of a run that trains alone", costs),),
        results.notes(),
    )


def table4(results: Results) -> Section:
    """Build the section of fitted exponents."""
    costs = list(_costs(results))
    growths = [
        growth
        for method in dict.fromkeys((cost.label, cost.method) for cost in costs)
        for measure in COST
        for axis in AXES
        if (growth := fitted(costs, *method, measure, axis)) is not None
    ]
    columns = ("method", "measure", "axis", "sizes", "values", "exponent", "paper_exponent", "paper_term")
    return Section(
        results.preset.name,
        results.preset.title,
        (*(_finding(growths, *kind) for kind in _kinds(growths)), *_unmeasured(results)),
        (
            Picture(
                "table4",
                "Growth along batch size, width and layers; at the lines' ends the exponents",
                _fits(growths),
            ),
        ),
        (
            Table("table4", "fitted exponents beside those of Table 4", columns, tuple(map(_row, growths))),
            _table("table4-costs", "an update of a run that trains alone", costs),
        ),
        results.notes(),
    )


def fitted(costs: Sequence[Cost], label: str, method: str, measure: str, axis: str) -> Growth | None:
    """Fit a method's growth along an axis, over the most costs that differ in it alone; None below two."""
    series: dict[tuple[int, ...], dict[int, float]] = defaultdict(dict)
    for cost in costs:
        if cost.label == label:
            others = tuple(size for name, size in cost.size.items() if name != axis)
            series[others][cost.size[axis]] = cost.of(measure)
    points = sorted(max(series.values(), key=len, default={}).items())
    if len(points) < 2:
        return None
    sizes, values = zip(*points, strict=True)
    exponent = float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
    return Growth(label, method, measure, axis, sizes, values, exponent)


def _costs(results: Results) -> Iterator[Cost]:
    for sweep in results.sweeps.values():
        spec = sweep["spec"]
        hidden = spec["model"]["hidden"]
        size = {"B": spec["training"]["batch_size"], "X": max(hidden), "L": len(hidden) + 1}
        for position, grid in enumerate(spec["grids"]):
            found: dict[str, list[Any]] = defaultdict(list)
            for record in results.client.records(sweep["id"], "cost", grid=position):
                if np.isfinite(record["values"]).all() and len(record["values"]):
                    found[record["method"]].append(record["values"][-1])
            for method, values in found.items():
                name = grid["baseline"] if method == "baseline" else "ddpnopt"
                yield Cost(name, grid["baseline"], size, *np.median(values, axis=0).tolist())


def _unmeasured(results: Results) -> Iterator[str]:
    lost = {name: sweep["progress"]["runs_diverged"] for name, sweep in results.sweeps.items()}
    if any(lost.values()):
        told = ", ".join(f"{count} of {name}" for name, count in lost.items() if count)
        yield f"Runs that diverged, which may be before their third update, the one that is measured: {told}."


def _ratios(costs: Sequence[Cost]) -> Iterator[str]:
    """Set every method beside Adam, and a partner beside its baseline, where both were measured."""
    by_name = {(cost.label, cost.size["B"]): cost for cost in costs}
    for label in dict.fromkeys(cost.label for cost in costs):
        own = [cost for cost in costs if cost.label == label]
        for other in dict.fromkeys(("Adam", figures.BASELINES[own[0].baseline])):
            pairs = [(cost, by_name.get((other, cost.size["B"]))) for cost in own if label != other]
            both = [(cost, beside) for cost, beside in pairs if beside is not None]
            if both:
                yield f"{label} against {other}: " + "; ".join(_ratio(*pair) for pair in (both[0], both[-1]))


def _ratio(cost: Cost, other: Cost) -> str:
    return (
        f"{cost.seconds / other.seconds:.2f} times the time and {cost.bytes / other.bytes:.2f} times the "
        f"memory at batch {cost.size['B']}"
    )


def _kinds(growths: Sequence[Growth]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((growth.label, growth.measure) for growth in growths))


def _finding(growths: Sequence[Growth], label: str, measure: str) -> str:
    own = [growth for growth in growths if (growth.label, growth.measure) == (label, measure)]
    paper = published.complexities(own[0].method, measure)
    said = ", ".join(f"{AXES[growth.axis]}^{growth.exponent:.2f}" for growth in own)
    theirs = f" (the paper: {next(iter(paper.values())).term})" if paper else ""
    return f"{label}, {measure} of an update: {said}{theirs}."


def _row(growth: Growth) -> tuple[Value, ...]:
    paper = published.complexities(growth.method, growth.measure).get(growth.axis)
    return (
        *(growth.label, growth.measure, growth.axis),
        " ".join(map(str, growth.sizes)),
        " ".join(f"{value:.4g}" for value in growth.values),
        growth.exponent,
        *((paper.exponent, paper.term) if paper else (None, None)),
    )


def _table(name: str, caption: str, costs: Sequence[Cost]) -> Table:
    rows: list[tuple[Value, ...]] = [
        (cost.label, *cost.size.values(), cost.seconds, cost.bytes) for cost in costs
    ]
    return Table(name, caption, ("method", "batch", "width", "layers", "seconds", "bytes"), tuple(rows))


def _over_batches(costs: Sequence[Cost]) -> Figure:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 2), COST, strict=True):
        unit, factor = UNITS[measure]
        for label in dict.fromkeys(cost.label for cost in costs):
            own = [cost for cost in costs if cost.label == label]
            values = [cost.of(measure) * factor for cost in own]
            axes.loglog([cost.size["B"] for cost in own], values, marker="o", markersize=4, label=label)
        axes.set_xlabel("batch size")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3, which="both")
    if costs:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _fits(growths: Sequence[Growth]) -> Figure:
    figure = Figure(figsize=(10, 6), layout="constrained")
    grid = figure.subplots(len(COST), len(AXES), squeeze=False)
    colours = {label: f"C{i}" for i, label in enumerate(dict.fromkeys(growth.label for growth in growths))}
    for line, measure in zip(grid, COST, strict=True):
        unit, factor = UNITS[measure]
        for axes, axis in zip(line, AXES, strict=True):
            own = [growth for growth in growths if (growth.measure, growth.axis) == (measure, axis)]
            for growth in own:
                values, colour = [value * factor for value in growth.values], colours[growth.label]
                axes.loglog(growth.sizes, values, "o-", markersize=4, color=colour)
                axes.annotate(
                    f" {growth.exponent:.2f}",
                    (growth.sizes[-1], values[-1]),
                    color=colour,
                    fontsize=8,
                    va="center",
                )
            sizes = sorted({size for growth in own for size in growth.sizes})
            axes.set_xticks(sizes, list(map(str, sizes)), fontsize=7)
            axes.set_xticks([], minor=True)
            axes.margins(x=0.18)
            axes.set_xlabel(f"{AXES[axis]}, {axis}")
            axes.set_ylabel(unit)
            axes.grid(alpha=0.3, which="both")
    handles = [Line2D([], [], color=colour, marker="o", label=label) for label, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles) or 1, fontsize=8)
    return figure
