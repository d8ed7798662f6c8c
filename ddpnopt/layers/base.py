"""What a layer is: the interfaces that the Bellman sweep, the preconditioners and the baselines work with.

A net is a chain of *stages* x_{t+1} = σ_t(g_t(x_t, u_t)): an affine layer g with controls u = [W, b]
(`Affine`), then any number of layers without controls (`Map`), which together are σ. Tensors carry the run
and the sample first, then the layer's own shape: (R, B, *shape). Rows are tangents or cotangents, K for
each sample: (R, B, K, *shape).

Index legend: r run in the pack, b sample, k row, o outputs, ī inputs and the constant one, n block of
controls (R·G for a convolution of G groups, else R), p position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ddpnopt.linalg import FactoredInverse

Shape = tuple[int, ...]


@dataclass(slots=True)
class Tape:
    """What a map's forward pass leaves behind.

    Attributes:
        kept: (R, B, …), whatever the map needs to linearise itself; None if nothing.
        before: shape of one sample before the map.
        after: shape of one sample after it.
    """

    kept: Tensor | None
    before: Shape
    after: Shape

    def members(self, part: slice) -> Tape:
        """Return the tape of some runs, as views."""
        return Tape(None if self.kept is None else self.kept[part], self.before, self.after)


class Jacobian(Protocol):
    """The derivative of a map at the nominal point."""

    def pull_back(self, rows: Tensor) -> Tensor:
        """Multiply by the transposed Jacobian: (R, B, K, *after) to (R, B, K, *before)."""
        ...

    def push_forward(self, dx: Tensor) -> Tensor:
        """Multiply by the Jacobian: (R, B, *before) to (R, B, *after)."""
        ...

    def congruence(self, V_xx: Tensor) -> Tensor:
        """Return Jᵀ V_xx J: (R, B, n, n) after the map to (R, B, m, m) before it."""
        ...

    def second_derivative(self, V_x: Tensor) -> Tensor | None:
        """Return the diagonal of V_x · σ_hh (R, B, *before), Eq. 26; None where σ is piecewise linear."""
        ...


class Map(Protocol):
    """A layer without controls. The Jacobian's `congruence` is asked only of `dense` ones."""

    @property
    def dense(self) -> bool:
        """Whether the full form and second-order dynamics can have it."""
        ...

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map x (R, B, *before) to (R, B, *after), and return what the tape has to keep."""
        ...

    def again(self, x: Tensor, tape: Tape) -> Tensor:
        """Map another x on the same trajectory, as the second forward pass does."""
        ...

    def jacobian(self, tape: Tape) -> Jacobian:
        """Linearise at the nominal point."""
        ...


class Contraction(Protocol):
    """S = η g_u M⁻¹ g_uᵀ of one layer: x̄ ⊗ x̄ contracted with Q_uu⁻¹, per sample."""

    def apply(self, columns: Tensor) -> Tensor:
        """Return S A for A (R, B, n, k), n the flattened outputs."""
        ...

    def forms(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return z_hᵀ S z_h and z_hᵀ S V_h, each (R, B, 1), of the rows V_h and z_h (R, B, 2, *outputs)."""
        ...


class Affine(Protocol):
    """A layer with controls u (R, o, ī), linear in them and in x. `inputs` is what `prepare` made of x_t.

    `matrix`, `Contraction.apply`, `tangent_gradient` and `mixed_terms` are asked only of `dense` layers,
    `covariances` only of `kronecker` ones.
    """

    @property
    def dense(self) -> bool:
        """Whether the full form and second-order dynamics can have it."""
        ...

    @property
    def kronecker(self) -> bool:
        """Whether KFAC and EKFAC can have it."""
        ...

    def shape(self, inputs: Tensor) -> Shape:
        """Return the shape of one sample of x_t."""
        ...

    def prepare(self, x: Tensor) -> Tensor:
        """Turn x (R, B, *shape) into what the other methods take."""
        ...

    def forward(self, inputs: Tensor, u: Tensor) -> Tensor:
        """Return h = g(x, u), (R, B, *outputs)."""
        ...

    def difference(self, inputs: Tensor, nominal: Tensor) -> Tensor:
        """Return δx (R, B, *shape) of two prepared inputs."""
        ...

    def pull_back(self, rows: Tensor, inputs: Tensor, u: Tensor) -> Tensor:
        """Return g_xᵀ v: (R, B, K, *outputs) to (R, B, K, *shape), in memory of its own."""
        ...

    def push_forward(self, dx: Tensor, inputs: Tensor, u: Tensor) -> Tensor:
        """Return g_x δx: (R, B, *shape) to (R, B, *outputs)."""
        ...

    def matrix(self, inputs: Tensor, u: Tensor) -> Tensor:
        """Return g_x of flattened inputs and outputs, broadcastable to (R, B, o, i)."""
        ...

    def push_controls(self, inputs: Tensor, u: Tensor, du: Tensor) -> Tensor:
        """Return g_u δu, (R, B, *outputs), of δu (R, o, ī)."""
        ...

    def gradient(self, V_h: Tensor, inputs: Tensor, u: Tensor) -> Tensor:
        """Sum g_uᵀ V_h over the batch: (R, o, ī)."""
        ...

    def tangent_gradient(self, V_h: Tensor, dx: Tensor, u: Tensor) -> Tensor:
        """Sum (V_h · g_ux) δx over the batch: (R, o, ī), zero in the bias (Eq. 27)."""
        ...

    def mean_square(self, V_h: Tensor, inputs: Tensor, u: Tensor, basis: FactoredInverse) -> Tensor:
        """Average over the batch the squares of U_oᵀ (g_uᵀ V_h) U_i: (N, o, ī)."""
        ...

    def covariances(self, V_h: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Kronecker factors E[x̄ x̄ᵀ] (N, ī, ī) and E[V_h V_hᵀ] (N, o, o)."""
        ...

    def covariance_rows(self, V_h: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows (N, K, ī) and (N, K', o), whose outer products add up to the factors, unscaled."""
        ...

    def contraction(self, inputs: Tensor, u: Tensor, inverse: FactoredInverse, rate: Tensor) -> Contraction:
        """Return S for M⁻¹ and η (R, 1, 1)."""
        ...

    def mixed_terms(
        self, V_h: Tensor, inputs: Tensor, u: Tensor, inverse: FactoredInverse, rate: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Contract E = V_h · g_ux with Q_uu⁻¹, per sample.

        Returns:
            C = η g_u M⁻¹ E, (R, B, n, i), and N = η Eᵀ M⁻¹ E, (R, B, i, i), of flattened outputs and
            inputs.
        """
        ...


def size(shape: Shape) -> int:
    """Count the entries of one sample."""
    return math.prod(shape)


def congruence(jacobian: Jacobian, V_xx: Tensor, tape: Tape) -> Tensor:
    """Return Jᵀ V_xx J by pulling back rows, then columns: (R, B, n, n) to (R, B, m, m)."""
    runs, batch = V_xx.shape[:2]

    def one_side(matrix: Tensor) -> Tensor:
        rows = matrix.reshape(runs, batch, matrix.shape[2], *tape.after)
        return jacobian.pull_back(rows).flatten(3)

    return one_side(one_side(V_xx).mT.contiguous())
