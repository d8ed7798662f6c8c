"""A pack of equal nets and the trajectory that a batch takes through them.

Index legend: t layer, r run in the pack, b sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ddpnopt.layers.base import Affine, Jacobian, Map, Tape

Controls = list[Tensor]
"""u_t = [W_t, b_t] of layers t = 0..T-1, each (R, o_t, ī_t)."""


@dataclass(frozen=True, slots=True)
class Stage:
    """x_{t+1} = σ_t(g_t(x_t, u_t)).

    Attributes:
        affine: g_t.
        sigma: σ_t, map by map; empty is the identity.
    """

    affine: Affine
    sigma: tuple[Map, ...] = ()


@dataclass(frozen=True, slots=True)
class Network:
    """A chain of stages.

    Attributes:
        before: maps ahead of the first stage.
        stages: t = 0..T-1.
    """

    before: tuple[Map, ...]
    stages: tuple[Stage, ...]


@dataclass(slots=True)
class Trajectory:
    """What one forward pass leaves behind for the backward pass.

    Attributes:
        inputs: x_t of t = 0..T-1 as `Affine.prepare` returned it, each (R, B, …).
        tapes: of the maps of σ_t, t = 0..T-1.
        output: x_T, (R, B, n_T).
        loss_gradient: ∇φ at x_T, (R, B, n_T), where it came with the loss; else None.
    """

    inputs: tuple[Tensor, ...]
    tapes: tuple[tuple[Tape, ...], ...]
    output: Tensor
    loss_gradient: Tensor | None = None

    def members(self, part: slice) -> Trajectory:
        """Return the trajectory of some runs of the pack, as views."""
        return Trajectory(
            tuple(x[part] for x in self.inputs),
            tuple(tuple(tape.members(part) for tape in tapes) for tapes in self.tapes),
            self.output[part],
        )


def rollout(network: Network, controls: Controls, x: Tensor) -> Trajectory:
    """Run a batch through the nets, keeping what the backward pass needs.

    Args:
        network: the layers.
        controls: u_t.
        x: (R, B, *shape of a sample).

    Returns:
        The trajectory.
    """
    inputs, tapes = [], []
    x = _apply(network.before, x)
    for stage, u in zip(network.stages, controls, strict=True):
        prepared = stage.affine.prepare(x)
        x = stage.affine.forward(prepared, u)
        kept = []
        for layer in stage.sigma:
            y, keep = layer.forward(x)
            kept.append(Tape(keep, x.shape[2:], y.shape[2:]))
            x = y
        inputs.append(prepared)
        tapes.append(tuple(kept))
    return Trajectory(tuple(inputs), tuple(tapes), x)


def predict(network: Network, controls: Controls, x: Tensor) -> Tensor:
    """Return the outputs (R, B, n_T) of a batch (R, B, *shape of a sample), keeping nothing."""
    x = _apply(network.before, x)
    for stage, u in zip(network.stages, controls, strict=True):
        x = _apply(stage.sigma, stage.affine.forward(stage.affine.prepare(x), u))
    return x


def linearise(stage: Stage, tapes: Sequence[Tape]) -> tuple[Jacobian, ...]:
    """Return the Jacobians of σ_t's maps on their trajectory, in the order of the maps."""
    return tuple([layer.jacobian(tape) for layer, tape in zip(stage.sigma, tapes, strict=True)])


def again(stage: Stage, h: Tensor, tapes: Sequence[Tape]) -> Tensor:
    """Return σ_t(h) of another h on the same trajectory: the second forward pass."""
    for layer, tape in zip(stage.sigma, tapes, strict=True):
        h = layer.again(h, tape)
    return h


def pull_back(jacobians: Sequence[Jacobian], rows: Tensor) -> Tensor:
    """Return σ_hᵀ v of every row: (R, B, K, *after) to (R, B, K, *before)."""
    for jacobian in reversed(jacobians):
        rows = jacobian.pull_back(rows)
    return rows


def push_forward(jacobians: Sequence[Jacobian], dh: Tensor) -> Tensor:
    """Return σ_h δh: (R, B, *before) to (R, B, *after)."""
    for jacobian in jacobians:
        dh = jacobian.push_forward(dh)
    return dh


def _apply(maps: Sequence[Map], x: Tensor) -> Tensor:
    for layer in maps:
        x = layer.forward(x)[0]
    return x
