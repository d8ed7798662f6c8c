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
    # Some seconds of training: what is killed has to be in the middle of something.
    "training": {"steps": 8_000, "batch_size": 16, "eval_every": 100},
    "seeds": 10,
    "reuse": False,  # else the second of two equal sweeps is not trained
    "grids": [{"baseline": "sgd", "learning_rate": [0.4, 0.6, 0.7], "vxx_reg": [5e-5, 1e-4, 1e-3]}],
}


def submit(client: Client, **changes: Any) -> str:
    return str(client.submit(json.dumps(SPEC | changes).encode(), "application/json")["id"])


def wait_until_training(service: Running, sweep_id: str, attempt: int = 1) -> None:
    """Wait until a pack has got somewhere in so many attempts, and is not over."""
    engine = open_engine(service.database)
    in_training = select(packs.c.id).where(
        packs.c.sweep_id == sweep_id,
        packs.c.state == "running",
        packs.c.attempt >= attempt,
        packs.c.step > 0,
        packs.c.step < packs.c.steps,
    )

    def look() -> bool:
        with read(engine) as connection:
            return connection.execute(in_training).first() is not None

    wait_for(look, 90)
    engine.dispose()


def digests(client: Client, sweep_id: str) -> list[tuple[Any, ...]]:
    keys = ("method", "learning_rate", "vxx_reg", "seed", "weights_digest", "train_loss", "accuracy")
    return [tuple(run[key] for key in keys) for run in client.runs(sweep_id)]


def recorded_once(service: Running, sweep_id: str, attempts: int = 1, total: int = 120) -> None:
    """Check that every run has one result, and that it took at least so many attempts at some pack."""
    engine = open_engine(service.database)
    with read(engine) as connection:
        of_sweep = select(func.count(), func.count(results.c.run_id)).select_from(
            runs.outerjoin(results, results.c.run_id == runs.c.id)
        )
        rows, recorded = connection.execute(of_sweep.where(runs.c.sweep_id == sweep_id)).one()
        of_packs = select(packs.c.state, packs.c.attempt).where(packs.c.sweep_id == sweep_id)
        states, tried = zip(*connection.execute(of_packs), strict=True)
    assert rows == recorded == total
    assert set(states) == {"completed"}
    assert max(tried) >= attempts


def test_kill_the_dispatcher_in_mid_sweep(fragile_service: Running) -> None:
    with Client(fragile_service.url) as client:
        undisturbed = submit(client)
        assert list(client.watch(undisturbed))[-1]["state"] == "completed"
        sweep_id = submit(client)
        for attempt in (1, 2):
            wait_until_training(fragile_service, sweep_id, attempt)
            dispatcher = fragile_service.child("dispatcher")
            family = descendants(dispatcher)
            os.kill(dispatcher, signal.SIGKILL)
            wait_for(lambda: not any(map(is_running, family)), 30)  # noqa: B023 - waited for within the turn
            wait_for(lambda: fragile_service.child("dispatcher") != dispatcher, 30)  # noqa: B023
        last = list(client.watch(sweep_id))[-1]
        assert (last["state"], last["progress"]["runs_done"]) == ("completed", 120)
        recorded_once(fragile_service, sweep_id, attempts=3)
        assert digests(client, sweep_id) == digests(client, undisturbed)


def test_a_killed_pack_goes_on_from_where_its_state_was_kept(tmp_path: Path) -> None:
    service = start(tmp_path / "home", DDPSWEEP_CHECKPOINT_EVERY="0.2")
    states = service.home / "checkpoints"
    try:
        with Client(service.url) as client:
            undisturbed = submit(client)
            list(client.watch(undisturbed))
            assert list(states.iterdir()) == []  # none outlives its pack
            sweep_id = submit(client)
            third = 120 * SPEC["training"]["steps"] // 3
            wait_for(lambda: steps_done(client, sweep_id) > third and any(states.glob("*.pt")), 120)
            before = steps_done(client, sweep_id)
            dispatcher = service.child("dispatcher")
            os.kill(dispatcher, signal.SIGKILL)
            wait_for(lambda: service.child("dispatcher") != dispatcher, 30)
            seen = set()
            while client.sweep(sweep_id)["state"] != "completed":
                seen.add(steps_done(client, sweep_id))
            # From nothing it would come by small numbers again; a pack is cut off between two states.
            assert seen
            assert not [steps for steps in seen if 0 < steps < before / 4]
            recorded_once(service, sweep_id, attempts=2)
            assert digests(client, sweep_id) == digests(client, undisturbed)
    finally:
        assert stop(service) == 0


def steps_done(client: Client, sweep_id: str) -> int:
    return int(client.sweep(sweep_id)["progress"]["run_steps_done"])


@pytest.mark.parametrize("part", ["gcs_server", "raylet"])
def test_kill_a_part_of_ray_in_mid_sweep(fragile_service: Running, part: str) -> None:
    with Client(fragile_service.url) as client:
        # Long enough to be in the middle of it when the loss is noticed: packs train on until then.
        sweep_id = submit(client, training=SPEC["training"] | {"steps": 40_000, "eval_every": 500})
        wait_until_training(fragile_service, sweep_id)
        dispatcher = fragile_service.child("dispatcher")
        (victim,) = [pid for pid in descendants(dispatcher) if executable(pid) == part]
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: fragile_service.child("dispatcher") != dispatcher, 90)
        last = list(client.watch(sweep_id))[-1]
        assert (last["state"], last["progress"]["runs_done"]) == ("completed", 120)
        recorded_once(fragile_service, sweep_id, attempts=2)


def executable(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode().rpartition("/")[2]


def test_kill_everything_and_start_again(fragile_service: Running) -> None:
    with Client(fragile_service.url) as client:
        sweep_id = submit(client)
        wait_until_training(fragile_service, sweep_id)
    family = descendants(fragile_service.process.pid)
    fragile_service.process.kill()
    fragile_service.process.wait()
    wait_for(lambda: not any(map(is_running, family)), 60)
    again = start(fragile_service.home)
    try:
        with Client(again.url) as client:
            assert list(client.watch(sweep_id))[-1]["state"] == "completed"
            recorded_once(again, sweep_id, attempts=2)
    finally:
        assert stop(again) == 0


def test_stopping_leaves_nothing_behind_and_nothing_leased(fragile_service: Running) -> None:
    with Client(fragile_service.url) as client:
        sweep_id = submit(client, training=SPEC["training"] | {"steps": 100_000, "eval_every": 1000})
        wait_until_training(fragile_service, sweep_id)
    family = descendants(fragile_service.process.pid)
    assert stop(fragile_service) == 0
    wait_for(lambda: not any(map(is_running, family)), 30)
    engine = open_engine(fragile_service.database)
    with read(engine) as connection:
        assert set(connection.scalars(select(packs.c.state))) == {"queued"}


def test_kill_the_api(fragile_service: Running) -> None:
    with Client(fragile_service.url) as client:
        sweep_id = submit(client)
        wait_until_training(fragile_service, sweep_id)
        os.kill(fragile_service.child("api"), signal.SIGKILL)
        wait_for(client.ready, 30)
        assert list(client.watch(sweep_id))[-1]["state"] == "completed"
        recorded_once(fragile_service, sweep_id)
