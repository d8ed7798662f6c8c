"""V_xx as an outer product z zᵀ per sample (Prop. 3): the cost of a second gradient.

A rank-one terminal Hessian stays rank one through the recursion. With z_h = σ_hᵀ z, q_x = g_xᵀ z_h and
q_u = g_uᵀ z_h,

    c = q_uᵀ Q_uu⁻¹ q_u = z_hᵀ S z_h,   V_x = Q_x - q_x (q_uᵀ Q_uu⁻¹ Q_u),   z ← sqrt(1 - c) q_x    (Eq. 17)

with 1 - c clamped at zero ("clamp"), or, with Q_uu's own Gauss-Newton term kept ("psd"), the second
term of V_x divided by 1 + c and z ← q_x / sqrt(1 + c).

The factors sqrt(1 - c) are scalars: they are kept apart, as the weight w of V_xx = w ẑ ẑᵀ, and the direction
ẑ goes back through the layers like a gradient.

ε cannot be added to an outer product. The layer that receives this V_xx uses it in its feedback,
V_hh = z_h z_hᵀ + ε σ_hᵀ σ_h, and ε enters neither c nor the next z: an approximation, equal to the full
form at ε = 0.

Index legend: r run in the pack, b sample, k row (V, then ẑ), i inputs, o outputs.
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


@dataclass(slots=True)
class OuterProductValue:
    """V_x and ẑ, with V_xx = w ẑ ẑᵀ, as two rows that go through every layer in one product.

    Attributes:
        rows: (R, B, 2, *shape); in memory best V_x of all samples, then ẑ of all: what acts on each sample
            alike, as a slope does, then runs over long vectors.
        weight: w, broadcastable to (R, B, 1).
    """

    rows: Tensor
    weight: Tensor

    @classmethod
    def of_gradient(cls, V_x: Tensor, weight: Tensor) -> OuterProductValue:
        """Return the value whose ẑ is V_x (R, B, *shape) itself, as at T."""
        return cls(torch.stack((V_x, V_x), dim=1).transpose(1, 2), weight)

    @property
    def V_x(self) -> Tensor:
        """Gradient, (R, B, *shape)."""
        return self.rows.select(2, 0)

    @property
    def z(self) -> Tensor:
        """Root of V_xx, (R, B, *shape)."""
        direction = self.rows.select(2, 1)
        return direction * _beside(self.weight.sqrt(), direction)


@dataclass(slots=True)
class OuterProductGains:
    """The policy of one layer, A = w ẑ_h q̂_xᵀ + ε σ_hᵀ σ_h g_x.

    Attributes:
        V_h: (R, B, *outputs).
        z_h: ẑ_h, (R, B, *outputs).
        weight: w.
        layer: where the policy acts; its u is that before the update.
        vxx_reg: ε, (R, 1, 1); None where the incoming V_xx bears none.
        second_order: see `Policy`.
    """

    V_h: Tensor
    z_h: Tensor
    weight: Tensor
    layer: Layer
    vxx_reg: Tensor | None
    second_order: bool = False

    @property
    def q_x(self) -> Tensor:
        """Return q̂_x = g_xᵀ ẑ_h, (R, B, *inputs)."""
        return self.layer.pull_back(self.z_h.unsqueeze(2)).squeeze(2)

    def feedback(self, dx: Tensor) -> Tensor:
        """See `ddpnopt.ddp.backward.Policy`."""
        return self._add_feedback(torch.zeros_like(self.V_h), dx)

    def closed_loop(self, dx: Tensor) -> Tensor:
        """See `ddpnopt.ddp.backward.Policy`."""
        return self._add_feedback(self.V_h, dx)

    def _add_feedback(self, base: Tensor, dx: Tensor) -> Tensor:
        # q_xᵀ δx as z_hᵀ (g_x δx): q_x of every layer need not be kept until the second forward pass.
        layer = self.layer
        dh = layer.affine.push_forward(dx, layer.inputs, layer.u)
        overlap = _dot(self.z_h, dh) * self.weight
        response = torch.addcmul(base, self.z_h, _beside(overlap, self.z_h))
        if self.vxx_reg is None:
            return response
        moved = push_forward(layer.jacobians, dh)
        damping = pull_back(layer.jacobians, moved.unsqueeze(2)).squeeze(2)
        return response.addcmul_(damping, _beside(self.vxx_reg, damping))

    def factors(self) -> tuple[Tensor, ...]:
        """See `ddpnopt.ddp.backward.Policy`."""
        return (self.z_h, self.weight)


@dataclass(frozen=True, slots=True)
class OuterProductForm:
    """V_xx as w ẑ ẑᵀ.

    Attributes:
        safeguard: how the value step treats Q_uu.
    """

    safeguard: Safeguard

    def through_sigma(self, jacobians: Sequence[Jacobian], after: OuterProductValue) -> OuterProductValue:
        """See `ddpnopt.ddp.backward.ValueForm`."""
        return OuterProductValue(pull_back(jacobians, after.rows), after.weight)

    def policy_and_value(
        self, layer: Layer, after: OuterProductValue
    ) -> tuple[OuterProductGains, OuterProductValue]:
        """See `ddpnopt.ddp.backward.ValueForm`."""
        V_h, z_h = after.rows.unbind(dim=2)
        rows = layer.pull_back(after.rows)
        policy = OuterProductGains(V_h, z_h, after.weight, layer, layer.incoming_reg)
        return policy, value(layer, after, rows, self.safeguard)


def value(layer: Layer, after: OuterProductValue, rows: Tensor, safeguard: Safeguard) -> OuterProductValue:
    """Return V_x and z before the layer (Prop. 3).

    Args:
        layer: the layer.
        after: V_h, ẑ_h and w.
        rows: Q_x and q̂_x, (R, B, 2, *inputs); Q_x becomes V_x in its place.
        safeguard: how Q_uu is treated.
    """
    c, overlap = layer.contraction().forms(after.rows)
    a = layer.decay_response()
    if a is not None:
        overlap = overlap + _dot(after.rows.select(2, 1), a)
    w = after.weight
    c = c * w
    if safeguard == "psd":
        weight = w / (1 + c)
        shrink = overlap * weight
    else:
        # w (1 - c): beyond 1 - c = 0 the outer product ends.
        weight = torch.addcmul(w, w, c, value=-1).clamp_min_(0)
        shrink = overlap * w
    Q_x, q_x = rows.unbind(dim=2)
    Q_x.addcmul_(q_x, _beside(shrink, q_x), value=-1)
    return OuterProductValue(rows, weight)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Multiply and add up each sample's entries: (R, B, *shape) twice to (R, B, 1)."""
    return (left * right).flatten(2).sum(-1, True)


def _beside(scalars: Tensor, like: Tensor) -> Tensor:
    """Reshape scalars (R, B, 1) so that they multiply (R, B, *shape)."""
    extra = like.dim() - scalars.dim()
    return scalars.reshape(*scalars.shape, *(1,) * extra) if extra else scalars
