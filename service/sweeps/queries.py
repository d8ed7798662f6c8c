"""SQL of sweeps: storing a submission, listing, one sweep's state. Callers commit."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError
from sqlalchemy import Connection, Row, Select, and_, func, insert, or_, select
from sqlalchemy.exc import IntegrityError

from service.auth.roles import DEFAULT_TEAM
from service.db.engine import clock, columns, insert_many
from service.db.tables import grids, packs, runs, sweeps, teams
from service.dispatch.policy import MAX_ATTEMPTS
from service.dispatch.states import PackState, SweepState, Wanted
from service.errors import ConflictError, NotFoundError
from service.sweeps.expand import Plan
from service.sweeps.keys import keys_of
from service.sweeps.spec import SweepSpec
from service.teams import queries as team_queries

ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
ID_LENGTH: Final = 10


@dataclass(frozen=True, slots=True)
class SweepRow:
    """A sweep with the counts that people ask for.

    Attributes:
        team: whose it is.
        runs_done: runs with a result.
        runs_reused: those of them that were not trained, since equal results were there.
        run_steps_done: updates done over all runs, those of running attempts included.
        run_steps_trained: updates that its attempts did, those included that came to nothing.
        device_seconds: that they took.
        failed_packs: packs that have failed for good.
        now: the database's clock at the query.
    """

    id: str
    team: str
    name: str
    state: str
    priority: int
    spec: dict[str, Any]
    runs_total: int
    run_steps_total: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    runs_done: int
    runs_diverged: int
    runs_reused: int
    run_steps_done: int
    run_steps_trained: int
    device_seconds: float
    packs_queued: int
    packs_running: int
    failed_packs: int
    error: str | None
    now: float


def new_id() -> str:
    """Return a sweep id: 50 random bits, letters that are not mistaken for each other."""
    return "".join(secrets.choice(ALPHABET) for _ in range(ID_LENGTH))


def create(
    connection: Connection,
    spec: SweepSpec,
    plan: Plan,
    idempotency_key: str | None = None,
    team: str = DEFAULT_TEAM,
) -> tuple[str, bool]:
    """Store a sweep with its grids, packs and runs.

    Returns:
        The sweep's id, and whether it is new: the same key with the same spec gives the first one again.

    Raises:
        ConflictError: if the key was used with another spec, or the team has no room for so many runs.
        NotFoundError: if there is no such team.
    """
    owner = team_queries.get(connection, team)
    if idempotency_key is not None and (first := _by_key(connection, owner.id, idempotency_key, spec)):
        return first, False
    sweep_id = new_id()
    now = connection.execute(select(clock())).scalar_one()
    try:
        with connection.begin_nested():
            _insert_sweep(connection, sweep_id, owner.id, spec, plan, idempotency_key, now)
    except IntegrityError:
        # Another request with this key came first.
        if idempotency_key is not None and (first := _by_key(connection, owner.id, idempotency_key, spec)):
            return first, False
        raise
    grid_ids = _insert_grids(connection, sweep_id, spec)
    pack_ids = _insert_packs(connection, sweep_id, spec, plan, now)
    _insert_runs(connection, sweep_id, spec, plan, grid_ids, pack_ids)
    team_queries.check_queue(connection, owner.id)
    return sweep_id, True


def _by_key(connection: Connection, team_id: int, key: str, spec: SweepSpec) -> str | None:
    row = connection.execute(
        select(sweeps.c.id, sweeps.c.spec).where(sweeps.c.team_id == team_id, sweeps.c.idempotency_key == key)
    ).first()
    if row is None:
        return None
    if not _means(row.spec, spec):
        raise ConflictError(f"Idempotency-Key {key!r} was used with another spec, for sweep {row.id}")
    return str(row.id)


def _means(document: dict[str, Any], spec: SweepSpec) -> bool:
    """Tell whether a stored document, which an older version may have written, says what a spec says."""
    try:
        return SweepSpec.model_validate(document) == spec
    except ValidationError:
        return False


def _insert_sweep(
    connection: Connection,
    sweep_id: str,
    team_id: int,
    spec: SweepSpec,
    plan: Plan,
    idempotency_key: str | None,
    now: float,
) -> None:
    connection.execute(
        insert(sweeps).values(
            id=sweep_id,
            team_id=team_id,
            name=spec.name,
            wanted=Wanted.RUN,
            state=SweepState.QUEUED,
            priority=spec.priority,
            device_kind=spec.device.kind,
            device_model=spec.device.model,
            pack_seconds=plan.seconds / len(plan.packs),
            pack_share=plan.share,
            packs_queued=len(plan.packs),
            packs_running=0,
            ready_at=now,
            device_seconds=0.0,
            run_steps_trained=0,
            runs_reused=0,
            spec=spec.model_dump(mode="json"),
            idempotency_key=idempotency_key,
            runs_total=plan.runs_total,
            run_steps_total=plan.runs_total * spec.training.steps,
            created_at=now,
        )
    )


def _insert_grids(connection: Connection, sweep_id: str, spec: SweepSpec) -> dict[int, int]:
    """Return the grids' ids by position."""
    rows = [
        {"sweep_id": sweep_id, "position": position, "baseline": grid.baseline}
        for position, grid in enumerate(spec.grids)
    ]
    insert_many(connection, grids, rows)
    return columns(connection, select(grids.c.position, grids.c.id).where(grids.c.sweep_id == sweep_id))


def _insert_packs(
    connection: Connection, sweep_id: str, spec: SweepSpec, plan: Plan, now: float
) -> dict[int, int]:
    """Return the packs' ids by position."""
    rows = [
        {
            "sweep_id": sweep_id,
            "position": position,
            "state": PackState.QUEUED,
            "attempt": 0,
            "max_attempts": MAX_ATTEMPTS,
            "not_before": now,
            "preempted": False,
            "runs_total": len(pack),
            "seconds": plan.pack_seconds[position],
            "steps": spec.training.steps,
            "step": 0,
            "runs_diverged": 0,
        }
        for position, pack in enumerate(plan.packs)
    ]
    insert_many(connection, packs, rows)
    return columns(connection, select(packs.c.position, packs.c.id).where(packs.c.sweep_id == sweep_id))


def _insert_runs(
    connection: Connection,
    sweep_id: str,
    spec: SweepSpec,
    plan: Plan,
    grid_ids: Mapping[int, int],
    pack_ids: Mapping[int, int],
) -> None:
    key_of = keys_of(spec)
    rows = [
        {
            "sweep_id": sweep_id,
            "grid_id": grid_ids[run.grid],
            "pack_id": pack_ids[position],
            "pack_index": index,
            "method": run.method,
            "learning_rate": run.learning_rate,
            "vxx_reg": run.vxx_reg,
            "seed": run.seed,
            "config_key": key_of(run),
        }
        for position, pack in enumerate(plan.packs)
        for index, run in enumerate(pack)
    ]
    insert_many(connection, runs, rows)


def an_id(text: str) -> str:
    """Keep out what cannot be an id: PostgreSQL takes no NUL, and no index is needed to say so."""
    if len(text) != ID_LENGTH or not set(text) <= set(ALPHABET):
        raise NotFoundError(f"no sweep {text!r}")
    return text


def check_exists(connection: Connection, sweep_id: str) -> None:
    """Make sure that there is such a sweep.

    Raises:
        NotFoundError: if there is not.
    """
    if connection.execute(select(sweeps.c.id).where(sweeps.c.id == an_id(sweep_id))).first() is None:
        raise NotFoundError(f"no sweep {sweep_id!r}")


def spec_of(connection: Connection, sweep_id: str) -> SweepSpec:
    """Return a sweep's spec.

    Raises:
        NotFoundError: if there is no such sweep.
    """
    row = connection.execute(select(sweeps.c.spec).where(sweeps.c.id == an_id(sweep_id))).first()
    if row is None:
        raise NotFoundError(f"no sweep {sweep_id!r}")
    return SweepSpec.model_validate(row.spec)


def get(connection: Connection, sweep_id: str) -> SweepRow:
    """Return one sweep.

    Raises:
        NotFoundError: if there is no such sweep.
    """
    row = connection.execute(_with_counts().where(sweeps.c.id == an_id(sweep_id))).first()
    if row is None:
        raise NotFoundError(f"no sweep {sweep_id!r}")
    return _sweep_row(row)


def newest(connection: Connection, limit: int, before: tuple[float, str] | None) -> list[SweepRow]:
    """List sweeps, newest first, from just after the place that `before` names (created_at, id)."""
    query = _with_counts().order_by(sweeps.c.created_at.desc(), sweeps.c.id.desc()).limit(limit)
    if before is not None:
        created_at, sweep_id = before
        earlier = and_(sweeps.c.created_at == created_at, sweeps.c.id < sweep_id)
        query = query.where(or_(sweeps.c.created_at < created_at, earlier))
    return [_sweep_row(row) for row in connection.execute(query)]


def _with_counts() -> Select[Any]:
    def of_packs(what: Any, *conditions: Any) -> Any:
        return select(what).where(packs.c.sweep_id == sweeps.c.id, *conditions).scalar_subquery()

    def pack_count(value: Any, *conditions: Any) -> Any:
        return func.coalesce(of_packs(func.sum(value), *conditions), 0)

    first_error = (
        select(packs.c.error)
        .where(packs.c.sweep_id == sweeps.c.id, packs.c.state == PackState.FAILED)
        .order_by(packs.c.id)
        .limit(1)
        .scalar_subquery()
    )
    return select(
        sweeps,
        select(teams.c.name).where(teams.c.id == sweeps.c.team_id).scalar_subquery().label("team"),
        pack_count(packs.c.runs_total, packs.c.state == PackState.COMPLETED).label("runs_done"),
        pack_count(packs.c.runs_diverged).label("runs_diverged"),
        pack_count(packs.c.runs_total * packs.c.step).label("run_steps_done"),
        of_packs(func.count(), packs.c.state == PackState.FAILED).label("failed_packs"),
        first_error.label("error"),
        clock().label("now"),
    )


def _sweep_row(row: Row[Any]) -> SweepRow:
    return SweepRow(**{name: row._mapping[name] for name in SweepRow.__slots__})
