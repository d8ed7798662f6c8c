"""The whole service on a GPU of this machine. Skipped where torch sees none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from service.client import Client
from service.db.engine import open_engine, read
from service.db.tables import attempts, sweeps
from tests.system.conftest import Running, start, stop, wait_for
from tests.system.test_actions import until, workers
from tests.system.test_kill import SPEC, digests, recorded_once, submit, wait_until_training

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.ray, pytest.mark.gpu]

CHANGES: dict[str, Any] = {"training": SPEC["training"] | {"steps": 1500}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    memory = torch.cuda.get_device_properties(0).total_memory
    home = tmp_path_factory.mktemp("gpu") / "home"
    running = start(home, DDPSWEEP_GPUS="1", DDPSWEEP_GPU_MEMORY=str(memory), DDPSWEEP_CHECKPOINT_EVERY="0.5")
    yield running
    assert stop(running) == 0


@pytest.fixture
def client(service: Running) -> Iterator[Client]:
    with Client(service.url) as client:
        yield client


@pytest.fixture(scope="module")
def undisturbed(service: Running) -> list[tuple[Any, ...]]:
    with Client(service.url) as client:
        sweep_id = submit(client, **CHANGES)
        assert list(client.watch(sweep_id))[-1]["state"] == "completed"
        return digests(client, sweep_id)


def test_a_sweep_trains_on_the_gpu(
    service: Running, client: Client, undisturbed: list[tuple[Any, ...]]
) -> None:
    (node,) = client.cluster()["nodes"]
    assert (node["kind"], node["devices"]) == ("gpu", 1)
    engine = open_engine(service.database)
    with read(engine) as connection:
        ((device, pool, share),) = connection.execute(
            attempts.select().with_only_columns(attempts.c.device, attempts.c.pool, attempts.c.share)
        )
        ((kind, pack_share),) = connection.execute(
            sweeps.select().with_only_columns(sweeps.c.device_kind, sweeps.c.pack_share)
        )
    engine.dispose()
    assert device == torch.cuda.get_device_name(0)
    assert pool.startswith("gpu/")
    assert kind == "gpu"
    assert share == pack_share < 1
    assert len(undisturbed) == 120


def test_pause_and_resume(service: Running, client: Client, undisturbed: list[tuple[Any, ...]]) -> None:
    sweep_id = submit(client, **CHANGES)
    wait_until_training(service, sweep_id)
    client.pause(sweep_id)
    until(client, sweep_id, "paused")
    client.resume(sweep_id)
    assert list(client.watch(sweep_id))[-1]["state"] == "completed"
    recorded_once(service, sweep_id, attempts=2)
    assert digests(client, sweep_id) == undisturbed


def test_small_packs_share_the_gpu(client: Client) -> None:
    # Long enough for the second one's worker to be there before the first one ends.
    longer = {"training": SPEC["training"] | {"steps": 8000}}
    both = [submit(client, **longer) for _ in range(2)]

    def in_training() -> set[str]:
        return {pack["sweep_id"] for pack in client.cluster()["packs"] if 0 < pack["step"] < pack["steps"]}

    wait_for(lambda: in_training() == set(both), 90)
    for sweep_id in both:
        assert list(client.watch(sweep_id))[-1]["state"] == "completed"
    assert digests(client, both[0]) == digests(client, both[1])


def test_cancel(service: Running, client: Client) -> None:
    sweep_id = submit(client, **CHANGES)
    wait_until_training(service, sweep_id)
    client.cancel(sweep_id)
    until(client, sweep_id, "cancelled")
    wait_for(lambda: not workers(service), 30)


def test_the_same_sweep_again_trains_nothing(service: Running, client: Client) -> None:
    changes = {"reuse": True, "training": SPEC["training"] | {"steps": 100}}
    first, second = (list(client.watch(submit(client, **changes)))[-1] for _ in range(2))
    assert first["usage"]["run_steps"] == 120 * 100
    assert (second["usage"]["run_steps"], second["progress"]["runs_reused"]) == (0, 120)
    assert digests(client, first["id"]) == digests(client, second["id"])
