"""A pack of equal nets and the trajectory that a batch takes through them.

Index legend: t layer, r run in the pack, b sample, i inputs, ī inputs and the constant one, o outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ddpnopt.config import ModelConfig
from ddpnopt.layers import linear
from ddpnopt.layers.activations import ACTIVATIONS, Activation

Controls = list[Tensor]
"""u_t = [W_t, b_t] of layers t = 0..T-1, each (R, n_{t+1}, n_t + 1)."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """What one forward pass leaves behind for the backward pass.

    Attributes:
        x_bar: x̄_t of t = 0..T-1, each (R, B, n_t + 1).
        slopes: σ'_t(h_t) of t = 0..T-1, each (R, B, n_{t+1}); None where it is one everywhere.
        logits: x_T, (R, B, n_T).
    """

    x_bar: tuple[Tensor, ...]
    slopes: tuple[Tensor | None, ...]
    logits: Tensor

    def members(self, part: slice) -> Trajectory:
        """Return the trajectory of some runs of the pack, as views."""
        return Trajectory(
            tuple(x[part] for x in self.x_bar),
            tuple(None if s is None else s[part] for s in self.slopes),
            self.logits[part],
        )


def activations(model: ModelConfig) -> tuple[Activation, ...]:
    """Return σ_t of t = 0..T-1; the read-out is linear."""
    return (ACTIVATIONS[model.activation],) * len(model.hidden) + (ACTIVATIONS["identity"],)


def rollout(controls: Controls, sigma: tuple[Activation, ...], x: Tensor) -> Trajectory:
    """Run a batch through the nets, keeping what the backward pass needs.

    Args:
        controls: u_t, each (R, n_{t+1}, n_t + 1).
        sigma: σ_t.
        x: (R, B, n_0).

    Returns:
        The trajectory.
    """
    x_bars, slopes = [], []
    for u, act in zip(controls, sigma, strict=True):
        x_bar = linear.augment(x)
        h = linear.forward(x_bar, u)
        x = act.forward(h)
        x_bars.append(x_bar)
        slopes.append(None if act.slope is None else act.slope(h, x))
    return Trajectory(tuple(x_bars), tuple(slopes), x)


def predict(controls: Controls, sigma: tuple[Activation, ...], x: Tensor) -> Tensor:
    """Return the logits (R, B, n_T) of a batch (R, B, n_0), keeping nothing."""
    for u, act in zip(controls, sigma, strict=True):
        x = act.forward(linear.forward(linear.augment(x), u))
    return x
