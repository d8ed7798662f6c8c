"""The dispatcher: claims packs, hands them to an executor, writes what comes back under their tokens.

One step at a time and no thread of its own, so that a test can drive it. What could not be written yet stays
in the outbox: a database that is away for a while costs time, not results.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from pydantic import ValidationError
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from service.db.engine import is_transient, read, write
from service.dispatch import leases
from service.dispatch.leases import Lease
from service.dispatch.policy import GiveUp, after_failure
from service.sweeps import queries
from workers.protocol import Executor, PackEvent, PackFailed, PackFinished, PackProgress, PackTask

log = logging.getLogger(__name__)


class Dispatcher:
    """Moves packs from SQL to an executor and back.

    Args:
        engine: the database.
        executor: what trains.
        owner: a name that no other dispatcher has, ever.
        now: seconds that only grow; for the intervals between renewals.
    """

    def __init__(
        self, engine: Engine, executor: Executor, owner: str, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.engine, self.executor, self.owner, self.now = engine, executor, owner, now
        self.held: dict[int, Lease] = {}
        self.outbox: deque[PackEvent] = deque()
        self._last_renewal = now()

    def step(self, timeout: float) -> None:
        """Do one round: renew, reap, claim, wait up to `timeout` seconds for events, write them.

        A database that cannot be written now is logged, and the round left for the next one.
        """
        try:
            self._deliver()
            self._renew()
            self._claim()
        except DBAPIError as error:
            if not is_transient(error):
                raise
            log.warning("the database cannot be written now: %s", error.orig)
            time.sleep(min(timeout, 1.0))
            return
        if self.held:
            self.outbox.extend(self.executor.poll(timeout))
        else:
            time.sleep(timeout)

    def close(self) -> None:
        """Stop all attempts and give their packs back at once."""
        for lease in self.held.values():
            self.executor.cancel(lease.pack_id, lease.attempt)
        self.abandon()

    def abandon(self) -> None:
        """Give all packs back without a word to the executor."""
        with write(self.engine) as connection:
            leases.release(connection, self.owner)
        self.held.clear()

    def _renew(self) -> None:
        if self.now() - self._last_renewal < leases.RENEW_EVERY_S:
            return
        with write(self.engine) as connection:
            lost = leases.renew(connection, self.held.values())
        self._last_renewal = self.now()
        for pack_id in lost:
            lease = self.held.pop(pack_id)
            log.warning("pack %d: the lease of attempt %d was lost", pack_id, lease.attempt)
            self.executor.cancel(pack_id, lease.attempt)

    def _claim(self) -> None:
        free = self.executor.free_slots()
        with read(self.engine) as connection:
            if not queries.has_work(connection, claimable=free > 0):
                return
        with write(self.engine) as connection:
            if taken_back := leases.reap(connection):
                log.warning("%d packs were taken back from a lost dispatcher", taken_back)
            claimed = leases.claim(connection, self.owner, free) if free > 0 else []
            tasks = [(lease, task) for lease in claimed if (task := self._task(connection, lease))]
        for lease, task in tasks:
            log.info("pack %d, attempt %d: %d runs", lease.pack_id, lease.attempt, len(task.runs))
            self.held[lease.pack_id] = lease
            self.executor.submit(task)

    def _task(self, connection: Connection, lease: Lease) -> PackTask | None:
        try:
            spec = queries.spec_of(connection, lease.sweep_id)
        except ValidationError as error:
            # Stored by another version. It must not stand in the way of all other sweeps.
            log.error("pack %d: this version cannot read its sweep's spec: %s", lease.pack_id, error)
            leases.give_up(connection, lease, "this version cannot read the sweep's spec", str(error))
            return None
        configs = tuple(
            spec.run_config(run.grid, run.method, run.learning_rate, run.vxx_reg, run.seed)
            for run in leases.runs_of(connection, lease)
        )
        return PackTask(lease.pack_id, lease.attempt, configs)

    def _deliver(self) -> None:
        while self.outbox:
            event = self.outbox[0]
            lease = self.held.get(event.pack_id)
            if lease is not None and lease.attempt == event.attempt:
                self._record(lease, event)
            self.outbox.popleft()

    def _record(self, lease: Lease, event: PackEvent) -> None:
        with write(self.engine) as connection:
            accepted = self._write(connection, lease, event)
        if not accepted:
            log.warning("pack %d: attempt %d is fenced off", lease.pack_id, lease.attempt)
            self.executor.cancel(lease.pack_id, lease.attempt)
        if not accepted or not isinstance(event, PackProgress):
            del self.held[lease.pack_id]

    def _write(self, connection: Connection, lease: Lease, event: PackEvent) -> bool:
        match event:
            case PackProgress():
                return leases.progress(connection, lease, event.step)
            case PackFinished():
                done = leases.finish(connection, lease, event.results, event.environment)
                return done or leases.is_recorded(connection, lease)
            case PackFailed():
                log.warning("pack %d, attempt %d failed: %s", lease.pack_id, lease.attempt, event.reason)
                decision = after_failure(lease.attempt, lease.max_attempts, retryable=event.retryable)
                if isinstance(decision, GiveUp):
                    return leases.give_up(connection, lease, event.reason, event.detail)
                return leases.requeue(connection, lease, decision.delay, event.reason, event.detail)
