"""Every variant of DDPNOpt, one sample at a time, by dense matrices and automatic differentiation in float64.

The slow twin of `ddpnopt`, with which it shares no code. Nothing here knows that Q_ux is x̄ ⊗ A, that V_xx
may be an outer product, or how a convolution is transposed. A layer is two functions of one sample, g(x, u)
and σ(h), which torch.func differentiates with respect to the flattened control and state; Eq. 6-8 are applied
to the dense matrices as the paper prints them.

What is a choice of this project and not the paper's, stated densely:

    weight decay    the stage cost ℓ(u) = w λ/2 |u|², w = 1/B under `batch_mean` and 1 under `per_sample`, so
                    that λu enters Σ̄ Q_u once; λI is not put into Q_uu, which is M/η
    first order     Q(x, u) = ℓ(u) + V'(f(x, u)) with V' quadratic and f linearised in (x, u) at the nominal
                    point: its derivatives are f_xuᵀ V_x' and f_xuᵀ V_xx' f_xu
    second order    f is left as it is (Eq. 26) and torch.func differentiates Q twice: g is bilinear in
                    (x, u), so that σ_hh and g_ux are all the second derivatives f has
    psd safeguard   Q_uu = M/η + the second derivative of V'(f(x, u)) in u, in the value step alone
    factorized      ε is in the feedback gain of the layer that receives V_xx, and nowhere else; "clamp"
                    projects V_xx, of rank one, onto the positive semi-definite matrices
    ε               is added to V_xx before the layers t = T-1..1, neither at T nor before the first layer

Index legend: t layer of T, b sample of B, n entries of a state, m entries of h, p = o·ī controls (row-major
in (o, ī)), o outputs, ī inputs and the constant one. States and h have any shape and are flattened row-major
wherever a shape below says (n,) or (m,).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev
from torch.nn import functional

from tests.reference.preconditioners import Identity, Observation

Map: TypeAlias = Callable[[Tensor], Tensor]
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Pair: TypeAlias = int | tuple[int, int]


class Preconditioner(Protocol):
    """See `tests.reference.preconditioners`."""

    def observe(self, seen: Observation) -> Tensor: ...

    def direction(self, d: Tensor) -> Tensor: ...


# --- Nets -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One layer, x' = σ(g(x, u)).

    Attributes:
        g: (x, u (o, ī)) to h of one sample, bilinear in x̄ and u; h's first dimension is o.
        sigma: h to the next state: one function, or one per sample of the batch (dropout).
        u_shape: (o, ī).
        groups: of a convolution.
    """

    g: Callable[[Tensor, Tensor], Tensor]
    sigma: Map | Sequence[Map]
    u_shape: tuple[int, int]
    groups: int = 1

    def sigma_of(self, b: int) -> Map:
        return self.sigma if callable(self.sigma) else self.sigma[b]

    def forward(self, x: Tensor, u: Tensor, b: int) -> Tensor:
        return self.sigma_of(b)(self.g(x, u))


def identity(h: Tensor) -> Tensor:
    return h


def linear(inputs: int, outputs: int, bias: bool = True, sigma: Map | Sequence[Map] = identity) -> Stage:
    """Return h = u x̄ for x (inputs,), u (outputs, inputs + 1) or, without a bias, (outputs, inputs)."""

    def g(x: Tensor, u: Tensor) -> Tensor:
        return u @ torch.cat((x, torch.ones_like(x[:1]))) if bias else u @ x

    return Stage(g, sigma, (outputs, inputs + bias))


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    bias: bool = True,
    sigma: Map | Sequence[Map] = identity,
) -> Stage:
    """Return h = ω * x + b for x (in_channels, height, width), u (out_channels, ω flattened [and b])."""
    size = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    weight_shape = (out_channels, in_channels // groups, *size)
    inputs = math.prod(weight_shape[1:])

    def g(x: Tensor, u: Tensor) -> Tensor:
        weight = u[:, :inputs].reshape(weight_shape)
        b = u[:, inputs] if bias else None
        return functional.conv2d(x.unsqueeze(0), weight, b, stride, padding, dilation, groups).squeeze(0)

    return Stage(g, sigma, (out_channels, inputs + bias), groups)


def relu(h: Tensor) -> Tensor:
    return torch.relu(h)


def gelu(h: Tensor) -> Tensor:
    return h * (1 + torch.erf(h / math.sqrt(2))) / 2


def leaky_relu(slope: float) -> Map:
    return lambda h: functional.leaky_relu(h, slope)


def max_pool2d(kernel: Pair, stride: Pair | None = None, padding: Pair = 0) -> Map:
    return lambda h: functional.max_pool2d(h.unsqueeze(0), kernel, stride, padding).squeeze(0)


def avg_pool2d(kernel: Pair, stride: Pair | None = None, padding: Pair = 0) -> Map:
    """Average over the kernel's area, the padding's zeros counted in."""
    return lambda h: functional.avg_pool2d(h.unsqueeze(0), kernel, stride, padding).squeeze(0)


def flatten(h: Tensor) -> Tensor:
    return h.flatten()


def dropout(mask: Tensor) -> Map:
    """Multiply by a mask of h's shape, 0 or 1/(1 - rate), that stays for the step."""
    return lambda h: h * mask


def chain(*maps: Map) -> Map:
    """Return the maps one after the other, the first one first."""

    def composed(h: Tensor) -> Tensor:
        for f in maps:
            h = f(h)
        return h

    return composed


ACTIVATIONS: Final[dict[str, Map]] = {
    "tanh": torch.tanh,
    "relu": relu,
    "sigmoid": torch.sigmoid,
    "gelu": gelu,
    "identity": identity,
}


# --- Losses of one sample: x_T (n,), y () or (n,), to () --------------------------------------------------


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Return φ = log Σ exp x_T - x_T[y]."""
    return torch.logsumexp(logits, dim=0) - (logits * functional.one_hot(label, len(logits))).sum()


def mse(outputs: Tensor, target: Tensor) -> Tensor:
    """Return φ = ½ |x_T - y|²; y is a vector of floats, or the one-hot vector of a label."""
    if not target.is_floating_point():
        target = functional.one_hot(target, len(outputs)).to(outputs.dtype)
    return ((outputs - target) ** 2).sum() / 2


def mmc(centers: Tensor) -> Loss:
    """Return φ = |x_T - μ_y|², the Max-Mahalanobis center loss (Pang et al. 2019, arXiv 1905.10626).

    Args:
        centers: μ (C, n), n ≥ C - 1, of equal norm, with inner products of -|μ|²/(C - 1).
    """
    return lambda outputs, label: ((outputs - centers[label]) ** 2).sum()


# --- Options ----------------------------------------------------------------------------------------------

CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "terminal_hessian": ("exact", "gauss_newton"),
    "dynamics": ("first_order", "second_order"),
    "convention": ("batch_mean", "per_sample"),
    "safeguard": ("clamp", "psd"),
}


@dataclass(frozen=True)
class Options:
    """The numbers and choices of one run.

    Attributes:
        learning_rate: η.
        vxx_reg: ε.
        curvature_scale: κ.
        weight_decay: λ.
        momentum: μ of buf ← μ buf + M⁻¹ d, u ← u - η buf.
        feedback: whether Q_ux is kept.
        preconditioner: what each layer gets a fresh copy of.
    """

    learning_rate: float
    vxx_reg: float = 0.0
    terminal_hessian: str = "exact"
    factorized: bool = False
    dynamics: str = "first_order"
    convention: str = "batch_mean"
    safeguard: str = "clamp"
    curvature_scale: float = 1.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    feedback: bool = True
    preconditioner: Preconditioner = field(default_factory=Identity)

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not one of {allowed}")
        if self.factorized and (self.dynamics, self.terminal_hessian) != ("first_order", "gauss_newton"):
            raise ValueError("factorized needs first_order dynamics and a gauss_newton terminal_hessian")

    def units(self, batch: int) -> int:
        """Return what a per-sample quantity of the sweep is multiplied with to be in units of φ."""
        return batch if self.convention == "batch_mean" else 1

    def total(self, per_sample: Tensor) -> Tensor:
        """Return Σ̄, (B, p) to (p,): the sum under `batch_mean`, the mean under `per_sample`."""
        return per_sample.sum(0) if self.convention == "batch_mean" else per_sample.mean(0)


# --- The backward pass ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Value:
    """The value function at one state of one sample.

    Attributes:
        V_x: (n,).
        V_xx: (n, n), as the value step of the layer before takes it.
        V_xx_feedback: (n, n), as that layer's policy takes it.
        V_xx_plain: (n, n), before ε was added.
    """

    V_x: Tensor
    V_xx: Tensor
    V_xx_feedback: Tensor
    V_xx_plain: Tensor


@dataclass(frozen=True)
class Point:
    """One layer at the nominal point of one sample.

    Attributes:
        f: (p + n,) to (n',): controls and state, flat, to the next state, flat.
        nominal: (p + n,), the controls and the state.
        x: (n,).
        h: (m,).
        next: (n',).
        h_u: (m, p), ∂h/∂u.
        h_x: (m, n), ∂h/∂x.
        sigma_h: (n', m), ∂σ/∂h.
    """

    f: Map
    nominal: Tensor
    x: Tensor
    h: Tensor
    next: Tensor
    h_u: Tensor
    h_x: Tensor
    sigma_h: Tensor


@dataclass(frozen=True)
class Derivatives:
    """The derivatives of Q at the nominal point.

    Attributes:
        Q_u: (p,), the decay's share included.
        Q_x: (n,).
        Q_uu: (p, p), of V'(f(x, u)) alone: what the psd safeguard adds to M/η.
        Q_ux: (p, n); zero without feedback.
        Q_xx: (n, n).
    """

    Q_u: Tensor
    Q_x: Tensor
    Q_uu: Tensor
    Q_ux: Tensor
    Q_xx: Tensor


@dataclass(frozen=True)
class Layer:
    """What the backward pass finds at one layer for one sample.

    Attributes:
        x: (n,), the nominal state.
        V_h: (m,), σ_hᵀ V_x'.
        Q: by the V_xx' of the policy.
        Q_value: by the V_xx' of the value step; the same but for factorized with ε.
        Q_uu: (p, p), as the value step inverts it.
        k: (p,), the open-loop gain -η M⁻¹ Q_u.
        K: (p, n), the feedback gain -η M⁻¹ Q_ux.
        closed_loop: (m, n), ∂h/∂x under the gain that the value step assumes.
        before: the value before the layer.
    """

    x: Tensor
    V_h: Tensor
    Q: Derivatives
    Q_value: Derivatives
    Q_uu: Tensor
    k: Tensor
    K: Tensor
    closed_loop: Tensor
    before: Value


@dataclass
class State:
    """What a run carries from step to step: per layer the preconditioner and the momentum buffer (p,)."""

    preconditioners: list[Preconditioner]
    buffers: list[Tensor | float]


@dataclass(frozen=True)
class Sweep:
    """The backward pass of one batch.

    Attributes:
        layers: [t][b].
        M: [t], (p, p).
        terminal: [b], the value at T.
        state: that after the pass; the one passed in is left alone.
    """

    layers: list[list[Layer]]
    M: list[Tensor]
    terminal: list[Value]
    state: State


def start(stages: Sequence[Stage], options: Options) -> State:
    """Return the state of a run before its first step."""
    return State([copy.deepcopy(options.preconditioner) for _ in stages], [0.0 for _ in stages])


def rollout(stages: Sequence[Stage], controls: Sequence[Tensor], x: Tensor, b: int) -> list[Tensor]:
    """Return the states x_0..x_T of sample b, in their shapes."""
    states = [x]
    for stage, u in zip(stages, controls, strict=True):
        states.append(stage.forward(states[-1], u, b))
    return states


def terminal_value(loss: Loss, x: Tensor, target: Tensor, options: Options, batch: int) -> Value:
    """Return the value at T of one sample, x (n,); it bears no ε."""
    gradient = grad(loss)(x, target)
    exact = options.terminal_hessian == "exact"
    H = hessian(loss)(x, target) if exact else torch.outer(gradient, gradient)
    units = options.units(batch)
    V_xx = options.curvature_scale * H / units**2
    return Value(gradient / units, V_xx, V_xx, V_xx)


def point(stage: Stage, x: Tensor, u: Tensor, b: int) -> Point:
    """Linearise g and σ for sample b at x, in its shape, and u (o, ī)."""
    p, sigma = u.numel(), stage.sigma_of(b)
    nominal = torch.cat((u.flatten(), x.flatten()))
    h = stage.g(x, u)

    def flat_g(v: Tensor) -> Tensor:
        return stage.g(v[p:].reshape(x.shape), v[:p].reshape(u.shape)).flatten()

    def flat_sigma(v: Tensor) -> Tensor:
        return sigma(v.reshape(h.shape)).flatten()

    jacobian = jacrev(flat_g)(nominal)
    return Point(
        f=lambda v: flat_sigma(flat_g(v)),
        nominal=nominal,
        x=x.flatten(),
        h=h.flatten(),
        next=sigma(h).flatten(),
        h_u=jacobian[:, :p],
        h_x=jacobian[:, p:],
        sigma_h=jacrev(flat_sigma)(h.flatten()),
    )


def action_value(at: Point, V_x: Tensor, V_xx: Tensor, options: Options, batch: int) -> Derivatives:
    """Differentiate Q(x, u) = ℓ(u) + V'(f(x, u)), V' quadratic about the nominal next state (Eq. 6, 12, 26).

    Args:
        at: the nominal point.
        V_x: (n',).
        V_xx: (n', n').
        options: of the run.
        batch: B.
    """
    p = at.h_u.shape[1]
    if options.dynamics == "first_order":
        f_xu = at.sigma_h @ torch.cat((at.h_u, at.h_x), dim=1)
        first, second = f_xu.T @ V_x, f_xu.T @ V_xx @ f_xu
    else:

        def next_value(v: Tensor) -> Tensor:
            dx = at.f(v) - at.next
            return V_x @ dx + dx @ V_xx @ dx / 2

        first, second = grad(next_value)(at.nominal), jacrev(grad(next_value))(at.nominal)
    decay = options.weight_decay / options.units(batch) * at.nominal[:p]
    Q_ux = second[:p, p:] if options.feedback else torch.zeros_like(second[:p, p:])
    return Derivatives(decay + first[:p], first[p:], second[:p, :p], Q_ux, second[p:, p:])


def observation(
    stage: Stage, u: Tensor, points: Sequence[Point], V_h: Sequence[Tensor], options: Options
) -> Observation:
    """Return what the preconditioner of a layer may know: u (o, ī), V_h (m,) per sample.

    x̄ comes out of h_u: h at output o and position l is u_o · x̄_l, with one x̄_l for all outputs of a group.
    """
    v = options.units(len(points)) * torch.stack(list(V_h))
    h_u = torch.stack([at.h_u for at in points])
    outputs, inputs = u.shape
    own = h_u.reshape(len(points), outputs, -1, outputs, inputs).diagonal(dim1=1, dim2=3)  # (B, l, ī, o)
    x_bar = own.permute(0, 3, 1, 2)[:, :: outputs // stage.groups]
    return Observation(
        u=u,
        weight_decay=options.weight_decay,
        x_bar=x_bar,
        v=v.reshape(len(points), outputs, -1),
        data_gradients=torch.einsum("bmp,bm->bp", h_u, v),
    )


def layer_step(
    at: Point, V_h: Tensor, M: Tensor, after: Value, options: Options, batch: int, first: bool
) -> Layer:
    """Do one layer of the Bellman recursion for one sample (Eq. 6-8).

    Args:
        at: the nominal point.
        V_h: (m,).
        M: (p, p).
        after: the value after the layer.
        options: of the run.
        batch: B.
        first: whether this is the layer t = 0.
    """
    eta = options.learning_rate
    Q = action_value(at, after.V_x, after.V_xx_feedback, options, batch)
    same = after.V_xx is after.V_xx_feedback
    Q_value = Q if same else action_value(at, after.V_x, after.V_xx, options, batch)
    own = Q_value.Q_uu if options.safeguard == "psd" else torch.zeros_like(M)
    K_value = -eta * torch.linalg.solve(M + eta * own, Q_value.Q_ux)
    V_x = Q_value.Q_x + K_value.T @ Q_value.Q_u
    V_xx = Q_value.Q_xx + K_value.T @ Q_value.Q_ux
    if options.factorized and options.safeguard == "clamp":
        V_xx = V_xx * (torch.trace(V_xx) > 0)  # of rank one: its trace is its one eigenvalue
    damped = V_xx if first else V_xx + options.vxx_reg * torch.eye(len(V_xx), dtype=V_xx.dtype)
    return Layer(
        x=at.x,
        V_h=V_h,
        Q=Q,
        Q_value=Q_value,
        Q_uu=M / eta + own,
        k=-eta * torch.linalg.solve(M, Q.Q_u),
        K=-eta * torch.linalg.solve(M, Q.Q_ux),
        closed_loop=at.h_x + at.h_u @ K_value,
        before=Value(V_x, V_xx if options.factorized else damped, damped, V_xx),
    )


def backward(
    stages: Sequence[Stage],
    controls: Sequence[Tensor],
    inputs: Tensor,
    targets: Tensor,
    loss: Loss,
    options: Options,
    state: State | None = None,
) -> Sweep:
    """Sweep a batch from the loss to the input, layer by layer: M_t first, by all samples, then their values.

    Args:
        stages: of t = 0..T-1.
        controls: u_t (o, ī).
        inputs: (B, *shape of x_0).
        targets: (B,) labels or (B, n) floats.
        loss: φ of one sample.
        options: of the run.
        state: after the step before; None at the first.
    """
    state = start(stages, options) if state is None else copy.deepcopy(state)
    batch = len(inputs)
    states = [rollout(stages, controls, x, b) for b, x in enumerate(inputs)]
    terminal = [
        terminal_value(loss, x[-1].flatten(), y, options, batch) for x, y in zip(states, targets, strict=True)
    ]
    layers: list[list[Layer]] = []
    Ms: list[Tensor] = []
    after = terminal
    for t in range(len(stages) - 1, -1, -1):
        points = [point(stages[t], x[t], controls[t], b) for b, x in enumerate(states)]
        V_h = [at.sigma_h.T @ value.V_x for at, value in zip(points, after, strict=True)]
        M = state.preconditioners[t].observe(observation(stages[t], controls[t], points, V_h, options))
        layers.append(
            [
                layer_step(at, v, M, value, options, batch, t == 0)
                for at, v, value in zip(points, V_h, after, strict=True)
            ]
        )
        Ms.append(M)
        after = [layer.before for layer in layers[-1]]
    return Sweep(layers[::-1], Ms[::-1], terminal, state)


# --- The update -------------------------------------------------------------------------------------------


def step(
    stages: Sequence[Stage],
    controls: Sequence[Tensor],
    inputs: Tensor,
    targets: Tensor,
    loss: Loss,
    options: Options,
    state: State | None = None,
) -> tuple[list[Tensor], State]:
    """Return the controls after one update (Alg. 3) and the state after it; arguments as of `backward`."""
    sweep = backward(stages, controls, inputs, targets, loss, options, state)
    state = sweep.state
    x_hats, updated = list(inputs), []
    for t, (stage, u) in enumerate(zip(stages, controls, strict=True)):
        d = options.total(
            torch.stack(
                [
                    layer.Q.Q_u + layer.Q.Q_ux @ (x_hat.flatten() - layer.x)
                    for layer, x_hat in zip(sweep.layers[t], x_hats, strict=True)
                ]
            )
        )
        preconditioned = torch.linalg.solve(sweep.M[t], state.preconditioners[t].direction(d))
        state.buffers[t] = options.momentum * state.buffers[t] + preconditioned
        u_new = u - options.learning_rate * state.buffers[t].reshape(u.shape)
        x_hats = [stage.forward(x_hat, u_new, b) for b, x_hat in enumerate(x_hats)]
        updated.append(u_new)
    return updated, state


def train(
    stages: Sequence[Stage],
    controls: Sequence[Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Loss,
    options: Options,
) -> list[Tensor]:
    """Return the controls after one update per batch, (inputs, targets), from a fresh state."""
    updated, state = list(controls), None
    for inputs, targets in batches:
        updated, state = step(stages, updated, inputs, targets, loss, options, state)
    return updated
