"""SQL of packs as their owners see them: states, attempts, logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Row, select

from service.db.tables import attempts, packs
from service.dispatch.states import PackState
from service.errors import NotFoundError
from service.sweeps import queries

MOST_ATTEMPTS: Final = 20
"""Of a pack in a list: one that is stopped often may have had hundreds."""


@dataclass(frozen=True, slots=True)
class PackRow:
    """A pack with its last attempts, in their order."""

    pack: Row[Any]
    attempts: tuple[Row[Any], ...]


def page(
    connection: Connection, sweep_id: str, after: int, limit: int, state: PackState | None
) -> list[PackRow]:
    """List packs by position, from after the position `after`.

    Raises:
        NotFoundError: if there is no such sweep.
    """
    queries.check_exists(connection, sweep_id)
    query = select(packs).where(packs.c.sweep_id == sweep_id, packs.c.position > after)
    if state is not None:
        query = query.where(packs.c.state == state)
    rows = connection.execute(query.order_by(packs.c.position).limit(limit)).all()
    tried: dict[int, list[Row[Any]]] = {row.id: [] for row in rows}
    columns = [column for column in attempts.c if column.name != "log"]
    for row in connection.execute(
        select(*columns)
        .join(packs, packs.c.id == attempts.c.pack_id)
        .where(attempts.c.pack_id.in_(tried), attempts.c.attempt > packs.c.attempt - MOST_ATTEMPTS)
        .order_by(attempts.c.attempt)
    ):
        tried[row.pack_id].append(row)
    return [PackRow(row, tuple(tried[row.id])) for row in rows]


def log_of(connection: Connection, sweep_id: str, position: int, attempt: int | None) -> tuple[int, str]:
    """Return the number of an attempt at a pack, the last one if none is named, and what it wrote.

    Raises:
        NotFoundError: if there is no such sweep, pack or attempt.
    """
    queries.check_exists(connection, sweep_id)
    query = (
        select(attempts.c.attempt, attempts.c.log)
        .join(packs, packs.c.id == attempts.c.pack_id)
        .where(packs.c.sweep_id == sweep_id, packs.c.position == position)
        .order_by(attempts.c.attempt.desc())
        .limit(1)
    )
    if attempt is not None:
        query = query.where(attempts.c.attempt == attempt)
    row = connection.execute(query).first()
    if row is None:
        which = "no attempt" if attempt is None else f"no attempt {attempt}"
        raise NotFoundError(f"sweep {sweep_id}: {which} at pack {position}")
    return int(row.attempt), str(row.log)
