"""The affine layer h = u x̄, with u = [W, b] and x̄ = [x, 1], for a pack of runs.

Everything of Eq. 13 follows from g_uᵀ v = v x̄ᵀ and g_xᵀ v = Wᵀ v, and nothing of size (controls × states) is
built: contracting x̄ ⊗ x̄ with M⁻¹ = (U_o ⊗ U_i) diag(m) (U_o ⊗ U_i)ᵀ leaves

    S = η U_o diag(s) U_oᵀ,   s_a = Σ_b m_ab (U_iᵀ x̄)_b²

Index legend: r run in the pack, b sample, k row, i inputs, ī inputs and the constant one, o outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ddpnopt import linalg
from ddpnopt.errors import ConfigError
from ddpnopt.layers.base import Shape
from ddpnopt.linalg import FactoredInverse


@dataclass(frozen=True, slots=True)
class RankOneContraction:
    """S = U_o diag(s) U_oᵀ of one layer.

    Attributes:
        s: η included, broadcastable to (R, B, o).
        outputs: U_o, (R, o, o); None is the identity.
    """

    s: Tensor
    outputs: Tensor | None

    def apply(self, columns: Tensor) -> Tensor:
        """See `Contraction.apply`."""
        if self.outputs is None:
            return self.s.unsqueeze(-1) * columns
        rotated = linalg.rows_matmul(columns.mT, self.outputs) * self.s.unsqueeze(2)
        return linalg.rows_matmul(rotated, self.outputs.mT).mT

    def forms(self, V_h: Tensor, z_h: Tensor) -> tuple[Tensor, Tensor]:
        """See `Contraction.forms`."""
        if self.outputs is not None:
            V_h, z_h = linalg.bmm(V_h, self.outputs), linalg.bmm(z_h, self.outputs)
        weighted = self.s * z_h
        return (weighted * z_h).sum(dim=-1, keepdim=True), (weighted * V_h).sum(dim=-1, keepdim=True)


@dataclass(frozen=True, slots=True)
class Linear:
    """A fully connected layer.

    Attributes:
        bias: whether u ends with the column b.
    """

    bias: bool = True
    dense: ClassVar[bool] = True
    kronecker: ClassVar[bool] = True

    def shape(self, inputs: Tensor) -> Shape:
        """See `Affine.shape`."""
        return (inputs.shape[-1] - self.bias,)

    def prepare(self, x: Tensor) -> Tensor:
        """Append the one that carries the bias: x (R, B, i) to x̄ (R, B, ī)."""
        if x.dim() != 3:
            raise ConfigError(
                "model",
                f"a Linear layer on states of shape {tuple(x.shape[2:])}",
                "flat states (use Flatten)",
            )
        return pad(x, (0, 1), value=1.0) if self.bias else x

    def weight(self, u: Tensor) -> Tensor:
        """Return the view W (R, o, i) of u (R, o, ī)."""
        return u[..., :-1] if self.bias else u

    def forward(self, inputs: Tensor, u: Tensor) -> Tensor:
        """Return h = x̄ uᵀ: (R, B, ī), (R, o, ī) to (R, B, o)."""
        return linalg.bmm(inputs, u.mT)

    def difference(self, inputs: Tensor, nominal: Tensor) -> Tensor:
        """See `Affine.difference`."""
        difference = inputs - nominal
        return difference[..., :-1] if self.bias else difference

    def pull_back(self, rows: Tensor, inputs: Tensor, u: Tensor) -> Tensor:
        """Return Wᵀ v of every row: (R, B, K, o) to (R, B, K, i)."""
        return linalg.rows_matmul(rows, self.weight(u))

    def push_forward(self, dx: Tensor, inputs: Tensor, u: Tensor) -> Tensor:
        """Return W δx, (R, B, i) to (R, B, o)."""
        return linalg.bmm(dx, self.weight(u).mT)

    def matrix(self, inputs: Tensor, u: Tensor) -> Tensor:
        """Return W, (R, 1, o, i)."""
        return self.weight(u).unsqueeze(1)

    def push_controls(self, inputs: Tensor, u: Tensor, du: Tensor) -> Tensor:
        """Return δu x̄: the layer is linear in its controls."""
        return self.forward(inputs, du)

    def gradient(self, V_h: Tensor, inputs: Tensor, u: Tensor) -> Tensor:
        """Return Σ_b V_h x̄ᵀ, (R, o, ī)."""
        return linalg.bmm(V_h.mT, inputs)

    def tangent_gradient(self, V_h: Tensor, dx: Tensor, u: Tensor) -> Tensor:
        """Return Σ_b V_h [δx, 0]ᵀ, (R, o, ī)."""
        return linalg.bmm(V_h.mT, pad(dx, (0, int(self.bias))))

    def mean_square(self, V_h: Tensor, inputs: Tensor, u: Tensor, basis: FactoredInverse) -> Tensor:
        """See `Affine.mean_square`: the square of an outer product is the outer product of squares."""
        if basis.inputs is not None and basis.outputs is not None:
            V_h, inputs = linalg.bmm(V_h, basis.outputs), linalg.bmm(inputs, basis.inputs)
        return linalg.bmm((V_h * V_h).mT, inputs * inputs) / V_h.shape[1]

    def covariances(self, V_h: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """See `Affine.covariances` (Eq. 15)."""
        batch = V_h.shape[1]
        return linalg.bmm(inputs.mT, inputs) / batch, linalg.bmm(V_h.mT, V_h) / batch

    def contraction(
        self, inputs: Tensor, u: Tensor, inverse: FactoredInverse, rate: Tensor
    ) -> RankOneContraction:
        """See `Affine.contraction`."""
        rotated = inputs if inverse.inputs is None else linalg.bmm(inputs, inverse.inputs)
        squares = rotated * rotated
        if inverse.scale is None:
            s = squares.sum(dim=-1, keepdim=True)
        else:
            s = linalg.bmm(squares, inverse.scale.mT)
        return RankOneContraction(rate * s, inverse.outputs)

    def mixed_terms(
        self, V_h: Tensor, inputs: Tensor, u: Tensor, inverse: FactoredInverse, rate: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Affine.mixed_terms`.

        E[(o, j), i] = V_h[o] δ_ij (Eq. 27), so that C = η M⁻¹(V_h x̄ᵀ) without its bias column, and
        N = η U_i diag(Σ_a m_ab (U_oᵀ V_h)_a²) U_iᵀ.
        """
        outer = V_h.unsqueeze(-1) * inputs.unsqueeze(-2)
        C = inverse.apply_per_sample(outer)
        rotated = V_h if inverse.outputs is None else linalg.bmm(V_h, inverse.outputs)
        squares = rotated * rotated
        if inverse.scale is None:
            weights = squares.sum(dim=-1, keepdim=True).expand(*inputs.shape)
        else:
            weights = linalg.bmm(squares, inverse.scale)
        if inverse.inputs is None:
            N = torch.diag_embed(weights)
        else:
            N = linalg.rows_matmul(weights.unsqueeze(2) * inverse.inputs.unsqueeze(1), inverse.inputs.mT)
        step = rate.unsqueeze(-1)
        features = self.shape(inputs)[0]
        return step * C[..., :features], step * N[..., :features, :features]
