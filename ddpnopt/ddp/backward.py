"""The backward pass of DDPNOpt (Alg. 3, lines 4-13): Bellman's recursion from the loss to the input.

Three named steps per layer, as in the paper:

    action_value   Q_u, Q_x, Q_xx, Q_ux of Q(x, u) = ℓ(u) + V'(f(x, u))                       (Eq. 3)
    gains          k = -Q_uu⁻¹ Q_u and K = -Q_uu⁻¹ Q_ux, with Q_uu⁻¹ = η M⁻¹                  (Eq. 4)
    value          V_x = Q_x - Q_uxᵀ Q_uu⁻¹ Q_u,  V_xx = Q_xx - Q_uxᵀ Q_uu⁻¹ Q_ux (+ εI)      (Eq. 5)

f(x, u) = σ(g(x, u)) is linearised (first order; ℓ_xx, f_xx and f_ux dropped; `second_order` keeps them).
Then, per sample, with h = g(x, u),

    Q_u = g_uᵀ V_h + λu,  Q_x = g_xᵀ V_h,  Q_ux = g_uᵀ A,  Q_xx = g_xᵀ A,   A = V_hh g_x      (Eq. 12-14)

so that a layer's gains are two small factors, V_h (o) and A (o × i), never (parameters × states): for a fully
connected layer g_x is W and g_uᵀ v is v x̄ᵀ. Contracting with Q_uu⁻¹ leaves S = g_u Q_uu⁻¹ g_uᵀ over output
units, and the value step is

    V_x = Xᵀ V_h,  V_xx = Xᵀ A     with X = g_x - S A                   ("clamp", the paper's recursion)

The paper takes Q_uu = M/η, which drops Q_uu's own Gauss-Newton term g_uᵀ V_hh g_u; for S V_hh > 1 the
recursion then goes indefinite. Keeping that term in the value step ("psd") gives X = (I + S V_hh)⁻¹ g_x by
Woodbury, and V_xx stays positive semi-definite for any step size.

Weight decay, ℓ = λ/2 |u|², adds λu to Q_u, its share λu·w of every sample (w = 1/B where Σ̄ sums over the
batch), and so -Aᵀ a to V_x, with a = g_u Q_uu⁻¹ λu·w.

Index legend: t layer, r run in the pack, b sample, i inputs, o outputs, both flattened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ddpnopt import linalg
from ddpnopt.config import Safeguard
from ddpnopt.layers.base import Affine, Contraction, Jacobian
from ddpnopt.layers.network import Controls, Network, Trajectory, linearise, pull_back
from ddpnopt.linalg import FactoredInverse
from ddpnopt.preconditioners import LayerBatch, Preconditioner, Units
from ddpnopt.rates import Rates


class Policy(Protocol):
    """The affine policy of one layer, δu(δx) = k + K δx, kept as the factors of its gains."""

    @property
    def V_h(self) -> Tensor:
        """Open-loop factor (R, B, *outputs): k = -η M⁻¹ Σ̄_b g_uᵀ V_h."""
        ...

    @property
    def second_order(self) -> bool:
        """Whether K holds V_h · g_ux (Eq. 27) besides g_uᵀ A."""
        ...

    def feedback(self, dx: Tensor) -> Tensor:
        """Return A δx, (R, B, *inputs) to (R, B, *outputs): K δx = -η M⁻¹ Σ̄_b g_uᵀ (A δx)."""
        ...

    def closed_loop(self, dx: Tensor) -> Tensor:
        """Return V_h + A δx, (R, B, *outputs)."""
        ...

    def factors(self) -> tuple[Tensor, ...]:
        """Return the tensors that the gains are made of, each (R, B, …)."""
        ...


class Value(Protocol):
    """The value function's derivatives before or after a layer, in some form."""

    @property
    def V_x(self) -> Tensor:
        """Gradient per sample, (R, B, *shape)."""
        ...


V = TypeVar("V", bound=Value)


@dataclass(slots=True)
class Layer:
    """One layer on the nominal trajectory, as the three steps see it.

    Attributes:
        affine: g.
        jacobians: of the maps of σ; none if the incoming V_xx bears no ε, which alone needs them again.
        inputs: x, prepared.
        u: (R, o, ī).
        inverse: M⁻¹.
        rate: η, (R, 1, 1).
        decay_step: η M⁻¹ λu·w, (R, o, ī); None where λ is zero.
        vxx_reg: ε that is added to V_xx before this layer, (R, 1, 1).
        incoming_reg: ε that the incoming V_xx bears; None if none, as at t = T-1.
    """

    affine: Affine
    jacobians: tuple[Jacobian, ...]
    inputs: Tensor
    u: Tensor
    inverse: FactoredInverse
    rate: Tensor
    decay_step: Tensor | None
    vxx_reg: Tensor
    incoming_reg: Tensor | None

    def contraction(self) -> Contraction:
        """Return S."""
        return self.affine.contraction(self.inputs, self.u, self.inverse, self.rate)

    def decay_response(self) -> Tensor | None:
        """Return a = g_u Q_uu⁻¹ λu·w, (R, B, *outputs); None where λ is zero."""
        if self.decay_step is None:
            return None
        return self.affine.push_controls(self.inputs, self.u, self.decay_step)

    def pull_back(self, rows: Tensor) -> Tensor:
        """Return g_xᵀ v of every row, (R, B, K, *outputs) to (R, B, K, *inputs)."""
        return self.affine.pull_back(rows, self.inputs, self.u)


class ValueForm(Protocol[V]):
    """A way to hold V_xx: `FullForm` here, `SecondOrderForm`, `OuterProductForm` in files of their own."""

    def through_sigma(self, jacobians: Sequence[Jacobian], after: V) -> V:
        """Pull the value back through σ: V_h and V_hh in the place of V_x and V_xx."""
        ...

    def policy_and_value(self, layer: Layer, after: V) -> tuple[Policy, V]:
        """Do the three steps at one layer, from (V_h, V_hh) to its policy and the value before it."""
        ...


@dataclass(frozen=True, slots=True)
class FullValue:
    """V_x (R, B, *shape) and V_xx (R, B, n, n) at one place of the trajectory."""

    V_x: Tensor
    V_xx: Tensor


@dataclass(frozen=True, slots=True)
class ActionValue:
    """The factors of Q's derivatives at one layer.

    Attributes:
        V_h: (R, B, *outputs): Q_u = g_uᵀ V_h + λu and Q_x = g_xᵀ V_h.
        V_hh: (R, B, o, o).
        A: V_hh g_x, (R, B, o, i): Q_ux = g_uᵀ A and Q_xx = g_xᵀ A.
    """

    V_h: Tensor
    V_hh: Tensor
    A: Tensor


@dataclass(frozen=True, slots=True)
class Gains:
    """The policy of one layer.

    Attributes:
        V_h: (R, B, *outputs), factor of the open-loop gain k.
        A: (R, B, o, i), factor of the feedback gain K.
        second_order: see `Policy`.
    """

    V_h: Tensor
    A: Tensor
    second_order: bool = False

    def feedback(self, dx: Tensor) -> Tensor:
        """See `Policy.feedback`."""
        return linalg.per_sample_matvec(self.A, dx.flatten(2)).reshape(self.V_h.shape)

    def closed_loop(self, dx: Tensor) -> Tensor:
        """See `Policy.closed_loop`."""
        return self.V_h + self.feedback(dx)

    def factors(self) -> tuple[Tensor, ...]:
        """See `Policy.factors`."""
        return (self.A,)


def action_value(layer: Layer, after: FullValue) -> ActionValue:
    """Pull V_hh back through the affine map (Eq. 12-14)."""
    V_hh = after.V_xx
    rows = V_hh.reshape(*V_hh.shape[:3], *after.V_x.shape[2:])
    return ActionValue(after.V_x, V_hh, layer.pull_back(rows).flatten(3))


def gains(Q: ActionValue) -> Gains:
    """Return the policy (Eq. 4); Q_uu⁻¹ = η M⁻¹ is applied once, to the batch's sum."""
    return Gains(Q.V_h, Q.A)


def value(layer: Layer, Q: ActionValue, safeguard: Safeguard) -> FullValue:
    """Return V_x and V_xx + εI before the layer (Eq. 5; Alg. 3, line 12), by the closed loop X."""
    S = layer.contraction()
    g_x = layer.affine.matrix(layer.inputs, layer.u)
    a = layer.decay_response()
    if safeguard == "psd":
        right = g_x.expand(*Q.A.shape)
        if a is not None:
            right = torch.cat((right, a.flatten(2).unsqueeze(-1)), dim=-1)
        right = linalg.solve(linalg.eye_like(Q.V_hh) + S.apply(Q.V_hh), right)
        X = right[..., : Q.A.shape[-1]]
        a = None if a is None else right[..., -1]
    else:
        X = g_x - S.apply(Q.A)
    V_x = linalg.per_sample_matvec(X.mT, Q.V_h.flatten(2))
    if a is not None:
        V_x = V_x - linalg.per_sample_matvec(Q.A.mT, a.flatten(2))
    V_xx = linalg.per_sample_matmul(X.mT, Q.A)
    V_xx.diagonal(dim1=-2, dim2=-1).add_(layer.vxx_reg)
    return FullValue(V_x.unflatten(2, layer.affine.shape(layer.inputs)), V_xx)


@dataclass(frozen=True, slots=True)
class FullForm:
    """V_xx as a dense matrix per sample.

    Attributes:
        safeguard: how the value step treats Q_uu.
    """

    safeguard: Safeguard

    def through_sigma(self, jacobians: Sequence[Jacobian], after: FullValue) -> FullValue:
        """See `ValueForm`."""
        V_xx = after.V_xx
        for jacobian in reversed(jacobians):
            V_xx = jacobian.congruence(V_xx)
        return FullValue(pull_back_gradient(jacobians, after.V_x), V_xx)

    def policy_and_value(self, layer: Layer, after: FullValue) -> tuple[Gains, FullValue]:
        """See `ValueForm`."""
        Q = action_value(layer, after)
        return gains(Q), value(layer, Q, self.safeguard)


@dataclass(slots=True)
class OpenLoop:
    """A policy without feedback: the first layer's, since δx_0 = 0, and every layer's if Q_ux is dropped."""

    V_h: Tensor
    second_order: bool = False

    def feedback(self, dx: Tensor) -> Tensor:
        """Return zero, (R, B, *outputs)."""
        return torch.zeros_like(self.V_h)

    def closed_loop(self, dx: Tensor) -> Tensor:
        """Return V_h, (R, B, *outputs)."""
        return self.V_h

    def factors(self) -> tuple[Tensor, ...]:
        """See `Policy.factors`."""
        return ()


@dataclass(frozen=True, slots=True)
class Gradient:
    """A value of which only the gradient is known."""

    V_x: Tensor


class OpenLoopForm:
    """Q_ux dropped: the recursion is backpropagation, the policy the baseline's step (Prop. 2)."""

    def through_sigma(self, jacobians: Sequence[Jacobian], after: Gradient) -> Gradient:
        """See `ValueForm`."""
        return Gradient(pull_back_gradient(jacobians, after.V_x))

    def policy_and_value(self, layer: Layer, after: Gradient) -> tuple[OpenLoop, Gradient]:
        """See `ValueForm`."""
        return OpenLoop(after.V_x), Gradient(layer.pull_back(after.V_x.unsqueeze(2)).squeeze(2))


def pull_back_gradient(jacobians: Sequence[Jacobian], V_x: Tensor) -> Tensor:
    """Return V_h = σ_hᵀ V_x, (R, B, *after) to (R, B, *before)."""
    return pull_back(jacobians, V_x.unsqueeze(2)).squeeze(2) if jacobians else V_x


@dataclass(frozen=True, slots=True)
class Sweep:
    """What the backward pass leaves behind.

    Attributes:
        policies: of t = 0..T-1.
        values: before each layer t = 1..T-1; None at t = 0, where no layer is left to use one, and where they
            were not asked for.
    """

    policies: tuple[Policy, ...]
    values: tuple[Value | None, ...]


def backward_pass(
    form: ValueForm[V],
    terminal: V,
    network: Network,
    controls: Controls,
    trajectory: Trajectory,
    preconditioner: Preconditioner,
    rates: Sequence[Rates],
    units: Units,
    *,
    keep_values: bool = True,
) -> Sweep:
    """Sweep from the last layer to the first.

    Args:
        form: how V_xx is held.
        terminal: the value at T.
        network: the layers.
        controls: u_t, each (R, o_t, ī_t), as they were in the forward pass.
        trajectory: that forward pass.
        preconditioner: M_t.
        rates: of t = 0..T-1.
        units: of the value.
        keep_values: whether the values are handed back; a step has no use for them.
    """
    policies: list[Policy] = []
    values: list[Value | None] = []
    after, last = terminal, len(controls) - 1
    for t in range(last, -1, -1):
        stage, inputs, u = network.stages[t], trajectory.inputs[t], controls[t]
        jacobians = linearise(stage, trajectory.tapes[t])
        if t == 0:
            V_h = pull_back_gradient(jacobians, after.V_x)
        else:
            after = form.through_sigma(jacobians, after)
            V_h = after.V_x
        preconditioner.observe(t, LayerBatch(stage.affine, inputs, u, V_h, units, rates[t].decay))
        if t == 0:
            policies.append(OpenLoop(V_h))
            values.append(None)
            break
        rate, decay = rates[t].learning_rate, rates[t].decay
        inverse = preconditioner.inverse(t)
        incoming_reg = rates[t + 1].vxx_reg if t < last and rates[t + 1].regularised else None
        layer = Layer(
            affine=stage.affine,
            jacobians=() if incoming_reg is None else jacobians,
            inputs=inputs,
            u=u,
            inverse=inverse,
            rate=rate,
            decay_step=None if decay is None else rate * inverse.apply(decay * u * units.share),
            vxx_reg=rates[t].vxx_reg,
            incoming_reg=incoming_reg,
        )
        policy, after = form.policy_and_value(layer, after)
        policies.append(policy)
        values.append(after if keep_values else None)
    return Sweep(tuple(policies[::-1]), tuple(values[::-1]))
