"""Packs on a private Ray: nothing is lost, nothing runs twice, nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.workers.contract import ExecutorContract
from tests.workers.packs import ENDLESS, all_bits, collect, expected, task, wait_for_progress
from workers.local import LocalExecutor
from workers.protocol import Executor, PackFailed, PackFinished, PackProgress
from workers.ray_executor import RayExecutor

pytestmark = pytest.mark.ray

SLOTS = 2
SECRETS = ("DDPSWEEP_DATABASE_URL", "DDPSWEEP_TOKEN", "PGPASSWORD", "POSTGRES_PASSWORD")
HIDDEN = "postgresql://someone:a-secret@localhost/ddpsweep"


@pytest.fixture(scope="module")
def shared() -> Iterator[RayExecutor]:
    with pytest.MonkeyPatch.context() as patch:
        for name in SECRETS:
            patch.setenv(name, HIDDEN)
        executor = RayExecutor(slots=SLOTS)
        assert all(os.environ[name] == HIDDEN for name in SECRETS)  # this process keeps them
    yield executor
    executor.close()


@pytest.fixture
def executor(shared: RayExecutor) -> Iterator[RayExecutor]:
    """The module's executor; whatever a test has left in training is cancelled."""
    yield shared
    for attempt in list(shared._attempts.values()):
        shared.cancel(attempt.task.pack_id, attempt.task.attempt)
    assert shared.free_slots() == SLOTS


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def actors(state: str = "") -> list[psutil.Process]:
    """The processes of this process's Ray that train, or can."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(f"ray::PackActor{state}"):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


class TestRayExecutor(ExecutorContract):
    @pytest.fixture
    def executor(self, executor):
        return executor


def test_two_packs_train_at_once_as_they_would_one_after_the_other(executor):
    for pack_id in (11, 12):
        executor.submit(task(pack_id, steps=ENDLESS, eval_every=100))
    assert executor.free_slots() == 0
    wait_for_progress(executor, {11, 12})
    assert len(actors(".train")) == 2
    for pack_id in (11, 12):
        executor.cancel(pack_id, 1)
    tasks = [task(pack_id, steps=1000, eval_every=100) for pack_id in (1, 2)]
    for one in tasks:
        executor.submit(one)
    events = collect(executor, ends=2)
    local: Executor = LocalExecutor()
    for one in tasks:
        local.submit(one)
        alone = collect(local, ends=1)
        assert [e for e in events if e.pack_id == one.pack_id and isinstance(e, PackProgress)] == alone[:-1]
        (finished,) = [e for e in events if e.pack_id == one.pack_id and isinstance(e, PackFinished)]
        assert isinstance(alone[-1], PackFinished)
        assert all_bits(finished.results) == all_bits(alone[-1].results)
        assert finished.environment.versions["threads"] == "1"


def test_workers_are_kept_for_the_packs_to_come(executor):
    seen = []
    for pack_id in range(4):
        executor.submit(task(pack_id))
        collect(executor, ends=1)
        seen.append({process.pid for process in actors()})
    assert 1 <= len(seen[0]) <= SLOTS
    assert seen == [seen[0]] * 4


def test_a_killed_worker_is_told_and_nothing_runs_again_by_itself(executor):
    executor.submit(task(pack_id=3, steps=ENDLESS, eval_every=100))
    wait_for_progress(executor, {3})
    (worker,) = actors(".train")
    worker.send_signal(signal.SIGKILL)
    *progress, failed = collect(executor, ends=1)
    assert all(isinstance(event, PackProgress) for event in progress)
    assert isinstance(failed, PackFailed)
    assert (failed.pack_id, failed.attempt, failed.retryable) == (3, 1, True)
    assert failed.reason.startswith("worker lost: ")
    assert executor.free_slots() == SLOTS
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        assert list(executor.poll(0.2)) == []
        assert actors(".train") == []
        time.sleep(0.1)
    again = task(pack_id=3, attempt=2)
    executor.submit(again)
    *_, finished = collect(executor, ends=1)
    assert isinstance(finished, PackFinished)
    assert finished.attempt == 2
    assert all_bits(finished.results) == expected(again)


def test_an_idle_worker_that_was_killed_costs_no_attempt(executor):
    for pack_id in (21, 22):
        executor.submit(task(pack_id, steps=ENDLESS, eval_every=100))
    wait_for_progress(executor, {21, 22})
    for pack_id in (21, 22):
        executor.cancel(pack_id, 1)
    for pack_id in (23, 24):
        executor.submit(task(pack_id))
    collect(executor, ends=2)
    idle = actors()
    assert len(idle) == 2
    for worker in idle:
        worker.send_signal(signal.SIGKILL)
    assert eventually(lambda: not any(map(runs, idle)))
    executor.submit(task(pack_id=25))
    *_, finished = collect(executor, ends=1)
    assert isinstance(finished, PackFinished)


def test_a_killed_worker_does_not_hurt_the_pack_beside_it(executor):
    beside = task(pack_id=8, steps=1000, eval_every=100)
    executor.submit(task(pack_id=9, steps=ENDLESS, eval_every=100))
    wait_for_progress(executor, {9})
    (worker,) = actors(".train")
    executor.submit(beside)
    wait_for_progress(executor, {8})
    worker.send_signal(signal.SIGKILL)
    events = collect(executor, ends=2)
    ends = {event.pack_id: event for event in events if not isinstance(event, PackProgress)}
    assert isinstance(ends[9], PackFailed)
    assert isinstance(ends[8], PackFinished)
    assert all_bits(ends[8].results) == expected(beside)


def test_an_idle_worker_that_died_costs_no_attempt(executor):
    executor.submit(task(pack_id=1))
    collect(executor, ends=1)
    for worker in actors():
        worker.send_signal(signal.SIGKILL)
        assert eventually(lambda worker=worker: not runs(worker))
    executor.submit(task(pack_id=2))
    *_, finished = collect(executor, ends=1)
    assert isinstance(finished, PackFinished)


def test_cancelling_ends_the_process(executor):
    executor.submit(task(pack_id=5, steps=ENDLESS, eval_every=100))
    wait_for_progress(executor, {5})
    (worker,) = actors(".train")
    executor.cancel(5, 1)
    assert eventually(lambda: not runs(worker))


def test_no_secret_is_in_the_environment_of_rays_processes(executor):
    import ray

    inside = ray.get(ray.remote(num_cpus=1, max_retries=0)(lambda: dict(os.environ)).remote())
    assert inside["RAY_AUTH_MODE"] == "token"
    assert not set(SECRETS) & set(inside)
    assert HIDDEN not in inside.values()
    environments = {
        process.name(): process.environ() for process in psutil.Process().children(recursive=True)
    }
    assert {"gcs_server", "raylet"} <= set(environments)
    for name, environment in environments.items():
        assert HIDDEN not in environment.values(), name
        assert not set(SECRETS) & set(environment), name
    assert environments["raylet"]["PATH"] == os.environ["PATH"]


OWN_RAY = """
import json
import sys
import psutil
from tests.workers.packs import collect, task
from workers.ray_executor import RayExecutor

executor = RayExecutor(slots=1)
executor.submit(task())
collect(executor, ends=1)
executor.submit(task(2, steps=10_000_000, eval_every=100))
while not executor.poll(0.2):
    pass
processes = psutil.Process().children(recursive=True)
names = [(p.pid, p.cmdline()[0] if p.name().startswith("ray::") else p.name()) for p in processes]
print(json.dumps(names), flush=True)
sys.stdin.readline()
executor.close()
print("closed", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["close", "kill"])
def test_nothing_is_left_behind(end):
    """Neither by close nor by a death that leaves no time for it, with a pack in training.

    After such a death Ray's two agents look for their cluster for a minute before they end too.
    """
    driver = subprocess.Popen(
        [sys.executable, "-c", OWN_RAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdin is not None
    assert driver.stdout is not None
    all_processes: list[psutil.Process] = []
    try:
        processes = {psutil.Process(int(pid)): name for pid, name in json.loads(driver.stdout.readline())}
        assert {"gcs_server", "raylet", "ray::PackActor.train"} <= set(processes.values())
        all_processes = list(processes)
        if end == "close":
            driver.stdin.write("\n")
            driver.stdin.flush()
            assert driver.stdout.readline() == "closed\n"
        else:
            driver.kill()
            driver.wait(10)
            processes = {p: name for p, name in processes.items() if not name.endswith("Agent")}
        eventually(lambda: not any(map(runs, processes)))
        assert [name for process, name in processes.items() if runs(process)] == []
    finally:
        driver.kill()
        driver.communicate()
        for process in filter(runs, all_processes):
            process.kill()
