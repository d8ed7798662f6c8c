"""T8: a dispatcher dies before each statement, before and after each commit, or misses the answer to one.

The sweeps have a pack that fails and is tried again, one that always fails, packs whose results are taken
from another sweep's, and a cancelled sweep.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from service.db.engine import open_engine, write
from service.dispatch import leases, presence
from service.dispatch.loop import Dispatcher
from tests.chaos.books import check_books, digests, states
from tests.chaos.conftest import empty
from tests.chaos.crash import Clumsy, Events, deaf, dying, executor_for, play, submit_all
from tests.chaos.scale import SCALE, TIMEOUT_S
from tests.service.helpers import expire, pack_rows

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(TIMEOUT_S)]

ROOT = Path(__file__).parent.parent.parent
Say = Callable[[str], None]


class World:
    """A database, and what its sweeps come to if nothing happens."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.outside = open_engine(url)
        sweep_ids, _ = self.undisturbed(cancel=False)
        self.wanted = {name: digests(self.outside, sweep_id) for name, sweep_id in sweep_ids.items()}
        sweep_ids, self.events = self.undisturbed(cancel=True)
        self.check(sweep_ids)

    def undisturbed(self, *, cancel: bool) -> tuple[dict[str, str], Events]:
        """Play everything to its end and count what happens."""
        sweep_ids = self.fresh()
        with self.own_engine() as own:
            events = Events(own, lambda number, kind: None)
            dispatcher = Dispatcher(own, executor_for(self.outside, sweep_ids), "a")
            play(dispatcher, self.outside, sweep_ids, cancel=cancel)
        return sweep_ids, events

    def fresh(self) -> dict[str, str]:
        """Start anew with the same sweeps."""
        empty(self.outside)
        return submit_all(self.outside)

    @contextmanager
    def own_engine(self) -> Iterator[Engine]:
        """A dispatcher's engine, whose connections end with it."""
        engine = open_engine(self.url)
        yield engine
        engine.dispose()

    def recover(self, sweep_ids: dict[str, str], start: int, *, released: bool) -> None:
        """Go on with another dispatcher.

        Args:
            sweep_ids: by name.
            start: the number of its first round.
            released: whether a supervisor gave the leases back; else they run out.
        """
        if released:
            with write(self.outside) as connection:
                leases.release(connection, "a")
                presence.leave(connection, "a")
        else:
            expire(self.outside)
        with self.own_engine() as own:
            play(Dispatcher(own, executor_for(self.outside, sweep_ids), "b"), self.outside, sweep_ids, start)

    def check(self, sweep_ids: dict[str, str]) -> None:
        """Assert that all came out as it would have."""
        check_books(self.outside)
        found = states(self.outside)
        over = {"first": "completed", "again": "completed", "hopeless": "failed", "cancelled": "cancelled"}
        assert {name: found[sweep_id] for name, sweep_id in sweep_ids.items()} == over
        ours = {name: digests(self.outside, sweep_id) for name, sweep_id in sweep_ids.items()}
        # How much of it was done when it was cancelled depends on what happened before.
        cancelled, everything = ours.pop("cancelled"), self.wanted["cancelled"]
        assert {row for row in cancelled if is_recorded(row)} <= set(everything)
        assert ours == {name: self.wanted[name] for name in ours}


def is_recorded(row: tuple[Any, ...]) -> bool:
    """Tell whether a run of `digests` has a result; its curves' points have no `None` at all."""
    return None not in row[5:8]


def points(count: int, most: int | None) -> list[int]:
    """Choose points: all, or as many as there may be, spread evenly."""
    if most is None or most >= count:
        return list(range(count))
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)})


@pytest.fixture(scope="module")
def world(database: str) -> Iterator[World]:
    """A world of each kind."""
    world = World(database)
    yield world
    world.outside.dispose()


def test_t8_a_death_at_each_point(world: World, say: Say) -> None:
    count = world.events.count
    chosen = points(count.total(), SCALE.crash_points)
    for at in chosen:
        sweep_ids = world.fresh()
        with world.own_engine() as own:
            dying(own, at)
            dispatcher = Dispatcher(own, executor_for(world.outside, sweep_ids), "a")
            start = play(dispatcher, world.outside, sweep_ids)
        world.recover(sweep_ids, start, released=at % 2 == 0)
        world.check(sweep_ids)
    say(
        f"T8 {world.outside.dialect.name}: {len(chosen)} deaths of {count.total()} possible ones "
        f"({count['statement']} statements, {count['before commit']} commits), all recovered"
    )


def test_t8_the_death_of_a_process(world: World, say: Say) -> None:
    chosen = points(world.events.count.total() - 1, SCALE.real_deaths + 2)[1:-1]
    for at in chosen:
        sweep_ids = world.fresh()
        command = [sys.executable, "-m", "tests.chaos.crash", world.url, str(at), "a", json.dumps(sweep_ids)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 9, done.stderr
        world.recover(sweep_ids, 0, released=at % 2 == 0)
        world.check(sweep_ids)
    say(f"T8 {world.outside.dialect.name}: {len(chosen)} times the death of a process, all recovered")


def test_t8_a_commit_whose_answer_is_lost(world: World, say: Say) -> None:
    commits = world.events.count["after commit"]
    chosen = sorted({*world.events.first.values(), *points(commits, SCALE.lost_answers)})
    for at in chosen:
        sweep_ids = world.fresh()
        with world.own_engine() as own:
            deaf(own, at)
            executor = executor_for(world.outside, sweep_ids)
            play(Dispatcher(own, executor, "a"), world.outside, sweep_ids)
        world.check(sweep_ids)
        check_trained_once(world.outside, executor)
    say(
        f"T8 {world.outside.dialect.name}: {len(chosen)} of {commits} commits whose answer was lost, "
        "nothing lost, nothing trained twice"
    )


def check_trained_once(engine: Engine, executor: Clumsy) -> None:
    """Assert that no pack came to its results twice."""
    done = [pack.id for pack in pack_rows(engine) if pack.state == "completed"]
    assert {pack_id: executor.trained[pack_id] for pack_id in done} == dict.fromkeys(done, 1)
