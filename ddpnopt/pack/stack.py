"""From runs to tensors: the members of a pack, sorted into groups of one optimizer each.

Index legend: r run in the pack, g seed among the pack's distinct seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ddpnopt import optimizers
from ddpnopt.config import RunConfig
from ddpnopt.errors import ConfigError
from ddpnopt.layers.losses import LOSSES
from ddpnopt.layers.network import Controls, Trajectory, activations
from ddpnopt.optimizers import Members, Optimizer
from ddpnopt.pack import rng

DTYPES: Final = {"float32": torch.float32, "float64": torch.float64}


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
        controls: u_t, each (R, n_{t+1}, n_t + 1).
        groups: cover the members without gap or overlap.
    """

    index: Tensor
    seed_row: Tensor
    seeds: tuple[int, ...]
    controls: Controls
    groups: list[Group]

    def step(self, trajectory: Trajectory, targets: Tensor) -> None:
        """Let every group's optimizer update its members by one batch, targets (R, B)."""
        for group in self.groups:
            part = slice(group.start, group.stop)
            group.optimizer.step([u[part] for u in self.controls], trajectory.members(part), targets[part])

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


def stack(runs: Sequence[RunConfig], widths: tuple[int, ...], device: torch.device) -> Stack:
    """Build a pack's starting state.

    Args:
        runs: at least one, all of one `pack_key`.
        widths: n_0..n_T.
        device: where it trains.

    Raises:
        ConfigError: if the runs cannot share a pack.
    """
    if not runs:
        raise ConfigError("runs", [], "at least one run")
    if len({run.pack_key() for run in runs}) != 1:
        raise ConfigError("runs", len(runs), "runs of one pack_key")
    order = sorted(range(len(runs)), key=lambda i: (repr(optimizers.group_key(runs[i].optimizer)), i))
    seeds = tuple(sorted({run.seed for run in runs}))
    dtype = DTYPES[runs[0].dtype]
    rows = {seed: row for row, seed in enumerate(seeds)}
    seed_row = torch.tensor([rows[runs[i].seed] for i in order], device=device)
    per_seed = [rng.initial_controls(seed, widths) for seed in seeds]
    controls = [
        torch.from_numpy(np.stack([u[t] for u in per_seed])).to(device=device, dtype=dtype)[seed_row]
        for t in range(len(widths) - 1)
    ]
    index = torch.tensor(order, device=device)
    return Stack(index, seed_row, seeds, controls, _groups(runs, order, dtype, device))


def _groups(
    runs: Sequence[RunConfig], order: list[int], dtype: torch.dtype, device: torch.device
) -> list[Group]:
    groups, start = [], 0
    for _, indices in groupby(order, key=lambda i: optimizers.group_key(runs[i].optimizer)):
        members = [runs[i] for i in indices]
        first = members[0]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).reshape(-1, 1, 1)

        optimizer = optimizers.make(
            members,
            Members(
                first.optimizer,
                activations(first.model),
                LOSSES[first.loss],
                column([run.optimizer.learning_rate for run in members]),
                column([run.optimizer.vxx_reg or 0.0 for run in members]),
            ),
        )
        groups.append(Group(start, start + len(members), optimizer))
        start += len(members)
    return groups
