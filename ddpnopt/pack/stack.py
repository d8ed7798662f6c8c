"""From runs to tensors: the members of a pack, sorted into groups of one optimizer each.

Index legend: r run in the pack, g seed among the pack's distinct seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ddpnopt import optimizers
from ddpnopt.config import LayerShape, RunConfig
from ddpnopt.errors import ConfigError
from ddpnopt.layers.losses import LOSSES
from ddpnopt.layers.network import Controls, Network, Trajectory
from ddpnopt.linalg import DTYPES
from ddpnopt.optimizers import Members, Optimizer
from ddpnopt.optimizers.base import Blame, blame, finite_members
from ddpnopt.pack import rng
from ddpnopt.rates import Rates


@dataclass(slots=True)
class Group:
    """Neighbouring members [start, stop) of the pack under one optimizer."""

    start: int
    stop: int
    optimizer: Optimizer


@dataclass(slots=True)
class Stack:
    """The members that are still in training.

    Attributes:
        index: (R,) each member's place in the sequence that was handed in.
        seed_row: (R,) each member's row among `seeds`.
        seeds: the pack's distinct seeds.
        controls: u_t, each (R, o_t, ī_t).
        groups: cover the members without gap or overlap.
    """

    index: Tensor
    seed_row: Tensor
    seeds: tuple[int, ...]
    controls: Controls
    groups: list[Group]

    def step(self, trajectory: Trajectory, targets: Tensor) -> tuple[Tensor, dict[int, Blame]]:
        """Let every group's optimizer update its members by one batch, targets (R, B).

        Returns:
            Whose controls are finite afterwards, (R,) bool, and what was to blame for each of the others.
        """
        traces = []
        for group in self.groups:
            part = slice(group.start, group.stop)
            views = [u[part] for u in self.controls]
            traces.append(group.optimizer.step(views, trajectory.members(part), targets[part]))
        finite = finite_members(self.controls)
        blamed: dict[int, Blame] = {}
        if not bool(finite.all()):
            for group, trace in zip(self.groups, traces, strict=True):
                for row in (~finite[group.start : group.stop]).nonzero().flatten().tolist():
                    found = blame(trace, row, group.stop - group.start)
                    blamed[group.start + row] = found or Blame("weights", None, float("nan"))
        return finite, blamed

    def select(self, keep: Tensor) -> None:
        """Keep only the members where `keep` (R,) bool is true; the others' numbers stay as they are."""
        groups, start = [], 0
        for group in self.groups:
            kept = keep[group.start : group.stop].nonzero().flatten()
            if len(kept):
                group.optimizer.select(kept)
                groups.append(Group(start, start + len(kept), group.optimizer))
                start += len(kept)
        self.groups = groups
        self.index, self.seed_row = self.index[keep], self.seed_row[keep]
        self.controls = [u[keep] for u in self.controls]


def stack(
    runs: Sequence[RunConfig],
    network: Network,
    layers: Sequence[LayerShape],
    device: torch.device,
    places: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
) -> Stack:
    """Build a pack's starting state.

    Args:
        runs: at least one, all of one `pack_key`.
        network: the nets' layers.
        layers: the sizes of those with controls.
        device: where it trains.
        places: each run's place in a larger sequence; if not given, in `runs`.
        seeds: all that `seed_row` points into; if not given, the runs' own.

    Raises:
        ConfigError: if the runs cannot share a pack.
    """
    if not runs:
        raise ConfigError("runs", [], "at least one run")
    if len({run.pack_key() for run in runs}) != 1:
        raise ConfigError("runs", len(runs), "runs of one pack_key")
    order = sorted(range(len(runs)), key=lambda i: (repr(_group_key(runs[i])), i))
    seeds = tuple(seeds or distinct_seeds(runs))
    dtype = DTYPES[runs[0].dtype]
    rows = {seed: row for row, seed in enumerate(seeds)}
    seed_row = torch.tensor([rows[runs[i].seed] for i in order], device=device)
    controls = [u.to(device) for u in initial_controls([runs[i] for i in order], layers)]
    index = torch.tensor([i if places is None else places[i] for i in order], device=device)
    return Stack(index, seed_row, seeds, controls, _groups(runs, order, network, dtype, device))


def distinct_seeds(runs: Sequence[RunConfig]) -> tuple[int, ...]:
    """Return the runs' seeds, each once, in order."""
    return tuple(sorted({run.seed for run in runs}))


def initial_controls(runs: Sequence[RunConfig], layers: Sequence[LayerShape]) -> Controls:
    """Return the u_t that each run starts from, each (R, o_t, ī_t), on the host."""
    per_seed = {seed: rng.initial_controls(seed, layers) for seed in distinct_seeds(runs)}
    dtype = DTYPES[runs[0].dtype]
    return [
        torch.from_numpy(np.stack([per_seed[run.seed][t] for run in runs])).to(dtype)
        for t in range(len(layers))
    ]


def _group_key(run: RunConfig) -> tuple[object, ...]:
    return optimizers.group_key(run.optimizer, convolutional=run.model.convolutional)


def _groups(
    runs: Sequence[RunConfig], order: list[int], network: Network, dtype: torch.dtype, device: torch.device
) -> list[Group]:
    groups, start = [], 0
    for _, indices in groupby(order, key=lambda i: _group_key(runs[i])):
        members = [runs[i] for i in indices]
        first = members[0]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).reshape(-1, 1, 1)

        options = [run.optimizer.options for run in members]
        rates = Rates(
            column([run.optimizer.learning_rate for run in members]),
            column([run.optimizer.vxx_reg or 0.0 for run in members]),
            column([o.weight_decay for o in options]) if options[0].weight_decay else None,
            column([o.momentum for o in options]) if options[0].momentum else None,
        )
        every = (rates,) * len(network.stages)
        optimizer = optimizers.make(Members(first.optimizer, network, LOSSES[first.loss], every))
        groups.append(Group(start, start + len(members), optimizer))
        start += len(members)
    return groups
