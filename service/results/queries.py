"""SQL of results: one indexed query for a heatmap or a summary, one for a page of runs, one for curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from sqlalchemy import Connection, Select, and_, select

from ddpnopt.results import METRICS, TEST_METRICS
from service.db.tables import curves, grids, packs, results, runs
from service.errors import FieldError, InvalidInputError
from service.results.statistics import Heatmap, Outcome, Summary, cells, summary_rows
from service.sweeps import queries as sweep_queries
from service.sweeps.documents import shown
from service.sweeps.spec import SweepSpec

METRIC_COLUMNS: Final = {name: results.c[name] for name in METRICS}


@dataclass(frozen=True, slots=True)
class Curve:
    """One run's metric over its steps.

    Attributes:
        steps: of the points.
        values: None where a point is not finite.
    """

    run_id: int
    method: str
    learning_rate: float
    vxx_reg: float | None
    seed: int
    steps: tuple[int, ...]
    values: tuple[float | None, ...]


def _refuse(field: str, value: object, allowed: str) -> InvalidInputError:
    return InvalidInputError([FieldError(field, shown(value), allowed)])


def check_metric(metric: str) -> str:
    """Return the metric's name.

    Raises:
        InvalidInputError: if there is no such metric.
    """
    if metric not in METRIC_COLUMNS:
        raise _refuse("metric", metric, "one of " + ", ".join(METRICS))
    return metric


def fitting_grids(spec: SweepSpec, baseline: str | None, grid: int | None) -> list[int]:
    """Return the positions of the grids that may be meant: of all if nothing is said.

    Raises:
        InvalidInputError: if there is none.
    """
    if grid is not None and not 0 <= grid < len(spec.grids):
        raise _refuse("grid", grid, f"a whole number from 0 to {len(spec.grids) - 1}")
    fitting = [
        position
        for position, candidate in enumerate(spec.grids)
        if grid in (None, position) and baseline in (None, candidate.baseline)
    ]
    if not fitting:
        there = _listed(spec, range(len(spec.grids)))
        raise _refuse("baseline", baseline, f"the baseline of a grid of this sweep: {there}")
    return fitting


def choose_grid(spec: SweepSpec, baseline: str | None, grid: int | None) -> int:
    """Return the position of the grid that is meant.

    Raises:
        InvalidInputError: if there is none, or more than one.
    """
    return _only(spec, fitting_grids(spec, baseline, grid), grid)


def choose_panel(spec: SweepSpec, baseline: str | None, grid: int | None) -> int:
    """Return the position of the grid that is meant, of those that have cells.

    Raises:
        InvalidInputError: if there is none, or more than one.
    """
    fitting = fitting_grids(spec, baseline, grid)
    panels = [position for position in fitting if spec.grids[position].has_cells]
    if not panels:
        by_baseline = grid is None and baseline is not None
        raise _refuse(
            "baseline" if by_baseline else "grid",
            baseline if by_baseline else grid,
            _instead_of(spec, fitting),
        )
    return _only(spec, panels, grid)


def _instead_of(spec: SweepSpec, bare: Sequence[int]) -> str:
    """Say which grids have cells, and why these do not."""
    others = [position for position, grid in enumerate(spec.grids) if grid.has_cells]
    allowed = f"one of {_listed(spec, others)}" if others else "none of this sweep's grids"
    there = f"there are no runs of DDPNOpt in {_listed(spec, bare)}; ask for the summary"
    return f"{allowed}: a heatmap compares DDPNOpt with its baseline, and {there}"


def _only(spec: SweepSpec, fitting: Sequence[int], grid: int | None) -> int:
    if len(fitting) > 1:
        raise _refuse("grid", grid, f"one of {_listed(spec, fitting)}, since several grids fit")
    return fitting[0]


def _listed(spec: SweepSpec, positions: Sequence[int]) -> str:
    return ", ".join(_named(spec, position) for position in positions)


def _named(spec: SweepSpec, position: int) -> str:
    grid = spec.grids[position]
    setting = grid.setting()
    return f"{position} ({grid.baseline}{', ' if setting else ''}{setting})"


def heatmap(
    connection: Connection, sweep_id: str, metric: str, baseline: str | None = None, grid: int | None = None
) -> Heatmap:
    """Compute a panel from the results that are there.

    Raises:
        NotFoundError: if there is no such sweep.
        InvalidInputError: if the metric is unknown, or the grid is not one or has no cells.
    """
    column = METRIC_COLUMNS[check_metric(metric)]
    spec = sweep_queries.spec_of(connection, sweep_id)
    position = choose_panel(spec, baseline, grid)
    rows = connection.execute(
        select(runs.c.learning_rate, runs.c.vxx_reg, runs.c.seed, column)
        .join(grids, grids.c.id == runs.c.grid_id)
        .join(results, results.c.run_id == runs.c.id)
        .where(grids.c.sweep_id == sweep_id, grids.c.position == position)
    )
    chosen = spec.grids[position]
    return Heatmap(
        sweep_id,
        spec.name,
        position,
        chosen.baseline,
        metric,
        tuple(chosen.learning_rate),
        tuple(chosen.vxx_reg),
        cells(chosen.learning_rate, chosen.vxx_reg, (Outcome(*row) for row in rows), metric),
        chosen.setting(),
    )


def summary(
    connection: Connection, sweep_id: str, metric: str, baseline: str | None = None, grid: int | None = None
) -> Summary:
    """Summarise the runs of all grids that fit, from the results that are there.

    Raises:
        NotFoundError: if there is no such sweep.
        InvalidInputError: if the metric is unknown or no grid fits.
    """
    check_metric(metric)
    spec = sweep_queries.spec_of(connection, sweep_id)
    return summary_of(connection, sweep_id, spec, metric, fitting_grids(spec, baseline, grid))


def summary_of(
    connection: Connection, sweep_id: str, spec: SweepSpec, metric: str, positions: Sequence[int]
) -> Summary:
    """Summarise the runs of the grids at some positions of a sweep's spec."""
    rows = connection.execute(
        select(grids.c.position, runs.c.learning_rate, runs.c.vxx_reg, runs.c.seed, METRIC_COLUMNS[metric])
        .join(grids, grids.c.id == runs.c.grid_id)
        .join(results, results.c.run_id == runs.c.id)
        .where(grids.c.sweep_id == sweep_id, grids.c.position.in_(positions))
    )
    outcomes: dict[int, list[Outcome]] = {position: [] for position in positions}
    for position, *outcome in rows:
        outcomes[position].append(Outcome(*outcome))
    found = (
        summary_rows(
            chosen.learning_rate,
            chosen.vxx_reg,
            outcomes[position],
            len(spec.seed_list()),
            grid=position,
            baseline=chosen.baseline,
            setting=chosen.setting(),
        )
        for position in positions
        for chosen in (spec.grids[position],)
    )
    return Summary(sweep_id, spec.name, metric, tuple(row for grid in found for row in grid))


def run_page(connection: Connection, sweep_id: str, after: int, limit: int) -> list[dict[str, Any]]:
    """List runs with their state and results, in order of id, from after the id `after`.

    Raises:
        NotFoundError: if there is no such sweep.
    """
    sweep_queries.spec_of(connection, sweep_id)
    query = (
        select(
            runs.c.id,
            grids.c.position.label("grid"),
            grids.c.baseline,
            runs.c.method,
            runs.c.learning_rate,
            runs.c.vxx_reg,
            runs.c.seed,
            packs.c.position.label("pack"),
            packs.c.state.label("pack_state"),
            results.c.state.label("result_state"),
            results.c.attempt,
            results.c.steps,
            *METRIC_COLUMNS.values(),
            results.c.diverged_step,
            results.c.diverged_quantity,
            results.c.diverged_kind,
            results.c.last_finite,
            results.c.weights_digest,
            results.c.reused_from,
        )
        .join(grids, grids.c.id == runs.c.grid_id)
        .join(packs, packs.c.id == runs.c.pack_id)
        .outerjoin(results, results.c.run_id == runs.c.id)
        .where(runs.c.sweep_id == sweep_id, runs.c.id > after)
        .order_by(runs.c.id)
        .limit(limit)
    )
    page = []
    for row in connection.execute(query):
        entry = dict(row._mapping)
        pack_state = entry.pop("pack_state")
        entry["state"] = entry.pop("result_state") or pack_state
        page.append(entry)
    return page


def curve_list(
    connection: Connection, sweep_id: str, metric: str, baseline: str | None, grid: int | None, limit: int
) -> list[Curve]:
    """Return the curves of a grid's runs that have ended, in order of run.

    Raises:
        NotFoundError: if there is no such sweep.
        InvalidInputError: if the metric is unknown or the grid is not one.
    """
    check_metric(metric)
    spec = sweep_queries.spec_of(connection, sweep_id)
    position = choose_grid(spec, baseline, grid)
    steps = tuple(curve_steps(spec, metric))
    rows = connection.execute(arrays(sweep_id, position, metric).limit(limit))
    found = []
    for run_id, method, learning_rate, vxx_reg, seed, points in rows:
        values = np.frombuffer(points, dtype="<f4")
        finite = tuple(float(v) if np.isfinite(v) else None for v in values)
        found.append(Curve(run_id, method, learning_rate, vxx_reg, seed, steps[: len(finite)], finite))
    return found


def arrays(sweep_id: str, position: int, name: str) -> Select[int, str, float, float | None, int, bytes]:
    """Select a grid's runs with the array of that name, of a metric or a probe, in order of run."""
    return (
        select(runs.c.id, runs.c.method, runs.c.learning_rate, runs.c.vxx_reg, runs.c.seed, curves.c.points)
        .join(grids, grids.c.id == runs.c.grid_id)
        .join(curves, and_(curves.c.run_id == runs.c.id, curves.c.metric == name))
        .where(grids.c.sweep_id == sweep_id, grids.c.position == position)
        .order_by(runs.c.id)
    )


def curve_steps(spec: SweepSpec, metric: str) -> Iterator[int]:
    """Yield the steps at which a run's metric is taken."""
    training = spec.training.resolved()
    taken = training.takes_test_metrics if metric in TEST_METRICS else training.takes_train_metrics
    return filter(taken, training.points())
