"""A sweep on a cluster of two nodes: packs train on both; one dies, and nothing in the results tells."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from tests.workers import namespace
from tests.workers.test_two_nodes import raylet_at

pytestmark = pytest.mark.ray

SPEC: dict[str, Any] = {
    "name": "two nodes",
    "dataset": "digits",
    "model": {"kind": "fcn", "hidden": [10, 10, 10, 10]},
    "training": {"steps": 4000, "batch_size": 16, "eval_every": 100},
    "seeds": 10,
    "grids": [{"baseline": "sgd", "learning_rate": [0.4, 0.6, 0.7], "vxx_reg": [5e-5, 1e-4, 1e-3]}],
}


def a_sweep_on_two_nodes() -> None:
    """What is done on the cluster."""
    from service.db import schema
    from service.db.engine import open_engine, read, write
    from service.db.tables import attempts, results, runs
    from service.dispatch.loop import Dispatcher
    from service.sweeps import queries
    from service.sweeps.device import Device
    from service.sweeps.documents import parse_spec
    from service.sweeps.expand import plan
    from workers.local import LocalExecutor
    from workers.protocol import WorkerOptions
    from workers.ray_executor import RayExecutor

    folder = Path(os.environ["TEST_FOLDER"])
    engine = open_engine(f"sqlite:///{folder / 'sweeps.db'}")
    schema.upgrade(engine)
    spec = parse_spec(SPEC | {"reuse": False})
    planned = plan(spec, Device(cores=4))  # as many packs, so that both nodes have work after one's death
    assert len(planned.packs) >= 3

    def submitted() -> str:
        with write(engine) as connection:
            return queries.create(connection, spec, planned)[0]

    def state(sweep_id: str) -> queries.SweepRow:
        with read(engine) as connection:
            return queries.get(connection, sweep_id)

    def outcome(sweep_id: str) -> list[Any]:
        with read(engine) as connection:
            query = select(runs.c.pack_index, results.c.weights_digest, results.c.train_loss)
            query = query.join(results, results.c.run_id == runs.c.id).where(runs.c.sweep_id == sweep_id)
            return sorted(map(tuple, connection.execute(query.order_by(runs.c.id))))

    undisturbed = submitted()
    alone = Dispatcher(engine, LocalExecutor(), "alone")
    while state(undisturbed).state != "completed":
        alone.step(0.0)
    alone.close()

    namespace.start_head()
    for _ in range(2):
        namespace.start_node("--num-cpus=1")
    options = WorkerOptions(checkpoints=str(folder / "states"), checkpoint_every=0.2)
    executor = RayExecutor(namespace.HEAD, options=options)
    dispatcher = Dispatcher(engine, executor, "on the cluster", keeps_state=True)
    sweep_id = submitted()

    def training() -> dict[str, int]:
        """The nodes on which a pack has got somewhere, and its id."""
        with read(engine) as connection:
            rows = connection.execute(
                select(attempts.c.node, attempts.c.pack_id).where(
                    attempts.c.sweep_id == sweep_id,
                    attempts.c.outcome == "running",
                    attempts.c.first_step >= 0,
                )
            )
            return {node: pack_id for node, pack_id in rows if node}

    while len(training()) < 2:
        dispatcher.step(0.2)
    victim = min(training())
    raylet_at(victim).send_signal(signal.SIGKILL)
    while state(sweep_id).state != "completed":
        dispatcher.step(0.5)
    with read(engine) as connection:
        tried = connection.execute(select(attempts).where(attempts.c.sweep_id == sweep_id)).all()
    lost = [row for row in tried if row.outcome == "failed"]
    assert lost
    assert {row.node for row in lost} <= {victim, None}
    assert {row.node for row in tried if row.outcome == "completed"} - {victim}
    assert len(outcome(sweep_id)) == planned.runs_total
    assert outcome(sweep_id) == outcome(undisturbed)
    dispatcher.close()
    executor.close()
    said = (
        f"{len(tried)} attempts at {len(planned.packs)} packs on two nodes, {len(lost)} lost with one of them"
    )
    print(said)  # noqa: T201 - read outside of the namespace


def test_a_sweep_survives_the_death_of_a_node(tmp_path: Path) -> None:
    said = namespace.run(a_sweep_on_two_nodes, tmp_path, 280)
    assert "lost with one of them" in said
