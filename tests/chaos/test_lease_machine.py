"""T7: whatever is done to packs in whatever order, by those that hold them and by those that no longer do.

A model in plain Python says what each write does; after each step the database is compared with it, and its
books are checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, select, update

from service.auth.roles import DEFAULT_TEAM
from service.db.engine import clock, read, write
from service.db.tables import packs, results, runs, sweeps
from service.dispatch import leases, queue
from service.dispatch.fairness import Decision
from service.dispatch.leases import Lease
from service.dispatch.policy import MAX_ATTEMPTS
from service.dispatch.states import Action, PackState, SweepState, Wanted, sweep_state, wanted_after
from service.errors import ConflictError
from service.results.reuse import ResultsGoneError
from service.sweeps import actions, queries
from service.sweeps.documents import parse_spec
from service.sweeps.expand import Plan, expand
from tests.chaos.books import check_books
from tests.chaos.conftest import empty, migrated, postgresql_database
from tests.chaos.scale import SCALE, TIMEOUT_S
from tests.conftest import SMALL_SPEC
from tests.service.helpers import ENVIRONMENT, result

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(TIMEOUT_S)]

OWNERS = ("a", "b", "c")
MOST_SWEEPS = 2
PACKS, RUNS, STEPS = 3, 2, 4
SPEC = parse_spec(
    SMALL_SPEC | {"seeds": PACKS, "grids": [{"baseline": "sgd", "learning_rate": [0.1], "vxx_reg": [1e-3]}]}
)
PLAN = Plan(tuple(expand(SPEC)), (1.0,) * PACKS, 1)
Q, R = PackState.QUEUED, PackState.RUNNING


@dataclass
class Pack:
    """What a pack should be."""

    id: int
    position: int
    state: PackState = Q
    attempt: int = 0
    max_attempts: int = MAX_ATTEMPTS
    owner: str | None = None
    expired: bool = False
    waits: bool = False
    preempted: bool = False
    step: int = 0
    first_step: int | None = None
    diverged: frozenset[int] = frozenset()
    reused: frozenset[int] = frozenset()
    trained: list[int] = field(default_factory=list)

    def go_to(self, step: int) -> None:
        """Note how far the running attempt is."""
        self.step = step
        self.first_step = step if self.first_step is None else self.first_step

    def end(self, state: PackState, runs: int = RUNS) -> None:
        """Leave the running state, and book what was trained."""
        first = self.step if self.first_step is None else self.first_step
        self.trained.append(max(0, self.step - first) * runs)
        self.state, self.owner, self.expired = state, None, False


@dataclass
class Sweep:
    """What a sweep should be."""

    id: str
    packs: list[Pack]
    wanted: Wanted = Wanted.RUN

    @property
    def state(self) -> SweepState:
        """Derive the state, by the table that is tested elsewhere."""
        started = any(pack.attempt for pack in self.packs)
        return sweep_state(self.wanted, Counter(pack.state for pack in self.packs), started=started)

    @property
    def state_after_return(self) -> PackState:
        """The state of a pack that comes back without results."""
        return PackState.CANCELLED if self.wanted == Wanted.CANCEL else Q


class LeaseMachine(RuleBasedStateMachine):
    """Owners that claim, write, lose their leases and write again."""

    counts: ClassVar[Counter[str]] = Counter()

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.sweeps: list[Sweep] = []
        self.leases: list[Lease] = []
        empty(engine)
        self.counts["examples"] += 1
        self.submit()

    def packs(self) -> Iterator[tuple[Sweep, Pack]]:
        """Go through the model."""
        return ((sweep, pack) for sweep in self.sweeps for pack in sweep.packs)

    def of(self, lease: Lease) -> tuple[Sweep, Pack]:
        """Find a lease's pack in the model."""
        return next((sweep, pack) for sweep, pack in self.packs() if pack.id == lease.pack_id)

    def some_run(self) -> bool:
        """Tell whether any pack runs."""
        return any(pack.state == R for _, pack in self.packs())

    def is_live(self, lease: Lease) -> bool:
        """Tell whether a lease is worth anything."""
        _, pack = self.of(lease)
        return pack.state == R and pack.attempt == lease.attempt

    def pick(self, number: int, live: bool) -> Lease:
        """Choose a lease that holds, if one is wanted and there is one, else any there ever was."""
        holding = [lease for lease in self.leases if self.is_live(lease)] if live else []
        found = holding or self.leases
        return found[number % len(found)]

    def did(self, accepted: bool, lease: Lease) -> bool:
        """Compare the answer to a write with the model's."""
        live = self.is_live(lease)
        assert accepted == live
        self.counts["writes" if live else "stale writes"] += 1
        return live

    # --- what owners of sweeps do ---

    @precondition(lambda self: len(self.sweeps) < MOST_SWEEPS)
    @rule()
    def submit(self) -> None:
        with write(self.engine) as connection:
            sweep_id, _ = queries.create(connection, SPEC, PLAN, None, DEFAULT_TEAM)
            ids = connection.scalars(
                select(packs.c.id).where(packs.c.sweep_id == sweep_id).order_by(packs.c.id)
            )
            own = [Pack(pack_id, position) for position, pack_id in enumerate(ids)]
        assert len(own) == PACKS
        self.sweeps.append(Sweep(sweep_id, own))

    @rule(number=st.integers(0, MOST_SWEEPS - 1), action=st.sampled_from(Action))
    def act(self, number: int, action: Action) -> None:
        sweep = self.sweeps[number % len(self.sweeps)]
        wanted = wanted_after(action, sweep.state)
        try:
            with write(self.engine) as connection:
                actions.act(connection, sweep.id, action)
        except ConflictError:
            assert wanted is None
            return
        assert wanted is not None
        sweep.wanted = wanted
        for pack in sweep.packs:
            if action == Action.RETRY and pack.state in (PackState.FAILED, PackState.CANCELLED):
                pack.state, pack.max_attempts, pack.waits = Q, pack.attempt + MAX_ATTEMPTS, False
            if wanted == Wanted.CANCEL and pack.state == Q:
                pack.state = PackState.CANCELLED

    # --- what dispatchers do ---

    @precondition(lambda self: self.sweeps)
    @rule(owner=st.sampled_from(OWNERS), number=st.integers(0, MOST_SWEEPS - 1), limit=st.integers(1, PACKS))
    def claim(self, owner: str, number: int, limit: int) -> None:
        sweep = self.sweeps[number % len(self.sweeps)]
        ready = [p for p in sweep.packs if p.state == Q and not p.waits and sweep.wanted == Wanted.RUN]
        with write(self.engine) as connection:
            found = leases.claim(connection, owner, "cluster", sweep.id, limit)
        for pack in ready[:limit]:
            pack.state, pack.attempt, pack.owner = R, pack.attempt + 1, owner
            pack.step, pack.first_step, pack.preempted = 0, None, False
        assert [(lease.pack_id, lease.attempt, lease.max_attempts) for lease in found] == [
            (pack.id, pack.attempt, pack.max_attempts) for pack in ready[:limit]
        ]
        self.leases += found

    @precondition(lambda self: self.leases)
    @rule(number=st.integers(0, 99), live=st.booleans())
    def start(self, number: int, live: bool) -> None:
        lease = self.pick(number, live)
        with write(self.engine) as connection:
            self.did(leases.start(connection, lease, "node", "device"), lease)

    @precondition(lambda self: self.leases)
    @rule(number=st.integers(0, 99), live=st.booleans(), step=st.integers(0, STEPS))
    def progress(self, number: int, live: bool, step: int) -> None:
        lease = self.pick(number, live)
        with write(self.engine) as connection:
            accepted = leases.progress(connection, lease, step, "so far\n")
        if self.did(accepted, lease):
            self.of(lease)[1].go_to(step)

    @precondition(lambda self: self.leases)
    @rule(
        number=st.integers(0, 99),
        live=st.booleans(),
        diverged=st.frozensets(st.integers(0, RUNS - 1)),
        reused=st.frozensets(st.integers(0, RUNS - 1)),
    )
    def finish(self, number: int, live: bool, diverged: frozenset[int], reused: frozenset[int]) -> None:
        lease = self.pick(number, live)
        trained = [place for place in range(RUNS) if place not in reused]
        outcome = [result(place, diverged=place in diverged) for place in trained]
        twins = [p for sweep, p in self.packs() if self._is_twin(lease, sweep, p)]
        try:
            with write(self.engine) as connection:
                accepted = leases.finish(connection, lease, outcome, ENVIRONMENT, reused)
        except ResultsGoneError:
            assert self.is_live(lease)
            assert reused
            assert not twins
            return
        if not self.did(accepted, lease):
            return
        assert twins or not reused
        _, pack = self.of(lease)
        pack.step, pack.reused = STEPS, reused
        pack.end(PackState.COMPLETED, len(trained))
        pack.diverged = diverged - reused
        for twin in twins:
            pack.diverged |= reused & twin.diverged

    def _is_twin(self, lease: Lease, sweep: Sweep, pack: Pack) -> bool:
        """Tell whether a pack has results of the same runs as another sweep's."""
        position = self.of(lease)[1].position
        return pack.state == PackState.COMPLETED and pack.position == position and sweep.id != lease.sweep_id

    @precondition(lambda self: self.leases)
    @rule(number=st.integers(0, 99), live=st.booleans(), delay=st.sampled_from((0.0, 1000.0)))
    def requeue(self, number: int, live: bool, delay: float) -> None:
        lease = self.pick(number, live)
        sweep, pack = self.of(lease)
        if self.is_live(lease) and pack.attempt >= pack.max_attempts:
            return  # the policy gives up by then
        with write(self.engine) as connection:
            accepted = leases.requeue(connection, lease, delay, "worker lost", "detail")
        if self.did(accepted, lease):
            pack.waits = delay > 0
            pack.end(sweep.state_after_return)

    @precondition(lambda self: self.leases)
    @rule(number=st.integers(0, 99), live=st.booleans())
    def give_up(self, number: int, live: bool) -> None:
        lease = self.pick(number, live)
        with write(self.engine) as connection:
            accepted = leases.give_up(connection, lease, "bad configuration", "detail")
        if self.did(accepted, lease):
            self.of(lease)[1].end(PackState.FAILED)

    @precondition(lambda self: self.leases)
    @rule(number=st.integers(0, 99), live=st.booleans(), step=st.none() | st.integers(0, STEPS))
    def stopped(self, number: int, live: bool, step: int | None) -> None:
        lease = self.pick(number, live)
        with write(self.engine) as connection:
            accepted = leases.stopped(connection, lease, step)
        if self.did(accepted, lease):
            sweep, pack = self.of(lease)
            if step is not None:
                pack.go_to(step)
            pack.max_attempts += 1
            pack.end(sweep.state_after_return)

    @precondition(some_run)
    @rule(owner=st.sampled_from(OWNERS))
    def release(self, owner: str) -> None:
        with write(self.engine) as connection:
            given_back = leases.release(connection, owner)
        self._released(owner, given_back, known=set())

    @precondition(some_run)
    @rule(owner=st.sampled_from(OWNERS), known=st.frozensets(st.integers(0, MOST_SWEEPS * PACKS - 1)))
    def disown(self, owner: str, known: frozenset[int]) -> None:
        ids = {pack.id for number, (_, pack) in enumerate(self.packs()) if number in known}
        with write(self.engine) as connection:
            given_back = leases.disown(connection, owner, ids)
        self._released(owner, given_back, ids)

    def _released(self, owner: str, given_back: int, known: set[int]) -> None:
        theirs = [(s, pack) for s, pack in self.packs() if pack.owner == owner and pack.id not in known]
        assert given_back == len(theirs)
        for sweep, pack in theirs:
            pack.max_attempts += 1
            pack.end(sweep.state_after_return)

    @precondition(some_run)
    @rule(owner=st.sampled_from(OWNERS))
    def renew(self, owner: str) -> None:
        with write(self.engine) as connection:
            leases.renew(connection, owner)
        for _, pack in self.packs():
            if pack.owner == owner:
                pack.expired = False

    @precondition(some_run)
    @rule()
    def reap(self) -> None:
        with write(self.engine) as connection:
            taken_back = leases.reap(connection)
        lost = [(sweep, pack) for sweep, pack in self.packs() if pack.expired]
        assert taken_back == len(lost)
        for sweep, pack in lost:
            spent = pack.attempt >= pack.max_attempts
            pack.end(PackState.FAILED if spent else sweep.state_after_return)

    @precondition(some_run)
    @rule(number=st.integers(0, MOST_SWEEPS * PACKS - 1))
    def preempt(self, number: int) -> None:
        everything = [pack for _, pack in self.packs()]
        pack = everything[number % len(everything)]
        with write(self.engine) as connection:
            queue.preempt(connection, Decision((), (pack.id,), {}, {}))
        pack.preempted |= pack.state == R

    @precondition(some_run)
    @rule(owner=st.sampled_from(OWNERS))
    def held(self, owner: str) -> None:
        with read(self.engine) as connection:
            found = leases.held(connection, owner)
        assert found == {
            pack.id: leases.Held(pack.attempt, stop=sweep.wanted != Wanted.RUN or pack.preempted)
            for sweep, pack in self.packs()
            if pack.owner == owner
        }

    # --- what time does ---

    @precondition(some_run)
    @rule(owner=st.sampled_from(OWNERS))
    def expire(self, owner: str) -> None:
        with write(self.engine) as connection:
            late = update(packs).where(packs.c.lease_owner == owner)
            connection.execute(late.values(lease_until=clock() - 1))
        for _, pack in self.packs():
            pack.expired |= pack.owner == owner

    @precondition(lambda self: any(pack.waits for _, pack in self.packs()))
    @rule()
    def wait(self) -> None:
        with write(self.engine) as connection:
            connection.execute(update(packs).values(not_before=clock() - 1))
            for sweep in self.sweeps:
                leases.settle(connection, sweep.id)
        for _, pack in self.packs():
            pack.waits = False

    # --- what must hold ---

    @invariant()
    def the_database_is_as_the_model_says(self) -> None:
        self.counts["steps"] += 1
        recorded = select(runs.c.pack_id, runs.c.pack_index, results.c.diverged_step, results.c.reused_from)
        with read(self.engine) as connection:
            found = connection.execute(select(packs).order_by(packs.c.id)).all()
            states = connection.execute(select(sweeps.c.id, sweeps.c.wanted, sweeps.c.state)).all()
            trained = connection.execute(select(sweeps.c.id, sweeps.c.run_steps_trained)).all()
            rows = connection.execute(recorded.join(results, results.c.run_id == runs.c.id)).all()
        wanted = sorted((pack for _, pack in self.packs()), key=lambda pack: pack.id)
        assert [_of_row(row) for row in found] == [_of_model(pack) for pack in wanted]
        assert {tuple(row) for row in states} == {(s.id, s.wanted, s.state) for s in self.sweeps}
        assert {tuple(row) for row in trained} == {
            (sweep.id, sum(sum(pack.trained) for pack in sweep.packs)) for sweep in self.sweeps
        }
        assert sorted(
            (r.pack_id, r.pack_index, r.diverged_step is not None, r.reused_from is not None) for r in rows
        ) == [
            (pack.id, place, place in pack.diverged, place in pack.reused)
            for pack in wanted
            if pack.state == PackState.COMPLETED
            for place in range(RUNS)
        ]

    @invariant()
    def the_books_are_right(self) -> None:
        check_books(self.engine)


def _of_row(row: Any) -> tuple[Any, ...]:
    return (row.id, row.state, row.attempt, row.max_attempts, row.lease_owner, row.step, bool(row.preempted))


def _of_model(pack: Pack) -> tuple[Any, ...]:
    state, owner = pack.state, pack.owner
    return (pack.id, state, pack.attempt, pack.max_attempts, owner, pack.step, pack.preempted)


@pytest.fixture(params=["sqlite", "postgresql"])
def fast_engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """A database of each kind that is fast: nothing here depends on the disk."""
    if request.param == "sqlite":
        with migrated("sqlite://") as engine:
            yield engine
        return
    with (
        postgresql_database(request.getfixturevalue("postgresql_url")) as url,
        migrated(url) as engine,
    ):
        yield engine


def test_t7_lease_machine(fast_engine: Engine, say: Callable[[str], None]) -> None:
    LeaseMachine.counts = counts = Counter()
    run_state_machine_as_test(
        lambda: LeaseMachine(fast_engine),
        settings=settings(
            max_examples=SCALE.machine_examples,
            stateful_step_count=SCALE.machine_steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    say(
        f"T7 {fast_engine.dialect.name}: {counts['examples']} examples, {counts['steps']} steps, "
        f"{counts['writes']} writes accepted, {counts['stale writes']} stale ones refused"
    )
    assert counts["writes"]
    assert counts["stale writes"]
