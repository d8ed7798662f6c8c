"""The backward pass of DDPNOpt (Alg. 3, lines 4-13): Bellman's recursion from the loss to the input.

Three named steps per layer, as in the paper:

    action_value   Q_u, Q_x, Q_xx, Q_ux of Q(x, u) = ℓ(u) + V'(f(x, u))                       (Eq. 6)
    gains          k = -Q_uu⁻¹ Q_u and K = -Q_uu⁻¹ Q_ux, with Q_uu⁻¹ = η M⁻¹                  (Eq. 7)
    value          V_x = Q_x - Q_uxᵀ Q_uu⁻¹ Q_u,  V_xx = Q_xx - Q_uxᵀ Q_uu⁻¹ Q_ux (+ εI)      (Eq. 8)

f(x, u) = σ(u x̄) is linearised (first order; ℓ_xx, f_xx and f_ux dropped). Then, per sample,

    Q_u = V_h x̄ᵀ,  Q_x = Wᵀ V_h,  Q_ux = x̄ ⊗ A,  Q_xx = Wᵀ A,   A = V_hh W                   (Eq. 12-13)

so that a layer's gains are two small factors: V_h (o) and A (o × i), never (parameters × states).
Contracting x̄ ⊗ x̄ with Q_uu⁻¹ leaves a diagonal S = diag(s) over output units, and the value step is

    V_x = Xᵀ V_h,  V_xx = Xᵀ A     with X = W - S A                     ("clamp", the paper's recursion)

The paper takes Q_uu = M/η, which drops Q_uu's own Gauss-Newton term x̄x̄ᵀ ⊗ V_hh; for S V_hh > 1 the
recursion then goes indefinite. Keeping that term in the value step ("psd") gives X = (I + S V_hh)⁻¹ W by
Woodbury, and V_xx stays positive semi-definite for any step size.

Index legend: t layer, r run in the pack, b sample, i inputs, ī inputs and the constant one, o outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ddpnopt import linalg
from ddpnopt.config import Safeguard
from ddpnopt.layers import linear
from ddpnopt.layers.network import Controls, Trajectory
from ddpnopt.preconditioners import Preconditioner


class Policy(Protocol):
    """The affine policy of one layer, δu(δx) = k + K δx, kept as the factors of its gains."""

    @property
    def V_h(self) -> Tensor:
        """Open-loop factor (R, B, o): k = -η M⁻¹ Σ_b V_h x̄ᵀ."""
        ...

    def feedback(self, dx: Tensor) -> Tensor:
        """Return V_hh W δx, (R, B, i) to (R, B, o): K δx = -η M⁻¹ Σ_b (V_hh W δx) x̄ᵀ."""
        ...


class Value(Protocol):
    """The value function's derivatives before a layer, in some form."""

    @property
    def V_x(self) -> Tensor:
        """Gradient per sample, (R, B, n)."""
        ...


V = TypeVar("V", bound=Value)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer on the nominal trajectory, as the three steps see it.

    Attributes:
        u: (R, o, ī).
        slope: σ'(h), (R, B, o); None where it is one.
        V_h: σ' ⊙ V_x', (R, B, o).
        step: s, η times the contraction of x̄ ⊙ x̄ with M⁻¹, broadcastable to (R, B, o).
        last: whether this is t = T-1, whose incoming V_xx bears no ε.
    """

    u: Tensor
    slope: Tensor | None
    V_h: Tensor
    step: Tensor
    last: bool


class ValueForm(Protocol[V]):
    """A way to hold V_xx: `FullForm` here, `OuterProductForm` in `outer_product`."""

    def policy_and_value(self, layer: Layer, after: V) -> tuple[Policy, V]:
        """Do the three steps at one layer: from the value after it to its policy and the value before it."""
        ...


@dataclass(frozen=True, slots=True)
class FullValue:
    """V_x (R, B, n) and V_xx (R, B, n, n) before a layer."""

    V_x: Tensor
    V_xx: Tensor


@dataclass(frozen=True, slots=True)
class ActionValue:
    """The factors of Q's derivatives at one layer.

    Attributes:
        V_h: (R, B, o): Q_u = V_h x̄ᵀ and Q_x = Wᵀ V_h.
        V_hh: σ'σ'ᵀ ⊙ V_xx', (R, B, o, o).
        A: V_hh W, (R, B, o, i): Q_ux = x̄ ⊗ A and Q_xx = Wᵀ A.
    """

    V_h: Tensor
    V_hh: Tensor
    A: Tensor


@dataclass(frozen=True, slots=True)
class Gains:
    """The policy of one layer and the closed loop that it makes.

    Attributes:
        V_h: (R, B, o), factor of the open-loop gain k.
        A: (R, B, o, i), factor of the feedback gain K.
        X: (R, B, o, i), how δx passes the layer under the policy; the open loop is W.
    """

    V_h: Tensor
    A: Tensor
    X: Tensor

    def feedback(self, dx: Tensor) -> Tensor:
        """See `Policy.feedback`."""
        return linalg.per_sample_matvec(self.A, dx)


def action_value(layer: Layer, after: FullValue) -> ActionValue:
    """Pull V back through σ and the affine map (Eq. 12-13)."""
    V_hh = after.V_xx
    if layer.slope is not None:
        V_hh = layer.slope.unsqueeze(-1) * V_hh * layer.slope.unsqueeze(-2)
    return ActionValue(layer.V_h, V_hh, linear.jacobian_product(V_hh, layer.u))


def gains(layer: Layer, Q: ActionValue, safeguard: Safeguard) -> Gains:
    """Solve for the policy (Eq. 7) and close the loop with it."""
    W = linear.weight(layer.u).unsqueeze(1)
    if safeguard == "psd":
        X = linalg.damped_solve(Q.V_hh, layer.step, W)
    else:
        X = W - layer.step.unsqueeze(-1) * Q.A
    return Gains(Q.V_h, Q.A, X)


def value(policy: Gains, vxx_reg: Tensor) -> FullValue:
    """Return V_x and V_xx + εI before the layer (Eq. 8; Alg. 3, line 12).

    Args:
        policy: the layer's gains.
        vxx_reg: ε, (R, 1, 1).
    """
    V_x = linalg.per_sample_matvec(policy.X.mT, policy.V_h)
    V_xx = linalg.per_sample_matmul(policy.X.mT, policy.A)
    V_xx.diagonal(dim1=-2, dim2=-1).add_(vxx_reg)
    return FullValue(V_x, V_xx)


@dataclass(frozen=True, slots=True)
class FullForm:
    """V_xx as a dense matrix per sample.

    Attributes:
        vxx_reg: ε, (R, 1, 1).
        safeguard: how the value step treats Q_uu.
    """

    vxx_reg: Tensor
    safeguard: Safeguard

    def policy_and_value(self, layer: Layer, after: FullValue) -> tuple[Gains, FullValue]:
        """See `ValueForm`."""
        Q = action_value(layer, after)
        policy = gains(layer, Q, self.safeguard)
        return policy, value(policy, self.vxx_reg)


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """A policy without feedback: the first layer's, since δx_0 = 0, and every layer's if Q_ux is dropped."""

    V_h: Tensor

    def feedback(self, dx: Tensor) -> Tensor:
        """Return zero, (R, B, o)."""
        return torch.zeros_like(self.V_h)


@dataclass(frozen=True, slots=True)
class Gradient:
    """A value of which only the gradient is known."""

    V_x: Tensor


class OpenLoopForm:
    """Q_ux dropped: the recursion is backpropagation, the policy the baseline's step (Prop. 2)."""

    def policy_and_value(self, layer: Layer, after: Gradient) -> tuple[OpenLoop, Gradient]:
        """See `ValueForm`."""
        return OpenLoop(layer.V_h), Gradient(linear.pull_back(layer.V_h, layer.u))


def backward_pass(
    form: ValueForm[V],
    terminal: V,
    controls: Controls,
    trajectory: Trajectory,
    preconditioner: Preconditioner,
    learning_rate: Tensor,
) -> Sequence[Policy]:
    """Sweep from the last layer to the first and return the policy of each, t = 0..T-1.

    Args:
        form: how V_xx is held.
        terminal: the value at T.
        controls: u_t, each (R, n_{t+1}, n_t + 1), as they were in the forward pass.
        trajectory: that forward pass.
        preconditioner: M_t.
        learning_rate: η, (R, 1, 1).
    """
    policies: list[Policy] = []
    after = terminal
    last = len(controls) - 1
    for t in range(last, -1, -1):
        x_bar, slope = trajectory.x_bar[t], trajectory.slopes[t]
        V_h = after.V_x if slope is None else slope * after.V_x
        preconditioner.observe(t, V_h, x_bar)
        if t == 0:
            policies.append(OpenLoop(V_h))
            break
        step = learning_rate * preconditioner.contraction(t, x_bar)
        policy, after = form.policy_and_value(Layer(controls[t], slope, V_h, step, t == last), after)
        policies.append(policy)
    return policies[::-1]
