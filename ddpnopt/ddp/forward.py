"""The second forward pass of DDPNOpt (Alg. 3, lines 14-18): the policy applied along its own trajectory.

Index legend: t layer, r run in the pack, b sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ddpnopt.ddp.backward import Policy
from ddpnopt.layers.network import Controls, Network, Trajectory, again
from ddpnopt.preconditioners import Units, direction
from ddpnopt.rates import Rates

Update = Callable[[int, Tensor, Tensor], None]
"""Takes t, u_t (R, o, ī) and d_t (R, o, ī), and updates u_t in place."""


def apply_policy(
    policies: Sequence[Policy],
    network: Network,
    controls: Controls,
    trajectory: Trajectory,
    rates: Sequence[Rates],
    units: Units,
    update: Update,
) -> None:
    """Update each u_t by its policy, with δx_t from the layers already updated.

    d_t = Σ̄_b [g_uᵀ (V_h + A δx)] + λu,  u_t ← u_t - η M⁻¹ d_t,  x̂_{t+1} = f(x̂_t, û_t),  δx = x̂ - x.
    Second-order dynamics add Σ̄_b (V_h · g_ux) δx to d_t.

    Args:
        policies: of t = 0..T-1.
        network: the layers.
        controls: u_t, each (R, o, ī); overwritten.
        trajectory: the nominal x_t.
        rates: of t = 0..T-1.
        units: of the value.
        update: what M⁻¹ d_t does to u_t.
    """
    x_hat = trajectory.inputs[0]
    last = len(controls) - 1
    for t, (policy, u, stage) in enumerate(zip(policies, controls, network.stages, strict=True)):
        affine, inputs = stage.affine, trajectory.inputs[t]
        V_h = policy.V_h
        if t == 0:
            gradient = affine.gradient(V_h, inputs, u)
        else:
            dx = affine.difference(x_hat, inputs)
            gradient = affine.gradient(policy.closed_loop(dx), inputs, u)
            if policy.second_order:
                gradient = gradient + affine.tangent_gradient(V_h, dx, u)
        update(t, u, direction(gradient, u, units, rates[t].decay))
        if t < last:
            h = affine.forward(x_hat, u)
            x_hat = network.stages[t + 1].affine.prepare(again(stage, h, trajectory.tapes[t]))
