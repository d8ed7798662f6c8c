"""What is killed in mid-sweep comes back, and every run is recorded once, with the same results."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from service.client import Client
from service.db.engine import open_engine, read
from service.db.tables import packs, results, runs
from tests.system.conftest import Running, descendants, is_running, start, stop, wait_for

pytestmark = pytest.mark.ray

SPEC: dict[str, Any] = {
    "name": "killed",
    "dataset": "digits",
    "model": {"kind": "fcn", "hidden": [10, 10, 10, 10], "activation": "tanh"},
    "training": {"steps": 400, "batch_size": 16, "eval_every": 10},
    "seeds": 10,
    "grids": [{"baseline": "sgd", "learning_rate": [0.4, 0.6, 0.7], "vxx_reg": [5e-5, 1e-4, 1e-3]}],
}


def submit(client: Client, **changes: Any) -> str:
    return str(client.submit(json.dumps(SPEC | changes).encode(), "application/json")["id"])


def wait_until_training(client: Client, sweep_id: str) -> None:
    wait_for(lambda: client.sweep(sweep_id)["progress"]["run_steps_done"] > 0, 60)


def digests(client: Client, sweep_id: str) -> list[tuple[Any, ...]]:
    keys = ("method", "learning_rate", "vxx_reg", "seed", "weights_digest", "train_loss", "accuracy")
    return [tuple(run[key] for key in keys) for run in client.runs(sweep_id)]


def recorded_once(service: Running, sweep_id: str) -> None:
    engine = open_engine(f"sqlite:///{service.home / 'ddpsweep.db'}")
    with read(engine) as connection:
        of_sweep = select(func.count(), func.count(results.c.run_id)).select_from(
            runs.outerjoin(results, results.c.run_id == runs.c.id)
        )
        rows, recorded = connection.execute(of_sweep.where(runs.c.sweep_id == sweep_id)).one()
        states = set(connection.scalars(select(packs.c.state).where(packs.c.sweep_id == sweep_id)))
    assert rows == recorded == 120
    assert states == {"completed"}


def test_kill_the_dispatcher_in_mid_sweep(fragile_service: Running) -> None:
    with Client(fragile_service.url) as client:
        undisturbed = submit(client)
        assert list(client.watch(undisturbed))[-1]["state"] == "completed"
        sweep_id = submit(client)
        killed = 0
        for _ in range(2):
            wait_until_training(client, sweep_id)
            dispatcher = fragile_service.child("dispatcher")
            family = descendants(dispatcher)
            os.kill(dispatcher, signal.SIGKILL)
            killed += 1
            wait_for(lambda: not any(map(is_running, family)), 30)  # noqa: B023 - waited for within the turn
            wait_for(lambda: fragile_service.child("dispatcher") != dispatcher, 30)  # noqa: B023
        assert killed == 2
        last = list(client.watch(sweep_id))[-1]
        assert (last["state"], last["progress"]["runs_done"]) == ("completed", 120)
        recorded_once(fragile_service, sweep_id)
        assert digests(client, sweep_id) == digests(client, undisturbed)


@pytest.mark.parametrize("part", ["gcs_server", "raylet"])
def test_kill_a_part_of_ray_in_mid_sweep(fragile_service: Running, part: str) -> None:
    with Client(fragile_service.url) as client:
        sweep_id = submit(client, training=SPEC["training"] | {"steps": 800})
        wait_until_training(client, sweep_id)
        dispatcher = fragile_service.child("dispatcher")
        (victim,) = [pid for pid in descendants(dispatcher) if executable(pid) == part]
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: fragile_service.child("dispatcher") != dispatcher, 90)
        last = list(client.watch(sweep_id))[-1]
        assert (last["state"], last["progress"]["runs_done"]) == ("completed", 120)
        recorded_once(fragile_service, sweep_id)


def executable(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode().rpartition("/")[2]


def test_kill_everything_and_start_again(fragile_service: Running) -> None:
    with Client(fragile_service.url) as client:
        sweep_id = submit(client)
        wait_until_training(client, sweep_id)
    family = descendants(fragile_service.process.pid)
    fragile_service.process.kill()
    fragile_service.process.wait()
    wait_for(lambda: not any(map(is_running, family)), 60)
    again = start(fragile_service.home)
    try:
        with Client(again.url) as client:
            assert list(client.watch(sweep_id))[-1]["state"] == "completed"
            recorded_once(again, sweep_id)
    finally:
        assert stop(again) == 0


def test_stopping_leaves_nothing_behind_and_nothing_leased(fragile_service: Running) -> None:
    with Client(fragile_service.url) as client:
        sweep_id = submit(client, training=SPEC["training"] | {"steps": 20_000})
        wait_until_training(client, sweep_id)
    family = descendants(fragile_service.process.pid)
    assert stop(fragile_service) == 0
    assert not any(map(is_running, family))
    engine = open_engine(f"sqlite:///{fragile_service.home / 'ddpsweep.db'}")
    with read(engine) as connection:
        assert set(connection.scalars(select(packs.c.state))) == {"queued"}


def test_kill_the_api(fragile_service: Running) -> None:
    with Client(fragile_service.url) as client:
        sweep_id = submit(client)
        wait_until_training(client, sweep_id)
        os.kill(fragile_service.child("api"), signal.SIGKILL)
        wait_for(client.ready, 30)
        assert list(client.watch(sweep_id))[-1]["state"] == "completed"
        recorded_once(fragile_service, sweep_id)
