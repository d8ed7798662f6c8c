"""Figs. 6, 10, 11 and 12: nets in which gradients vanish: who leaves the plateau, and by what updates.

The criterion, stated before anything was trained: a run has escaped if its training loss at the end is below
`ESCAPED` of the plateau's, the loss of a net that tells no input from another: |c|² of the centres for the
Max-Mahalanobis loss, ln(classes) for cross-entropy. A run that diverged has not, nor has one that
blew up, which ended above `BLOWN` of the plateau's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ddpnopt.config import MMC_NORM
from ddpnopt.datasets.catalog import CATALOG
from service.paper import published
from service.paper.results import Results, stacked
from service.paper.sections import Picture, Section, Table, Value
from service.results import figures

ESCAPED: Final = 0.9
BLOWN: Final = 3.0
SHOWN: Final = 1.3
"""Of the plateau's loss: what is above that is not drawn."""
TITLES: Final = {
    "fig12": "Max-Mahalanobis loss, sigmoid",
    "fig10-ce": "cross-entropy, sigmoid",
    "fig10-relu": "Max-Mahalanobis loss, ReLU",
    "fig11": "Max-Mahalanobis loss, sigmoid",
}
SHOWN_IN_FIG6: Final = {"SGD-VGR": 0.1, "EKFAC": 0.01, "DDPNOpt": 0.01, "DDPNOpt2nd": 0.01}
"""The learning rates that Fig. 6 takes out of Fig. 12: in the paper 0.03 where here is 0.01, since at 0.03
DDPNOpt2nd blows up here."""


@dataclass(frozen=True, slots=True)
class Line:
    """One method at one learning rate, over its seeds.

    Attributes:
        name: as in the paper's legend.
        steps: (P,) of the loss.
        losses: (seeds, P), NaN where a run has left.
        norms: (T,) the mean update norm of each layer over seeds and steps; None if nothing was recorded.
        plateau: the loss of a net that learns nothing.
    """

    name: str
    learning_rate: float
    steps: NDArray[np.int64]
    losses: NDArray[np.float64]
    norms: NDArray[np.float64] | None
    plateau: float

    @property
    def label(self) -> str:
        """The name and the learning rate."""
        return f"{self.name}, {self.learning_rate:g}"

    def escaped(self) -> int:
        """Count the seeds that left the plateau."""
        return int((self.losses[:, -1] < ESCAPED * self.plateau).sum())

    def diverged(self) -> int:
        """Count the seeds that have no loss at the end."""
        return int(np.isnan(self.losses[:, -1]).sum())

    def blown(self) -> int:
        """Count the seeds that ended far above the plateau."""
        return int((self.losses[:, -1] > BLOWN * self.plateau).sum())

    def final(self) -> float | None:
        """Return the mean loss at the end of the seeds that have one and did not blow up."""
        ends = np.where(self.losses[:, -1] > BLOWN * self.plateau, np.nan, self.losses[:, -1])
        return float(np.nanmean(ends)) if np.isfinite(ends).any() else None


def section(results: Results) -> Section:
    """Build the section of a preset of such nets."""
    name = results.preset.name
    by_sweep = {spec: list(_lines(results, sweep)) for spec, sweep in results.sweeps.items()}
    if name == "fig6":
        by_sweep = {spec: [line for line in lines if _in_fig6(line)] for spec, lines in by_sweep.items()}
    return Section(
        name,
        results.preset.title,
        (
            *(_agreement(spec, lines) for spec, lines in by_sweep.items()),
            *(_finding(spec, line) for spec, lines in by_sweep.items() for line in lines),
        ),
        (
            Picture(
                name,
                "Training loss, mean over the seeds; and the mean norm of each layer's update",
                _figure(by_sweep),
            ),
        ),
        (_table(name, by_sweep),),
        results.notes(),
    )


def _in_fig6(line: Line) -> bool:
    return SHOWN_IN_FIG6.get(line.name) == line.learning_rate


def _lines(results: Results, sweep: dict[str, Any]) -> Iterator[Line]:
    spec, seen = sweep["spec"], set()
    plateau = MMC_NORM if spec["loss"] == "mmc" else math.log(CATALOG[spec["dataset"]].classes)
    for position, grid in enumerate(spec["grids"]):
        curves = results.client.curves(sweep["id"], metric="train_loss", grid=position)
        records = list(results.client.records(sweep["id"], "update_norm", grid=position))
        second = grid["ddpnopt"]["dynamics"] == "second_order"
        for rate in grid["learning_rate"]:
            for method in ("baseline", "ddpnopt"):
                name = _name(grid["baseline"], method, second=second)
                own = [c for c in curves if (c["method"], c["learning_rate"]) == (method, rate)]
                if not own or (name, rate) in seen:  # a baseline that two grids share
                    continue
                seen.add((name, rate))
                norms = [
                    r["values"].mean(axis=0)
                    for r in records
                    if (r["method"], r["learning_rate"]) == (method, rate) and len(r["values"])
                ]
                losses = stacked(spec, "train_loss", own)
                yield Line(name, rate, *losses, np.mean(norms, axis=0) if norms else None, plateau)


def _name(baseline: str, method: str, *, second: bool) -> str:
    if method == "baseline":
        return "SGD-VGR" if baseline == "sgd_vgr" else figures.BASELINES[baseline]
    if baseline in ("rmsprop", "adam"):
        return "DDPNOpt*"
    return "DDPNOpt2nd" if second else "DDPNOpt"


def _agreement(spec: str, lines: list[Line]) -> str:
    """Say of which methods the paper's claim holds, at the learning rate that serves them best."""
    claims = published.escapes(spec)
    best: dict[str, int] = {}
    for line in lines:
        best[line.name] = max(best.get(line.name, 0), line.escaped())
    told = {name: count for name, count in best.items() if name in claims}
    agree = [name for name, count in told.items() if (count > 0) == claims[name]]
    differ = [
        f"{name} {'does' if count else 'does not'}" for name, count in told.items() if name not in agree
    ]
    said = f"; otherwise: {', '.join(differ)}" if differ else ""
    return (
        f"{TITLES[spec]}: whether a method leaves the plateau, at one learning rate in one seed at least, is "
        f"as in the paper for {len(agree)} of {len(told)} methods{said}."
    )


def _finding(spec: str, line: Line) -> str:
    seeds = len(line.losses)
    end = line.final()
    lost = f", {line.diverged()} diverged" if line.diverged() else ""
    lost += f", {line.blown()} blew up" if line.blown() else ""
    verbs = {0: "does not escape", seeds: "escapes"}
    verb = verbs.get(line.escaped(), "escapes in part")
    told = "" if end is None else f", training loss {end:.3g} at the end (plateau {line.plateau:.3g})"
    return f"{TITLES[spec]}: {line.label}: {verb}, {line.escaped()} of {seeds} seeds{lost}{told}."


def _table(name: str, by_sweep: dict[str, list[Line]]) -> Table:
    layers = max(len(line.norms) for lines in by_sweep.values() for line in lines if line.norms is not None)
    rows: list[tuple[Value, ...]] = []
    for spec, lines in by_sweep.items():
        for line in lines:
            norms = [None] * layers if line.norms is None else [float(norm) for norm in line.norms]
            rows.append(
                (
                    *(spec, line.name, line.learning_rate, len(line.losses)),
                    *(line.escaped(), line.diverged(), line.blown(), line.final(), *norms),
                )
            )
    columns = (
        "sweep",
        "method",
        "learning_rate",
        "seeds",
        "escaped",
        "diverged",
        "blown",
        "final_train_loss",
    )
    return Table(
        name,
        "seeds that left the plateau, and mean update norm by layer",
        (*columns, *(f"update_norm_{t + 1}" for t in range(layers))),
        tuple(rows),
    )


def _figure(by_sweep: dict[str, list[Line]]) -> Figure:
    figure = Figure(figsize=(11, 3.4 * len(by_sweep)), layout="constrained")
    axes = figure.subplots(len(by_sweep), 2, squeeze=False)
    for (spec, lines), (left, right) in zip(by_sweep.items(), axes, strict=True):
        left.set_prop_cycle(color=colormaps["tab20"].colors)  # type: ignore[attr-defined]
        for line in lines:
            (drawn,) = left.plot(line.steps, np.nanmean(line.losses, axis=0), label=line.label, linewidth=1.2)
            if line.norms is not None:
                layers = range(1, len(line.norms) + 1)
                right.plot(layers, line.norms, "o-", markersize=3, color=drawn.get_color(), label=line.label)
        left.axhline(lines[0].plateau, linestyle=":", color="grey", linewidth=0.8)
        left.set(xlabel="iterations", ylabel="training loss", title=TITLES[spec])
        left.set_ylim(0, SHOWN * lines[0].plateau)
        right.set(xlabel="layer", ylabel="update norm", yscale="log")
        handles, labels = left.get_legend_handles_labels()
        right.legend(handles, labels, fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
