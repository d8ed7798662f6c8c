"""What the CLI shows: the progress bar, tables, logs, the heatmap in a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any, Final

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from service.results import figures
from service.results.statistics import CellState, Heatmap, Summary, SummaryRow
from service.text import plain

STYLES: Final = {
    CellState.BETTER: "bold blue",
    CellState.WORSE: "bold red",
    CellState.INCONCLUSIVE: "dim",
    CellState.PENDING: "dim",
    CellState.DIVERGED: "magenta",
}


NO_DISPATCHER: Final = "nothing trains: no dispatcher is running"


class _Facts(ProgressColumn):
    """Runs done, updates per second, time left: as the server tells them."""

    def render(self, task: Task) -> Text:
        progress = task.fields["progress"]
        parts = [f"{progress['runs_done']}/{progress['runs_total']} runs"]
        if progress["run_steps_per_second"]:
            parts.append(f"{progress['run_steps_per_second']:,.0f} run-steps/s")
        if progress["seconds_left"] is not None:
            parts.append(f"{progress['seconds_left']:.0f} s left")
        if progress["runs_reused"]:
            parts.append(f"{progress['runs_reused']} reused")
        if progress["runs_diverged"]:
            parts.append(f"{progress['runs_diverged']} diverged")
        return Text(" · ".join(parts))


def follow(console: Console, states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Show a sweep's progress until it is over; return its last state."""
    columns = (TextColumn("{task.fields[state]:>9}"), BarColumn(bar_width=20), _Facts(), TimeElapsedColumn())
    last: dict[str, Any] = {}
    with Progress(*columns, console=console) as bar:
        task = None
        for last in states:
            progress = last["progress"]
            shown = {
                "completed": progress["run_steps_done"],
                "total": progress["run_steps_total"],
                "state": last["state"],
                "progress": progress,
            }
            if task is None:
                task = bar.add_task("", **shown)
            else:
                bar.update(task, **shown)
    return last


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold not italic")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def sweep_table(sweeps: Iterable[dict[str, Any]]) -> Table:
    """Return a table of sweeps."""
    table = _table("id", "name", "team", "state", "runs", "reused", "diverged", "submitted")
    for sweep in sweeps:
        progress = sweep["progress"]
        table.add_row(
            sweep["id"],
            Text(plain(sweep["name"])),
            sweep["team"],
            sweep["state"],
            f"{progress['runs_done']}/{progress['runs_total']}",
            str(progress["runs_reused"]),
            str(progress["runs_diverged"]),
            sweep["created_at"][:19].replace("T", " "),
        )
    return table


def pack_table(packs: Iterable[dict[str, Any]]) -> Table:
    """Return a table of packs: where the last attempt was, and what all of them took."""
    table = _table("pack", "state", "runs", "step", "attempts", "node", "device-seconds", "error")
    for pack in packs:
        attempts = pack["attempts"]
        table.add_row(
            str(pack["pack"]),
            pack["state"],
            str(pack["runs"]),
            f"{pack['step']}/{pack['steps']}",
            str(pack["attempt"]),
            Text(plain((attempts and attempts[-1]["node"]) or "")),
            f"{sum(tried['device_seconds'] for tried in attempts):,.1f}",
            Text(plain(pack["error"] or "")),
        )
    return table


def log_text(pack: dict[str, Any], attempt: int, log: str) -> str:
    """Return an attempt's log under a heading that says how the attempt ended."""
    tried = next((t for t in pack["attempts"] if t["attempt"] == attempt), {"outcome": "?", "error": None})
    heading = f"== pack {pack['pack']}, attempt {attempt}: {tried['outcome']}"
    if tried["error"]:
        heading += f": {' '.join(plain(tried['error']).split())}"
    parts = [heading, plain(log).rstrip() or "(it wrote nothing)"]
    detail = plain(pack["error_detail"] or "").strip()
    if attempt == pack["attempt"] and detail not in plain(log):
        parts.append(detail)
    return "\n".join(parts)


def team_table(teams: Iterable[dict[str, Any]], title: str | None = None) -> Table:
    """Return a table of teams: share and quotas, what they have now, what they used."""
    table = _table(
        "team",
        "weight",
        "max devices",
        "max queued runs",
        "devices",
        "packs queued",
        "device-seconds",
        "run-steps",
        title=title,
    )
    for team in teams:
        table.add_row(
            team["name"],
            f"{team['weight']:g}",
            _limit(team["max_devices"]),
            _limit(team["max_queued_runs"]),
            f"{team['devices']:g}",
            str(team["packs_queued"]),
            f"{team['device_seconds']:,.1f}",
            f"{team['run_steps']:,}",
        )
    return table


def cluster_tables(cluster: dict[str, Any]) -> Group:
    """Return the cluster: machines, what runs where and for whom, teams."""
    count = len(cluster["dispatchers"])
    told = f"dispatchers: {count}" if count else NO_DISPATCHER
    parts: list[Any] = [Text(told, "" if count else "bold red")]
    if cluster["nodes"]:
        parts += ["", _node_table(cluster["nodes"])]
    if cluster["packs"]:
        parts += ["", _running_table(cluster["packs"])]
    return Group(*parts, "", team_table(cluster["teams"], "teams"))


def _node_table(nodes: Iterable[dict[str, Any]]) -> Table:
    table = _table("node", "kind", "model", "team", "devices", title="nodes")
    for node in nodes:
        names = (Text(plain(node["name"])), node["kind"], Text(plain(node["model"])), node["team"] or "all")
        table.add_row(*names, f"{node['devices']:g}")
    return table


def _running_table(packs: Iterable[dict[str, Any]]) -> Table:
    table = _table(
        "sweep", "name", "team", "pack", "node", "device", "step", "seconds", title="running packs"
    )
    for pack in packs:
        table.add_row(
            pack["sweep_id"],
            Text(plain(pack["sweep_name"])),
            pack["team"],
            str(pack["pack"]),
            Text(plain(pack["node"] or "waits for one")),
            Text(plain(pack["device"] or "")),
            f"{pack['step']}/{pack['steps']}",
            f"{pack['seconds']:.0f}",
        )
    return table


def _limit(value: float | None) -> str:
    return "none" if value is None else f"{value:g}" if value < 1e6 else f"{value:,.0f}"


def heatmap_table(heatmap: Heatmap) -> Group:
    """Return a panel as a headed table: the improvement of each cell, in brackets where inconclusive."""
    table = Table(pad_edge=False)
    table.add_column("lr \\ ε", justify="right")
    for value in heatmap.vxx_reg:
        table.add_column(f"{value:g}", justify="right")
    digits = figures.digits(heatmap)
    for rate, line in figures.rows(heatmap):
        cells = [Text(figures.label(cell, digits), STYLES[cell.state]) for cell in line]
        table.add_row(f"{rate:g}", *cells)
    return Group(_heading(figures.title(heatmap), figures.subtitle(heatmap)), table)


def _heading(title: str, subtitle: Iterable[str]) -> Text:
    heading = Text(title, "bold")
    for words in subtitle:
        heading.append(f"\n{words}", "not bold dim")
    return heading


def summary_tables(summary: Summary) -> Group:
    """Return a summary as headed tables, one of each grid."""
    tables = [
        _summary_table(list(rows), summary.metric) for _, rows in groupby(summary.rows, lambda row: row.grid)
    ]
    return Group(*tables)


def _summary_table(rows: list[SummaryRow], metric: str) -> Group:
    table = Table(pad_edge=False)
    for name in ("method", "lr", "ε", "n", "diverged", "mean", "sd", "95 %", "min", "max"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(
            row.method,
            f"{row.learning_rate:g}",
            "" if row.vxx_reg is None else f"{row.vxx_reg:g}",
            f"{row.n}/{row.n_total}",
            str(row.n_diverged),
            _number(row.mean),
            _number(row.sd),
            "·" if row.ci_low is None else f"{_number(row.ci_low)} … {_number(row.ci_high)}",
            _number(row.min),
            _number(row.max),
        )
    return Group(_heading(figures.summary_title(rows[0].baseline, metric), figures.subtitle(rows[0])), table)


def _number(value: float | None) -> str:
    return "·" if value is None else f"{value:.4g}"
