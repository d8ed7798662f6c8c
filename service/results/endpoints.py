"""REST of results."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Query

from service.http import Reading, problems
from service.results import queries, records
from service.results.schemas import CurvesOut, RecordsPage, RunOut, RunPage
from service.results.statistics import Heatmap, Summary

router = APIRouter(prefix="/api/v1/sweeps/{sweep_id}", tags=["results"], responses=problems(404, 422, 503))

MAX_RUNS: Final = 1000
MAX_CURVES: Final = 2000

MAX_RECORDS: Final = 1000

Metric = Annotated[str, Query(max_length=32, description="train_loss, train_accuracy, test_loss or accuracy")]
Baseline = Annotated[str | None, Query(max_length=32)]
Grid = Annotated[int | None, Query(description="position of the grid in the spec, from 0")]


@router.get("/runs")
def list_runs(
    sweep_id: str,
    connection: Reading,
    limit: Annotated[int, Query(ge=1, le=MAX_RUNS)] = 200,
    after: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0,
) -> RunPage:
    """List a sweep's runs with their state and results."""
    rows = queries.run_page(connection, sweep_id, after, limit + 1)
    page = [RunOut(**row) for row in rows[:limit]]
    return RunPage(runs=page, next=page[-1].id if len(rows) > limit else None)


@router.get("/heatmap")
def get_heatmap(
    sweep_id: str,
    connection: Reading,
    metric: Metric = "train_loss",
    baseline: Baseline = None,
    grid: Grid = None,
) -> Heatmap:
    """Compare DDPNOpt with its baseline in every cell, from the results that are there."""
    return queries.heatmap(connection, sweep_id, metric, baseline, grid)


@router.get("/summary")
def get_summary(
    sweep_id: str,
    connection: Reading,
    metric: Metric = "train_loss",
    baseline: Baseline = None,
    grid: Grid = None,
) -> Summary:
    """Summarise each kind of run over its seeds, those of baselines alone as well; of all grids that fit."""
    return queries.summary(connection, sweep_id, metric, baseline, grid)


@router.get("/curves")
def get_curves(
    sweep_id: str,
    connection: Reading,
    metric: Metric = "train_loss",
    baseline: Baseline = None,
    grid: Grid = None,
    limit: Annotated[int, Query(ge=1, le=MAX_CURVES)] = MAX_CURVES,
) -> CurvesOut:
    """Return the metric over the steps of every run of a grid that has ended."""
    found = queries.curve_list(connection, sweep_id, metric, baseline, grid, limit)
    return CurvesOut(sweep_id=sweep_id, metric=metric, curves=found)


@router.get("/records")
def list_records(
    sweep_id: str,
    connection: Reading,
    probe: Annotated[str, Query(max_length=32, description="one of the spec's probes")],
    baseline: Baseline = None,
    grid: Grid = None,
    limit: Annotated[int, Query(ge=1, le=MAX_RECORDS)] = 100,
    after: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0,
) -> RecordsPage:
    """List what a probe recorded in the runs of a grid that have ended, the points of each in a row.

    `after` is the `next` of the page before; large records come in pages of fewer runs.
    """
    found = records.page(connection, sweep_id, probe, baseline, grid, after, limit)
    return RecordsPage(
        sweep_id=sweep_id, probe=probe, shape=found.shape, records=found.records, next=found.next
    )
