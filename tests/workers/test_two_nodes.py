"""A cluster of two nodes, one of which dies: its pack trains on the other one, to the same bits."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import psutil
import pytest

from tests.workers import namespace
from tests.workers.packs import all_bits, collect, expected, task, wait_for_progress
from workers.protocol import (
    LastEvent,
    PackFailed,
    PackFinished,
    PackProgress,
    PackStarted,
    Pool,
    WorkerOptions,
)

pytestmark = pytest.mark.ray

MINUTE_S = 60.0


def raylet_at(name: str) -> psutil.Process:
    """The raylet of a node, whose name ends with its port since both nodes share an address."""
    port = int(name.rpartition(":")[2])
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == "raylet" and any(
            one.laddr.port == port and one.status == psutil.CONN_LISTEN for one in process.net_connections()
        ):
            return process
    raise AssertionError(f"no raylet at {name}")


def training() -> list[int]:
    """The processes that train, whoever they do it for."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "ray::PackActor.train" in " ".join(process.info["cmdline"] or [])
    ]


def a_node_dies() -> None:
    """What is done on the cluster."""
    from workers.ray_executor import RayExecutor

    namespace.start_head()
    namespace.start_node("--num-cpus=1")
    namespace.start_node("--num-cpus=1")
    options = WorkerOptions(checkpoints=os.environ["TEST_FOLDER"], checkpoint_every=0.2)
    executor = RayExecutor(namespace.HEAD, options=options)
    nodes = executor.nodes()
    assert sorted(node.devices for node in nodes) == [0, 1, 1]
    assert {node.pool for node in nodes} == {Pool()}
    assert len({node.name for node in nodes}) == 3

    long = replace(task(1, steps=150_000, eval_every=1000), pool=Pool())
    executor.submit(long)
    executor.submit(replace(task(2, steps=10_000_000, eval_every=1000), pool=Pool()))
    events = wait_for_progress(executor, {1, 2})
    where = {event.pack_id: event.node for event in events if isinstance(event, PackStarted)}
    assert where.keys() == {1, 2}
    assert set(where.values()) == {node.name for node in nodes if node.devices}

    time.sleep(0.5)  # for a state to be kept
    raylet_at(where[1]).send_signal(signal.SIGKILL)
    ends = [event for event in collect(executor, ends=1, seconds=MINUTE_S) if isinstance(event, LastEvent)]
    (failed,) = ends
    assert isinstance(failed, PackFailed)
    assert (failed.pack_id, failed.attempt, failed.retryable) == (1, 1, True)
    assert failed.reason.startswith("worker lost: ")
    # Nobody works on for a cluster that believes the device to be free.
    assert namespace.eventually(lambda: len(training()) == 1)
    assert namespace.eventually(lambda: where[1] not in {node.name for node in executor.nodes()}, MINUTE_S)
    assert executor.problem() is None

    executor.cancel(2, 1)
    executor.submit(replace(long, attempt=2))
    started, first, *_, finished = collect(executor, ends=1)
    assert isinstance(started, PackStarted)
    assert started.node == where[2]
    assert isinstance(first, PackProgress)
    assert first.step > 0
    assert isinstance(finished, PackFinished)
    assert all_bits(finished.results) == expected(long)
    executor.close()


def test_a_pack_survives_the_death_of_its_node(tmp_path):
    namespace.run(a_node_dies, tmp_path)
