"""Two dispatchers, three teams of weights 1, 2 and 4 and a hog: devices go by weight, in a real run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, func, select

from service.db import schema
from service.db.engine import clock, open_engine, read, write
from service.db.tables import attempts, teams
from service.teams import queries
from tests.chaos.scale import IS_FULL
from tests.service.helpers import submit
from tests.system.conftest import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

WEIGHTS = {"one": 1.0, "two": 2.0, "four": 4.0, "hog": 1.0}
SECONDS = 180 if IS_FULL else 30
# In half a minute, beside other tests, a share of an eighth is a few packs more or less.
ALLOWED = 0.15 if IS_FULL else 0.4
SWEEPS = {name: (40 if name == "hog" else 10) * SECONDS // 4 for name in WEIGHTS}


def spec(seed: int) -> dict[str, Any]:
    """Return a sweep of one pack that takes about half a second."""
    return {
        "name": "share",
        "dataset": "digits",
        "model": {"kind": "fcn", "hidden": [10, 10, 10, 10]},
        "training": {"steps": 3000, "batch_size": 16, "eval_every": 3000},
        "seeds": [seed],
        "reuse": False,
        "grids": [{"baseline": "sgd", "learning_rate": [0.4, 0.6], "vxx_reg": [1e-4, 1e-3, 1e-2]}],
    }


@pytest.fixture
def database(tmp_path: Path) -> Iterator[tuple[str, Engine]]:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    engine = open_engine(url)
    schema.upgrade(engine)
    yield url, engine
    engine.dispose()


@pytest.fixture
def dispatchers(database: tuple[str, Engine], tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two dispatchers, each with a private Ray of one slot."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "service.cli.main", "serve", "--role", "dispatcher"],
            env=os.environ
            | {
                "DDPSWEEP_HOME": str(tmp_path / name),
                "DDPSWEEP_DATABASE_URL": database[0],
                "DDPSWEEP_SLOTS": "1",
            },
            stderr=(tmp_path / f"{name}.log").open("w"),
        )
        for name in ("a", "b")
    ]
    yield processes
    for process in processes:
        process.terminate()
    assert [process.wait(60) for process in processes] == [0, 0]


def used(engine: Engine, since: float, until: float) -> dict[str, float]:
    """Return the device-seconds of each team within an interval."""
    seconds: dict[str, float] = dict.fromkeys(WEIGHTS, 0.0)
    with read(engine) as connection:
        now = connection.execute(select(clock())).scalar_one()
        rows = connection.execute(
            select(teams.c.name, attempts.c.started_at, func.coalesce(attempts.c.ended_at, now))
            .join(teams, teams.c.id == attempts.c.team_id)
            .where(attempts.c.started_at.is_not(None))
        )
        for name, start, end in rows:
            seconds[name] += max(0.0, min(end, until) - max(start, since))
    return seconds


def both_train(engine: Engine) -> bool:
    with read(engine) as connection:
        owners = select(func.count(attempts.c.owner.distinct())).where(attempts.c.outcome == "completed")
        return bool(connection.execute(owners).scalar_one() == 2)


@pytest.mark.timeout(SECONDS + 240)
def test_shares(
    database: tuple[str, Engine],
    dispatchers: list[subprocess.Popen[bytes]],
    say: Callable[[str], None],
) -> None:
    _, engine = database
    with write(engine) as connection:
        for name, weight in WEIGHTS.items():
            queries.put(connection, name, weight, None, None)
    for seed in range(max(SWEEPS.values())):
        for name in WEIGHTS:
            if seed < SWEEPS[name]:
                submit(engine, spec(seed), team=name)
    wait_for(lambda: both_train(engine), 120)
    with read(engine) as connection:
        since = connection.execute(select(clock())).scalar_one()
    time.sleep(SECONDS)
    found = used(engine, since, since + SECONDS)
    with read(engine) as connection:
        waiting = {team.name: team.packs_queued for team in queries.every(connection)}
    assert all(waiting[name] for name in WEIGHTS), "everyone still waits for more"
    total, weights = sum(found.values()), sum(WEIGHTS.values())
    errors = {name: found[name] / total * weights / WEIGHTS[name] - 1 for name in WEIGHTS}
    say(
        f"shares: {total:.0f} device-seconds in {SECONDS} s; "
        + ", ".join(f"{name} (weight {WEIGHTS[name]:g}) {errors[name]:+.1%}" for name in WEIGHTS)
    )
    assert max(map(abs, errors.values())) <= ALLOWED, errors
