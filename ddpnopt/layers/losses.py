"""Terminal costs φ with the derivatives that the backward pass starts from, per sample.

Targets are labels (R, B) int64; the squared error also takes values (R, B, C). Adding a loss: a row in
`LOSSES` (and in `config.Loss`).

Index legend: r run in the pack, b sample, c classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from ddpnopt.config import MMC_NORM

Derivative = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Loss:
    """A terminal cost.

    Attributes:
        value: (x_T (R, B, C), targets) to φ per sample, (R, B).
        gradient: the same to ∇φ, (R, B, C).
        hessian: the same to ∇²φ, (R, B, C, C).
        both: the same to φ and ∇φ, where they share their work; None where they have none to share.
    """

    value: Derivative
    gradient: Derivative
    hessian: Derivative
    both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def value_and_gradient(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return φ (R, B) and ∇φ (R, B, C)."""
        if self.both is None:
            return self.value(x, targets), self.gradient(x, targets)
        return self.both(x, targets)


def _log_probabilities(logits: Tensor) -> Tensor:
    # In steps: torch.log_softmax takes three times as long for a few classes and many samples.
    shifted = logits - logits.amax(-1, True)
    return shifted.sub_(shifted.exp().sum(-1, True).log_())


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return _log_probabilities(logits).gather(-1, targets.unsqueeze(-1)).squeeze(-1).neg_()


def _cross_entropy_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    return _cross_entropy_and_gradient(logits, targets)[1]


def _cross_entropy_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p, labels = _log_probabilities(logits), targets.unsqueeze(-1)
    value = log_p.gather(-1, labels).squeeze(-1).neg_()
    return value, log_p.exp_().scatter_add_(-1, labels, log_p.new_full((), -1.0).expand(labels.shape))


def _cross_entropy_hessian(logits: Tensor, targets: Tensor) -> Tensor:
    p = torch.softmax(logits, dim=-1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def one_hot(x: Tensor, targets: Tensor) -> Tensor:
    """Return labels (R, B) as (R, B, C) of the kind of x; values stay as they are."""
    if targets.dim() == x.dim():
        return targets
    return torch.zeros_like(x).scatter_(-1, targets.unsqueeze(-1), 1.0)


def max_mahalanobis_centers(classes: int, norm: float = MMC_NORM) -> Tensor:
    """Return the centres μ of the Max-Mahalanobis distribution (Pang et al., ICLR 2020, arXiv:1905.10626).

    They are the corners of a regular simplex about zero: |μ_c|² is the norm C_MM and μ_c · μ_d is
    -C_MM / (C - 1). In C dimensions they may be turned at will; here μ_c is along e_c - 1/C, so that the
    nearest centre of x is that of its largest entry.

    Args:
        classes: C, at least 2.
        norm: C_MM.

    Returns:
        (C, C) float64, a centre in each row.
    """
    simplex = torch.eye(classes, dtype=torch.float64) - 1 / classes
    return math.sqrt(norm * classes / (classes - 1)) * simplex


@lru_cache(maxsize=32)
def _centers(classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # A tensor made in inference mode would stay one, and could not be used outside.
    with torch.inference_mode(False):
        return max_mahalanobis_centers(classes).to(dtype=dtype, device=device)


def _center(x: Tensor, targets: Tensor) -> Tensor:
    return _centers(x.shape[-1], x.dtype, x.device)[targets]


def _scaled_identity(x: Tensor, factor: float) -> Tensor:
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) * factor
    return identity.expand(*x.shape, x.shape[-1])


LOSSES: Final[Mapping[str, Loss]] = {
    "cross_entropy": Loss(
        _cross_entropy, _cross_entropy_gradient, _cross_entropy_hessian, _cross_entropy_and_gradient
    ),
    # φ = ½|x - y|²
    "mse": Loss(
        lambda x, y: (x - one_hot(x, y)).square().sum(dim=-1) / 2,
        lambda x, y: x - one_hot(x, y),
        lambda x, y: _scaled_identity(x, 1.0),
    ),
    # φ = |x - μ_y|², Max-Mahalanobis center
    "mmc": Loss(
        lambda x, y: (x - _center(x, y)).square().sum(dim=-1),
        lambda x, y: 2 * (x - _center(x, y)),
        lambda x, y: _scaled_identity(x, 2.0),
    ),
}
