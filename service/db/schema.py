"""Bring a database to this code's schema, or say why not."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

import migrations
from service.db.engine import migrate, read
from service.errors import SetupError


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent).replace("%", "%%"))
    return config


def head() -> str:
    """Return the revision that this code wants."""
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def current(engine: Engine) -> str | None:
    """Return the revision that the database has; None if it is empty.

    Raises:
        SetupError: if the database cannot be opened.
    """
    try:
        with read(engine) as connection:
            return MigrationContext.configure(connection).get_current_revision()
    except DBAPIError as error:
        raise SetupError(f"the database {_shown(engine)} cannot be opened: {error.orig}") from error


def upgrade(engine: Engine) -> tuple[str | None, str]:
    """Apply the migrations that are missing.

    Returns:
        The revisions before and after.

    Raises:
        SetupError: if the database is newer than this code, or cannot be opened.
    """
    before = current(engine)
    _refuse_newer(engine, before)
    if before != head():
        with migrate(engine) as connection:
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    return before, head()


def check(engine: Engine) -> None:
    """Make sure that the schema is this code's.

    Raises:
        SetupError: if it is older or newer.
    """
    revision = current(engine)
    _refuse_newer(engine, revision)
    if revision != head():
        raise SetupError(
            f"the database {_shown(engine)} is at revision {revision or 'none'}, this code needs {head()}: "
            "run `ddpsweep db upgrade`"
        )


def _refuse_newer(engine: Engine, revision: str | None) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if revision is not None and revision not in known:
        raise SetupError(
            f"the database {_shown(engine)} is at revision {revision}, which this version does not know: "
            "it was written by a newer ddpsweep; install that one or use another DDPSWEEP_HOME"
        )


def _shown(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=True)
