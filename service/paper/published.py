"""The numbers that the paper publishes, from data files that name the table and the cell.

Liu, Chen, Theodorou: DDPNOpt: Differential Dynamic Programming Neural Optimizer, ICLR 2021.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from service.results.statistics import HIGHER_IS_BETTER

FOLDER: Final = Path(__file__).parent / "published"
TABLE_OF: Final = {"train_loss": "table9", "accuracy": "table10"}
"""The tables behind Fig. 4a, by metric."""


@dataclass(frozen=True, slots=True)
class PublishedGrid:
    """A baseline's part of Table 9 or 10: means over ten seeds.

    Attributes:
        table: its name.
        baseline: whose.
        metric: `train_loss` or `accuracy`, in percent.
        alone: the baseline's value by learning rate.
        ddpnopt: its partner's by learning rate and ε.
    """

    table: str
    baseline: str
    metric: str
    alone: dict[float, float]
    ddpnopt: dict[tuple[float, float], float]

    def improvement(self, learning_rate: float, vxx_reg: float) -> float:
        """Return by how much DDPNOpt is better in a cell, as in Fig. 4a.

        Raises:
            KeyError: if the paper has no such cell.
        """
        gain = self.alone[learning_rate] - self.ddpnopt[learning_rate, vxx_reg]
        return -gain if self.metric in HIGHER_IS_BETTER else gain


@dataclass(frozen=True, slots=True)
class BestTuned:
    """A row of Tables 6 to 8: a baseline at its best learning rate, and its DDPNOpt partner there."""

    table: str
    baseline: str
    learning_rate: float
    method: str
    train_loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Complexity:
    """An entry of Table 4 along one axis: the exponent of the term that grows fastest in it."""

    exponent: float
    term: str


def _rows(name: str) -> Iterator[dict[str, str]]:
    with (FOLDER / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


@cache
def grid(baseline: str, metric: str) -> PublishedGrid | None:
    """Return what Table 9 (`train_loss`) or 10 (`accuracy`) says of a baseline; None if it says nothing."""
    if metric not in TABLE_OF:
        return None
    rows = [row for row in _rows(TABLE_OF[metric]) if row["baseline"] == baseline]
    if not rows:
        return None
    alone = {float(row["learning_rate"]): float(row["value"]) for row in rows if not row["vxx_reg"]}
    partner = {
        (float(row["learning_rate"]), float(row["vxx_reg"])): float(row["value"])
        for row in rows
        if row["vxx_reg"]
    }
    return PublishedGrid(TABLE_OF[metric], baseline, metric, alone, partner)


@cache
def best_tuned() -> tuple[BestTuned, ...]:
    """Return Tables 6 to 8."""
    return tuple(
        BestTuned(
            row["table"],
            row["baseline"],
            float(row["learning_rate"]),
            row["method"],
            float(row["train_loss"]),
            float(row["accuracy"]),
        )
        for row in _rows("tables6-8")
    )


@cache
def accuracies(network: str, dataset: str) -> dict[str, float]:
    """Return a row of Table 3: test accuracy in percent by method, without those of which it has none."""
    return {
        row["method"]: float(row["accuracy"])
        for row in _rows("table3")
        if (row["network"], row["dataset"]) == (network, dataset)
    }


@cache
def complexities(method: str, measure: str) -> dict[str, Complexity]:
    """Return how Table 4 says a method's `seconds` or `bytes` grow, by axis; empty if it does not."""
    return {
        row["axis"]: Complexity(float(row["exponent"]), row["term"])
        for row in _rows("table4")
        if (row["method"], row["measure"]) == (method, measure)
    }


@cache
def escapes(sweep: str) -> dict[str, bool]:
    """Return which methods leave the plateau of a preset's sweep, by the text of the paper's A.6.2."""
    return {row["method"]: row["escapes"] == "yes" for row in _rows("vanishing") if row["sweep"] == sweep}
