"""From a spec to runs and packs. Pure: the same spec gives the same runs in the same packs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ddpnopt import config
from ddpnopt.datasets.catalog import CATALOG
from service.errors import FieldError, InvalidInputError
from service.sweeps import estimate
from service.sweeps.estimate import Layer, Method
from service.sweeps.spec import GridSpec, SweepSpec

PACK_RUNS: Final = 64
"""Most runs of a pack. On a CPU the time per run and step falls little beyond; smaller packs fill more cores
and show the first row of a heatmap sooner."""

PACK_BYTES: Final = 2 * 2**30
"""Memory that a pack may take by the estimate."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run before it has a row.

    Attributes:
        grid: position of its grid in the spec.
        vxx_reg: None for a baseline.
    """

    grid: int
    method: config.Method
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
    return Plan(tuple(map(tuple, chosen)), _seconds(spec))


def _net(spec: SweepSpec) -> tuple[Layer, ...]:
    return estimate.layers(spec.layers(), len(spec.model.channels))


def _methods(spec: SweepSpec, grid: GridSpec) -> tuple[Method, Method]:
    """Return what a grid's baseline costs, and its partner."""
    options = grid.options.resolved()
    feedback = grid.ddpnopt.resolved().resolved(convolutional=spec.model.resolved().convolutional)
    return Method.of(grid.baseline, options, None), Method.of(grid.baseline, options, feedback)


def _runs_in_memory(spec: SweepSpec) -> int:
    """Return how many runs of the hungriest kind fit a pack.

    Raises:
        InvalidInputError: if a single one does not.
    """
    net, size = _net(spec), 8 if spec.dtype == "float64" else 4
    most = 0
    for position, grid in enumerate(spec.grids):
        for method in _methods(spec, grid):
            needed = size * estimate.numbers(net, spec.training.batch_size, method)
            if needed > PACK_BYTES:
                thrifty = size * estimate.numbers(net, spec.training.batch_size, method.as_outer_product())
                raise InvalidInputError([_too_large(spec, position, method, needed, thrifty)])
            most = max(most, needed)
    return PACK_BYTES // most


def _too_large(spec: SweepSpec, position: int, method: Method, needed: int, thrifty: int) -> FieldError:
    """Say which option to change: that of a full V_xx if an outer product would fit, else the net."""
    limit = f"a run may take {PACK_BYTES >> 20} MiB, this one needs {needed >> 20}"
    if not method.full or thrifty > PACK_BYTES:
        net = f"hidden {spec.model.hidden} with batch_size {spec.training.batch_size}"
        if spec.model.channels:
            net = f"channels {spec.model.channels}, {net}"
        field = "model.channels" if spec.model.channels else "model.hidden"
        return FieldError(field, net[:200], f"smaller ones: {limit}")
    chosen = spec.grids[position].ddpnopt
    thrift = f", which needs no matrix V_xx per sample: {limit}"
    resolved = chosen.resolved().resolved(convolutional=bool(spec.model.channels))
    name, given, allowed = "factorized", "false", "true"
    if chosen.dynamics == "second_order":
        name, given = "dynamics", "second_order"
        allowed = "first_order with terminal_hessian: gauss_newton"
    elif resolved.terminal_hessian == "exact":
        name, given = "terminal_hessian", "exact" if chosen.terminal_hessian else "exact, the default"
        allowed = "gauss_newton"
    return FieldError(f"grids[{position}].ddpnopt.{name}", given, allowed + thrift)


def _seconds(spec: SweepSpec) -> float:
    """Estimate the time of all runs on one core: their steps, and the points of their curves."""
    net, info, training = _net(spec), CATALOG[spec.dataset], spec.training.resolved()
    points = math.ceil(training.steps / training.eval_every) + 1
    metrics = points * estimate.metrics_seconds(net, info.train_size + info.test_size)
    total = 0.0
    for grid in spec.grids:
        baseline, partner = (
            metrics + training.steps * estimate.seconds(net, training.batch_size, method)
            for method in _methods(spec, grid)
        )
        total += len(grid.learning_rate) * (baseline + len(grid.vxx_reg) * partner)
    return total * len(spec.seed_list())
