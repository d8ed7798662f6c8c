"""The dispatcher: claims packs, hands them to an executor, writes what comes back under their tokens.

One step at a time and no thread of its own, so that a test can drive it. What could not be written yet stays
in the outbox: a database that is away for a while costs time, not results.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from pydantic import ValidationError
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from ddpnopt.errors import DDPNOptError
from service.db.engine import is_transient, read, storable, write
from service.dispatch import leases, presence, queue
from service.dispatch.fairness import CREDIT_S, schedule
from service.dispatch.leases import Lease
from service.dispatch.policy import GiveUp, after_failure
from service.results import reuse
from service.results.reuse import ResultsGoneError
from service.sweeps import queries
from workers.protocol import (
    Executor,
    PackEvent,
    PackFailed,
    PackFinished,
    PackProgress,
    PackStarted,
    PackStopped,
    PackTask,
    Pool,
)

log = logging.getLogger(__name__)

REFLECT_EVERY_S: Final = 5.0
"""How often a full cluster is looked at for packs that should make room."""
PRESENCE_EVERY_S: Final = 5.0
BARREN_S: Final = 2.0
"""How long a queue is left alone in which nobody could be given anything, though devices were free."""
RELEASE_TRIES: Final = 3


@dataclass(slots=True)
class _Holding:
    """A pack in the executor.

    Attributes:
        stopping: whether the executor was asked to stop it.
    """

    lease: Lease
    stopping: bool = False


@dataclass(slots=True)
class _Every:
    """Something to be done now and then."""

    seconds: float
    last: float

    def is_due(self, now: float) -> bool:
        """Tell whether it is time again; if so, the next time is counted from now."""
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True


def give_back(engine: Engine, owner: str) -> int:
    """Give back all packs of a dispatcher that is gone, or goes; return their number.

    Raises:
        DBAPIError: if that is not possible, even the third time: their leases run out.
    """
    for tries in range(1, RELEASE_TRIES + 1):
        try:
            with write(engine) as connection:
                presence.leave(connection, owner)
                return leases.release(connection, owner)
        except DBAPIError as error:
            if tries == RELEASE_TRIES or not is_transient(error):
                raise
            time.sleep(0.2 * tries)
    raise AssertionError("unreachable")


class Dispatcher:
    """Moves packs from SQL to an executor and back.

    Args:
        engine: the database.
        executor: what trains.
        owner: a name that no other dispatcher has, ever.
        now: seconds that only grow; for the intervals between renewals.
        keeps_state: whether packs that are stopped can go on from where they were.
    """

    def __init__(
        self,
        engine: Engine,
        executor: Executor,
        owner: str,
        now: Callable[[], float] = time.monotonic,
        *,
        keeps_state: bool = False,
    ) -> None:
        self.engine, self.executor, self.owner, self.now = engine, executor, owner, now
        self.keeps_state = keeps_state
        self.held: dict[int, _Holding] = {}
        self.outbox: deque[PackEvent] = deque()
        self._claimed: deque[tuple[Lease, Pool]] = deque()
        # Whether a claim was begun whose commit nobody has confirmed.
        self._unsure = False
        start = now()
        self._renewal = _Every(leases.RENEW_EVERY_S, start)
        self._reflection = _Every(REFLECT_EVERY_S, start)
        self._times = _Every(CREDIT_S / 2, start)
        self._barren_until = start
        self._presence = _Every(PRESENCE_EVERY_S, start - PRESENCE_EVERY_S)

    def step(self, timeout: float) -> None:
        """Do one round: renew, reap, claim, wait up to `timeout` seconds for events, write them.

        A database that cannot be written now is logged, and the round left for the next one.
        """
        if self._in_database(self._round, timeout):
            self._poll(timeout)

    def close(self, seconds: float = 0.0) -> None:
        """Stop all attempts and give their packs back.

        Args:
            seconds: that the attempts have to write their state; those that need longer are killed.
        """
        for holding in self.held.values():
            self._stop(holding)
        until = self.now() + seconds
        while self.held and self.now() < until:
            self._poll(min(0.5, max(0.0, until - self.now())))
            self._in_database(self._deliver, 0.1)
        for holding in self.held.values():
            self.executor.cancel(holding.lease.pack_id, holding.lease.attempt)
        self.abandon()

    def abandon(self) -> None:
        """Give all packs back without a word to the executor."""
        give_back(self.engine, self.owner)
        self.held.clear()
        self._claimed.clear()

    def _in_database(self, work: Callable[[], None], pause: float) -> bool:
        """Do something with the database; false, after a pause, if it cannot be reached now."""
        try:
            work()
        except DBAPIError as error:
            if not is_transient(error):
                raise
            log.warning("the database cannot be written now: %s", error.orig)
            time.sleep(min(pause, 1.0))
            return False
        return True

    def _poll(self, timeout: float) -> None:
        if self.held:
            self.outbox.extend(self.executor.poll(timeout))
        else:
            time.sleep(timeout)

    def _round(self) -> None:
        self._deliver()
        self._renew()
        self._heed()
        self._disown()
        self._show()
        self._submit()
        self._claim()
        self._submit()

    def _renew(self) -> None:
        if self._renewal.is_due(self.now()):
            with write(self.engine) as connection:
                leases.renew(connection, self.owner)

    def _heed(self) -> None:
        """Let go of packs whose lease was lost, and stop those that should stop."""
        if not self.held:
            return
        with read(self.engine) as connection:
            known = leases.held(connection, self.owner)
        for pack_id, holding in list(self.held.items()):
            found = known.get(pack_id)
            if found is None or found.attempt != holding.lease.attempt:
                log.warning("%s: the lease was lost", holding.lease)
                del self.held[pack_id]
                self.executor.cancel(pack_id, holding.lease.attempt)
            elif found.stop and not holding.stopping:
                log.info("%s: asked to stop", holding.lease)
                self._stop(holding)

    def _disown(self) -> None:
        """Give back what a claim took whose answer was lost."""
        if self._unsure:
            with write(self.engine) as connection:
                leases.disown(connection, self.owner, self.held)
            self._unsure = False

    def _stop(self, holding: _Holding) -> None:
        if not holding.stopping:
            holding.stopping = True
            self.executor.stop(holding.lease.pack_id, holding.lease.attempt)

    def _show(self) -> None:
        """Tell the database that this dispatcher lives, and what machines it sees."""
        if self._presence.is_due(self.now()):
            with write(self.engine) as connection:
                presence.announce(connection, self.owner, self.executor.cluster, self.executor.nodes())

    def _claim(self) -> None:
        # Virtual times go on while packs run, even when nobody waits.
        look = bool(self.held) and self._times.is_due(self.now())
        hopeless = not self._has_room() or self.now() < self._barren_until
        full = hopeless and not self._reflection.is_due(self.now())
        with read(self.engine) as connection:
            if not look and not queue.has_work(connection, claimable=not full):
                return
        with write(self.engine) as connection:
            if taken_back := leases.reap(connection):
                log.warning("%d packs were taken back from a lost dispatcher", taken_back)
        self._unsure = True
        with write(self.engine) as connection:
            claimed = self._decided(connection)
        self._unsure = False
        if not claimed:
            self._barren_until = self.now() + BARREN_S
        for lease, pool in claimed:
            self.held[lease.pack_id] = _Holding(lease)
            self._claimed.append((lease, pool))

    def _submit(self) -> None:
        """Hand the claimed packs over, outside of the transaction in which others wait for their turn.

        What was not handed over for lack of a database may have been lost or stopped meanwhile.
        """
        while self._claimed:
            lease, pool = self._claimed[0]
            holding = self.held.get(lease.pack_id)
            if holding is not None and holding.lease == lease:
                self._hand_over(holding, pool)
            self._claimed.popleft()

    def _hand_over(self, holding: _Holding, pool: Pool) -> None:
        lease = holding.lease
        if holding.stopping:
            self._record(lease, PackStopped(lease.pack_id, lease.attempt, kept=True))
        elif task := self._task(lease, pool):
            log.info("%s: %d runs", lease, len(task.runs))
            self.executor.submit(task)
        else:
            del self.held[lease.pack_id]

    def _has_room(self) -> bool:
        devices = sum(node.devices for node in self.executor.nodes()) + self.executor.backlog()
        return sum(holding.lease.share for holding in self.held.values()) < devices

    def _decided(self, connection: Connection) -> list[tuple[Lease, Pool]]:
        """Ask the policy, and do what it decides; return the new leases."""
        snapshot = queue.snapshot(
            connection,
            self.executor.cluster,
            self.executor.nodes(),
            virtual_times=queue.lock(connection),
            backlog=self.executor.backlog(),
            stoppable=self.keeps_state,
        )
        decision = schedule(snapshot)
        queue.preempt(connection, decision)
        found = [
            (lease, claim.pool)
            # In order: two that lock the same sweeps must not wait for each other.
            for claim in sorted(decision.claims, key=attrgetter("sweep_id"))
            for lease in leases.claim(
                connection,
                self.owner,
                self.executor.cluster,
                claim.sweep_id,
                claim.packs,
                claim.pool,
                claim.charged,
            )
        ]
        queue.charge(connection, snapshot, decision)
        return found

    def _task(self, lease: Lease, pool: Pool) -> PackTask | None:
        try:
            with read(self.engine) as connection:
                spec = queries.spec_of(connection, lease.sweep_id)
                runs = leases.runs_of(connection, lease)
                known = reuse.candidates(connection, lease.pack_id) if spec.reuse else ()
            configs = tuple(
                spec.run_config(run.grid, run.method, run.learning_rate, run.vxx_reg, run.seed)
                for run in runs
            )
        except (ValidationError, DDPNOptError) as error:
            # Stored by another version. It must not stand in the way of all other sweeps.
            log.error("%s: this version cannot read its sweep's spec: %s", lease, error)
            why = ("this version cannot read the sweep's spec", storable(str(error)))
            with write(self.engine) as connection:
                leases.give_up(connection, lease, *why)
            return None
        return PackTask(lease.pack_id, lease.attempt, configs, pool, lease.share, known, lease.name)

    def _deliver(self) -> None:
        while self.outbox:
            event = self.outbox[0]
            holding = self.held.get(event.pack_id)
            if holding is not None and holding.lease.attempt == event.attempt:
                self._record(holding.lease, event)
            self.outbox.popleft()

    def _record(self, lease: Lease, event: PackEvent) -> None:
        try:
            with write(self.engine) as connection:
                accepted = self._write(connection, lease, event)
        except ResultsGoneError as error:
            gone = PackFailed(lease.pack_id, lease.attempt, str(error), "", retryable=True)
            with write(self.engine) as connection:
                accepted = self._write_failure(connection, lease, gone)
        if not accepted:
            log.warning("%s is fenced off", lease)
            self.executor.cancel(lease.pack_id, lease.attempt)
        if not accepted or not isinstance(event, PackStarted | PackProgress):
            del self.held[lease.pack_id]
            self._barren_until = self.now()

    def _write(self, connection: Connection, lease: Lease, event: PackEvent) -> bool:
        match event:
            case PackStarted():
                return leases.start(connection, lease, event.node, event.device)
            case PackProgress():
                return leases.progress(connection, lease, event.step, storable(event.log), event.runs)
            case PackFinished():
                text = storable(event.log)
                done = leases.finish(connection, lease, event.results, event.environment, event.reused, text)
                return done or leases.is_recorded(connection, lease)
            case PackStopped():
                log.info("%s stopped", lease)
                return leases.stopped(connection, lease, event.step, storable(event.log))
            case PackFailed():
                return self._write_failure(connection, lease, event)

    def _write_failure(self, connection: Connection, lease: Lease, event: PackFailed) -> bool:
        log.warning("%s failed: %s", lease, event.reason)
        why = (storable(event.reason), storable(event.detail))
        text = storable(event.log)
        decision = after_failure(lease.attempt, lease.max_attempts, retryable=event.retryable)
        if isinstance(decision, GiveUp):
            return leases.give_up(connection, lease, *why, text)
        return leases.requeue(connection, lease, decision.delay, *why, text)
