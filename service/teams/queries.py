"""SQL of teams. Callers commit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from service.db.engine import clock
from service.db.tables import has_queued, is_alive, packs, sweeps, teams
from service.dispatch.states import PackState
from service.errors import ConflictError, NotFoundError


@dataclass(frozen=True, slots=True)
class TeamRow:
    """A team with what it has waiting and running.

    Attributes:
        weight: of its share of the devices, against the other teams'.
        max_devices: that it may hold at once; None for no limit.
        max_queued_runs: that may wait at once; None for no limit.
        devices: that it holds now.
        packs_queued: that wait, those of paused sweeps included.
        device_seconds: of all its attempts that have ended.
        run_steps: that these trained.
    """

    id: int
    name: str
    weight: float
    max_devices: float | None
    max_queued_runs: int | None
    devices: float
    packs_queued: int
    device_seconds: float
    run_steps: int


def every(connection: Connection) -> list[TeamRow]:
    """List the teams by name."""
    return [TeamRow(*row) for row in connection.execute(_with_counts().order_by(teams.c.name))]


def get(connection: Connection, name: str) -> TeamRow:
    """Return a team.

    Raises:
        NotFoundError: if there is none of that name.
    """
    row = connection.execute(_with_counts().where(teams.c.name == name)).first()
    if row is None:
        raise NotFoundError(f"no team {name!r}")
    return TeamRow(*row)


def put(
    connection: Connection,
    name: str,
    weight: float,
    max_devices: float | None,
    max_queued_runs: int | None,
) -> TeamRow:
    """Make a team, or change one."""
    values: dict[str, Any] = {
        "weight": weight,
        "max_devices": max_devices,
        "max_queued_runs": max_queued_runs,
    }
    if connection.execute(update(teams).where(teams.c.name == name).values(values)).rowcount == 0:
        values |= {"name": name, "device_seconds": 0.0, "run_steps": 0}
        connection.execute(insert(teams).values(created_at=clock(), **values))
    return get(connection, name)


def check_queue(connection: Connection, team_id: int) -> None:
    """Refuse what was queued in this transaction if more runs wait now than the team may have.

    To be called last: the team stays locked until the commit, so that two do not both take the last room.

    Raises:
        ConflictError: if that is so.
    """
    most = connection.execute(select(teams.c.max_queued_runs).where(teams.c.id == team_id)).scalar_one()
    if most is None:
        return
    name = connection.execute(
        select(teams.c.name).where(teams.c.id == team_id).with_for_update()
    ).scalar_one()
    waiting = connection.execute(
        select(func.coalesce(func.sum(packs.c.runs_total), 0))
        .join(sweeps, sweeps.c.id == packs.c.sweep_id)
        .where(sweeps.c.team_id == team_id, has_queued, packs.c.state == PackState.QUEUED)
    ).scalar_one()
    if waiting > most:
        raise ConflictError(f"team {name} may have {most} runs waiting; with these there would be {waiting}")


def _with_counts() -> Any:
    def of_sweeps(value: Any) -> Any:
        return func.coalesce(
            select(func.sum(value)).where(sweeps.c.team_id == teams.c.id, is_alive).scalar_subquery(), 0
        )

    return select(
        teams.c.id,
        teams.c.name,
        teams.c.weight,
        teams.c.max_devices,
        teams.c.max_queued_runs,
        of_sweeps(sweeps.c.packs_running * sweeps.c.pack_share).label("devices"),
        of_sweeps(sweeps.c.packs_queued).label("packs_queued"),
        teams.c.device_seconds,
        teams.c.run_steps,
    )
