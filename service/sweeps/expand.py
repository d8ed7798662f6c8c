"""From a spec to runs and packs. Pure: the same spec gives the same runs in the same packs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from ddpnopt.config import EVAL_CHUNK, Method
from ddpnopt.datasets.catalog import CATALOG
from service.errors import FieldError, InvalidInputError
from service.sweeps.spec import SweepSpec

PACK_RUNS: Final = 64
"""Most runs of a pack. On a CPU the time per run and step falls little beyond; smaller packs fill more cores
and show the first row of a heatmap sooner."""

PACK_BYTES: Final = 2 * 2**30
"""Memory that a pack may take by the estimate below."""

FLOPS_PER_SECOND: Final = 5e9
"""Of one CPU core on the nets of Fig. 4a, as measured for packs of 50; for estimates of time alone."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run before it has a row.

    Attributes:
        grid: position of its grid in the spec.
        vxx_reg: None for a baseline.
    """

    grid: int
    method: Method
    learning_rate: float
    vxx_reg: float | None
    seed: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a spec comes to.

    Attributes:
        packs: the runs of each pack, in the order in which the engine gets them.
        seconds: estimated device time on one CPU core.
    """

    packs: tuple[tuple[PlannedRun, ...], ...]
    seconds: float

    @property
    def runs_total(self) -> int:
        """Count the runs."""
        return sum(map(len, self.packs))


def expand(spec: SweepSpec) -> Iterator[tuple[PlannedRun, ...]]:
    """List the runs in bundles that share a learning rate and a seed: a baseline, then its partners.

    The baseline is one run for the whole row, since it does not depend on ε.
    """
    seeds = spec.seed_list()
    for position, grid in enumerate(spec.grids):
        for learning_rate in grid.learning_rate:
            for seed in seeds:
                baseline = PlannedRun(position, "baseline", learning_rate, None, seed)
                partners = (
                    PlannedRun(position, "ddpnopt", learning_rate, vxx_reg, seed) for vxx_reg in grid.vxx_reg
                )
                yield (baseline, *partners)


def plan(spec: SweepSpec) -> Plan:
    """Choose the packs: whole bundles in order, in packs of nearly equal size.

    Raises:
        InvalidInputError: if a single run is too large.
    """
    size = min(PACK_RUNS, _runs_in_memory(spec))
    bundles: list[tuple[PlannedRun, ...]] = []
    for bundle in expand(spec):
        bundles.extend(bundle[i : i + size] for i in range(0, len(bundle), size))
    packs = math.ceil(sum(map(len, bundles)) / size)
    target = math.ceil(sum(map(len, bundles)) / packs)
    chosen: list[list[PlannedRun]] = [[]]
    for bundle in bundles:
        if chosen[-1] and len(chosen[-1]) + len(bundle) > min(size, max(target, len(bundle))):
            chosen.append([])
        chosen[-1].extend(bundle)
    total = sum(map(len, chosen))
    seconds = total * spec.training.steps * _flops_per_step(spec) / FLOPS_PER_SECOND
    return Plan(tuple(map(tuple, chosen)), seconds)


def _widths(spec: SweepSpec) -> tuple[int, ...]:
    info = CATALOG[spec.dataset]
    return (info.features, *spec.model.hidden, info.classes)


def _layers(spec: SweepSpec) -> list[tuple[int, int]]:
    widths = _widths(spec)
    return list(pairwise(widths))


def _holds_matrices(spec: SweepSpec) -> bool:
    return any(not grid.ddpnopt.resolved().resolved().factorized for grid in spec.grids)


def _bytes_per_run(spec: SweepSpec) -> int:
    """Estimate a run's memory: weights and their update, activations, V_xx's products, taking the metrics."""
    batch = spec.training.batch_size
    numbers = sum(3 * o * (i + 1) + 6 * batch * (i + o) for i, o in _layers(spec))
    if _holds_matrices(spec):
        numbers += sum(2 * batch * o * i for i, o in _layers(spec)[1:])
        numbers += 6 * batch * max(_widths(spec)[1:]) ** 2
    numbers += 4 * EVAL_CHUNK * max(_widths(spec))
    return numbers * (8 if spec.dtype == "float64" else 4)


def _runs_in_memory(spec: SweepSpec) -> int:
    each = _bytes_per_run(spec)
    if each > PACK_BYTES:
        given = f"hidden {spec.model.hidden} with batch_size {spec.training.batch_size}"
        allowed = f"a net whose run needs at most {PACK_BYTES >> 20} MiB; this one needs {each >> 20}"
        raise InvalidInputError([FieldError("model.hidden", given[:200], allowed)])
    return PACK_BYTES // each


def _flops_per_step(spec: SweepSpec) -> float:
    """Estimate a run's floating-point operations per step."""
    batch = spec.training.batch_size
    flops = sum(10 * batch * i * o for i, o in _layers(spec))
    if _holds_matrices(spec):
        flops += sum(batch * (2 * o * o * i + 2 * o * i * i) for i, o in _layers(spec)[1:])
    return float(flops)
