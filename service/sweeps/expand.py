"""From a spec to runs and packs. Pure: the same spec and device give the same runs in the same packs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, TypeAlias

from ddpnopt import config
from ddpnopt.datasets.catalog import CATALOG
from ddpnopt.dense import too_large
from ddpnopt.lanes import rules
from ddpnopt.lanes.rules import NUMBER_BYTES
from service.errors import FieldError, InvalidInputError
from service.sweeps import estimate, estimate_lanes, estimate_lone, estimate_probes
from service.sweeps.device import Device
from service.sweeps.estimate import Layer, Method
from service.sweeps.estimate_lone import Lone
from service.sweeps.spec import LoneGrid, SweepSpec, VanillaDDPGrid

PACK_RUNS: Final = 128
"""Most runs of a pack on a core, as tensors: beyond, the time per run and step falls little, and what a pack
holds leaves the caches."""

LANE_PACK_RUNS: Final = 256
"""The same in lanes, whose time does not fall beyond a block; larger packs only fill the last block better,
and smaller ones show the first row of a heatmap sooner."""

GPU_PACK_RUNS: Final = 10_000
"""The same on a GPU, which needs thousands of small nets to be busy."""

GPU_SHARES: Final = (0.125, 0.25, 0.5)
"""The fractions of a GPU that a pack may have: those that fill it without a rest."""

SMALLEST_PACK: Final = 32
"""Packs are not made smaller than this to fill more slots: the time per run and step would rise as much.
Those of baselines that are no faster in packs are."""

MEMORY_MARGIN: Final = 1.25
"""What is planned for may be this much larger than the estimate: its error, by tests and benchmarks."""

Costs: TypeAlias = Method | Lone
"""What decides the cost of a run, of a baseline with a DDPNOpt partner or of one without."""


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
        pack_seconds: estimated device time of each pack, on one CPU core.
        share: of a device that a pack needs: 1, or a fraction of a GPU.
        at_once: packs that the device trains at a time.
    """

    packs: tuple[tuple[PlannedRun, ...], ...]
    pack_seconds: tuple[float, ...]
    at_once: int
    share: float = 1.0

    @property
    def seconds(self) -> float:
        """Estimate the device time of all packs on one CPU core."""
        return sum(self.pack_seconds)

    @property
    def runs_total(self) -> int:
        """Count the runs."""
        return sum(map(len, self.packs))


def expand(spec: SweepSpec) -> Iterator[tuple[PlannedRun, ...]]:
    """List the runs in bundles that share a learning rate and a seed: a baseline, then its partners.

    The baseline is one run for the whole row, since it does not depend on ε.
    """
    for position in range(len(spec.grids)):
        yield from _bundles(spec, position)


def _bundles(spec: SweepSpec, position: int) -> Iterator[tuple[PlannedRun, ...]]:
    grid = spec.grids[position]
    for learning_rate in grid.learning_rate:
        for seed in spec.seed_list():
            baseline = PlannedRun(position, "baseline", learning_rate, None, seed)
            partners = (
                PlannedRun(position, "ddpnopt", learning_rate, vxx_reg, seed) for vxx_reg in grid.vxx_reg
            )
            yield (baseline, *partners)


def plan(spec: SweepSpec, device: Device | None = None) -> Plan:
    """Choose the packs: whole bundles in order, in packs of nearly equal size, enough of them for all slots.

    All runs of a sweep may share a pack; grids that want packs of different sizes do not, nor do those of
    baselines without a DDPNOpt partner: what these hold once in a pack is counted for a pack of them alone.

    Args:
        spec: the sweep.
        device: what they will train on; two cores with 4 GiB if nothing else is said.

    Raises:
        InvalidInputError: if a single run is too large.
    """
    device = device or Device()
    packs: list[tuple[PlannedRun, ...]] = []
    for sharing, positions in groupby(range(len(spec.grids)), key=lambda p: _sharing(spec, p, device)):
        size = sharing.most
        bundles: list[tuple[PlannedRun, ...]] = []
        for position in positions:
            for bundle in _bundles(spec, position):
                bundles.extend(bundle[i : i + size] for i in range(0, len(bundle), size))
        packs.extend(_packed(bundles, sharing, device.slots))
    share = _share(spec, device, max(map(len, packs)))
    return Plan(tuple(packs), _pack_seconds(spec, packs), int(device.slots / share), share)


def _share(spec: SweepSpec, device: Device, largest: int) -> float:
    """Return the part of a device that a pack of so many runs needs: small packs share a GPU."""
    if device.kind == "cpu":
        return 1.0
    for share in GPU_SHARES:
        limit = int(share * device.slot_memory / MEMORY_MARGIN)
        if all(_fitting(spec, p, m, device, limit) >= largest for p, m in _kinds(spec)):
            return share
    return 1.0


def _kinds(spec: SweepSpec) -> Iterator[tuple[int, config.Method]]:
    """Yield what kinds of runs there are: each grid's methods."""
    for position, grid in enumerate(spec.grids):
        for method in grid.methods():
            yield position, method


@dataclass(frozen=True, slots=True)
class _Sharing:
    """What neighbouring grids whose runs share packs agree in.

    Attributes:
        most: runs of a pack at the most.
        least: runs of a pack that is made to fill a slot.
        alone: position of a grid that shares with none; None for one that does.
    """

    most: int
    least: int
    alone: int | None


def _sharing(spec: SweepSpec, position: int, device: Device) -> _Sharing:
    most = _most_runs(spec, position, device)
    costs = _costs(spec, position, "baseline")
    if isinstance(costs, Lone):
        return _Sharing(most, SMALLEST_PACK if costs.gains_by_packs else 1, position)
    return _Sharing(most, SMALLEST_PACK, None)


def _packed(
    bundles: Sequence[tuple[PlannedRun, ...]], sharing: _Sharing, slots: int
) -> Iterator[tuple[PlannedRun, ...]]:
    """Put bundles into as few packs of the allowed sizes as keep all slots busy."""
    total, size = sum(map(len, bundles)), sharing.most
    count = max(math.ceil(total / size), min(slots, total // sharing.least))
    if count > slots:  # as many in the last round as in the others
        count = math.ceil(count / slots) * slots
    pack: list[PlannedRun] = []
    placed = closed = 0
    for bundle in bundles:
        # Cut at the whole shares of the total, or where nothing more fits.
        if pack and (placed * count >= total * (closed + 1) or len(pack) + len(bundle) > size):
            yield tuple(pack)
            pack, closed = [], closed + 1
        pack.extend(bundle)
        placed += len(bundle)
    yield tuple(pack)


def _most_runs(spec: SweepSpec, position: int, device: Device) -> int:
    """Return how many runs of a grid a pack may have at the most.

    Raises:
        InvalidInputError: if a single one takes more memory than there is.
    """
    methods = spec.grids[position].methods()
    in_memory = min(_runs_in_memory(spec, position, method, device) for method in methods)
    if device.kind == "gpu":
        return min(GPU_PACK_RUNS, in_memory)
    fast = all(_in_lanes(spec, position, method) for method in methods)
    return min(LANE_PACK_RUNS if fast else PACK_RUNS, in_memory)


def _in_lanes(spec: SweepSpec, position: int, method: config.Method) -> bool:
    """Tell whether a grid's runs of a method train in lanes, where the workers have them."""
    grid = spec.grids[position]
    vxx_reg = None if method == "baseline" else grid.vxx_reg[0]
    run = spec.run_config(position, method, grid.learning_rate[0], vxx_reg, 0)
    return rules.trains(run, spec.layers())


def _net(spec: SweepSpec) -> tuple[Layer, ...]:
    model = spec.model
    return estimate.layers(spec.layers(), len(model.channels), model.activation, model.output)


def _costs(spec: SweepSpec, position: int, method: config.Method) -> Costs:
    """Return what decides the cost of a grid's runs of a method."""
    grid = spec.grids[position]
    if isinstance(grid, LoneGrid):
        return Lone(grid.baseline, grid.options.resolved())
    feedback = None
    if method == "ddpnopt":
        feedback = grid.ddpnopt.resolved().resolved(convolutional=spec.model.resolved().convolutional)
    return Method.of(grid.baseline, grid.options.resolved(), feedback)


def _runs_in_memory(spec: SweepSpec, position: int, method: config.Method, device: Device) -> int:
    """Return how many of a grid's runs of a method fit a slot's memory.

    Raises:
        InvalidInputError: if a single one does not, or its matrices do not fit the limit that they have.
    """
    _check_matrices(spec, position)
    limit = int(device.slot_memory / MEMORY_MARGIN)
    most = _fitting(spec, position, method, device, limit)
    if most == 0:
        costs, fast = _costs(spec, position, method), _fast(spec, position, method, device)
        alone, thrifty = (_bytes(spec, c, lanes=fast) for c in (costs, costs.as_outer_product()))
        raise InvalidInputError([_too_large(spec, position, costs, alone, thrifty, limit)])
    return most


def _check_matrices(spec: SweepSpec, position: int) -> None:
    """Refuse a grid of vanilla DDP that the optimizer itself would refuse."""
    grid = spec.grids[position]
    if not isinstance(grid, VanillaDDPGrid):
        return
    net, batch, limit = _net(spec), spec.training.batch_size, grid.options.memory_limit
    if (need := estimate_lone.matrices(net, batch, spec.dtype)) > limit:
        allowed = too_large(estimate_lone.shapes(net), batch, need, limit)
        raise InvalidInputError([FieldError(f"grids[{position}].options.memory_limit", str(limit), allowed)])


def _fast(spec: SweepSpec, position: int, method: config.Method, device: Device) -> bool:
    return device.kind == "cpu" and _in_lanes(spec, position, method)


def _fitting(spec: SweepSpec, position: int, method: config.Method, device: Device, limit: int) -> int:
    """Return how many of a grid's runs of a method fit so many bytes; 0 if not even one does."""
    costs, fast = _costs(spec, position, method), _fast(spec, position, method, device)
    alone = _bytes(spec, costs, lanes=fast)
    if alone > limit:
        return 0
    net, batch, number = _net(spec), spec.training.batch_size, NUMBER_BYTES[spec.dtype]
    if isinstance(costs, Lone):
        return estimate_lone.most_runs(net, batch, costs, limit // number, dtype=spec.dtype)
    if fast:
        per_run = number * estimate_lanes.state(net, costs)
        return 1 + (limit - alone) // per_run
    return estimate.most_runs(net, batch, costs, limit // number, dtype=spec.dtype)


def _bytes(spec: SweepSpec, costs: Costs, *, lanes: bool) -> int:
    """Return what a pack of one run takes."""
    net, batch, number = _net(spec), spec.training.batch_size, NUMBER_BYTES[spec.dtype]
    if isinstance(costs, Lone):
        return number * estimate_lone.numbers(net, batch, costs, dtype=spec.dtype)
    if lanes:
        fixed = estimate_lanes.workspace(net, batch, costs, number)
        return fixed + number * estimate_lanes.state(net, costs)
    return number * estimate.numbers(net, batch, costs, dtype=spec.dtype)


def _too_large(
    spec: SweepSpec, position: int, method: Costs, needed: int, thrifty: int, most: int
) -> FieldError:
    """Say which option to change: that of a full V_xx if an outer product would fit, else the net."""
    limit = f"a run may take {most >> 20} MiB, this one needs {needed >> 20}"
    if not method.full or thrifty > most:
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


def _pack_seconds(spec: SweepSpec, packs: Sequence[Sequence[PlannedRun]]) -> tuple[float, ...]:
    """Estimate the time of each pack on one core: its runs' steps, and the points of their curves."""
    of_run = {(position, method): _run_seconds(spec, position, method) for position, method in _kinds(spec)}
    return tuple(sum(of_run[run.grid, run.method] for run in pack) for pack in packs)


def _run_seconds(spec: SweepSpec, position: int, method: config.Method) -> float:
    net, info, training = _net(spec), CATALOG[spec.dataset], spec.training.resolved()
    measured = rules.measures(spec.model.resolved(), spec.layers())
    point = estimate_lanes.metrics_seconds if measured else estimate.metrics_seconds
    points = list(training.points())
    samples = info.test_size * sum(map(training.takes_test_metrics, points))
    if training.train_metrics == "full":
        samples += info.train_size * len(points)
    update = _step_seconds(spec, position, method)
    looking = estimate_probes.seconds(spec.probes, method, training, spec.layers(), update)
    return training.steps * update + point(net, samples) + looking


def _step_seconds(spec: SweepSpec, position: int, method: config.Method) -> float:
    net, batch, costs = _net(spec), spec.training.batch_size, _costs(spec, position, method)
    if isinstance(costs, Lone):
        return estimate_lone.seconds(net, batch, costs)
    stepping = estimate_lanes.seconds if _in_lanes(spec, position, method) else estimate.seconds
    return stepping(net, batch, costs)
