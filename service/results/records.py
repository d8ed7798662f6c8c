"""SQL of what probes recorded: arrays beside the curves, in pages of a bounded size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import Final, get_args

import numpy as np
from sqlalchemy import Connection

from ddpnopt import probes
from ddpnopt.config import Probe
from ddpnopt.datasets.catalog import CATALOG
from service.db.tables import runs
from service.errors import FieldError, InvalidInputError
from service.results.queries import arrays, choose_grid
from service.sweeps import queries as sweep_queries
from service.sweeps.documents import shown
from service.sweeps.spec import MAX_PROBE_NUMBERS, SweepSpec

MOST_NUMBERS: Final = 4 * MAX_PROBE_NUMBERS
"""Of a page: some megabytes of JSON."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run recorded.

    Attributes:
        steps: of the points.
        values: of each point, flat; None where a number is not finite.
    """

    run_id: int
    method: str
    learning_rate: float
    vxx_reg: float | None
    seed: int
    steps: tuple[int, ...]
    values: list[list[float | None]]


@dataclass(frozen=True, slots=True)
class Records:
    """A page of them.

    Attributes:
        shape: of a point's values.
        next: the last run's id if there are more.
    """

    shape: list[int]
    records: list[RunRecord]
    next: int | None


def page(
    connection: Connection,
    sweep_id: str,
    probe: str,
    baseline: str | None,
    grid: int | None,
    after: int,
    limit: int,
) -> Records:
    """Return what a probe recorded in the runs of a grid that have ended, in order of id.

    Raises:
        NotFoundError: if there is no such sweep.
        InvalidInputError: if the sweep has no such probe, or the grid is not one.
    """
    spec = sweep_queries.spec_of(connection, sweep_id)
    asked = _asked(spec, probe)
    position = choose_grid(spec, baseline, grid)
    shape = probes.shape(asked, spec.layers(), CATALOG[spec.dataset].shape)
    steps = tuple(probes.points(asked, spec.training.resolved()))
    width = math.prod(shape)
    limit = max(1, min(limit, MOST_NUMBERS // (width * len(steps))))
    query = arrays(sweep_id, position, asked).where(runs.c.id > after).limit(limit + 1)
    rows = connection.execute(query).all()
    found = [RunRecord(*row[:5], *_read(row.points, width, steps)) for row in islice(rows, limit)]
    return Records(list(shape), found, found[-1].run_id if len(rows) > limit else None)


def _asked(spec: SweepSpec, probe: str) -> Probe:
    if probe in spec.probes:
        return spec.probes[spec.probes.index(probe)]
    there = ", ".join(spec.probes) or f"nothing: its spec asks for none of {', '.join(get_args(Probe))}"
    raise InvalidInputError([FieldError("probe", shown(probe), f"one of the sweep's: {there}")])


def _read(
    points: bytes, width: int, steps: tuple[int, ...]
) -> tuple[tuple[int, ...], list[list[float | None]]]:
    values = np.frombuffer(points, dtype="<f4").reshape(-1, width).astype(np.float64)
    table = [[number if math.isfinite(number) else None for number in line] for line in values.tolist()]
    return steps[: len(table)], table
