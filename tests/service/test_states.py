"""Every transition of packs and sweeps, and everything that is none, on both databases."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from sqlalchemy import Engine

from service.db.engine import read, write
from service.dispatch import leases
from service.dispatch.leases import Lease
from service.dispatch.states import (
    PACK_TRANSITIONS,
    Action,
    PackEvent,
    PackState,
    SweepState,
    Wanted,
    possible_actions,
    sweep_state,
    wanted_after,
)
from service.errors import ConflictError, NotFoundError
from service.sweeps import actions, queries
from tests.service.helpers import ENVIRONMENT, claim, expire, outcome, pack_rows, submit

RUNS = 18


def do(engine: Engine, sweep_id: str, action: Action) -> bool:
    """Ask for an action; false if it is refused."""
    try:
        with write(engine) as connection:
            actions.act(connection, sweep_id, action)
    except ConflictError:
        return False
    return True


def state_of(engine: Engine, sweep_id: str) -> str:
    with read(engine) as connection:
        return queries.get(connection, sweep_id).state


def claim_one(engine: Engine) -> Lease | None:
    with write(engine) as connection:
        return next(iter(claim(connection, "a", 1)), None)


def finish(engine: Engine, lease: Lease) -> None:
    with write(engine) as connection:
        leases.finish(connection, lease, outcome(RUNS), ENVIRONMENT)


def give_up(engine: Engine, lease: Lease) -> None:
    with write(engine) as connection:
        leases.give_up(connection, lease, "e", "d")


# --- packs ---


def to_pack_state(engine: Engine, sweep_id: str, state: PackState) -> Lease:
    """Bring the sweep's only pack to a state; return the lease that it last had, or one of no attempt."""
    if state in (PackState.QUEUED, PackState.CANCELLED):
        if state == PackState.CANCELLED:
            do(engine, sweep_id, Action.CANCEL)
        return Lease(pack_rows(engine)[0].id, sweep_id, 0, 5)
    lease = claim_one(engine)
    assert lease is not None
    if state == PackState.COMPLETED:
        finish(engine, lease)
    elif state == PackState.FAILED:
        give_up(engine, lease)
    return lease


def requeue(engine: Engine, lease: Lease) -> None:
    with write(engine) as connection:
        leases.requeue(connection, lease, 0, "e", "d")


def stopped(engine: Engine, lease: Lease) -> None:
    with write(engine) as connection:
        leases.stopped(connection, lease)


def release(engine: Engine, lease: Lease) -> None:
    with write(engine) as connection:
        leases.release(connection, "a")


def reap(engine: Engine, lease: Lease) -> None:
    expire(engine)
    with write(engine) as connection:
        leases.reap(connection)


EVENTS: dict[str, tuple[PackEvent, Callable[[Engine, Lease], Any]]] = {
    "claim": (PackEvent.CLAIM, lambda engine, lease: claim_one(engine)),
    "finish": (PackEvent.FINISH, finish),
    "give up": (PackEvent.GIVE_UP, give_up),
    "requeue": (PackEvent.GIVE_BACK, requeue),
    "stopped": (PackEvent.GIVE_BACK, stopped),
    "release": (PackEvent.GIVE_BACK, release),
    "reap": (PackEvent.GIVE_BACK, reap),
    "cancel": (PackEvent.CANCEL, lambda engine, lease: do(engine, lease.sweep_id, Action.CANCEL)),
    "retry": (PackEvent.RETRY, lambda engine, lease: do(engine, lease.sweep_id, Action.RETRY)),
}


@pytest.mark.parametrize("state", PackState)
@pytest.mark.parametrize("name", EVENTS)
def test_a_pack_moves_by_the_table_alone(
    engine: Engine, small_spec: dict[str, Any], state: PackState, name: str
) -> None:
    sweep_id = submit(engine, small_spec)
    lease = to_pack_state(engine, sweep_id, state)
    assert pack_rows(engine)[0].state == state
    event, act = EVENTS[name]
    act(engine, lease)
    (pack,) = pack_rows(engine)
    assert pack.state == PACK_TRANSITIONS.get((state, event), state)
    assert (pack.lease_owner is not None) == (pack.state == "running")


@pytest.mark.parametrize("name", ["requeue", "stopped", "release", "reap"])
def test_what_comes_back_from_a_cancelled_sweep_is_cancelled(
    engine: Engine, small_spec: dict[str, Any], name: str
) -> None:
    sweep_id = submit(engine, small_spec)
    lease = to_pack_state(engine, sweep_id, PackState.RUNNING)
    do(engine, sweep_id, Action.CANCEL)
    assert state_of(engine, sweep_id) == "cancelling"
    EVENTS[name][1](engine, lease)
    assert pack_rows(engine)[0].state == "cancelled"
    assert state_of(engine, sweep_id) == "cancelled"


def test_what_ends_in_a_cancelled_sweep_has_ended(engine: Engine, small_spec: dict[str, Any]) -> None:
    sweep_id = submit(engine, small_spec)
    lease = to_pack_state(engine, sweep_id, PackState.RUNNING)
    do(engine, sweep_id, Action.CANCEL)
    finish(engine, lease)
    assert state_of(engine, sweep_id) == "completed"


# --- sweeps ---


def to_sweep_state(engine: Engine, spec: dict[str, Any], state: SweepState) -> str:
    """Make a sweep of one pack in a state."""
    sweep_id = submit(engine, spec)
    started = state in (
        SweepState.RUNNING,
        SweepState.PAUSING,
        SweepState.CANCELLING,
        SweepState.COMPLETED,
        SweepState.FAILED,
    )
    lease = claim_one(engine) if started else None
    if state in (SweepState.PAUSING, SweepState.PAUSED):
        do(engine, sweep_id, Action.PAUSE)
    if state in (SweepState.CANCELLING, SweepState.CANCELLED):
        do(engine, sweep_id, Action.CANCEL)
    if lease and state == SweepState.COMPLETED:
        finish(engine, lease)
    if lease and state == SweepState.FAILED:
        give_up(engine, lease)
    assert state_of(engine, sweep_id) == state
    return sweep_id


S, A = SweepState, Action
REFUSED = None
AFTER: dict[Action, dict[SweepState, SweepState | None]] = {
    A.CANCEL: {
        S.QUEUED: S.CANCELLED,
        S.RUNNING: S.CANCELLING,
        S.PAUSING: S.CANCELLING,
        S.PAUSED: S.CANCELLED,
        S.CANCELLING: S.CANCELLING,
        S.CANCELLED: S.CANCELLED,
        S.COMPLETED: REFUSED,
        S.FAILED: REFUSED,
    },
    A.PAUSE: {
        S.QUEUED: S.PAUSED,
        S.RUNNING: S.PAUSING,
        S.PAUSING: S.PAUSING,
        S.PAUSED: S.PAUSED,
        S.CANCELLING: REFUSED,
        S.CANCELLED: REFUSED,
        S.COMPLETED: REFUSED,
        S.FAILED: REFUSED,
    },
    A.RESUME: {
        S.QUEUED: S.QUEUED,
        S.RUNNING: S.RUNNING,
        S.PAUSING: S.RUNNING,
        S.PAUSED: S.QUEUED,
        S.CANCELLING: REFUSED,
        S.CANCELLED: REFUSED,
        S.COMPLETED: REFUSED,
        S.FAILED: REFUSED,
    },
    A.RETRY: {
        S.QUEUED: S.QUEUED,
        S.RUNNING: S.RUNNING,
        S.PAUSING: S.PAUSING,
        S.PAUSED: S.PAUSED,
        S.CANCELLING: S.RUNNING,
        S.CANCELLED: S.QUEUED,
        S.COMPLETED: S.COMPLETED,
        S.FAILED: S.RUNNING,
    },
}


@pytest.mark.parametrize(("action", "state"), list(product(Action, SweepState)))
def test_an_action_in_every_state_once_and_twice(
    engine: Engine, small_spec: dict[str, Any], action: Action, state: SweepState
) -> None:
    wanted = AFTER[action][state]
    assert (wanted_after(action, state) is None) == (wanted is REFUSED)
    sweep_id = to_sweep_state(engine, small_spec, state)
    assert do(engine, sweep_id, action) == (wanted is not REFUSED)
    assert state_of(engine, sweep_id) == (wanted or state)
    before = pack_rows(engine)
    assert do(engine, sweep_id, action) == (wanted is not REFUSED)
    assert state_of(engine, sweep_id) == (wanted or state)
    assert [(p.state, p.attempt, p.max_attempts) for p in pack_rows(engine)] == [
        (p.state, p.attempt, p.max_attempts) for p in before
    ]


@pytest.mark.parametrize("state", SweepState)
def test_the_actions_that_are_offered_are_those_that_change_something(state: SweepState) -> None:
    failed = int(state == SweepState.FAILED)
    changing = {a for a in Action if AFTER[a][state] not in (REFUSED, state)}
    assert set(possible_actions(state, failed_packs=failed)) == changing


def test_no_action_on_a_sweep_that_is_not_there(engine: Engine) -> None:
    with write(engine) as connection, pytest.raises(NotFoundError):
        actions.act(connection, "0123456789", Action.PAUSE)


def test_a_paused_sweep_is_not_claimed_and_goes_on_after(engine: Engine, small_spec: dict[str, Any]) -> None:
    sweep_id = submit(engine, small_spec)
    do(engine, sweep_id, Action.PAUSE)
    assert claim_one(engine) is None
    do(engine, sweep_id, Action.RESUME)
    assert claim_one(engine) is not None


def test_a_retried_pack_has_all_its_attempts_again(engine: Engine, small_spec: dict[str, Any]) -> None:
    sweep_id = to_sweep_state(engine, small_spec, SweepState.FAILED)
    do(engine, sweep_id, Action.RETRY)
    (pack,) = pack_rows(engine)
    assert (pack.state, pack.attempt, pack.max_attempts, pack.error) == ("queued", 1, 6, None)
    lease = claim_one(engine)
    assert lease is not None
    finish(engine, lease)
    assert state_of(engine, sweep_id) == "completed"


@pytest.mark.parametrize("wanted", Wanted)
@pytest.mark.parametrize("counts", [counts for counts in product(range(2), repeat=5) if sum(counts)])
def test_a_sweeps_state_follows_from_its_packs(counts: tuple[int, ...], wanted: Wanted) -> None:
    queued, running, completed, failed, cancelled = counts
    started = running + completed + failed > 0
    found = sweep_state(wanted, dict(zip(PackState, counts, strict=True)), started=started)
    if not queued + running:
        assert found == (S.CANCELLED if cancelled else S.FAILED if failed else S.COMPLETED)
    elif wanted == Wanted.CANCEL:
        assert found == S.CANCELLING
    elif wanted == Wanted.PAUSE:
        assert found == (S.PAUSING if running else S.PAUSED)
    else:
        assert found == (S.RUNNING if started else S.QUEUED)
