"""Fig. 8: eigenvalues of the feedback policy in the prediction layer, on k Gaussian clusters.

The criterion, stated before anything was trained: an eigenvalue is non-trivial if it is above `NONTRIVIAL` of
the largest one; the paper's claim holds for a sweep if in every run and at every point there are as many of
them as clusters, and the largest one grows from the first point after the start to the last. Runs that
diverged are counted and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ddpnopt.datasets.catalog import CATALOG
from service.paper.results import Results
from service.paper.sections import Picture, Section, Table, Value

NONTRIVIAL: Final = 1e-6
LOSSES: Final = {"mmc": "Max-Mahalanobis center loss", "cross_entropy": "cross-entropy"}
SHOWN: Final = 22
"""Eigenvalues that are drawn."""


@dataclass(frozen=True, slots=True)
class Spectra:
    """What a sweep's runs recorded.

    Attributes:
        clusters: k.
        steps: (P,) of the points.
        values: (runs, P, n), descending along the last, of the runs that came to the end.
        seeds: of these.
        diverged: how many did not.
    """

    loss: str
    clusters: int
    steps: tuple[int, ...]
    values: NDArray[np.float64]
    seeds: tuple[int, ...]
    diverged: int = 0

    def nontrivial(self) -> NDArray[np.int64]:
        """Count the non-trivial eigenvalues, (runs, P)."""
        counts: NDArray[np.int64] = (self.values > NONTRIVIAL * self.values[..., :1]).sum(axis=-1)
        return counts

    def counts_match(self) -> bool:
        """Tell whether there are as many as clusters, in every run and at every point."""
        return bool((self.nontrivial() == self.clusters).all())

    def grow(self) -> bool:
        """Tell whether the largest eigenvalue grows from the first point after the start to the last."""
        largest = self.values[:, :, 0]
        return bool((largest[:, -1] > largest[:, 1]).all())


def section(results: Results) -> Section:
    """Build the section."""
    every = [_spectra(results, sweep) for sweep in results.sweeps.values()]
    found = [one for one in every if one.seeds]
    return Section(
        results.preset.name,
        results.preset.title,
        tuple(map(_finding, every)),
        ()
        if not found
        else (
            Picture(
                "fig8",
                "Eigenvalues of E[KᵀK] of the last layer, mean of the seeds; dashed: the number of clusters",
                _figure(found),
            ),
        ),
        (
            Table(
                "fig8",
                f"non-trivial eigenvalues (above {NONTRIVIAL:g} of the largest) and the ones around the k-th",
                ("loss", "clusters", "seed", "step", "nontrivial", "largest", "kth", "after_kth"),
                tuple(row for one in found for row in _rows(one)),
            ),
        ),
        results.notes(),
    )


def _spectra(results: Results, sweep: dict[str, Any]) -> Spectra:
    spec = sweep["spec"]
    last = spec["training"]["steps"]
    whole = [
        record
        for record in results.client.records(sweep["id"], "policy_spectrum")
        if len(record["steps"]) and record["steps"][-1] == last
    ]
    runs = sum(run["method"] == "ddpnopt" for run in results.client.runs(sweep["id"]))
    return Spectra(
        spec["loss"],
        CATALOG[spec["dataset"]].classes,
        tuple(whole[0]["steps"]) if whole else (),
        np.array([record["values"] for record in whole]),
        tuple(record["seed"] for record in whole),
        runs - len(whole),
    )


def _finding(one: Spectra) -> str:
    lost = f"; DDPNOpt runs that diverged: {one.diverged}" if one.diverged else ""
    if not one.seeds:
        return f"{one.clusters} clusters, {LOSSES[one.loss]}: nothing to count{lost}."
    counts = one.nontrivial()
    seen = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    match = "as many as clusters" if one.counts_match() else f"not {one.clusters}, the number of clusters"
    grow = "grows" if one.grow() else "does not grow in every run"
    return (
        f"{one.clusters} clusters, {LOSSES[one.loss]}: {seen} non-trivial eigenvalues at all points, "
        f"{match}; the largest {grow} from step {one.steps[1]} to {one.steps[-1]}{lost}."
    )


def _rows(one: Spectra) -> list[tuple[Value, ...]]:
    counts, k = one.nontrivial(), one.clusters
    return [
        (
            *(one.loss, k, seed, step, int(counts[run, point])),
            *(float(one.values[run, point, i]) for i in (0, k - 1, k)),
        )
        for run, seed in enumerate(one.seeds)
        for point, step in enumerate(one.steps)
    ]


def _figure(found: Sequence[Spectra]) -> Figure:
    losses = list(dict.fromkeys(one.loss for one in found))
    columns = max(sum(one.loss == loss for one in found) for loss in losses)
    figure = Figure(figsize=(3.1 * columns, 2.9 * len(losses)), layout="constrained")
    axes = figure.subplots(len(losses), columns, squeeze=False)
    for line, loss in zip(axes, losses, strict=True):
        own = [one for one in found if one.loss == loss]
        for ax, one in zip(line, own, strict=False):
            _draw(ax, one)
    axes[0][0].legend(fontsize=7, frameon=False)
    return figure


def _draw(ax: Axes, one: Spectra) -> None:
    mean = one.values.mean(axis=0)
    for point, step in enumerate(one.steps[1:], start=1):
        shade = colormaps["viridis"](1 - point / len(one.steps))
        values = mean[point, :SHOWN]
        ax.plot(range(1, len(values) + 1), values, "o-", markersize=2.5, color=shade, label=f"step {step}")
    ax.axvline(one.clusters, linestyle="--", color="black", linewidth=0.8)
    ax.set_title(f"{one.clusters} clusters, {LOSSES[one.loss]}", fontsize=8)
    ax.set_xlabel("order of the eigenvalue", fontsize=8)
    ax.set_ylabel("eigenvalue", fontsize=8)
    ax.tick_params(labelsize=7)
