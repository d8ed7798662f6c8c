"""T1, T3, T4: kill -9 of the dispatcher, of Ray's workers, of its GCS and raylet, under the whole service."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import func, select, update

from service.client import Client
from service.db.engine import columns, open_engine, read, write
from service.db.tables import attempts, packs
from tests.chaos.conftest import postgresql_database
from tests.chaos.scale import IS_FULL, SCALE, TIMEOUT_S
from tests.system.conftest import Running, descendants, start, stop, wait_for
from tests.system.test_actions import workers
from tests.system.test_kill import digests, executable, recorded_once, submit

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(TIMEOUT_S)]

SEEDS: Final = 50 if IS_FULL else 10
RUNS: Final = 12 * SEEDS
# The supervisor waits ever longer before it starts a dispatcher again that keeps dying: here two seconds.
IMPATIENT: Final = [
    sys.executable,
    "-c",
    "import service.processes as p; p.LONGEST_DELAY_S = 2.0; from service.cli.main import main; main()",
]
PACE_S: Final = 1.5
"""That a dispatcher is left alone once its packs train."""


def spec(kills: int) -> dict[str, Any]:
    """Return what makes a sweep that trains through so many kills: some seconds of both cores for each."""
    steps = 6_000 + 800 * kills if IS_FULL else 12_000 + 3_000 * kills
    return {"seeds": SEEDS, "training": {"steps": steps, "batch_size": 16, "eval_every": 1000}}


@contextmanager
def service(tmp_path: Path, database: str | None = None) -> Iterator[tuple[Running, Client]]:
    settings = {"DDPSWEEP_CHECKPOINT_EVERY": "0.3"}
    if database is not None:
        settings["DDPSWEEP_DATABASE_URL"] = database
    running = start(tmp_path / "home", IMPATIENT, **settings)
    try:
        with Client(running.url) as client:
            yield running, client
    finally:
        assert stop(running) == 0


@pytest.fixture(params=["sqlite", "postgresql"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Running, Client]]:
    """The whole service on each database."""
    if request.param == "sqlite":
        if not IS_FULL:
            pytest.skip("tests/system/test_kill.py is the short form")
        with service(tmp_path) as found:
            yield "sqlite", *found
        return
    with (
        postgresql_database(request.getfixturevalue("postgresql_url")) as url,
        service(tmp_path, url) as found,
    ):
        yield "postgresql", *found


def in_training(running: Running, sweep_id: str) -> set[int]:
    """The packs with an attempt that has got somewhere."""
    engine = open_engine(running.database)
    with read(engine) as connection:
        rows = connection.scalars(
            select(attempts.c.pack_id)
            .join(packs, packs.c.id == attempts.c.pack_id)
            .where(
                attempts.c.sweep_id == sweep_id,
                attempts.c.outcome == "running",
                packs.c.step > attempts.c.first_step,
            )
        )
        found = set(rows)
    engine.dispose()
    return found


def tries(running: Running, sweep_id: str) -> dict[str, int]:
    """How many attempts ended how."""
    engine = open_engine(running.database)
    with read(engine) as connection:
        query = select(attempts.c.outcome, func.count()).where(attempts.c.sweep_id == sweep_id)
        found: dict[str, int] = columns(connection, query.group_by(attempts.c.outcome))
    engine.dispose()
    return found


def is_over(client: Client, sweep_id: str) -> bool:
    return client.sweep(sweep_id)["state"] in ("completed", "failed", "cancelled")


def killing(stage: tuple[Running, Client], sweep_id: str, kills: int, victim: Callable[[], int]) -> int:
    """Kill what the test says again and again, each time while packs train; return how often."""
    running, client = stage
    for done in range(kills):
        wait_for(lambda: in_training(running, sweep_id) or is_over(client, sweep_id), 120)
        time.sleep(PACE_S)
        if is_over(client, sweep_id):
            return done
        os.kill(victim(), signal.SIGKILL)
        wait_for(lambda: not in_training(running, sweep_id) or is_over(client, sweep_id), 120)
    return kills


def undisturbed(client: Client, kills: int) -> list[tuple[Any, ...]]:
    sweep_id = submit(client, **spec(kills))
    assert list(client.watch(sweep_id))[-1]["state"] == "completed"
    return digests(client, sweep_id)


def test_the_dispatcher_is_killed(stage: tuple[str, Running, Client], say: Callable[[str], None]) -> None:
    name, running, client = stage
    wanted = undisturbed(client, SCALE.dispatcher_kills)
    sweep_id = submit(client, **spec(SCALE.dispatcher_kills))
    done = killing((running, client), sweep_id, SCALE.dispatcher_kills, lambda: running.child("dispatcher"))
    assert list(client.watch(sweep_id))[-1]["state"] == "completed"
    recorded_once(running, sweep_id, attempts=2, total=RUNS)
    found = digests(client, sweep_id)
    assert found == wanted
    say(
        f"T1 {name}: {done} kills of the dispatcher in a sweep of {RUNS} runs, {RUNS - len(found)} lost, "
        f"0 duplicated, {sum(a != b for a, b in zip(found, wanted, strict=True))} differ; "
        f"attempts {tries(running, sweep_id)}"
    )
    assert done == SCALE.dispatcher_kills


def test_workers_are_killed(tmp_path: Path, say: Callable[[str], None]) -> None:
    with service(tmp_path) as (running, client):
        wanted = undisturbed(client, SCALE.worker_kills)
        sweep_id = submit(client, **spec(SCALE.worker_kills))
        engine = open_engine(running.database)
        with write(engine) as connection:  # more kills than a pack has attempts
            few = update(packs).where(packs.c.sweep_id == sweep_id)
            connection.execute(few.values(max_attempts=10 * SCALE.worker_kills))
        engine.dispose()
        done = 0
        while done < SCALE.worker_kills:
            wait_for(lambda: in_training(running, sweep_id) or is_over(client, sweep_id), 120)
            if is_over(client, sweep_id):
                break
            time.sleep(0.3)
            before = tries(running, sweep_id).get("failed", 0)
            if not (found := workers(running)):
                continue
            os.kill(found[done % len(found)], signal.SIGKILL)
            done += 1
            wait_for(lambda: tries(running, sweep_id).get("failed", 0) > before, 60)  # noqa: B023
        assert list(client.watch(sweep_id))[-1]["state"] == "completed"
        recorded_once(running, sweep_id, attempts=2, total=RUNS)
        ended = tries(running, sweep_id)
        assert digests(client, sweep_id) == wanted
        say(f"T3: {done} kills of Ray's workers, attempts {ended}, 0 differ")
        assert done == ended["failed"] == SCALE.worker_kills


@pytest.mark.skipif(not IS_FULL, reason="tests/system/test_kill.py is the short form")
@pytest.mark.parametrize("part", ["gcs_server", "raylet"])
def test_a_part_of_ray_is_killed(part: str, tmp_path: Path, say: Callable[[str], None]) -> None:
    with service(tmp_path) as (running, client):
        wanted = undisturbed(client, SCALE.ray_kills)
        sweep_id = submit(client, **spec(SCALE.ray_kills))
        waited: list[float] = []
        refused = 0
        for _ in range(SCALE.ray_kills):
            wait_for(lambda: in_training(running, sweep_id), 120)
            time.sleep(PACE_S)
            dispatcher = running.child("dispatcher")
            (victim,) = [pid for pid in descendants(dispatcher) if executable(pid) == part]
            os.kill(victim, signal.SIGKILL)
            killed = time.monotonic()
            while running.child("dispatcher") == dispatcher:
                refused += not client.ready()
                time.sleep(0.2)
            wait_for(lambda: in_training(running, sweep_id) or is_over(client, sweep_id), 120)
            waited.append(time.monotonic() - killed)
        assert list(client.watch(sweep_id))[-1]["state"] == "completed"
        recorded_once(running, sweep_id, attempts=2, total=RUNS)
        assert digests(client, sweep_id) == wanted
        say(
            f"T4: {SCALE.ray_kills} kills of {part}, training again after {max(waited):.0f} s at the most, "
            f"the API away {refused} times, 0 differ; attempts {tries(running, sweep_id)}"
        )
        assert refused == 0
