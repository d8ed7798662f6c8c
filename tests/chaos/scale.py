"""How often each thing is done: a few times in `make test`, as often as docs promise in `make chaos`."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """Counts.

    Attributes:
        dispatcher_kills: of a dispatcher, on each database (T1).
        worker_kills: of a worker of Ray (T3).
        ray_kills: of the GCS, and as many of a raylet (T4).
        freezes: of a process beyond its lease, on each database (T2).
        server_stops: immediate ones of PostgreSQL (T5).
        fillings: of the disk (T6).
        machine_examples: of the state machine, on each database (T7).
        machine_steps: of each example.
        crash_points: most points at which a dispatcher dies, on each database; None takes all of them (T8).
        lost_answers: most commits whose answer is lost, on each database, besides the first of each kind;
            None takes all of them (T8).
        real_deaths: points at which a process of its own dies, on each database (T8).
        backups: copies that are restored, on each database (T12).
    """

    dispatcher_kills: int
    worker_kills: int
    ray_kills: int
    freezes: int
    server_stops: int
    fillings: int
    machine_examples: int
    machine_steps: int
    crash_points: int | None
    lost_answers: int | None
    real_deaths: int
    backups: int


SHORT = Scale(
    dispatcher_kills=1,
    worker_kills=2,
    ray_kills=1,
    freezes=6,
    server_stops=2,
    fillings=2,
    machine_examples=20,
    machine_steps=30,
    crash_points=8,
    lost_answers=2,
    real_deaths=1,
    backups=2,
)
FULL = Scale(
    dispatcher_kills=50,
    worker_kills=30,
    ray_kills=5,
    freezes=30,
    server_stops=20,
    fillings=20,
    machine_examples=2000,
    machine_steps=50,
    crash_points=None,
    lost_answers=None,
    real_deaths=20,
    backups=10,
)
IS_FULL = os.environ.get("DDPSWEEP_CHAOS") == "full"
SCALE = FULL if IS_FULL else SHORT
TIMEOUT_S = 7200 if IS_FULL else 300
"""Of one test: nothing is asserted about time, but what hangs has to end."""
