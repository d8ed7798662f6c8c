"""DDPNOpt (Alg. 3) over a group of runs: terminal value, backward pass, second forward pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ddpnopt.config import FeedbackConfig
from ddpnopt.ddp.backward import FullForm, FullValue, Gradient, OpenLoopForm, Policy, backward_pass
from ddpnopt.ddp.forward import apply_policy
from ddpnopt.ddp.outer_product import OuterProductForm, OuterProductValue
from ddpnopt.errors import ConfigError
from ddpnopt.layers.network import Controls, Trajectory
from ddpnopt.optimizers.base import Members
from ddpnopt.preconditioners import PRECONDITIONERS


class DDPNOpt:
    """DDPNOpt with the preconditioner of its baseline."""

    def __init__(self, members: Members) -> None:
        if members.config.feedback is None:
            raise ConfigError("feedback", None, "the options of DDPNOpt")
        self.options: FeedbackConfig = members.config.feedback.resolved()
        self.members = members
        self.preconditioner = PRECONDITIONERS[members.config.baseline]()

    def step(self, controls: Controls, trajectory: Trajectory, targets: Tensor) -> None:
        """See `Optimizer.step`."""
        policies = self.policies(controls, trajectory, targets)
        apply_policy(
            policies,
            controls,
            self.members.sigma,
            trajectory,
            self.preconditioner,
            self.members.learning_rate,
            batch_weight=1.0 if self.options.convention == "batch_mean" else 1.0 / targets.shape[-1],
        )

    def policies(self, controls: Controls, trajectory: Trajectory, targets: Tensor) -> Sequence[Policy]:
        """Return the policy of each layer, t = 0..T-1, without applying it."""
        members, options = self.members, self.options
        sweep = (controls, trajectory, self.preconditioner, members.learning_rate)
        V_x, scale = self.terminal_gradient(trajectory, targets)
        if not options.feedback:
            return backward_pass(OpenLoopForm(), Gradient(V_x), *sweep)
        if options.factorized:
            z = V_x * options.curvature_scale**0.5
            form = OuterProductForm(members.vxx_reg, options.safeguard)
            return backward_pass(form, OuterProductValue(V_x, z), *sweep)
        if options.terminal_hessian == "exact":
            hessian = members.loss.hessian(trajectory.logits, targets) * scale**2
        else:
            hessian = V_x.unsqueeze(-1) * V_x.unsqueeze(-2)
        terminal = FullValue(V_x, options.curvature_scale * hessian)
        return backward_pass(FullForm(members.vxx_reg, options.safeguard), terminal, *sweep)

    def terminal_gradient(self, trajectory: Trajectory, targets: Tensor) -> tuple[Tensor, float]:
        """Return V_x at T (R, B, C) and the factor on ∇φ in it.

        In batch-mean units V_x = ∇φ/B and the curvature bears the factor squared: the outer product of
        that gradient, with the exact Hessian put on the same scale.
        """
        scale = 1.0 / targets.shape[-1] if self.options.convention == "batch_mean" else 1.0
        return self.members.loss.gradient(trajectory.logits, targets) * scale, scale

    def select(self, keep: Tensor) -> None:
        """See `Optimizer.select`."""
        self.members = self.members.select(keep)
        self.preconditioner.select(keep)
