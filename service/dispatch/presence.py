"""Who dispatches, and on what machines: written by each dispatcher, read by the others and by the API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, delete, insert, select, update

from service import __version__
from service.db.engine import clock
from service.db.tables import dispatchers
from workers.protocol import Node, Pool

ALIVE_S: Final = 60.0
"""A dispatcher that was not seen for so long counts no more."""


@dataclass(frozen=True, slots=True)
class Presence:
    """A dispatcher that lives.

    Attributes:
        cluster: those of one cluster see the same nodes.
        seen_at: when it last said so.
    """

    owner: str
    cluster: str
    version: str
    started_at: float
    seen_at: float
    nodes: tuple[Node, ...]


def announce(connection: Connection, owner: str, cluster: str, nodes: Sequence[Node]) -> None:
    """Say that a dispatcher lives, and forget those that do not."""
    values = {"cluster": cluster, "seen_at": clock(), "nodes": [_document(node) for node in nodes]}
    known = connection.execute(update(dispatchers).where(dispatchers.c.owner == owner).values(values))
    if known.rowcount == 0:
        connection.execute(
            insert(dispatchers).values(owner=owner, version=__version__, started_at=clock(), **values)
        )
        connection.execute(delete(dispatchers).where(dispatchers.c.seen_at < clock() - ALIVE_S))


def leave(connection: Connection, owner: str) -> None:
    """Say that a dispatcher is gone."""
    connection.execute(delete(dispatchers).where(dispatchers.c.owner == owner))


def present(connection: Connection) -> list[Presence]:
    """List the dispatchers that live."""
    rows = connection.execute(
        select(dispatchers)
        .where(dispatchers.c.seen_at > clock() - ALIVE_S)
        .order_by(dispatchers.c.started_at)
    )
    return [
        Presence(r.owner, r.cluster, r.version, r.started_at, r.seen_at, tuple(map(_node, r.nodes)))
        for r in rows
    ]


def _document(node: Node) -> dict[str, Any]:
    pool = {"kind": node.pool.kind, "model": node.pool.model, "team": node.pool.team}
    return {"id": node.id, "name": node.name, "devices": node.devices, "pool": pool}


def _node(document: Mapping[str, Any]) -> Node:
    return Node(document["id"], document["name"], Pool(**document["pool"]), document["devices"])
