"""Equal runs are trained once: results of a team's other sweeps, found by what decides every bit of them.

Two runs are equal if their configurations are (`runs.config_key`) and so is what else decides the bits: data,
device kind, versions of the numerics (`packs.environment_key`). Whether the latter holds, only the worker
can tell: it has the data. So a claim looks for candidates, the worker says which of them it would reproduce,
and these are copied when the pack is closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Select, func, select

from service.db.engine import columns, insert_many
from service.db.tables import curves, packs, results, runs, sweeps


class ResultsGoneError(Exception):
    """Results that were there when a pack was claimed are not there any more."""


def candidates(connection: Connection, pack_id: int) -> tuple[tuple[str, ...], ...]:
    """Return, for each run of a pack by place, the environments in which equal runs have results.

    Returns:
        Keys of environments, in order; empty if no run has any.
    """
    found: dict[int, list[str]] = {}
    environments = _equals(runs.c.id, SOURCE_PACKS.c.environment_key).where(runs.c.pack_id == pack_id)
    for run_id, key in connection.execute(environments.distinct()):
        found.setdefault(run_id, []).append(key)
    if not found:
        return ()
    places = connection.scalars(
        select(runs.c.id).where(runs.c.pack_id == pack_id).order_by(runs.c.pack_index)
    )
    return tuple(tuple(sorted(found.get(run_id, ()))) for run_id in places)


def copy(
    connection: Connection, targets: Sequence[int], environment_key: str, attempt: int, now: float
) -> int:
    """Give runs the results of equal ones; return how many of these diverged.

    Raises:
        ResultsGoneError: if one of them has none any more.
    """
    latest = _equals(runs.c.id, func.max(SOURCES.c.id)).where(
        runs.c.id.in_(targets), SOURCE_PACKS.c.environment_key == environment_key
    )
    found: dict[int, int] = columns(connection, latest.group_by(runs.c.id))
    if missing := set(targets) - found.keys():
        raise ResultsGoneError(f"{len(missing)} equal results are gone")
    rows = connection.execute(select(results).where(results.c.run_id.in_(set(found.values())))).mappings()
    source = {row["run_id"]: dict(row) for row in rows}
    insert_many(
        connection, results, [_copied(source[found[run_id]], run_id, attempt, now) for run_id in targets]
    )
    points: dict[int, list[dict[str, Any]]] = {}
    for row in connection.execute(select(curves).where(curves.c.run_id.in_(source))).mappings():
        points.setdefault(row["run_id"], []).append(dict(row))
    insert_many(
        connection,
        curves,
        [row | {"run_id": run_id} for run_id in targets for row in points.get(found[run_id], ())],
    )
    return sum(source[found[run_id]]["state"] == "diverged" for run_id in targets)


def _copied(row: dict[str, Any], run_id: int, attempt: int, now: float) -> dict[str, Any]:
    origin = row["reused_from"] or row["run_id"]
    return row | {"run_id": run_id, "attempt": attempt, "recorded_at": now, "reused_from": origin}


SOURCES = runs.alias("source")
SOURCE_PACKS = packs.alias("source_pack")
SOURCE_SWEEPS = sweeps.alias("source_sweep")


def _equals(*what: Any) -> Select[Any, Any]:
    """Select something of runs and the equal runs of their teams that have results."""
    return (
        select(*what)
        .select_from(runs)
        .join(sweeps, sweeps.c.id == runs.c.sweep_id)
        .join(SOURCES, SOURCES.c.config_key == runs.c.config_key)
        .join(results, results.c.run_id == SOURCES.c.id)
        .join(SOURCE_PACKS, SOURCE_PACKS.c.id == SOURCES.c.pack_id)
        .join(SOURCE_SWEEPS, SOURCE_SWEEPS.c.id == SOURCES.c.sweep_id)
        .where(SOURCE_PACKS.c.environment_key.is_not(None), SOURCE_SWEEPS.c.team_id == sweeps.c.team_id)
    )
