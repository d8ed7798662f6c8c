"""What the policy sees of the database, and what it decided, written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, case, exists, func, insert, or_, select, update

from service.db.engine import clock, columns
from service.db.tables import (
    attempts,
    has_queued,
    is_running,
    packs,
    scheduler,
    shares,
    sweeps,
    teams,
)
from service.dispatch import presence
from service.dispatch.fairness import Decision, Running, Snapshot, Team, Waiting
from service.dispatch.states import Wanted
from workers.protocol import Node, Pool


def has_work(connection: Connection, *, claimable: bool) -> bool:
    """Tell whether a pack waits to be claimed (if one could be) or has outlived its lease."""
    expired = exists().where(is_running, packs.c.lease_until < clock())
    condition: ColumnElement[bool] = expired
    if claimable:
        condition = or_(expired, exists().where(_is_waiting()))
    return bool(connection.execute(select(condition)).scalar_one())


def lock(connection: Connection) -> dict[Pool, float]:
    """Take the turn to claim, until the commit; return the pools' virtual times."""
    times = connection.execute(select(scheduler.c.virtual_times).with_for_update()).scalar_one()
    return {Pool.of_key(key): float(time) for key, time in times.items()}


def snapshot(
    connection: Connection,
    cluster: str,
    nodes: Sequence[Node],
    *,
    virtual_times: Mapping[Pool, float],
    backlog: int = 0,
    stoppable: bool = True,
) -> Snapshot:
    """Return what there is to decide about for a dispatcher of a cluster.

    Args:
        connection: that holds the lock.
        cluster: whose devices can be given out.
        nodes: of that cluster.
        virtual_times: of the pools.
        backlog: packs that may be claimed beyond the free devices.
        stoppable: whether workers keep the state of what they train.
    """
    own = _devices(nodes)
    running = _running(connection, cluster if stoppable else None)
    free = dict(own)
    for pack, of_cluster in running:
        if of_cluster == cluster and pack.pool in free:
            free[pack.pool] -= pack.share
    everywhere = dict(own)
    for other in _other_clusters(connection, cluster):
        for pool, devices in other.items():
            everywhere[pool] = everywhere.get(pool, 0.0) + devices
    wanted = int(sum(max(0.0, devices) for devices in free.values())) + backlog + 1
    return Snapshot(
        teams=_teams(connection),
        waiting=_waiting(connection, wanted),
        running=tuple(pack for pack, _ in running),
        devices=everywhere,
        free={pool: max(0.0, devices) for pool, devices in free.items()},
        virtual_times=virtual_times,
        backlog=backlog,
    )


def preempt(connection: Connection, decision: Decision) -> None:
    """Ask the packs that a decision names to stop."""
    if decision.preempt:
        connection.execute(
            update(packs).where(packs.c.id.in_(decision.preempt), is_running).values(preempted=True)
        )


def charge(connection: Connection, seen: Snapshot, decision: Decision) -> None:
    """Write the virtual times that a decision leads to.

    Those of the teams by difference: attempts that end meanwhile correct them, too.

    Args:
        connection: that holds the lock.
        seen: what was decided about.
        decision: on it.
    """
    times = dict(seen.virtual_times) | dict(decision.virtual_times)
    if times != dict(seen.virtual_times):
        connection.execute(
            update(scheduler).values(virtual_times={pool.key(): time for pool, time in times.items()})
        )
    if decision.team_times:
        before = {(team.name, pool): time for team in seen.teams for pool, time in team.virtual_times.items()}
        _charge_teams(connection, before, decision.team_times)


def _charge_teams(
    connection: Connection,
    before: Mapping[tuple[str, Pool], float],
    after: Mapping[tuple[str, Pool], float],
) -> None:
    ids = columns(connection, select(teams.c.name, teams.c.id))
    for (name, pool), time in sorted(after.items(), key=lambda item: (ids[item[0][0]], item[0][1].key())):
        row = {"team_id": ids[name], "pool": pool.key()}
        if (name, pool) not in before:  # only who has the lock makes one
            connection.execute(insert(shares).values(virtual_time=time, **row))
            continue
        connection.execute(
            update(shares)
            .where(*(shares.c[key] == value for key, value in row.items()))
            .values(virtual_time=shares.c.virtual_time + (time - before[name, pool]))
        )


def _is_waiting() -> ColumnElement[bool]:
    return and_(has_queued, sweeps.c.wanted == Wanted.RUN, sweeps.c.ready_at <= clock())


def _devices(nodes: Sequence[Node]) -> dict[Pool, float]:
    found: dict[Pool, float] = {}
    for node in nodes:
        if node.devices > 0:
            found[node.pool] = found.get(node.pool, 0.0) + node.devices
    return found


def _other_clusters(connection: Connection, cluster: str) -> Sequence[Mapping[Pool, float]]:
    # Two dispatchers of one cluster see the same nodes.
    nodes = {seen.cluster: seen.nodes for seen in presence.present(connection) if seen.cluster != cluster}
    return [_devices(own) for own in nodes.values()]


def _teams(connection: Connection) -> tuple[Team, ...]:
    times: dict[int, dict[Pool, float]] = {}
    for team_id, pool, time in connection.execute(select(shares)):
        times.setdefault(team_id, {})[Pool.of_key(pool)] = time
    rows = connection.execute(select(teams.c.id, teams.c.name, teams.c.weight, teams.c.max_devices))
    return tuple(Team(row.name, row.weight, row.max_devices, times.get(row.id, {})) for row in rows)


def _waiting(connection: Connection, most: int) -> tuple[Waiting, ...]:
    """Return the first sweeps of each team, by the policy's own order: no more than could be served."""
    place = func.row_number().over(
        # By what decides where a sweep fits: those that wait for a full pool must not hide the others.
        partition_by=(
            sweeps.c.team_id,
            sweeps.c.device_kind,
            sweeps.c.device_model,
            sweeps.c.pack_share,
        ),
        order_by=(sweeps.c.priority.desc(), sweeps.c.packs_running, sweeps.c.created_at, sweeps.c.id),
    )
    placed = (
        select(
            sweeps.c.id,
            sweeps.c.team_id,
            sweeps.c.priority,
            sweeps.c.created_at,
            (sweeps.c.packs_running * sweeps.c.pack_share).label("running"),
            sweeps.c.packs_queued,
            sweeps.c.pack_seconds,
            sweeps.c.pack_share,
            sweeps.c.device_kind,
            sweeps.c.device_model,
            (clock() - _since()).label("waited"),
            place.label("place"),
        )
        .where(_is_waiting())
        .subquery()
    )
    rows = connection.execute(
        select(
            placed.c.id,
            teams.c.name,
            *(column for column in placed.c if column.name not in ("id", "team_id", "place")),
        )
        .join(teams, teams.c.id == placed.c.team_id)
        .where(placed.c.place <= most)
    )
    return tuple(Waiting(*row) for row in rows)


def _since() -> ColumnElement[float]:
    """Return since when a sweep has waited for a device."""
    served = func.coalesce(sweeps.c.served_at, sweeps.c.created_at)
    return case((sweeps.c.ready_at > served, sweeps.c.ready_at), else_=served)


def _running(connection: Connection, stoppable: str | None) -> list[tuple[Running, str]]:
    """Return the running packs with their clusters.

    Args:
        connection: of the snapshot.
        stoppable: the cluster whose packs can be stopped: another one's device would be of no use here.
    """
    rows = connection.execute(
        select(
            packs.c.id,
            packs.c.step,
            packs.c.steps,
            packs.c.seconds,
            packs.c.preempted,
            sweeps.c.id.label("sweep_id"),
            sweeps.c.priority,
            sweeps.c.wanted,
            teams.c.name,
            attempts.c.share,
            attempts.c.pool,
            attempts.c.charged,
            attempts.c.cluster,
            attempts.c.first_step,
            (clock() - func.coalesce(attempts.c.started_at, clock())).label("elapsed"),
        )
        .join(attempts, and_(attempts.c.pack_id == packs.c.id, attempts.c.attempt == packs.c.attempt))
        .join(sweeps, sweeps.c.id == packs.c.sweep_id)
        .join(teams, teams.c.id == sweeps.c.team_id)
        .where(is_running)
    )
    return [
        (
            Running(
                pack_id=row.id,
                sweep_id=row.sweep_id,
                team=row.name,
                priority=row.priority,
                share=row.share,
                pool=Pool.of_key(row.pool),
                elapsed=row.elapsed,
                charged=row.charged,
                remaining=_remaining(row),
                stoppable=row.cluster == stoppable,
                stopping=bool(row.preempted or row.wanted != Wanted.RUN),
            ),
            row.cluster,
        )
        for row in rows
    ]


def _remaining(row: Any) -> float | None:
    """Return the seconds that a pack has left, by its own pace where it has one, else by the estimate.

    None if it has no pace and takes longer than estimated.
    """
    done = row.step - (row.first_step or 0)
    if done > 0:
        return float(row.elapsed * (row.steps - row.step) / done)
    return float(row.seconds - row.elapsed) if row.seconds > row.elapsed else None
