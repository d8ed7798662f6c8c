"""Any torch function as a layer, through torch.func: slower than a layer with pullbacks of its own.

For the outer-product form with first-order dynamics alone; a function that treats samples one by one
(no batch statistics) and draws no random numbers.

Index legend: r run in the pack, b sample, k row, j control.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Never

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from ddpnopt.errors import ConfigError
from ddpnopt.layers.base import Shape, Tape
from ddpnopt.linalg import FactoredInverse

Function = Callable[[Tensor], Tensor]
Controlled = Callable[[Tensor, Tensor], Tensor]


def refuse(what: str) -> Never:
    """Raise for what a generic layer cannot do.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "model", f"a generic layer with {what}", "the outer-product form, first order, diagonal M"
    )


@dataclass(frozen=True, slots=True)
class FunctionJacobian:
    """The Jacobian of a function at x (N, *before), N = R·B."""

    function: Function
    x: Tensor
    tape: Tape

    def pull_back(self, rows: Tensor) -> Tensor:
        """See `Jacobian.pull_back`."""
        with torch.inference_mode(False), torch.enable_grad():
            pull = vjp(self.function, self.x.clone())[1]
            by_row = rows.flatten(0, 1).transpose(0, 1).clone()
            pulled = torch.stack([pull(row)[0] for row in by_row])
        return pulled.transpose(0, 1).reshape(*rows.shape[:3], *self.tape.before)

    def push_forward(self, dx: Tensor) -> Tensor:
        """See `Jacobian.push_forward`."""
        with torch.inference_mode(False):
            tangent = dx.flatten(0, 1).clone()
            pushed: Tensor = jvp(self.function, (self.x.clone(),), (tangent,))[1]
        return pushed.reshape(*dx.shape[:2], *self.tape.after)

    def congruence(self, V_xx: Tensor) -> Tensor:
        """See `Jacobian.congruence`."""
        refuse("a dense V_xx")

    def second_derivative(self, V_x: Tensor) -> Tensor | None:
        """See `Jacobian.second_derivative`."""
        refuse("second-order dynamics")


@dataclass(frozen=True, slots=True)
class FunctionMap:
    """A layer without controls.

    Attributes:
        function: (N, *before) to (N, *after), sample by sample.
    """

    function: Function
    dense: ClassVar[bool] = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Map.forward`."""
        return self.function(x.flatten(0, 1)).unflatten(0, x.shape[:2]), x

    def again(self, x: Tensor, tape: Tape) -> Tensor:
        """See `Map.again`."""
        return self.forward(x)[0]

    def jacobian(self, tape: Tape) -> FunctionJacobian:
        """See `Map.jacobian`."""
        assert tape.kept is not None
        return FunctionJacobian(self.function, tape.kept.flatten(0, 1), tape)


@dataclass(frozen=True, slots=True)
class GradientContraction:
    """S of a layer whose per-sample gradients are built.

    Attributes:
        layer, inputs, u: the layer at its nominal point.
        scale: m, (R, 1, J); None is one.
        rate: η, (R, 1, 1).
    """

    layer: FunctionAffine
    inputs: Tensor
    u: Tensor
    scale: Tensor | None
    rate: Tensor

    def apply(self, columns: Tensor) -> Tensor:
        """See `Contraction.apply`."""
        refuse("a dense V_xx")

    def forms(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `Contraction.forms` (Eq. 17)."""
        both = rows.unbind(dim=2)
        Q_u, q_u = (self.layer.per_sample_gradients(v, self.inputs, self.u) for v in both)
        weighted = q_u if self.scale is None else q_u * self.scale
        return (
            self.rate * (weighted * q_u).sum(dim=-1, keepdim=True),
            self.rate * (weighted * Q_u).sum(dim=-1, keepdim=True),
        )


@dataclass(frozen=True, slots=True)
class FunctionAffine:
    """A layer with controls u (R, 1, J), all its parameters in a row.

    Attributes:
        function: one sample (*shape) and its controls (J,) to one output.
    """

    function: Controlled
    dense: ClassVar[bool] = False
    kronecker: ClassVar[bool] = False

    def shape(self, inputs: Tensor) -> Shape:
        """See `Affine.shape`."""
        return tuple(inputs.shape[2:])

    def prepare(self, x: Tensor) -> Tensor:
        """See `Affine.prepare`."""
        return x

    def forward(self, inputs: Tensor, u: Tensor) -> Tensor:
        """See `Affine.forward`."""
        return self._batched()(inputs, u[:, 0])

    def difference(self, inputs: Tensor, nominal: Tensor) -> Tensor:
        """See `Affine.difference`."""
        return inputs - nominal

    def pull_back(self, rows: Tensor, inputs: Tensor, u: Tensor) -> Tensor:
        """See `Affine.pull_back`."""
        with torch.inference_mode(False), torch.enable_grad():
            controls = u[:, 0].clone()
            pull = vjp(lambda x: self._batched()(x, controls), inputs.clone())[1]
            return torch.stack([pull(row.clone())[0] for row in rows.unbind(dim=2)], dim=2)

    def push_forward(self, dx: Tensor, inputs: Tensor, u: Tensor) -> Tensor:
        """See `Affine.push_forward`."""
        with torch.inference_mode(False):
            controls = u[:, 0].clone()
            forward = self._batched()
            pushed: Tensor = jvp(lambda x: forward(x, controls), (inputs.clone(),), (dx.clone(),))[1]
        return pushed

    def matrix(self, inputs: Tensor, u: Tensor) -> Tensor:
        """See `Affine.matrix`."""
        refuse("a dense V_xx")

    def push_controls(self, inputs: Tensor, u: Tensor, du: Tensor) -> Tensor:
        """See `Affine.push_controls`."""
        with torch.inference_mode(False):
            x, forward = inputs.clone(), self._batched()
            pushed: Tensor = jvp(lambda c: forward(x, c), (u[:, 0].clone(),), (du[:, 0].clone(),))[1]
        return pushed

    def gradient(self, V_h: Tensor, inputs: Tensor, u: Tensor) -> Tensor:
        """See `Affine.gradient`."""
        return self.per_sample_gradients(V_h, inputs, u).sum(dim=1, keepdim=True)

    def tangent_gradient(self, V_h: Tensor, dx: Tensor, u: Tensor) -> Tensor:
        """See `Affine.tangent_gradient`."""
        refuse("second-order dynamics")

    def mean_square(self, V_h: Tensor, inputs: Tensor, u: Tensor, basis: FactoredInverse) -> Tensor:
        """See `Affine.mean_square`."""
        gradients = self.per_sample_gradients(V_h, inputs, u)
        return (gradients * gradients).mean(dim=1, keepdim=True)

    def covariances(self, V_h: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """See `Affine.covariances`."""
        refuse("Kronecker factors")

    def covariance_rows(self, V_h: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """See `Affine.covariance_rows`."""
        refuse("Kronecker factors")

    def contraction(
        self, inputs: Tensor, u: Tensor, inverse: FactoredInverse, rate: Tensor
    ) -> GradientContraction:
        """See `Affine.contraction`."""
        return GradientContraction(self, inputs, u, inverse.scale, rate)

    def mixed_terms(
        self, V_h: Tensor, inputs: Tensor, u: Tensor, inverse: FactoredInverse, rate: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Affine.mixed_terms`."""
        refuse("second-order dynamics")

    def per_sample_gradients(self, V_h: Tensor, inputs: Tensor, u: Tensor) -> Tensor:
        """Return g_uᵀ V_h, (R, B, J)."""

        def one(x: Tensor, controls: Tensor, v: Tensor) -> Tensor:
            gradient: Tensor = vjp(lambda c: self.function(x, c), controls)[1](v)[0]
            return gradient

        with torch.inference_mode(False), torch.enable_grad():
            per_run = vmap(one, in_dims=(0, None, 0))
            gradients: Tensor = vmap(per_run)(inputs.clone(), u[:, 0].clone(), V_h.clone())
        return gradients

    def _batched(self) -> Callable[[Tensor, Tensor], Tensor]:
        return vmap(vmap(self.function, in_dims=(0, None)))
