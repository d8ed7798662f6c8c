"""Databases of a test's own, and what each test says in the end."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from service.db import schema
from service.db.engine import open_engine, write
from service.db.tables import metadata, scheduler, teams


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print a line that is seen whether or not the test passes."""

    def print_line(line: str) -> None:
        with capsys.disabled():
            print("\n" + line, end="", flush=True)  # noqa: T201

    return print_line


@contextmanager
def postgresql_database(url: str) -> Iterator[str]:
    """Make a database of its own on a running PostgreSQL.

    Its commits do not wait for the disk: processes die in its tests, the server does not.
    """
    name = f"chaos_{secrets.token_hex(6)}"
    own = make_url(url).set(database=name).render_as_string(hide_password=False)
    server = open_engine(url).execution_options(isolation_level="AUTOCOMMIT")
    try:
        with server.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
            connection.exec_driver_sql(f"ALTER DATABASE {name} SET synchronous_commit TO off")
        yield own
        with server.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        server.dispose()


@contextmanager
def migrated(url: str) -> Iterator[Engine]:
    """Open a database and bring it to this version's schema."""
    engine = open_engine(url)
    try:
        schema.upgrade(engine)
        yield engine
    finally:
        engine.dispose()


def empty(engine: Engine) -> None:
    """Leave nothing but the default team."""
    with write(engine) as connection:
        for table in reversed(metadata.sorted_tables):
            if table not in (teams, scheduler):
                connection.execute(table.delete())
        connection.execute(teams.update().values(device_seconds=0, run_steps=0))


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a migrated database of each kind, which other processes can open; a module's own."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('sqlite') / 'chaos.db'}"
        with migrated(url):
            pass
        yield url
        return
    with postgresql_database(request.getfixturevalue("postgresql_url")) as url:
        with migrated(url):
            pass
        yield url
