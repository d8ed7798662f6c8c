"""Shared steps of the service's tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from sqlalchemy import Connection, Engine, select, update

from ddpnopt import NUMERICS_VERSION
from ddpnopt.results import METRICS, Divergence, RunResult
from service.auth.roles import DEFAULT_TEAM
from service.db.engine import clock, read, write
from service.db.tables import has_queued, is_running, packs, sweeps
from service.dispatch import leases
from service.dispatch.leases import Lease
from service.sweeps import queries
from service.sweeps.documents import parse_spec
from service.sweeps.expand import plan
from workers.protocol import Environment

ENVIRONMENT = Environment("a CPU", {"numerics": str(NUMERICS_VERSION)}, "0" * 64)


def submit(engine: Engine, document: dict[str, Any], key: str | None = None, team: str = DEFAULT_TEAM) -> str:
    spec = parse_spec(document)
    with write(engine) as connection:
        return queries.create(connection, spec, plan(spec), key, team)[0]


def claim(connection: Connection, owner: str, limit: int) -> list[Lease]:
    """Claim packs of any sweep, the oldest first: without a policy."""
    waiting = select(sweeps.c.id).where(has_queued).order_by(sweeps.c.created_at, sweeps.c.id)
    found: list[Lease] = []
    for sweep_id in connection.scalars(waiting).all():
        if len(found) < limit:
            found += leases.claim(connection, owner, "cluster", sweep_id, limit - len(found))
    return found


def result(index: int, value: float = 1.0, diverged: bool = False) -> RunResult:
    points = np.array([0, 2, 4], dtype=np.int64)
    return RunResult(
        index,
        4,
        {} if diverged else dict.fromkeys(METRICS, value + index),
        points,
        points,
        {name: np.array([3.0, np.nan, value], dtype=np.float32) for name in METRICS},
        "" if diverged else "d" * 64,
        Divergence(3, "batch_loss", "nan", 2.5) if diverged else None,
    )


def outcome(count: int, value: float = 1.0, diverged: frozenset[int] = frozenset()) -> tuple[RunResult, ...]:
    return tuple(result(index, value, index in diverged) for index in range(count))


def pack_rows(engine: Engine) -> list[Any]:
    with read(engine) as connection:
        return list(connection.execute(select(packs).order_by(packs.c.id)))


def make_ready(engine: Engine) -> None:
    """Let packs that wait for another attempt have it now."""
    with write(engine) as connection:
        connection.execute(update(packs).values(not_before=clock() - 1))
        for sweep_id in connection.scalars(select(sweeps.c.id)).all():
            leases.settle(connection, sweep_id)


def expire(engine: Engine) -> None:
    """Let all leases run out."""
    with write(engine) as connection:
        connection.execute(update(packs).where(is_running).values(lease_until=clock() - 1))
