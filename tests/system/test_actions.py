"""Pause, resume, cancel and retry a sweep in training: its results are those of an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from service.client import Client
from service.db.engine import open_engine, write
from service.db.tables import packs
from tests.chaos.scale import IS_FULL
from tests.system.conftest import Running, descendants, start, stop, wait_for
from tests.system.test_kill import SPEC, digests, recorded_once, steps_done, submit, wait_until_training

pytestmark = pytest.mark.ray

PAUSE_S = 60 if IS_FULL else 2


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = start(tmp_path_factory.mktemp("actions") / "home")
    yield running
    assert stop(running) == 0


@pytest.fixture
def client(service: Running) -> Iterator[Client]:
    with Client(service.url) as client:
        yield client


@pytest.fixture(scope="module")
def undisturbed(service: Running) -> list[tuple[Any, ...]]:
    with Client(service.url) as client:
        sweep_id = submit(client)
        assert list(client.watch(sweep_id))[-1]["state"] == "completed"
        return digests(client, sweep_id)


def until(client: Client, sweep_id: str, state: str) -> dict[str, Any]:
    wait_for(lambda: client.sweep(sweep_id)["state"] == state, 30)
    return client.sweep(sweep_id)


def workers(service: Running) -> list[int]:
    """The processes that train a pack."""
    found = []
    for pid in descendants(service.process.pid):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if command.startswith("ray::PackActor.train"):
            found.append(pid)
    return found


@pytest.mark.chaos
def test_pause_and_resume(service: Running, client: Client, undisturbed: list[tuple[Any, ...]]) -> None:
    sweep_id = submit(client)
    for _ in range(2):
        wait_until_training(service, sweep_id)
        assert client.pause(sweep_id)["state"] == "pausing"
        paused = until(client, sweep_id, "paused")
        assert paused["packs_running"] == 0
        wait_for(lambda: not workers(service), 30)
        before = client.sweep(sweep_id)["usage"]
        time.sleep(PAUSE_S)
        assert client.sweep(sweep_id)["usage"] == before
        assert client.resume(sweep_id)["state"] == "running"
    last = list(client.watch(sweep_id))[-1]
    assert last["state"] == "completed"
    recorded_once(service, sweep_id, attempts=3)
    assert digests(client, sweep_id) == undisturbed
    # What was done before a pause was not done again.
    assert last["usage"]["run_steps"] == last["progress"]["run_steps_total"]


def test_cancel_and_retry(service: Running, client: Client, undisturbed: list[tuple[Any, ...]]) -> None:
    sweep_id = submit(client)
    wait_until_training(service, sweep_id)
    assert client.cancel(sweep_id)["state"] == "cancelling"
    cancelled = until(client, sweep_id, "cancelled")
    assert cancelled["progress"]["runs_done"] == 0
    wait_for(lambda: not workers(service), 30)
    assert client.cancel(sweep_id)["state"] == "cancelled"
    assert client.retry(sweep_id)["actions"] == ["pause", "cancel"]
    assert list(client.watch(sweep_id))[-1]["state"] == "completed"
    recorded_once(service, sweep_id, attempts=2)
    assert digests(client, sweep_id) == undisturbed


def test_retry_of_a_failed_pack(service: Running, client: Client, undisturbed: list[tuple[Any, ...]]) -> None:
    sweep_id = submit(client)
    engine = open_engine(service.database)
    with write(engine) as connection:
        connection.execute(update(packs).where(packs.c.sweep_id == sweep_id).values(max_attempts=1))
    engine.dispose()
    wait_for(lambda: len(workers(service)) > 0 and steps_done(client, sweep_id) > 0, 60)
    victim = workers(service)[0]
    os.kill(victim, signal.SIGKILL)
    failed = list(client.watch(sweep_id))[-1]
    assert (failed["state"], failed["failed_packs"]) == ("failed", 1)
    assert failed["error"].startswith("worker lost")
    (pack,) = client.packs(sweep_id, state="failed")
    assert pack["attempts"][-1]["outcome"] == "failed"
    said = client.log(sweep_id, pack["pack"])["log"]
    assert f"pack {sweep_id}/{pack['pack']}, attempt 1: " in said
    assert "runs on digits for 8000 steps" in said
    client.retry(sweep_id)
    assert list(client.watch(sweep_id))[-1]["state"] == "completed"
    recorded_once(service, sweep_id, attempts=2)
    assert digests(client, sweep_id) == undisturbed


def test_the_same_sweep_again_trains_nothing(service: Running, client: Client) -> None:
    changes = {"reuse": True, "training": SPEC["training"] | {"steps": 100}}
    first, second = (list(client.watch(submit(client, **changes)))[-1] for _ in range(2))
    assert first["usage"]["run_steps"] == 120 * 100
    assert (second["usage"]["run_steps"], second["progress"]["runs_reused"]) == (0, 120)
    panels = [client.heatmap_json(sweep["id"], metric="train_loss")["cells"] for sweep in (first, second)]
    assert panels[0] == panels[1]


def test_the_cluster_tells_what_runs_for_whom(service: Running, client: Client) -> None:
    client.put_team("watched", weight=2.0, max_devices=1.0)
    body = json.dumps(SPEC | {"name": "for the cluster's page"}).encode()
    sweep_id = client.submit(body, "application/json", team="watched")["id"]
    wait_until_training(service, sweep_id)
    view = client.cluster()
    (node,) = view["nodes"]
    assert node["devices"] == os.cpu_count()
    (pack,) = view["packs"]  # by its quota
    assert (pack["sweep_id"], pack["team"]) == (sweep_id, "watched")
    assert pack["node"] == node["name"]
    client.cancel(sweep_id)
    until(client, sweep_id, "cancelled")
    (team,) = [team for team in client.cluster()["teams"] if team["name"] == "watched"]
    assert team["device_seconds"] > 0
