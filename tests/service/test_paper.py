"""The published numbers, and how a panel is compared with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from service.paper import compare, published
from service.results.statistics import Heatmap, Outcome, cells

AXES = {
    "sgd": ((0.4, 0.6, 0.7, 0.8), (5e-5, 1e-4, 5e-4, 1e-3)),
    "rmsprop": ((0.01, 0.02, 0.03, 0.045), (1e-9, 1e-8, 5e-6, 1e-5)),
    "ekfac": ((0.05, 0.09, 0.1, 0.3), (1e-7, 5e-7, 5e-6, 1e-5)),
}


def panel(
    baseline: str, metric: str, values: Mapping[tuple[float, float | None], float | None], seeds: int = 3
) -> Heatmap:
    """A panel whose runs have these values, spread a little over the seeds, pair by pair alike."""
    rates, regs = AXES[baseline]
    outcomes = [
        Outcome(rate, reg, seed, None if value is None else value + 0.01 * seed * (1 if reg else 1.1))
        for (rate, reg), value in values.items()
        for seed in range(seeds)
    ]
    return Heatmap("id", "name", 0, baseline, metric, rates, regs, cells(rates, regs, outcomes, metric))


def as_published(baseline: str, metric: str) -> dict[tuple[float, float | None], float | None]:
    found = published.grid(baseline, metric)
    assert found is not None
    return {(rate, None): value for rate, value in found.alone.items()} | dict(found.ddpnopt)


@pytest.mark.parametrize("baseline", AXES)
@pytest.mark.parametrize("metric", ["train_loss", "accuracy"])
def test_the_tables_are_whole(baseline: str, metric: str) -> None:
    found = published.grid(baseline, metric)
    assert found is not None
    rates, regs = AXES[baseline]
    assert tuple(found.alone) == rates
    assert list(found.ddpnopt) == [(rate, reg) for rate in rates for reg in regs]


def test_the_paper_improves_in_47_and_46_of_48_cells() -> None:
    """As the tables' own text has it: a slip of the pen would show."""
    for metric, positive in (("train_loss", 47), ("accuracy", 46)):
        grids = [published.grid(baseline, metric) for baseline in AXES]
        gains = [g.improvement(*cell) for g in grids if g is not None for cell in g.ddpnopt]
        assert (len(gains), sum(gain > 0 for gain in gains)) == (48, positive)


def test_the_example_of_the_paper() -> None:
    found = published.grid("sgd", "train_loss")
    assert found is not None
    assert found.improvement(0.4, 5e-5) == pytest.approx(0.1974 - 0.1662)


def test_what_the_paper_has_not_got() -> None:
    assert published.grid("adam", "train_loss") is None
    assert published.grid("sgd", "test_loss") is None
    assert published.accuracies("cnn", "wine") == {}


def test_tables_3_and_6_to_8() -> None:
    assert published.accuracies("fcn", "mnist")["ddpnopt"] == 93.30
    assert "vanilla_ddp" not in published.accuracies("cnn", "mnist")
    rows = {(row.table, row.method): (row.train_loss, row.accuracy) for row in published.best_tuned()}
    assert rows["8", "baseline"] == (0.074, 95.24)
    assert rows["8", "ddpnopt"] == (0.067, 95.19)
    assert len(rows) == 6


@pytest.mark.parametrize("metric", ["train_loss", "accuracy"])
def test_the_paper_agrees_with_itself(metric: str) -> None:
    for baseline in AXES:
        reference = published.grid(baseline, metric)
        assert reference is not None
        found = compare.panel(panel(baseline, metric, as_published(baseline, metric), seeds=1), reference)
        assert (found.agreeing, found.contradicting) == (16, 0)
        assert found.positive == found.published_positive
        assert found.rank_correlation == pytest.approx(1.0)
        assert [(row.learning_rate, row.ours) for row in found.baselines] == [
            (rate, pytest.approx(value)) for rate, value in reference.alone.items()
        ]


def test_a_panel_the_other_way_round() -> None:
    reference = published.grid("sgd", "train_loss")
    assert reference is not None
    values: dict[Any, Any] = as_published("sgd", "train_loss")
    turned = {
        (rate, reg): value if reg is None else 2 * values[rate, None] - value
        for (rate, reg), value in values.items()
    }
    found = compare.panel(panel("sgd", "train_loss", turned), reference)
    assert found.rank_correlation == pytest.approx(-1.0)
    assert (found.agreeing, found.positive) == (0, 0)
    # Only where the interval leaves no doubt.
    assert 0 < found.contradicting <= 16
    for cell in found.cells:
        assert cell.ci_high is not None
        assert cell.contradicts == (cell.ci_high < 0)


def test_a_cell_that_diverged_does_not_agree() -> None:
    reference = published.grid("sgd", "train_loss")
    assert reference is not None
    values = as_published("sgd", "train_loss") | {(0.8, reg): None for reg in AXES["sgd"][1]}
    found = compare.panel(panel("sgd", "train_loss", values), reference)
    assert found.agreeing == 12
    assert found.baselines[-1].ours is None
    assert [cell.ours for cell in found.cells[-4:]] == [None] * 4
    assert found.rank_correlation is not None


def test_no_rank_correlation_of_nothing() -> None:
    reference = published.grid("sgd", "train_loss")
    assert reference is not None
    values: dict[tuple[float, float | None], float | None] = {
        key: (1.0 if key[1] is None else 0.5) for key in as_published("sgd", "train_loss")
    }
    assert compare.panel(panel("sgd", "train_loss", values, seeds=1), reference).rank_correlation is None
