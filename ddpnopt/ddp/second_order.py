"""DDPNOpt2nd: the layer dynamics expanded to second order (Eq. 26-27).

Against `backward`, V_hh gains V_x'·σ_hh in every map of σ, and Q_ux gains E = V_h · g_ux (g is bilinear in x
and u, so g_xx and g_uu vanish):

    Q_ux = g_uᵀ A + E,   E[(o, j), i] = V_h[o] δ_ij for a fully connected layer

With C = g_u Q_uu⁻¹ E, N = Eᵀ Q_uu⁻¹ E, R = S A + C and r = S V_h + a, the value step reads

    V_x  = Q_x - Aᵀ r - Cᵀ V_h - Eᵀ Q_uu⁻¹ λu·w
    V_xx = Q_xx - Aᵀ R - Cᵀ A - N

The psd safeguard keeps Q_uu's Gauss-Newton term here too: by Woodbury, with D = V_hh (I + S V_hh)⁻¹, V_x
gains Rᵀ D r and V_xx gains Rᵀ D R. V_hh itself may be indefinite now, so V_xx may be.

Index legend: r run in the pack, b sample, i inputs, o outputs, both flattened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ddpnopt import linalg
from ddpnopt.config import Safeguard
from ddpnopt.ddp.backward import ActionValue, FullValue, Gains, Layer, action_value
from ddpnopt.layers.base import Jacobian


@dataclass(frozen=True, slots=True)
class SecondOrderForm:
    """V_xx as a dense matrix per sample, by dynamics of second order.

    Attributes:
        safeguard: how the value step treats Q_uu.
    """

    safeguard: Safeguard

    def through_sigma(self, jacobians: Sequence[Jacobian], after: FullValue) -> FullValue:
        """See `ValueForm`: V_hh = σ_hᵀ V_xx σ_h + V_x · σ_hh, map by map."""
        V_x, V_xx = after.V_x, after.V_xx
        for jacobian in reversed(jacobians):
            bend = jacobian.second_derivative(V_x)
            V_xx = jacobian.congruence(V_xx)
            if bend is not None:
                V_xx.diagonal(dim1=-2, dim2=-1).add_(bend.flatten(2))
            V_x = jacobian.pull_back(V_x.unsqueeze(2)).squeeze(2)
        return FullValue(V_x, V_xx)

    def policy_and_value(self, layer: Layer, after: FullValue) -> tuple[Gains, FullValue]:
        """See `ValueForm`."""
        Q = action_value(layer, after)
        return Gains(Q.V_h, Q.A, second_order=True), value(layer, Q, self.safeguard)


def value(layer: Layer, Q: ActionValue, safeguard: Safeguard) -> FullValue:
    """Return V_x and V_xx + εI before the layer."""
    matmul, matvec = linalg.per_sample_matmul, linalg.per_sample_matvec
    S = layer.contraction()
    C, N = layer.affine.mixed_terms(Q.V_h, layer.inputs, layer.u, layer.inverse, layer.rate)
    V_h = Q.V_h.flatten(2)
    R = S.apply(Q.A) + C
    r = S.apply(V_h.unsqueeze(-1)).squeeze(-1)
    V_x = layer.pull_back(Q.V_h.unsqueeze(2)).flatten(2)
    if layer.decay_step is not None:
        a = layer.affine.push_controls(layer.inputs, layer.u, layer.decay_step)
        r = r + a.flatten(2)
        E_decay = layer.affine.pull_back(Q.V_h.unsqueeze(2), layer.inputs, layer.decay_step)
        V_x = V_x - E_decay.flatten(2)
    V_x = V_x - matvec(Q.A.mT, r) - matvec(C.mT, V_h)
    rows = Q.A.mT.reshape(*Q.A.mT.shape[:3], *Q.V_h.shape[2:])
    V_xx = layer.pull_back(rows).flatten(3) - matmul(Q.A.mT, R) - matmul(C.mT, Q.A) - N
    if safeguard == "psd":
        D = _damped(Q.V_hh, S.apply(Q.V_hh))
        V_x = V_x + matvec(R.mT, matvec(D, r))
        V_xx = V_xx + matmul(R.mT, matmul(D, R))
    V_xx.diagonal(dim1=-2, dim2=-1).add_(layer.vxx_reg)
    return FullValue(V_x.unflatten(2, layer.affine.shape(layer.inputs)), V_xx)


def _damped(V_hh: Tensor, S_V_hh: Tensor) -> Tensor:
    """Return D = V_hh (I + S V_hh)⁻¹ = ((I + V_hh S)⁻¹ V_hh), (R, B, o, o)."""
    return linalg.solve(linalg.eye_like(V_hh) + S_V_hh.mT, V_hh)
