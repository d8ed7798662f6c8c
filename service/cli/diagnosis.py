"""What `ddpsweep doctor` looks at."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from ddpnopt.lanes.library import library
from service import __version__
from service.client import Client
from service.config import Settings
from service.db import schema
from service.db.engine import open_engine, sqlite_module
from service.errors import SetupError


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        broken: whether it keeps the service from working here.
    """

    name: str
    text: str
    broken: bool = False

    @property
    def mark(self) -> str:
        """`!!` if broken."""
        return "!!" if self.broken else "ok"


def examine(settings: Settings) -> list[Finding]:
    """Look at everything; nothing is changed but the home folder, which is made."""
    return [
        Finding("ddpsweep", f"{__version__} on Python {platform.python_version()}, {os.cpu_count()} CPUs"),
        _package("torch", "needed where packs are trained, not by the API"),
        _package("ray", "needed by the dispatcher and the workers, not by the API"),
        _kernel(),
        _try("home", lambda: str(settings.make_home())),
        _sqlite(),
        _try("database", lambda: _database(settings)),
        _server(settings),
    ]


def _package(name: str, use: str) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        return Finding(name, f"not installed: {use}")


def _kernel() -> Finding:
    found = library("float32")
    text = "none: small nets train several times slower; a C compiler is needed where packs are trained"
    return Finding("fast path", found.name if found else text)


def _try(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, look())
    except SetupError as error:
        return Finding(name, str(error), broken=True)


def _sqlite() -> Finding:
    found = sqlite_module().sqlite_version
    safe = tuple(map(int, found.split("."))) >= (3, 51, 3)
    note = "" if safe else ": has a write-ahead log bug, mended in 3.51.3; install pysqlite3"
    return Finding("sqlite", found + note)


def _database(settings: Settings) -> str:
    engine = open_engine(settings.resolved_database_url())
    shown = engine.url.render_as_string(hide_password=True)
    revision = schema.current(engine)
    if revision is None:
        return f"{shown}: empty; `ddpsweep serve` or `ddpsweep db upgrade` makes it"
    schema.check(engine)
    return f"{shown}: revision {revision}"


def _server(settings: Settings) -> Finding:
    with Client(settings.url) as client:
        answers = client.ready()
    return Finding("server", f"{settings.url}: {'ready' if answers else 'none runs there'}")
