"""`ddpsweep reproduce`: the paper's presets on a server, one after the other, and the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from service.cli import display
from service.cli.embedded import service
from service.client import Client
from service.config import Settings
from service.errors import SetupError
from service.paper import report
from service.paper.build import build
from service.paper.presets import PRESETS, Preset, get
from service.paper.run import run
from service.paper.sections import Section


def reproduce(
    console: Console, settings: Settings, name: str, folder: Path, data: Path | None, *, quick: bool
) -> None:
    """Run a preset, or all of them, and write the report: also of what was done before an error.

    Raises:
        InvalidInputError: if there is no such preset.
        SetupError: if the service does not start, if `data` are for a server that runs already, or, after the
            other presets, if a sweep does not complete.
        DDPSweepClientError: if the server is lost or refuses.
    """
    chosen: list[Preset] = list(PRESETS.values()) if name == "all" else [get(name)]
    sections: list[Section] = []
    failed: list[str] = []
    try:
        with _server(console, settings, data) as url, Client(url) as client:
            _make(folder)
            for preset in chosen:
                try:
                    sections.append(_section(console, client, preset, quick=quick))
                except SetupError as error:
                    failed.append(f"{preset.name}: {error}")
                    sections.append(Section(preset.name, preset.title, (f"Not reproduced: {error}",)))
    except (KeyboardInterrupt, SystemExit):
        console.print("stopping; the same command goes on from here")
        raise
    finally:
        if sections:
            *_, page, pdf = report.save(sections, folder)
            console.print(f"wrote {page} and {pdf}", markup=False, soft_wrap=True)
    if failed:
        raise SetupError("; ".join(failed))


def _make(folder: Path) -> None:
    """Make the report's folder, before hours of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"--out: got {str(folder)!r}, which cannot be made: {error.strerror}") from error


def _section(console: Console, client: Client, preset: Preset, *, quick: bool) -> Section:
    console.print(preset.title, style="bold")

    def follow(spec: str, states: Iterable[dict[str, Any]]) -> dict[str, Any]:
        console.print(f"  {spec}")
        return display.follow(console, states)

    section = build(run(client, preset, follow, quick=quick))
    for finding in section.findings:
        console.print(f"  · {finding}", markup=False, soft_wrap=True)
    return section


@contextmanager
def _server(console: Console, settings: Settings, data: Path | None) -> Iterator[str]:
    with Client(settings.url) as client:
        running = client.ready()
    if running and data is not None:
        raise SetupError(
            f"--data: the server at {settings.url} has workers of its own, which read the datasets' files "
            "from the folder that DDPSWEEP_DATA names for them; set it there, or leave --data out"
        )
    if running:
        console.print(f"on the server at {settings.url}")
        yield settings.url
        return
    console.print(f"on a server of its own (home {settings.home})")
    variables = {} if data is None else {"DDPSWEEP_DATA": str(data.expanduser().resolve())}
    with service(settings.home.expanduser(), **variables) as url:
        yield url
