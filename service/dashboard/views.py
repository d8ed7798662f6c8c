"""What the pages show of baselines alone, packs and the cluster: bounded queries, so that a page is cheap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from sqlalchemy import Connection

from service.cluster.endpoints import Cluster, cluster_view
from service.dispatch.states import Action, PackState
from service.errors import NotFoundError
from service.results import figures
from service.results.queries import summary_of
from service.results.statistics import SummaryRow
from service.sweeps import packs
from service.sweeps.schemas import Pack, Sweep
from service.sweeps.spec import SweepSpec
from service.text import last_lines, plain

SHOWN_PACKS: Final = 50
SHOWN_ATTEMPTS: Final = 10
SHOWN_FAILURES: Final = 3
SHOWN_ROWS: Final = 200
EXCERPT_LINES: Final = 12
EXCERPT_WIDTH: Final = 300


@dataclass(frozen=True, slots=True)
class Button:
    """Something that can be asked of a sweep.

    Attributes:
        title: what it does.
        confirm: what to ask first; empty if nothing.
    """

    action: Action
    label: str
    title: str
    confirm: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed pack with what it wrote last."""

    pack: Pack
    excerpt: str


@dataclass(frozen=True, slots=True)
class PackLog:
    """An attempt at a pack with the end of what it wrote.

    Attributes:
        detail: where it failed, if it was the last one and its log does not tell.
    """

    pack: Pack
    attempt: int
    log: str
    detail: str


@dataclass(frozen=True, slots=True)
class LoneTable:
    """The summary of a grid whose baseline is trained alone.

    Attributes:
        columns: what is shown.
        rows: for each learning rate its row of each column; how many runs there are, all of them tell alike.
    """

    grid: int
    title: str
    setting: str
    columns: list[str]
    rows: list[tuple[SummaryRow, ...]]


def lone_tables(
    connection: Connection, sweep_id: str, spec: SweepSpec, metrics: Sequence[str]
) -> list[LoneTable]:
    """Summarise the grids that have no cells; one query for each metric, none if there is no such grid."""
    bare = [position for position, grid in enumerate(spec.grids) if not grid.has_cells]
    if not bare:
        return []
    summaries = [summary_of(connection, sweep_id, spec, metric, bare).rows for metric in metrics]
    columns = [figures.VALUES[metric] for metric in metrics]
    by_grid = groupby(zip(*summaries, strict=True), lambda rows: rows[0].grid)
    return [
        LoneTable(
            position,
            figures.BASELINES[spec.grids[position].baseline],
            spec.grids[position].setting(),
            columns,
            list(rows),
        )
        for position, rows in by_grid
    ]


def buttons(sweep: Sweep) -> list[Button]:
    """Return what would change the sweep, nothing else."""
    every = {
        Action.PAUSE: Button(
            Action.PAUSE, "Pause", "Its running packs keep their state and give their devices back"
        ),
        Action.RESUME: Button(Action.RESUME, "Resume", "Its packs may run again"),
        Action.CANCEL: Button(
            Action.CANCEL,
            "Cancel",
            "What waits never runs, what runs stops; results that are there stay",
            f"Cancel {sweep.name}? What waits will not run, and what runs stops within seconds. "
            "Results that are there stay.",
        ),
        Action.RETRY: Button(Action.RETRY, "Retry", "Its failed and cancelled packs are queued again"),
    }
    return [every[action] for action in sweep.actions]


def first_packs(connection: Connection, sweep: Sweep) -> list[Pack]:
    """List the packs that matter most: failed, then running, then the others, each by position."""
    found: dict[int, Pack] = {}
    wanted = [PackState.FAILED] * bool(sweep.failed_packs) + [PackState.RUNNING] * bool(sweep.packs_running)
    for state in (*wanted, None):
        for row in packs.page(connection, sweep.id, -1, SHOWN_PACKS, state):
            found.setdefault(row.pack.position, Pack.of(row))
    return list(found.values())[:SHOWN_PACKS]


def failures(connection: Connection, sweep: Sweep, shown: list[Pack]) -> list[Failure]:
    """Return the first failed packs of those that are shown, with the last lines of their logs."""
    failed = [pack for pack in shown if pack.state == PackState.FAILED][:SHOWN_FAILURES]
    return [Failure(pack, _excerpt(connection, sweep.id, pack)) for pack in failed]


def pack_log(connection: Connection, sweep_id: str, position: int, attempt: int | None) -> PackLog:
    """Return what an attempt at a pack wrote; the last attempt if none is named.

    Raises:
        NotFoundError: if there is no such sweep, pack or attempt.
    """
    rows = packs.page(connection, sweep_id, position - 1, 1, None)
    if not rows or rows[0].pack.position != position:
        raise NotFoundError(f"sweep {sweep_id}: no pack {position}")
    pack = Pack.of(rows[0])
    found, log = packs.log_of(connection, sweep_id, position, attempt)
    detail = plain(pack.error_detail or "").strip() if found == pack.attempt else ""
    return PackLog(pack, found, plain(log), "" if detail in plain(log) else detail)


def cluster(connection: Connection) -> dict[str, Any]:
    """Return the cluster, with what is used of each machine by its cluster and name."""
    view: Cluster = cluster_view(connection)
    used: dict[tuple[str, str], float] = {}
    for pack in view.packs:
        if pack.node is not None:
            place = (pack.cluster, pack.node)
            used[place] = used.get(place, 0.0) + pack.share
    return {
        "dispatchers": view.dispatchers,
        "nodes": view.nodes[:SHOWN_ROWS],
        "more_nodes": len(view.nodes[SHOWN_ROWS:]),
        "packs": view.packs[:SHOWN_ROWS],
        "more_packs": len(view.packs[SHOWN_ROWS:]),
        "teams": view.teams[:SHOWN_ROWS],
        "more_teams": len(view.teams[SHOWN_ROWS:]),
        "used": used,
    }


def _excerpt(connection: Connection, sweep_id: str, pack: Pack) -> str:
    """Return the end of a pack's last log, or of why it failed if it wrote nothing."""
    try:
        log = packs.log_of(connection, sweep_id, pack.pack, None)[1]
    except NotFoundError:
        log = ""  # tried before attempts were kept
    return last_lines(log if log.strip() else pack.error_detail or "", EXCERPT_LINES, EXCERPT_WIDTH)
