"""A copy of the database while it is in use."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Engine
from sqlalchemy.exc import DBAPIError

from service.db.engine import sqlite_module
from service.errors import SetupError

PASSWORDS: Final = ("password", "sslpassword")
"""Parameters of a URL that a command line must not show."""


def backup(engine: Engine, target: Path, *, overwrite: bool = False) -> int:
    """Write a consistent copy of the database to a file, which either is complete or is not there.

    The service may run meanwhile: the copy is of one moment, and holds up no writer.

    Args:
        engine: of the database.
        target: the copy; readable by this user alone.
        overwrite: whether it may take the place of another file.

    Returns:
        Its size in bytes.

    Raises:
        SetupError: if it cannot be written, or should not be.
    """
    _check_target(engine, target, overwrite=overwrite)
    with _beside(target) as draft:
        if engine.dialect.name == "sqlite":
            _copy_sqlite(engine, draft)
        else:
            _dump_postgresql(engine.url, draft)
    return target.stat().st_size


def _check_target(engine: Engine, target: Path, *, overwrite: bool) -> None:
    if engine.dialect.name == "sqlite":
        source = Path(engine.url.database or "")
        if not source.is_file():  # SQLite would make an empty one
            raise SetupError(f"there is no database {source}")
        if target.exists() and target.samefile(source):
            raise SetupError(f"{target} is the database itself")
    if target.is_dir():
        raise SetupError(f"{target} is a folder")
    if target.exists() and not overwrite:
        raise SetupError(f"{target} is there already; --force puts the copy in its place")
    # A log that belongs to another file would be applied to the copy when that is opened.
    log = target.with_name(f"{target.name}-wal")
    if log.exists():
        raise SetupError(f"{target} seems to be in use as a database: there is {log}")


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Give a file, for this user alone, that takes the target's place once it is written."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise SetupError(f"{target} cannot be written: {error.strerror or error}") from error
    draft = Path(name)
    try:
        yield draft
        _sync(draft)
        draft.replace(target)
        _sync(target.parent)
    except OSError as error:
        raise SetupError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have the disk keep a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _copy_sqlite(engine: Engine, draft: Path) -> None:
    sqlite = sqlite_module()
    try:
        with closing(engine.raw_connection()) as source, closing(sqlite.connect(draft)) as copy:
            driver: Any = source.driver_connection
            # In one step: between two, another process's write would make it start again.
            driver.backup(copy)
            # With a log of its own it would be more than one file.
            copy.execute("PRAGMA journal_mode=DELETE")
            (found,) = copy.execute("PRAGMA integrity_check").fetchone()
    except (DBAPIError, sqlite.Error) as error:
        raise SetupError(f"the copy failed: {getattr(error, 'orig', error)}") from error
    if found != "ok":
        raise SetupError(f"the copy is damaged, and so the database may be: {found}")


def _dump_postgresql(url: URL, draft: Path) -> None:
    """Run pg_dump.

    Raises:
        SetupError: if there is none, or it fails.
    """
    if "sslpassword" in url.query:
        raise SetupError(
            "a URL with sslpassword: run pg_dump by hand, it takes that on its command line alone"
        )
    where, secrets = _without_passwords(url)
    command = ["pg_dump", "--format=custom", "--no-password", f"--file={draft}", f"--dbname={where}"]
    try:
        subprocess.run(command, env=os.environ | secrets, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise SetupError(
            "there is no pg_dump on PATH; where there is one, of the server's version or newer, run "
            f"`pg_dump --format=custom --file=FILE --dbname='{where}'`"
        ) from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"it ended with {error.returncode}"]
        raise SetupError("; ".join(lines)) from error


def _without_passwords(url: URL) -> tuple[str, dict[str, str]]:
    """Return a URL that everybody may see in a list of processes, and what it lacks, for the environment."""
    password = url.password or url.query.get("password")
    shown = url.set(drivername="postgresql", query=url.difference_update_query(PASSWORDS).query)
    # `set` takes no None for the password.
    shown = URL.create(
        shown.drivername, shown.username, None, shown.host, shown.port, shown.database, shown.query
    )
    return shown.render_as_string(hide_password=False), {"PGPASSWORD": str(password)} if password else {}
