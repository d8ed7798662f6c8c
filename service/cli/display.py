"""What the CLI shows: the progress bar, tables, the heatmap in a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from service.results import figures
from service.results.statistics import CellState, Heatmap

STYLES: Final = {
    CellState.BETTER: "bold blue",
    CellState.WORSE: "bold red",
    CellState.INCONCLUSIVE: "dim",
    CellState.PENDING: "dim",
    CellState.DIVERGED: "magenta",
}


class _Facts(ProgressColumn):
    """Runs done, updates per second, time left: as the server tells them."""

    def render(self, task: Task) -> Text:
        progress = task.fields["progress"]
        parts = [f"{progress['runs_done']}/{progress['runs_total']} runs"]
        if progress["run_steps_per_second"]:
            parts.append(f"{progress['run_steps_per_second']:,.0f} run-steps/s")
        if progress["seconds_left"] is not None:
            parts.append(f"{progress['seconds_left']:.0f} s left")
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


def sweep_table(sweeps: Iterable[dict[str, Any]]) -> Table:
    """Return a table of sweeps."""
    table = Table(box=None, pad_edge=False)
    for name in ("id", "name", "state", "runs", "diverged", "submitted"):
        table.add_column(name)
    for sweep in sweeps:
        progress = sweep["progress"]
        table.add_row(
            sweep["id"],
            Text(sweep["name"]),
            sweep["state"],
            f"{progress['runs_done']}/{progress['runs_total']}",
            str(progress["runs_diverged"]),
            sweep["created_at"][:19].replace("T", " "),
        )
    return table


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
    heading = Text(figures.title(heatmap), "bold")
    for words in figures.subtitle(heatmap):
        heading.append(f"\n{words}", "not bold dim")
    return Group(heading, table)
