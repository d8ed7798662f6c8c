"""Pooling over images. Both are linear once the trajectory is fixed: a max pool picks, a mean pool averages.

Index legend: r run in the pack, b sample, k row, c channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ddpnopt.layers.base import Tape, congruence

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Selection:
    """The Jacobian of a max pool: each output is one entry of its channel.

    Attributes:
        indices: the picked positions of the flattened image, (R, B, c, H', W') int64.
        tape: of the pool.
    """

    indices: Tensor
    tape: Tape

    def pull_back(self, rows: Tensor) -> Tensor:
        """See `Jacobian.pull_back`; windows that overlap add up."""
        *before, height, width = (*rows.shape[:3], *self.tape.before)
        zeros = rows.new_zeros(*before, height * width)
        indices = self.indices.flatten(3).unsqueeze(2).expand(*before, -1)
        pulled: Tensor = zeros.scatter_add_(-1, indices, rows.flatten(4)).unflatten(-1, (height, width))
        return pulled

    def push_forward(self, dx: Tensor) -> Tensor:
        """See `Jacobian.push_forward`."""
        return dx.flatten(3).gather(-1, self.indices.flatten(3)).reshape(self.indices.shape)

    def congruence(self, V_xx: Tensor) -> Tensor:
        """See `Jacobian.congruence`."""
        return congruence(self, V_xx, self.tape)

    def second_derivative(self, V_x: Tensor) -> None:
        """See `Jacobian.second_derivative`."""


@dataclass(frozen=True, slots=True)
class MaxPool2d:
    """The maximum of each window, as torch.nn.MaxPool2d."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False
    dense: ClassVar[bool] = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Map.forward`."""
        y, indices = functional.max_pool2d(
            x.flatten(0, 1),
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            return_indices=True,
        )
        lead = x.shape[:2]
        return y.unflatten(0, lead), indices.unflatten(0, lead)

    def again(self, x: Tensor, tape: Tape) -> Tensor:
        """See `Map.again`: another x may pick other entries."""
        return self.forward(x)[0]

    def jacobian(self, tape: Tape) -> Selection:
        """See `Map.jacobian`."""
        assert tape.kept is not None
        return Selection(tape.kept, tape)


@dataclass(frozen=True, slots=True)
class Average:
    """The Jacobian of a mean pool, which is the pool itself."""

    pool: AvgPool2d
    tape: Tape

    def pull_back(self, rows: Tensor) -> Tensor:
        """See `Jacobian.pull_back`."""
        pool = self.pool
        lead = rows.shape[:3]
        like = rows.new_empty(rows[..., 0, 0, 0].numel(), *self.tape.before)
        flat: Tensor = torch.ops.aten.avg_pool2d_backward(
            rows.flatten(0, 2),
            like,
            pool.kernel,
            pool.stride,
            pool.padding,
            pool.ceil_mode,
            pool.count_include_pad,
            None,
        )
        pulled: Tensor = flat.unflatten(0, lead)
        return pulled

    def push_forward(self, dx: Tensor) -> Tensor:
        """See `Jacobian.push_forward`."""
        return self.pool.forward(dx)[0]

    def congruence(self, V_xx: Tensor) -> Tensor:
        """See `Jacobian.congruence`."""
        return congruence(self, V_xx, self.tape)

    def second_derivative(self, V_x: Tensor) -> None:
        """See `Jacobian.second_derivative`."""


@dataclass(frozen=True, slots=True)
class AvgPool2d:
    """The mean of each window, as torch.nn.AvgPool2d."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    dense: ClassVar[bool] = True

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """See `Map.forward`."""
        y = functional.avg_pool2d(
            x.flatten(0, 1), self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        )
        return y.unflatten(0, x.shape[:2]), None

    def again(self, x: Tensor, tape: Tape) -> Tensor:
        """See `Map.again`."""
        return self.forward(x)[0]

    def jacobian(self, tape: Tape) -> Average:
        """See `Map.jacobian`."""
        return Average(self, tape)
