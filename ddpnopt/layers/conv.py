"""The convolution h = ω * x + b (Eq. 14) for a pack of runs, u = [ω, b] with ω flattened to (o, c/G·kh·kw).

In terms of patches x̄ (ī, p), one column for each position p, h[:, p] = u x̄[:, p]: g_uᵀ v = v x̄ᵀ sums over
positions, and the Kronecker factors are those of KFC (Grosse & Martens, 2016): E[Σ_p x̄_p x̄_pᵀ] and the mean
of v_p v_pᵀ over samples and positions. Groups are blocks of their own.

A run at a time through torch's convolution: its bits then do not depend on how many runs the pack has.

Index legend: r run in the pack, b sample, k row, g group, n run and group, o outputs of a group, ī inputs of
a patch and the constant one, p and q positions, i flattened inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import pad
from torch.nn.grad import conv2d_input, conv2d_weight

from ddpnopt import linalg
from ddpnopt.errors import ConfigError
from ddpnopt.layers.base import Shape
from ddpnopt.linalg import FactoredInverse

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class PositionContraction:
    """S of a convolution, which couples the positions of an image.

    Attributes:
        layer: the convolution.
        inputs: x, (R, B, c, H, W).
        inverse: M⁻¹.
        rate: η, (R, 1, 1).
    """

    layer: Conv2d
    inputs: Tensor
    inverse: FactoredInverse
    rate: Tensor

    def apply(self, columns: Tensor) -> Tensor:
        """See `Contraction.apply`. Builds S, (R, B, n, n): for small images."""
        return linalg.per_sample_matmul(self._matrix(), columns)

    def forms(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `Contraction.forms`: q_uᵀ M⁻¹ q_u and q_uᵀ M⁻¹ Q_u (Eq. 17)."""
        gradients = self.layer.per_sample_gradients(rows, self.inputs)  # (N, B, 2, o, ī)
        rotated = self.inverse.rotate(gradients.flatten(1, 2)).unflatten(1, gradients.shape[1:3])
        Q_u, q_u = rotated.unbind(dim=2)
        weighted = q_u if self.inverse.scale is None else q_u * self.inverse.scale.unsqueeze(1)
        c, overlap = self._per_sample(weighted * q_u), self._per_sample(weighted * Q_u)
        rest = self.inverse.rest
        if rest is None:
            return c, overlap
        Q_u, q_u = gradients.unbind(dim=2)
        return c + rest * self._per_sample(q_u * q_u), overlap + rest * self._per_sample(q_u * Q_u)

    def _per_sample(self, products: Tensor) -> Tensor:
        runs, batch = self.inputs.shape[:2]
        sums = products.flatten(2).sum(dim=-1).reshape(runs, self.layer.groups, batch).sum(dim=1)
        return self.rate * sums.unsqueeze(-1)

    def _matrix(self) -> Tensor:
        layer, inverse = self.layer, self.inverse
        patches = layer.patches(self.inputs)
        runs, batch = self.inputs.shape[:2]
        outputs, positions = layer.out_channels // layer.groups, patches.shape[-1]
        if inverse.inputs is not None:
            patches = torch.einsum("nji,nbjp->nbip", inverse.inputs, patches)
        if inverse.scale is None:
            gram = torch.einsum("nbip,nbiq->nbpq", patches, patches).unsqueeze(2)
            gram = gram.expand(
                -1, -1, outputs if inverse.outputs is None else inverse.outputs.shape[2], -1, -1
            )
        else:
            scale = inverse.scale.reshape(len(patches), -1, patches.shape[2])
            gram = torch.einsum("noi,nbip,nbiq->nbopq", scale, patches, patches)
        eye = linalg.eye_like(gram.new_empty(outputs, outputs))
        basis = eye.expand(len(patches), -1, -1) if inverse.outputs is None else inverse.outputs
        blocks = torch.einsum("noa,nca,nbapq->nbopcq", basis, basis, gram)
        if inverse.rest is not None:
            whole = layer.patches(self.inputs)
            blocks = blocks + inverse.rest * torch.einsum("oc,nbip,nbiq->nbopcq", eye, whole, whole)
        blocks = blocks.reshape(runs, layer.groups, batch, outputs * positions, outputs * positions)
        groups = linalg.eye_like(gram.new_empty(layer.groups, layer.groups))
        matrix = torch.einsum("rgbuv,gh->rbguhv", blocks, groups)
        return self.rate.unsqueeze(-1) * matrix.flatten(2, 3).flatten(3, 4)


@dataclass(frozen=True, slots=True)
class Conv2d:
    """A two-dimensional convolution with zero padding.

    Attributes:
        in_channels, out_channels: c and G·o.
        kernel, stride, padding, dilation: (height, width).
        groups: G.
        bias: whether u ends with the column b.
    """

    in_channels: int
    out_channels: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = True
    dense: ClassVar[bool] = True
    kronecker: ClassVar[bool] = True

    def shape(self, inputs: Tensor) -> Shape:
        """See `Affine.shape`."""
        return tuple(inputs.shape[2:])

    def prepare(self, x: Tensor) -> Tensor:
        """See `Affine.prepare`: x itself."""
        if x.dim() != 5 or x.shape[2] != self.in_channels:
            raise ConfigError(
                "model",
                f"a Conv2d layer of {self.in_channels} channels on states of shape {tuple(x.shape[2:])}",
                "states of shape (channels, height, width)",
            )
        return x

    def weight(self, u: Tensor) -> Tensor:
        """Return ω, (R, G·o, c/G, kh, kw)."""
        flat = u[..., :-1] if self.bias else u
        return flat.reshape(len(u), self.out_channels, self.in_channels // self.groups, *self.kernel)

    def forward(self, inputs: Tensor, u: Tensor) -> Tensor:
        """See `Affine.forward`: (R, B, c, H, W) to (R, B, G·o, H', W')."""
        weight = self.weight(u)

        def one(r: int) -> Tensor:
            b = u[r, :, -1] if self.bias else None
            return functional.conv2d(
                inputs[r], weight[r], b, self.stride, self.padding, self.dilation, self.groups
            )

        return _each(one, len(u))

    def difference(self, inputs: Tensor, nominal: Tensor) -> Tensor:
        """See `Affine.difference`."""
        return inputs - nominal

    def pull_back(self, rows: Tensor, inputs: Tensor, u: Tensor) -> Tensor:
        """Return ωᵀ * v of every row: the transposed convolution of Eq. 14."""
        weight, shape, merged = self.weight(u), inputs.shape[2:], rows.flatten(1, 2)

        def one(r: int) -> Tensor:
            return conv2d_input(  # type: ignore[no-any-return]
                (merged.shape[1], *shape),
                weight[r],
                merged[r],
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
            )

        return _each(one, len(u)).reshape(*rows.shape[:3], *shape)

    def push_forward(self, dx: Tensor, inputs: Tensor, u: Tensor) -> Tensor:
        """See `Affine.push_forward`."""
        return self.forward(dx, self._without_bias(u))

    def matrix(self, inputs: Tensor, u: Tensor) -> Tensor:
        """See `Affine.matrix`: (R, 1, o, i), from unit outputs."""
        outputs = self.forward(inputs[:, :1], u)
        count = outputs[0, 0].numel()
        units = torch.eye(count, dtype=u.dtype, device=u.device).reshape(1, 1, count, *outputs.shape[2:])
        rows = units.expand(len(u), -1, -1, -1, -1, -1)
        return self.pull_back(rows, inputs, u).flatten(3)

    def push_controls(self, inputs: Tensor, u: Tensor, du: Tensor) -> Tensor:
        """See `Affine.push_controls`: the layer is linear in its controls."""
        return self.forward(inputs, du)

    def gradient(self, V_h: Tensor, inputs: Tensor, u: Tensor) -> Tensor:
        """See `Affine.gradient`."""
        gradient = self._weight_gradient(V_h, inputs, u)
        if not self.bias:
            return gradient
        return torch.cat((gradient, V_h.sum(dim=(1, 3, 4)).unsqueeze(-1)), dim=-1)

    def tangent_gradient(self, V_h: Tensor, dx: Tensor, u: Tensor) -> Tensor:
        """See `Affine.tangent_gradient`."""
        return pad(self._weight_gradient(V_h, dx, u), (0, int(self.bias)))

    def mean_square(self, V_h: Tensor, inputs: Tensor, u: Tensor, basis: FactoredInverse) -> Tensor:
        """See `Affine.mean_square`."""
        rotated = basis.rotate(self.per_sample_gradients(V_h.unsqueeze(2), inputs).squeeze(2))
        mean = (rotated * rotated).mean(dim=1)
        return mean if basis.inputs is not None else mean.reshape(u.shape)

    def covariances(self, V_h: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """See `Affine.covariances`."""
        x, v = self.covariance_rows(V_h, inputs)
        batch = inputs.shape[1]
        return linalg.bmm(x.mT, x) / batch, linalg.bmm(v.mT, v) / v.shape[1]

    def covariance_rows(self, V_h: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """See `Affine.covariance_rows`: a row for each sample and position."""
        patches, v = self.patches(inputs), self.blocks(V_h.unsqueeze(2)).squeeze(2)
        x_flat, v_flat = (a.transpose(1, 2).flatten(2).mT for a in (patches, v))  # (N, B·P, ·)
        return x_flat, v_flat

    def contraction(
        self, inputs: Tensor, u: Tensor, inverse: FactoredInverse, rate: Tensor
    ) -> PositionContraction:
        """See `Affine.contraction`."""
        if inverse.inputs is None and inverse.scale is not None:
            blocks = inverse.scale.reshape(len(u) * self.groups, -1, u.shape[-1])
            inverse = FactoredInverse(scale=blocks)
        return PositionContraction(self, inputs, inverse, rate)

    def mixed_terms(
        self, V_h: Tensor, inputs: Tensor, u: Tensor, inverse: FactoredInverse, rate: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Affine.mixed_terms`. Builds E, (N, B, i, o, ī), from the patches of unit images."""
        inverse = self.contraction(inputs, u, inverse, rate).inverse
        runs, batch = inputs.shape[:2]
        n_inputs = inputs[0, 0].numel()
        units = torch.eye(n_inputs, dtype=inputs.dtype, device=inputs.device)
        units = self.patches(units.reshape(1, n_inputs, *inputs.shape[2:]), one=0.0)  # (G, i, ī, P)
        v = self.blocks(V_h.unsqueeze(2)).squeeze(2).unflatten(0, (runs, self.groups))
        E = torch.einsum("rgbop,gijp->rgbioj", v, units)
        PE = inverse.apply_per_sample(E.flatten(0, 1).flatten(1, 2)).reshape(E.shape)
        patches = self.patches(inputs).unflatten(0, (runs, self.groups))
        C = torch.einsum("rgbioj,rgbjp->rbgopi", PE, patches).reshape(runs, batch, -1, n_inputs)
        N = torch.einsum("rgbioj,rgbkoj->rbik", PE, E)
        return rate.unsqueeze(-1) * C, rate.unsqueeze(-1) * N

    def patches(self, x: Tensor, one: float = 1.0) -> Tensor:
        """Return x̄ of every position, (N, B, ī, P), with `one` in the place of the bias."""
        runs, batch = x.shape[:2]
        unfolded = functional.unfold(x.flatten(0, 1), self.kernel, self.dilation, self.padding, self.stride)
        grouped = unfolded.reshape(runs, batch, self.groups, -1, unfolded.shape[-1]).transpose(1, 2)
        grouped = grouped.flatten(0, 1)
        return pad(grouped, (0, 0, 0, 1), value=one) if self.bias else grouped

    def blocks(self, rows: Tensor) -> Tensor:
        """Split the outputs of rows (R, B, K, G·o, H', W') into groups: (N, B, K, o, P)."""
        split = rows.flatten(4).unflatten(3, (self.groups, -1))
        blocks: Tensor = split.permute(0, 3, 1, 2, 4, 5).flatten(0, 1)
        return blocks

    def per_sample_gradients(self, rows: Tensor, inputs: Tensor) -> Tensor:
        """Return g_uᵀ v of every row, (R, B, K, G·o, H', W') to (N, B, K, o, ī)."""
        v, patches = self.blocks(rows), self.patches(inputs)
        gradients: Tensor = linalg.per_sample_matmul(v.flatten(2, 3), patches.mT).unflatten(2, v.shape[2:4])
        return gradients

    def _weight_gradient(self, V_h: Tensor, x: Tensor, u: Tensor) -> Tensor:
        shape = self.weight(u).shape[1:]

        def one(r: int) -> Tensor:
            return conv2d_weight(  # type: ignore[no-any-return]
                x[r], shape, V_h[r], self.stride, self.padding, self.dilation, self.groups
            )

        return _each(one, len(u)).flatten(2)

    def _without_bias(self, u: Tensor) -> Tensor:
        return pad(u[..., :-1], (0, 1)) if self.bias else u


def _each(one: Callable[[int], Tensor], runs: int) -> Tensor:
    return one(0).unsqueeze(0) if runs == 1 else torch.stack([one(r) for r in range(runs)])
