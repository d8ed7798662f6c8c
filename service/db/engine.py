"""Engines, transactions and the database's clock. The one place that knows SQLite from PostgreSQL."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from sqlalchemy import (
    ARRAY,
    URL,
    Connection,
    Engine,
    Select,
    Table,
    bindparam,
    create_engine,
    event,
    func,
    insert,
    select,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction
from sqlalchemy.types import Double

from service.errors import SetupError

BUSY_TIMEOUT_S: Final = 30
IDLE_TRANSACTION_S: Final = 30
TRANSIENT_CLASSES: Final = frozenset({"08", "40", "53", "57"})
"""PostgreSQL's connection exceptions, rollbacks, lack of resources, interventions by the operator."""
LOCK_NOT_AVAILABLE: Final = "55P03"
WRITER: Final = "ddpsweep_writer"

K = TypeVar("K")
V = TypeVar("V")


class clock(GenericFunction[float]):  # noqa: N801 - named as it reads in a query
    """The database's own clock, in seconds since 1970: it moves on within a transaction."""

    type = Double()
    inherit_cache = True


@compiles(clock, "sqlite")
def _sqlite_clock(element: clock, compiler: Any, **kw: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(clock, "postgresql")
def _postgresql_clock(element: clock, compiler: Any, **kw: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


def sqlite_module() -> Any:
    """Return the newest SQLite at hand.

    Distributions ship versions with a bug that can corrupt a write-ahead log (mended in 3.51.3);
    `pysqlite3` bundles its own.
    """
    import sqlite3

    try:
        bundled = importlib.import_module("pysqlite3.dbapi2")
    except ImportError:
        return sqlite3
    return bundled if bundled.sqlite_version_info >= sqlite3.sqlite_version_info else sqlite3


def open_engine(url: str | URL) -> Engine:
    """Return an engine for SQLite or PostgreSQL.

    Raises:
        SetupError: if the URL is neither or its driver is missing.
    """
    try:
        backend = make_url(url).get_backend_name()
        if backend == "sqlite":
            return _sqlite_engine(url)
        if backend == "postgresql":
            return _postgresql_engine(url)
    except (NoSuchModuleError, ImportError) as error:
        raise SetupError(f"DDPSWEEP_DATABASE_URL cannot be used: {error}") from error
    except (ArgumentError, ValueError) as error:
        # Without the error's own words: they may hold the password.
        raise SetupError(
            "DDPSWEEP_DATABASE_URL is not a URL; allowed: sqlite:///…, postgresql://…"
        ) from error
    raise SetupError(f"DDPSWEEP_DATABASE_URL: got a {backend} URL; allowed: sqlite:///…, postgresql://…")


def _postgresql_engine(url: str | URL) -> Engine:
    engine = create_engine(url, pool_pre_ping=True)

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: Any) -> None:
        # A process that is frozen within a transaction must not keep what it has locked from the others.
        connection.autocommit = True
        connection.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_TRANSACTION_S}s'")
        connection.autocommit = False

    return engine


def _sqlite_engine(url: str | URL) -> Engine:
    engine = create_engine(url, module=sqlite_module(), connect_args={"timeout": BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing; the listener below does
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A deferred transaction that reads and then writes fails at once when another wrote in between,
        # whatever the busy timeout.
        writes = connection.get_execution_options().get(WRITER, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


@contextmanager
def write(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that may write; commits at the end, rolls back on an exception."""
    with engine.connect().execution_options(**{WRITER: True}) as connection, connection.begin():
        yield connection


@contextmanager
def read(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that only reads."""
    with engine.connect() as connection, connection.begin():
        yield connection


@contextmanager
def migrate(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that may change tables.

    SQLite changes a table by writing it anew, which its foreign keys would not allow; they are looked at
    again before the commit.

    Raises:
        RuntimeError: if a row refers to one that is not there any more.
    """
    if engine.dialect.name != "sqlite":
        with write(engine) as connection:
            yield connection
        return
    with engine.connect().execution_options(**{WRITER: True}) as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.execute("PRAGMA foreign_keys=OFF")  # here, since it does nothing within a transaction
        try:
            with connection.begin():
                yield connection
                if lost := connection.exec_driver_sql("PRAGMA foreign_key_check").all():
                    raise RuntimeError(f"rows refer to others that are gone: {lost[:5]}")
        finally:
            driver.execute("PRAGMA foreign_keys=ON")


def columns(connection: Connection, query: Select[K, V]) -> dict[K, V]:
    """Return a query of two columns as a dictionary from the first to the second."""
    return {key: value for key, value in connection.execute(query)}  # noqa: C416 - for its types


def insert_many(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows, all of the same columns, none of which is JSON.

    In one statement on PostgreSQL, of an array for each column: a statement for each row takes the driver
    several times as long.
    """
    if not rows:
        return
    if connection.dialect.name != "postgresql":
        connection.execute(insert(table), rows)
        return
    names = list(rows[0])
    arrays = [func.unnest(bindparam(name, type_=ARRAY(table.c[name].type))) for name in names]
    statement = insert(table).from_select(names, select(*arrays), include_defaults=False)
    connection.execute(statement, {name: [row[name] for row in rows] for name in names})


def storable(text: str) -> str:
    """Return a text without what a database takes in no text: NUL and lone surrogates."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()


def is_transient(error: DBAPIError) -> bool:
    """Tell whether the same statement may succeed later: a lost connection, a locked or full database."""
    if error.connection_invalidated:
        return True
    if code := getattr(error.orig, "sqlstate", None):
        return code[:2] in TRANSIENT_CLASSES or code == LOCK_NOT_AVAILABLE
    if not isinstance(error, OperationalError):
        return False
    # SQLite has no codes, nor has an error of connecting.
    text = str(error.orig).lower()
    return any(word in text for word in ("locked", "busy", "disk", "unable to open", "connect"))
