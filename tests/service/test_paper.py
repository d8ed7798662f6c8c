"""The published numbers, and how a panel is compared with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from service.paper import compare, published
from service.paper.published import PublishedGrid
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


def grid(baseline: str, metric: str) -> PublishedGrid:
    found = published.grid(baseline, metric)
    assert found is not None
    return found


def as_published(baseline: str, metric: str) -> dict[tuple[float, float | None], float | None]:
    found = grid(baseline, metric)
    return {(rate, None): value for rate, value in found.alone.items()} | dict(found.ddpnopt)


@pytest.mark.parametrize("baseline", AXES)
@pytest.mark.parametrize("metric", ["train_loss", "accuracy"])
def test_the_tables_are_whole(baseline: str, metric: str) -> None:
    found = grid(baseline, metric)
    rates, regs = AXES[baseline]
    assert tuple(found.alone) == rates
    assert list(found.ddpnopt) == [(rate, reg) for rate in rates for reg in regs]


ROWS: dict[str, dict[str, tuple[float, ...]]] = {
    "train_loss": {
        "sgd": (0.7469, 2.1692, 3.9740, 7.4246),
        "rmsprop": (0.8635, 2.2902, 3.9250, 6.4125),
        "ekfac": (0.3460, 1.0839, 1.4087, 2.7860),
    },
    "accuracy": {
        "sgd": (462.17, 427.24, 382.83, 311.52),
        "rmsprop": (459.67, 422.22, 372.49, 301.56),
        "ekfac": (469.79, 455.89, 449.58, 416.40),
    },
}
"""Sums of the rows of Tables 9 and 10, baseline and partners."""

COLUMNS: dict[str, dict[str, tuple[float, ...]]] = {
    "train_loss": {
        "sgd": (3.6077, 3.2583, 2.9148, 2.2961, 2.2378),
        "rmsprop": (2.7899, 2.6612, 2.6895, 2.6494, 2.7012),
        "ekfac": (1.2250, 1.0956, 1.1108, 1.0624, 1.1308),
    },
    "accuracy": {
        "sgd": (299.43, 306.74, 315.06, 332.14, 330.39),
        "rmsprop": (308.50, 311.36, 313.53, 313.00, 309.55),
        "ekfac": (355.24, 358.45, 359.31, 359.87, 358.79),
    },
}
"""Of the columns, the baseline's first."""


@pytest.mark.parametrize("baseline", AXES)
@pytest.mark.parametrize("metric", ["train_loss", "accuracy"])
def test_rows_and_columns_have_the_sums_of_the_papers(baseline: str, metric: str) -> None:
    """A slip of the pen would show, also an exchange of digits or of two cells."""
    found = grid(baseline, metric)
    rates, regs = AXES[baseline]
    rows = [found.alone[rate] + sum(found.ddpnopt[rate, reg] for reg in regs) for rate in rates]
    columns = [sum(found.alone.values()), *(sum(found.ddpnopt[r, reg] for r in rates) for reg in regs)]
    assert rows == pytest.approx(ROWS[metric][baseline], abs=1e-9)
    assert columns == pytest.approx(COLUMNS[metric][baseline], abs=1e-9)


def test_table_3_has_the_sums_of_the_papers() -> None:
    rows = {
        ("fcn", "wine"): 674.92,
        ("fcn", "digits"): 661.59,
        ("fcn", "mnist"): 643.77,
        ("fcn", "fashion_mnist"): 583.84,
        ("cnn", "mnist"): 586.62,
        ("cnn", "svhn"): 525.95,
        ("cnn", "cifar10"): 417.01,
    }
    assert {key: sum(published.accuracies(*key).values()) for key in rows} == pytest.approx(rows)
    methods = {
        "fcn": (364.85, 368.19, 370.01, 366.69, 360.71, 362.08, 371.59),
        "cnn": (258.20, 256.98, 255.84, 260.50, 237.35, 260.71),
    }
    for network, sums in methods.items():
        table = [published.accuracies(*key) for key in rows if key[0] == network]
        assert [sum(row[name] for row in table) for name in table[0]] == pytest.approx(sums)


def test_the_paper_improves_in_47_and_46_of_48_cells() -> None:
    for metric, positive in (("train_loss", 47), ("accuracy", 46)):
        grids = [grid(baseline, metric) for baseline in AXES]
        gains = [g.improvement(*cell) for g in grids for cell in g.ddpnopt]
        assert (len(gains), sum(gain > 0 for gain in gains)) == (48, positive)


def test_the_example_of_the_paper() -> None:
    found = grid("sgd", "train_loss")
    assert found.improvement(0.4, 5e-5) == pytest.approx(0.1974 - 0.1662)


def test_what_the_paper_has_not_got() -> None:
    assert published.grid("adam", "train_loss") is None
    assert published.grid("sgd", "test_loss") is None
    assert published.accuracies("cnn", "wine") == {}


def test_tables_3_and_6_to_8() -> None:
    assert published.accuracies("fcn", "mnist")["ddpnopt"] == 93.30
    assert "vanilla_ddp" not in published.accuracies("cnn", "mnist")
    assert [
        (row.table, row.baseline, row.learning_rate, row.method, row.train_loss, row.accuracy)
        for row in published.best_tuned()
    ] == [
        ("6", "sgd", 0.1, "baseline", 0.035, 95.36),
        ("6", "sgd", 0.1, "ddpnopt", 0.032, 95.52),
        ("7", "rmsprop", 0.001, "baseline", 0.058, 94.33),
        ("7", "rmsprop", 0.001, "ddpnopt", 0.052, 94.63),
        ("8", "ekfac", 0.03, "baseline", 0.074, 95.24),
        ("8", "ekfac", 0.03, "ddpnopt", 0.067, 95.19),
    ]


@pytest.mark.parametrize("metric", ["train_loss", "accuracy"])
def test_the_paper_agrees_with_itself(metric: str) -> None:
    for baseline in AXES:
        reference = grid(baseline, metric)
        found = compare.panel(panel(baseline, metric, as_published(baseline, metric), seeds=1), reference)
        assert (found.agreeing, found.contradicting) == (16, 0)
        gains = [cell.ours for cell in found.cells if cell.ours is not None]
        assert sum(gain > 0 for gain in gains) == found.published_positive
        assert found.rank_correlation == pytest.approx(1.0)
        assert [(row.learning_rate, row.ours) for row in found.baselines] == [
            (rate, pytest.approx(value)) for rate, value in reference.alone.items()
        ]


def test_a_panel_the_other_way_round() -> None:
    reference = grid("sgd", "train_loss")
    values: dict[Any, Any] = as_published("sgd", "train_loss")
    turned = {
        (rate, reg): value if reg is None else 2 * values[rate, None] - value
        for (rate, reg), value in values.items()
    }
    found = compare.panel(panel("sgd", "train_loss", turned), reference)
    assert found.rank_correlation == pytest.approx(-1.0)
    assert found.agreeing == 0
    # Only where the interval leaves no doubt: the partners spread by 0.001 less from seed to seed.
    assert found.contradicting == 16
    doubtful = {(rate, reg): reference.alone[rate] + 1.5e-3 for rate, reg in reference.ddpnopt}
    unsure = compare.panel(panel("sgd", "train_loss", turned | doubtful), reference)
    assert (unsure.agreeing, unsure.contradicting) == (0, 0)


def test_a_cell_whose_survivors_look_worse_contradicts_nothing() -> None:
    """As its state: where more runs of the baseline diverged, those that are left are no fair sample."""
    reference = grid("sgd", "train_loss")
    rates, regs = AXES["sgd"]

    def end(reg: float | None, seed: int) -> float | None:
        if reg is not None:
            return 2.0 + 0.02 * seed
        return None if seed < 4 else 1.0 + 0.01 * seed

    outcomes = [
        Outcome(rate, reg, seed, end(reg, seed))
        for rate in rates
        for reg in (None, *regs)
        for seed in range(10)
    ]
    lost = Heatmap("i", "n", 0, "sgd", "train_loss", rates, regs, cells(rates, regs, outcomes, "train_loss"))
    found = compare.panel(lost, reference)
    assert (found.agreeing, found.contradicting) == (0, 0)


def test_a_cell_that_diverged_does_not_agree() -> None:
    reference = grid("sgd", "train_loss")
    values = as_published("sgd", "train_loss") | {(0.8, reg): None for reg in AXES["sgd"][1]}
    found = compare.panel(panel("sgd", "train_loss", values), reference)
    assert found.agreeing == 12
    assert found.baselines[-1].ours is None
    assert [cell.ours for cell in found.cells[-4:]] == [None] * 4
    assert found.rank_correlation is not None


def test_no_rank_correlation_of_nothing() -> None:
    reference = grid("sgd", "train_loss")
    values: dict[tuple[float, float | None], float | None] = {
        key: (1.0 if key[1] is None else 0.5) for key in as_published("sgd", "train_loss")
    }
    assert compare.panel(panel("sgd", "train_loss", values, seeds=1), reference).rank_correlation is None
