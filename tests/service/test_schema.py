"""Migrations: they make the tables that the code declares, on both databases, and refuse a newer one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, inspect, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, ProgrammingError

from service.config import Settings
from service.db import schema
from service.db.engine import (
    clock,
    insert_many,
    is_transient,
    migrate,
    open_engine,
    read,
    sqlite_module,
    write,
)
from service.db.tables import metadata, runs
from service.errors import SetupError
from tests.service.helpers import submit


def test_the_migrations_make_the_declared_tables(engine: Engine) -> None:
    with read(engine) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        assert set(inspect(connection).get_table_names()) == {*metadata.tables, "alembic_version"}


def test_up_down_up(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path / 'a.db'}")
    assert schema.upgrade(engine) == (None, schema.head())
    assert schema.upgrade(engine) == (schema.head(), schema.head())
    with migrate(engine) as connection:
        config = schema._config()
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    with read(engine) as connection:
        assert inspect(connection).get_table_names() == ["alembic_version"]
    schema.upgrade(engine)
    schema.check(engine)


def test_a_newer_database_is_refused(engine: Engine) -> None:
    with write(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    try:
        for use in (schema.check, schema.upgrade):
            with pytest.raises(SetupError, match=r"revision 9999.*newer ddpsweep"):
                use(engine)
    finally:
        with write(engine) as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = :v"), {"v": schema.head()})


def test_an_empty_database_is_told_how_to_be_upgraded(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path / 'a.db'}")
    with pytest.raises(SetupError, match="run `ddpsweep db upgrade`"):
        schema.check(engine)


@pytest.mark.parametrize(
    "url", ["mysql://x/y", "nonsense", "sqlite:////dev/null/x.db", "postgresql+nodriver://x/y"]
)
def test_a_database_that_cannot_be_used_is_one_line(url: str) -> None:
    with pytest.raises(SetupError) as caught:
        schema.check(open_engine(url))
    assert "\n" not in str(caught.value)


def test_a_password_is_not_shown() -> None:
    with pytest.raises(SetupError) as caught:
        schema.check(open_engine("postgresql+psycopg://me:hush@127.0.0.1:1/x"))
    assert "hush" not in str(caught.value)


def test_sqlite_is_set_up_as_it_should_be(sqlite_engine: Engine) -> None:
    with read(sqlite_engine) as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert found == {"journal_mode": "wal", "synchronous": 1, "foreign_keys": 1}
    assert sqlite_module().sqlite_version_info >= (3, 51, 3)


def test_a_transaction_that_nobody_goes_on_with_ends_on_postgresql(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.db.engine.IDLE_TRANSACTION_S", 1)
    frozen, other = open_engine(postgresql_url), open_engine(postgresql_url)
    lock = text("SELECT id FROM scheduler FOR UPDATE")

    def freeze() -> None:
        with write(frozen) as connection:
            connection.execute(lock)
            with write(other) as waiting:  # as long as the first one holds its row
                waiting.execute(lock)
            connection.execute(lock)

    with pytest.raises(DBAPIError) as caught:
        freeze()
    assert is_transient(caught.value)
    frozen.dispose()
    other.dispose()


def test_the_clock_is_the_databases_and_moves_on(engine: Engine) -> None:
    with read(engine) as connection:
        before = connection.execute(clock().select()).scalar_one()
        time.sleep(0.02)
        after = connection.execute(clock().select()).scalar_one()
    assert abs(before - time.time()) < 60
    assert after > before


@pytest.mark.parametrize("name", ["plain", "with space", "h ü%20#?x", "a%2Fb"])
def test_a_home_of_any_name_holds_its_database(tmp_path: Path, name: str) -> None:
    settings = Settings(home=tmp_path / name)
    settings.make_home()
    schema.upgrade(open_engine(settings.resolved_database_url()))
    assert (tmp_path / name / "ddpsweep.db").stat().st_size > 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


class CodedError(Exception):
    def __init__(self, sqlstate: str) -> None:
        self.sqlstate = sqlstate


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (OperationalError("", {}, CodedError("40P01")), True),  # deadlock
        (OperationalError("", {}, CodedError("40001")), True),  # serialisation
        (OperationalError("", {}, CodedError("55P03")), True),  # lock timeout
        (OperationalError("", {}, CodedError("53100")), True),  # disk full
        (OperationalError("", {}, CodedError("57P01")), True),  # the operator stops the server
        (OperationalError("", {}, Exception("connection refused")), True),
        (OperationalError("", {}, Exception("database is locked")), True),
        (OperationalError("", {}, Exception("database or disk is full")), True),
        (OperationalError("", {}, Exception("no such table: runs")), False),
        (IntegrityError("", {}, Exception("UNIQUE constraint failed: connection")), False),
        (ProgrammingError("", {}, CodedError("42P01")), False),
    ],
)
def test_which_errors_may_pass_by_themselves(error: DBAPIError, transient: bool) -> None:
    assert is_transient(error) == transient


def test_many_rows_are_inserted_in_their_order(engine: Engine, small_spec: dict[str, Any]) -> None:
    sweep_id = submit(engine, small_spec)
    with write(engine) as connection:
        some = connection.execute(select(runs).where(runs.c.sweep_id == sweep_id)).mappings().all()
        first = {key: value for key, value in some[0].items() if key != "id"}
        wanted = [
            first | {"pack_index": 100, "config_key": None},
            first
            | {"pack_index": 102, "method": "ddpnopt", "vxx_reg": 0.1 + 0.2, "config_key": b"\x00\xff'\\"},
            first | {"pack_index": 101, "vxx_reg": 5e-324, "seed": 2**63 - 1, "method": "a'b\\c{},\"d"},
        ]
        insert_many(connection, runs, wanted)
        insert_many(connection, runs, [])
        stored = select(runs).where(runs.c.pack_index >= 100).order_by(runs.c.id)
        found = connection.execute(stored).mappings().all()
    assert [{key: value for key, value in row.items() if key != "id"} for row in found] == wanted
