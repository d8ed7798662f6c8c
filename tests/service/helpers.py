"""Shared steps of the service's tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from sqlalchemy import Engine, select

from ddpnopt import NUMERICS_VERSION
from ddpnopt.results import METRICS, Divergence, RunResult
from service.db.engine import read, write
from service.db.tables import packs
from service.sweeps import queries
from service.sweeps.documents import parse_spec
from service.sweeps.expand import plan
from workers.protocol import Environment

ENVIRONMENT = Environment("a CPU", {"numerics": str(NUMERICS_VERSION)}, "0" * 64)


def submit(engine: Engine, document: dict[str, Any], key: str | None = None) -> str:
    spec = parse_spec(document)
    with write(engine) as connection:
        return queries.create(connection, spec, plan(spec), key)[0]


def result(index: int, value: float = 1.0, diverged: bool = False) -> RunResult:
    points = np.array([0, 2, 4], dtype=np.int64)
    return RunResult(
        index,
        4,
        {} if diverged else dict.fromkeys(METRICS, value + index),
        points,
        points,
        {name: np.array([3.0, np.nan, value], dtype=np.float32) for name in METRICS},
        "" if diverged else "d" * 64,
        Divergence(3, "batch_loss", "nan", 2.5) if diverged else None,
    )


def outcome(count: int, value: float = 1.0, diverged: frozenset[int] = frozenset()) -> tuple[RunResult, ...]:
    return tuple(result(index, value, index in diverged) for index in range(count))


def pack_rows(engine: Engine) -> list[Any]:
    with read(engine) as connection:
        return list(connection.execute(select(packs).order_by(packs.c.id)))
