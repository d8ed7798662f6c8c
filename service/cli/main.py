"""`ddpsweep`: start the service, submit sweeps, look at them, stop them and let them go on.

Exit codes: 0 done; 1 cannot (no server, a sweep that failed or was cancelled, an action that its state does
not allow, a setup that does not work); 2 bad input.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console, Group

from service import __version__
from service.cli import display
from service.client import Client, DDPSweepClientError, InvalidInput
from service.config import DEFAULT_PORT, Settings
from service.errors import InvalidInputError, ServiceError
from service.results.statistics import Heatmap, Summary
from service.text import plain

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
db_app = typer.Typer(no_args_is_help=True, help="The database's schema.")
team_app = typer.Typer(no_args_is_help=True, help="Teams: their share of the devices and their quotas.")
app.add_typer(db_app, name="db")
app.add_typer(team_app, name="team")
# What is not a terminal has no width, and `grep` wants a row in one line.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 200)

PICTURES: Final = (".png", ".svg", ".pdf")
SHOWN_METRICS: Final = ("train_loss", "accuracy")
"""Of a sweep, unless others are named."""
LOGS_SHOWN: Final = 10
LOG_EXCERPT: Final = 4000
"""Characters of each log where several are shown."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SweepId = Annotated[str, typer.Argument(help="A sweep's id.", metavar="ID")]
MetricNames = Annotated[
    list[str] | None, typer.Option(help="Repeat for several; train_loss and accuracy if not given.")
]
WhichGrid = Annotated[int | None, typer.Option(min=0, help="Which grid, by its position, from 0.")]
SpecFile = Annotated[
    Path, typer.Argument(help="A spec, YAML or JSON; - reads standard input.", metavar="SPEC")
]


def main() -> None:
    """Run the command line; every foreseen error is one line on standard error."""
    try:
        app()
    except (InvalidInput, InvalidInputError) as error:
        fail(str(error), 2)
    except (DDPSweepClientError, ServiceError) as error:
        fail(str(error), 1)
    except ValidationError as error:
        fail("; ".join(map(_setting, error.errors())), 2)


def _setting(error: Any) -> str:
    name = "DDPSWEEP_" + str(error["loc"][0]).upper()
    return f"{name}: got {error['input']!r}; {error['msg']}"


def fail(message: str, code: int) -> NoReturn:
    """Print one line and leave."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)


def say(message: str) -> None:
    """Print a line that is no result."""
    print(message, file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ddpsweep {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Does DDPNOpt's feedback help, where, and how surely? Paired sweeps over a shared cluster."""


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = DEFAULT_PORT,
    role: Annotated[Literal["all", "api", "dispatcher"], typer.Option(help="What to run here.")] = "all",
    lifeline: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Start the service: the API, the dispatcher and a private Ray, until Ctrl-C.

    The roles `api` and `dispatcher` run one part alone, on a database that `ddpsweep db upgrade` has made.
    """
    from service import processes

    settings = Settings()
    processes.configure_logging()
    bound = None
    if role != "dispatcher":
        bound = processes.listen(host, port, settings)
        where = f"http://{'[' + host + ']' if ':' in host else host}:{bound.getsockname()[1]}"
    engine = processes.prepare_database(settings, migrate=role == "all")
    if role == "api":
        assert bound is not None
        engine.dispose()
        print(f"API at {where}", flush=True)
        processes.run_api(settings, bound)
        return
    supervisor = processes.Supervisor(engine, bound)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stop())
    if lifeline is not None:
        processes.follow_lifeline(lifeline)
    if role == "all":
        print(f"DDPSweep at {where} (home {settings.home}); Ctrl-C stops it", flush=True)
    supervisor.run()


def _client() -> Client:
    return Client(Settings().url)


def _read(spec: Path) -> tuple[bytes, str]:
    try:
        content = sys.stdin.buffer.read() if str(spec) == "-" else spec.read_bytes()
    except OSError as error:
        fail(f"{spec}: {error.strerror}", 2)
    return content, "application/json" if spec.suffix == ".json" else "application/yaml"


@app.command()
def validate(spec: SpecFile) -> None:
    """Check a spec and say what it comes to; nothing is stored."""
    with _client() as client:
        answer = client.validate(*_read(spec))
    print(
        f"{answer['runs']} runs in {answer['packs']} packs, {answer['run_steps']:,} run-steps, "
        f"about {answer['estimated_seconds']:g} s on one CPU core"
    )


@app.command()
def submit(
    spec: SpecFile,
    watch: Annotated[bool, typer.Option("--watch", help="Show progress until the sweep is over.")] = False,
    team: Annotated[str | None, typer.Option(help="Whose sweep it is.", metavar="NAME")] = None,
) -> None:
    """Submit a sweep and print its id."""
    with _client() as client:
        sweep = client.submit(*_read(spec), team=team)
        print(sweep["id"], flush=True)
        if watch:
            _watch(client, sweep["id"])


@app.command("watch")
def watch_command(sweep_id: SweepId) -> None:
    """Show a sweep's progress until it is over."""
    with _client() as client:
        _watch(client, sweep_id)


def _watch(client: Client, sweep_id: str) -> None:
    last = display.follow(out, client.watch(sweep_id))
    if last["state"] != "completed":
        why = f": {plain(last['error'])}" if last["error"] else ""
        fail(f"sweep {sweep_id} {last['state']}{why}", 1)


@app.command()
def cancel(sweep_id: SweepId, as_json: AsJson = False) -> None:
    """Cancel a sweep: what waits never runs, what runs stops within seconds. Results stay."""
    _act("cancel", sweep_id, as_json)


@app.command()
def pause(sweep_id: SweepId, as_json: AsJson = False) -> None:
    """Pause a sweep: its running packs keep their state and give their devices back."""
    _act("pause", sweep_id, as_json)


@app.command()
def resume(sweep_id: SweepId, as_json: AsJson = False) -> None:
    """Let a paused sweep go on."""
    _act("resume", sweep_id, as_json)


@app.command()
def retry(sweep_id: SweepId, as_json: AsJson = False) -> None:
    """Queue a sweep's failed and cancelled packs again."""
    _act("retry", sweep_id, as_json)


def _act(action: Literal["cancel", "pause", "resume", "retry"], sweep_id: str, as_json: bool) -> None:
    with _client() as client:
        sweep = getattr(client, action)(sweep_id)
    print(json.dumps(sweep, indent=2) if as_json else f"{sweep_id} {sweep['state']}")


@app.command()
def packs(
    sweep_id: SweepId,
    state: Annotated[str | None, typer.Option(help="Those in this state alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """List a sweep's packs: state, attempts, where they ran and what they took."""
    with _client() as client:
        found = list(client.packs(sweep_id, state))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        out.print(display.pack_table(found))


@app.command()
def logs(
    sweep_id: SweepId,
    pack: Annotated[int | None, typer.Option(min=0, help="Which pack, by its position, from 0.")] = None,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Which attempt at it; the last if not given.")
    ] = None,
) -> None:
    """Print what a pack wrote; without --pack what the failed ones wrote, or a table if none has failed."""
    if pack is None and attempt is not None:
        fail("--attempt: needs --pack", 2)
    with _client() as client:
        if pack is not None:
            _print_log(client, sweep_id, _pack(client, sweep_id, pack), attempt)
            return
        failed = list(islice(client.packs(sweep_id, "failed"), LOGS_SHOWN))
        for one in failed:
            _print_log(client, sweep_id, one, None, None if len(failed) == 1 else LOG_EXCERPT)
        more = client.sweep(sweep_id)["failed_packs"] - len(failed)
        if not failed:
            out.print(display.pack_table(client.packs(sweep_id)))
        elif more > 0:
            print(f"{more} more packs failed: `ddpsweep packs {sweep_id} --state failed`")


def _pack(client: Client, sweep_id: str, position: int) -> dict[str, Any]:
    found = client.pack(sweep_id, position)
    if found is None:
        fail(f"sweep {sweep_id} has no pack {position}", 1)
    return found


def _print_log(
    client: Client, sweep_id: str, pack: dict[str, Any], attempt: int | None, limit: int | None = None
) -> None:
    answer = client.log(sweep_id, pack["pack"], attempt, limit)
    print(display.log_text(pack, answer["attempt"], answer["log"]))


@app.command()
def cluster(as_json: AsJson = False) -> None:
    """Show the machines, what runs where and for whom, and the teams' queues."""
    with _client() as client:
        answer = client.cluster()
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        out.print(display.cluster_tables(answer))


@team_app.command("list")
def team_list(as_json: AsJson = False) -> None:
    """List the teams: share, quotas, what they have waiting and running, what they used."""
    with _client() as client:
        teams = client.teams()
    if as_json:
        print(json.dumps(teams, indent=2))
    else:
        out.print(display.team_table(teams))


@team_app.command("set")
def team_set(
    name: Annotated[str, typer.Argument(help="The team's name.", metavar="NAME")],
    weight: Annotated[
        float | None, typer.Option(min=0, max=1e6, help="Of its share, against the other teams'.")
    ] = None,
    max_devices: Annotated[
        str | None, typer.Option(help="That it may hold at once, or none.", metavar="NUMBER")
    ] = None,
    max_queued_runs: Annotated[
        str | None, typer.Option(help="That may wait at once, or none.", metavar="NUMBER")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a team, or change one; what is not given stays as it is."""
    given: dict[str, Any] = {} if weight is None else {"weight": weight}
    if max_devices is not None:
        given["max_devices"] = _quota("--max-devices", max_devices, float)
    if max_queued_runs is not None:
        given["max_queued_runs"] = _quota("--max-queued-runs", max_queued_runs, int)
    with _client() as client:
        team = client.put_team(name, **(_settings_of(client, name) | given))
    if as_json:
        print(json.dumps(team, indent=2))
    else:
        out.print(display.team_table([team]))


def _quota(option: str, text: str, kind: type[int] | type[float]) -> float | None:
    if text == "none":
        return None
    try:
        number = kind(text)
        if math.isfinite(number):
            return number
    except ValueError:
        pass
    fail(f"{option}: got {text!r}; allowed: a {'whole ' * (kind is int)}number, or none for no limit", 2)


def _settings_of(client: Client, name: str) -> dict[str, Any]:
    """Return what can be set of a team as it is now; nothing if there is no such team."""
    known = next((team for team in client.teams() if team["name"] == name), {})
    return {key: known[key] for key in ("weight", "max_devices", "max_queued_runs") if key in known}


@app.command("list")
def list_command(
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List the newest sweeps."""
    with _client() as client:
        sweeps = client.sweeps(limit)
    if as_json:
        print(json.dumps(sweeps, indent=2))
    else:
        out.print(display.sweep_table(sweeps))


@app.command()
def show(
    sweep_id: SweepId,
    as_json: AsJson = False,
) -> None:
    """Show one sweep: its state, and its heatmaps as tables or, of a baseline alone, a summary."""
    with _client() as client:
        sweep = client.sweep(sweep_id)
        if as_json:
            print(json.dumps(sweep, indent=2))
            return
        out.print(display.sweep_table([sweep]))
        if sweep["error"]:
            out.print(f"{sweep['failed_packs']} packs failed: {plain(sweep['error'])}", markup=False)
        for position, grid in enumerate(sweep["spec"]["grids"]):
            for metric in SHOWN_METRICS:
                out.print(_grid_table(client, sweep_id, metric, position, paired=_has_cells(grid)))


def _has_cells(grid: dict[str, Any]) -> bool:
    """Tell whether a grid of a stored spec has runs of DDPNOpt to compare the baseline with."""
    return bool(grid["vxx_reg"])


def _grid_table(client: Client, sweep_id: str, metric: str, grid: int, *, paired: bool) -> Group:
    if paired:
        return display.heatmap_table(client.heatmap(sweep_id, metric=metric, grid=grid))
    return display.summary_tables(client.summary(sweep_id, metric=metric, grid=grid))


@app.command()
def summary(
    sweep_id: SweepId,
    metric: MetricNames = None,
    baseline: Annotated[
        str | None, typer.Option(help="Which grids, by their baseline; all grids if neither is given.")
    ] = None,
    grid: WhichGrid = None,
    as_json: AsJson = False,
) -> None:
    """Summarise each kind of run over its seeds: mean, spread, how many ended and diverged."""
    with _client() as client:
        answers = [
            client.summary_json(sweep_id, metric=m, baseline=baseline, grid=grid)
            for m in metric or SHOWN_METRICS
        ]
    if as_json:
        print(json.dumps(answers[0] if len(answers) == 1 else answers, indent=2))
        return
    for answer in answers:
        out.print(display.summary_tables(Summary.from_json(answer)))


@app.command()
def heatmap(
    sweep_id: SweepId,
    to: Annotated[Path, typer.Option("--out", help="F.png, .svg, .pdf, .html or .json.", metavar="F")],
    metric: MetricNames = None,
    baseline: Annotated[
        str | None, typer.Option(help="Which grid, by its baseline; all grids if neither is given.")
    ] = None,
    grid: WhichGrid = None,
) -> None:
    """Draw a sweep's heatmaps into a file; what has none, since a baseline is alone, is left out."""
    kind = to.suffix.lower()
    if kind not in (*PICTURES, ".html", ".json"):
        fail(f"--out: got {to.name!r}; allowed: a name that ends in .png, .svg, .pdf, .html or .json", 2)
    metrics = metric or SHOWN_METRICS
    with _client() as client:
        chosen = _panels(client, sweep_id) if baseline is None and grid is None else [grid]
        answers = [
            client.heatmap_json(sweep_id, metric=m, baseline=baseline, grid=g)
            for m in metrics
            for g in chosen
        ]
        if not answers:
            say(f"sweep {sweep_id} has no heatmap, since no grid of it trains DDPNOpt: here is its summary")
            for m in metrics:
                out.print(display.summary_tables(client.summary(sweep_id, metric=m)))
            return
    if kind == ".json":
        text = json.dumps(answers[0] if len(answers) == 1 else answers, indent=2)
        _write(to, lambda path: path.write_text(text + "\n"))
        return
    panels = [Heatmap.from_json(answer) for answer in answers]
    if kind == ".html":
        from service.results import page

        _write(to, lambda path: page.save(panels, path))
    else:
        from service.results import plots

        _write(to, lambda path: plots.save(panels, path))


def _panels(client: Client, sweep_id: str) -> list[int]:
    """Return the positions of a sweep's grids that have cells; say which are left out if some are."""
    grids = client.sweep(sweep_id)["spec"]["grids"]
    found = [position for position, grid in enumerate(grids) if _has_cells(grid)]
    if found:
        for position in sorted(set(range(len(grids))) - set(found)):
            say(
                f"grid {position} ({grids[position]['baseline']}) trains no DDPNOpt and has no heatmap: "
                f"`ddpsweep summary {sweep_id} --grid {position}`"
            )
    return found


def _write(to: Path, save: Any) -> None:
    """Write a file whole or not at all."""
    draft = to.with_name(f".{to.stem}.{os.getpid()}{to.suffix}")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        save(draft)
        draft.replace(to)
    except OSError as error:
        fail(f"--out: {to} cannot be written: {error.strerror}", 1)
    finally:
        draft.unlink(missing_ok=True)
    print(to)


@app.command()
def reproduce(
    name: Annotated[
        str,
        typer.Argument(
            help="fig3, fig4a, fig4b, fig5, fig6, fig8, fig9, fig10, fig11, fig12, table3, table4, "
            "tables6-8, tables9-10, or all.",
            metavar="NAME",
        ),
    ],
    quick: Annotated[
        bool, typer.Option("--quick/--full", help="Fewer seeds and shorter, or as in the paper.")
    ] = False,
    to: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder of the report; out/reproduction/NAME if not given.", metavar="DIR"
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the datasets' files, as DDPSWEEP_DATA.", metavar="DIR")
    ] = None,
) -> None:
    """Run the paper's sweeps and report how they compare with what it published.

    On the server at DDPSWEEP_URL if there is one; else on one of its own over DDPSWEEP_HOME, which ends with
    this command. What was done before is not done again.
    """
    from service.cli import reproduction

    folder = to or Path("out/reproduction") / (f"{name}-quick" if quick else name)
    reproduction.reproduce(out, Settings(), name, folder, data, quick=quick)


@db_app.command("upgrade")
def db_upgrade() -> None:
    """Bring the database to this version's schema."""
    from service.db import schema
    from service.db.engine import open_engine

    settings = Settings()
    settings.make_home()
    before, after = schema.upgrade(open_engine(settings.resolved_database_url()))
    print(f"{before or 'empty'} -> {after}" if before != after else f"{after}: nothing to do")


@db_app.command("check")
def db_check() -> None:
    """Say whether the database has this version's schema."""
    from service.db import schema
    from service.db.engine import open_engine

    schema.check(open_engine(Settings().resolved_database_url()))
    print(f"{schema.head()}: as it should be")


@db_app.command("backup")
def db_backup(
    target: Annotated[Path, typer.Argument(help="Where the copy goes.", metavar="FILE")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Copy the database to a file, while the service runs or not: SQLite's file, or a dump for pg_restore."""
    from service.db.backup import backup
    from service.db.engine import open_engine

    size = backup(open_engine(Settings().resolved_database_url()), target, overwrite=force)
    print(f"{target}: {size:,} bytes")


@app.command()
def doctor() -> None:
    """Look at this machine and this setup, and say what is amiss."""
    from service.cli import diagnosis

    findings = diagnosis.examine(Settings())
    for finding in findings:
        print(f"{finding.mark} {finding.name:<10} {finding.text}")
    if any(finding.broken for finding in findings):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
