"""SGD with the regulariser of Pascanu, Mikolov, Bengio (2013) against vanishing gradients.

With p_t = ∂J/∂x_t, the adjoint, and q = g_xᵀ σ_hᵀ p_{t+1} = p_t, the gradient gains α ∂⁺Ω/∂W of

    Ω = Σ_t (1/B) Σ_b (|q| / |p_{t+1}| - 1)²,   t = 1..T-1

which asks every layer to hand on a gradient as long as the one it is handed. ∂⁺ is that paper's "immediate"
derivative: p_{t+1} and σ_h are taken as constants, so that only g_x of the layer itself counts. With V_h =
σ_hᵀ p_{t+1} it is Σ_b (V_h · g_ux) c for

    c = ∂Ω/∂q = (2/B) (|q| / |p_{t+1}| - 1) q / (|q| |p_{t+1}|)

A sample whose p_{t+1} or q vanishes adds nothing. The sum starts at t = 1, the first layer whose input is a
state that the net makes: nothing is learnt from the gradient of the data, which p_0 would be. The read-out,
t = T-1, is in it. α is `options.vgr`; at α = 0 this is SGD, bit for bit.

Index legend: t layer, r run in the pack, b sample, o outputs, ī inputs and the constant one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ddpnopt.errors import ConfigError
from ddpnopt.layers.base import Affine
from ddpnopt.layers.network import Controls, Trajectory, linearise, pull_back
from ddpnopt.optimizers.base import Members, Quantity, Trace
from ddpnopt.optimizers.momentum import DescentOptimizer
from ddpnopt.preconditioners import LayerBatch, Units


class SGDVGR(DescentOptimizer):
    """SGD with momentum, weight decay and the vanishing-gradient regulariser over a group of runs."""

    def __init__(self, members: Members) -> None:
        if not all(stage.affine.dense for stage in members.network.stages):
            raise ConfigError("model", "a generic layer", "Linear and Conv2d: the regulariser takes g_ux")
        super().__init__(members, "identity")

    def step(self, controls: Controls, trajectory: Trajectory, targets: Tensor) -> Trace:
        """See `Optimizer.step`."""
        members, batch = self.members, targets.shape[1]
        units, vgr = Units.of("batch_mean", batch), members.config.options.vgr
        p = members.loss.gradient(trajectory.output, targets) / batch
        found: list[Quantity] = []
        for t in range(len(controls) - 1, -1, -1):
            stage, inputs, u = members.network.stages[t], trajectory.inputs[t], controls[t]
            V_h = pull_back(linearise(stage, trajectory.tapes[t]), p.unsqueeze(2)).squeeze(2)
            observed = LayerBatch(stage.affine, inputs, u, V_h, units, members.rates[t].decay)
            gradient = observed.mean_gradient()
            found.append(Quantity(t, "J_u", gradient))
            if t > 0:
                q = stage.affine.pull_back(V_h.unsqueeze(2), inputs, u).squeeze(2)
                if vgr:
                    found.append(Quantity(t, "Ω_u", immediate_gradient(stage.affine, V_h, p, q, u)))
                    gradient = gradient + vgr * found[-1].values
                p = q
            self.descent.update(t, u, gradient, members.rates[t])

        def trace() -> Iterator[Quantity]:
            return iter([*found, *(Quantity(t, "u", u) for t, u in enumerate(controls))])

        return trace


def immediate_gradient(affine: Affine, V_h: Tensor, p: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """Return ∂⁺Ω_t/∂u of one layer; it does not depend on the unit of p.

    Args:
        affine: g_t.
        V_h: σ_hᵀ p, (R, B, *outputs).
        p: p_{t+1}, (R, B, *shape after σ).
        q: g_xᵀ V_h, (R, B, *shape).
        u: (R, o, ī).

    Returns:
        (R, o, ī), zero in the bias.
    """
    p_norm, q_norm = _norm(p), _norm(q)
    there = (p_norm > 0) & (q_norm > 0)
    p_norm, q_norm = torch.where(there, p_norm, 1), torch.where(there, q_norm, 1)
    factor = torch.where(there, (q_norm / p_norm - 1) * (2 / q.shape[1]), 0)
    c = _per_sample(factor / q_norm, q)
    return affine.tangent_gradient(_per_sample(1 / p_norm, V_h), c, u)


def _norm(v: Tensor) -> Tensor:
    """Return |v| of each sample, (R, B, …) to (R, B); exact also where its square would underflow."""
    flat = v.flatten(2)
    largest = flat.abs().amax(dim=-1, keepdim=True)
    scaled = flat / torch.where(largest > 0, largest, 1)
    return (largest * (scaled * scaled).sum(dim=-1, keepdim=True).sqrt()).squeeze(-1)


def _per_sample(factor: Tensor, v: Tensor) -> Tensor:
    """Scale every sample: (R, B) by (R, B, …)."""
    return factor.reshape(*factor.shape, *(1,) * (v.dim() - 2)) * v
