"""E-MSA (Li, Chen, Tai, E, 2017): Pontryagin's principle, solved layer by layer with L-BFGS (Eq. 19-24).

One update takes the states x_t of the forward pass, the co-states p_t = ∂φ/∂x_t of the backward pass (the
adjoint, Eq. 19b), and then for every layer the minimiser u* of the augmented Hamiltonian (Eq. 23), averaged
over the batch:

    H̃(u) = (1/B) Σ_b [ p_{t+1}ᵀ f(x_t, u) + ρ/2 |x_{t+1} - f(x_t, u)|²
                       + ρ/2 |p_t - f_x(x_t, u)ᵀ p_{t+1}|² ] + ℓ(u)

- Units. p_t belongs to one sample and to its own φ: it does not bear the 1/B of the mean loss. H̃ is a mean,
  so that its gradient at the old u is that of J = (1/B) Σ φ + ℓ, and ρ means the same for any batch size.
  φ counts for about one nat, states and co-states are of order one: so is ρ.
- The norms are squared, as in Li et al.; Eq. 23 leaves the squares out.
- All layers use the states and co-states of the old controls.
- At t = 0 the last term is left out: x_0 is given, and its co-state constrains nothing.
- The learning rate is the part of the way that is gone, u ← u + η (u* - u): η = 1 is E-MSA as written.

H̃'s gradient comes from the layers' own derivatives. With e = f(x, u) - x_{t+1}, c = f_xᵀ p_{t+1} - p_t and
a = g_x c, it is

    (1/B) Σ_b [ g_uᵀ (σ_hᵀ (p_{t+1} + ρ e) + ρ (p_{t+1} · σ_hh) a) + ρ (σ_hᵀ p_{t+1} · g_ux) c ] + λu

Index legend: t layer, r run in the pack, b sample, o outputs, ī inputs and the constant one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ddpnopt.errors import ConfigError
from ddpnopt.layers.base import Jacobian, Tape
from ddpnopt.layers.network import (
    Controls,
    Network,
    Stage,
    Trajectory,
    again,
    linearise,
    pull_back,
)
from ddpnopt.layers.reshaping import Dropout
from ddpnopt.optimizers.base import Members, Quantity, Trace

EVALUATIONS: Final = 10
"""Evaluations of H̃ for each L-BFGS iteration at most, line search included."""


class EMSA:
    """E-MSA over a group of runs."""

    def __init__(self, members: Members) -> None:
        stages = members.network.stages
        if not all(s.affine.dense and all(layer.dense for layer in s.sigma) for s in stages):
            raise ConfigError("model", "a generic layer", "layers with second derivatives of their own")
        self.members = members

    def step(self, controls: Controls, trajectory: Trajectory, targets: Tensor) -> Trace:
        """See `Optimizer.step`."""
        members = self.members
        p_T = members.loss.gradient(trajectory.output, targets)
        p = costates(members.network, controls, trajectory, p_T)
        minima: list[Tensor] = []
        for t, u in enumerate(controls):
            H = self.hamiltonian(t, controls, trajectory, p)
            one_by_one = [self.minimise(H.run(r), u[r : r + 1]) for r in range(len(u))]
            minima.append(torch.cat(one_by_one))
            u.add_(members.rates[t].learning_rate * (minima[-1] - u))

        def trace() -> Iterator[Quantity]:
            for t in range(len(controls), 0, -1):
                yield Quantity(t - 1, "p", p[t - 1])
            for t, minimum in enumerate(minima):
                yield Quantity(t, "u*", minimum)
            for t, u in enumerate(controls):
                yield Quantity(t, "u", u)

        return trace

    def hamiltonian(
        self, t: int, controls: Controls, trajectory: Trajectory, p: Sequence[Tensor]
    ) -> AugmentedHamiltonian:
        """Return H̃ of one layer.

        Args:
            t: the layer.
            controls: u_t, each (R, o, ī), those of t not yet updated.
            trajectory: the states.
            p: p_t of t = 1..T, each (R, B, *shape).
        """
        stage, inputs, tapes = self.members.network.stages[t], trajectory.inputs[t], trajectory.tapes[t]
        return AugmentedHamiltonian(
            stage=stage,
            inputs=inputs,
            tapes=tapes,
            x_after=again(stage, stage.affine.forward(inputs, controls[t]), tapes),
            p_after=p[t],
            p_before=p[t - 1] if t > 0 else None,
            augmentation=self.members.config.options.augmentation,
            decay=self.members.rates[t].decay,
        )

    def minimise(self, H: AugmentedHamiltonian, u: Tensor) -> Tensor:
        """Return u* of one run by L-BFGS from u (1, o, ī), which stays as it is; NaN where it fails."""
        steps = self.members.config.options.lbfgs_steps
        moving = u.clone()
        solver = torch.optim.LBFGS(
            [moving], max_iter=steps, max_eval=EVALUATIONS * steps, line_search_fn="strong_wolfe"
        )

        def evaluate() -> Tensor:
            value, moving.grad = H.value_and_gradient(moving)
            return value

        solver.step(evaluate)
        return torch.where(torch.isfinite(moving).all(), moving, torch.nan)

    def state(self) -> dict[str, Any]:
        """See `Optimizer.state`: nothing is remembered."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Optimizer.load_state`."""

    def select(self, keep: Tensor) -> None:
        """See `Optimizer.select`."""
        self.members = self.members.select(keep)


@dataclass(frozen=True, slots=True)
class AugmentedHamiltonian:
    """H̃ of one layer, as a function of its controls.

    Attributes:
        stage: g and σ.
        inputs: x_t, prepared.
        tapes: of σ's maps at x_t.
        x_after: x_{t+1}, (R, B, *shape after).
        p_after: p_{t+1}, the same.
        p_before: p_t, (R, B, *shape); None at t = 0.
        augmentation: ρ.
        decay: λ, (R, 1, 1); None is zero.
    """

    stage: Stage
    inputs: Tensor
    tapes: tuple[Tape, ...]
    x_after: Tensor
    p_after: Tensor
    p_before: Tensor | None
    augmentation: float
    decay: Tensor | None

    def run(self, r: int) -> AugmentedHamiltonian:
        """Return H̃ of one run of the pack."""
        part = slice(r, r + 1)
        return AugmentedHamiltonian(
            self.stage,
            self.inputs[part],
            tuple(tape.members(part) for tape in self.tapes),
            self.x_after[part],
            self.p_after[part],
            None if self.p_before is None else self.p_before[part],
            self.augmentation,
            None if self.decay is None else self.decay[part],
        )

    def value_and_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return H̃ (R,) and its gradient (R, o, ī) at u (R, o, ī)."""
        affine, inputs, rho, p = self.stage.affine, self.inputs, self.augmentation, self.p_after
        share = 1 / p.shape[1]
        y, tapes = _through(self.stage, affine.forward(inputs, u), self.tapes)
        jacobians = linearise(self.stage, tapes)
        e = y - self.x_after
        value = _total(p * y) + rho / 2 * _total(e * e)
        V_h = pull_back(jacobians, (p + rho * e).unsqueeze(2)).squeeze(2)
        gradient = affine.gradient(V_h, inputs, u)
        if self.p_before is not None:
            p_h = pull_back(jacobians, p.unsqueeze(2))
            c = affine.pull_back(p_h, inputs, u).squeeze(2) - self.p_before
            value = value + rho / 2 * _total(c * c)
            gradient = gradient + rho * affine.tangent_gradient(p_h.squeeze(2), c, u)
            bent = bend(jacobians, p, affine.push_forward(c, inputs, u))
            if bent is not None:
                gradient = gradient + rho * affine.gradient(bent, inputs, u)
        value, gradient = share * value, share * gradient
        if self.decay is None:
            return value, gradient
        squares = (u * u).flatten(1).sum(dim=-1)
        return value + self.decay.flatten() / 2 * squares, gradient + self.decay * u


def costates(network: Network, controls: Controls, trajectory: Trajectory, p_T: Tensor) -> list[Tensor]:
    """Return p_t = f_xᵀ p_{t+1} of t = 1..T (Eq. 19b), each (R, B, *shape), from p_T (R, B, n_T)."""
    found = [p_T]
    for t in range(len(controls) - 1, 0, -1):
        stage = network.stages[t]
        V_h = pull_back(linearise(stage, trajectory.tapes[t]), found[-1].unsqueeze(2))
        found.append(stage.affine.pull_back(V_h, trajectory.inputs[t], controls[t]).squeeze(2))
    return found[::-1]


def bend(jacobians: Sequence[Jacobian], p: Tensor, a: Tensor) -> Tensor | None:
    """Return (p · σ_hh) a of σ's maps in a row, the gradient of pᵀ σ_h a with respect to h.

    Args:
        jacobians: of the maps.
        p: (R, B, *shape after).
        a: (R, B, *shape before).

    Returns:
        (R, B, *shape before); None where σ is piecewise linear.
    """
    tangents = []
    for jacobian in jacobians:
        tangents.append(a)
        a = jacobian.push_forward(a)
    total: Tensor | None = None
    for jacobian, tangent in zip(reversed(jacobians), reversed(tangents), strict=True):
        diagonal = jacobian.second_derivative(p)
        if total is not None:
            total = jacobian.pull_back(total.unsqueeze(2)).squeeze(2)
        if diagonal is not None:
            total = diagonal * tangent if total is None else total + diagonal * tangent
        p = jacobian.pull_back(p.unsqueeze(2)).squeeze(2)
    return total


def _through(stage: Stage, h: Tensor, nominal: Sequence[Tape]) -> tuple[Tensor, tuple[Tape, ...]]:
    """Return σ(h) and the tapes there; dropout keeps the masks of the nominal trajectory."""
    tapes = []
    for layer, tape in zip(stage.sigma, nominal, strict=True):
        if isinstance(layer, Dropout):
            y, kept = layer.again(h, tape), tape.kept
        else:
            y, kept = layer.forward(h)
        tapes.append(Tape(kept, tape.before, tape.after))
        h = y
    return h, tuple(tapes)


def _total(products: Tensor) -> Tensor:
    """Sum over samples and entries: (R, B, …) to (R,)."""
    return products.flatten(1).sum(dim=-1)
