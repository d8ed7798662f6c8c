"""Plain SGD, u ← u - η ∇J, by backpropagation over the pack; equal to torch.optim.SGD.

It shares no code with the Bellman sweep on purpose: DDPNOpt with its feedback off has to equal it.
"""

from __future__ import annotations

from torch import Tensor

from ddpnopt.layers import linear
from ddpnopt.layers.network import Controls, Trajectory
from ddpnopt.optimizers.base import Members


class SGD:
    """SGD over a group of runs."""

    def __init__(self, members: Members) -> None:
        self.members = members

    def step(self, controls: Controls, trajectory: Trajectory, targets: Tensor) -> None:
        """See `Optimizer.step`."""
        members = self.members
        batch = targets.shape[-1]
        gradient = members.loss.gradient(trajectory.logits, targets) / batch
        for t in range(len(controls) - 1, -1, -1):
            u, slope = controls[t], trajectory.slopes[t]
            gradient_h = gradient if slope is None else gradient * slope
            if t > 0:
                gradient = linear.pull_back(gradient_h, u)
            u.addcmul_(linear.gradient(gradient_h, trajectory.x_bar[t]), members.learning_rate, value=-1)

    def select(self, keep: Tensor) -> None:
        """See `Optimizer.select`."""
        self.members = self.members.select(keep)
