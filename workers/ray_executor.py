"""Train packs on Ray actors, with every retry of Ray's switched off: only SQL may start an attempt."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

# Ray reads these when it is imported, so they come first. RAY_AUTH_MODE: without a token, anyone who reaches
# a Ray port runs code there.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.exceptions import RayError

from workers.actor import PackActor
from workers.protocol import (
    ExecutorLostError,
    PackEvent,
    PackFailed,
    PackProgress,
    PackTask,
    WorkerOptions,
)

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES: Final = 256 * 2**20
"""Results are small; the default of a third of the memory would be taken from training."""

PROBE_EVERY_S: Final = 2.0
SILENCE_S: Final = 12.0
NOTICE_S: Final = 5.0
PING_S: Final = 2.0

SECRETS: Final = ("DDPSWEEP_", "PG", "POSTGRES_")
"""How variables begin that are none of Ray's business: workers inherit the environment of its processes."""
NO_SECRETS: Final = frozenset({"DDPSWEEP_DATA", "DDPSWEEP_LANES"})


@dataclass(slots=True)
class _Attempt:
    task: PackTask
    actor: Any
    events: Any  # ray.ObjectRefGenerator


@contextmanager
def _private_environment() -> Iterator[None]:
    """Start Ray's processes without secrets, and with files that only this user reads."""
    secret = {name for name in os.environ if name.startswith(SECRETS)} - NO_SECRETS
    hidden = {name: os.environ.pop(name) for name in secret}
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
        os.environ.update(hidden)


class _Probe:
    """Asks the cluster now and then for its CPUs, and whether this process's node still belongs to it.

    In a thread, since the question itself hangs for a minute when the head is gone.
    """

    def __init__(self) -> None:
        self._node = ray.get_runtime_context().get_node_id()
        self._answered = time.monotonic()
        self._alive = True
        self._stopped = threading.Event()
        self.cpus = 0
        self._look()
        threading.Thread(target=self._ask, name="ray-probe", daemon=True).start()

    def _look(self) -> None:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self.cpus = int(sum(node["Resources"].get("CPU", 0) for node in nodes))
        self._alive = any(node["NodeID"] == self._node for node in nodes)
        self._answered = time.monotonic()

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()

    def _ask(self) -> None:
        while self._alive and not self._stopped.wait(PROBE_EVERY_S):
            try:
                self._look()
            except Exception as error:
                log.warning("the Ray cluster does not answer: %r", error)

    def problem(self) -> str | None:
        """Say why the cluster is lost; None while it is not. Never blocks."""
        if not self._alive:
            return "this node is no longer part of the Ray cluster"
        if time.monotonic() - self._answered > SILENCE_S:
            return f"the Ray cluster has not answered for {SILENCE_S:.0f} s"
        return None

    def check(self, *, after_a_loss: bool = False) -> None:
        """Make sure that the cluster answers.

        Args:
            after_a_loss: wait until Ray has had the time to notice that the whole node is gone.

        Raises:
            ExecutorLostError: if it does not.
        """
        until = time.monotonic() + (NOTICE_S if after_a_loss else 0.0)
        while True:
            if problem := self.problem():
                raise ExecutorLostError(problem)
            if time.monotonic() >= until:
                return
            time.sleep(0.2)


class RayExecutor:
    """An executor over a Ray cluster.

    Args:
        address: of a cluster to join; None starts a private one on this machine, which ends with this
            process, however that ends.
        slots: packs at once; None takes the cluster's CPUs.
        options: of each worker.

    Raises:
        ConnectionError: if there is no cluster at the address.
    """

    def __init__(
        self, address: str | None = None, slots: int | None = None, options: WorkerOptions | None = None
    ) -> None:
        if address is None:
            # A private cluster has a token of its own, which lives in this process tree alone.
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        private: dict[str, Any] = {"num_cpus": slots, "object_store_memory": OBJECT_STORE_BYTES}
        with _private_environment():
            # address="local" and not None: a connected process elsewhere can make None join its cluster.
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                namespace="ddpsweep",
                **({} if address else private),
            )
        self._fixed_slots, self._options = slots, options
        self._probe = _Probe()
        self._actor_class = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(PackActor)
        self._idle: list[Any] = []
        self._fresh: list[Any] = []
        if address is None:
            # They load torch while nobody waits for it.
            self._fresh = [self._actor_class.remote(options) for _ in range(self.slots)]
        self._attempts: dict[tuple[int, int], _Attempt] = {}

    def problem(self) -> str | None:
        """Say why the cluster is lost; None while it is not. May be asked from any thread."""
        return self._probe.problem()

    @property
    def slots(self) -> int:
        """Packs that fit the cluster as it is now: nodes come and go."""
        return self._fixed_slots or self._probe.cpus

    def free_slots(self) -> int:
        """See `Executor`."""
        return max(0, self.slots - len(self._attempts))

    def submit(self, task: PackTask) -> None:
        """See `Executor`."""
        actor = self._free_actor()
        events = actor.train.options(num_returns="streaming").remote(task)
        self._attempts[task.pack_id, task.attempt] = _Attempt(task, actor, events)

    def poll(self, timeout: float) -> Sequence[PackEvent]:
        """See `Executor`."""
        self._probe.check()
        if not self._attempts:
            return []
        streams = {attempt.events: attempt for attempt in self._attempts.values()}
        ready, _ = ray.wait(list(streams), num_returns=1, timeout=timeout, fetch_local=False)
        if ready:
            # One has something to say; ask all, so that a talkative pack cannot silence the others.
            ready, _ = ray.wait(list(streams), num_returns=len(streams), timeout=0, fetch_local=False)
        events: list[PackEvent] = []
        lost: list[tuple[_Attempt, Exception]] = []
        for stream in ready:
            try:
                events.append(self._next_event(streams[stream]))
            except (RayError, StopIteration) as error:
                lost.append((streams[stream], error))
        if lost:
            # Once for all of them: leases have to be renewed meanwhile.
            self._probe.check(after_a_loss=True)
        return [*events, *(self._worker_lost(attempt, error) for attempt, error in lost)]

    def _next_event(self, attempt: _Attempt) -> PackEvent:
        event: PackEvent = ray.get(next(attempt.events))
        if not isinstance(event, PackProgress):
            del self._attempts[attempt.task.pack_id, attempt.task.attempt]
            self._idle.append(attempt.actor)
        return event

    def _worker_lost(self, attempt: _Attempt, error: Exception) -> PackFailed:
        key = (attempt.task.pack_id, attempt.task.attempt)
        log.warning("pack %d, attempt %d: the worker was lost: %r", *key, error)
        del self._attempts[key]
        ray.kill(attempt.actor)
        reason = f"worker lost: {type(error).__name__}"
        return PackFailed(*key, reason, str(error)[-8000:], retryable=True)

    def _free_actor(self) -> Any:
        """Return an idle actor that still lives, or a new one: a dead one would cost the pack an attempt.

        One that was never used may still be starting, and is not asked.
        """
        while self._idle:
            actor = self._idle.pop()
            try:
                ray.get(actor.ping.remote(), timeout=PING_S)
            except RayError as error:
                log.warning("an idle worker was lost: %r", error)
                ray.kill(actor)
            else:
                return actor
        return self._fresh.pop() if self._fresh else self._actor_class.remote(self._options)

    def cancel(self, pack_id: int, attempt: int) -> None:
        """See `Executor`. The worker's process is ended: a tensor program in C++ answers nothing milder."""
        found = self._attempts.pop((pack_id, attempt), None)
        if found is not None:
            ray.kill(found.actor)

    def close(self) -> None:
        """See `Executor`."""
        self._probe.stop()
        self._attempts.clear()
        self._idle.clear()
        self._fresh.clear()
        ray.shutdown()
