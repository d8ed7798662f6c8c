"""The interface of an optimizer over a group of a pack's members."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ddpnopt.config import OptimizerConfig
from ddpnopt.layers.losses import Loss
from ddpnopt.layers.network import Controls, Network, Trajectory
from ddpnopt.rates import Rates


@dataclass(frozen=True, slots=True)
class Members:
    """The runs of a group: what they share, and what each has of its own.

    Attributes:
        config: of the first run; the group shares all of it but the learning rate and ε.
        network: the layers.
        loss: φ.
        rates: of t = 0..T-1.
    """

    config: OptimizerConfig
    network: Network
    loss: Loss
    rates: tuple[Rates, ...]

    def select(self, keep: Tensor) -> Members:
        """Return the members of these indices (K,)."""
        chosen = {id(rates): rates.select(keep) for rates in self.rates}
        return replace(self, rates=tuple(chosen[id(rates)] for rates in self.rates))

    def loss_gradient(self, trajectory: Trajectory, targets: Tensor) -> Tensor:
        """Return ∇φ at x_T, (R, B, n_T)."""
        known = trajectory.loss_gradient
        return self.loss.gradient(trajectory.output, targets) if known is None else known


@dataclass(frozen=True, slots=True)
class Quantity:
    """A tensor that an update was made of, for finding where it left the finite numbers.

    Attributes:
        layer: t; None if it belongs to no layer.
        name: as in the paper.
        values: (R, …), or (N, …) with the blocks of a run next to each other.
    """

    layer: int | None
    name: str
    values: Tensor


Trace = Callable[[], Iterator[Quantity]]
"""Lists what an update was made of, in the order of computation."""


class Optimizer(Protocol):
    """Updates the controls of a group, given a forward pass over them."""

    members: Members

    def step(self, controls: Controls, trajectory: Trajectory, targets: Tensor) -> Trace:
        """Update u_t (each (R, o, ī)) in place by one batch's trajectory and targets (R, B)."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what is remembered between steps; nothing in it is written into later."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        ...

    def select(self, keep: Tensor) -> None:
        """Keep only the members of these indices (K,), with their state."""
        ...


def finite_members(controls: Controls) -> Tensor:
    """Return which members have finite controls alone, (R,) bool."""
    # A sum costs one pass; each entry is looked at only where it is not finite, as large numbers can make it.
    sums = torch.stack([u.sum(dim=(1, 2)) for u in controls])
    finite = torch.isfinite(sums).all(dim=0)
    if bool(finite.all()):
        return finite
    return torch.stack([torch.isfinite(u).flatten(1).all(dim=1) for u in controls]).all(dim=0)


@dataclass(frozen=True, slots=True)
class Blame:
    """The first quantity of an update that is not finite.

    Attributes:
        quantity: its name, with the layer: `V_xx of layer 3`.
        layer: t; None if it belongs to no layer.
        value: its first entry that is not finite.
    """

    quantity: str
    layer: int | None
    value: float


def blame(trace: Trace, row: int, members: int) -> Blame | None:
    """Find the first quantity of a member's update that is not finite; None if all are."""
    for quantity in trace():
        values = quantity.values
        if len(values) == 1:  # the same for all members
            values = values.expand(members, *values.shape[1:])
        values = values.unflatten(0, (members, -1))[row]
        bad = values[~torch.isfinite(values)]
        if len(bad):
            place = "" if quantity.layer is None else f" of layer {quantity.layer}"
            return Blame(quantity.name + place, quantity.layer, float(bad[0]))
    return None
