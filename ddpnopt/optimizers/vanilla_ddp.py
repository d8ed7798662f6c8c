"""Vanilla DDP (Alg. 1), dense: the batch is one trajectory under shared controls.

The state is the whole batch, X = (x^1, …, x^B), and J = (1/B) Σ φ + Σ_t ℓ(u_t) its cost; V_X is ∇φ/B and V_XX
starts as the blocks ∇²φ/B, the true Hessian of J. (DDPNOpt's batch-mean units have κ∇²φ/B² there.) Backward,
with f linearised (first order; f_xx, f_uu and f_ux dropped, as in Eq. 12) and h = g(x, u):

    Q_u  = Σ_b g_uᵀ V_h + λu           Q_uu = Σ_bb' g_uᵀ V_hh g_u + (λ + μ) I         μ: `quu_reg`
    Q_X  = g_xᵀ V_h                    Q_uX = Σ_b g_uᵀ V_hh g_x,   Q_XX = g_xᵀ V_hh g_x
    k    = -Q_uu⁻¹ Q_u                 K = -Q_uu⁻¹ Q_uX                                       (Eq. 4)
    V_X  = Q_X - Q_uXᵀ Q_uu⁻¹ Q_u      V_XX = Q_XX - Q_uXᵀ Q_uu⁻¹ Q_uX                        (Eq. 5)

Forward, δu = α k + K δX with the states of the new controls; the learning rate is α, and 1 is DDP as written.
A layer whose learning rate is zero has no controls. ε is not used.

A layer with more inputs than the batch has samples is solved within what the batch spans: with x̄ᵀ = Q₀ R₀,
Q₀ of B orthonormal columns, the controls are u Q₀ and the inputs R₀ᵀ. Beside the span g_u is zero, so that
Q_uX is too, Q_uu is (λ + μ) I and Q_u is λ u_⊥, u_⊥ = u - u Q₀ Q₀ᵀ. Hence

    δu = (α k + K δX) Q₀ᵀ + α k_⊥,    k_⊥ = -λ/(λ + μ) u_⊥

with k and K of the span. Where λ is zero, k_⊥ is, also without μ: of all steps that solve, the shortest.

Everything is solved by the Cholesky factor of Q_uu = L Lᵀ. Where Q_uu is not positive definite, that run's
update is NaN from this layer on.

Memory grows by p² + p·B·n + (B·n)² for a layer of p controls and n states (Table 4): a net that does not fit
`memory_limit`, by the count of `ddpnopt/dense.py`, is refused before anything is made. Fully connected layers
alone (the paper: N/A for CNNs).

Index legend: t layer, r run in the pack, b sample, o outputs, i inputs, ī inputs and the constant one,
m = min(ī, B) coordinates of the span, p controls o·m in a row, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpnopt import linalg
from ddpnopt.dense import required_bytes, too_large
from ddpnopt.errors import ConfigError
from ddpnopt.layers.base import Jacobian, Shape
from ddpnopt.layers.linear import Linear
from ddpnopt.layers.network import Controls, Trajectory, again, linearise, pull_back
from ddpnopt.optimizers.base import Members, Quantity, Trace
from ddpnopt.rates import Rates

PullBack = Callable[[Tensor], Tensor]
"""Multiplies rows (R, B, K, *after) by a transposed Jacobian: (R, B, K, *before)."""


@dataclass(frozen=True, slots=True)
class JointValue:
    """V_X (R, B, *shape) and V_XX (R, B·n, B·n) of the joint state at one place of the trajectory."""

    V_X: Tensor
    V_XX: Tensor


@dataclass(frozen=True, slots=True)
class JointGains:
    """δu = α k + K δX of one layer, as far as the batch spans it.

    Attributes:
        k: (R, p, 1).
        K: (R, p, B·n); None at t = 0, where δX is zero.
        basis: Q₀, (R, ī, m); None is the identity.
        k_outside: k_⊥, (R, o, ī); None is zero.
    """

    k: Tensor
    K: Tensor | None
    basis: Tensor | None = None
    k_outside: Tensor | None = None

    def step(self, learning_rate: Tensor, dX: Tensor | None, outputs: int) -> Tensor:
        """Return δu, (R, o, ī), for α (R, 1, 1), δX (R, B·n, 1) or zero, and o."""
        du = learning_rate * self.k
        if self.K is not None and dX is not None:
            du = du + linalg.bmm(self.K, dX)
        du = du.reshape(len(du), outputs, -1)
        if self.basis is not None:
            du = linalg.bmm(du, self.basis.mT)
        return du if self.k_outside is None else du + learning_rate * self.k_outside


@dataclass(frozen=True, slots=True)
class Span:
    """What the inputs of a batch span: x̄ = c Q₀ᵀ.

    Attributes:
        coordinates: c = R₀ᵀ, (R, B, m); x̄ itself without a basis.
        basis: Q₀, (R, ī, m), of orthonormal columns; None is the identity.
    """

    coordinates: Tensor
    basis: Tensor | None = None

    @classmethod
    def of(cls, x_bar: Tensor) -> Span:
        """Return the span of x̄ (R, B, ī), with a basis where it is less than everything."""
        if x_bar.shape[1] >= x_bar.shape[2]:
            return cls(x_bar)
        # Samples that depend on others leave zeros on R₀'s diagonal and columns of Q₀ that nothing needs.
        basis, upper = torch.linalg.qr(x_bar.mT)
        return cls(upper.mT, basis)

    def reduce(self, controls: Tensor) -> Tensor:
        """Return v Q₀ for v (R, o, ī): (R, o, m)."""
        return controls if self.basis is None else linalg.bmm(controls, self.basis)

    def outside(self, controls: Tensor) -> Tensor:
        """Return v - v Q₀ Q₀ᵀ for v (R, o, ī), of a span with a basis."""
        assert self.basis is not None
        return controls - linalg.bmm(linalg.bmm(controls, self.basis), self.basis.mT)


class VanillaDDP:
    """Vanilla DDP over a group of runs."""

    def __init__(self, members: Members) -> None:
        for t, stage in enumerate(members.network.stages):
            if not isinstance(stage.affine, Linear):
                allowed = "Linear: the dense matrices of a convolution's batch do not fit any memory"
                raise ConfigError("model", f"{type(stage.affine).__name__} at layer {t}", allowed)
        self.members = members

    def step(self, controls: Controls, trajectory: Trajectory, targets: Tensor) -> Trace:
        """See `Optimizer.step`. As many runs at a time as fit the memory limit.

        Raises:
            ConfigError: if not even one fits.
        """
        runs, batch = targets.shape[:2]
        limit = self.members.config.options.memory_limit
        shapes = [tuple(u.shape[1:]) for u in controls]
        need = required_bytes(shapes, batch, controls[0].element_size())
        if need > limit:
            raise ConfigError("memory_limit", limit, too_large(shapes, batch, need, limit))
        chunk = limit // need
        traces = []
        for start in range(0, runs, chunk):
            part = slice(start, min(start + chunk, runs))
            rates = [_part(rates, part) for rates in self.members.rates]
            traces.append(
                self._step([u[part] for u in controls], trajectory.members(part), targets[part], rates)
            )

        def trace() -> Iterator[Quantity]:
            for quantities in zip(*traces, strict=True):
                values = torch.cat([quantity.values for quantity in quantities])
                yield Quantity(quantities[0].layer, quantities[0].name, values)

        return trace

    def _step(
        self, controls: Controls, trajectory: Trajectory, targets: Tensor, rates: Sequence[Rates]
    ) -> list[Quantity]:
        network, quu_reg = self.members.network, self.members.config.options.quu_reg
        value = self._terminal(trajectory.output, targets)
        gains: list[JointGains] = []
        found: list[Quantity] = []
        for t in range(len(controls) - 1, -1, -1):
            stage, inputs = network.stages[t], trajectory.inputs[t]
            assert isinstance(stage.affine, Linear)
            value = through_sigma(linearise(stage, trajectory.tapes[t]), value)
            layer = JointLayer.of(stage.affine, inputs, controls[t], rates[t], quu_reg)
            Q_u = layer.Q_u(value)
            found.append(Quantity(t, "Q_u", Q_u))
            if t > 0:
                policy, value = layer.gains_and_value(Q_u, value)
            else:
                policy = layer.gains(layer.solve(value, layer.in_span(Q_u))[1])
            found.append(Quantity(t, "Q_uu", policy.k))
            gains.append(policy)
        self._apply(gains[::-1], controls, trajectory, rates)
        return found + [Quantity(t, "u", u) for t, u in enumerate(controls)]

    def _terminal(self, output: Tensor, targets: Tensor) -> JointValue:
        """Return the derivatives of J with respect to X_T, V_XX as a block for each sample."""
        loss, (runs, batch, classes) = self.members.loss, output.shape
        V_XX = output.new_zeros(runs, batch, classes, batch, classes)
        blocks = V_XX.diagonal(dim1=1, dim2=3)  # (R, C, C, B)
        blocks.copy_((loss.hessian(output, targets) / batch).permute(0, 2, 3, 1))
        return JointValue(loss.gradient(output, targets) / batch, V_XX.flatten(3).flatten(1, 2))

    def _apply(
        self,
        gains: Sequence[JointGains],
        controls: Controls,
        trajectory: Trajectory,
        rates: Sequence[Rates],
    ) -> None:
        """Update each u_t in place by its policy, with δX from the layers already updated."""
        stages, x_hat = self.members.network.stages, trajectory.inputs[0]
        for t, (policy, u, stage) in enumerate(zip(gains, controls, stages, strict=True)):
            affine, inputs = stage.affine, trajectory.inputs[t]
            dX = affine.difference(x_hat, inputs).flatten(1).unsqueeze(-1) if t > 0 else None
            u.add_(policy.step(rates[t].learning_rate, dX, u.shape[1]))
            if t < len(controls) - 1:
                x = again(stage, affine.forward(x_hat, u), trajectory.tapes[t])
                x_hat = stages[t + 1].affine.prepare(x)

    def state(self) -> dict[str, Any]:
        """See `Optimizer.state`: nothing is remembered."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Optimizer.load_state`."""

    def select(self, keep: Tensor) -> None:
        """See `Optimizer.select`."""
        self.members = self.members.select(keep)


@dataclass(frozen=True, slots=True)
class JointLayer:
    """One layer on the batch's nominal trajectory; values are those at h, V_h and V_hh.

    Attributes:
        affine: g.
        inputs: x̄, (R, B, ī).
        u: (R, o, ī).
        rates: λ, and whether the layer learns at all.
        quu_reg: μ.
        span: of x̄.
    """

    affine: Linear
    inputs: Tensor
    u: Tensor
    rates: Rates
    quu_reg: float
    span: Span

    @classmethod
    def of(cls, affine: Linear, inputs: Tensor, u: Tensor, rates: Rates, quu_reg: float) -> JointLayer:
        """Return the layer with the span of its inputs: see the attributes."""
        return cls(affine, inputs, u, rates, quu_reg, Span.of(affine.augment(inputs)))

    def Q_u(self, value: JointValue) -> Tensor:
        """Return Q_u, (R, o, ī)."""
        gradient = self.affine.gradient(value.V_X, self.inputs, self.u)
        if self.rates.decay is not None:
            gradient = gradient + self.rates.decay * self.u
        return gradient

    def in_span(self, Q_u: Tensor) -> Tensor:
        """Return Q_u (R, o, ī) in the coordinates of the span, (R, p, 1)."""
        return self.span.reduce(Q_u).flatten(1).unsqueeze(-1)

    def gains(self, solved: Tensor) -> JointGains:
        """Return the policy from Q_uu⁻¹ [Q_u, Q_uX], (R, p, 1 + B·n); from Q_uu⁻¹ Q_u alone at t = 0."""
        K = -solved[..., 1:] if solved.shape[2] > 1 else None
        return JointGains(-solved[..., :1], K, self.span.basis, self.k_outside())

    def k_outside(self) -> Tensor | None:
        """Return k_⊥ = -λ/(λ + μ) u_⊥, (R, o, ī); None where it is zero for all runs."""
        decay, rate = self.rates.decay, self.rates.learning_rate
        if self.span.basis is None or decay is None:
            return None
        # λ is a run's own: a run without it may have μ = 0 as well, and 0/0.
        share = torch.where((decay > 0) & (rate != 0), decay / (decay + self.quu_reg), 0)
        return -share * self.span.outside(self.u)

    def gains_and_value(self, Q_u: Tensor, value: JointValue) -> tuple[JointGains, JointValue]:
        """Return the policy, and the value before the layer (Eq. 4-5), for Q_u (R, o, ī)."""
        batch = self.inputs.shape[1]

        def pull(rows: Tensor) -> Tensor:
            return self.affine.pull_back(rows, self.inputs, self.u)

        outputs = value.V_X.shape[2:]
        A = pull_joint(pull, value.V_XX, batch, outputs)  # V_hh g_x
        Q_uX = self.pull_controls(A)
        Q_X = pull(value.V_X.unsqueeze(2)).squeeze(2)
        Q_XX = pull_joint(pull, A.mT, batch, outputs)
        # With y = L⁻¹ [Q_u, Q_uX], the products with Q_uu⁻¹ are those of y's columns.
        y, solved = self.solve(value, torch.cat((self.in_span(Q_u), Q_uX), dim=-1))
        reduction = linalg.bmm(y[..., 1:].mT, y)
        V_X = Q_X - reduction[..., 0].reshape(Q_X.shape)
        return self.gains(solved), JointValue(V_X, Q_XX - reduction[..., 1:])

    def solve(self, value: JointValue, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return L⁻¹ Y and Q_uu⁻¹ Y for Y (R, p, K); NaN for a run whose Q_uu is not positive definite."""
        L, info = torch.linalg.cholesky_ex(self.Q_uu(value))
        y = torch.linalg.solve_triangular(L, right, upper=False)
        y = torch.where((info == 0).reshape(-1, 1, 1), y, torch.nan)
        y = torch.where(self.rates.learning_rate == 0, 0, y)
        return y, torch.linalg.solve_triangular(L.mT, y, upper=True)

    def Q_uu(self, value: JointValue) -> Tensor:
        """Return Q_uu + μI, (R, p, p)."""
        matrix = self.pull_controls(self.pull_controls(value.V_XX).mT)
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(self.quu_reg)
        if self.rates.decay is not None:
            diagonal.add_(self.rates.decay.squeeze(-1))
        return matrix

    def pull_controls(self, columns: Tensor) -> Tensor:
        """Return Σ_b g_uᵀ M_b of M (R, B·o, K): (R, p, K), from g_uᵀ v = v cᵀ, c the coordinates of x̄."""
        c = self.span.coordinates
        runs, batch, features = c.shape
        by_input = linalg.bmm(c.mT, columns.reshape(runs, batch, -1))  # (R, m, o·K)
        by_output = by_input.reshape(runs, features, -1, columns.shape[-1]).transpose(1, 2)
        return by_output.flatten(1, 2)


def through_sigma(jacobians: Sequence[Jacobian], after: JointValue) -> JointValue:
    """Return V_h and V_hh before σ."""
    if not jacobians:
        return after
    batch, shape = after.V_X.shape[1], after.V_X.shape[2:]

    def pull(rows: Tensor) -> Tensor:
        return pull_back(jacobians, rows)

    half = pull_joint(pull, after.V_XX, batch, shape)
    return JointValue(pull(after.V_X.unsqueeze(2)).squeeze(2), pull_joint(pull, half.mT, batch, shape))


def pull_joint(pull: PullBack, rows: Tensor, batch: int, shape: Shape) -> Tensor:
    """Pull rows over the joint state back, sample by sample.

    Args:
        pull: of every sample's own part.
        rows: (R, K, B·n).
        batch: B.
        shape: of a sample, of n entries.

    Returns:
        (R, K, B·m).
    """
    runs, count = rows.shape[:2]
    by_sample = rows.reshape(runs, count, batch, -1).transpose(1, 2)
    pulled = pull(by_sample.reshape(runs, batch, count, *shape)).flatten(3)
    return pulled.transpose(1, 2).flatten(2)


def _part(rates: Rates, part: slice) -> Rates:
    decay = None if rates.decay is None else rates.decay[part]
    return Rates(rates.learning_rate[part], rates.vxx_reg[part], decay, rates.momentum)
