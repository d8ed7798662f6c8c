"""The paired statistics and the summaries, against direct computations."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import TypeAdapter
from scipy import stats

from service.results.statistics import (
    Cell,
    CellState,
    Heatmap,
    Outcome,
    Summary,
    SummaryRow,
    cells,
    summary_rows,
)

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


# --- summaries ---


def summarised(
    values: dict[tuple[float, float | None], list[float | None]], regs: tuple[float, ...] = REGS
) -> list[SummaryRow]:
    rows = summary_rows(RATES, regs, outcomes(values), 10, grid=3, baseline="adam", setting="eps 1e-06")
    assert {(row.grid, row.baseline, row.setting, row.n_total) for row in rows} == {
        (3, "adam", "eps 1e-06", 10)
    }
    return list(rows)


def test_a_summary_is_in_the_order_of_the_spec() -> None:
    found = [(row.method, row.learning_rate, row.vxx_reg) for row in summarised({})]
    assert found == [
        ("baseline", 0.1, None),
        ("baseline", 0.2, None),
        ("ddpnopt", 0.1, 1e-4),
        ("ddpnopt", 0.1, 1e-3),
        ("ddpnopt", 0.2, 1e-4),
        ("ddpnopt", 0.2, 1e-3),
    ]
    assert [row.method for row in summarised({}, ())] == ["baseline", "baseline"]


def test_a_summary_is_students_interval_of_the_mean() -> None:
    values = np.random.default_rng(3).normal(2, 1, 7)
    row = summarised({(0.2, None): list(values)})[1]
    low, high = stats.t.interval(0.95, 6, values.mean(), stats.sem(values))
    assert (row.n, row.n_ended, row.n_diverged) == (7, 7, 0)
    assert (row.mean, row.sd) == (pytest.approx(values.mean()), pytest.approx(np.std(values, ddof=1)))
    assert (row.ci_low, row.ci_high) == (pytest.approx(low), pytest.approx(high))
    assert (row.min, row.max) == (values.min(), values.max())


@pytest.mark.parametrize(
    ("values", "counts", "mean", "spread", "ends"),
    [
        ([], (0, 0, 0), None, None, (None, None)),
        ([None, None], (0, 2, 2), None, None, (None, None)),
        ([2.0], (1, 1, 0), 2.0, None, (2.0, 2.0)),
        ([None, 2.0, None], (1, 3, 2), 2.0, None, (2.0, 2.0)),
        ([1.0, None, 3.0], (2, 3, 1), 2.0, 2.0**0.5, (1.0, 3.0)),
        ([2.0, 2.0, 2.0], (3, 3, 0), 2.0, 0.0, (2.0, 2.0)),
    ],
)
def test_what_a_small_sample_does_not_tell_is_left_out(
    values: list[float | None],
    counts: tuple[int, int, int],
    mean: float | None,
    spread: float | None,
    ends: tuple[float | None, float | None],
) -> None:
    row = summarised({(0.1, 1e-3): values})[3]
    assert (row.n, row.n_ended, row.n_diverged) == counts
    assert (row.mean, row.sd) == (mean, None if spread is None else pytest.approx(spread))
    assert (row.ci_low is None) == (row.ci_high is None) == (spread is None)
    assert (row.min, row.max) == ends
    if spread == 0:
        assert (row.ci_low, row.ci_high) == (2.0, 2.0)


def test_numbers_too_large_to_be_squared_have_no_spread() -> None:
    row = summarised({(0.1, None): [1e300, -1e300]})[0]
    assert (row.mean, row.sd, row.ci_low, row.min, row.max) == (0.0, None, None, -1e300, 1e300)
    assert summarised({(0.1, None): [1.7e308, 1.7e308]})[0].mean is None


def test_a_summary_does_not_depend_on_the_order_of_the_rows() -> None:
    values = list(np.random.default_rng(4).normal(size=9))
    rows = [Outcome(0.1, None, seed, value) for seed, value in enumerate(values)]
    told = {"grid": 0, "baseline": "sgd", "setting": ""}
    first, second = (summary_rows(RATES, (), mixed, 9, **told) for mixed in (rows, rows[::-1]))
    assert first == second


def test_a_summary_survives_json() -> None:
    rows = summarised({(0.1, None): [1.0, 2.0], (0.1, 1e-4): [None]})
    found = Summary("id", "name", "accuracy", tuple(rows))
    assert Summary.from_json(TypeAdapter(Summary).dump_python(found, mode="json")) == found
