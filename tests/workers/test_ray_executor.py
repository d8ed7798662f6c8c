"""Packs on a private Ray: nothing is lost, nothing runs twice, nothing is left behind."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

import workers.ray_executor
from tests.workers.contract import ExecutorContract
from tests.workers.packs import (
    ENDLESS,
    all_bits,
    collect,
    expected,
    progress_of,
    task,
    wait_for_progress,
)
from workers.actor import CONTROL, PackActor
from workers.local import LocalExecutor
from workers.protocol import (
    LOG_BYTES,
    Executor,
    LastEvent,
    PackEvent,
    PackFailed,
    PackFinished,
    PackProgress,
    PackStarted,
    PackStopped,
    Pool,
    WorkerOptions,
)
from workers.ray_cluster import ray
from workers.ray_executor import RayExecutor

pytestmark = pytest.mark.ray

SLOTS = 2
SECRETS = ("DDPSWEEP_DATABASE_URL", "DDPSWEEP_TOKEN", "PGPASSWORD", "POSTGRES_PASSWORD")
HIDDEN = "postgresql://someone:a-secret@localhost/ddpsweep"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayExecutor]:
    with pytest.MonkeyPatch.context() as patch:
        for name in SECRETS:
            patch.setenv(name, HIDDEN)
        folder = tmp_path_factory.mktemp("states")
        executor = RayExecutor(slots=SLOTS, options=WorkerOptions(checkpoints=str(folder)))
        assert all(os.environ[name] == HIDDEN for name in SECRETS)  # this process keeps them
    yield executor
    executor.close()


@pytest.fixture
def executor(shared: RayExecutor) -> Iterator[RayExecutor]:
    """The module's executor; whatever a test has left in training is cancelled."""
    yield shared
    for attempt in list(shared._attempts.values()):
        shared.cancel(attempt.task.pack_id, attempt.task.attempt)


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
    return named(f"PackActor{state}")


def named(name: str) -> list[psutil.Process]:
    """The processes of this process's Ray whose actors have such a name."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(f"ray::{name}"):
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
        assert progress_of([e for e in events if e.pack_id == one.pack_id]) == progress_of(alone)
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
    assert not any(isinstance(event, LastEvent) for event in progress)
    assert isinstance(failed, PackFailed)
    assert (failed.pack_id, failed.attempt, failed.retryable) == (3, 1, True)
    assert failed.reason.startswith("worker lost: ")
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
    ends = {event.pack_id: event for event in events if isinstance(event, LastEvent)}
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


def test_its_ports_are_reached_from_this_machine_alone(executor):
    collect_one(executor)
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    bound = {
        (process.name(), one.laddr.ip)
        for process in processes
        for one in process.net_connections(kind="inet")
        if one.status == psutil.CONN_LISTEN
    }
    assert {"gcs_server", "raylet"} <= {name for name, _ in bound}
    assert {ip.removeprefix("::ffff:") for _, ip in bound} <= {"127.0.0.1", "::1"}
    assert [node.name for node in executor.nodes()] == ["127.0.0.1"]


def test_what_it_has(executor):
    (node,) = executor.nodes()
    assert (node.pool, node.devices) == (Pool(), SLOTS)
    assert executor.cluster.startswith("private-")


# --- stopping ---


def collect_one(executor: RayExecutor, pack_id: int = 1) -> list[PackEvent]:
    executor.submit(task(pack_id))
    return collect(executor, ends=1)


@pytest.fixture
def with_actor(
    executor: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[type], RayExecutor]]:
    """The executor with other workers."""

    def let_go() -> None:
        for worker in [*executor._idle, *executor._fresh]:
            executor._let_go(worker)

    def change(actor_class: type) -> RayExecutor:
        let_go()
        made = ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={CONTROL: 1})(actor_class)
        monkeypatch.setattr(executor, "_actor_class", made)
        return executor

    yield change
    for attempt in list(executor._attempts.values()):
        executor.cancel(attempt.task.pack_id, attempt.task.attempt)
    let_go()


def test_a_worker_that_has_stopped_is_there_for_the_next_pack(executor):
    for pack_id in (31, 32):
        collect_one(executor, pack_id)
    executor.submit(task(33, steps=ENDLESS, eval_every=100))
    wait_for_progress(executor, {33})
    (worker,) = actors(".train")
    executor.stop(33, 1)
    *_, stopped = collect(executor, ends=1)
    assert isinstance(stopped, PackStopped)
    assert stopped.kept
    assert runs(worker)
    collect_one(executor, 34)
    assert runs(worker)


def test_what_does_not_stop_is_killed(with_actor, monkeypatch):
    class Deaf(PackActor):
        def stop(self, pack_id, attempt):
            pass

    executor = with_actor(Deaf)
    monkeypatch.setattr(workers.ray_executor, "STOP_S", 1.0)
    executor.submit(task(35, steps=ENDLESS, eval_every=100))
    wait_for_progress(executor, {35})
    (worker,) = [process for process in actors() + named("Deaf") if process.status() != "zombie"]
    executor.stop(35, 1)
    asked = time.monotonic()
    *_, stopped = collect(executor, ends=1)
    assert stopped == PackStopped(35, 1, kept=False)
    assert time.monotonic() - asked >= 1.0
    assert eventually(lambda: not runs(worker))
    assert list(executor.poll(0.2)) == []


def test_a_worker_that_dies_of_being_stopped_has_stopped(with_actor):
    class Fragile(PackActor):
        def stop(self, pack_id, attempt):
            os._exit(1)

    executor = with_actor(Fragile)
    executor.submit(task(36, steps=ENDLESS, eval_every=100))
    wait_for_progress(executor, {36})
    executor.stop(36, 1)
    assert collect(executor, ends=1)[-1] == PackStopped(36, 1, kept=False)


def test_a_talkative_pack_waits_for_no_one_when_it_is_stopped(executor):
    """Events of its own and of others come in their order, and nothing after the end."""
    for pack_id in (37, 38):
        executor.submit(task(pack_id, steps=ENDLESS, eval_every=1))
    wait_for_progress(executor, {37, 38})
    executor.stop(37, 1)
    events = collect(executor, ends=1)
    wait_for_progress(executor, {38})
    steps = [event.step for event in events if event.pack_id == 37 and isinstance(event, PackProgress)]
    assert steps == sorted(steps)
    assert isinstance([event for event in events if event.pack_id == 37][-1], PackStopped)


# --- logs ---


def test_what_is_written_comes_with_the_events(with_actor):
    class Talker(PackActor):
        def train(self, task):
            sys.stdout.write("not this: it is before the pack\n")
            for number, event in enumerate(super().train(task)):
                yield event
                print("printed", number)  # noqa: T201
                print("complained", number, file=sys.stderr)  # noqa: T201
                logging.getLogger("ddpnopt.something").info("logged %d", number)
                os.write(1, b"raw \x00 \xff\n")
                ctypes.CDLL(None).puts(b"from C")

    executor = with_actor(Talker)
    started, *events = collect_one(executor)
    assert isinstance(started, PackStarted)
    assert "3 runs on wine for 10 steps" in events[0].log
    for number, event in enumerate(events):
        lines = event.log.splitlines()
        expected = [f"printed {number}", f"complained {number}", "raw \ufffd \ufffd", "from C"]
        assert [line for line in lines if line in expected] == expected
        assert sum(f"INFO ddpnopt.something: logged {number}" in line for line in lines) == 1
    assert "done after" in events[-1].log
    assert not any("not this" in event.log or ":actor_name:" in event.log for event in events)


def test_a_log_has_an_end_and_the_file_too(with_actor):
    class Flood(PackActor):
        def train(self, task):
            for number, event in enumerate(super().train(task)):
                yield event
                for _ in range(6):
                    os.write(2, b"x" * 2**20)
                sys.stdout.write(f"end {number}\n")

    executor = with_actor(Flood)
    _, *events = collect_one(executor)
    (worker,) = named("Flood")
    for number, event in enumerate(events):
        assert len(event.log.encode()) <= LOG_BYTES
        assert len(event.log) > LOG_BYTES // 2
        assert f"end {number}\n" in event.log
    # What came after the last event is there until the next pack begins.
    assert os.stat(f"/proc/{worker.pid}/fd/2").st_size < 7 * 2**20
    assert os.readlink(f"/proc/{worker.pid}/fd/1") == os.readlink(f"/proc/{worker.pid}/fd/2")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."), "memory"),
        (ray.exceptions.NodeDiedError("it died"), "its node died"),
        (ray.exceptions.WorkerCrashedError(), "WorkerCrashedError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_why_a_worker_was_lost(error, reason):
    assert reason in workers.ray_executor._what_happened(error)


OWN_RAY = """
import json
import sys
import psutil
from tests.workers.packs import collect, task, wait_for_progress
from workers.ray_executor import RayExecutor

executor = RayExecutor(slots=1)
executor.submit(task())
collect(executor, ends=1)
executor.submit(task(2, steps=10_000_000, eval_every=100))
wait_for_progress(executor, {2})
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


LOSES_ITS_RAYLET = """
import os
import psutil
import workers.ray_cluster
from tests.workers.packs import ENDLESS, task, wait_for_progress
from workers.protocol import ExecutorLostError
from workers.ray_executor import RayExecutor

workers.ray_cluster.NOTICE_S = 0.0  # Ray itself has no time to notice
executor = RayExecutor(slots=1)
executor.submit(task(steps=ENDLESS))
wait_for_progress(executor, {1})
(raylet,) = [p for p in psutil.Process().children(recursive=True) if p.name() == "raylet"]
raylet.kill()
events = []
try:
    while not events:
        events += [e for e in executor.poll(1.0) if type(e).__name__ != "PackProgress"]
    print(events, flush=True)
except ExecutorLostError as error:
    print("lost:", error, flush=True)
os._exit(0)
"""


def test_the_loss_of_the_raylet_is_not_a_packs_failure():
    """It would cost the pack an attempt each time."""
    said = subprocess.run(
        [sys.executable, "-c", LOSES_ITS_RAYLET], capture_output=True, text=True, timeout=120
    )
    *_, last = said.stdout.splitlines()  # Ray itself prints there too
    assert last == "lost: the raylet of this node has died", said.stderr[-2000:]
