"""Paired statistics of one heatmap, and a summary of each kind of run. Pure: rows in, cells out.

A cell compares the DDPNOpt run with its baseline on each seed. A pair counts where both runs ended with a
finite metric; diverged runs are counted beside it and never averaged away. The interval is Student's, 95 %,
over the paired differences; the p-value is that of the paired t-test, and the q-value corrects it over the
panel's cells (Benjamini & Hochberg 1995).

A summary compares nothing: it is over the runs of one method, learning rate and ε, those of a baseline alone
as well. Its interval is Student's of their mean.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import cache
from typing import Any, Final

import numpy as np
from scipy import stats

from ddpnopt.results import METRICS

CONFIDENCE: Final = 0.95
HIGHER_IS_BETTER: Final = frozenset({"accuracy", "train_accuracy"})
assert set(METRICS) >= HIGHER_IS_BETTER


class CellState(StrEnum):
    """What a cell can honestly be said to show."""

    PENDING = "pending"
    """Not a single pair has ended."""
    BETTER = "better"
    """The whole interval lies above zero: DDPNOpt is better, and did not diverge more often."""
    WORSE = "worse"
    """The whole interval lies below zero, and the baseline did not diverge more often."""
    INCONCLUSIVE = "inconclusive"
    """The interval holds zero; or there are fewer than two pairs, or no spread between them; or the side that
    looks better lost more runs to divergence, so that only its survivors are compared."""
    DIVERGED = "diverged"
    """Every pair that has ended had a diverged run in it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run's part in a heatmap or a summary.

    Attributes:
        vxx_reg: None for a baseline.
        value: the metric; None if the run diverged.
    """

    learning_rate: float
    vxx_reg: float | None
    seed: int
    value: float | None


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a heatmap.

    Attributes:
        n: pairs with two finite values, which the means, the interval and the p-value are over.
        n_ended: pairs of which both runs have ended.
        improvement: mean paired difference, positive where DDPNOpt is better.
        ci_low: lower end of its 95 % interval; None below two pairs.
        p_value: of the paired t-test; None below two pairs or where all differences are equal.
        q_value: p-value corrected over the panel.
    """

    learning_rate: float
    vxx_reg: float
    n: int
    n_ended: int
    n_diverged_baseline: int
    n_diverged_ddpnopt: int
    baseline_mean: float | None
    ddpnopt_mean: float | None
    improvement: float | None
    ci_low: float | None
    ci_high: float | None
    p_value: float | None
    q_value: float | None
    state: CellState


@dataclass(frozen=True, slots=True)
class Heatmap:
    """A panel: rows are learning rates, columns V_xx regularisations; cells row by row.

    `improvement` is positive where DDPNOpt is better: baseline − DDPNOpt for a loss, DDPNOpt − baseline for
    an accuracy (percent points).

    Attributes:
        name: of the sweep.
        grid: position in the spec.
        setting: what the grid sets besides its axes, as `rho 0.98, safeguard psd`; it tells grids of one
            baseline apart.
    """

    sweep_id: str
    name: str
    grid: int
    baseline: str
    metric: str
    learning_rate: tuple[float, ...]
    vxx_reg: tuple[float, ...]
    cells: tuple[Cell, ...]
    setting: str = ""

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Heatmap:
        """Read the API's answer."""
        panel = tuple(Cell(**cell | {"state": CellState(cell["state"])}) for cell in document["cells"])
        rest = {f.name: document[f.name] for f in fields(cls) if f.name in document}
        for axis in ("learning_rate", "vxx_reg"):
            rest[axis] = tuple(rest[axis])
        return cls(**rest | {"cells": panel})


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """The runs of one method, learning rate and ε, over the seeds.

    Attributes:
        grid: position in the spec.
        setting: what the grid sets besides its axes, as `rho 0.98, safeguard psd`.
        vxx_reg: None for a baseline.
        n: runs that ended with a finite metric, which all of the following are over.
        n_ended: runs that ended, those included that diverged.
        n_total: runs that the sweep has.
        mean: None without any such run, as are `min` and `max`.
        sd: standard deviation of the sample; None below two runs.
        ci_low: lower end of the mean's 95 % interval; None below two runs.
    """

    grid: int
    baseline: str
    setting: str
    method: str
    learning_rate: float
    vxx_reg: float | None
    n: int
    n_ended: int
    n_diverged: int
    n_total: int
    mean: float | None
    sd: float | None
    ci_low: float | None
    ci_high: float | None
    min: float | None
    max: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """One metric of every kind of run of a sweep, or of some of its grids.

    Attributes:
        name: of the sweep.
        rows: grid by grid, the baseline's before its partner's, each in the order of the spec.
    """

    sweep_id: str
    name: str
    metric: str
    rows: tuple[SummaryRow, ...]

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Summary:
        """Read the API's answer."""
        rest = {f.name: document[f.name] for f in fields(cls)}
        return cls(**rest | {"rows": tuple(SummaryRow(**row) for row in document["rows"])})


def cells(
    learning_rates: Sequence[float],
    vxx_regs: Sequence[float],
    outcomes: Iterable[Outcome],
    metric: str,
) -> tuple[Cell, ...]:
    """Compute all cells of a panel, row by row.

    Args:
        learning_rates: the rows.
        vxx_regs: the columns.
        outcomes: of every run of the grid that has ended, in any order.
        metric: one of `ddpnopt.results.METRICS`; decides which direction is better.
    """
    table = _by_kind(outcomes)
    sign = 1.0 if metric in HIGHER_IS_BETTER else -1.0
    panel = [
        _cell(learning_rate, vxx_reg, table[learning_rate, None], table[learning_rate, vxx_reg], sign)
        for learning_rate in learning_rates
        for vxx_reg in vxx_regs
    ]
    return _corrected(panel)


def _by_kind(outcomes: Iterable[Outcome]) -> dict[tuple[float, float | None], dict[int, float | None]]:
    """Return the values by learning rate and ε, and by seed."""
    table: dict[tuple[float, float | None], dict[int, float | None]] = defaultdict(dict)
    for outcome in outcomes:
        table[outcome.learning_rate, outcome.vxx_reg][outcome.seed] = outcome.value
    return table


def _cell(
    learning_rate: float,
    vxx_reg: float,
    baseline: Mapping[int, float | None],
    ddpnopt: Mapping[int, float | None],
    sign: float,
) -> Cell:
    ended = sorted(set(baseline) & set(ddpnopt))
    pairs = [
        (b, d) for seed in ended if (b := baseline[seed]) is not None and (d := ddpnopt[seed]) is not None
    ]
    cell = Cell(
        learning_rate=learning_rate,
        vxx_reg=vxx_reg,
        n=len(pairs),
        n_ended=len(ended),
        n_diverged_baseline=sum(baseline[seed] is None for seed in ended),
        n_diverged_ddpnopt=sum(ddpnopt[seed] is None for seed in ended),
        **dict.fromkeys(
            ("baseline_mean", "ddpnopt_mean", "improvement", "ci_low", "ci_high", "p_value", "q_value")
        ),
        state=CellState.DIVERGED if ended else CellState.PENDING,
    )
    if not pairs:
        return cell
    values = np.array(pairs, dtype=np.float64)
    differences = sign * (values[:, 1] - values[:, 0])
    low, high, p_value = _interval(differences)
    return replace(
        cell,
        baseline_mean=float(values[:, 0].mean()),
        ddpnopt_mean=float(values[:, 1].mean()),
        improvement=float(differences.mean()),
        ci_low=low,
        ci_high=high,
        p_value=p_value,
        state=_state(low, high, cell.n_diverged_ddpnopt - cell.n_diverged_baseline),
    )


def _interval(differences: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """Return the ends of the interval and the p-value, as far as the sample allows them."""
    if len(differences) < 2 or np.ptp(differences) == 0:
        return None, None, None
    test = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    found = float(interval.low), float(interval.high), float(test.pvalue)
    return found if all(map(np.isfinite, found)) else (None, None, None)


def _state(low: float | None, high: float | None, diverged_more: int) -> CellState:
    """Judge a cell; `diverged_more` is by how many more runs DDPNOpt diverged than its baseline."""
    if low is not None and low > 0 and diverged_more <= 0:
        return CellState.BETTER
    if high is not None and high < 0 and diverged_more >= 0:
        return CellState.WORSE
    return CellState.INCONCLUSIVE


def _corrected(panel: list[Cell]) -> tuple[Cell, ...]:
    tested = [i for i, cell in enumerate(panel) if cell.p_value is not None]
    if tested:
        q_values = stats.false_discovery_control([panel[i].p_value for i in tested])
        for i, q_value in zip(tested, q_values, strict=True):
            panel[i] = replace(panel[i], q_value=float(q_value))
    return tuple(panel)


def summary_rows(
    learning_rates: Sequence[float],
    vxx_regs: Sequence[float],
    outcomes: Iterable[Outcome],
    n_total: int,
    *,
    grid: int,
    baseline: str,
    setting: str,
) -> tuple[SummaryRow, ...]:
    """Summarise a grid's runs: the baseline's by learning rate, then its partner's by learning rate and ε.

    Args:
        learning_rates: of the grid.
        vxx_regs: of the grid; none if the baseline is alone.
        outcomes: of every run of the grid that has ended, in any order.
        n_total: runs of each kind that the sweep has: its seeds.
        grid: position in the spec.
        baseline: of the grid.
        setting: of the grid.
    """
    table = _by_kind(outcomes)
    kinds: list[tuple[str, float, float | None]] = [("baseline", rate, None) for rate in learning_rates]
    kinds += [("ddpnopt", rate, vxx_reg) for rate in learning_rates for vxx_reg in vxx_regs]
    found = []
    for method, rate, vxx_reg in kinds:
        ended = table[rate, vxx_reg]
        finite = [value for _, value in sorted(ended.items()) if value is not None]
        found.append(
            SummaryRow(
                grid=grid,
                baseline=baseline,
                setting=setting,
                method=method,
                learning_rate=rate,
                vxx_reg=vxx_reg,
                n=len(finite),
                n_ended=len(ended),
                n_diverged=len(ended) - len(finite),
                n_total=n_total,
                **_spread(finite),
            )
        )
    return tuple(found)


def _spread(finite: Sequence[float]) -> dict[str, float | None]:
    """Return mean, standard deviation, interval and range, as far as the sample allows them."""
    found: dict[str, float | None] = dict.fromkeys(("mean", "sd", "ci_low", "ci_high", "min", "max"))
    if not finite:
        return found
    values = np.array(finite, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # the largest numbers have no square
        mean = float(values.mean())
        found |= {"mean": mean, "min": min(finite), "max": max(finite)}
        if len(finite) > 1:
            sd = float(values.std(ddof=1))
            half = _quantile(len(finite)) * sd / len(finite) ** 0.5
            found |= {"sd": sd, "ci_low": mean - half, "ci_high": mean + half}
    return {
        name: value if value is not None and np.isfinite(value) else None for name, value in found.items()
    }


@cache
def _quantile(n: int) -> float:
    """Return how many standard errors half of the interval is wide, for a mean of n."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
