"""The interface of an optimizer over a group of a pack's members."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from ddpnopt.config import OptimizerConfig
from ddpnopt.layers.activations import Activation
from ddpnopt.layers.losses import Loss
from ddpnopt.layers.network import Controls, Trajectory


@dataclass(frozen=True, slots=True)
class Members:
    """The runs of a group: what they share, and what each has of its own.

    Attributes:
        config: of the first run; the group shares all of it but the learning rate and ε.
        sigma: σ_t.
        loss: φ.
        learning_rate: η, (R, 1, 1).
        vxx_reg: ε, (R, 1, 1); zero for a baseline.
    """

    config: OptimizerConfig
    sigma: tuple[Activation, ...]
    loss: Loss
    learning_rate: Tensor
    vxx_reg: Tensor

    def select(self, keep: Tensor) -> Members:
        """Return the members of these indices (K,)."""
        return replace(self, learning_rate=self.learning_rate[keep], vxx_reg=self.vxx_reg[keep])


class Optimizer(Protocol):
    """Updates the controls of a group, given a forward pass over them."""

    def step(self, controls: Controls, trajectory: Trajectory, targets: Tensor) -> None:
        """Update u_t (each (R, o, ī)) in place by one batch's trajectory and targets (R, B)."""
        ...

    def select(self, keep: Tensor) -> None:
        """Keep only the members of these indices (K,), with their state."""
        ...
