"""Layers that move or mask entries: Flatten, Reshape, Dropout.

Index legend: r run in the pack, b sample, k row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ddpnopt.layers.activations import Diagonal
from ddpnopt.layers.base import Shape, Tape


@dataclass(frozen=True, slots=True)
class Rearranged:
    """The Jacobian of a change of shape."""

    tape: Tape

    def pull_back(self, rows: Tensor) -> Tensor:
        """See `Jacobian.pull_back`."""
        return rows.reshape(*rows.shape[:3], *self.tape.before)

    def push_forward(self, dx: Tensor) -> Tensor:
        """See `Jacobian.push_forward`."""
        return dx.reshape(*dx.shape[:2], *self.tape.after)

    def congruence(self, V_xx: Tensor) -> Tensor:
        """See `Jacobian.congruence`: entries are flattened in the same order before and after."""
        return V_xx

    def second_derivative(self, V_x: Tensor) -> None:
        """See `Jacobian.second_derivative`."""


@dataclass(frozen=True, slots=True)
class Reshape:
    """Give each sample another shape.

    Attributes:
        shape: after it; one entry may be -1.
    """

    shape: Shape
    dense: ClassVar[bool] = True

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """See `Map.forward`."""
        return x.reshape(*x.shape[:2], *self.shape), None

    def again(self, x: Tensor, tape: Tape) -> Tensor:
        """See `Map.again`."""
        return self.forward(x)[0]

    def jacobian(self, tape: Tape) -> Rearranged:
        """See `Map.jacobian`."""
        return Rearranged(tape)


FLATTEN = Reshape((-1,))


@dataclass(frozen=True, slots=True)
class Dropout:
    """Zero entries with probability p and scale the others; both forward passes share the mask.

    Attributes:
        p: probability of a zero.
        training: whether masks are drawn at all, asked at every forward pass.
    """

    p: float
    training: Callable[[], bool]
    dense: ClassVar[bool] = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Map.forward`. The mask comes from torch's global generator."""
        if not self.training() or self.p == 0:
            return x, None
        kept = (torch.rand_like(x) >= self.p).to(x.dtype)
        mask = kept if self.p == 1 else kept / (1 - self.p)
        return x * mask, mask

    def again(self, x: Tensor, tape: Tape) -> Tensor:
        """See `Map.again`."""
        return x if tape.kept is None else x * tape.kept

    def jacobian(self, tape: Tape) -> Diagonal | Rearranged:
        """See `Map.jacobian`."""
        return Rearranged(tape) if tape.kept is None else Diagonal(tape.kept, None)
