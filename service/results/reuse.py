"""Equal runs are trained once: results of a team's other sweeps, found by what decides every bit of them.

Two runs are equal if their configurations are (`runs.config_key`) and so is what else decides the bits: data,
device kind, versions of the numerics (`packs.environment_key`). Whether the latter holds, only the worker
can tell: it has the data. So a claim looks for candidates, the worker says which of them it would reproduce,
and these are copied when the pack is closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Select, func, insert, select

from service.db.engine import columns
from service.db.tables import curves, packs, results, runs, sweeps


def candidates(connection: Connection, pack_id: int) -> tuple[str | None, ...]:
    """Return, for each run of a pack by place, the environment of the latest equal run with a result.

    Returns:
        Keys of environments, None without one; empty if no run has any.
    """
    latest: dict[int, int] = columns(connection, _equals(runs.c.pack_id == pack_id))
    if not latest:
        return ()
    environments = columns(
        connection,
        select(runs.c.id, packs.c.environment_key)
        .join(packs, packs.c.id == runs.c.pack_id)
        .where(runs.c.id.in_(set(latest.values()))),
    )
    places = connection.scalars(
        select(runs.c.id).where(runs.c.pack_id == pack_id).order_by(runs.c.pack_index)
    )
    return tuple(environments[latest[run_id]] if run_id in latest else None for run_id in places)


def copy(
    connection: Connection, targets: Sequence[int], environment_key: str, attempt: int, now: float
) -> int:
    """Give runs the results of equal ones; return how many of these diverged.

    Raises:
        LookupError: if one of them has none any more.
    """
    found: dict[int, int] = columns(
        connection, _equals(runs.c.id.in_(targets)).where(SOURCE_PACKS.c.environment_key == environment_key)
    )
    if missing := set(targets) - found.keys():
        raise LookupError(f"{len(missing)} equal results are gone")
    rows = connection.execute(select(results).where(results.c.run_id.in_(set(found.values())))).mappings()
    source = {row["run_id"]: dict(row) for row in rows}
    connection.execute(
        insert(results), [_copied(source[found[run_id]], run_id, attempt, now) for run_id in targets]
    )
    points: dict[int, list[dict[str, Any]]] = {}
    for row in connection.execute(select(curves).where(curves.c.run_id.in_(source))).mappings():
        points.setdefault(row["run_id"], []).append(dict(row))
    rows_of_curves = [row | {"run_id": run_id} for run_id in targets for row in points.get(found[run_id], ())]
    if rows_of_curves:
        connection.execute(insert(curves), rows_of_curves)
    return sum(source[found[run_id]]["state"] == "diverged" for run_id in targets)


def _copied(row: dict[str, Any], run_id: int, attempt: int, now: float) -> dict[str, Any]:
    origin = row["reused_from"] or row["run_id"]
    return row | {"run_id": run_id, "attempt": attempt, "recorded_at": now, "reused_from": origin}


SOURCES = runs.alias("source")
SOURCE_PACKS = packs.alias("source_pack")
SOURCE_SWEEPS = sweeps.alias("source_sweep")


def _equals(which: Any) -> Select[int, int]:
    """Select runs that fit a condition, and for each the latest equal run of its team that has a result."""
    return (
        select(runs.c.id, func.max(SOURCES.c.id))
        .join(sweeps, sweeps.c.id == runs.c.sweep_id)
        .join(SOURCES, SOURCES.c.config_key == runs.c.config_key)
        .join(results, results.c.run_id == SOURCES.c.id)
        .join(SOURCE_PACKS, SOURCE_PACKS.c.id == SOURCES.c.pack_id)
        .join(SOURCE_SWEEPS, SOURCE_SWEEPS.c.id == SOURCES.c.sweep_id)
        .where(
            which,
            SOURCE_PACKS.c.environment_key.is_not(None),
            SOURCE_SWEEPS.c.team_id == sweeps.c.team_id,
        )
        .group_by(runs.c.id)
    )
