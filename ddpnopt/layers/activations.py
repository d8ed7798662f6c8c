"""Activations σ and their derivatives. Adding one: a row in `ACTIVATIONS` (and in `config.Activation`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise σ.

    Attributes:
        forward: h to σ(h), same shape.
        slope: (h, σ(h)) to σ'(h); None where σ' is one everywhere, which saves a product a layer.
    """

    forward: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor] | None


def _sigmoid(h: Tensor) -> Tensor:
    # Not torch.sigmoid: its vector body and scalar tail round differently, which would make a run's bits
    # depend on its place in the pack. exp does not.
    return torch.exp(-h).add_(1).reciprocal_()


ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "tanh": Activation(torch.tanh, lambda h, x: 1 - x * x),
    "relu": Activation(torch.relu, lambda h, x: (h > 0).to(h.dtype)),
    "sigmoid": Activation(_sigmoid, lambda h, x: x * (1 - x)),
    "identity": Activation(lambda h: h, None),
}
