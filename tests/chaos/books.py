"""Whether the database is in order: what each test of this package asks in the end, or after every step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, Row, func, select

from ddpnopt.results import METRICS
from service.db.engine import read
from service.db.tables import attempts, curves, packs, results, runs, sweeps, teams
from service.dispatch.states import SWEEPS_OVER, PackState, SweepState, Wanted, sweep_state

Rows = list[Row[Any]]

RESULTS = (
    select(
        runs.c.pack_id,
        func.count().label("runs"),
        func.count(results.c.run_id).label("recorded"),
        func.min(results.c.attempt).label("first"),
        func.max(results.c.attempt).label("last"),
        func.count(results.c.diverged_step).label("diverged"),
        func.count(results.c.reused_from).label("reused"),
    )
    .select_from(runs.outerjoin(results, results.c.run_id == runs.c.id))
    .group_by(runs.c.pack_id)
)


def check_books(engine: Engine) -> None:
    """Assert whatever must hold after each commit."""
    with read(engine) as connection:
        all_packs = list(connection.execute(select(packs).order_by(packs.c.id)))
        all_sweeps = list(connection.execute(select(sweeps)))
        ledger = list(connection.execute(select(attempts).order_by(attempts.c.pack_id, attempts.c.attempt)))
        recorded = {row.pack_id: row for row in connection.execute(RESULTS)}
        _check_curves(connection, sum(row.recorded for row in recorded.values()))
        totals = list(connection.execute(select(teams.c.id, teams.c.device_seconds, teams.c.run_steps)))
    for pack in all_packs:
        _check_pack(pack, recorded[pack.id])
    _check_ledger(all_packs, ledger)
    for sweep in all_sweeps:
        own = [pack for pack in all_packs if pack.sweep_id == sweep.id]
        _check_sweep(sweep, own)
        assert sweep.runs_reused == sum(recorded[pack.id].reused for pack in own)
        taken = [row for row in ledger if row.sweep_id == sweep.id]
        _check_sums(taken, sweep.device_seconds, sweep.run_steps_trained)
    for team in totals:
        _check_sums([row for row in ledger if row.team_id == team.id], team.device_seconds, team.run_steps)


def _check_pack(pack: Row[Any], found: Row[Any]) -> None:
    running = pack.state == PackState.RUNNING
    assert (pack.lease_owner is not None) == (pack.lease_until is not None) == running, pack
    assert (pack.finished_at is not None) == (pack.state not in (PackState.QUEUED, PackState.RUNNING)), pack
    assert 0 <= pack.attempt <= pack.max_attempts, pack
    done = pack.state == PackState.COMPLETED
    assert found.runs == pack.runs_total
    assert found.recorded == (pack.runs_total if done else 0), (pack, found)
    assert pack.runs_diverged == found.diverged
    if done:
        assert found.first == found.last == pack.attempt, (pack, found)
        assert pack.step == pack.steps


def _check_curves(connection: Connection, recorded: int) -> None:
    # That each has its result follows from the numbers: a run has no curve twice.
    with_result = curves.join(results, results.c.run_id == curves.c.run_id)
    everything = connection.execute(select(func.count()).select_from(curves)).scalar_one()
    theirs = connection.execute(select(func.count()).select_from(with_result)).scalar_one()
    assert everything == theirs == recorded * len(METRICS)


def _check_ledger(all_packs: Rows, ledger: Rows) -> None:
    """One row for each attempt that there ever was, and open is the running one alone."""
    wanted = [(pack.id, number) for pack in all_packs for number in range(1, pack.attempt + 1)]
    assert [(row.pack_id, row.attempt) for row in ledger] == wanted
    is_open = {(row.pack_id, row.attempt, row.owner) for row in ledger if row.outcome == "running"}
    assert is_open == {(p.id, p.attempt, p.lease_owner) for p in all_packs if p.state == PackState.RUNNING}
    done = {(row.pack_id, row.attempt) for row in ledger if row.outcome == "completed"}
    assert done == {(p.id, p.attempt) for p in all_packs if p.state == PackState.COMPLETED}


def _check_sweep(sweep: Row[Any], own: Rows) -> None:
    counts = Counter(PackState(pack.state) for pack in own)
    waiting = [pack.not_before for pack in own if pack.state == PackState.QUEUED]
    assert (sweep.packs_queued, sweep.packs_running) == (len(waiting), counts[PackState.RUNNING]), sweep
    assert sweep.ready_at == min(waiting, default=None)
    assert (sweep.started_at is not None) == any(pack.attempt for pack in own)
    state = sweep_state(Wanted(sweep.wanted), counts, started=sweep.started_at is not None)
    assert sweep.state == state
    assert (sweep.finished_at is not None) == (SweepState(sweep.state) in SWEEPS_OVER)
    if sweep.wanted == Wanted.CANCEL:
        assert not waiting


def _check_sums(taken: Rows, device_seconds: float, run_steps: int) -> None:
    assert device_seconds == pytest.approx(sum(row.device_seconds for row in taken))
    assert run_steps == sum(row.run_steps for row in taken)


def digests(engine: Engine, sweep_id: str) -> list[tuple[Any, ...]]:
    """Return every bit of a sweep's results, by the place of their runs in the plan."""
    place = (packs.c.position, runs.c.pack_index)
    theirs = runs.join(packs, packs.c.id == runs.c.pack_id)
    with read(engine) as connection:
        found = connection.execute(
            select(
                *place,
                runs.c.method,
                runs.c.learning_rate,
                runs.c.vxx_reg,
                runs.c.seed,
                results.c.state,
                results.c.weights_digest,
                results.c.train_loss,
                results.c.accuracy,
                results.c.diverged_step,
            )
            .select_from(theirs.outerjoin(results, results.c.run_id == runs.c.id))
            .where(runs.c.sweep_id == sweep_id)
            .order_by(*place)
        )
        points = connection.execute(
            select(*place, curves.c.metric, curves.c.points)
            .select_from(theirs.join(curves, curves.c.run_id == runs.c.id))
            .where(runs.c.sweep_id == sweep_id)
            .order_by(*place, curves.c.metric)
        )
        return [tuple(row) for row in found] + [tuple(row) for row in points]


def states(engine: Engine) -> dict[str, str]:
    """Return the sweeps' states by their ids."""
    with read(engine) as connection:
        return {row.id: row.state for row in connection.execute(select(sweeps.c.id, sweeps.c.state))}


def all_over(engine: Engine) -> bool:
    """Tell whether no sweep has anything left to do."""
    return all(SweepState(state) in SWEEPS_OVER for state in states(engine).values())
