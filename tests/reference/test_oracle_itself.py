"""The oracle against what needs no DDPNOpt: torch.optim, finite differences, closed forms, torch.nn."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian
from torch.nn import functional

from tests.reference.oracle import (
    ACTIVATIONS,
    Layer,
    Options,
    Stage,
    Value,
    avg_pool2d,
    backward,
    chain,
    conv2d,
    cross_entropy,
    dropout,
    flatten,
    gelu,
    leaky_relu,
    linear,
    max_pool2d,
    mmc,
    mse,
    observation,
    point,
    relu,
    step,
    train,
)
from tests.reference.preconditioners import EKFAC, KFAC, Adam, Identity, Observation, RMSprop

WIDTHS = (4, 3, 2)
BATCH = 3


def check_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def source(seed: int):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal


def fcn(
    activation: str = "tanh", widths: tuple[int, ...] = WIDTHS, seed: int = 0
) -> tuple[list[Stage], list[Tensor], Tensor, Tensor]:
    """Return stages, controls, inputs (B, n_0) and labels (B,)."""
    normal = source(seed)
    names = [activation] * (len(widths) - 2) + ["identity"]
    layers = list(zip(widths[:-1], widths[1:], names, strict=True))
    stages = [linear(i, o, sigma=ACTIVATIONS[name]) for i, o, name in layers]
    controls = [normal(*stage.u_shape) for stage in stages]
    return stages, controls, normal(BATCH, widths[0]), torch.arange(BATCH) % widths[-1]


def mean_loss(stages: list[Stage], controls: list[Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy by the stages alone."""
    outputs = []
    for b, x in enumerate(inputs):
        for stage, u in zip(stages, controls, strict=True):
            x = stage.forward(x, u, b)
        outputs.append(x)
    return functional.cross_entropy(torch.stack(outputs), targets)


def values_after(sweep, t: int) -> list[Value]:
    return [layer.before for layer in sweep.layers[t + 1]] if t + 1 < len(sweep.layers) else sweep.terminal


BASELINES = {
    "sgd": (Identity(), 0.9, lambda u: torch.optim.SGD(u, 0.1, momentum=0.9, weight_decay=0.02)),
    "rmsprop": (
        RMSprop(rho=0.9),
        0.5,
        lambda u: torch.optim.RMSprop(u, 0.1, alpha=0.9, momentum=0.5, weight_decay=0.02),
    ),
    "adam": (Adam(), 0.0, lambda u: torch.optim.Adam(u, 0.1, weight_decay=0.02)),
}


@pytest.mark.parametrize(
    ("convention", "off"),
    [("batch_mean", {"curvature_scale": 0.0}), ("per_sample", {"feedback": False, "vxx_reg": 0.3})],
)
@pytest.mark.parametrize("name", BASELINES)
def test_without_feedback_it_is_the_baseline(name, convention, off):
    stages, controls, inputs, targets = fcn()
    preconditioner, momentum, make = BASELINES[name]
    options = Options(
        0.1,
        convention=convention,
        momentum=momentum,
        weight_decay=0.02,
        preconditioner=preconditioner,
        **off,
    )
    batches = [(inputs + 0.1 * k, (targets + k) % WIDTHS[-1]) for k in range(20)]
    leaves = [u.clone().requires_grad_() for u in controls]
    optimizer = make(leaves)
    for x, y in batches:
        optimizer.zero_grad()
        functional.cross_entropy(
            functional.linear(
                functional.linear(x, leaves[0][:, :-1], leaves[0][:, -1]).tanh(),
                leaves[1][:, :-1],
                leaves[1][:, -1],
            ),
            y,
        ).backward()
        optimizer.step()
    for u, expected in zip(train(stages, controls, batches, cross_entropy, options), leaves, strict=True):
        check_close(u, expected.detach())


@pytest.mark.parametrize("convention", ["batch_mean", "per_sample"])
def test_per_sample_second_moment(convention):
    stages, controls, inputs, targets = fcn()
    preconditioner = RMSprop("per_sample", rho=0.9)
    options = Options(
        0.1, feedback=False, convention=convention, weight_decay=0.5, preconditioner=preconditioner
    )
    updated, _ = step(stages, controls, inputs, targets, cross_entropy, options)
    per_sample = [
        grad(lambda u, b=b: mean_loss(stages, u, inputs[b : b + 1], targets[b : b + 1]))(controls)
        for b in range(BATCH)
    ]
    for t, u in enumerate(controls):
        g = torch.stack([gradients[t] + 0.5 * u for gradients in per_sample])
        check_close(updated[t], u - 0.1 * g.mean(0) / ((0.1 * (g**2).mean(0)).sqrt() + 1e-8))


def test_one_layer_has_no_feedback():
    stages, controls, inputs, targets = fcn(widths=(4, 3))
    options = Options(0.3, vxx_reg=0.2, dynamics="second_order", safeguard="psd", weight_decay=0.1)
    (updated,), _ = step(stages, controls, inputs, targets, cross_entropy, options)
    (gradient,) = grad(lambda u: mean_loss(stages, u, inputs, targets))(controls)
    check_close(updated, controls[0] - 0.3 * (gradient + 0.1 * controls[0]))


@pytest.mark.parametrize("feedback", [True, False])
def test_feedback_aims_at_the_gradient_after_the_layers_before(feedback):
    """Eq. 18: with φ quadratic, Q_u + Q_ux δx is the last layer's gradient at x̂ but for terms in δx²."""
    stages, controls, inputs, targets = fcn()
    options = Options(1e-4, dynamics="second_order", convention="per_sample", feedback=feedback)
    (first, last), _ = step(stages, controls, inputs, targets, mse, options)

    def J(u: Tensor) -> Tensor:
        pairs = zip(inputs, targets, strict=True)
        return sum(mse(stages[1].forward(stages[0].forward(x, first, 0), u, 0), y) for x, y in pairs) / BATCH

    gradient = grad(J)(controls[1])
    error = float(((controls[1] - last) / 1e-4 - gradient).abs().max() / gradient.abs().max())
    assert error < 1e-7 if feedback else error > 1e-5


def second_differences(f, v: Tensor, size: float = 1e-4) -> Tensor:
    """Return the Hessian of f at v, (n,) to (n, n), by central differences."""
    eye = size * torch.eye(len(v), dtype=v.dtype)
    rows = [
        [f(v + a + b) - f(v + a - b) - f(v - a + b) + f(v - a - b) for b in eye.unbind()]
        for a in eye.unbind()
    ]
    return torch.tensor(rows, dtype=v.dtype) / (4 * size**2)


def first_differences(f, v: Tensor, size: float = 1e-5) -> Tensor:
    """Return the Jacobian of f at v, (n,) to (*f, n), by central differences."""
    eye = size * torch.eye(len(v), dtype=v.dtype)
    return torch.stack([f(v + a) - f(v - a) for a in eye.unbind()], dim=-1) / (2 * size)


@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("dynamics", ["first_order", "second_order"])
@pytest.mark.parametrize("convention", ["batch_mean", "per_sample"])
def test_derivatives_of_Q_are_finite_differences(convention, dynamics, activation):
    stages, controls, inputs, targets = fcn(activation, widths=(2, 3, 2))
    options = Options(
        0.1, vxx_reg=0.2, dynamics=dynamics, convention=convention, curvature_scale=0.7, weight_decay=0.3
    )
    sweep = backward(stages, controls, inputs, targets, mse, options)
    weight = 1 / BATCH if convention == "batch_mean" else 1.0
    for t, (stage, u) in enumerate(zip(stages, controls, strict=True)):
        p, layer, after = u.numel(), sweep.layers[t][1], values_after(sweep, t)[1]
        nominal = torch.cat((u.flatten(), layer.x))

        def f(v: Tensor, stage=stage, p=p) -> Tensor:
            return stage.forward(v[p:], v[:p].reshape(stage.u_shape), 1)

        start = f(nominal)
        jacobian = first_differences(f, nominal)

        def next_value(v: Tensor, f=f, start=start, after=after) -> Tensor:
            return after.V_x @ (f(v) - start) + (f(v) - start) @ after.V_xx @ (f(v) - start) / 2

        first = first_differences(next_value, nominal)
        if dynamics == "second_order":
            second = second_differences(next_value, nominal)
        else:
            second = jacobian.T @ after.V_xx @ jacobian
        check_close(layer.Q.Q_u, first[:p] + weight * 0.3 * u.flatten(), 1e-6)
        check_close(layer.Q.Q_x, first[p:], 1e-6)
        check_close(layer.Q.Q_uu, second[:p, :p], 1e-6)
        check_close(layer.Q.Q_ux, second[:p, p:], 1e-6)
        check_close(layer.Q.Q_xx, second[p:, p:], 1e-6)
    output = controls[1] @ torch.cat((sweep.layers[1][1].x, torch.ones(1).double()))
    check_close(sweep.terminal[1].V_x, weight * (output - functional.one_hot(targets[1], 2)))
    check_close(sweep.terminal[1].V_xx, weight**2 * 0.7 * torch.eye(2, dtype=torch.float64))


def test_second_order_adds_g_ux_alone_to_a_linear_layer():
    stages, controls, inputs, targets = fcn("identity")
    options = Options(0.1)
    first = backward(stages, controls, inputs, targets, mse, options).layers[-1]
    second = backward(
        stages, controls, inputs, targets, mse, replace(options, dynamics="second_order")
    ).layers[-1]
    inputs_and_one = stages[-1].u_shape[1]
    for a, b in zip(first, second, strict=True):
        eye = torch.eye(inputs_and_one, inputs_and_one - 1, dtype=torch.float64)
        check_close(b.Q.Q_ux - a.Q.Q_ux, torch.einsum("o,ij->oij", a.V_h, eye).flatten(0, 1))
        for name in ("Q_u", "Q_x", "Q_uu", "Q_xx"):
            check_close(getattr(b.Q, name), getattr(a.Q, name))


def minimum(layer: Layer, dx: Tensor) -> Tensor:
    """Return the least value over δu of Q's expansion with the value step's Q_uu, as a function of δx."""
    Q = layer.Q_value
    du = -torch.linalg.solve(layer.Q_uu, Q.Q_u + Q.Q_ux @ dx)
    by_u = Q.Q_u @ du + du @ layer.Q_uu @ du / 2 + du @ Q.Q_ux @ dx
    return by_u + Q.Q_x @ dx + dx @ Q.Q_xx @ dx / 2


@pytest.mark.parametrize("safeguard", ["clamp", "psd"])
@pytest.mark.parametrize("dynamics", ["first_order", "second_order"])
def test_value_step_minimises_over_controls(dynamics, safeguard):
    stages, controls, inputs, targets = fcn(widths=(3, 3, 2, 2))
    options = Options(
        0.2,
        vxx_reg=0.1,
        dynamics=dynamics,
        safeguard=safeguard,
        weight_decay=0.1,
        preconditioner=KFAC(damping=0.1),
    )
    sweep = backward(stages, controls, inputs, targets, cross_entropy, options)
    for t, layers in enumerate(sweep.layers):
        for layer in layers:
            zero = torch.zeros_like(layer.x)
            check_close(layer.before.V_x, grad(lambda dx, a=layer: minimum(a, dx))(zero))
            check_close(layer.before.V_xx_plain, hessian(lambda dx, a=layer: minimum(a, dx))(zero))
            added = 0.1 * torch.eye(len(zero), dtype=zero.dtype) * (t > 0)
            check_close(layer.before.V_xx, layer.before.V_xx_plain + added)
            check_close(layer.K, -0.2 * torch.linalg.inv(sweep.M[t]) @ layer.Q.Q_ux)


def test_psd_stays_positive_semi_definite_where_clamp_does_not():
    stages, controls, inputs, targets = fcn(widths=(4, 3, 3, 3, 2))
    lowest = {}
    for safeguard in ("clamp", "psd"):
        options = Options(5.0, convention="per_sample", safeguard=safeguard)
        sweep = backward(stages, controls, inputs, targets, cross_entropy, options)
        eigenvalues = [
            torch.linalg.eigvalsh((layer.before.V_xx + layer.before.V_xx.T) / 2)
            for layers in sweep.layers
            for layer in layers
        ]
        lowest[safeguard] = min(float(e.min() / e.abs().max()) for e in eigenvalues)
    assert lowest["psd"] > -1e-12
    assert lowest["clamp"] < -0.1


@pytest.mark.parametrize("safeguard", ["clamp", "psd"])
def test_factorized_is_the_full_form_without_vxx_reg(safeguard):
    stages, controls, inputs, targets = fcn(widths=(4, 3, 3, 2))
    options = Options(
        0.05, terminal_hessian="gauss_newton", safeguard=safeguard, preconditioner=EKFAC(damping=0.1)
    )
    full = backward(stages, controls, inputs, targets, cross_entropy, options)
    factorized = backward(
        stages, controls, inputs, targets, cross_entropy, replace(options, factorized=True, vxx_reg=0.3)
    )
    for t, b in product(range(3), range(BATCH)):
        value, expected = factorized.layers[t][b].before, full.layers[t][b].before
        check_close(value.V_x, expected.V_x)
        check_close(value.V_xx, expected.V_xx)
        extra = 0.3 * torch.eye(len(value.V_x), dtype=torch.float64) * (t > 0)
        check_close(value.V_xx_feedback, expected.V_xx + extra)


def test_factorized_clamp_projects_onto_zero():
    stages, controls, inputs, targets = fcn()
    options = Options(5.0, terminal_hessian="gauss_newton", convention="per_sample")
    full, factorized = (
        backward(
            stages, controls, inputs, targets, cross_entropy, replace(options, factorized=choice)
        ).layers[-1]
        for choice in (False, True)
    )
    lowest = [float(torch.linalg.eigvalsh(layer.before.V_xx).min()) for layer in full]
    assert min(lowest) < -0.1
    for layer, low in zip(factorized, lowest, strict=True):
        assert low > -1e-9 or float(layer.before.V_xx.abs().max()) == 0


def as_matrix(
    shape: tuple[int, int, int],
    outputs: int,
    size: int,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
) -> tuple[Tensor, tuple[int, int, int]]:
    """Return D, h = (D u) x̄ for a convolution with a bias: (m, n + 1, p), and h's shape."""
    channels, height, width = shape
    high, wide = ((s + 2 * padding - dilation * (size - 1) - 1) // stride + 1 for s in (height, width))
    per_group, inputs = channels // groups, channels // groups * size * size + 1
    D = torch.zeros(outputs, high, wide, channels * height * width + 1, outputs, inputs, dtype=torch.float64)
    for o, i, j in product(range(outputs), range(high), range(wide)):
        D[o, i, j, -1, o, -1] = 1
        first = o // (outputs // groups) * per_group
        for c, a, b in product(range(per_group), range(size), range(size)):
            y, x = i * stride - padding + a * dilation, j * stride - padding + b * dilation
            if 0 <= y < height and 0 <= x < width:
                D[o, i, j, ((first + c) * height + y) * width + x, o, (c * size + a) * size + b] = 1
    return D.reshape(outputs * high * wide, -1, outputs * inputs), (outputs, high, wide)


@pytest.mark.parametrize(
    ("geometry", "preconditioner"),
    [
        ({"stride": 2, "padding": 1, "dilation": 1, "groups": 1}, KFAC(damping=0.1)),
        ({"stride": 1, "padding": 1, "dilation": 2, "groups": 2}, EKFAC(damping=0.1)),
    ],
)
def test_convolution_is_its_matrix(geometry, preconditioner):
    normal = source(1)
    shape = (2, 4, 4)
    D, h_shape = as_matrix(shape, 2, 2, **geometry)
    conv = conv2d(2, 2, 2, **geometry)

    def g(x: Tensor, u: Tensor) -> Tensor:
        x_bar = torch.cat((x.flatten(), torch.ones(1, dtype=x.dtype)))
        return (torch.einsum("mnp,p->mn", D, u.flatten()) @ x_bar).reshape(h_shape)

    last = linear(D.shape[0], 2)
    controls = [normal(*conv.u_shape), normal(*last.u_shape)]
    inputs, targets = normal(2, *shape), torch.tensor([0, 1])
    options = Options(
        0.1, vxx_reg=0.1, dynamics="second_order", safeguard="psd", preconditioner=preconditioner
    )
    sigma = chain(torch.tanh, flatten)
    sweeps = [
        backward([stage, last], controls, inputs, targets, cross_entropy, options)
        for stage in (replace(conv, sigma=sigma), replace(conv, g=g, sigma=sigma))
    ]
    check_close(sweeps[0].M[0], sweeps[1].M[0])
    for a, b in zip(sweeps[0].layers[0], sweeps[1].layers[0], strict=True):
        check_close(a.K, b.K)
        check_close(a.before.V_x, b.before.V_x)
        check_close(a.before.V_xx, b.before.V_xx)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_patches(groups):
    normal = source(6)
    stage, u, inputs = (
        conv2d(4, 4, (2, 3), 2, 1, groups=groups),
        normal(4, 24 // groups + 1),
        normal(2, 4, 3, 3),
    )
    points = [point(stage, x, u, b) for b, x in enumerate(inputs)]
    V_h = normal(2, len(points[0].h))
    seen = observation(stage, u, points, V_h, Options(0.1, weight_decay=0.3))
    patches = functional.unfold(inputs, (2, 3), padding=1, stride=2)
    patches = patches.reshape(2, groups, 24 // groups, -1).mT
    check_close(seen.x_bar, torch.cat((patches, torch.ones_like(patches[..., :1])), dim=-1))
    check_close(seen.v, 2 * V_h.reshape(2, 4, -1))  # of two samples, in units of φ
    v = seen.v.reshape(2, groups, 4 // groups, -1)
    gradients = torch.einsum("bcol,bcli->bcoi", v, seen.x_bar)
    check_close(seen.data_gradients, gradients.flatten(1))
    check_close(seen.gradients, gradients.flatten(1) + 0.3 * u.flatten())
    rows = []
    for x_bar, v_c, u_c in zip(seen.x_bar.unbind(1), v.unbind(1), u.chunk(groups), strict=True):
        A, G = (x_bar.mT @ x_bar).mean(0), (v_c @ v_c.mT).mean(0) / v.shape[-1]
        pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
        eye_A, eye_G = torch.eye(len(A), dtype=A.dtype), torch.eye(len(G), dtype=A.dtype)
        rows.append((G + 0.2 / pi * eye_G) @ u_c @ (A + 0.2 * pi * eye_A))
    check_close(KFAC(damping=0.04).observe(seen) @ u.flatten(), torch.cat(rows).flatten())


def test_image_layers_against_modules():
    normal = source(2)
    masks = (torch.rand(BATCH, 4, generator=torch.Generator().manual_seed(0)) > 0.5).double() * 2
    stages = [
        conv2d(2, 4, 3, padding=1, groups=2, sigma=chain(leaky_relu(0.1), max_pool2d(3, 2, 1))),
        conv2d(4, 2, 2, bias=False, sigma=chain(gelu, avg_pool2d(2, 1, 1), flatten)),
        linear(8, 4, sigma=[chain(relu, dropout(mask)) for mask in masks]),
        linear(4, 3, bias=False),
    ]
    modules = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.LeakyReLU(0.1), nn.MaxPool2d(3, 2, 1)),
        nn.Sequential(nn.Conv2d(4, 2, 2, bias=False), nn.GELU(), nn.AvgPool2d(2, 1, 1), nn.Flatten()),
        nn.Sequential(nn.Linear(8, 4), nn.ReLU()),
        nn.Linear(4, 3, bias=False),
    ).double()
    controls = [normal(*stage.u_shape) / stage.u_shape[1] ** 0.5 for stage in stages]
    parameters = []
    for module, u in zip(modules, controls, strict=True):
        inner = module[0] if isinstance(module, nn.Sequential) else module
        inner.weight.data = u[:, : inner.weight[0].numel()].reshape(inner.weight.shape)
        if inner.bias is not None:
            inner.bias.data = u[:, -1]
        parameters.append([p for p in (inner.weight, inner.bias) if p is not None])
    inputs, targets = normal(BATCH, 2, 4, 4), torch.arange(BATCH)
    functional.cross_entropy(modules[3](modules[:3](inputs) * masks), targets).backward()
    options = Options(1.0, feedback=False, dynamics="second_order")
    layers = backward(stages, controls, inputs, targets, cross_entropy, options).layers
    for found, own in zip(layers, parameters, strict=True):
        gradient = torch.cat([p.grad.reshape(len(p), -1) for p in own], dim=1)
        check_close(sum(layer.Q.Q_u for layer in found), gradient.flatten())


@pytest.mark.parametrize("convention", ["batch_mean", "per_sample"])
def test_kronecker_preconditioners_of_one_sample(convention):
    normal = source(3)
    stages, (u,), x, y = [linear(4, 3)], [normal(3, 5)], normal(1, 4), normal(1, 3)
    x_bar = torch.cat((x[0], torch.ones(1, dtype=torch.float64)))
    v = u @ x_bar - y[0]
    (updated,), _ = step(
        stages,
        [u],
        x,
        y,
        mse,
        Options(0.3, convention=convention, preconditioner=KFAC(damping=0.04)),
    )
    pi = ((x_bar @ x_bar / 5) / (v @ v / 3)).sqrt()
    scale = (v @ v + 0.2 / pi) * (x_bar @ x_bar + 0.2 * pi)  # v x̄ᵀ is an eigenvector of the Kronecker product
    check_close(updated, u - 0.3 * torch.outer(v, x_bar) / scale)
    (updated,), _ = step(
        stages,
        [u],
        x,
        y,
        mse,
        Options(0.3, convention=convention, preconditioner=EKFAC(damping=0.04)),
    )
    check_close(updated, u - 0.3 * torch.outer(v, x_bar) / ((v @ v) * (x_bar @ x_bar) + 0.04))


def test_running_averages_and_refreshes():
    normal = source(4)

    def seen() -> Observation:
        x_bar, v = normal(8, 1, 2, 3), normal(8, 2, 2)
        gradients = torch.einsum("bol,bli->boi", v, x_bar[:, 0]).flatten(1)
        return Observation(normal(2, 3), 0.0, x_bar, v, gradients)

    batches = [seen(), seen(), seen()]
    new = []
    for batch in batches:
        A = sum(torch.outer(x, x) for x in batch.x_bar.reshape(-1, 3)) / 8
        G = sum(torch.outer(v, v) for v in batch.v.transpose(1, 2).reshape(-1, 2)) / 16
        new.append((A, G))
    A, G = (0.5625 * new[0][i] + 0.1875 * new[1][i] + 0.25 * new[2][i] for i in range(2))
    kfac = KFAC(0.09, factor_decay=0.75, inverse_every=2)
    M = [kfac.observe(batch) for batch in batches]
    assert torch.equal(M[0], M[1])
    pi = ((A.trace() / 3) / (G.trace() / 2)).sqrt()
    G_damped = G + 0.3 / pi * torch.eye(2, dtype=A.dtype)
    A_damped = A + 0.3 * pi * torch.eye(3, dtype=A.dtype)
    direction = normal(2, 3)
    check_close((M[2] @ direction.flatten()).reshape(2, 3), G_damped @ direction @ A_damped)

    ekfac = EKFAC(0.09, factor_decay=0.75, inverse_every=2)
    M = [ekfac.observe(batch) for batch in batches]
    bases = [tuple(torch.linalg.eigh(factor).eigenvectors for factor in pair) for pair in (new[0], (A, G))]

    def squares(k: int, basis: tuple[Tensor, Tensor]) -> Tensor:
        g = batches[k].data_gradients.reshape(8, 2, 3)
        return ((basis[1].T @ g @ basis[0]) ** 2).mean(0)

    s = squares(0, bases[0])
    s = 0.75 * s + 0.25 * squares(1, bases[0])
    rotated = bases[0][1].T @ direction @ bases[0][0]
    check_close(
        (M[1] @ direction.flatten()).reshape(2, 3), bases[0][1] @ ((s + 0.09) * rotated) @ bases[0][0].T
    )
    s = 0.75 * s + 0.25 * squares(2, bases[1])
    rotated = bases[1][1].T @ direction @ bases[1][0]
    check_close(
        (M[2] @ direction.flatten()).reshape(2, 3), bases[1][1] @ ((s + 0.09) * rotated) @ bases[1][0].T
    )


def test_losses():
    x = source(5)(3)
    label = torch.tensor(1)
    p, one_hot, eye = torch.softmax(x, 0), torch.eye(3).double()[1], torch.eye(3).double()
    centers = 2 * (eye - 1 / 3)  # a simplex's corners
    check_close(centers @ centers.T, 8 / 3 * (1.5 * eye - 0.5))
    expected = [
        (cross_entropy, -p[1].log(), p - one_hot, torch.diag(p) - torch.outer(p, p)),
        (mse, (x - one_hot).square().sum() / 2, x - one_hot, eye),
        (mmc(centers), (x - centers[1]).square().sum(), 2 * (x - centers[1]), 2 * eye),
    ]
    for phi, value, gradient, curvature in expected:
        check_close(phi(x, label), value)
        check_close(grad(phi)(x, label), gradient)
        check_close(hessian(phi)(x, label), curvature)
    check_close(mse(x, one_hot), mse(x, label))


def test_options_are_checked():
    with pytest.raises(ValueError, match="safeguard is 'none'"):
        Options(0.1, safeguard="none")
    with pytest.raises(ValueError, match="factorized needs"):
        Options(0.1, factorized=True)
