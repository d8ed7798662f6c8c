"""A dispatcher that dies, or does not hear the answer to a commit, at one place among all that it does.

As a process that really dies: `python -m tests.chaos.crash URL NUMBER OWNER SWEEPS`.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from sqlalchemy import Engine, event, select, update

from service.auth.roles import DEFAULT_TEAM
from service.db.engine import clock, open_engine, read, write
from service.db.tables import packs
from service.dispatch import leases
from service.dispatch.loop import Dispatcher
from service.dispatch.states import Action
from service.errors import ConflictError
from service.sweeps import actions, queries
from service.sweeps.documents import parse_spec
from service.sweeps.expand import Plan, expand
from tests.chaos.books import all_over
from tests.conftest import SMALL_SPEC
from workers.local import LocalExecutor
from workers.protocol import Node, PackEvent, PackFailed, PackFinished, PackTask, Pool

SEEDS: Final[dict[str, list[int]]] = {
    "first": [0, 1, 2],
    "again": [0, 1, 2],
    "cancelled": [10, 11, 12, 13],
    "hopeless": [20],
}
"""The sweeps, each of as many packs as it has seeds. `again` takes its results from `first`, whose first pack
fails at its first attempt; `hopeless` always fails."""

CANCEL_AT: Final = 9
"""The round in which the third sweep is cancelled, when it runs and has something done."""
MOST_ROUNDS: Final = 300


class Dead(BaseException):
    """The process is no more. No handler may hold it up."""


class Events:
    """Counts a process's statements and commits on a database.

    Args:
        engine: the process's own.
        happens: called before each statement, before and after each commit, with its number and kind.

    Attributes:
        count: by kind.
        first: numbers of commits, the first of each kind of transaction, by what it wrote.
    """

    def __init__(self, engine: Engine, happens: Callable[[int, str], None]) -> None:
        self.count: Counter[str] = Counter()
        self.first: dict[frozenset[str], int] = {}
        self._written: set[str] = set()
        self._happens = happens
        commit = engine.dialect.do_commit

        def do_commit(connection: Any) -> None:
            self._next("before commit")
            commit(connection)
            self._next("after commit")
            self.first.setdefault(frozenset(self._written), self.count["after commit"] - 1)
            self._written.clear()

        engine.dialect.do_commit = do_commit  # type: ignore[method-assign]

        @event.listens_for(engine, "before_cursor_execute")
        def statement(connection: Any, cursor: Any, text: str, *_: Any) -> None:
            self._next("statement")
            if not text.startswith(("BEGIN", "SELECT")):
                self._written.add(" ".join(text.split()[:3]))

    def _next(self, kind: str) -> None:
        number = self.count.total()
        self.count[kind] += 1
        self._happens(number, kind)


def dying(engine: Engine, at: int) -> Events:
    """Let a process die at an event: whatever it still tries is not done."""

    def happens(number: int, kind: str) -> None:
        if number >= at:
            raise Dead(f"{kind}, the {number}th")

    return Events(engine, happens)


def deaf(engine: Engine, at: int) -> Events:
    """Let the answer to commit number `at` get lost: it is done, and the connection breaks."""
    dialect: Any = engine.dialect
    lost = dialect.dbapi.OperationalError("the connection is gone")
    real = dialect.is_disconnect
    dialect.is_disconnect = lambda error, *rest: error is lost or real(error, *rest)
    commits = Counter[str]()

    def happens(number: int, kind: str) -> None:
        commits[kind] += 1
        if kind == "after commit" and commits[kind] == at + 1:
            raise lost

    return Events(engine, happens)


class Clumsy(LocalExecutor):
    """Trains two packs at a time; some fail.

    Args:
        failing: the pack whose first attempt fails.
        hopeless: the one whose attempts all do.
    """

    def __init__(self, failing: int, hopeless: int) -> None:
        super().__init__()
        self.failing, self.hopeless = failing, hopeless
        self.trained: Counter[int] = Counter()
        self._failures: list[PackEvent] = []

    def nodes(self) -> Sequence[Node]:
        return (Node(self.cluster, "here", Pool(), 2.0),)

    def submit(self, task: PackTask) -> None:
        key = (task.pack_id, task.attempt)
        if key == (self.failing, 1):
            self._failures.append(PackFailed(*key, "worker lost", "detail", retryable=True))
        elif task.pack_id == self.hopeless:
            self._failures.append(PackFailed(*key, "bad configuration", "detail", retryable=False))
        else:
            super().submit(task)

    def poll(self, timeout: float) -> Sequence[PackEvent]:
        events = [*self._failures, *super().poll(timeout)]
        self._failures.clear()
        self.trained.update(event.pack_id for event in events if isinstance(event, PackFinished))
        return events


def submit_all(engine: Engine) -> dict[str, str]:
    """Submit the sweeps; return their ids."""
    found = {}
    for name, seeds in SEEDS.items():
        grid = {"baseline": "sgd", "learning_rate": [0.1], "vxx_reg": [1e-3]}
        spec = parse_spec(SMALL_SPEC | {"name": name, "seeds": seeds, "grids": [grid]})
        plan = Plan(tuple(expand(spec)), (1.0,) * len(seeds), 1)
        with write(engine) as connection:
            found[name], _ = queries.create(connection, spec, plan, None, DEFAULT_TEAM)
    return found


def executor_for(engine: Engine, sweep_ids: dict[str, str]) -> Clumsy:
    """Make the executor that fails where it should."""

    def first_pack(name: str) -> int:
        query = select(packs.c.id).where(packs.c.sweep_id == sweep_ids[name]).order_by(packs.c.id)
        with read(engine) as connection:
            return int(connection.scalars(query).all()[0])

    return Clumsy(first_pack("first"), first_pack("hopeless"))


def play(
    dispatcher: Dispatcher, outside: Engine, sweep_ids: dict[str, str], start: int = 0, *, cancel: bool = True
) -> int:
    """Dispatch until all is over; what the world outside does goes through an engine of its own.

    Args:
        dispatcher: the only one.
        outside: of the users and of time.
        sweep_ids: by name.
        start: the number of the first round.
        cancel: whether a sweep is cancelled.

    Returns:
        The number of the round after the last one.
    """
    number = start
    try:
        while not all_over(outside):
            assert number < start + MOST_ROUNDS, "it does not come to an end"
            let_time_pass(outside)
            if cancel and number >= CANCEL_AT:
                cancel_one(outside, sweep_ids["cancelled"])
            number += 1
            dispatcher.step(0)
    except Dead:
        pass
    return number


def let_time_pass(outside: Engine) -> None:
    """Let the delays before other attempts be over."""
    delayed = (packs.c.state == "queued") & (packs.c.not_before > clock())
    with write(outside) as connection:
        waiting = connection.scalars(select(packs.c.sweep_id).where(delayed).distinct()).all()
        connection.execute(update(packs).where(delayed).values(not_before=clock() - 1))
        for sweep_id in waiting:
            leases.settle(connection, sweep_id)


def cancel_one(outside: Engine, sweep_id: str) -> None:
    """Cancel a sweep as its owner does, unless it is over."""
    with suppress(ConflictError), write(outside) as connection:
        actions.act(connection, sweep_id, Action.CANCEL)


def main(url: str, number: str, owner: str, sweeps: str) -> None:
    """Dispatch, and die at an event."""

    def happens(seen: int, kind: str) -> None:
        if seen == int(number):
            os._exit(9)

    outside, own = open_engine(url), open_engine(url)
    Events(own, happens)
    sweep_ids = json.loads(sweeps)
    play(Dispatcher(own, executor_for(outside, sweep_ids), owner), outside, sweep_ids)


if __name__ == "__main__":
    main(*sys.argv[1:])
