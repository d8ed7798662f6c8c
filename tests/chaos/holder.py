"""A process that holds a lease and does what it is told: `python -m tests.chaos.holder OWNER`.

One command a line, as JSON, on standard input; an answer to each on standard output. It freezes itself at the
point that it is told to, as SIGSTOP from outside would, but always at just this one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import Connection

from service.db.engine import open_engine, read, write
from service.db.tables import is_running, packs
from service.dispatch import leases
from service.dispatch.leases import Lease
from service.sweeps import queries
from workers.protocol import PackFinished, PackProgress, PackStarted, PackTask
from workers.runner import run_pack

SHORT_LEASE_S: Final = 0.3
"""Of one that freezes: nobody should wait for half a minute."""

WITH_FENCE: Final = leases._holds


def without_fence(lease: Lease) -> Any:
    """Compare everything but the attempt: what a queue does that has no token."""
    return (packs.c.id == lease.pack_id) & is_running


STALE_WRITES: Final[dict[str, Callable[[Connection, Lease, PackFinished], bool]]] = {
    "start": lambda c, lease, _: leases.start(c, lease, "node", "device"),
    "progress": lambda c, lease, _: leases.progress(c, lease, 1, "from the dead\n"),
    "requeue": lambda c, lease, _: leases.requeue(c, lease, 0.0, "worker lost", "detail"),
    "give_up": lambda c, lease, _: leases.give_up(c, lease, "bad configuration", "detail"),
    "stopped": lambda c, lease, _: leases.stopped(c, lease),
    "finish": lambda c, lease, done: leases.finish(c, lease, done.results, done.environment),
}


class Holder:
    """What a dispatcher does with one pack, step by step."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def use(self, url: str) -> None:
        """Go on with another database."""
        self.engine = open_engine(url)

    def claim(self, sweep_id: str, lease_s: float) -> Lease:
        """Claim the sweep's only pack, for so long."""
        leases.LEASE_S = lease_s  # type: ignore[misc]
        with write(self.engine) as connection:
            (lease,) = leases.claim(connection, self.owner, "cluster", sweep_id, 1)
        return lease

    def train(self, lease: Lease, until: int | None = None) -> PackFinished:
        """Train and record what happens up to an event; then go on, and record nothing more."""
        with read(self.engine) as connection:
            spec = queries.spec_of(connection, lease.sweep_id)
            runs = leases.runs_of(connection, lease)
        configs = tuple(spec.run_config(r.grid, r.method, r.learning_rate, r.vxx_reg, r.seed) for r in runs)
        for number, event in enumerate(run_pack(PackTask(lease.pack_id, lease.attempt, configs))):
            if number == until:
                os.kill(os.getpid(), signal.SIGSTOP)
            if until is None or number < until:
                with write(self.engine) as connection:
                    self._record(connection, lease, event)
        assert isinstance(event, PackFinished), event
        return event

    def _record(self, connection: Connection, lease: Lease, event: Any) -> None:
        if isinstance(event, PackStarted):
            assert leases.start(connection, lease, event.node, event.device)
        elif isinstance(event, PackProgress):
            assert leases.progress(connection, lease, event.step)

    def freeze(self, sweep_id: str, at: int, stale_write: str, fenced: bool) -> bool:
        """Claim, freeze before event number `at`, and write, once woken; tell whether that was accepted."""
        lease = self.claim(sweep_id, SHORT_LEASE_S)
        done = self.train(lease, until=at)
        leases._holds = WITH_FENCE if fenced else without_fence
        with write(self.engine) as connection:
            return STALE_WRITES[stale_write](connection, lease, done)

    def take_over(self, sweep_id: str) -> int:
        """Take the pack back once its lease has run out, claim and train it; return the attempt."""
        taken_back = 0
        while not taken_back:
            with write(self.engine) as connection:
                taken_back = leases.reap(connection)
        self.lease = self.claim(sweep_id, 30.0)
        self.done = self.train(self.lease)
        return self.lease.attempt

    def finish(self) -> bool:
        """Record the results of what was taken over; tell whether that was accepted."""
        with write(self.engine) as connection:
            return leases.finish(connection, self.lease, self.done.results, self.done.environment)


def main(owner: str) -> None:
    """Answer commands until there are no more."""
    holder = Holder(owner)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(holder, name)(*arguments)), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
