"""Train packs on Ray actors, with every retry of Ray's switched off: only SQL may start an attempt."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from workers.actor import CONTROL, PackActor
from workers.placement import FEEDING_CPUS, NODE_LABEL, Requirement
from workers.protocol import (
    LastEvent,
    Node,
    PackEvent,
    PackFailed,
    PackStarted,
    PackStopped,
    PackTask,
    Pool,
    WorkerOptions,
)
from workers.ray_cluster import Probe, join, ray, start_private

log = logging.getLogger(__name__)

PING_S: Final = 2.0
STOP_S: Final = 10.0
"""How long an attempt that was asked to stop may take to keep its state."""
IDLE_S: Final = 5.0
"""How long a worker without a pack keeps its device from the cluster's other users."""
START_S: Final = 10.0
"""An attempt that has not begun by then waits for a device, not for its worker's process to load torch."""

Key: TypeAlias = tuple[Pool | None, float]
"""What a worker is for: a pool, any for None; and a share of a device."""


@dataclass(slots=True, eq=False)
class _Worker:
    actor: Any
    key: Key
    placed: bool = False  # has its device
    idle_since: float = 0.0


@dataclass(slots=True, eq=False)
class _Attempt:
    task: PackTask
    worker: _Worker
    events: Any = None  # ray.ObjectRefGenerator
    submitted: float = field(default_factory=time.monotonic)
    started: bool = False
    stop_by: float | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.task.pack_id, self.task.attempt


class RayExecutor:
    """An executor over a Ray cluster.

    Args:
        address: `host:port` of a cluster to join, which must ask for a token; None starts a private one on
            this machine, which ends with this process, however that ends, and is reached from nowhere else.
        slots: CPUs of a private cluster; None takes the machine's.
        options: of each worker.
        backlog: packs beyond the devices that are to wait in the cluster, for its autoscaler to see.
        gpus: of a private cluster; with any, it trains on these alone.
        actor_class: what trains, in the place of `PackActor`.

    Attributes:
        cluster: see `Executor`.

    Raises:
        ConnectionError: if there is no cluster at the address, or none that can be joined.
    """

    def __init__(
        self,
        address: str | None = None,
        slots: int | None = None,
        options: WorkerOptions | None = None,
        backlog: int = 0,
        *,
        gpus: int = 0,
        actor_class: type[Any] = PackActor,
    ) -> None:
        self.cluster = start_private(slots, gpus) if address is None else join(address)
        self._private = address is None
        self._options, self._backlog = options, backlog
        self._probe = Probe()
        self._actor_class = ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={CONTROL: 1})(
            actor_class
        )
        self._attempts: dict[tuple[int, int], _Attempt] = {}
        self._idle: list[_Worker] = []
        self._fresh: list[_Worker] = []
        self._ready: list[PackEvent] = []
        if self._private and not gpus:
            # They load torch while nobody waits for it.
            self._fresh = [self._new_worker((None, 1.0)) for _ in range(self.slots)]
            for worker in self._fresh:
                worker.placed = True

    # --- what there is ---

    def problem(self) -> str | None:
        """Say why the cluster is lost; None while it is not. May be asked from any thread."""
        return self._probe.problem()

    def nodes(self) -> Sequence[Node]:
        """See `Executor`. As of some two seconds ago at the most; never waits."""
        return self._probe.cluster.nodes

    @property
    def slots(self) -> int:
        """Whole devices of the cluster as it is now: nodes come and go."""
        return int(self._probe.cluster.devices(None))

    def backlog(self) -> int:
        """See `Executor`."""
        return self._backlog

    # --- attempts ---

    def submit(self, task: PackTask) -> None:
        """See `Executor`."""
        try:
            attempt = _Attempt(task, self._worker_for(self._key_of(task)))
        except ValueError as error:  # Ray does not take the pool for a selector
            self._ready.append(
                PackFailed(task.pack_id, task.attempt, f"no such pool: {error}"[:500], "", retryable=False)
            )
            return
        self._begin(attempt)
        self._attempts[attempt.key] = attempt

    def poll(self, timeout: float) -> Sequence[PackEvent]:
        """See `Executor`."""
        self._probe.check()
        self._let_go_of_idle()
        streams = {attempt.events: attempt for attempt in self._attempts.values()}
        events, self._ready = self._ready, []
        lost: list[tuple[_Attempt, Exception]] = []
        ended: list[_Worker] = []
        for stream in self._ready_streams(list(streams), 0.0 if events else self._patience(timeout)):
            attempt = streams[stream]
            try:
                event = self._next_event(attempt)
            except (ray.exceptions.RayError, StopIteration) as error:
                lost.append((attempt, error))
                continue
            events.append(event)
            if isinstance(event, LastEvent):
                ended.append(attempt.worker)
        for worker in ended:
            self._settle(worker)
        if any(attempt.stop_by is None for attempt, _ in lost):
            # Once for all of them: leases have to be renewed meanwhile.
            self._probe.check(after_a_loss=True)
        return [*events, *(self._worker_lost(*one) for one in lost), *self._overdue()]

    def _ready_streams(self, streams: list[Any], timeout: float) -> list[Any]:
        """Return the streams that have something to say, after waiting for the first."""
        if not streams:
            return []
        ready, _ = ray.wait(streams, num_returns=1, timeout=timeout, fetch_local=False)
        if ready:
            # One has; ask all, so that a talkative pack cannot silence the others.
            ready, _ = ray.wait(streams, num_returns=len(streams), timeout=0, fetch_local=False)
        return list(ready)

    def _patience(self, timeout: float) -> float:
        """Return how long to wait for events, with attempts that must have stopped by then."""
        until = [attempt.stop_by for attempt in self._attempts.values() if attempt.stop_by is not None]
        return max(0.0, min([timeout, *(by - time.monotonic() for by in until)]))

    def _next_event(self, attempt: _Attempt) -> PackEvent:
        event: PackEvent = ray.get(next(attempt.events))
        if isinstance(event, PackStarted):
            attempt.started = attempt.worker.placed = True
            name = self._probe.cluster.name(event.node)
            return PackStarted(event.pack_id, event.attempt, name, event.device)
        if isinstance(event, LastEvent):
            del self._attempts[attempt.key]
        return event

    def _worker_lost(self, attempt: _Attempt, error: Exception) -> LastEvent:
        log.warning("%s: the worker was lost: %r", attempt.task, error)
        self._end(attempt)
        if attempt.stop_by is not None:
            return PackStopped(*attempt.key, kept=False)
        detail = str(error)[-8000:]
        return PackFailed(*attempt.key, f"worker lost: {_what_happened(error)}", detail, retryable=True)

    # --- ends ---

    def stop(self, pack_id: int, attempt: int) -> None:
        """See `Executor`. What does not stop within `STOP_S` is killed, what has not begun at once."""
        found = self._attempts.get((pack_id, attempt))
        if found is None or found.stop_by is not None:
            return
        if found.started:
            found.worker.actor.stop.options(concurrency_group=CONTROL).remote(pack_id, attempt)
            found.stop_by = time.monotonic() + STOP_S
        else:
            self._end(found)
            self._ready.append(PackStopped(pack_id, attempt, kept=False))

    def _overdue(self) -> list[PackEvent]:
        """Kill those that were asked to stop and have not."""
        now = time.monotonic()
        late = [one for one in self._attempts.values() if one.stop_by is not None and one.stop_by <= now]
        for attempt in late:
            log.warning("%s does not stop: it is killed", attempt.task)
            self._end(attempt)
        return [PackStopped(*attempt.key, kept=False) for attempt in late]

    def cancel(self, pack_id: int, attempt: int) -> None:
        """See `Executor`. The worker's process is ended: a tensor program in C++ answers nothing milder."""
        self._ready = [one for one in self._ready if (one.pack_id, one.attempt) != (pack_id, attempt)]
        if (found := self._attempts.get((pack_id, attempt))) is not None:
            self._end(found)

    def _end(self, attempt: _Attempt) -> None:
        """End an attempt together with its worker."""
        del self._attempts[attempt.key]
        ray.kill(attempt.worker.actor)

    def close(self) -> None:
        """See `Executor`."""
        self._probe.stop()
        for kept in (self._attempts, self._idle, self._fresh, self._ready):
            kept.clear()
        ray.shutdown()

    # --- workers ---

    def _key_of(self, task: PackTask) -> Key:
        pool = task.pool
        if pool is not None and pool.kind == "gpu":
            return pool, task.share
        # A private cluster's only node needs no telling apart, and its workers are there already.
        return (None if self._private else pool), 1.0

    def _new_worker(self, key: Key) -> _Worker:
        pool, share = key
        if pool is None or pool.kind == "cpu":
            wanted: dict[str, Any] = {"num_cpus": 1}
            how: tuple[str, float] = ("cpu", 1.0)
        else:
            wanted = {"num_cpus": FEEDING_CPUS, "num_gpus": share}
            how = ("cuda", share)
        if pool is not None and not self._private:
            wanted |= _as_ray_has_it(self._probe.cluster.requirement(pool))
        return _Worker(self._actor_class.options(**wanted).remote(self._options, *how, alone=True), key)

    def _worker_for(self, key: Key) -> _Worker:
        """Return an idle worker that still lives, or a new one: a dead one would cost the pack an attempt.

        One that was never used may still be starting, and is not asked.
        """
        for worker in [one for one in self._idle if one.key == key]:
            self._idle.remove(worker)
            try:
                ray.get(worker.actor.ping.options(concurrency_group=CONTROL).remote(), timeout=PING_S)
            except ray.exceptions.RayError as error:
                log.warning("an idle worker was lost: %r", error)
                ray.kill(worker.actor)
            else:
                return worker
        for worker in self._fresh:
            if worker.key == key:
                self._fresh.remove(worker)
                return worker
        self._make_room(key)
        return self._new_worker(key)

    def _begin(self, attempt: _Attempt) -> None:
        attempt.events = attempt.worker.actor.train.options(num_returns="streaming").remote(attempt.task)

    def _make_room(self, key: Key) -> None:
        """Let go of idle workers whose devices one of this kind could have."""
        pool, share = key
        for worker in [one for one in (*self._idle, *self._fresh) if _overlap(one.key, key)]:
            free = self._probe.cluster.devices(pool) - self._taken(key)
            # Shares of several GPUs may be free that no whole one is.
            if free < share or (pool is not None and pool.kind == "gpu"):
                self._let_go(worker)

    def _settle(self, worker: _Worker) -> None:
        """Give a worker whose pack has ended to who waits for it, or keep it for the packs to come."""
        waiting = [
            one
            for one in self._attempts.values()
            if not one.worker.placed and _overlap(one.worker.key, worker.key)
        ]
        since = time.monotonic() - START_S
        short = self._taken(worker.key) + worker.key[1] > self._probe.cluster.devices(worker.key[0])
        if not waiting or not (short or waiting[0].submitted < since):
            worker.idle_since = time.monotonic()
            self._idle.append(worker)
        elif waiting[0].worker.key == worker.key:
            # Its own worker holds nothing yet but a place in Ray's queue.
            ray.kill(waiting[0].worker.actor)
            waiting[0].worker = worker
            self._begin(waiting[0])
        else:
            ray.kill(worker.actor)

    def _taken(self, key: Key) -> float:
        """Return how many devices the workers have or wait for that this kind of worker could have."""
        attempts: Iterable[_Worker] = (attempt.worker for attempt in self._attempts.values())
        return sum(one.key[1] for one in (*attempts, *self._idle, *self._fresh) if _overlap(one.key, key))

    def _let_go_of_idle(self) -> None:
        """Leave the devices that nobody uses to the others of a cluster; a private one has no others."""
        if not self._private:
            for worker in [one for one in self._idle if time.monotonic() - one.idle_since >= IDLE_S]:
                self._let_go(worker)

    def _let_go(self, worker: _Worker) -> None:
        (self._idle if worker in self._idle else self._fresh).remove(worker)
        ray.kill(worker.actor)


def _overlap(one: Key, other: Key) -> bool:
    """Tell whether workers may want the same devices."""
    return one[0] is None or other[0] is None or one[0] == other[0]


def _as_ray_has_it(needed: Requirement) -> dict[str, Any]:
    """Return options of an actor. Labels that must be there go where Ray's autoscaler sees them."""
    from ray.util.scheduling_strategies import DoesNotExist, NodeLabelSchedulingStrategy, NotIn

    hard = {label: DoesNotExist() for label in needed.unlabelled}
    if needed.not_on:
        hard[NODE_LABEL] = NotIn(*needed.not_on)
    options: dict[str, Any] = {"label_selector": needed.labels} if needed.labels else {}
    return options | ({"scheduling_strategy": NodeLabelSchedulingStrategy(hard=hard)} if hard else {})


def _what_happened(error: Exception) -> str:
    """Say in few words how a worker was lost."""
    said, name = str(error), type(error).__name__
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "out of memory, it was killed before its machine ran out"
    if isinstance(error, ray.exceptions.NodeDiedError) or "node has died" in said or "node died" in said:
        return f"its node died ({name})"
    return name
