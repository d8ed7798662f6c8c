"""The affine layer g(x, u) = u x̄, with u = [W, b] and x̄ = [x, 1], for a pack of runs.

Index legend: r run in the pack, b sample, i inputs, ī inputs and the constant one, o outputs.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from ddpnopt import linalg


def augment(x: Tensor) -> Tensor:
    """Append the one that carries the bias: x (…, i) to x̄ (…, ī)."""
    return pad(x, (0, 1), value=1.0)


def weight(u: Tensor) -> Tensor:
    """Return the view W (R, o, i) of u = [W, b] (R, o, ī)."""
    return u[..., :-1]


def forward(x_bar: Tensor, u: Tensor) -> Tensor:
    """Return h = x̄ uᵀ: (R, B, ī), (R, o, ī) to (R, B, o)."""
    return linalg.bmm(x_bar, u.mT)


def gradient(V_h: Tensor, x_bar: Tensor) -> Tensor:
    """Sum over the batch the gradient with respect to u, Σ_b V_h x̄ᵀ.

    Args:
        V_h: (R, B, o).
        x_bar: (R, B, ī).

    Returns:
        (R, o, ī).
    """
    return linalg.bmm(V_h.mT, x_bar)


def pull_back(V_h: Tensor, u: Tensor) -> Tensor:
    """Return Wᵀ V_h, (R, B, o) to (R, B, i): a gradient (or any row vector) before the layer."""
    return linalg.bmm(V_h, weight(u))


def push_forward(dx: Tensor, u: Tensor) -> Tensor:
    """Return W δx, (R, B, i) to (R, B, o)."""
    return linalg.bmm(dx, weight(u).mT)


def jacobian_product(V_hh: Tensor, u: Tensor) -> Tensor:
    """Return A = V_hh W for each sample: Q_ux is x̄ ⊗ A and is never built.

    Args:
        V_hh: (R, B, o, o).
        u: (R, o, ī).

    Returns:
        (R, B, o, i).
    """
    runs, batch, outputs, _ = V_hh.shape
    return linalg.bmm(V_hh.flatten(1, 2), weight(u)).reshape(runs, batch, outputs, -1)
