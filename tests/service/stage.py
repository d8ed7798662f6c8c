"""Databases as a busy cluster leaves them, without one: for tests of what people see."""

from __future__ import annotations

import copy
from typing import Any

from sqlalchemy import Engine

from service.auth.roles import DEFAULT_TEAM
from service.db.engine import write
from service.dispatch import leases, presence
from service.dispatch.leases import Lease
from service.sweeps import queries
from service.sweeps.documents import parse_spec
from service.sweeps.expand import Plan, expand
from service.teams import queries as teams
from tests.conftest import SMALL_SPEC
from tests.service.helpers import ENVIRONMENT, claim, outcome
from workers.protocol import Node, Pool

CAUSE = "MemoryError: 14 GB wanted, 8 GB are there"
DETAIL = 'Traceback (most recent call last):\n  File "workers/runner.py", line 101, in train\nMemoryError'
LOG = "".join(f"line {n}\n" for n in range(30)) + "\x1b[31mout of memory\x1b[0m <b>\n"
NODES = (
    Node("n0", "10.0.0.1", Pool(), 0),
    Node("n1", "10.0.0.2", Pool(), 4),
    Node("n2", "10.0.0.3", Pool("gpu", "H100", "vision"), 2),
)


def submit(engine: Engine, name: str, *baselines: str, team: str = DEFAULT_TEAM) -> str:
    """Submit a sweep of a grid for each baseline, with 18 runs in a pack of their own."""
    document = copy.deepcopy(SMALL_SPEC)
    grid = document["grids"][0]
    document["grids"] = [grid | {"baseline": baseline} for baseline in baselines]
    spec = parse_spec(document | {"name": name})
    packs: list[list[Any]] = [[] for _ in baselines]
    for bundle in expand(spec):
        packs[bundle[0].grid] += bundle
    plan = Plan(tuple(map(tuple, packs)), (10.0,) * len(packs), 4)
    with write(engine) as connection:
        return queries.create(connection, spec, plan, team=team)[0]


def running(engine: Engine, count: int, owner: str = "host:1", node: str = "10.0.0.2") -> list[Lease]:
    """Let some packs be claimed and begin."""
    with write(engine) as connection:
        found = claim(connection, owner, count)
        for lease in found:
            leases.start(connection, lease, node, "Xeon 8481C")
            leases.progress(connection, lease, 0)
            leases.progress(connection, lease, 2, "2 of 4 steps\n")
    assert len(found) == count
    return found


def finish(engine: Engine, lease: Lease, value: float = 1.0) -> None:
    """Let an attempt end well."""
    with write(engine) as connection:
        count = len(leases.runs_of(connection, lease))
        assert leases.finish(connection, lease, outcome(count, value), ENVIRONMENT)


def give_up(engine: Engine, lease: Lease, log: str = LOG) -> None:
    """Let a pack fail for good."""
    with write(engine) as connection:
        assert leases.give_up(connection, lease, CAUSE, DETAIL, log)


def stop(engine: Engine, lease: Lease) -> None:
    """Let an attempt stop as it was asked to."""
    with write(engine) as connection:
        assert leases.stopped(connection, lease)


def announce(engine: Engine) -> None:
    """Let a dispatcher say what there is."""
    with write(engine) as connection:
        presence.announce(connection, "host:1", "ray-7f3c", NODES)


def failed_sweep(engine: Engine, name: str = "failing") -> str:
    """Make a sweep of two packs, of which the second has failed."""
    sweep_id = submit(engine, name, "sgd", "adam")
    first, second = running(engine, 2)
    finish(engine, first)
    give_up(engine, second)
    return sweep_id


def busy_cluster(engine: Engine) -> str:
    """Make two teams, machines, and a sweep of one of them with a running and a queued pack."""
    announce(engine)
    with write(engine) as connection:
        teams.put(connection, "vision", 2.0, 8.0, 100_000)
    sweep_id = submit(engine, "busy", "sgd", "ekfac", team="vision")
    running(engine, 1)
    return sweep_id
