"""V_xx as an outer product z zᵀ per sample (Prop. 3): the cost of a second gradient.

A rank-one terminal Hessian stays rank one through the recursion. With z_h = σ_hᵀ z, q_x = g_xᵀ z_h and
q_u = g_uᵀ z_h,

    c = q_uᵀ Q_uu⁻¹ q_u = z_hᵀ S z_h,   V_x = Q_x - q_x (q_uᵀ Q_uu⁻¹ Q_u),   z ← sqrt(1 - c) q_x      (Eq. 17)

with 1 - c clamped at zero ("clamp"), or, with Q_uu's own Gauss-Newton term kept ("psd"), the second
term of V_x divided by 1 + c and z ← q_x / sqrt(1 + c).

ε cannot be added to an outer product. The layer that receives this V_xx uses it in its feedback,
V_hh = z_h z_hᵀ + ε σ_hᵀ σ_h, and ε enters neither c nor the next z: an approximation, equal to the full
form at ε = 0.

Index legend: r run in the pack, b sample, k row (V, then z), i inputs, o outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpnopt.config import Safeguard
from ddpnopt.ddp.backward import Layer
from ddpnopt.layers.base import Jacobian
from ddpnopt.layers.network import pull_back, push_forward


@dataclass(frozen=True, slots=True)
class OuterProductValue:
    """V_x and z, with V_xx = z zᵀ, as two rows that go through every layer in one product.

    Attributes:
        rows: (R, B, 2, *shape).
    """

    rows: Tensor

    @property
    def V_x(self) -> Tensor:
        """Gradient, (R, B, *shape)."""
        return self.rows[:, :, 0]

    @property
    def z(self) -> Tensor:
        """Root of V_xx, (R, B, *shape)."""
        return self.rows[:, :, 1]


@dataclass(frozen=True, slots=True)
class OuterProductGains:
    """The policy of one layer, A = z_h q_xᵀ + ε σ_hᵀ σ_h g_x.

    Attributes:
        V_h: (R, B, *outputs).
        z_h: (R, B, *outputs).
        q_x: (R, B, *inputs).
        layer: where the policy acts; its u is that before the update.
        vxx_reg: ε, (R, 1, 1); None where the incoming V_xx bears none.
        second_order: see `Policy`.
    """

    V_h: Tensor
    z_h: Tensor
    q_x: Tensor
    layer: Layer
    vxx_reg: Tensor | None
    second_order: bool = False

    def feedback(self, dx: Tensor) -> Tensor:
        """See `ddpnopt.ddp.backward.Policy`."""
        overlap = (self.q_x * dx).flatten(2).sum(dim=-1)
        response = self.z_h * _beside(overlap, self.z_h)
        if self.vxx_reg is None:
            return response
        layer = self.layer
        moved = push_forward(layer.jacobians, layer.affine.push_forward(dx, layer.inputs, layer.u))
        damping = pull_back(layer.jacobians, moved.unsqueeze(2)).squeeze(2)
        return torch.addcmul(response, damping, _beside(self.vxx_reg.squeeze(-1), damping))

    def factors(self) -> tuple[Tensor, ...]:
        """See `ddpnopt.ddp.backward.Policy`."""
        return (self.z_h, self.q_x)


@dataclass(frozen=True, slots=True)
class OuterProductForm:
    """V_xx as z zᵀ.

    Attributes:
        safeguard: how the value step treats Q_uu.
    """

    safeguard: Safeguard

    def through_sigma(self, jacobians: Sequence[Jacobian], after: OuterProductValue) -> OuterProductValue:
        """See `ddpnopt.ddp.backward.ValueForm`."""
        return OuterProductValue(pull_back(jacobians, after.rows))

    def policy_and_value(
        self, layer: Layer, after: OuterProductValue
    ) -> tuple[OuterProductGains, OuterProductValue]:
        """See `ddpnopt.ddp.backward.ValueForm`."""
        before = OuterProductValue(layer.pull_back(after.rows))  # Q_x and q_x
        policy = OuterProductGains(after.V_x, after.z, before.z, layer, layer.incoming_reg)
        return policy, value(layer, after, before, self.safeguard)


def value(
    layer: Layer, after: OuterProductValue, Q: OuterProductValue, safeguard: Safeguard
) -> OuterProductValue:
    """Return V_x and z before the layer (Prop. 3).

    Args:
        layer: the layer.
        after: V_h and z_h.
        Q: Q_x and q_x.
        safeguard: how Q_uu is treated.
    """
    c, overlap = layer.contraction().forms(after.V_x, after.z)
    a = layer.decay_response()
    if a is not None:
        overlap = overlap + (after.z * a).flatten(2).sum(dim=-1, keepdim=True)
    if safeguard == "psd":
        overlap, factor = overlap / (1 + c), torch.rsqrt(1 + c)
    else:
        factor = (1 - c).clamp_min(0).sqrt()
    Q_x, q_x = Q.V_x, Q.z
    V_x = torch.addcmul(Q_x, q_x, _beside(overlap.squeeze(-1), q_x), value=-1)
    return OuterProductValue(torch.stack((V_x, q_x * _beside(factor.squeeze(-1), q_x)), dim=2))


def _beside(scalars: Tensor, like: Tensor) -> Tensor:
    """Reshape (R, B) or (R, 1) scalars so that they multiply (R, B, *shape)."""
    return scalars.reshape(*scalars.shape, *(1,) * (like.dim() - 2))
