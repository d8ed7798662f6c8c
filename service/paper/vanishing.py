"""Figs. 6, 10, 11 and 12: nets in which gradients vanish: who leaves the plateau, and by what updates.

The criterion, stated before anything was trained: a run has escaped if its training loss at the end is below
`ESCAPED` of the plateau's, the loss of a net that tells no input from another: |c|² of the centres for the
Max-Mahalanobis loss, ln(classes) for cross-entropy. A run that diverged has not. Runs that blew up, which
ended above `BLOWN` of the plateau's, were told apart afterwards: they have not either, and stand in no mean.

What the paper says of a method agrees at a learning rate if all seeds leave the plateau, or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from service.sweeps.documents import parse_spec

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
"""The learning rates that Fig. 6 takes out of Fig. 12."""


@dataclass(frozen=True, slots=True)
class Line:
    """One method at one learning rate, over its seeds.

    Attributes:
        name: as in the paper's legend.
        settings: what its grid sets besides the axes, by the name of the option.
        setting: what tells it from the others of its name; empty if nothing does.
        steps: (P,) of the loss.
        losses: (seeds, P), NaN where a run has left.
        norms: (T,) the mean update norm of each layer over seeds and steps; None if nothing was recorded.
        plateau: the loss of a net that learns nothing.
    """

    name: str
    learning_rate: float
    settings: tuple[tuple[str, str], ...]
    steps: NDArray[np.int64]
    losses: NDArray[np.float64]
    norms: NDArray[np.float64] | None
    plateau: float
    setting: str = ""

    @property
    def label(self) -> str:
        """The name, the learning rate and what else tells it from others."""
        return ", ".join(part for part in (self.name, f"{self.learning_rate:g}", self.setting) if part)

    def escaped(self) -> int:
        """Count the seeds that left the plateau."""
        return int((self.losses[:, -1] < ESCAPED * self.plateau).sum())

    def back(self) -> int:
        """Count the seeds that had left the plateau on the way and have not escaped at the end."""
        left = (self.losses < ESCAPED * self.plateau).any(axis=1)
        return int(left.sum()) - self.escaped()

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
    return _section(results, lambda line: True)


def fig6(results: Results) -> Section:
    """Build the section of Fig. 6, which shows some lines of Fig. 12."""
    return _section(results, lambda line: SHOWN_IN_FIG6.get(line.name) == line.learning_rate)


def _section(results: Results, is_shown: Callable[[Line], bool]) -> Section:
    name = results.preset.name
    by_sweep = {
        spec: list(filter(is_shown, told_apart(list(_lines(results, sweep)))))
        for spec, sweep in results.sweeps.items()
    }
    return Section(
        name,
        results.preset.title,
        (
            *(agreement(spec, lines) for spec, lines in by_sweep.items()),
            *(_finding(spec, line) for spec, lines in by_sweep.items() for line in lines),
        ),
        (
            Picture(
                name,
                "Training loss, mean over the seeds; and the mean norm of each layer's update. A run escapes "
                f"that ends below {ESCAPED:g} of the plateau's loss, and blew up if it ends above {BLOWN:g} "
                "times it.",
                _figure(by_sweep),
            ),
        ),
        (_table(name, by_sweep),),
        results.notes(),
    )


def told_apart(lines: Sequence[Line]) -> list[Line]:
    """Return the lines with that of their settings in which those of one name differ."""
    common = {
        name: set.intersection(*(set(line.settings) for line in lines if line.name == name))
        for name in {line.name for line in lines}
    }
    return [
        replace(line, setting=", ".join(" ".join(p) for p in line.settings if p not in common[line.name]))
        for line in lines
    ]


def _lines(results: Results, sweep: dict[str, Any]) -> Iterator[Line]:
    spec, seen = sweep["spec"], set()
    grids = parse_spec(spec).grids
    plateau = MMC_NORM if spec["loss"] == "mmc" else math.log(CATALOG[spec["dataset"]].classes)
    for position, grid in enumerate(spec["grids"]):
        curves = results.client.curves(sweep["id"], metric="train_loss", grid=position)
        records = list(results.client.records(sweep["id"], "update_norm", grid=position))
        second = grid["ddpnopt"]["dynamics"] == "second_order"
        for rate in grid["learning_rate"]:
            for method in ("baseline", "ddpnopt"):
                name = _name(grid["baseline"], method, second=second)
                settings = tuple(grids[position].settings(method))
                own = [c for c in curves if (c["method"], c["learning_rate"]) == (method, rate)]
                if not own or (name, rate, settings) in seen:  # a baseline that two grids share
                    continue
                seen.add((name, rate, settings))
                norms = [
                    r["values"].mean(axis=0)
                    for r in records
                    if (r["method"], r["learning_rate"]) == (method, rate) and len(r["values"])
                ]
                losses = stacked(spec, "train_loss", own)
                yield Line(name, rate, settings, *losses, np.mean(norms, axis=0) if norms else None, plateau)


def _name(baseline: str, method: str, *, second: bool) -> str:
    if method == "baseline":
        return "SGD-VGR" if baseline == "sgd_vgr" else figures.BASELINES[baseline]
    if baseline in ("rmsprop", "adam"):
        return "DDPNOpt*"
    return "DDPNOpt2nd" if second else "DDPNOpt"


def agreement(spec: str, lines: Sequence[Line]) -> str:
    """Count where the paper's claim holds, and name the others."""
    claims = published.escapes(spec)
    told = [line for line in lines if line.name in claims]
    differ = [line for line in told if line.escaped() != (len(line.losses) if claims[line.name] else 0)]
    said = "; ".join(f"{line.label} ({line.escaped()} of {len(line.losses)} seeds)" for line in differ)
    return (
        f"{TITLES[spec]}: that every seed leaves the plateau, or that none does, is as in the paper for "
        f"{len(told) - len(differ)} of {len(told)} methods at a learning rate"
        f"{f', and otherwise for: {said}' if differ else ''}."
    )


def _finding(spec: str, line: Line) -> str:
    seeds = len(line.losses)
    end = line.final()
    lost = f", {line.diverged()} diverged" if line.diverged() else ""
    lost += f", {line.blown()} blew up" if line.blown() else ""
    lost += f", {line.back()} had left the plateau before" if line.back() else ""
    verbs = {0: "does not escape", seeds: "escapes"}
    verb = verbs.get(line.escaped(), "escapes in part")
    kept = " of the others" if line.diverged() or line.blown() else ""
    told = "" if end is None else f", training loss{kept} {end:.3g} at the end (plateau {line.plateau:.3g})"
    return f"{TITLES[spec]}: {line.label}: {verb}, {line.escaped()} of {seeds} seeds{lost}{told}."


def _table(name: str, by_sweep: dict[str, list[Line]]) -> Table:
    every = [line for lines in by_sweep.values() for line in lines]
    layers = max((len(line.norms) for line in every if line.norms is not None), default=0)
    rows: list[tuple[Value, ...]] = []
    for spec, lines in by_sweep.items():
        for line in lines:
            norms = [None] * layers if line.norms is None else [float(norm) for norm in line.norms]
            rows.append(
                (
                    *(spec, line.name, line.learning_rate, line.setting, len(line.losses)),
                    *(line.escaped(), line.back(), line.diverged(), line.blown(), line.final(), *norms),
                )
            )
    columns = (
        *("sweep", "method", "learning_rate", "setting", "seeds"),
        *("escaped", "left_before", "diverged", "blown", "final_train_loss"),
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
            there = np.isfinite(line.losses).any(axis=0)
            mean = np.nanmean(line.losses[:, there], axis=0)
            (drawn,) = left.plot(line.steps[there], mean, label=line.label, linewidth=1.2)
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
