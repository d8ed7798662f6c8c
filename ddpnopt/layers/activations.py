"""Elementwise activations σ with their first and second derivatives.

Adding one: a row in `ACTIVATIONS` (and in `config.Activation` for a sweep's nets, in `modules` for
torch.nn's).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ddpnopt.layers.base import Tape

Elementwise = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class Diagonal:
    """The Jacobian of an elementwise map.

    Attributes:
        slope: σ'(h), (R, B, *shape).
        bend: returns σ''(h), (R, B, *shape); None where it vanishes.
    """

    slope: Tensor
    bend: Callable[[], Tensor] | None

    def pull_back(self, rows: Tensor) -> Tensor:
        """See `Jacobian.pull_back`."""
        return self.slope.unsqueeze(2) * rows

    def push_forward(self, dx: Tensor) -> Tensor:
        """See `Jacobian.push_forward`."""
        return self.slope * dx

    def congruence(self, V_xx: Tensor) -> Tensor:
        """See `Jacobian.congruence`."""
        slope = self.slope.flatten(2)
        return slope.unsqueeze(-1) * V_xx * slope.unsqueeze(-2)

    def second_derivative(self, V_x: Tensor) -> Tensor | None:
        """See `Jacobian.second_derivative`."""
        return None if self.bend is None else V_x * self.bend()


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise σ.

    Attributes:
        value: h to σ(h), same shape.
        slope: what is kept to σ'(h).
        bend: the same to σ''(h); None where it vanishes.
        keeps_output: whether the derivatives are taken from σ(h) instead of h.
    """

    value: Elementwise
    slope: Elementwise
    bend: Elementwise | None
    keeps_output: bool
    dense: bool = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Map.forward`."""
        y = self.value(x)
        return y, y if self.keeps_output else x

    def again(self, x: Tensor, tape: Tape) -> Tensor:
        """See `Map.again`."""
        return self.value(x)

    def jacobian(self, tape: Tape) -> Diagonal:
        """See `Map.jacobian`."""
        kept, bend = tape.kept, self.bend
        assert kept is not None
        return Diagonal(self.slope(kept), None if bend is None else lambda: bend(kept))


def _sigmoid(h: Tensor) -> Tensor:
    # Not torch.sigmoid: its vector body and scalar tail round differently, which would make a run's bits
    # depend on its place in the pack. exp does not.
    return torch.exp(-h).add_(1).reciprocal_()


def _tanh_bend(y: Tensor) -> Tensor:
    return -2 * y * (1 - y * y)


def _sigmoid_bend(y: Tensor) -> Tensor:
    return y * (1 - y) * (1 - 2 * y)


def _normal_density(h: Tensor) -> Tensor:
    return torch.exp(-0.5 * h * h) * (1 / math.sqrt(2 * math.pi))


def _normal_probability(h: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(h * math.sqrt(0.5)))


GELU: Final = Activation(
    lambda h: h * _normal_probability(h),
    lambda h: _normal_probability(h) + h * _normal_density(h),
    lambda h: (2 - h * h) * _normal_density(h),
    keeps_output=False,
)


def leaky_relu(negative_slope: float = 0.01) -> Activation:
    """Return h where h > 0, else `negative_slope` times h."""
    return Activation(
        lambda h: torch.where(h > 0, h, h * negative_slope),
        lambda h: torch.full_like(h, negative_slope).masked_fill_(h > 0, 1.0),
        None,
        keeps_output=False,
    )


ACTIVATIONS: Final[Mapping[str, Activation | None]] = {
    "tanh": Activation(torch.tanh, lambda y: 1 - y * y, _tanh_bend, keeps_output=True),
    "relu": Activation(torch.relu, torch.sign, None, keeps_output=True),
    "sigmoid": Activation(_sigmoid, lambda y: y * (1 - y), _sigmoid_bend, keeps_output=True),
    "gelu": GELU,
    "leaky_relu": leaky_relu(),
    "identity": None,
}
"""Each activation by the name it has in a spec; the identity is no layer at all."""
