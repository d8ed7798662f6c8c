"""Clusters to join: their pools and labels, who else uses them, and those that are refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.workers import namespace
from tests.workers.packs import collect, task, wait_for_progress
from workers.placement import DEVICE_LABEL, TEAM_LABEL
from workers.protocol import (
    PackEvent,
    PackFailed,
    PackFinished,
    PackStarted,
    PackStopped,
    PackTask,
    Pool,
)

pytestmark = pytest.mark.ray

PLAIN, LABELLED = Pool(), Pool("cpu", "A")
REDS, GPUS = Pool("cpu", "A", "red"), Pool("gpu", "H100")

SECOND = """
import sys
from tests.workers import namespace
from tests.workers.packs import collect, task
from workers.protocol import PackFinished
from workers.ray_executor import RayExecutor

executor = RayExecutor(namespace.HEAD)
print(executor.cluster)
executor.submit(task(50))
assert isinstance(collect(executor, ends=1)[-1], PackFinished)
executor.close()
"""


def endless(pack_id: int, pool: Pool, share: float = 1.0) -> PackTask:
    return replace(task(pack_id, steps=10_000_000, eval_every=1000), pool=pool, share=share)


def places(events: Sequence[PackEvent]) -> dict[int, str]:
    return {event.pack_id: event.node for event in events if isinstance(event, PackStarted)}


def pools_are_kept_apart() -> None:
    """One node per pool, and twice as many packs as devices."""
    from workers.actor import PackActor
    from workers.ray_executor import IDLE_S, RayExecutor

    class OnItsShare(PackActor):
        """Trains on a CPU what is meant for a GPU that this machine does not have."""

        def __init__(self, options, device, share, *, alone):
            self.given = device, share, os.environ.get("CUDA_VISIBLE_DEVICES")
            super().__init__(options, alone=alone)

        def train(self, task):
            if task.pool.kind == "gpu":
                assert self.given == ("cuda", task.share, "0"), self.given
            else:
                assert self.given[:2] == ("cpu", 1.0), self.given
            yield from super().train(task)

    namespace.start_head()
    namespace.start_node("--num-cpus=1")
    namespace.start_node("--num-cpus=1", f"--labels={DEVICE_LABEL}=A")
    namespace.start_node("--num-cpus=1", f"--labels={DEVICE_LABEL}=A,{TEAM_LABEL}=red")
    namespace.start_node("--num-cpus=2", "--num-gpus=1", f"--labels={DEVICE_LABEL}=H100")
    executor = RayExecutor(namespace.HEAD, backlog=2, actor_class=OnItsShare)
    assert executor.backlog() == 2
    of_pool = {node.pool: node.name for node in executor.nodes() if node.devices}
    assert of_pool.keys() == {PLAIN, LABELLED, REDS, GPUS}
    assert all(node.devices in (0, 1) for node in executor.nodes())

    pools = dict(enumerate([PLAIN, LABELLED, REDS]))
    for pack_id, pool in pools.items():
        executor.submit(endless(pack_id, pool))
    executor.submit(endless(10, GPUS, 0.5))
    executor.submit(endless(11, GPUS, 0.5))
    for pack_id, pool in pools.items():
        executor.submit(endless(20 + pack_id, pool))  # for these there is no device
    executor.submit(endless(30, Pool("cpu", "B")))  # and for this one no node
    events = wait_for_progress(executor, {*pools, 10, 11})
    expected = {pack_id: of_pool[pool] for pack_id, pool in pools.items()}
    expected |= {10: of_pool[GPUS], 11: of_pool[GPUS]}
    assert places(events) == expected

    # A device that is free again goes to who waits for it, on the very worker that had it.
    executor.stop(0, 1)
    events = wait_until_started(executor, 20)
    assert places(events) == {20: of_pool[PLAIN]}
    (stopped,) = [event for event in events if isinstance(event, PackStopped)]
    assert (stopped.pack_id, stopped.attempt, stopped.kept) == (0, 1, False)
    for pack_id in (20, 21, 22, 1, 2, 30):
        executor.cancel(pack_id, 1)

    # A worker for half a GPU makes room for one that wants it all.
    for pack_id in (10, 11):
        executor.stop(pack_id, 1)
    assert all(isinstance(event, PackStopped) for event in collect(executor, ends=2)[-2:])
    assert len(executor._idle) == 2
    executor.submit(replace(task(12), pool=GPUS))
    *events, finished = collect(executor, ends=1)
    assert isinstance(finished, PackFinished), finished
    assert places(events) == {12: of_pool[GPUS]}

    executor.submit(replace(task(13), pool=Pool("cpu", "no such label!")))
    (failed,) = executor.poll(0.0)
    assert isinstance(failed, PackFailed)
    assert (failed.pack_id, failed.retryable) == (13, False)

    # Workers without a pack leave, and another dispatcher of the same cluster has all of the devices.
    assert executor._idle
    deadline = time.monotonic() + IDLE_S + 5
    while executor._idle:
        assert time.monotonic() < deadline
        executor.poll(0.2)
    second = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, timeout=60)
    assert second.returncode == 0, second.stderr
    assert second.stdout.split() == [executor.cluster]
    executor.close()


def wait_until_started(executor, pack_id: int) -> list[PackEvent]:
    events: list[PackEvent] = []
    deadline = time.monotonic() + 60
    while pack_id not in places(events):
        assert time.monotonic() < deadline, events
        events += executor.poll(0.2)
    return events


def clusters_are_refused() -> None:
    """Each for another reason, said in one line."""
    from workers import gcs, ray_cluster
    from workers.ray_executor import RayExecutor

    def refused(address: str) -> str:
        with pytest.raises(ConnectionError) as caught:
            RayExecutor(address)  # Ray itself would try for minutes, and this script has fewer
        assert address in str(caught.value)
        return namespace.one_line(caught.value)

    assert "no Ray cluster" in refused("127.0.0.1:6398")
    assert "host:port" in refused("auto")

    namespace.start_head(port=6397, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN=None)
    said = refused("127.0.0.1:6397")
    assert "asks for no token" in said
    assert "RAY_AUTH_MODE=token" in said
    assert "ray start --head --port=6397" in said
    namespace.stop_cluster()

    namespace.start_head()
    own = os.environ.pop("RAY_AUTH_TOKEN")
    os.environ["RAY_AUTH_TOKEN_PATH"] = "/nonexistent"
    assert "there is none here" in refused(namespace.HEAD)
    os.environ["RAY_AUTH_TOKEN"] = "f" * 64
    assert "refuses our token" in refused(namespace.HEAD)
    file = Path(os.environ["TEST_FOLDER"]) / "token"
    file.write_text(own + "\n")
    del os.environ["RAY_AUTH_TOKEN"]
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(file)
    assert gcs.token() == own
    gcs.check(namespace.HEAD)

    from ray._private import utils

    versions = utils.compute_version_info
    for version in (("1.0.0", versions()[1]), (versions()[0], "3.9.1")):
        utils.compute_version_info = lambda version=version: version
        said = refused(namespace.HEAD)
        assert "ersion mismatch" in said
        assert "install the same Ray and Python" in said
    utils.compute_version_info = versions

    name = ray_cluster.join(namespace.HEAD)
    assert name.startswith("session_")


def test_pools_are_kept_apart(tmp_path):
    namespace.run(pools_are_kept_apart, tmp_path)


def test_a_cluster_that_cannot_be_used_is_refused_and_says_why(tmp_path):
    namespace.run(clusters_are_refused, tmp_path)
