"""Terminal costs φ with the derivatives that the backward pass starts from, per sample.

Index legend: r run in the pack, b sample, c classes. Adding a loss: a row in `LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Loss:
    """A terminal cost.

    Attributes:
        value: (logits (R, B, C), targets (R, B)) to φ per sample, (R, B).
        gradient: the same to ∇φ, (R, B, C).
        hessian: the same to ∇²φ, (R, B, C, C).
    """

    value: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    hessian: Callable[[Tensor, Tensor], Tensor]


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits, dim=-1)
    return -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _cross_entropy_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    p = torch.softmax(logits, dim=-1)
    minus_one = torch.full_like(targets, -1, dtype=p.dtype).unsqueeze(-1)
    return p.scatter_add(-1, targets.unsqueeze(-1), minus_one)


def _cross_entropy_hessian(logits: Tensor, targets: Tensor) -> Tensor:
    p = torch.softmax(logits, dim=-1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


LOSSES: Final[Mapping[str, Loss]] = {
    "cross_entropy": Loss(_cross_entropy, _cross_entropy_gradient, _cross_entropy_hessian),
}
