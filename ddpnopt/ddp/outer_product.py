"""V_xx as an outer product z zᵀ per sample (Prop. 3): the cost of a second gradient.

A rank-one terminal Hessian stays rank one through the recursion:

    z_h = σ' ⊙ z,  q_x = Wᵀ z_h,  c = z_hᵀ S z_h,  V_x = Q_x - q_x (z_hᵀ S V_h),  z ← sqrt(1 - c) q_x

with 1 - c clamped at zero ("clamp"), or, with Q_uu's own Gauss-Newton term kept ("psd"), the second
term of V_x divided by 1 + c and z ← q_x / sqrt(1 + c).

ε cannot be added to an outer product. The layer that receives this V_xx uses it in its feedback,
V_hh = z_h z_hᵀ + ε diag(σ'²), and ε enters neither c nor the next z: an approximation, equal to the full
form at ε = 0.

Index legend: r run in the pack, b sample, i inputs, o outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpnopt.config import Safeguard
from ddpnopt.ddp.backward import Layer
from ddpnopt.layers import linear


@dataclass(frozen=True, slots=True)
class OuterProductValue:
    """V_x (R, B, n) and z (R, B, n), with V_xx = z zᵀ."""

    V_x: Tensor
    z: Tensor


@dataclass(frozen=True, slots=True)
class OuterProductActionValue:
    """The factors of Q's derivatives at one layer.

    Attributes:
        V_h: (R, B, o).
        z_h: σ' ⊙ z, (R, B, o): Q_ux = x̄ ⊗ z_h q_xᵀ.
        Q_x: Wᵀ V_h, (R, B, i).
        q_x: Wᵀ z_h, (R, B, i): Q_xx = q_x q_xᵀ.
    """

    V_h: Tensor
    z_h: Tensor
    Q_x: Tensor
    q_x: Tensor


@dataclass(frozen=True, slots=True)
class OuterProductGains:
    """The policy of one layer, V_hh W = z_h q_xᵀ + ε diag(σ'²) W.

    Attributes:
        V_h: (R, B, o).
        z_h: (R, B, o).
        q_x: (R, B, i).
        u: (R, o, ī), before its update.
        damping: ε σ'², broadcastable to (R, B, o); None where the incoming V_xx bears no ε.
    """

    V_h: Tensor
    z_h: Tensor
    q_x: Tensor
    u: Tensor
    damping: Tensor | None

    def feedback(self, dx: Tensor) -> Tensor:
        """See `ddpnopt.ddp.backward.Policy`."""
        response = self.z_h * (self.q_x * dx).sum(dim=-1, keepdim=True)
        if self.damping is not None:
            response = response + self.damping * linear.push_forward(dx, self.u)
        return response


def action_value(layer: Layer, after: OuterProductValue) -> OuterProductActionValue:
    """Pull V_x and z back through σ and the affine map, both in one product."""
    z_h = after.z if layer.slope is None else layer.slope * after.z
    Q_x, q_x = linear.pull_back(torch.cat((layer.V_h, z_h), dim=1), layer.u).chunk(2, dim=1)
    return OuterProductActionValue(layer.V_h, z_h, Q_x, q_x)


def gains(layer: Layer, Q: OuterProductActionValue, vxx_reg: Tensor) -> OuterProductGains:
    """Keep the factors of the policy; ε acts only where it was added to the incoming V_xx."""
    damping = None
    if not layer.last:
        damping = vxx_reg if layer.slope is None else vxx_reg * layer.slope * layer.slope
    return OuterProductGains(Q.V_h, Q.z_h, Q.q_x, layer.u, damping)


def value(layer: Layer, Q: OuterProductActionValue, safeguard: Safeguard) -> OuterProductValue:
    """Return V_x and z before the layer (Prop. 3)."""
    weighted = layer.step * Q.z_h
    c = (weighted * Q.z_h).sum(dim=-1, keepdim=True)
    overlap = (weighted * Q.V_h).sum(dim=-1, keepdim=True)
    if safeguard == "psd":
        return OuterProductValue(Q.Q_x - Q.q_x * (overlap / (1 + c)), Q.q_x * torch.rsqrt(1 + c))
    return OuterProductValue(Q.Q_x - Q.q_x * overlap, Q.q_x * (1 - c).clamp_min(0).sqrt())


@dataclass(frozen=True, slots=True)
class OuterProductForm:
    """V_xx as z zᵀ.

    Attributes:
        vxx_reg: ε, (R, 1, 1).
        safeguard: how the value step treats Q_uu.
    """

    vxx_reg: Tensor
    safeguard: Safeguard

    def policy_and_value(
        self, layer: Layer, after: OuterProductValue
    ) -> tuple[OuterProductGains, OuterProductValue]:
        """See `ddpnopt.ddp.backward.ValueForm`."""
        Q = action_value(layer, after)
        return gains(layer, Q, self.vxx_reg), value(layer, Q, self.safeguard)
