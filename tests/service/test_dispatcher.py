"""The dispatcher's loop, driven step by step with a scripted executor and with the real trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import Engine, event, select, update
from sqlalchemy.exc import OperationalError

from service.db.engine import clock, read, write
from service.db.tables import packs, results, runs, sweeps
from service.dispatch import leases
from service.dispatch.loop import Dispatcher
from service.dispatch.policy import MAX_ATTEMPTS, GiveUp, Requeue, after_failure
from service.dispatch.states import Action
from service.results import queries as result_queries
from service.sweeps import actions, queries
from tests.conftest import ALONE, STORED_BEFORE
from tests.service.helpers import ENVIRONMENT, expire, make_ready, outcome, pack_rows, submit
from workers.local import LocalExecutor
from workers.protocol import Node, PackEvent, PackFailed, PackFinished, PackProgress, PackTask, Pool


class Script:
    """An executor that says what the test tells it to."""

    def __init__(self, slots: int = 8) -> None:
        self.slots = slots
        self.tasks: list[PackTask] = []
        self.cancelled: list[tuple[int, int]] = []
        self.events: list[PackEvent] = []

        self.stopped: list[tuple[int, int]] = []
        self.waiting = 0
        self.cluster = f"script-{id(self)}"

    def nodes(self) -> Sequence[Node]:
        return [Node("n", "here", Pool(), self.slots)]

    def backlog(self) -> int:
        return self.waiting

    def stop(self, pack_id: int, attempt: int) -> None:
        self.stopped.append((pack_id, attempt))

    def submit(self, task: PackTask) -> None:
        self.tasks.append(task)

    def poll(self, timeout: float) -> Sequence[PackEvent]:
        events, self.events = self.events, []
        return events

    def cancel(self, pack_id: int, attempt: int) -> None:
        self.cancelled.append((pack_id, attempt))

    def close(self) -> None:
        pass


def finished(task: PackTask) -> PackFinished:
    return PackFinished(task.pack_id, task.attempt, outcome(len(task.runs)), ENVIRONMENT)


def sweep(engine: Engine, sweep_id: str) -> queries.SweepRow:
    with read(engine) as connection:
        return queries.get(connection, sweep_id)


def test_a_sweep_from_queue_to_results(engine: Engine, small_spec: dict[str, Any]) -> None:
    sweep_id = submit(engine, small_spec)
    dispatcher = Dispatcher(engine, LocalExecutor(), "a")
    for _ in range(20):
        dispatcher.step(0)
    row = sweep(engine, sweep_id)
    assert (row.state, row.runs_done, row.run_steps_done) == ("completed", 18, 72)
    with read(engine) as connection:
        panel = result_queries.heatmap(connection, sweep_id, "train_loss")
    assert [cell.n for cell in panel.cells] == [3] * 4
    assert dispatcher.held == {}


def test_baselines_without_a_partner_are_trained(engine: Engine, small_spec: dict[str, Any]) -> None:
    sweep_id = submit(engine, small_spec | {"grids": ALONE})
    dispatcher = Dispatcher(engine, LocalExecutor(), "a")
    for _ in range(40):
        dispatcher.step(0)
    row = sweep(engine, sweep_id)
    assert (row.state, row.runs_done, row.runs_diverged) == ("completed", 33, 0)
    with read(engine) as connection:
        summary = result_queries.summary(connection, sweep_id, "accuracy")
        panel = result_queries.heatmap(connection, sweep_id, "accuracy")
    assert [(r.grid, r.method, r.learning_rate, r.vxx_reg) for r in summary.rows] == [
        (0, "baseline", 0.1, None),
        (0, "baseline", 0.5, None),
        (0, "ddpnopt", 0.1, 1e-4),
        (0, "ddpnopt", 0.1, 1e-3),
        (0, "ddpnopt", 0.5, 1e-4),
        (0, "ddpnopt", 0.5, 1e-3),
        (1, "baseline", 0.01, None),
        (2, "baseline", 0.5, None),
        (2, "baseline", 0.1, None),
        (3, "baseline", 1.0, None),
        (4, "baseline", 0.5, None),
    ]
    assert {(r.n, r.n_ended, r.n_total) for r in summary.rows} == {(3, 3, 3)}
    assert panel.cells[0].baseline_mean == pytest.approx(summary.rows[0].mean)
    assert panel.cells[0].ddpnopt_mean == pytest.approx(summary.rows[2].mean)


def test_runs_reach_the_executor_in_the_order_of_the_pack(engine: Engine, small_spec: dict[str, Any]) -> None:
    submit(engine, small_spec)
    script = Script()
    Dispatcher(engine, script, "a").step(0)
    (task,) = script.tasks
    with read(engine) as connection:
        rows = connection.execute(select(runs).order_by(runs.c.pack_index)).all()
    assert [(r.method, r.learning_rate, r.vxx_reg, r.seed) for r in rows] == [
        (c.optimizer.method, c.optimizer.learning_rate, c.optimizer.vxx_reg, c.seed) for c in task.runs
    ]


def test_progress_is_seen(engine: Engine, small_spec: dict[str, Any]) -> None:
    sweep_id = submit(engine, small_spec)
    script = Script()
    dispatcher = Dispatcher(engine, script, "a")
    dispatcher.step(0)
    script.events = [PackProgress(script.tasks[0].pack_id, 1, 3, 4, 18)]
    dispatcher.step(0)
    dispatcher.step(0)
    assert sweep(engine, sweep_id).run_steps_done == 3 * 18


def test_no_more_is_claimed_than_there_is_room_for(engine: Engine, small_spec: dict[str, Any]) -> None:
    for _ in range(3):
        submit(engine, small_spec)
    script = Script(slots=2)
    Dispatcher(engine, script, "a").step(0)
    assert len(script.tasks) == 2
    assert Counter(pack.state for pack in pack_rows(engine)) == {"running": 2, "queued": 1}


@pytest.mark.parametrize("retryable", [True, False])
def test_failures_are_retried_where_that_can_help(
    engine: Engine, small_spec: dict[str, Any], retryable: bool
) -> None:
    sweep_id = submit(engine, small_spec)
    script = Script()
    dispatcher = Dispatcher(engine, script, "a")
    dispatcher.step(0)
    script.events = [PackFailed(script.tasks[0].pack_id, 1, "worker lost", "trace", retryable)]
    dispatcher.step(0)
    dispatcher.step(0)
    (pack,) = pack_rows(engine)
    assert (pack.error, pack.error_detail) == ("worker lost", "trace")
    if not retryable:
        assert sweep(engine, sweep_id).state == "failed"
        return
    assert pack.state == "queued"
    make_ready(engine)
    dispatcher.step(0)
    script.events = [finished(script.tasks[1])]
    dispatcher.step(0)
    dispatcher.step(0)
    (pack,) = pack_rows(engine)
    assert (pack.state, pack.attempt, pack.error) == ("completed", 2, None)


def test_a_lost_lease_stops_the_attempt(engine: Engine, small_spec: dict[str, Any]) -> None:
    submit(engine, small_spec)
    script, now = Script(), [0.0]
    dispatcher = Dispatcher(engine, script, "a", now=lambda: now[0])
    dispatcher.step(0)
    with write(engine) as connection:
        connection.execute(update(packs).values(lease_until=clock() - 1))
        leases.reap(connection)
        connection.execute(update(packs).values(not_before=clock() + 60))
    now[0] = leases.RENEW_EVERY_S
    dispatcher.step(0)
    assert script.cancelled == [(script.tasks[0].pack_id, 1)]
    assert dispatcher.held == {}


def test_results_of_a_fenced_attempt_are_dropped(engine: Engine, small_spec: dict[str, Any]) -> None:
    submit(engine, small_spec)
    stale, fresh = Script(), Script()
    first, second = Dispatcher(engine, stale, "a"), Dispatcher(engine, fresh, "b")
    first.step(0)
    with write(engine) as connection:
        connection.execute(update(packs).values(lease_until=clock() - 1))
    second.step(0)
    assert [task.attempt for task in fresh.tasks] == [2]
    stale.events = [finished(stale.tasks[0])]
    first.step(0)
    first.step(0)
    assert pack_rows(engine)[0].state == "running"
    assert stale.cancelled == [(stale.tasks[0].pack_id, 1)]
    fresh.events = [finished(fresh.tasks[0])]
    second.step(0)
    second.step(0)
    with read(engine) as connection:
        assert {row.attempt for row in connection.execute(select(results))} == {2}


def test_a_database_that_is_away_costs_no_results(engine: Engine, small_spec: dict[str, Any]) -> None:
    sweep_id = submit(engine, small_spec)
    script = Script()
    dispatcher = Dispatcher(engine, script, "a")
    dispatcher.step(0)
    script.events = [finished(script.tasks[0])]
    dispatcher.step(0)
    away = [True]

    @event.listens_for(engine, "before_cursor_execute")
    def refuse(connection: Any, *_: Any) -> None:
        if away[0]:
            raise OperationalError("x", {}, Exception("database is locked"))

    dispatcher.step(0)
    assert len(dispatcher.outbox) == 1
    away[0] = False
    dispatcher.step(0)
    assert sweep(engine, sweep_id).state == "completed"


def test_a_commit_whose_answer_was_lost_is_looked_up(engine: Engine, small_spec: dict[str, Any]) -> None:
    sweep_id = submit(engine, small_spec)
    script = Script()
    dispatcher = Dispatcher(engine, script, "a")
    dispatcher.step(0)
    done = finished(script.tasks[0])
    lease = dispatcher.held[done.pack_id].lease
    with write(engine) as connection:  # the commit that went through, though the dispatcher never heard of it
        leases.finish(connection, lease, done.results, done.environment)
    dispatcher.outbox.append(done)
    dispatcher.step(0)
    assert script.cancelled == []
    assert sweep(engine, sweep_id).runs_done == 18


def test_a_spec_of_another_version_fails_its_own_sweep_alone(
    engine: Engine, small_spec: dict[str, Any]
) -> None:
    strange, good = submit(engine, small_spec), submit(engine, small_spec)
    with write(engine) as connection:
        spec = small_spec | {"loss": "a loss of the future"}
        connection.execute(update(sweeps).where(sweeps.c.id == strange).values(spec=spec))
    dispatcher = Dispatcher(engine, LocalExecutor(), "a")
    for _ in range(20):
        dispatcher.step(0)
    row = sweep(engine, strange)
    assert (row.state, row.error) == ("failed", "this version cannot read the sweep's spec")
    assert sweep(engine, good).state == "completed"


def test_a_spec_that_an_older_version_stored_is_trained_as_it_was_meant(
    sqlite_engine: Engine, small_spec: dict[str, Any]
) -> None:
    old, new = submit(sqlite_engine, small_spec), submit(sqlite_engine, small_spec)
    with write(sqlite_engine) as connection:
        connection.execute(update(sweeps).where(sweeps.c.id == old).values(spec=STORED_BEFORE))
    script = Script()
    Dispatcher(sqlite_engine, script, "a").step(0)
    assert {pack.sweep_id for pack in pack_rows(sqlite_engine)} == {old, new}
    assert script.tasks[0].runs == script.tasks[1].runs


def test_every_baseline_and_convolutions_are_trained(
    sqlite_engine: Engine, small_spec: dict[str, Any]
) -> None:
    plain = {"learning_rate": [0.01], "vxx_reg": [1e-4]}
    options: dict[str, dict[str, Any]] = {
        "sgd": {"momentum": 0.5},
        "rmsprop": {"second_moment": "per_sample"},
        "adam": {"betas": [0.8, 0.9]},
        "kfac": {"weight_decay": 1e-4},
        "ekfac": {"inverse_every": 2},
    }
    small_spec |= {
        "dataset": "digits",
        "model": {"kind": "cnn", "channels": [2, 2], "hidden": [4], "output": "sigmoid"},
        "loss": "mse",
        "seeds": 2,
        "grids": [plain | {"baseline": name, "options": chosen} for name, chosen in options.items()],
    }
    small_spec["grids"].append(plain | {"baseline": "sgd", "ddpnopt": {"dynamics": "second_order"}})
    sweep_id = submit(sqlite_engine, small_spec)
    dispatcher = Dispatcher(sqlite_engine, LocalExecutor(), "a")
    for _ in range(20):
        dispatcher.step(0)
    row = sweep(sqlite_engine, sweep_id)
    assert (row.state, row.error, row.runs_done) == ("completed", None, 24)
    with read(sqlite_engine) as connection:
        for position in range(6):
            panel = result_queries.heatmap(connection, sweep_id, "train_loss", grid=position)
            assert [cell.n_ended for cell in panel.cells] == [2]


def test_stored_curves_have_the_steps_at_which_they_were_taken(
    sqlite_engine: Engine, small_spec: dict[str, Any]
) -> None:
    """Metrics of the training set and of the test set at steps of their own."""
    small_spec["training"] = {
        "steps": 10,
        "batch_size": 16,
        "eval_every": 2,
        "test_every": 4,
        "train_metrics": "running",
    }
    sweep_id = submit(sqlite_engine, small_spec)
    dispatcher = Dispatcher(sqlite_engine, LocalExecutor(), "a")
    for _ in range(12):
        dispatcher.step(0)
    assert sweep(sqlite_engine, sweep_id).state == "completed"
    wanted = {"train_loss": (2, 4, 6, 8, 10), "accuracy": (0, 4, 8, 10)}
    with read(sqlite_engine) as connection:
        for metric, steps in wanted.items():
            found = result_queries.curve_list(connection, sweep_id, metric, None, None, 100)
            assert {curve.steps for curve in found} == {steps}
            assert {len(curve.values) for curve in found} == {len(steps)}


def test_closing_gives_everything_back(engine: Engine, small_spec: dict[str, Any]) -> None:
    submit(engine, small_spec)
    script = Script()
    dispatcher = Dispatcher(engine, script, "a")
    dispatcher.step(0)
    dispatcher.close()
    assert script.cancelled == [(script.tasks[0].pack_id, 1)]
    assert pack_rows(engine)[0].state == "queued"


def test_policy_backs_off_and_gives_up() -> None:
    delays = [after_failure(k, MAX_ATTEMPTS, retryable=True) for k in range(1, MAX_ATTEMPTS)]
    assert delays == [Requeue(1.0), Requeue(2.0), Requeue(4.0), Requeue(8.0)]
    # Attempts that were stopped or given back did not fail: they have raised the most by as many.
    assert after_failure(8, MAX_ATTEMPTS + 7, retryable=True) == Requeue(1.0)
    assert after_failure(2000, MAX_ATTEMPTS + 1998, retryable=True) == Requeue(2.0)
    assert after_failure(2000, 2001, retryable=True) == Requeue(8.0)
    assert after_failure(2000, 10**6, retryable=True) == Requeue(1.0)
    assert after_failure(MAX_ATTEMPTS, MAX_ATTEMPTS, retryable=True) == GiveUp()
    assert after_failure(1, MAX_ATTEMPTS, retryable=False) == GiveUp()


class Away:
    """A database that cannot be reached for as long as one says so, once a dispatcher has claimed."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.away = True
        spec_of = queries.spec_of

        def refuse(connection: Any, sweep_id: str) -> Any:
            if self.away:
                raise OperationalError("x", {}, Exception("database is locked"))
            return spec_of(connection, sweep_id)

        monkeypatch.setattr(queries, "spec_of", refuse)


def test_a_pack_that_was_lost_before_it_was_handed_over_is_not(
    engine: Engine, small_spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(engine, small_spec)
    script = Script()
    dispatcher = Dispatcher(engine, script, "a")
    database = Away(engine, monkeypatch)
    dispatcher.step(0)
    assert (script.tasks, len(dispatcher.held)) == ([], 1)
    expire(engine)
    with write(engine) as connection:
        leases.reap(connection)
    database.away = False
    dispatcher.step(0)
    assert [task.attempt for task in script.tasks] == [2]
    assert [holding.lease.attempt for holding in dispatcher.held.values()] == [2]


def test_a_pack_that_should_stop_before_it_was_handed_over_is_given_back(
    engine: Engine, small_spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_id = submit(engine, small_spec)
    script = Script()
    dispatcher = Dispatcher(engine, script, "a")
    database = Away(engine, monkeypatch)
    dispatcher.step(0)
    with write(engine) as connection:
        actions.act(connection, sweep_id, Action.CANCEL)
    database.away = False
    dispatcher.step(0)
    assert (script.tasks, dispatcher.held) == ([], {})
    assert sweep(engine, sweep_id).state == "cancelled"
