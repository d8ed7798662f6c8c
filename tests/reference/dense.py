"""DDPNOpt for one run, one sample at a time, by dense matrices and automatic differentiation, in float64.

The slow twin of `ddpnopt`, with which it shares no code. Nothing here knows that Q_ux is x̄ ⊗ A or that V_xx
may be an outer product: Q(x, u) = V'(f(x, u)) is written down with V' quadratic and f linearised at the
nominal point, torch.func differentiates it with respect to the flattened control and the state, and every
formula of Eq. 6-8 is applied to the dense matrices as the paper prints it.

What `docs/units.md` and the docstrings of `ddpnopt.ddp` promise beyond the paper, stated densely:

    psd safeguard   Q_uu = I/η + Q's own second derivative in u, in the value step alone
    outer product   ε is in the feedback gain of the layer that receives V_xx, and nowhere else;
                    "clamp" projects V_xx onto the positive semi-definite matrices

Index legend: t layer, b sample, i inputs, ī inputs and the constant one, o outputs, p = o·ī controls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev

Function: TypeAlias = Callable[[Tensor], Tensor]

SIGMA: Final[Mapping[str, Function]] = {
    "tanh": torch.tanh,
    "relu": lambda h: h.clamp_min(0),
    "sigmoid": lambda h: (1 + torch.tanh(h / 2)) / 2,
    "identity": lambda h: h,
}


@dataclass(frozen=True)
class Options:
    """The numbers and choices of one run; the names are those of `ddpnopt.config`."""

    learning_rate: float
    vxx_reg: float = 0.0
    terminal_hessian: str = "exact"
    factorized: bool = False
    convention: str = "batch_mean"
    safeguard: str = "clamp"
    curvature_scale: float = 1.0


@dataclass(frozen=True)
class Value:
    """The value function before a layer, of one sample.

    Attributes:
        V_x: (n,).
        V_xx: (n, n), as the value step of the layer before takes it.
        V_xx_feedback: (n, n), as that layer's feedback gain takes it.
    """

    V_x: Tensor
    V_xx: Tensor
    V_xx_feedback: Tensor


@dataclass(frozen=True)
class Derivatives:
    """The derivatives of Q at the nominal point: (p,), (i,), (p, p), (p, i), (i, i)."""

    Q_u: Tensor
    Q_x: Tensor
    Q_uu: Tensor
    Q_ux: Tensor
    Q_xx: Tensor


@dataclass(frozen=True)
class Layer:
    """What the backward pass finds at one layer for one sample.

    Attributes:
        x: (i,), the nominal state.
        Q: derivatives by the feedback's V_xx.
        k: (p,), the open-loop gain.
        K: (p, i), the feedback gain.
        closed_loop: (o, i), ∂h/∂x under the policy that the value step assumes.
        before: the value before the layer, ε included.
    """

    x: Tensor
    Q: Derivatives
    k: Tensor
    K: Tensor
    closed_loop: Tensor
    before: Value


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return φ of one sample: logits (C,), target () to ()."""
    return torch.logsumexp(logits, dim=0) - (logits * torch.nn.functional.one_hot(target, len(logits))).sum()


def affine(x: Tensor, u: Tensor) -> Tensor:
    """Return h = u x̄ for one sample: x (i,), u (o, ī) to (o,)."""
    return u @ torch.cat((x, torch.ones_like(x[:1])))


def terminal(logits: Tensor, target: Tensor, options: Options, batch: int) -> Value:
    """Return the value at T of one sample; it bears no ε."""
    gradient = grad(cross_entropy)(logits, target)
    if options.terminal_hessian == "exact":
        H = hessian(cross_entropy)(logits, target)
    else:
        H = torch.outer(gradient, gradient)
    if options.convention == "batch_mean":
        gradient, H = gradient / batch, H / batch**2
    V_xx = options.curvature_scale * H
    return Value(gradient, V_xx, V_xx)


def action_value(sigma: Function, x: Tensor, u: Tensor, V_x: Tensor, V_xx: Tensor) -> Derivatives:
    """Differentiate Q(x, u) = V'(f(x, u)), V' quadratic about the nominal next state and f linearised.

    Args:
        sigma: σ.
        x: (i,), nominal.
        u: (o, ī), nominal.
        V_x: (o,).
        V_xx: (o, o).
    """
    flat, p = u.flatten(), u.numel()

    def f(v: Tensor) -> Tensor:
        return sigma(affine(v[p:], v[:p].reshape(u.shape)))

    nominal = torch.cat((flat, x))
    jacobian: Tensor = jacrev(f)(nominal)

    def Q(v: Tensor) -> Tensor:
        dx = jacobian @ (v - nominal)
        return V_x @ dx + dx @ V_xx @ dx / 2

    first, second = grad(Q)(nominal), jacrev(grad(Q))(nominal)
    return Derivatives(first[:p], first[p:], second[:p, :p], second[:p, p:], second[p:, p:])


def value(Q: Derivatives, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return V_x, V_xx (Eq. 8, without ε) and the feedback gain (p, i) that they assume."""
    Q_uu = torch.eye(len(Q.Q_u), dtype=Q.Q_u.dtype) / options.learning_rate
    if options.safeguard == "psd":
        Q_uu = Q_uu + Q.Q_uu
    K = -torch.linalg.solve(Q_uu, Q.Q_ux)
    V_x = Q.Q_x + K.T @ Q.Q_u
    V_xx = Q.Q_xx + K.T @ Q.Q_ux
    if options.factorized and options.safeguard == "clamp":
        V_xx = V_xx * (torch.trace(V_xx) > 0)  # of rank one: its trace is its one eigenvalue
    return V_x, V_xx, K


def backward_step(sigma: Function, x: Tensor, u: Tensor, after: Value, options: Options) -> Layer:
    """Do one layer of the Bellman sweep for one sample."""
    Q = action_value(sigma, x, u, after.V_x, after.V_xx_feedback)
    same = after.V_xx is after.V_xx_feedback
    Q_value = Q if same else action_value(sigma, x, u, after.V_x, after.V_xx)
    V_x, V_xx, K_value = value(Q_value, options)
    by_u, by_x = jacrev(lambda w: affine(x, w.reshape(u.shape)))(u.flatten()), u[:, :-1]
    damped = V_xx + options.vxx_reg * torch.eye(len(x), dtype=x.dtype)
    return Layer(
        x,
        Q,
        k=-options.learning_rate * Q.Q_u,
        K=-options.learning_rate * Q.Q_ux,
        closed_loop=by_x + by_u @ K_value,
        before=Value(V_x, V_xx if options.factorized else damped, damped),
    )


def backward(
    controls: Sequence[Tensor],
    sigmas: Sequence[Function],
    x: Tensor,
    target: Tensor,
    options: Options,
    batch: int,
) -> list[Layer]:
    """Sweep one sample from the loss to the input; return the layers t = 0..T-1.

    Args:
        controls: u_t, each (n_{t+1}, n_t + 1).
        sigmas: σ_t.
        x: (n_0,).
        target: (), the label.
        options: of the run.
        batch: B.
    """
    states = [x]
    for u, sigma in zip(controls, sigmas, strict=True):
        states.append(sigma(affine(states[-1], u)))
    after = terminal(states[-1], target, options, batch)
    layers: list[Layer] = []
    for t in range(len(controls) - 1, -1, -1):
        layers.append(backward_step(sigmas[t], states[t], controls[t], after, options))
        after = layers[-1].before
    return layers[::-1]


def step(
    controls: Sequence[Tensor], sigmas: Sequence[Function], inputs: Tensor, targets: Tensor, options: Options
) -> list[Tensor]:
    """Return the controls after one update (Alg. 3).

    Args:
        controls: u_t, each (n_{t+1}, n_t + 1).
        sigmas: σ_t.
        inputs: (B, n_0).
        targets: (B,).
        options: of the run.
    """
    batch = len(inputs)
    samples = [backward(controls, sigmas, x, y, options, batch) for x, y in zip(inputs, targets, strict=True)]
    weight = 1 if options.convention == "batch_mean" else 1 / batch
    x_hats, updated = list(inputs), []
    for t, (u, sigma) in enumerate(zip(controls, sigmas, strict=True)):
        change = torch.zeros(u.numel(), dtype=u.dtype)
        for x_hat, layers in zip(x_hats, samples, strict=True):
            change = change + layers[t].k + layers[t].K @ (x_hat - layers[t].x)
        u_new = u + weight * change.reshape(u.shape)
        x_hats = [sigma(affine(x_hat, u_new)) for x_hat in x_hats]
        updated.append(u_new)
    return updated
