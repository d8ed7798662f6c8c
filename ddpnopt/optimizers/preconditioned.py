"""The baselines u ← u - η M⁻¹ ∇J: SGD, RMSprop, Adam (equal to torch.optim's), KFAC and EKFAC (Table 2).

Backpropagation over the pack. It shares no code with the Bellman sweep on purpose: DDPNOpt with its feedback
off has to equal it.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ddpnopt.config import PRECONDITIONER_OF
from ddpnopt.layers.network import Controls, Trajectory, linearise, pull_back
from ddpnopt.optimizers.base import Members, Quantity, Trace
from ddpnopt.optimizers.momentum import DescentOptimizer, inverses
from ddpnopt.preconditioners import LayerBatch, Units


class Preconditioned(DescentOptimizer):
    """Gradient descent by a preconditioned gradient over a group of runs."""

    def __init__(self, members: Members) -> None:
        super().__init__(members, PRECONDITIONER_OF[members.config.baseline])

    def step(self, controls: Controls, trajectory: Trajectory, targets: Tensor) -> Trace:
        """See `Optimizer.step`."""
        members, preconditioner = self.members, self.descent.preconditioner
        batch = targets.shape[1]
        units = Units.of("batch_mean", batch)
        J_x = members.loss_gradient(trajectory, targets) / batch
        gradients: list[Tensor] = []
        for t in range(len(controls) - 1, -1, -1):
            stage, inputs, u = members.network.stages[t], trajectory.inputs[t], controls[t]
            jacobians = linearise(stage, trajectory.tapes[t])
            J_h = pull_back(jacobians, J_x.unsqueeze(2))
            if t > 0:
                J_x = stage.affine.pull_back(J_h, inputs, u).squeeze(2)
            observed = LayerBatch(stage.affine, inputs, u, J_h.squeeze(2), units, members.rates[t].decay)
            preconditioner.observe(t, observed)
            gradients.append(observed.mean_gradient())
            self.descent.update(t, u, gradients[-1], members.rates[t])

        def trace() -> Iterator[Quantity]:
            layers = range(len(controls) - 1, -1, -1)
            for t, gradient in zip(layers, gradients, strict=True):
                yield Quantity(t, "J_u", gradient)
            for t, part in inverses(preconditioner, layers):
                yield Quantity(t, "M", part)
            for t in layers:
                yield Quantity(t, "u", controls[t])

        return trace
