"""How a panel compares with the published one. Pure: heatmaps and published numbers in, numbers out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from service.paper.published import PublishedGrid
from service.results.statistics import Cell, CellState, Heatmap


@dataclass(frozen=True, slots=True)
class CellComparison:
    """A cell beside the paper's.

    Attributes:
        learning_rate, vxx_reg: which one.
        published: the paper's improvement.
        ours: ours with its interval, None where no pair has ended finitely.
        agrees: whether both have the same sign; a cell without a number of ours does not agree.
        contradicts: whether the cell's state is surely the other one.
    """

    learning_rate: float
    vxx_reg: float
    published: float
    ours: float | None
    ci_low: float | None
    ci_high: float | None
    agrees: bool
    contradicts: bool


@dataclass(frozen=True, slots=True)
class BaselineComparison:
    """A baseline's mean at a learning rate beside the paper's; None where all runs diverged."""

    learning_rate: float
    published: float
    ours: float | None


@dataclass(frozen=True, slots=True)
class PanelComparison:
    """A panel beside the paper's.

    Attributes:
        cells: in the order of the heatmap.
        baselines: by learning rate.
        agreeing: cells whose sign is the paper's.
        contradicting: cells that are surely on the other side.
        published_positive: cells in which DDPNOpt is better in the paper.
        rank_correlation: Spearman's ρ of the improvements over the cells that have a number; None for fewer
            than three, or where one side is constant.
    """

    baseline: str
    metric: str
    table: str
    cells: tuple[CellComparison, ...]
    baselines: tuple[BaselineComparison, ...]
    agreeing: int
    contradicting: int
    published_positive: int
    rank_correlation: float | None


def panel(ours: Heatmap, published: PublishedGrid) -> PanelComparison:
    """Compare a panel with the paper's, cell by cell.

    Raises:
        KeyError: if the paper has not got one of the cells.
    """
    cells = tuple(_cell(cell, published.improvement(cell.learning_rate, cell.vxx_reg)) for cell in ours.cells)
    return PanelComparison(
        ours.baseline,
        ours.metric,
        published.table,
        cells,
        tuple(_baseline(ours, rate, published.alone[rate]) for rate in ours.learning_rate),
        agreeing=sum(cell.agrees for cell in cells),
        contradicting=sum(cell.contradicts for cell in cells),
        published_positive=sum(cell.published > 0 for cell in cells),
        rank_correlation=_rank_correlation(cells),
    )


def _cell(cell: Cell, published: float) -> CellComparison:
    value = cell.improvement
    opposite = {1: CellState.WORSE, -1: CellState.BETTER}.get(int(np.sign(published)))
    return CellComparison(
        cell.learning_rate,
        cell.vxx_reg,
        published,
        value,
        cell.ci_low,
        cell.ci_high,
        agrees=value is not None and bool(np.sign(value) == np.sign(published)),
        contradicts=cell.state == opposite,
    )


def _baseline(ours: Heatmap, rate: float, published: float) -> BaselineComparison:
    means = [c.baseline_mean for c in ours.cells if c.learning_rate == rate and c.baseline_mean is not None]
    return BaselineComparison(rate, published, float(np.mean(means)) if means else None)


def _rank_correlation(cells: tuple[CellComparison, ...]) -> float | None:
    pairs = [(cell.ours, cell.published) for cell in cells if cell.ours is not None]
    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    return float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
