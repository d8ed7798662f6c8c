"""SQL of sweeps: storing a submission, listing, one sweep's state. Callers commit."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError
from sqlalchemy import Connection, Row, Select, and_, func, insert, or_, select
from sqlalchemy.exc import IntegrityError

from service.db.engine import clock, columns
from service.db.tables import grids, packs, runs, sweeps
from service.dispatch.policy import MAX_ATTEMPTS
from service.dispatch.states import PackState, SweepState
from service.errors import ConflictError, NotFoundError
from service.sweeps.expand import Plan
from service.sweeps.spec import SweepSpec

ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
ID_LENGTH: Final = 10


@dataclass(frozen=True, slots=True)
class SweepRow:
    """A sweep with the counts that people ask for.

    Attributes:
        runs_done: runs with a result.
        run_steps_done: updates done over all runs, those of running attempts included.
        failed_packs: packs that have failed for good.
        now: the database's clock at the query.
    """

    id: str
    name: str
    state: str
    spec: dict[str, Any]
    runs_total: int
    run_steps_total: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    runs_done: int
    runs_diverged: int
    run_steps_done: int
    failed_packs: int
    error: str | None
    now: float


def new_id() -> str:
    """Return a sweep id: 50 random bits, letters that are not mistaken for each other."""
    return "".join(secrets.choice(ALPHABET) for _ in range(ID_LENGTH))


def create(
    connection: Connection, spec: SweepSpec, plan: Plan, idempotency_key: str | None
) -> tuple[str, bool]:
    """Store a sweep with its grids, packs and runs.

    Returns:
        The sweep's id, and whether it is new: the same key with the same spec gives the first one again.

    Raises:
        ConflictError: if the key was used with another spec.
    """
    if idempotency_key is not None and (first := _by_key(connection, idempotency_key, spec)):
        return first, False
    sweep_id = new_id()
    now = connection.execute(select(clock())).scalar_one()
    steps = spec.training.steps
    try:
        with connection.begin_nested():
            connection.execute(
                insert(sweeps).values(
                    id=sweep_id,
                    name=spec.name,
                    state=SweepState.QUEUED,
                    spec=spec.model_dump(mode="json"),
                    idempotency_key=idempotency_key,
                    runs_total=plan.runs_total,
                    run_steps_total=plan.runs_total * steps,
                    created_at=now,
                )
            )
    except IntegrityError:
        # Another request with this key came first.
        if idempotency_key is not None and (first := _by_key(connection, idempotency_key, spec)):
            return first, False
        raise
    grid_ids = _insert_grids(connection, sweep_id, spec)
    pack_ids = _insert_packs(connection, sweep_id, plan, steps, now)
    connection.execute(
        insert(runs),
        [
            {
                "sweep_id": sweep_id,
                "grid_id": grid_ids[run.grid],
                "pack_id": pack_ids[position],
                "pack_index": index,
                "method": run.method,
                "learning_rate": run.learning_rate,
                "vxx_reg": run.vxx_reg,
                "seed": run.seed,
            }
            for position, pack in enumerate(plan.packs)
            for index, run in enumerate(pack)
        ],
    )
    return sweep_id, True


def _by_key(connection: Connection, key: str, spec: SweepSpec) -> str | None:
    row = connection.execute(
        select(sweeps.c.id, sweeps.c.spec).where(sweeps.c.idempotency_key == key)
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


def _insert_grids(connection: Connection, sweep_id: str, spec: SweepSpec) -> dict[int, int]:
    connection.execute(
        insert(grids),
        [
            {"sweep_id": sweep_id, "position": position, "baseline": grid.baseline}
            for position, grid in enumerate(spec.grids)
        ],
    )
    return columns(connection, select(grids.c.position, grids.c.id).where(grids.c.sweep_id == sweep_id))


def _insert_packs(
    connection: Connection, sweep_id: str, plan: Plan, steps: int, now: float
) -> dict[int, int]:
    connection.execute(
        insert(packs),
        [
            {
                "sweep_id": sweep_id,
                "position": position,
                "state": PackState.QUEUED,
                "attempt": 0,
                "max_attempts": MAX_ATTEMPTS,
                "not_before": now,
                "runs_total": len(pack),
                "steps": steps,
                "step": 0,
                "runs_diverged": 0,
            }
            for position, pack in enumerate(plan.packs)
        ],
    )
    return columns(connection, select(packs.c.position, packs.c.id).where(packs.c.sweep_id == sweep_id))


def has_work(connection: Connection, *, claimable: bool) -> bool:
    """Tell whether a pack waits to be claimed (if one could be) or has outlived its lease."""
    expired = and_(packs.c.state == PackState.RUNNING, packs.c.lease_until < clock())
    waiting = and_(packs.c.state == PackState.QUEUED, packs.c.not_before <= clock())
    condition = or_(expired, waiting) if claimable else expired
    return connection.execute(select(packs.c.id).where(condition).limit(1)).first() is not None


def _an_id(text: str) -> str:
    """Keep out what cannot be an id: PostgreSQL takes no NUL, and no index is needed to say so."""
    if len(text) != ID_LENGTH or not set(text) <= set(ALPHABET):
        raise NotFoundError(f"no sweep {text!r}")
    return text


def spec_of(connection: Connection, sweep_id: str) -> SweepSpec:
    """Return a sweep's spec.

    Raises:
        NotFoundError: if there is no such sweep.
    """
    row = connection.execute(select(sweeps.c.spec).where(sweeps.c.id == _an_id(sweep_id))).first()
    if row is None:
        raise NotFoundError(f"no sweep {sweep_id!r}")
    return SweepSpec.model_validate(row.spec)


def get(connection: Connection, sweep_id: str) -> SweepRow:
    """Return one sweep.

    Raises:
        NotFoundError: if there is no such sweep.
    """
    row = connection.execute(_with_counts().where(sweeps.c.id == _an_id(sweep_id))).first()
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
        pack_count(packs.c.runs_total, packs.c.state == PackState.COMPLETED).label("runs_done"),
        pack_count(packs.c.runs_diverged).label("runs_diverged"),
        pack_count(packs.c.runs_total * packs.c.step).label("run_steps_done"),
        of_packs(func.count(), packs.c.state == PackState.FAILED).label("failed_packs"),
        first_error.label("error"),
        clock().label("now"),
    )


def _sweep_row(row: Row[Any]) -> SweepRow:
    return SweepRow(**{name: row._mapping[name] for name in SweepRow.__slots__})
