"""What the policy sees of the database, on both; quotas, priorities and shares through the dispatcher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import Engine, insert, select, update

from service.db.engine import clock, read, write
from service.db.tables import attempts, dispatchers, is_running, packs, shares, sweeps
from service.dispatch import leases, presence, queue
from service.dispatch.fairness import Snapshot, schedule
from service.dispatch.loop import BARREN_S, Dispatcher
from service.dispatch.states import Action
from service.errors import ConflictError
from service.sweeps import actions, queries
from service.teams import queries as teams
from tests.service.helpers import ENVIRONMENT, claim, expire, outcome, pack_rows, submit
from tests.service.test_dispatcher import Script, finished
from workers.protocol import Node, PackProgress, PackStarted, PackStopped, Pool

CPUS = Pool()
H100 = Pool("gpu", "H100")
NODES = [Node("1", "one", CPUS, 2.0), Node("2", "two", CPUS, 1.0), Node("3", "head", CPUS, 0.0)]


def look(engine: Engine, nodes: Sequence[Node] = NODES, cluster: str = "cluster", **more: Any) -> Snapshot:
    with write(engine) as connection:
        times = queue.lock(connection)
        return queue.snapshot(connection, cluster, nodes, virtual_times=times, **more)


def put_team(engine: Engine, name: str, weight: float = 1.0, **quotas: Any) -> None:
    with write(engine) as connection:
        teams.put(connection, name, weight, quotas.get("max_devices"), quotas.get("max_queued_runs"))


def test_the_snapshot_of_a_queue(engine: Engine, small_spec: dict[str, Any]) -> None:
    put_team(engine, "others", 2.0, max_devices=5.0)
    first = submit(engine, small_spec | {"priority": 3})
    second = submit(engine, small_spec, team="others")
    paused = submit(engine, small_spec)
    with write(engine) as connection:
        actions.act(connection, paused, Action.PAUSE)
        (lease,) = leases.claim(connection, "a", "cluster", second, 1, CPUS, charged=4.0)
        leases.start(connection, lease, "one", "a CPU")
    seen = look(engine, backlog=1, stoppable=True)
    assert {(t.name, t.weight, t.max_devices) for t in seen.teams} == {
        ("default", 1.0, None),
        ("others", 2.0, 5.0),
    }
    (waiting,) = seen.waiting
    assert (waiting.sweep_id, waiting.team, waiting.priority, waiting.packs) == (first, "default", 3, 1)
    assert (waiting.running, waiting.share, waiting.kind, waiting.model) == (0.0, 1.0, None, None)
    assert waiting.seconds > 0
    assert 0 <= waiting.waited < 60
    (running,) = seen.running
    assert (running.pack_id, running.team, running.pool, running.charged) == (
        lease.pack_id,
        "others",
        CPUS,
        4.0,
    )
    assert (running.stoppable, running.stopping) == (True, False)
    assert seen.devices == {CPUS: 3.0}
    assert seen.free == {CPUS: 2.0}
    assert seen.backlog == 1


def test_devices_that_another_dispatcher_of_the_cluster_uses_are_not_free(
    engine: Engine, small_spec: dict[str, Any]
) -> None:
    ids = [submit(engine, small_spec) for _ in range(3)]
    with write(engine) as connection:
        presence.announce(connection, "b", "cluster", NODES)
        presence.announce(connection, "c", "elsewhere", [Node("9", "nine", CPUS, 4.0)])
        leases.claim(connection, "b", "cluster", ids[0], 1, CPUS)
        leases.claim(connection, "c", "elsewhere", ids[1], 1, CPUS)
    seen = look(engine)
    assert seen.free == {CPUS: 2.0}
    assert seen.devices == {CPUS: 7.0}
    assert len(seen.running) == 2
    with write(engine) as connection:
        presence.leave(connection, "c")
    assert look(engine).devices == {CPUS: 3.0}


def test_a_dispatcher_that_is_silent_for_long_counts_no_more(engine: Engine) -> None:
    with write(engine) as connection:
        presence.announce(connection, "b", "there", NODES)
        assert [seen.nodes for seen in presence.present(connection)] == [tuple(NODES)]
        connection.execute(update(dispatchers).values(seen_at=clock() - presence.ALIVE_S - 1))
        assert presence.present(connection) == []
        presence.announce(connection, "a", "here", [])
        assert connection.scalars(select(dispatchers.c.owner)).all() == ["a"]


def test_no_more_waiting_sweeps_are_read_than_could_be_served(
    engine: Engine, small_spec: dict[str, Any]
) -> None:
    put_team(engine, "others")
    ids = [
        submit(engine, small_spec | {"priority": k % 3}, team=t)
        for k in range(9)
        for t in ("default", "others")
    ]
    seen = look(engine, NODES[:1])
    assert Counter(w.team for w in seen.waiting) == {"default": 3, "others": 3}
    assert {w.priority for w in seen.waiting} == {2}
    assert {w.sweep_id for w in seen.waiting} == {ids[k] for k in (4, 5, 10, 11, 16, 17)}


def test_sweeps_that_wait_for_another_kind_hide_nobody(engine: Engine, small_spec: dict[str, Any]) -> None:
    for _ in range(5):
        submit(engine, small_spec | {"priority": 9, "device": {"kind": "gpu"}})
    plain = submit(engine, small_spec)
    script = Script(slots=1)
    Dispatcher(engine, script, "a").step(0)
    assert len(script.tasks) == 1
    with read(engine) as connection:
        assert queries.get(connection, plain).state == "running"


def test_a_sweep_stays_on_the_kind_of_device_of_its_first_pack(
    engine: Engine, small_spec: dict[str, Any]
) -> None:
    small_spec["seeds"] = 60  # several packs
    submit(engine, small_spec)
    script, now = Script(slots=1), [0.0]
    dispatcher = Dispatcher(engine, script, "a", now=lambda: now[0])
    dispatcher.step(0)
    assert [task.pool for task in script.tasks] == [CPUS]
    script.nodes = lambda: [Node("g", "gpus", H100, 8.0)]  # type: ignore[method-assign]
    script.events = [finished(script.tasks[0])]
    for _ in range(3):
        dispatcher.step(0)
    assert len(script.tasks) == 1
    script.nodes = lambda: [*NODES, Node("g", "gpus", H100, 8.0)]  # type: ignore[method-assign]
    now[0] += BARREN_S
    for _ in range(3):
        dispatcher.step(0)
    assert len(script.tasks) > 1
    assert {task.pool for task in script.tasks} == {CPUS}


def test_a_sweep_gets_the_device_that_it_asks_for(engine: Engine, small_spec: dict[str, Any]) -> None:
    submit(engine, small_spec | {"device": {"kind": "gpu", "model": "H100"}})
    script, now = Script(), [0.0]
    dispatcher = Dispatcher(engine, script, "a", now=lambda: now[0])
    dispatcher.step(0)
    assert script.tasks == []
    script.nodes = lambda: [Node("g", "gpus", H100, 1.0)]  # type: ignore[method-assign]
    now[0] += BARREN_S
    dispatcher.step(0)
    assert [task.pool for task in script.tasks] == [H100]


def test_quotas(engine: Engine, small_spec: dict[str, Any]) -> None:
    put_team(engine, "small", max_devices=1.0, max_queued_runs=40)
    for _ in range(2):
        submit(engine, small_spec, team="small")
    with pytest.raises(ConflictError, match="may have 40 runs waiting; with these there would be 54"):
        submit(engine, small_spec, team="small")
    script = Script()
    dispatcher = Dispatcher(engine, script, "a")
    for _ in range(3):
        dispatcher.step(0)
    assert len(script.tasks) == 1
    submit(engine, small_spec, team="small")  # room again
    script.events = [finished(script.tasks[0])]
    for _ in range(3):
        dispatcher.step(0)
    assert len(script.tasks) == 2


def test_higher_priority_comes_first(engine: Engine, small_spec: dict[str, Any]) -> None:
    low, high = (submit(engine, small_spec | {"priority": priority}) for priority in (-1, 1))
    script = Script(slots=1)
    Dispatcher(engine, script, "a").step(0)
    with read(engine) as connection:
        assert queries.get(connection, high).state == "running"
        assert queries.get(connection, low).state == "queued"


def test_two_dispatchers_of_a_cluster_do_not_give_a_device_out_twice(
    engine: Engine, small_spec: dict[str, Any]
) -> None:
    for _ in range(6):
        submit(engine, small_spec)
    one, two = Script(slots=3), Script(slots=3)
    one.cluster = two.cluster = "the same"
    dispatchers = [Dispatcher(engine, one, "a"), Dispatcher(engine, two, "b")]
    for _ in range(3):
        for dispatcher in dispatchers:
            dispatcher.step(0)
    assert len(one.tasks) + len(two.tasks) == 3


def test_devices_go_by_weight(engine: Engine, small_spec: dict[str, Any]) -> None:
    """One device, packs of equal length, three teams that always wait for more."""
    for name, weight in (("one", 1.0), ("two", 2.0), ("four", 4.0)):
        put_team(engine, name, weight)
        for _ in range(42):
            submit(engine, small_spec, team=name)
    script = Script(slots=1)
    dispatcher = Dispatcher(engine, script, "a")
    for _ in range(71):
        dispatcher.step(0)
        task = script.tasks[-1]
        script.events = [PackStarted(task.pack_id, task.attempt, "here", "a CPU"), finished(task)]
        with write(engine) as connection:  # ten seconds of it
            dispatcher.outbox.extend(script.events[:1])
            script.events = script.events[1:]
        dispatcher._deliver()
        with write(engine) as connection:
            connection.execute(
                update(attempts).where(attempts.c.outcome == "running").values(started_at=clock() - 10)
            )
    with read(engine) as connection:
        of_team = {team.name: team.device_seconds for team in teams.every(connection)}
    assert of_team["two"] / of_team["one"] == pytest.approx(2, rel=0.15)
    assert of_team["four"] / of_team["one"] == pytest.approx(4, rel=0.15)


def test_a_pack_is_told_to_make_room_and_loses_no_attempt(engine: Engine, small_spec: dict[str, Any]) -> None:
    put_team(engine, "late")
    for _ in range(2):
        submit(engine, small_spec)
    script, now = Script(slots=2), [0.0]
    dispatcher = Dispatcher(engine, script, "a", now=lambda: now[0], keeps_state=True)
    dispatcher.step(0)
    assert len(script.tasks) == 2
    for task in script.tasks:
        dispatcher.outbox.append(PackStarted(task.pack_id, 1, "here", "a CPU"))
        dispatcher.outbox.extend(PackProgress(task.pack_id, 1, step, 4, 18) for step in (0, 1))
    dispatcher.step(0)
    late = submit(engine, small_spec, team="late")
    with write(engine) as connection:
        connection.execute(update(attempts).values(started_at=clock() - 1000))
        connection.execute(update(sweeps).values(created_at=clock() - 100, ready_at=clock() - 100))
    now[0] += 6
    dispatcher.step(0)
    assert script.stopped == []
    dispatcher.step(0)
    ((pack_id, attempt),) = script.stopped
    script.events = [PackStopped(pack_id, attempt, kept=True)]
    dispatcher.step(0)
    dispatcher.step(0)
    assert len(script.tasks) == 3
    with read(engine) as connection:
        assert queries.get(connection, late).state == "running"
    (stopped,) = [pack for pack in pack_rows(engine) if pack.id == pack_id]
    assert (stopped.state, stopped.max_attempts - stopped.attempt) == ("queued", 5)
    with read(engine) as connection:
        outcomes = connection.execute(select(attempts.c.outcome).where(attempts.c.pack_id == pack_id)).all()
    assert outcomes == [("stopped",)]


@pytest.mark.parametrize(("action", "then"), [(Action.PAUSE, "queued"), (Action.CANCEL, "cancelled")])
def test_what_is_asked_of_a_sweep_reaches_its_packs(
    engine: Engine, small_spec: dict[str, Any], action: Action, then: str
) -> None:
    sweep_id = submit(engine, small_spec)
    script = Script()
    dispatcher = Dispatcher(engine, script, "a")
    dispatcher.step(0)
    with write(engine) as connection:
        actions.act(connection, sweep_id, action)
    for _ in range(3):
        dispatcher.step(0)
    (task,) = script.tasks
    assert script.stopped == [(task.pack_id, 1)]
    script.events = [PackStopped(task.pack_id, 1, kept=True, log="written last")]
    dispatcher.step(0)
    dispatcher.step(0)
    assert [pack.state for pack in pack_rows(engine)] == [then]
    assert dispatcher.held == {}
    assert len(script.tasks) == 1


def test_the_ledger_and_the_charges_of_a_finished_attempt(engine: Engine, small_spec: dict[str, Any]) -> None:
    submit(engine, small_spec)
    script = Script()
    dispatcher = Dispatcher(engine, script, "a")
    dispatcher.step(0)
    (task,) = script.tasks
    with read(engine) as connection:
        (charged,) = connection.scalars(select(shares.c.virtual_time)).all()
    dispatcher.outbox.append(PackStarted(task.pack_id, 1, "here", "a CPU"))
    dispatcher._deliver()
    with write(engine) as connection:
        connection.execute(update(attempts).values(started_at=clock() - 20))
    dispatcher.outbox.append(finished(task))
    dispatcher._deliver()
    with read(engine) as connection:
        (row,) = connection.execute(select(attempts)).all()
        (time,) = connection.scalars(select(shares.c.virtual_time)).all()
    assert row.device_seconds == pytest.approx(20, abs=2)
    assert time == pytest.approx(charged + row.device_seconds - row.charged)


def test_logs_are_appended_and_bounded(
    engine: Engine, small_spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LOG_BYTES", 20)
    submit(engine, small_spec)
    with write(engine) as connection:
        (lease,) = claim(connection, "a", 1)
        leases.progress(connection, lease, 0, "0123456789")
        leases.progress(connection, lease, 1, "abcdefghij")
        assert connection.execute(select(attempts.c.log)).scalar_one() == "0123456789abcdefghij"
        leases.progress(connection, lease, 2, "XYZ")
        assert connection.execute(select(attempts.c.log)).scalar_one() == "3456789abcdefghijXYZ"
        leases.finish(connection, lease, outcome(18), ENVIRONMENT, log="!")
        assert connection.execute(select(attempts.c.log)).scalar_one() == "456789abcdefghijXYZ!"


def test_what_an_attempt_writes_can_be_stored(engine: Engine, small_spec: dict[str, Any]) -> None:
    submit(engine, small_spec)
    script = Script()
    dispatcher = Dispatcher(engine, script, "a")
    dispatcher.step(0)
    (task,) = script.tasks
    dispatcher.outbox.append(PackProgress(task.pack_id, 1, 1, 4, 18, log="a\x00b\ud800c"))
    dispatcher._deliver()
    with read(engine) as connection:
        assert connection.execute(select(attempts.c.log)).scalar_one() == "a\ufffdb?c"


def test_an_expired_lease_is_lost_in_the_ledger(engine: Engine, small_spec: dict[str, Any]) -> None:
    submit(engine, small_spec)
    with write(engine) as connection:
        claim(connection, "a", 1)
    expire(engine)
    with write(engine) as connection:
        leases.reap(connection)
        row = connection.execute(select(attempts)).one()
    assert (row.outcome, row.device_seconds, row.run_steps) == ("lost", 0.0, 0)
    assert row.ended_at is not None


def test_the_queue_is_read_by_its_indexes(sqlite_engine: Engine) -> None:
    queries_of = {
        "ix_sweeps_queue": select(sweeps.c.id).where(queue._is_waiting()),
        "ix_packs_leases": select(packs.c.id).where(is_running),
    }
    for index, query in queries_of.items():
        text = str(query.compile(sqlite_engine, compile_kwargs={"literal_binds": True}))
        with read(sqlite_engine) as connection:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}").all()
        assert index in str(plan)


def test_a_correction_between_look_and_charge_is_kept(engine: Engine, small_spec: dict[str, Any]) -> None:
    """Two dispatchers of a PostgreSQL: one closes an attempt while the other one decides."""
    for _ in range(2):
        submit(engine, small_spec)
    with write(engine) as connection:
        connection.execute(insert(shares).values(team_id=1, pool=CPUS.key(), virtual_time=100.0))
    seen = look(engine)
    decision = schedule(seen)
    charged = decision.team_times["default", CPUS] - 100.0
    with write(engine) as connection:
        connection.execute(update(shares).values(virtual_time=shares.c.virtual_time + 3540.0))
        queue.charge(connection, seen, decision)
        (time,) = connection.scalars(select(shares.c.virtual_time))
    assert time == pytest.approx(100.0 + 3540.0 + charged)


def test_a_sweep_that_was_paused_was_kept_waiting_by_nobody(
    engine: Engine, small_spec: dict[str, Any]
) -> None:
    sweep_id = submit(engine, small_spec)
    with write(engine) as connection:
        actions.act(connection, sweep_id, Action.PAUSE)
        connection.execute(update(sweeps).values(created_at=clock() - 10**6, ready_at=clock() - 10**6))
        connection.execute(update(packs).values(not_before=clock() - 10**6))
        actions.act(connection, sweep_id, Action.RESUME)
    (waiting,) = look(engine).waiting
    assert waiting.waited < 60


def test_a_retry_is_bounded_by_the_quota(engine: Engine, small_spec: dict[str, Any]) -> None:
    put_team(engine, "small", max_queued_runs=20)
    first = submit(engine, small_spec, team="small")
    with write(engine) as connection:
        actions.act(connection, first, Action.CANCEL)
    submit(engine, small_spec, team="small")
    with pytest.raises(ConflictError, match="may have 20 runs waiting"), write(engine) as connection:
        actions.act(connection, first, Action.RETRY)
    with read(engine) as connection:
        assert queries.get(connection, first).state == "cancelled"


def test_only_what_an_attempt_trains_is_counted(engine: Engine, small_spec: dict[str, Any]) -> None:
    submit(engine, small_spec)
    with write(engine) as connection:
        (lease,) = claim(connection, "a", 1)
        leases.progress(connection, lease, 0, trained=5)
        leases.stopped(connection, lease, step=3)
        assert connection.execute(select(attempts.c.run_steps)).scalar_one() == 5 * 3
