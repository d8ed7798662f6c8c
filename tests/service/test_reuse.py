"""Equal runs are trained once, and only those that are equal in everything that decides their bits."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine, func, select, update

from service.db.engine import read, write
from service.db.tables import attempts, packs, results, runs
from service.dispatch import leases
from service.dispatch.loop import Dispatcher
from service.results import queries as result_queries
from service.results import reuse
from service.results.reuse import ResultsGoneError
from service.sweeps import queries
from service.sweeps.documents import parse_spec
from service.sweeps.expand import expand
from service.sweeps.keys import keys_of
from service.teams import queries as teams
from tests.service.helpers import ENVIRONMENT, claim, outcome, pack_rows, submit
from workers.local import LocalExecutor

RUNS = 18


def train(engine: Engine, rounds: int = 20) -> None:
    dispatcher = Dispatcher(engine, LocalExecutor(), "a")
    for _ in range(rounds):
        dispatcher.step(0)


def sweep(engine: Engine, sweep_id: str) -> queries.SweepRow:
    with read(engine) as connection:
        return queries.get(connection, sweep_id)


def panel(engine: Engine, sweep_id: str, metric: str = "train_loss") -> Any:
    with read(engine) as connection:
        return result_queries.heatmap(connection, sweep_id, metric)


def test_the_same_sweep_again_trains_nothing(engine: Engine, small_spec: dict[str, Any]) -> None:
    first = submit(engine, small_spec)
    train(engine)
    second = submit(engine, small_spec | {"name": "again"})
    train(engine)
    one, two = sweep(engine, first), sweep(engine, second)
    assert (one.state, one.runs_done, one.runs_reused, one.run_steps_trained) == ("completed", RUNS, 0, 72)
    assert (two.state, two.runs_done, two.runs_reused, two.run_steps_trained) == ("completed", RUNS, RUNS, 0)
    for metric in ("train_loss", "accuracy"):
        assert panel(engine, first, metric).cells == panel(engine, second, metric).cells
    with read(engine) as connection:
        origin = dict(
            connection.execute(
                select(runs.c.id, results.c.reused_from)
                .join(results, results.c.run_id == runs.c.id)
                .where(runs.c.sweep_id == second)
            ).all()
        )
        places = dict(connection.execute(select(runs.c.id, runs.c.pack_index)).all())
        curves = [
            result_queries.curve_list(connection, sweep_id, "accuracy", None, None, 100)
            for sweep_id in (first, second)
        ]
    assert {places[run] for run in origin} == {places[run] for run in origin.values()} == set(range(RUNS))
    assert all(places[run] == places[source] for run, source in origin.items())
    assert [c.values for c in curves[0]] == [c.values for c in curves[1]]


def test_a_third_time_names_the_run_that_was_trained(
    sqlite_engine: Engine, small_spec: dict[str, Any]
) -> None:
    first, _, third = [(submit(sqlite_engine, small_spec), train(sqlite_engine))[0] for _ in range(3)]
    with read(sqlite_engine) as connection:
        of_third = select(results.c.reused_from).join(runs, runs.c.id == results.c.run_id)
        origins = set(connection.scalars(of_third.where(runs.c.sweep_id == third)))
        trained = set(connection.scalars(select(runs.c.id).where(runs.c.sweep_id == first)))
    assert origins == trained


def test_only_what_is_new_is_trained(sqlite_engine: Engine, small_spec: dict[str, Any]) -> None:
    submit(sqlite_engine, small_spec)
    train(sqlite_engine)
    larger = copy.deepcopy(small_spec) | {"seeds": 4}
    reusing, alone = submit(sqlite_engine, larger), submit(sqlite_engine, larger | {"reuse": False})
    train(sqlite_engine)
    one, two = sweep(sqlite_engine, reusing), sweep(sqlite_engine, alone)
    assert (one.runs_reused, one.run_steps_trained) == (RUNS, 6 * 4)
    assert (two.runs_reused, two.run_steps_trained) == (0, 24 * 4)
    assert panel(sqlite_engine, reusing).cells == panel(sqlite_engine, alone).cells
    with read(sqlite_engine) as connection:
        digests = [
            connection.scalars(
                select(results.c.weights_digest)
                .join(runs, runs.c.id == results.c.run_id)
                .where(runs.c.sweep_id == sweep_id)
                .order_by(runs.c.pack_index)
            ).all()
            for sweep_id in (reusing, alone)
        ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": [7, 8, 9]},
        {"dtype": "float64"},
        {"loss": "mse"},
        {"training": {"steps": 5, "batch_size": 16, "eval_every": 2}},
        {"grids": [{"baseline": "sgd", "learning_rate": [0.11, 0.51], "vxx_reg": [1e-4, 1e-3]}]},
        {"grids": [{"baseline": "adam", "learning_rate": [0.1, 0.5], "vxx_reg": [1e-4, 1e-3]}]},
    ],
)
def test_what_differs_is_trained(
    sqlite_engine: Engine, small_spec: dict[str, Any], change: dict[str, Any]
) -> None:
    submit(sqlite_engine, small_spec)
    train(sqlite_engine)
    other = submit(sqlite_engine, small_spec | change)
    train(sqlite_engine)
    assert sweep(sqlite_engine, other).runs_reused == 0


def test_another_teams_results_are_not_taken(sqlite_engine: Engine, small_spec: dict[str, Any]) -> None:
    with write(sqlite_engine) as connection:
        teams.put(connection, "others", 1.0, None, None)
    submit(sqlite_engine, small_spec)
    train(sqlite_engine)
    other = submit(sqlite_engine, small_spec, team="others")
    train(sqlite_engine)
    assert sweep(sqlite_engine, other).runs_reused == 0


@pytest.mark.parametrize(
    "other",
    [
        replace(ENVIRONMENT, device="another CPU"),
        replace(ENVIRONMENT, data_checksum="1" * 64),
        replace(ENVIRONMENT, versions=ENVIRONMENT.versions | {"numerics": "0"}),
        replace(ENVIRONMENT, versions=ENVIRONMENT.versions | {"kernel": "another"}),
    ],
)
def test_results_of_another_environment_are_not_taken(
    engine: Engine, small_spec: dict[str, Any], other: Any
) -> None:
    submit(engine, small_spec)
    with write(engine) as connection:
        (lease,) = claim(connection, "a", 1)
        leases.finish(connection, lease, outcome(RUNS), other)
    submit(engine, small_spec)
    with write(engine) as connection:
        (lease,) = claim(connection, "a", 1)
        assert reuse.candidates(connection, lease.pack_id) == ((other.key(),),) * RUNS
    with write(engine) as connection, pytest.raises(ResultsGoneError, match="18 equal results are gone"):
        leases.finish(connection, lease, (), ENVIRONMENT, range(RUNS))


def test_results_of_every_environment_are_offered(engine: Engine, small_spec: dict[str, Any]) -> None:
    """A team with two kinds of processors trains once on each."""
    others = [ENVIRONMENT, replace(ENVIRONMENT, device="another CPU")]
    for environment in others:
        submit(engine, small_spec)
        with write(engine) as connection:
            (lease,) = claim(connection, "a", 1)
            leases.finish(connection, lease, outcome(RUNS), environment)
    sweep_id = submit(engine, small_spec)
    with write(engine) as connection:
        (lease,) = claim(connection, "a", 1)
        offered = reuse.candidates(connection, lease.pack_id)
        assert offered == (tuple(sorted(one.key() for one in others)),) * RUNS
        leases.finish(connection, lease, (), ENVIRONMENT, range(RUNS))
    assert sweep(engine, sweep_id).runs_reused == RUNS


def test_diverged_results_are_results(engine: Engine, small_spec: dict[str, Any]) -> None:
    submit(engine, small_spec)
    with write(engine) as connection:
        (lease,) = claim(connection, "a", 1)
        leases.finish(connection, lease, outcome(RUNS, diverged=frozenset({3, 5})), ENVIRONMENT)
    sweep_id = submit(engine, small_spec)
    with write(engine) as connection:
        (lease,) = claim(connection, "a", 1)
        leases.finish(connection, lease, (), ENVIRONMENT, range(RUNS))
    assert sweep(engine, sweep_id).runs_diverged == 2


def test_runs_that_were_stored_without_a_key_are_never_equal(
    engine: Engine, small_spec: dict[str, Any]
) -> None:
    submit(engine, small_spec)
    with write(engine) as connection:
        connection.execute(update(runs).values(config_key=None))
        (lease,) = claim(connection, "a", 1)
        leases.finish(connection, lease, outcome(RUNS), ENVIRONMENT)
    submit(engine, small_spec)
    with write(engine) as connection:
        connection.execute(update(runs).values(config_key=None))
        (lease,) = claim(connection, "a", 1)
        assert reuse.candidates(connection, lease.pack_id) == ()


def test_keys_are_equal_exactly_where_configurations_are(small_spec: dict[str, Any]) -> None:
    grid = small_spec["grids"][0]
    small_spec["grids"] = [
        grid,
        grid | {"ddpnopt": {"terminal_hessian": "exact", "factorized": False}},  # the defaults, said
        grid | {"ddpnopt": {"terminal_hessian": "gauss_newton"}},
        grid | {"options": {"momentum": 0.5}},
        grid | {"baseline": "rmsprop"},
    ]
    spec = parse_spec(small_spec)
    key_of = keys_of(spec)
    by_key: dict[bytes, set[Any]] = {}
    by_config: dict[Any, set[bytes]] = {}
    for bundle in expand(spec):
        for run in bundle:
            config = spec.run_config(run.grid, run.method, run.learning_rate, run.vxx_reg, run.seed)
            feedback = config.optimizer.feedback
            if feedback is not None:
                config = replace(config, optimizer=replace(config.optimizer, feedback=feedback.resolved()))
            by_key.setdefault(key_of(run), set()).add(config)
            by_config.setdefault(config, set()).add(key_of(run))
    assert {len(configs) for configs in by_key.values()} == {1}
    assert {len(keys) for keys in by_config.values()} == {1}
    # 6 baselines of sgd, with momentum and of rmsprop; 12 partners of these and of two Hessians.
    assert len(by_key) == 6 * 3 + 12 * 4


def test_a_ledger_of_what_was_trained(engine: Engine, small_spec: dict[str, Any]) -> None:
    submit(engine, small_spec)
    train(engine)
    with read(engine) as connection:
        (row,) = connection.execute(select(attempts)).all()
        (team,) = teams.every(connection)
        total = connection.execute(select(func.sum(attempts.c.device_seconds))).scalar_one()
        device = connection.execute(select(packs.c.device)).scalar_one()
    assert (row.outcome, row.run_steps, row.first_step) == ("completed", 72, 0)
    assert row.device == device
    assert 0 < row.device_seconds == pytest.approx(row.ended_at - row.started_at)
    assert (team.device_seconds, team.run_steps) == (pytest.approx(total), 72)
    assert pack_rows(engine)[0].environment_key
