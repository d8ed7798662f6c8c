"""REST of the cluster view."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from fastapi import APIRouter
from pydantic import BaseModel
from sqlalchemy import Connection

from service.cluster import queries
from service.dispatch import presence
from service.http import Reading, problems
from service.teams import queries as team_queries
from service.teams.endpoints import Team
from workers.protocol import Node, Pool

router = APIRouter(prefix="/api/v1/cluster", tags=["cluster"], responses=problems(503))

MOST_PACKS: Final = 1000


class NodeOut(BaseModel):
    """A machine, with the devices that it offers to packs.

    Attributes:
        team: the only one that may use it; null for all.
    """

    id: str
    name: str
    cluster: str
    kind: str
    model: str
    team: str | None
    devices: float

    @classmethod
    def of(cls, cluster: str, node: Node) -> NodeOut:
        """Build it from what a dispatcher of a cluster sees."""
        pool = node.pool
        return cls(
            id=node.id,
            name=node.name,
            cluster=cluster,
            kind=pool.kind,
            model=pool.model,
            team=pool.team,
            devices=node.devices,
        )


class DispatcherOut(BaseModel):
    """A dispatcher that lives; those of one cluster see the same nodes."""

    owner: str
    cluster: str
    version: str
    started_at: datetime
    seen_at: datetime


class RunningPackOut(BaseModel):
    """A pack on a device.

    Attributes:
        pack: its position in the sweep.
        seconds: that it has had its device.
    """

    sweep_id: str
    sweep_name: str
    team: str
    pack: int
    attempt: int
    cluster: str
    kind: str
    model: str
    share: float
    node: str | None
    device: str | None
    runs: int
    step: int
    steps: int
    seconds: float


class Cluster(BaseModel):
    """What there is, what runs on it and for whom, and what waits."""

    dispatchers: list[DispatcherOut]
    nodes: list[NodeOut]
    packs: list[RunningPackOut]
    teams: list[Team]


def cluster_view(connection: Connection) -> Cluster:
    """Return the cluster as it is now."""
    present = presence.present(connection)
    nodes = {(seen.cluster, node.id): node for seen in present for node in seen.nodes}
    return Cluster(
        dispatchers=[
            DispatcherOut(
                owner=seen.owner,
                cluster=seen.cluster,
                version=seen.version,
                started_at=datetime.fromtimestamp(seen.started_at, UTC),
                seen_at=datetime.fromtimestamp(seen.seen_at, UTC),
            )
            for seen in present
        ],
        nodes=[NodeOut.of(cluster, node) for (cluster, _), node in nodes.items()],
        packs=[
            RunningPackOut(
                pack=row.position,
                kind=Pool.of_key(row.pool).kind,
                model=Pool.of_key(row.pool).model,
                **{name: getattr(row, name) for name in RunningPackOut.model_fields if hasattr(row, name)},
            )
            for row in queries.running_packs(connection, MOST_PACKS)
        ],
        teams=[Team.of(row) for row in team_queries.every(connection)],
    )


@router.get("")
def get_cluster(connection: Reading) -> Cluster:
    """Return nodes, running packs, teams with their queues and what they used."""
    return cluster_view(connection)
