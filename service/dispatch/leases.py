"""Every write to a pack after it was submitted.

The attempt is the fencing token: a write by any attempt but the running one changes nothing and says so.

All functions take a connection in a writing transaction; the caller commits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from sqlalchemy import ColumnElement, Connection, and_, case, exists, func, insert, null, select, update

from ddpnopt.config import Method
from ddpnopt.results import METRICS, RunResult
from service.db.engine import clock, columns
from service.db.tables import curves, grids, packs, results, runs, sweeps
from service.dispatch.states import PackState, SweepState, sweep_state
from workers.protocol import Environment

LEASE_S: Final = 30.0
RENEW_EVERY_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write to a pack for as long as `attempt` is its running attempt."""

    pack_id: int
    sweep_id: str
    attempt: int
    max_attempts: int


@dataclass(frozen=True, slots=True)
class LeasedRun:
    """A run of a leased pack, in the order of `pack_index`."""

    run_id: int
    grid: int
    method: Method
    learning_rate: float
    vxx_reg: float | None
    seed: int


def claim(connection: Connection, owner: str, limit: int) -> list[Lease]:
    """Take up to `limit` queued packs, oldest sweep first, each under a new attempt."""
    ready = (
        select(packs.c.id)
        .where(packs.c.state == PackState.QUEUED, packs.c.not_before <= clock())
        .order_by(packs.c.id)
        .limit(limit)
        # Compiles to nothing on SQLite, whose writers are alone.
        .with_for_update(skip_locked=True)
        .cte("ready")
    )
    rows = connection.execute(
        update(packs)
        .where(packs.c.id.in_(select(ready.c.id)))
        .values(
            state=PackState.RUNNING,
            attempt=packs.c.attempt + 1,
            lease_owner=owner,
            lease_until=clock() + LEASE_S,
            step=0,
            started_at=func.coalesce(packs.c.started_at, clock()),
        )
        .returning(packs.c.id, packs.c.sweep_id, packs.c.attempt, packs.c.max_attempts)
    ).all()
    leases = sorted((Lease(*row) for row in rows), key=lambda lease: lease.pack_id)
    connection.execute(
        update(sweeps)
        .where(sweeps.c.id.in_({lease.sweep_id for lease in leases}), sweeps.c.state == SweepState.QUEUED)
        .values(state=SweepState.RUNNING, started_at=func.coalesce(sweeps.c.started_at, clock()))
    )
    return leases


def renew(connection: Connection, held: Iterable[Lease]) -> set[int]:
    """Prolong leases; return the packs whose lease was lost, whose attempts must stop."""
    lost = set()
    for lease in held:
        done = connection.execute(update(packs).where(_holds(lease)).values(lease_until=clock() + LEASE_S))
        if done.rowcount != 1:
            lost.add(lease.pack_id)
    return lost


def progress(connection: Connection, lease: Lease, step: int) -> bool:
    """Record how far an attempt is; false if it is not the running one."""
    done = connection.execute(update(packs).where(_holds(lease)).values(step=step))
    return done.rowcount == 1


def finish(
    connection: Connection, lease: Lease, outcome: Sequence[RunResult], environment: Environment
) -> bool:
    """Close a pack and record its results, in this one transaction; false if the attempt is fenced off.

    Args:
        connection: in a writing transaction.
        lease: of the attempt.
        outcome: one result per run of the pack.
        environment: where it was trained.
    """
    done = connection.execute(
        update(packs)
        .where(_holds(lease))
        .values(
            state=PackState.COMPLETED,
            step=packs.c.steps,
            runs_diverged=sum(result.divergence is not None for result in outcome),
            lease_owner=null(),
            lease_until=null(),
            finished_at=clock(),
            error=null(),
            error_detail=null(),
            device=environment.device,
            versions=environment.versions,
            data_checksum=environment.data_checksum,
        )
    )
    if done.rowcount != 1:
        return False
    ids = columns(connection, select(runs.c.pack_index, runs.c.id).where(runs.c.pack_id == lease.pack_id))
    now = connection.execute(select(clock())).scalar_one()
    connection.execute(insert(results), [_result_row(ids[r.index], lease, r, now) for r in outcome])
    connection.execute(
        insert(curves),
        [
            {"run_id": ids[r.index], "metric": name, "points": points.astype("<f4").tobytes()}
            for r in outcome
            for name, points in r.curves.items()
        ],
    )
    settle(connection, lease.sweep_id)
    return True


def is_recorded(connection: Connection, lease: Lease) -> bool:
    """Tell whether this very attempt has closed its pack: the answer of a commit may get lost."""
    query = select(
        exists().where(
            runs.c.pack_id == lease.pack_id, results.c.run_id == runs.c.id, results.c.attempt == lease.attempt
        )
    )
    return bool(connection.execute(query).scalar_one())


def requeue(connection: Connection, lease: Lease, delay: float, error: str, detail: str) -> bool:
    """Give a pack back for another attempt, `delay` seconds from now; false if fenced off."""
    return _end(
        connection,
        _holds(lease),
        state=PackState.QUEUED,
        not_before=clock() + delay,
        error=error,
        error_detail=detail,
    )


def give_up(connection: Connection, lease: Lease, error: str, detail: str) -> bool:
    """End a pack as failed; false if fenced off."""
    values = {"state": PackState.FAILED, "finished_at": clock(), "error": error, "error_detail": detail}
    ended = _end(connection, _holds(lease), **values)
    if ended:
        settle(connection, lease.sweep_id)
    return ended


def release(connection: Connection, owner: str) -> int:
    """Give back every lease of an owner that is known to be gone; return their number.

    The attempt that was cut off does not count: nothing says that it failed.
    """
    done = connection.execute(
        update(packs)
        .where(packs.c.state == PackState.RUNNING, packs.c.lease_owner == owner)
        .values(
            state=PackState.QUEUED,
            lease_owner=null(),
            lease_until=null(),
            max_attempts=packs.c.max_attempts + 1,
            error="the dispatcher ended",
        )
    )
    return int(done.rowcount)


def reap(connection: Connection) -> int:
    """Take back the packs whose lease has run out; return their number.

    One statement: a renewal that comes between would change the row, and the condition is looked at again.
    """
    spent = packs.c.attempt >= packs.c.max_attempts
    expired = and_(packs.c.state == PackState.RUNNING, packs.c.lease_until < clock())
    rows = connection.execute(
        update(packs)
        .where(expired)
        .values(
            state=case((spent, PackState.FAILED.value), else_=PackState.QUEUED.value),
            finished_at=case((spent, clock()), else_=null()),
            lease_owner=null(),
            lease_until=null(),
            error="the lease ran out: its dispatcher was lost",
        )
        .returning(packs.c.sweep_id)
    ).all()
    # In order: two reapers that settle the same sweeps must not wait for each other.
    for sweep_id in sorted({row.sweep_id for row in rows}):
        settle(connection, sweep_id)
    return len(rows)


def settle(connection: Connection, sweep_id: str) -> None:
    """Bring a sweep's state in line with its packs."""
    # Locks the sweep, so that of two packs that end at once the later one counts both.
    started = connection.execute(
        select(sweeps.c.started_at).where(sweeps.c.id == sweep_id).with_for_update()
    ).scalar_one()
    counts = {
        PackState(state): count
        for state, count in connection.execute(
            select(packs.c.state, func.count()).where(packs.c.sweep_id == sweep_id).group_by(packs.c.state)
        )
    }
    state = sweep_state(counts, started=started is not None)
    over = state in (SweepState.COMPLETED, SweepState.FAILED)
    connection.execute(
        update(sweeps)
        .where(sweeps.c.id == sweep_id)
        .values(state=state, finished_at=func.coalesce(sweeps.c.finished_at, clock()) if over else null())
    )


def runs_of(connection: Connection, lease: Lease) -> list[LeasedRun]:
    """Return the runs of a leased pack in the order of `pack_index`."""
    query = (
        select(runs.c.id, grids.c.position, runs.c.method, runs.c.learning_rate, runs.c.vxx_reg, runs.c.seed)
        .join(grids, grids.c.id == runs.c.grid_id)
        .where(runs.c.pack_id == lease.pack_id)
        .order_by(runs.c.pack_index)
    )
    return [LeasedRun(*row) for row in connection.execute(query)]


def _holds(lease: Lease) -> ColumnElement[bool]:
    return and_(
        packs.c.id == lease.pack_id,
        packs.c.attempt == lease.attempt,
        packs.c.state == PackState.RUNNING,
    )


def _end(connection: Connection, condition: ColumnElement[bool], **values: Any) -> bool:
    done = connection.execute(
        update(packs).where(condition).values(lease_owner=null(), lease_until=null(), **values)
    )
    return bool(done.rowcount == 1)


def _result_row(run_id: int, lease: Lease, result: RunResult, now: float) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(METRICS)
    row |= dict.fromkeys(("diverged_step", "diverged_quantity", "diverged_kind", "last_finite"))
    row |= result.metrics
    if result.divergence is not None:
        row["diverged_step"] = result.divergence.step
        row["diverged_quantity"] = result.divergence.quantity
        row["diverged_kind"] = result.divergence.kind
        last = result.divergence.last_finite
        row["last_finite"] = last if last is None or np.isfinite(last) else None
    return row | {
        "run_id": run_id,
        "attempt": lease.attempt,
        "state": result.state,
        "steps": result.steps,
        "weights_digest": result.weights_digest,
        "recorded_at": now,
    }
