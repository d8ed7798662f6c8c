"""SQL of the cluster view."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, and_, func, select

from service.db.engine import clock
from service.db.tables import attempts, is_running, packs, sweeps, teams


@dataclass(frozen=True, slots=True)
class RunningPack:
    """A pack in training, or waiting in an executor.

    Attributes:
        position: in its sweep.
        pool: `Pool.key`.
        node: its machine; None while it waits for one.
        seconds: since it had its device.
    """

    sweep_id: str
    sweep_name: str
    team: str
    position: int
    attempt: int
    owner: str
    cluster: str
    pool: str
    share: float
    node: str | None
    device: str | None
    runs: int
    step: int
    steps: int
    seconds: float


def running_packs(connection: Connection, limit: int) -> list[RunningPack]:
    """List the running packs, the longest first."""
    seconds = func.coalesce(clock() - attempts.c.started_at, 0.0)
    rows = connection.execute(
        select(
            sweeps.c.id,
            sweeps.c.name,
            teams.c.name,
            packs.c.position,
            packs.c.attempt,
            attempts.c.owner,
            attempts.c.cluster,
            attempts.c.pool,
            attempts.c.share,
            attempts.c.node,
            attempts.c.device,
            packs.c.runs_total,
            packs.c.step,
            packs.c.steps,
            seconds,
        )
        .join(attempts, and_(attempts.c.pack_id == packs.c.id, attempts.c.attempt == packs.c.attempt))
        .join(sweeps, sweeps.c.id == packs.c.sweep_id)
        .join(teams, teams.c.id == sweeps.c.team_id)
        .where(is_running)
        .order_by(attempts.c.claimed_at, packs.c.id)
        .limit(limit)
    )
    return [RunningPack(*tuple(row)) for row in rows]
