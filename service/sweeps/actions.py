"""What the owners of a sweep may do with it: cancel, pause, resume, retry. Callers commit.

An action writes down what is wanted and what follows from it at once: queued packs of a cancelled sweep are
cancelled. The running ones are stopped by the dispatcher that holds them, within seconds.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, select, update

from service.db.engine import clock
from service.db.tables import packs, scheduler, sweeps
from service.dispatch import leases
from service.dispatch.policy import MAX_ATTEMPTS
from service.dispatch.states import Action, PackState, SweepState, Wanted, wanted_after
from service.errors import ConflictError, NotFoundError
from service.sweeps import queries
from service.teams import queries as team_queries

RETRIED = {PackState.FAILED, PackState.CANCELLED}


def act(connection: Connection, sweep_id: str, action: Action) -> None:
    """Do something with a sweep. Done twice it is the same as done once.

    Raises:
        NotFoundError: if there is no such sweep.
        ConflictError: if the action is not possible in the sweep's state, or more runs would wait than the
            team may have.
    """
    # Claims wait meanwhile: they lock packs before sweeps, and this does not.
    connection.execute(select(scheduler.c.id).with_for_update())
    row = connection.execute(
        select(sweeps.c.state, sweeps.c.wanted, sweeps.c.team_id)
        .where(sweeps.c.id == queries.an_id(sweep_id))
        .with_for_update()
    ).first()
    if row is None:
        raise NotFoundError(f"no sweep {sweep_id!r}")
    wanted = wanted_after(action, SweepState(row.state))
    if wanted is None:
        raise ConflictError(f"sweep {sweep_id} is {row.state}: it cannot {action}")
    values: dict[str, Any] = {"wanted": wanted}
    if row.wanted != Wanted.RUN and wanted == Wanted.RUN:
        values["served_at"] = clock()  # it was away, and nobody kept it waiting
    connection.execute(update(sweeps).where(sweeps.c.id == sweep_id).values(values))
    if action == Action.RETRY:
        _queue_again(connection, sweep_id)
    leases.settle(connection, sweep_id)
    if action == Action.RETRY:
        team_queries.check_queue(connection, row.team_id)


def _queue_again(connection: Connection, sweep_id: str) -> None:
    connection.execute(
        update(packs)
        .where(packs.c.sweep_id == sweep_id, packs.c.state.in_(RETRIED))
        .values(
            state=PackState.QUEUED,
            max_attempts=packs.c.attempt + MAX_ATTEMPTS,
            not_before=clock(),
            finished_at=None,
            error=None,
            error_detail=None,
        )
    )
