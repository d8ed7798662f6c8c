"""The paired statistics, against direct computations."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import TypeAdapter
from scipy import stats

from service.results.statistics import Cell, CellState, Heatmap, Outcome, cells

RATES, REGS = (0.1, 0.2), (1e-4, 1e-3)


def outcomes(values: dict[tuple[float, float | None], list[float | None]]) -> list[Outcome]:
    return [
        Outcome(rate, reg, seed, value)
        for (rate, reg), column in values.items()
        for seed, value in enumerate(column)
    ]


def panel(
    values: dict[tuple[float, float | None], list[float | None]], metric: str = "train_loss"
) -> list[Cell]:
    return list(cells(RATES, REGS, outcomes(values), metric))


def test_a_cell_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    baseline, better, same = rng.normal(2, 1, 10), rng.normal(1, 1, 10), rng.normal(2, 1, 10)
    first, second, *_ = panel(
        {(0.1, None): list(baseline), (0.1, 1e-4): list(better), (0.1, 1e-3): list(same)}
    )
    differences = baseline - better
    low, high = stats.t.interval(0.95, 9, differences.mean(), stats.sem(differences))
    assert first.improvement == pytest.approx(differences.mean())
    assert (first.ci_low, first.ci_high) == (pytest.approx(low), pytest.approx(high))
    assert first.p_value == pytest.approx(stats.ttest_rel(baseline, better).pvalue)
    assert second.p_value == pytest.approx(stats.ttest_rel(baseline, same).pvalue)
    assert (first.baseline_mean, first.ddpnopt_mean) == (
        pytest.approx(baseline.mean()),
        pytest.approx(better.mean()),
    )
    assert first.n == first.n_ended == 10


def test_q_values_are_corrected_over_the_cells_that_were_tested() -> None:
    rng = np.random.default_rng(1)
    values = {(rate, None): list(rng.normal(1, 0.1, 8)) for rate in RATES}
    values |= {(rate, reg): list(rng.normal(0.95, 0.1, 8)) for rate in RATES for reg in REGS}
    del values[0.2, 1e-3]
    tested = [cell for cell in panel(values) if cell.p_value is not None]
    assert len(tested) == 3
    wanted = stats.false_discovery_control([cell.p_value for cell in tested])
    assert [cell.q_value for cell in tested] == pytest.approx(list(wanted))


@pytest.mark.parametrize(
    ("metric", "baseline", "ddpnopt", "state"),
    [
        ("train_loss", [2.0, 2.1, 2.2], [1.0, 1.2, 1.1], CellState.BETTER),
        ("train_loss", [1.0, 1.2, 1.1], [2.0, 2.1, 2.2], CellState.WORSE),
        ("accuracy", [90.0, 91.0, 92.0], [95.0, 96.5, 97.0], CellState.BETTER),
        ("accuracy", [95.0, 96.5, 97.0], [90.0, 91.0, 92.0], CellState.WORSE),
        ("train_loss", [1.0, 2.0, 3.0], [3.0, 2.0, 1.0], CellState.INCONCLUSIVE),
        ("train_loss", [2.0], [1.0], CellState.INCONCLUSIVE),
        ("train_loss", [2.0, 2.0], [1.0, 1.0], CellState.INCONCLUSIVE),
        ("train_loss", [1.0, 1.0], [1.0, 1.0], CellState.INCONCLUSIVE),
        ("train_loss", [None, None], [1.0, 1.0], CellState.DIVERGED),
        ("train_loss", [], [1.0, 1.0], CellState.PENDING),
        ("train_loss", [1.0], [], CellState.PENDING),
    ],
)
def test_states(
    metric: str, baseline: list[float | None], ddpnopt: list[float | None], state: CellState
) -> None:
    cell = panel({(0.1, None): baseline, (0.1, 1e-4): ddpnopt}, metric)[0]
    assert cell.state == state
    assert (cell.ci_low is None) == (cell.p_value is None)


def test_diverged_runs_are_counted_and_not_averaged() -> None:
    cell = panel({(0.1, None): [1.0, None, 3.0, 4.0], (0.1, 1e-4): [0.5, 1.0, None, 3.0]})[0]
    assert (cell.n, cell.n_ended, cell.n_diverged_baseline, cell.n_diverged_ddpnopt) == (2, 4, 1, 1)
    assert cell.improvement == pytest.approx(np.mean([0.5, 1.0]))
    assert cell.baseline_mean == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("lost_baseline", "lost_ddpnopt", "better", "worse"),
    [
        (0, 0, CellState.BETTER, CellState.WORSE),
        (2, 2, CellState.BETTER, CellState.WORSE),
        (3, 0, CellState.BETTER, CellState.INCONCLUSIVE),
        (0, 3, CellState.INCONCLUSIVE, CellState.WORSE),
    ],
)
def test_survivors_alone_prove_nothing(
    lost_baseline: int, lost_ddpnopt: int, better: CellState, worse: CellState
) -> None:
    high, low = [2.0, 2.1, 2.2], [1.0, 1.05, 1.3]
    extra = max(lost_baseline, lost_ddpnopt)
    lost = {
        "baseline": [None] * lost_baseline + [9.0] * (extra - lost_baseline),
        "ddpnopt": [None] * lost_ddpnopt + [9.0] * (extra - lost_ddpnopt),
    }
    states = [
        panel({(0.1, None): [*a, *lost["baseline"]], (0.1, 1e-4): [*b, *lost["ddpnopt"]]})[0].state
        for a, b in ((high, low), (low, high))
    ]
    assert states == [better, worse]


def test_only_pairs_count() -> None:
    rows = [Outcome(0.1, None, 0, 5.0), Outcome(0.1, None, 1, 1.0), Outcome(0.1, 1e-4, 1, 0.0)]
    cell = cells(RATES, REGS, rows, "train_loss")[0]
    assert (cell.n, cell.improvement, cell.baseline_mean) == (1, 1.0, 1.0)


def test_the_order_of_the_rows_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    rows = [Outcome(r, e, s, rng.normal()) for r in RATES for e in (None, *REGS) for s in range(5)]
    mixed = [rows[k] for k in rng.permutation(len(rows))]
    assert cells(RATES, REGS, rows, "accuracy") == cells(RATES, REGS, mixed, "accuracy")


def test_a_heatmap_survives_json() -> None:
    values = cells(RATES, REGS, [Outcome(0.1, None, 0, 1.0), Outcome(0.1, 1e-4, 0, 0.5)], "train_loss")
    panel = Heatmap("id", "name", 0, "sgd", "train_loss", RATES, REGS, values)
    assert Heatmap.from_json(TypeAdapter(Heatmap).dump_python(panel, mode="json")) == panel
