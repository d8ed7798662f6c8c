"""Every write to a pack after it was submitted, save those that its owners ask for (`sweeps.actions`).

The attempt is the fencing token: a write by any attempt but the running one changes nothing and says so.
Each end of an attempt closes its row in the ledger `attempts` in the same transaction.

All functions take a connection in a writing transaction; the caller commits. Rows are locked in this order,
so that no two transactions wait for each other: the scheduler's row, packs, sweeps, teams, shares.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Connection, Row, and_, case, exists, func, insert, null, select, update

from ddpnopt.config import Method
from ddpnopt.results import METRICS, RunResult
from service.db.engine import clock, columns, insert_many
from service.db.tables import attempts, curves, grids, is_running, packs, results, runs, shares, sweeps, teams
from service.dispatch import fairness
from service.dispatch.states import SWEEPS_OVER, PackState, Wanted, sweep_state
from service.results import reuse
from workers.protocol import LOG_BYTES, Environment, Pool

LEASE_S: Final = 30.0
RENEW_EVERY_S: Final = 10.0
ANY_POOL: Final = Pool()


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write to a pack for as long as `attempt` is its running attempt.

    Attributes:
        share: of a device that the attempt was given.
        position: of the pack in its sweep.
    """

    pack_id: int
    sweep_id: str
    attempt: int
    max_attempts: int
    share: float = 1.0
    position: int = 0

    @property
    def name(self) -> str:
        """What people know the pack by."""
        return f"{self.sweep_id}/{self.position}"

    def __str__(self) -> str:
        return f"pack {self.name}, attempt {self.attempt}"


@dataclass(frozen=True, slots=True)
class LeasedRun:
    """A run of a leased pack, in the order of `pack_index`."""

    run_id: int
    grid: int
    method: Method
    learning_rate: float
    vxx_reg: float | None
    seed: int


@dataclass(frozen=True, slots=True)
class Held:
    """What the database says of a pack that an owner holds.

    Attributes:
        attempt: the running one.
        stop: whether it should stop at a checkpoint.
    """

    attempt: int
    stop: bool


def claim(
    connection: Connection,
    owner: str,
    cluster: str,
    sweep_id: str,
    limit: int,
    pool: Pool = ANY_POOL,
    charged: float = 0.0,
) -> list[Lease]:
    """Take up to `limit` queued packs of a sweep, in order, each under a new attempt.

    The sweep is bound to the pool's kind of device.

    Args:
        connection: in a writing transaction.
        owner: who claims.
        cluster: where.
        sweep_id: the sweep.
        limit: most packs.
        pool: of that cluster.
        charged: seconds that each attempt's team is charged for beforehand, for `_close` to correct.
    """
    rows = _take(connection, owner, sweep_id, limit)
    if not rows:
        return []
    sweep = connection.execute(
        update(sweeps)
        .where(sweeps.c.id == sweep_id)
        .values(
            started_at=func.coalesce(sweeps.c.started_at, clock()),
            served_at=clock(),
            device_kind=func.coalesce(sweeps.c.device_kind, pool.kind),
            device_model=func.coalesce(sweeps.c.device_model, pool.model),
        )
        .returning(sweeps.c.team_id, sweeps.c.pack_share)
    ).one()
    found = [
        Lease(row.id, sweep_id, row.attempt, row.max_attempts, sweep.pack_share, row.position) for row in rows
    ]
    found.sort(key=lambda lease: lease.pack_id)
    shared = {"team_id": sweep.team_id, "owner": owner, "cluster": cluster, "pool": pool.key()}
    _open(connection, found, charged=charged, **shared)
    settle(connection, sweep_id)
    return found


def _take(connection: Connection, owner: str, sweep_id: str, limit: int) -> Sequence[Row[Any]]:
    """Turn queued packs of a sweep that may run into running ones."""
    ready = (
        select(packs.c.id)
        .where(
            packs.c.sweep_id == sweep_id,
            packs.c.state == PackState.QUEUED,
            packs.c.not_before <= clock(),
            exists().where(sweeps.c.id == sweep_id, sweeps.c.wanted == Wanted.RUN),
        )
        .order_by(packs.c.id)
        .limit(limit)
        # Compiles to nothing on SQLite, whose writers are alone.
        .with_for_update(skip_locked=True, of=packs)
        .cte("ready")
    )
    return connection.execute(
        update(packs)
        .where(packs.c.id.in_(select(ready.c.id)))
        .values(
            state=PackState.RUNNING,
            attempt=packs.c.attempt + 1,
            lease_owner=owner,
            lease_until=clock() + LEASE_S,
            preempted=False,
            step=0,
            started_at=func.coalesce(packs.c.started_at, clock()),
        )
        .returning(packs.c.id, packs.c.attempt, packs.c.max_attempts, packs.c.position)
    ).all()


def _open(connection: Connection, claimed: Sequence[Lease], *, team_id: int, **shared: Any) -> None:
    """Enter new attempts of a team into the ledger."""
    weight = connection.execute(select(teams.c.weight).where(teams.c.id == team_id)).scalar_one()
    shared |= {"team_id": team_id, "weight": weight, "claimed_at": _now(connection)}
    shared |= {"outcome": "running", "device_seconds": 0.0, "run_steps": 0, "log": ""}
    connection.execute(
        insert(attempts),
        [
            {
                "pack_id": lease.pack_id,
                "attempt": lease.attempt,
                "sweep_id": lease.sweep_id,
                "share": lease.share,
                **shared,
            }
            for lease in claimed
        ],
    )


def renew(connection: Connection, owner: str) -> None:
    """Prolong all leases of an owner: those that it has lost bear another's name, or none."""
    connection.execute(
        update(packs).where(is_running, packs.c.lease_owner == owner).values(lease_until=clock() + LEASE_S)
    )


def held(connection: Connection, owner: str) -> dict[int, Held]:
    """Return the packs that an owner holds, by id."""
    stop = (sweeps.c.wanted != Wanted.RUN) | packs.c.preempted
    query = (
        select(packs.c.id, packs.c.attempt, stop)
        .join(sweeps, sweeps.c.id == packs.c.sweep_id)
        .where(is_running, packs.c.lease_owner == owner)
    )
    return {pack_id: Held(attempt, bool(stop)) for pack_id, attempt, stop in connection.execute(query)}


def start(connection: Connection, lease: Lease, node: str, device: str) -> bool:
    """Record that an attempt has its device; false if it is not the running one."""
    if not _touch(connection, lease):
        return False
    connection.execute(
        update(attempts).where(_is(lease)).values(started_at=clock(), node=node[:100], device=device[:200])
    )
    return True


def progress(
    connection: Connection, lease: Lease, step: int, log: str = "", trained: int | None = None
) -> bool:
    """Record how far an attempt is and what it wrote; false if it is not the running one.

    Args:
        connection: in a writing transaction.
        lease: of the attempt.
        step: updates done.
        log: what it wrote since the last time.
        trained: runs that it trains; those that it does not have equal results.
    """
    done = connection.execute(update(packs).where(_holds(lease)).values(step=step))
    if done.rowcount != 1:
        return False
    connection.execute(
        update(attempts)
        .where(_is(lease))
        .values(
            first_step=func.coalesce(attempts.c.first_step, step),
            runs_trained=func.coalesce(attempts.c.runs_trained, trained),
            **_with_log(log),
        )
    )
    return True


def finish(
    connection: Connection,
    lease: Lease,
    outcome: Sequence[RunResult],
    environment: Environment,
    reused: Collection[int] = (),
    log: str = "",
) -> bool:
    """Close a pack and record its results, in this one transaction; false if the attempt is fenced off.

    Args:
        connection: in a writing transaction.
        lease: of the attempt.
        outcome: one result per run of the pack that was trained.
        environment: where it was trained.
        reused: places of the other runs, whose results are taken from equal ones.
        log: the last of what the attempt wrote.

    Raises:
        ResultsGoneError: if an equal result is not there any more.
    """
    done = connection.execute(
        update(packs)
        .where(_holds(lease))
        .values(
            state=PackState.COMPLETED,
            step=packs.c.steps,
            lease_owner=null(),
            lease_until=null(),
            finished_at=clock(),
            error=null(),
            error_detail=null(),
            device=environment.device[:200],
            versions=environment.versions,
            data_checksum=environment.data_checksum,
            environment_key=environment.key(),
        )
    )
    if done.rowcount != 1:
        return False
    ids = columns(connection, select(runs.c.pack_index, runs.c.id).where(runs.c.pack_id == lease.pack_id))
    now = _now(connection)
    _store(connection, lease, outcome, ids, now)
    diverged = sum(result.divergence is not None for result in outcome)
    if reused:
        targets = [ids[place] for place in reused]
        diverged += reuse.copy(connection, targets, environment.key(), lease.attempt, now)
        connection.execute(
            update(sweeps)
            .where(sweeps.c.id == lease.sweep_id)
            .values(runs_reused=sweeps.c.runs_reused + len(reused))
        )
    connection.execute(update(packs).where(packs.c.id == lease.pack_id).values(runs_diverged=diverged))
    _close(connection, [(lease.pack_id, lease.attempt)], "completed", trained=len(outcome), log=log)
    settle(connection, lease.sweep_id)
    return True


def is_recorded(connection: Connection, lease: Lease) -> bool:
    """Tell whether this very attempt has closed its pack: the answer of a commit may get lost."""
    query = select(exists().where(_is(lease), attempts.c.outcome == "completed"))
    return bool(connection.execute(query).scalar_one())


def requeue(
    connection: Connection, lease: Lease, delay: float, error: str, detail: str, log: str = ""
) -> bool:
    """Give a pack back for another attempt, `delay` seconds from now; false if fenced off."""
    return _end(
        connection,
        lease,
        "failed",
        log,
        **_given_back(),
        not_before=clock() + delay,
        error=error,
        error_detail=detail,
    )


def give_up(connection: Connection, lease: Lease, error: str, detail: str, log: str = "") -> bool:
    """End a pack as failed; false if fenced off."""
    values = {"state": PackState.FAILED, "finished_at": clock(), "error": error, "error_detail": detail}
    return _end(connection, lease, "failed", log, **values)


def stopped(connection: Connection, lease: Lease, step: int | None = None, log: str = "") -> bool:
    """Give a pack back whose attempt stopped as it was asked to, which costs it none; false if fenced off.

    Args:
        connection: in a writing transaction.
        lease: of the attempt.
        step: that it came to, if it is known.
        log: the last of what it wrote.
    """
    if step is not None and not progress(connection, lease, step):
        return False
    values = _given_back() | {"max_attempts": packs.c.max_attempts + 1, "error": None, "error_detail": None}
    return _end(connection, lease, "stopped", log, **values)


def release(connection: Connection, owner: str) -> int:
    """Give back every lease of an owner that is known to be gone; return their number.

    The attempt that was cut off does not count: nothing says that it failed.
    """
    return _release(connection, packs.c.lease_owner == owner, "the dispatcher ended")


def disown(connection: Connection, owner: str, known: Collection[int]) -> int:
    """Give back the leases of packs that an owner does not know it has; return their number.

    A claim may be committed although its answer gets lost. Nobody would train these packs, and their owner
    would renew the leases for ever.
    """
    which = and_(packs.c.lease_owner == owner, packs.c.id.not_in(known))
    return _release(connection, which, "the answer to its claim was lost")


def reap(connection: Connection) -> int:
    """Take back the packs whose lease has run out; return their number."""
    spent = packs.c.attempt >= packs.c.max_attempts
    values = _given_back()
    return _take_back(
        connection,
        packs.c.lease_until < clock(),
        "lost",
        state=case((spent, PackState.FAILED.value), else_=values["state"]),
        finished_at=case((spent, clock()), else_=values["finished_at"]),
        error="the lease ran out: its dispatcher was lost",
    )


def settle(connection: Connection, sweep_id: str) -> None:
    """Bring a sweep's state and counts in line with its packs, and its packs with what is wanted of it."""
    # Locks the sweep, so that of two packs that end at once the later one counts both.
    sweep = connection.execute(
        select(sweeps.c.started_at, sweeps.c.wanted).where(sweeps.c.id == sweep_id).with_for_update()
    ).one()
    if sweep.wanted == Wanted.CANCEL:
        connection.execute(
            update(packs)
            .where(packs.c.sweep_id == sweep_id, packs.c.state == PackState.QUEUED)
            .values(state=PackState.CANCELLED, finished_at=clock())
        )
    rows = connection.execute(
        select(packs.c.state, func.count(), func.min(packs.c.not_before))
        .where(packs.c.sweep_id == sweep_id)
        .group_by(packs.c.state)
    ).all()
    counts = {PackState(state): count for state, count, _ in rows}
    state = sweep_state(Wanted(sweep.wanted), counts, started=sweep.started_at is not None)
    connection.execute(
        update(sweeps)
        .where(sweeps.c.id == sweep_id)
        .values(
            state=state,
            packs_queued=counts.get(PackState.QUEUED, 0),
            packs_running=counts.get(PackState.RUNNING, 0),
            ready_at=next((soonest for name, _, soonest in rows if name == PackState.QUEUED), None),
            finished_at=func.coalesce(sweeps.c.finished_at, clock()) if state in SWEEPS_OVER else null(),
        )
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


def _now(connection: Connection) -> float:
    return float(connection.execute(select(clock())).scalar_one())


def _holds(lease: Lease) -> ColumnElement[bool]:
    return and_(
        packs.c.id == lease.pack_id,
        packs.c.attempt == lease.attempt,
        is_running,
    )


def _is(lease: Lease) -> ColumnElement[bool]:
    return and_(attempts.c.pack_id == lease.pack_id, attempts.c.attempt == lease.attempt)


def _touch(connection: Connection, lease: Lease) -> bool:
    """Tell whether an attempt is the running one, and keep it so until the commit."""
    return connection.execute(select(packs.c.id).where(_holds(lease)).with_for_update()).first() is not None


def _given_back() -> dict[str, Any]:
    """Return the state of a pack that waits for another attempt, unless its sweep is being cancelled."""
    wanted = select(sweeps.c.wanted).where(sweeps.c.id == packs.c.sweep_id).scalar_subquery()
    cancelled = wanted == Wanted.CANCEL
    return {
        "state": case((cancelled, PackState.CANCELLED.value), else_=PackState.QUEUED.value),
        "finished_at": case((cancelled, clock()), else_=null()),
    }


def _with_log(log: str) -> dict[str, Any]:
    if not log:
        return {}
    whole = attempts.c.log + log
    too_long = func.length(whole) - LOG_BYTES
    return {"log": func.substr(whole, case((too_long > 0, too_long + 1), else_=1))}


def _end(connection: Connection, lease: Lease, outcome: str, log: str, **values: Any) -> bool:
    done = connection.execute(
        update(packs).where(_holds(lease)).values(lease_owner=null(), lease_until=null(), **values)
    )
    if done.rowcount != 1:
        return False
    error = values.get("error")
    _close(connection, [(lease.pack_id, lease.attempt)], outcome, error=error, log=log)
    settle(connection, lease.sweep_id)
    return True


def _take_back(connection: Connection, which: ColumnElement[bool], outcome: str, **values: Any) -> int:
    """End the attempts of packs that nobody speaks for any more; return their number.

    One statement: a renewal that comes between would change the row, and the condition is looked at again.
    """
    rows = connection.execute(
        update(packs)
        .where(is_running, which)
        .values(lease_owner=null(), lease_until=null(), error_detail=null(), **values)
        .returning(packs.c.id, packs.c.attempt, packs.c.sweep_id)
    ).all()
    _close(connection, [(row.id, row.attempt) for row in rows], outcome, error=values["error"])
    # In order: two that settle the same sweeps must not wait for each other.
    for sweep_id in sorted({row.sweep_id for row in rows}):
        settle(connection, sweep_id)
    return len(rows)


def _release(connection: Connection, which: ColumnElement[bool], error: str) -> int:
    values = _given_back()
    return _take_back(
        connection, which, "released", **values, max_attempts=packs.c.max_attempts + 1, error=error
    )


@dataclass(frozen=True, slots=True)
class _Closed:
    """What an attempt comes to in the ledger."""

    sweep_id: str
    team_id: int
    pool: str
    device_seconds: float
    run_steps: int
    correction: float


def _close(
    connection: Connection,
    ended: Iterable[tuple[int, int]],
    outcome: str,
    *,
    trained: int | None = None,
    error: str | None = None,
    log: str = "",
) -> None:
    """Close attempts in the ledger, and book what they took for their sweeps and teams.

    Args:
        connection: in a writing transaction.
        ended: packs and attempts.
        outcome: how they ended.
        trained: runs that were; all of a pack's if not given.
        error: why they ended.
        log: the last of what they wrote.
    """
    closed = [
        entry
        for pack_id, attempt in ended
        if (entry := _close_one(connection, pack_id, attempt, outcome, trained, error, log))
    ]
    for sweep_id in sorted({entry.sweep_id for entry in closed}):
        own = [entry for entry in closed if entry.sweep_id == sweep_id]
        connection.execute(
            update(sweeps)
            .where(sweeps.c.id == sweep_id)
            .values(
                device_seconds=sweeps.c.device_seconds + sum(e.device_seconds for e in own),
                run_steps_trained=sweeps.c.run_steps_trained + sum(e.run_steps for e in own),
            )
        )
    for team_id in sorted({entry.team_id for entry in closed}):
        own = [entry for entry in closed if entry.team_id == team_id]
        connection.execute(
            update(teams)
            .where(teams.c.id == team_id)
            .values(
                device_seconds=teams.c.device_seconds + sum(e.device_seconds for e in own),
                run_steps=teams.c.run_steps + sum(e.run_steps for e in own),
            )
        )
    for entry in sorted(closed, key=lambda e: (e.team_id, e.pool)):
        connection.execute(
            update(shares)
            .where(shares.c.team_id == entry.team_id, shares.c.pool == entry.pool)
            .values(virtual_time=shares.c.virtual_time + entry.correction)
        )


def _close_one(
    connection: Connection,
    pack_id: int,
    attempt: int,
    outcome: str,
    trained: int | None,
    error: str | None,
    log: str,
) -> _Closed | None:
    row = connection.execute(
        select(attempts, packs.c.step, packs.c.runs_total, clock().label("now"))
        .join(packs, packs.c.id == attempts.c.pack_id)
        .where(attempts.c.pack_id == pack_id, attempts.c.attempt == attempt)
    ).first()
    if row is None:
        return None  # claimed before there was a ledger
    seconds = 0.0 if row.started_at is None else max(0.0, row.now - row.started_at)
    steps = 0 if row.first_step is None else max(0, row.step - row.first_step)
    entry = _Closed(
        row.sweep_id,
        row.team_id,
        row.pool,
        row.share * seconds,
        steps * next(n for n in (trained, row.runs_trained, row.runs_total) if n is not None),
        fairness.correction(row.charged, seconds, row.share, row.weight),
    )
    connection.execute(
        update(attempts)
        .where(attempts.c.pack_id == pack_id, attempts.c.attempt == attempt)
        .values(
            outcome=outcome,
            ended_at=row.now,
            device_seconds=entry.device_seconds,
            run_steps=entry.run_steps,
            error=error,
            **_with_log(log),
        )
    )
    return entry


def _store(
    connection: Connection, lease: Lease, outcome: Sequence[RunResult], ids: Mapping[int, int], now: float
) -> None:
    """Insert the results of trained runs, with their curves and records.

    Args:
        connection: in a writing transaction.
        lease: of the attempt.
        outcome: by place in the pack.
        ids: of the runs, by place.
        now: by the database's clock.
    """
    insert_many(connection, results, [_result_row(ids[r.index], lease, r, now) for r in outcome])
    insert_many(
        connection,
        curves,
        [
            {"run_id": ids[r.index], "metric": name, "points": points.astype("<f4").tobytes()}
            for r in outcome
            for name, points in _series(r)
        ],
    )


def _series(result: RunResult) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield a run's curves and what its probes recorded: both are arrays by the points of its curves."""
    yield from result.curves.items()
    for probe, record in result.records.items():
        yield probe, record.values


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
