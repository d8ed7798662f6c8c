"""The second forward pass of DDPNOpt (Alg. 3, lines 14-18): the policy applied along its own trajectory.

Index legend: t layer, r run in the pack, b sample, i inputs, ī inputs and the constant one, o outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ddpnopt.ddp.backward import Policy
from ddpnopt.layers import linear
from ddpnopt.layers.activations import Activation
from ddpnopt.layers.network import Controls, Trajectory
from ddpnopt.preconditioners import Preconditioner


def apply_policy(
    policies: Sequence[Policy],
    controls: Controls,
    sigma: tuple[Activation, ...],
    trajectory: Trajectory,
    preconditioner: Preconditioner,
    learning_rate: Tensor,
    batch_weight: float,
) -> None:
    """Update each u_t in place by its policy, with δx_t from the layers already updated.

    d_t = Σ̄_b [(V_h + V_hh W δx) x̄ᵀ],  u_t ← u_t - η M⁻¹ d_t,  x̂_{t+1} = σ(û_t x̂̄_t),  δx = x̂ - x.

    Args:
        policies: of t = 0..T-1.
        controls: u_t, each (R, o, ī); overwritten.
        sigma: σ_t.
        trajectory: the nominal x_t.
        preconditioner: M_t.
        learning_rate: η, (R, 1, 1).
        batch_weight: 1 where Σ̄ is the sum over the batch, 1/B where it is the mean.
    """
    x_hat_bar = trajectory.x_bar[0]
    last = len(controls) - 1
    for t, (policy, u, act) in enumerate(zip(policies, controls, sigma, strict=True)):
        x_bar = trajectory.x_bar[t]
        V_h = policy.V_h
        if t > 0:
            V_h = V_h + policy.feedback((x_hat_bar - x_bar)[..., :-1])
        direction = linear.gradient(V_h, x_bar)
        u.addcmul_(preconditioner.apply(t, direction), learning_rate, value=-batch_weight)
        if t < last:
            x_hat_bar = linear.augment(act.forward(linear.forward(x_hat_bar, u)))
