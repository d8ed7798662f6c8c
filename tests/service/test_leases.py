"""The lease contract, on SQLite and PostgreSQL: one attempt at a time may write, and its token says which."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, func, select

from service.db.engine import read, write
from service.db.tables import curves, results, runs
from service.dispatch import leases, queue
from service.dispatch.leases import Lease
from service.sweeps import queries
from tests.service.helpers import ENVIRONMENT, claim, expire, make_ready, outcome, pack_rows, submit

RUNS = 18


def claim_one(engine: Engine, owner: str = "a") -> Lease:
    with write(engine) as connection:
        (lease,) = claim(connection, owner, 1)
    return lease


def count(engine: Engine, table: Any) -> int:
    with read(engine) as connection:
        return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


def state(engine: Engine, sweep_id: str) -> queries.SweepRow:
    with read(engine) as connection:
        return queries.get(connection, sweep_id)


def test_a_claim_raises_the_attempt_and_starts_the_sweep(engine: Engine, small_spec: dict[str, Any]) -> None:
    sweep_id = submit(engine, small_spec)
    assert state(engine, sweep_id).state == "queued"
    lease = claim_one(engine)
    assert (lease.sweep_id, lease.attempt) == (sweep_id, 1)
    (pack,) = pack_rows(engine)
    assert (pack.state, pack.attempt, pack.lease_owner) == ("running", 1, "a")
    assert state(engine, sweep_id).state == "running"
    with write(engine) as connection:
        assert claim(connection, "b", 5) == []


def test_older_sweeps_come_first_and_the_limit_is_kept(engine: Engine, small_spec: dict[str, Any]) -> None:
    ids = [submit(engine, small_spec) for _ in range(5)]
    with write(engine) as connection:
        claimed = claim(connection, "a", 3)
    assert [lease.sweep_id for lease in claimed] == ids[:3]


def test_two_claimers_never_get_the_same_pack(engine: Engine, small_spec: dict[str, Any]) -> None:
    for _ in range(24):
        submit(engine, small_spec)
    taken: list[int] = []

    def claimer(name: str) -> None:
        while True:
            with write(engine) as connection:
                got = claim(connection, name, 2)
            if not got:
                return
            taken.extend(lease.pack_id for lease in got)

    threads = [threading.Thread(target=claimer, args=(f"d{k}",)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 24


def test_finishing_records_every_run_once(engine: Engine, small_spec: dict[str, Any]) -> None:
    sweep_id = submit(engine, small_spec)
    lease = claim_one(engine)
    with write(engine) as connection:
        assert leases.finish(connection, lease, outcome(RUNS, diverged=frozenset({3})), ENVIRONMENT)
    assert count(engine, results) == RUNS
    assert count(engine, curves) == RUNS * 4
    row = state(engine, sweep_id)
    assert (row.state, row.runs_done, row.runs_diverged, row.run_steps_done) == (
        "completed",
        RUNS,
        1,
        RUNS * 4,
    )
    with read(engine) as connection:
        assert leases.is_recorded(connection, lease)
        query = select(results, runs.c.pack_index).join(runs, runs.c.id == results.c.run_id)
        rows = {row.pack_index: row for row in connection.execute(query)}
    assert rows[2].train_loss == 3.0
    assert (rows[3].state, rows[3].train_loss, rows[3].diverged_kind) == ("diverged", None, "nan")
    assert (rows[3].diverged_step, rows[3].last_finite) == (3, 2.5)
    with write(engine) as connection:
        assert not leases.finish(connection, lease, outcome(RUNS), ENVIRONMENT)
    assert count(engine, results) == RUNS


Write = Callable[[Connection, Lease], bool]
STALE_WRITES: dict[str, Write] = {
    "progress": lambda c, lease: leases.progress(c, lease, 2),
    "finish": lambda c, lease: leases.finish(c, lease, outcome(RUNS, 9.0), ENVIRONMENT),
    "requeue": lambda c, lease: leases.requeue(c, lease, 0, "e", "d"),
    "give_up": lambda c, lease: leases.give_up(c, lease, "e", "d"),
    "start": lambda c, lease: leases.start(c, lease, "node", "device"),
    "stopped": lambda c, lease: leases.stopped(c, lease),
    "held": lambda c, lease: lease.pack_id in leases.held(c, "a"),
}


@pytest.mark.parametrize("name", STALE_WRITES)
@pytest.mark.parametrize("then", ["queued", "running", "completed"])
def test_a_stale_attempt_writes_nothing(
    engine: Engine, small_spec: dict[str, Any], name: str, then: str
) -> None:
    submit(engine, small_spec)
    stale = claim_one(engine)
    expire(engine)
    with write(engine) as connection:
        assert leases.reap(connection) == 1
    if then != "queued":
        fresh = claim_one(engine, "b")
        assert fresh.attempt == 2
    if then == "completed":
        with write(engine) as connection:
            assert leases.finish(connection, fresh, outcome(RUNS), ENVIRONMENT)
    before = pack_rows(engine), count(engine, results)
    with write(engine) as connection:
        assert not STALE_WRITES[name](connection, stale)
    assert (pack_rows(engine), count(engine, results)) == before


def test_the_fence_is_the_attempt(engine: Engine, small_spec: dict[str, Any]) -> None:
    """The control: a zombie that knew the current number would get through."""
    submit(engine, small_spec)
    zombie = claim_one(engine)
    expire(engine)
    with write(engine) as connection:
        leases.reap(connection)
    current = claim_one(engine, "b")
    with write(engine) as connection:
        assert not leases.progress(connection, zombie, 1)
        assert leases.progress(connection, replace(zombie, attempt=current.attempt), 1)


def test_a_renewed_lease_is_not_reaped(engine: Engine, small_spec: dict[str, Any]) -> None:
    submit(engine, small_spec)
    lease = claim_one(engine)
    expire(engine)
    with write(engine) as connection:
        leases.renew(connection, "a")
        assert leases.held(connection, "a") == {lease.pack_id: leases.Held(1, stop=False)}
        assert leases.reap(connection) == 0
        leases.renew(connection, "someone else")


def test_reaping_gives_up_after_the_last_attempt(engine: Engine, small_spec: dict[str, Any]) -> None:
    sweep_id = submit(engine, small_spec)
    for _ in range(5):
        claim_one(engine)
        expire(engine)
        with write(engine) as connection:
            assert leases.reap(connection) == 1
    row = state(engine, sweep_id)
    assert (row.state, row.failed_packs) == ("failed", 1)
    assert "lease ran out" in (row.error or "")
    assert row.finished_at is not None


def test_a_released_pack_loses_no_attempt(engine: Engine, small_spec: dict[str, Any]) -> None:
    submit(engine, small_spec)
    lease = claim_one(engine, "gone")
    with write(engine) as connection:
        assert leases.release(connection, "someone else") == 0
        assert leases.release(connection, "gone") == 1
        assert not leases.progress(connection, lease, 1)
    (pack,) = pack_rows(engine)
    assert (pack.state, pack.lease_until, pack.max_attempts - pack.attempt) == ("queued", None, 5)


def test_a_requeued_pack_waits(engine: Engine, small_spec: dict[str, Any]) -> None:
    submit(engine, small_spec)
    lease = claim_one(engine)
    with write(engine) as connection:
        assert leases.requeue(connection, lease, 60.0, "worker lost", "")
        assert claim(connection, "a", 1) == []
        assert not queue.has_work(connection, claimable=True)
    make_ready(engine)
    with write(engine) as connection:
        assert queue.has_work(connection, claimable=True)
        assert not queue.has_work(connection, claimable=False)
        (again,) = claim(connection, "a", 1)
    assert again.attempt == 2


def test_finish_is_one_transaction(engine: Engine, small_spec: dict[str, Any]) -> None:
    submit(engine, small_spec)
    lease = claim_one(engine)
    broken = (*outcome(RUNS - 1), replace(outcome(1)[0], index=999))
    with pytest.raises(KeyError), write(engine) as connection:
        leases.finish(connection, lease, broken, ENVIRONMENT)
    assert count(engine, results) == 0
    assert pack_rows(engine)[0].state == "running"


def test_a_failed_pack_fails_its_sweep_once_the_others_are_over(
    engine: Engine, small_spec: dict[str, Any]
) -> None:
    small_spec["seeds"] = 24  # three packs
    sweep_id = submit(engine, small_spec)
    with write(engine) as connection:
        first, *rest = claim(connection, "a", 9)
        assert leases.give_up(connection, first, "out of luck", "trace")
    assert state(engine, sweep_id).state == "running"
    sizes = {pack.id: pack.runs_total for pack in pack_rows(engine)}
    for lease in rest:
        with write(engine) as connection:
            assert leases.finish(connection, lease, outcome(sizes[lease.pack_id]), ENVIRONMENT)
    row = state(engine, sweep_id)
    assert (row.state, row.error, row.failed_packs) == ("failed", "out of luck", 1)
