"""DDPNOpt (Alg. 3) over a group of runs: terminal value, backward pass, second forward pass."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ddpnopt.config import PRECONDITIONER_OF, FeedbackConfig
from ddpnopt.ddp.backward import (
    FullForm,
    FullValue,
    Gradient,
    OpenLoopForm,
    Sweep,
    backward_pass,
)
from ddpnopt.ddp.forward import apply_policy
from ddpnopt.ddp.outer_product import OuterProductForm, OuterProductValue
from ddpnopt.ddp.second_order import SecondOrderForm
from ddpnopt.errors import ConfigError
from ddpnopt.layers.conv import Conv2d
from ddpnopt.layers.network import Controls, Network, Trajectory
from ddpnopt.optimizers.base import Members, Quantity, Trace
from ddpnopt.optimizers.momentum import DescentOptimizer, inverses
from ddpnopt.preconditioners import Units


class DDPNOpt(DescentOptimizer):
    """DDPNOpt with the preconditioner of its baseline."""

    def __init__(self, members: Members) -> None:
        if members.config.feedback is None:
            raise ConfigError("feedback", None, "the options of DDPNOpt")
        super().__init__(members, PRECONDITIONER_OF[members.config.baseline])
        self.options = resolve(members.config.feedback, members.network)

    def step(self, controls: Controls, trajectory: Trajectory, targets: Tensor) -> Trace:
        """See `Optimizer.step`."""
        members, descent = self.members, self.descent
        sweep = self.sweep(controls, trajectory, targets, keep_values=False)
        directions: list[Tensor] = []

        def update(t: int, u: Tensor, direction: Tensor) -> None:
            directions.append(direction)
            descent.update(t, u, direction, members.rates[t])

        units = self.units(targets)
        apply_policy(sweep.policies, members.network, controls, trajectory, members.rates, units, update)

        def trace() -> Iterator[Quantity]:
            layers = range(len(controls) - 1, -1, -1)
            for t in layers:
                yield Quantity(t, "V_x", sweep.policies[t].V_h)
                for factor in sweep.policies[t].factors():
                    yield Quantity(t, "V_xx", factor)
                for _, part in inverses(descent.preconditioner, [t]):
                    yield Quantity(t, "M", part)
            for t, (direction, u) in enumerate(zip(directions, controls, strict=True)):
                yield Quantity(t, "Q_u + Q_ux δx", direction)
                yield Quantity(t, "u", u)

        return trace

    def sweep(
        self, controls: Controls, trajectory: Trajectory, targets: Tensor, *, keep_values: bool = True
    ) -> Sweep:
        """Do the backward pass: the policy and the value of every layer, none of it applied."""
        members, options = self.members, self.options
        units = self.units(targets)
        preconditioner = self.descent.preconditioner
        network, rates = members.network, members.rates
        rest = (network, controls, trajectory, preconditioner, rates, units)
        V_x = members.loss_gradient(trajectory, targets) * units.share
        if not options.feedback:
            return backward_pass(OpenLoopForm(), Gradient(V_x), *rest, keep_values=keep_values)
        if options.factorized:
            weight = V_x.new_full((1, 1, 1), options.curvature_scale)
            terminal = OuterProductValue.of_gradient(V_x, weight)
            return backward_pass(
                OuterProductForm(options.safeguard), terminal, *rest, keep_values=keep_values
            )
        # In batch-mean units V_x = ∇φ/B and the curvature bears the factor squared: the outer product of
        # that gradient, with the exact Hessian put on the same scale.
        if options.terminal_hessian == "exact":
            hessian = members.loss.hessian(trajectory.output, targets) * units.share**2
        else:
            hessian = V_x.unsqueeze(-1) * V_x.unsqueeze(-2)
        dense = FullValue(V_x, options.curvature_scale * hessian)
        if options.dynamics == "second_order":
            return backward_pass(SecondOrderForm(options.safeguard), dense, *rest, keep_values=keep_values)
        return backward_pass(FullForm(options.safeguard), dense, *rest, keep_values=keep_values)

    def units(self, targets: Tensor) -> Units:
        """Return the units of the value function for a batch."""
        return Units.of(self.options.convention, targets.shape[1])


def resolve(feedback: FeedbackConfig, network: Network) -> FeedbackConfig:
    """Fill in the defaults for a net.

    Raises:
        ConfigError: if a layer cannot do what is asked for.
    """
    options = feedback.resolved(convolutional=any(isinstance(s.affine, Conv2d) for s in network.stages))
    dense = all(s.affine.dense and all(layer.dense for layer in s.sigma) for s in network.stages)
    if options.feedback and not options.factorized and not dense:
        raise ConfigError(
            "ddpnopt.factorized",
            False,
            "true with generic layers, whose V_xx is an outer product (terminal_hessian: gauss_newton)",
        )
    return options
