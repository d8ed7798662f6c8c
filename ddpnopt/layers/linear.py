"""The affine layer h = u x̄ = W x + b, with u = [W, b] and x̄ = [x, 1], for a pack of runs.

Everything of Eq. 13 follows from g_uᵀ v = v x̄ᵀ and g_xᵀ v = Wᵀ v, and nothing of size (controls × states) is
built: contracting x̄ ⊗ x̄ with M⁻¹ = c I + (U_o ⊗ U_i) diag(m) (U_o ⊗ U_i)ᵀ leaves

    S = η (c |x̄|² I + U_o diag(s) U_oᵀ),   s_a = Σ_b m_ab (U_iᵀ x̄)_b²

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


@dataclass(slots=True)
class RankOneContraction:
    """S = r I + U_o diag(s) U_oᵀ of one layer.

    Attributes:
        s: η included, broadcastable to (R, B, q).
        outputs: U_o, (R, o, q); None is the identity.
        rest: r = η c |x̄|², (R, B, 1); None is zero.
    """

    s: Tensor
    outputs: Tensor | None
    rest: Tensor | None = None

    def apply(self, columns: Tensor) -> Tensor:
        """See `Contraction.apply`."""
        if self.outputs is None:
            return self.s.unsqueeze(-1) * columns
        rotated = linalg.rows_matmul(columns.mT, self.outputs) * self.s.unsqueeze(2)
        found = linalg.rows_matmul(rotated, self.outputs.mT).mT
        return found if self.rest is None else found + self.rest.unsqueeze(-1) * columns

    def forms(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `Contraction.forms`."""
        c, overlap = _forms(self.s, rows if self.outputs is None else linalg.rows_matmul(rows, self.outputs))
        if self.rest is None:
            return c, overlap
        of_rest = _forms(self.rest, rows)
        return c + of_rest[0], overlap + of_rest[1]


def _forms(weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    V_h, z_h = rows.unbind(2)
    weighted = weights * z_h
    return (weighted * z_h).sum(-1, True), (weighted * V_h).sum(-1, True)


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
        return (inputs.shape[-1],)

    def prepare(self, x: Tensor) -> Tensor:
        """See `Affine.prepare`: x (R, B, i) itself."""
        if x.dim() != 3:
            raise ConfigError(
                "model",
                f"a Linear layer on states of shape {tuple(x.shape[2:])}",
                "flat states (use Flatten)",
            )
        return x

    def augment(self, x: Tensor) -> Tensor:
        """Append the one that carries the bias: x (…, i) to x̄ (…, ī)."""
        return pad(x, (0, 1), value=1.0) if self.bias else x

    def weight(self, u: Tensor) -> Tensor:
        """Return the view W (R, o, i) of u (R, o, ī)."""
        # narrow and select: plain indexing takes twice as long, and a small net is all overhead.
        return u.narrow(2, 0, u.shape[2] - 1) if self.bias else u

    def transposed(self, u: Tensor) -> Tensor:
        """Return the view Wᵀ (R, i, o)."""
        return self.weight(u).mT

    def bias_row(self, u: Tensor) -> Tensor:
        """Return the view b (R, 1, o)."""
        return u.select(2, -1).unsqueeze(1)

    def bind(self, u: Tensor) -> BoundLinear:
        """Return this layer with its views of u taken once, for a u that is updated in place."""
        b = self.bias_row(u) if self.bias else None
        return BoundLinear(self.bias, u, self.weight(u), self.transposed(u), b)

    def forward(self, inputs: Tensor, u: Tensor) -> Tensor:
        """Return h = x Wᵀ + b: (R, B, i), (R, o, ī) to (R, B, o)."""
        if not self.bias:
            return linalg.bmm(inputs, self.transposed(u))
        # baddbmm starts from a copy of b for every sample: by vector instructions if b lies in one piece.
        return linalg.baddbmm(self.bias_row(u).contiguous(), inputs, self.transposed(u))

    def difference(self, inputs: Tensor, nominal: Tensor) -> Tensor:
        """See `Affine.difference`."""
        return inputs - nominal

    def pull_back(self, rows: Tensor, inputs: Tensor, u: Tensor) -> Tensor:
        """Return Wᵀ v of every row: (R, B, K, o) to (R, B, K, i)."""
        return linalg.rows_matmul(rows, self.weight(u))

    def push_forward(self, dx: Tensor, inputs: Tensor, u: Tensor) -> Tensor:
        """Return W δx, (R, B, i) to (R, B, o)."""
        return linalg.bmm(dx, self.transposed(u))

    def matrix(self, inputs: Tensor, u: Tensor) -> Tensor:
        """Return W, (R, 1, o, i)."""
        return self.weight(u).unsqueeze(1)

    def push_controls(self, inputs: Tensor, u: Tensor, du: Tensor) -> Tensor:
        """Return δu x̄: the layer is linear in its controls."""
        return self.forward(inputs, du)

    def gradient(self, V_h: Tensor, inputs: Tensor, u: Tensor) -> Tensor:
        """Return Σ_b V_h x̄ᵀ, (R, o, ī)."""
        of_weight = linalg.bmm(V_h.mT, inputs)
        if not self.bias:
            return of_weight
        return torch.cat((of_weight, V_h.sum(1).unsqueeze(2)), 2)

    def tangent_gradient(self, V_h: Tensor, dx: Tensor, u: Tensor) -> Tensor:
        """Return Σ_b V_h [δx, 0]ᵀ, (R, o, ī)."""
        return linalg.bmm(V_h.mT, pad(dx, (0, int(self.bias))))

    def mean_square(self, V_h: Tensor, inputs: Tensor, u: Tensor, basis: FactoredInverse) -> Tensor:
        """See `Affine.mean_square`: the square of an outer product is the outer product of squares."""
        x_bar = self.augment(inputs)
        if basis.inputs is not None and basis.outputs is not None:
            V_h, x_bar = linalg.bmm(V_h, basis.outputs), linalg.bmm(x_bar, basis.inputs)
        return linalg.bmm((V_h * V_h).mT, x_bar * x_bar) / V_h.shape[1]

    def covariances(self, V_h: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """See `Affine.covariances` (Eq. 15)."""
        x_bar, v = self.covariance_rows(V_h, inputs)
        return linalg.bmm(x_bar.mT, x_bar) / x_bar.shape[1], linalg.bmm(v.mT, v) / v.shape[1]

    def covariance_rows(self, V_h: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """See `Affine.covariance_rows`: a row for each sample."""
        return self.augment(inputs), V_h

    def contraction(
        self, inputs: Tensor, u: Tensor, inverse: FactoredInverse, rate: Tensor
    ) -> RankOneContraction:
        """See `Affine.contraction`."""
        if inverse.inputs is None and inverse.scale is None:  # s = η|x̄|², the same for every output
            squares = (inputs * inputs).sum(-1, True)
            s = torch.addcmul(rate, rate, squares) if self.bias else rate * squares
            return RankOneContraction(s, None)
        x_bar = self.augment(inputs)
        rotated = x_bar if inverse.inputs is None else linalg.bmm(x_bar, inverse.inputs)
        squares = rotated * rotated
        if inverse.scale is None:
            s = squares.sum(dim=-1, keepdim=True)
        else:
            s = linalg.bmm(squares, inverse.scale.mT)
        rest = None
        if inverse.rest is not None:
            rest = rate * inverse.rest * (x_bar * x_bar).sum(-1, True)
        return RankOneContraction(rate * s, inverse.outputs, rest)

    def mixed_terms(
        self, V_h: Tensor, inputs: Tensor, u: Tensor, inverse: FactoredInverse, rate: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Affine.mixed_terms`.

        E[(o, j), i] = V_h[o] δ_ij (Eq. 27), so that C = η M⁻¹(V_h x̄ᵀ) without its bias column, and
        N = η (c |V_h|² I + U_i diag(Σ_a m_ab (U_oᵀ V_h)_a²) U_iᵀ).
        """
        x_bar = self.augment(inputs)
        outer = V_h.unsqueeze(-1) * x_bar.unsqueeze(-2)
        C = inverse.apply_per_sample(outer)
        rotated = V_h if inverse.outputs is None else linalg.bmm(V_h, inverse.outputs)
        squares = rotated * rotated
        if inverse.scale is None:
            size = x_bar.shape[-1] if inverse.inputs is None else inverse.inputs.shape[-1]
            weights = squares.sum(dim=-1, keepdim=True).expand(*x_bar.shape[:-1], size)
        else:
            weights = linalg.bmm(squares, inverse.scale)
        if inverse.inputs is None:
            N = torch.diag_embed(weights)
        else:
            N = linalg.rows_matmul(weights.unsqueeze(2) * inverse.inputs.unsqueeze(1), inverse.inputs.mT)
        if inverse.rest is not None:
            N.diagonal(dim1=-2, dim2=-1).add_(inverse.rest * (V_h * V_h).sum(-1, True))
        step = rate.unsqueeze(-1)
        features = self.shape(inputs)[0]
        return step * C[..., :features], step * N[..., :features, :features]


@dataclass(frozen=True, slots=True, eq=False)
class BoundLinear(Linear):
    """A fully connected layer that knows its own controls' views. Other controls go the usual way.

    Attributes:
        u: (R, o, ī).
        W, W_T, b: its views; b is None without bias.
    """

    u: Tensor | None = None
    W: Tensor | None = None
    W_T: Tensor | None = None
    b: Tensor | None = None

    def weight(self, u: Tensor) -> Tensor:
        """See `Linear.weight`."""
        return self.W if u is self.u and self.W is not None else Linear.weight(self, u)

    def transposed(self, u: Tensor) -> Tensor:
        """See `Linear.transposed`."""
        return self.W_T if u is self.u and self.W_T is not None else Linear.transposed(self, u)

    def bias_row(self, u: Tensor) -> Tensor:
        """See `Linear.bias_row`."""
        return self.b if u is self.u and self.b is not None else Linear.bias_row(self, u)
