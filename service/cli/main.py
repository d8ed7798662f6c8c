"""`ddpsweep`: start the service, submit sweeps, look at them.

Exit codes: 0 done; 1 cannot (no server, a sweep that failed, a setup that does not work); 2 bad input.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console

from service import __version__
from service.cli import display
from service.client import Client, DDPSweepClientError, InvalidInput
from service.config import DEFAULT_PORT, Settings
from service.errors import ServiceError
from service.results.statistics import Heatmap

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
db_app = typer.Typer(no_args_is_help=True, help="The database's schema.")
app.add_typer(db_app, name="db")
out = Console(highlight=False)

PICTURES: Final = (".png", ".svg", ".pdf")

SweepId = Annotated[str, typer.Argument(help="A sweep's id.", metavar="ID")]
SpecFile = Annotated[
    Path, typer.Argument(help="A spec, YAML or JSON; - reads standard input.", metavar="SPEC")
]


def main() -> None:
    """Run the command line; every foreseen error is one line on standard error."""
    try:
        app()
    except InvalidInput as error:
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
) -> None:
    """Start the service: the API, the dispatcher and a private Ray, until Ctrl-C.

    The roles `api` and `dispatcher` run one part alone, on a database that `ddpsweep db upgrade` has made.
    """
    from service import processes

    settings = Settings()
    processes.configure_logging()
    if role == "dispatcher":
        from service.dispatch import main as dispatcher

        processes.prepare_database(settings, migrate=False).dispose()
        dispatcher.run(settings, dispatcher.new_owner())
        return
    bound = processes.listen(host, port, settings)
    where = f"http://{'[' + host + ']' if ':' in host else host}:{bound.getsockname()[1]}"
    if role == "api":
        processes.prepare_database(settings, migrate=False).dispose()
        print(f"API at {where}", flush=True)
        processes.run_api(settings, bound)
        return
    engine = processes.prepare_database(settings, migrate=True)
    supervisor = processes.Supervisor(settings, bound, engine)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stop())
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
) -> None:
    """Submit a sweep and print its id."""
    with _client() as client:
        sweep = client.submit(*_read(spec))
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
        fail(f"sweep {sweep_id} {last['state']}: {last['error']}", 1)


@app.command("list")
def list_command(
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show one sweep: its state and its heatmaps as tables."""
    with _client() as client:
        sweep = client.sweep(sweep_id)
        if as_json:
            print(json.dumps(sweep, indent=2))
            return
        out.print(display.sweep_table([sweep]))
        if sweep["error"]:
            out.print(f"{sweep['failed_packs']} packs failed: {sweep['error']}", markup=False)
        for grid in range(len(sweep["spec"]["grids"])):
            for metric in ("train_loss", "accuracy"):
                out.print(display.heatmap_table(client.heatmap(sweep_id, metric=metric, grid=grid)))


@app.command()
def heatmap(
    sweep_id: SweepId,
    to: Annotated[Path, typer.Option("--out", help="F.png, .svg, .pdf, .html or .json.", metavar="F")],
    metric: Annotated[
        list[str] | None, typer.Option(help="Repeat for several; train_loss and accuracy if not given.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Which grid, by its baseline; all grids if neither is given.")
    ] = None,
    grid: Annotated[int | None, typer.Option(min=0, help="Which grid, by its position, from 0.")] = None,
) -> None:
    """Draw a sweep's heatmaps into a file."""
    kind = to.suffix.lower()
    if kind not in (*PICTURES, ".html", ".json"):
        fail(f"--out: got {to.name!r}; allowed: a name that ends in .png, .svg, .pdf, .html or .json", 2)
    metrics = metric or ["train_loss", "accuracy"]
    with _client() as client:
        every = baseline is None and grid is None
        chosen = range(len(client.sweep(sweep_id)["spec"]["grids"])) if every else [grid]
        answers = [
            client.heatmap_json(sweep_id, metric=m, baseline=baseline, grid=g)
            for m in metrics
            for g in chosen
        ]
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
