"""SGD-VGR, E-MSA and vanilla DDP: each against its definition by automatic differentiation, then as members
of a pack.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev
from torch.nn import functional

from ddpnopt.config import BaselineOptions, OptimizerConfig
from ddpnopt.datasets.load import load
from ddpnopt.dense import required_bytes
from ddpnopt.errors import ConfigError
from ddpnopt.layers.losses import LOSSES
from ddpnopt.layers.modules import convert
from ddpnopt.layers.network import Controls, Trajectory, rollout
from ddpnopt.models import ZOO
from ddpnopt.optimizers import Members, Optimizer, make
from ddpnopt.optimizers.base import Trace, blame, finite_members
from ddpnopt.optimizers.emsa import EMSA, costates
from ddpnopt.optimizers.sgd_vgr import immediate_gradient
from ddpnopt.rates import Rates
from ddpnopt.torch_optimizer import BaselineOptimizer
from tests.ddpnopt.problems import assert_close, results, run

NAMES = ("sgd_vgr", "emsa", "vanilla_ddp")
every_optimizer = pytest.mark.parametrize("name", NAMES)
every_loss = pytest.mark.parametrize("loss", ["cross_entropy", "mse", "mmc"])
EXACT = 1e-9
FEATURES, CLASSES = 5, 3
IMAGE = (2, 6, 6)


def fcn(*hidden: int, sigma: Callable[[], nn.Module] = nn.Tanh, output: nn.Module | None = None):
    widths = (FEATURES, *hidden, CLASSES)
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        modules += [nn.Linear(inputs, outputs), sigma()]
    read_out = nn.Linear(widths[-2], widths[-1])
    return nn.Sequential(*modules, read_out, *([] if output is None else [output]))


def cnn():
    """Groups, strides, two maps in a row, both kinds of pooling, one layer without a bias."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 2, groups=2, bias=False),
        nn.Sigmoid(),
        nn.MaxPool2d(2, stride=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    )


NETS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "fcn": (lambda: fcn(4, 4), (FEATURES,)),
    "sigmoid": (lambda: fcn(4, 3, sigma=nn.Sigmoid, output=nn.Sigmoid()), (FEATURES,)),
    "relu": (lambda: fcn(6, 4, sigma=nn.ReLU), (FEATURES,)),
    "cnn": (cnn, IMAGE),
}
every_net = pytest.mark.parametrize("net", NETS)


@dataclass
class Pack:
    """Runs of one net with weights of their own, as torch modules and as a pack."""

    modules: list[nn.Sequential]
    members: Members
    controls: Controls
    inputs: Tensor
    targets: Tensor
    loss: str

    def rollout(self) -> Trajectory:
        return rollout(self.members.network, self.controls, self.inputs)

    def select(self, keep: Sequence[int]) -> Pack:
        rows = torch.tensor(keep)
        controls = [u[rows].clone() for u in self.controls]
        members = self.members.select(rows)
        modules = [self.modules[r] for r in keep]
        return Pack(modules, members, controls, self.inputs[rows], self.targets[rows], self.loss)

    def step(self, optimizer: Optimizer) -> Trace:
        with torch.inference_mode():
            trajectory = self.rollout()
            return optimizer.step(self.controls, trajectory, self.targets)

    def train(self, steps: int = 1) -> list[Tensor]:
        optimizer = make(self.members)
        for _ in range(steps):
            self.step(optimizer)
        return self.controls


def pack(
    net: str,
    name: str,
    *,
    runs: int = 3,
    batch: int = 7,
    loss: str = "cross_entropy",
    rate: float = 0.3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **options: Any,
) -> Pack:
    build, shape = NETS[net]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules = [build().to(dtype) for _ in range(runs)]
    converted = [convert(module) for module in modules]
    per_run = [[slot.read() for slot in one.slots] for one in converted]
    controls = [torch.cat(us) for us in zip(*per_run, strict=True)]
    config = OptimizerConfig(name, "baseline", rate, options=BaselineOptions(**options))  # type: ignore[arg-type]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype).reshape(-1, 1, 1)

    decay = config.options.weight_decay
    rates = Rates(
        column([rate * (1 + 0.25 * r) for r in range(runs)]),
        column([0.0] * runs),
        column([decay] * runs) if decay else None,
        column([config.options.momentum] * runs) if config.options.momentum else None,
    )
    members = Members(config, converted[0].network, LOSSES[loss], (rates,) * len(controls))
    inputs = torch.randn(runs, batch, *shape, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(CLASSES, (runs, batch), generator=generator)
    return Pack(modules, members, controls, inputs, targets, loss)


def phi(loss: str, output: Tensor, target: Tensor) -> Tensor:
    """Of one sample, by torch's own losses where it has them."""
    if loss == "cross_entropy":
        return functional.cross_entropy(output.unsqueeze(0), target.unsqueeze(0))
    if loss == "mse":
        return (output - functional.one_hot(target, CLASSES)).square().sum() / 2
    return LOSSES["mmc"].value(output.reshape(1, 1, -1), target.reshape(1, 1)).squeeze()


@dataclass
class Layer:
    """A layer of a torch module: its affine part as a function of u, and what comes after it."""

    affine: nn.Module
    sigma: nn.Sequential

    def weights(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        has_bias = self.affine.bias is not None
        weight = u[:, :-1] if has_bias else u
        return weight.reshape(self.affine.weight.shape), u[:, -1] if has_bias else None

    def g(self, x: Tensor, u: Tensor) -> Tensor:
        weight, bias = self.weights(u)
        if isinstance(self.affine, nn.Linear):
            return functional.linear(x, weight, bias)
        a = self.affine
        assert isinstance(a, nn.Conv2d)
        return functional.conv2d(x, weight, bias, a.stride, a.padding, a.dilation, a.groups)

    def f(self, x: Tensor, u: Tensor) -> Tensor:
        return self.sigma(self.g(x, u))


def layers_of(module: nn.Sequential) -> list[Layer]:
    found: list[Layer] = []
    for part in module:
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            found.append(Layer(part, nn.Sequential()))
        else:
            found[-1].sigma.append(part)
    return found


def states(layers: Sequence[Layer], controls: Controls, x: Tensor) -> list[Tensor]:
    found = [x]
    for layer, u in zip(layers, controls, strict=True):
        found.append(layer.f(found[-1], u))
    return found


def adjoints(problem: Pack, r: int) -> tuple[list[Layer], list[Tensor], list[Tensor]]:
    """Layers, states x_0..x_T and co-states ∂φ/∂x of every sample by autograd, x_0's among them."""
    layers, controls = layers_of(problem.modules[r]), [u[r].clone() for u in problem.controls]
    xs = [problem.inputs[r].clone().requires_grad_()]
    for layer, u in zip(layers, controls, strict=True):
        xs.append(layer.f(xs[-1], u))
    total = sum(phi(problem.loss, x, y) for x, y in zip(xs[-1], problem.targets[r], strict=True))
    ps = torch.autograd.grad(total, xs)  # type: ignore[arg-type]
    return layers, [x.detach() for x in xs], list(ps)


# --- SGD-VGR ----------------------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_the_regulariser_vgr_is_sgd_bit_for_bit(net, dtype):
    numbers = {"momentum": 0.8, "weight_decay": 0.01, "dtype": dtype}
    with_term = pack(net, "sgd_vgr", vgr=0.0, **numbers).train(5)
    plain = pack(net, "sgd", **numbers).train(5)
    assert all(torch.equal(u, v) for u, v in zip(with_term, plain, strict=True))


@every_net
@every_loss
def test_the_regulariser_is_the_immediate_derivative(net, loss):
    weight = 0.7
    problem = pack(net, "sgd_vgr", loss=loss, rate=1.0, vgr=weight, runs=2)
    plain = pack(net, "sgd", loss=loss, rate=1.0, runs=2)
    before = [u.clone() for u in problem.controls]
    terms = [(v - u) / weight for u, v in zip(problem.train(), plain.train(), strict=True)]
    for r in range(2):
        rate = problem.members.rates[0].learning_rate[r]
        start = replace_controls(problem, before)
        layers, xs, ps = adjoints(start, r)
        assert not bool(terms[0][r].any()), "no term at t = 0"
        for t in range(1, len(layers)):
            expected = grad(immediate_objective(layers[t], xs[t], ps[t + 1], before[t][r]))(before[t][r])
            assert float(expected.abs().max()) > 1e-6
            assert_close(terms[t][r] / rate, expected, EXACT, f"Ω_u of run {r}, layer {t}", 1e-14)


def replace_controls(problem: Pack, controls: Controls) -> Pack:
    return replace(problem, controls=controls)


def immediate_objective(layer: Layer, x: Tensor, p: Tensor, u: Tensor) -> Callable[[Tensor], Tensor]:
    """Ω_t as a function of the weights in g_x alone: p_{t+1} and σ_h at u stay as they are."""
    h = layer.g(x, u)
    V_h = torch.func.vjp(layer.sigma, h)[1](p)[0].detach()

    def omega(moving: Tensor) -> Tensor:
        q = torch.func.vjp(lambda x: layer.g(x, moving), x)[1](V_h)[0]
        ratio = q.flatten(1).norm(dim=1) / p.flatten(1).norm(dim=1)
        return (ratio - 1).square().mean()

    return omega


def test_where_a_gradient_vanishes_the_regulariser_is_zero():
    problem = pack("relu", "sgd_vgr", vgr=1.0)
    # ReLU of a negative number: samples of run 0 hand nothing back through layer 1, p_2 itself being there.
    problem.controls[1][0, :, -1] = -100.0
    plain = replace_controls(pack("relu", "sgd"), [u.clone() for u in problem.controls])
    # Run 1 hands nothing on at all: its read-out has no weights.
    for one in (problem, plain):
        one.controls[2][1, :, :-1] = 0.0
        one.train()
    assert bool(finite_members(problem.controls).all())
    assert torch.equal(problem.controls[1][:2], plain.controls[1][:2])
    assert torch.equal(problem.controls[2][1], plain.controls[2][1])
    assert not torch.equal(problem.controls[1][2], plain.controls[1][2])


def test_the_regulariser_does_not_depend_on_how_small_the_gradient_is():
    problem = pack("sigmoid", "sgd_vgr", dtype=torch.float32)
    stage, u = problem.members.network.stages[1], problem.controls[1]
    V_h, p = torch.randn(3, 7, 3), torch.randn(3, 7, 3)
    terms = []
    for scale in (1.0, 2.0**-100):  # its square is zero in float32
        q = stage.affine.pull_back(scale * V_h.unsqueeze(2), problem.rollout().inputs[1], u).squeeze(2)
        terms.append(immediate_gradient(stage.affine, scale * V_h, scale * p, q, u))
    assert torch.equal(terms[0], terms[1])


# --- E-MSA ------------------------------------------------------------------------------------------------


def hamiltonians(problem: Pack) -> tuple[EMSA, list[Tensor], Trajectory]:
    optimizer = make(problem.members)
    assert isinstance(optimizer, EMSA)
    trajectory = problem.rollout()
    p_T = problem.members.loss.gradient(trajectory.output, problem.targets)
    return optimizer, costates(problem.members.network, problem.controls, trajectory, p_T), trajectory


@every_net
@every_loss
def test_costates_are_the_adjoint(net, loss):
    problem = pack(net, "emsa", loss=loss, runs=2)
    _, found, _ = hamiltonians(problem)
    for r in range(2):
        _, _, expected = adjoints(problem, r)
        assert len(found) == len(expected) - 1
        for t, p in enumerate(found, start=1):
            assert_close(p[r], expected[t], EXACT, f"p_{t} of run {r}")


def augmented(layer: Layer, t: int, xs: Sequence[Tensor], ps: Sequence[Tensor], rho: float, decay: float):
    """Eq. 23 with its norms squared, in means over the batch, written down once more."""

    def value(u: Tensor) -> Tensor:
        def one(x: Tensor, x_after: Tensor, p: Tensor, p_after: Tensor) -> Tensor:
            def f(x: Tensor) -> Tensor:
                return layer.f(x.unsqueeze(0), u).squeeze(0)

            y, pull = torch.func.vjp(f, x)
            total = (p_after * y).sum() + rho / 2 * (x_after - y).square().sum()
            return total if t == 0 else total + rho / 2 * (p - pull(p_after)[0]).square().sum()

        samples = [one(*sample) for sample in zip(xs[t], xs[t + 1], ps[t], ps[t + 1], strict=True)]
        return sum(samples) / len(samples) + decay / 2 * u.square().sum()  # type: ignore[no-any-return]

    return value


@every_net
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_the_augmented_hamiltonian_and_its_gradient(net, decay):
    rho = 0.8
    problem = pack(net, "emsa", augmentation=rho, weight_decay=decay, runs=2, batch=4)
    optimizer, p, trajectory = hamiltonians(problem)
    generator = torch.Generator().manual_seed(1)
    for t, u in enumerate(problem.controls):
        H = optimizer.hamiltonian(t, problem.controls, trajectory, p)
        for distance in (0.0, 0.5):
            moved = u + distance * torch.randn(u.shape, generator=generator, dtype=u.dtype)
            value, gradient = H.value_and_gradient(moved)
            for r in range(2):
                layers, xs, ps = adjoints(problem, r)
                expected = augmented(layers[t], t, xs, ps, rho, decay)
                what = f"of run {r}, layer {t}, {distance} away"
                assert_close(value[r], expected(moved[r]), EXACT, f"H̃ {what}")
                assert_close(gradient[r], grad(expected)(moved[r]), EXACT, f"gradient {what}", 1e-13)


@every_net
def test_at_the_old_controls_the_gradient_is_that_of_the_mean_loss(net):
    problem = pack(net, "emsa", weight_decay=0.02)
    optimizer, p, trajectory = hamiltonians(problem)
    plain = pack(net, "sgd", rate=1.0, weight_decay=0.02)
    before = [u.clone() for u in plain.controls]
    for t, (u, v) in enumerate(zip(before, plain.train(), strict=True)):
        _, gradient = optimizer.hamiltonian(t, problem.controls, trajectory, p).value_and_gradient(u)
        step = (u - v) / plain.members.rates[0].learning_rate
        assert_close(gradient, step, 1e-12, f"layer {t}")


@every_net
def test_a_step_lowers_every_layers_augmented_hamiltonian(net):
    problem = pack(net, "emsa", rate=1.0, runs=1)
    optimizer, p, trajectory = hamiltonians(problem)
    before = [u.clone() for u in problem.controls]
    all_H = [optimizer.hamiltonian(t, before, trajectory, p) for t in range(len(before))]
    problem.train()
    for H, u, v in zip(all_H, before, problem.controls, strict=True):
        assert float(H.value_and_gradient(v)[0]) < float(H.value_and_gradient(u)[0])


def test_many_iterations_reach_the_minimum_and_the_learning_rate_is_the_part_of_the_way():
    # mse on a linear read-out: H̃ of it is quadratic, its minimum one linear system.
    full = pack("fcn", "emsa", loss="mse", rate=1.0, runs=1, lbfgs_steps=200)
    half = pack("fcn", "emsa", loss="mse", rate=0.5, runs=1, lbfgs_steps=200)
    optimizer, p, trajectory = hamiltonians(full)
    before = [u.clone() for u in full.controls]
    all_H = [optimizer.hamiltonian(t, before, trajectory, p) for t in range(len(before))]
    for t, (u, v, w) in enumerate(zip(before, full.train(), half.train(), strict=True)):
        gradient = all_H[t].value_and_gradient(v)[1]
        assert float(gradient.norm()) < 1e-4 * float(all_H[t].value_and_gradient(u)[1].norm())
        assert_close(w - u, (v - u) / 2, 1e-12, f"layer {t}")


def test_the_heavier_the_augmentation_the_shorter_the_step():
    lengths = []
    for rho in (0.1, 10.0, 1e4, 1e8):
        problem = pack("fcn", "emsa", rate=1.0, augmentation=rho)
        before = [u.clone() for u in problem.controls]
        lengths.append(max(float((v - u).norm()) for u, v in zip(before, problem.train(), strict=True)))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 0.1
    assert 0 < lengths[-1] < 1e-6


def test_dropout_keeps_its_masks_while_a_layer_is_solved():
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, CLASSES)).double()
    network = convert(net).network
    problem = pack("fcn", "emsa", runs=1)
    members = Members(problem.members.config, network, problem.members.loss, problem.members.rates[:2])
    controls = [slot.read() for slot in convert(net).slots]
    problem = Pack([net], members, controls, problem.inputs, problem.targets, problem.loss)
    optimizer, p, trajectory = hamiltonians(problem)
    H = optimizer.hamiltonian(0, controls, trajectory, p)
    assert torch.equal(H.value_and_gradient(controls[0])[0], H.value_and_gradient(controls[0])[0])
    assert_close(H.value_and_gradient(controls[0])[0], (H.x_after * p[0]).sum(dim=(1, 2)) / 7, 1e-12, "H̃")


# --- Vanilla DDP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("batch", [4, 20])
def test_one_layer_and_a_quadratic_loss_are_solved_in_one_step(decay, batch):
    """Vanilla DDP on a quadratic one-layer problem = the Newton step of the whole problem.

    Of the many solutions for less samples than inputs, without weight decay, it is the one nearest to u.
    """
    problem = pack("fcn", "vanilla_ddp", loss="mse", rate=1.0, quu_reg=0.0, weight_decay=decay, batch=batch)
    net = nn.Sequential(nn.Linear(FEATURES, CLASSES)).double()
    controls = [torch.randn(3, CLASSES, FEATURES + 1, dtype=torch.float64)]
    rates = (replace(problem.members.rates[0], learning_rate=torch.ones(3, 1, 1, dtype=torch.float64)),)
    members = Members(problem.members.config, convert(net).network, problem.members.loss, rates)
    problem = Pack([net], members, controls, problem.inputs, problem.targets, "mse")
    before = controls[0].clone()
    problem.train()
    for r in range(3):
        X = functional.pad(problem.inputs[r], (0, 1), value=1.0)
        Y = functional.one_hot(problem.targets[r], CLASSES).double()
        # (1/B) Σ ½|u x̄ - y|² + λ/2 |u|² as one least-squares problem.
        ridge = (batch * decay) ** 0.5 * torch.eye(FEATURES + 1, dtype=torch.float64)
        X, Y = torch.cat((X, ridge)), functional.pad(Y, (0, 0, 0, FEATURES + 1))
        expected = before[r] + (torch.linalg.pinv(X) @ (Y - X @ before[r].T)).T
        assert_close(problem.controls[0][r], expected, EXACT, f"run {r}")


def joint_ddp(problem: Pack, r: int, alpha: float) -> list[Tensor]:
    """Alg. 1 on the state of the whole batch by torch.func; nothing here knows of its structure."""
    options = problem.members.config.options
    layers, controls = layers_of(problem.modules[r]), [u[r].clone() for u in problem.controls]
    xs = [problem.inputs[r]]
    for layer, u in zip(layers, controls, strict=True):
        xs.append(layer.f(xs[-1], u))
    batch = len(xs[0])

    def cost(X_T: Tensor) -> Tensor:
        outputs = X_T.reshape(batch, -1)
        return sum(phi(problem.loss, x, y) for x, y in zip(outputs, problem.targets[r], strict=True)) / batch

    V_X, V_XX = grad(cost)(xs[-1].flatten()), hessian(cost)(xs[-1].flatten())
    gains = []
    for t in range(len(layers) - 1, -1, -1):
        Q = action_value(layers[t], xs[t], controls[t], V_X, V_XX, options.weight_decay)
        origin = torch.zeros(controls[t].numel() + xs[t].numel(), dtype=torch.float64)
        first, second, p = grad(Q)(origin), hessian(Q)(origin), controls[t].numel()
        Q_uu = second[:p, :p] + options.quu_reg * torch.eye(p, dtype=torch.float64)
        k, K = -torch.linalg.solve(Q_uu, first[:p]), -torch.linalg.solve(Q_uu, second[:p, p:])
        V_X, V_XX = first[p:] + second[p:, :p] @ k, second[p:, p:] + second[p:, :p] @ K
        gains.append((k, K))
    x, updated = xs[0], []
    for t, (k, K) in enumerate(reversed(gains)):
        dX = (x - xs[t]).flatten()
        updated.append(controls[t] + (alpha * k + K @ dX).reshape(controls[t].shape))
        x = layers[t].f(x, updated[-1])
    return updated


def action_value(layer: Layer, x: Tensor, u: Tensor, V_X: Tensor, V_XX: Tensor, decay: float):
    """Q(δu, δX) = λ/2 |u + δu|² + V'(F), V' quadratic and F, the layer on the batch, linearised."""
    p = u.numel()

    def F(uX: Tensor) -> Tensor:
        return layer.f(uX[p:].reshape(x.shape), uX[:p].reshape(u.shape)).flatten()

    slope = jacrev(F)(torch.cat((u.flatten(), x.flatten())))

    def Q(d: Tensor) -> Tensor:
        y = slope @ d
        return decay / 2 * (u.flatten() + d[:p]).square().sum() + V_X @ y + y @ V_XX @ y / 2

    return Q


@pytest.mark.parametrize("net", ["fcn", "sigmoid", "relu"])
@every_loss
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("batch", [2, 4, 7])
def test_the_update_is_that_of_dense_ddp_on_the_joint_trajectory(net, loss, decay, batch):
    """Where the batch spans little of all layers' inputs, of some, and (of most of them) everything."""
    problem = pack(net, "vanilla_ddp", loss=loss, quu_reg=0.05, weight_decay=decay, runs=2, batch=batch)
    rates = problem.members.rates[0].learning_rate.flatten().tolist()
    expected = [joint_ddp(problem, r, rates[r]) for r in range(2)]
    for t, u in enumerate(problem.train()):
        for r in range(2):
            assert_close(u[r], expected[r][t], EXACT, f"u_{t} of run {r}")


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_equal_samples_span_less_and_change_nothing(decay):
    problem = pack("fcn", "vanilla_ddp", quu_reg=0.05, weight_decay=decay, runs=2, batch=4)
    problem.inputs[:, 1:3] = problem.inputs[:, :1]
    rates = problem.members.rates[0].learning_rate.flatten().tolist()
    expected = [joint_ddp(problem, r, rates[r]) for r in range(2)]
    for t, u in enumerate(problem.train()):
        for r in range(2):
            assert_close(u[r], expected[r][t], EXACT, f"u_{t} of run {r}")


def test_a_run_without_regulariser_and_weight_decay_stays_where_it_is_beside_the_span():
    """λ + μ = 0 for one run of three, on a net of one layer: more of them hand no curvature to all states."""
    problem = pack("fcn", "vanilla_ddp", loss="mse", quu_reg=0.0, batch=4)
    decay = torch.tensor([0.05, 0.0, 0.05], dtype=torch.float64).reshape(-1, 1, 1)
    rates = replace(problem.members.rates[0], decay=decay)
    net = nn.Sequential(nn.Linear(FEATURES, CLASSES)).double()
    problem.members = replace(problem.members, network=convert(net).network, rates=(rates,))
    problem.controls = [torch.randn(3, CLASSES, FEATURES + 1, dtype=torch.float64)]
    before = problem.controls[0].clone()
    moved = problem.train()[0] - before
    basis = torch.linalg.qr(functional.pad(problem.inputs, (0, 1), value=1.0).mT)[0]
    moved_beside, beside = (v - v @ basis @ basis.mT for v in (moved, before))
    assert_close(moved_beside[[0, 2]], -(rates.learning_rate * beside)[[0, 2]], EXACT, "δu beside the span")
    assert float(moved_beside[1].abs().max()) < 1e-12 < float(moved[1].abs().max())


def test_a_net_that_does_not_fit_is_refused_before_anything_is_made():
    limit = 10_000
    problem = pack("fcn", "vanilla_ddp", memory_limit=limit)
    before = [u.clone() for u in problem.controls]
    with pytest.raises(ConfigError, match="24 controls and batches of 7; make the layers narrower") as caught:
        problem.train()
    assert all(torch.equal(u, v) for u, v in zip(problem.controls, before, strict=True))
    need = required_bytes([(4, 6), (4, 5), (3, 5)], batch=7, item=8)
    assert f"at least {need}: one run's dense matrices take {need / 2**30:.3g} GiB" in str(caught.value)
    assert (caught.value.field, caught.value.value) == ("memory_limit", limit)
    pack("fcn", "vanilla_ddp", memory_limit=need).train()


def test_the_papers_mnist_net_fits_with_batches_that_span_little_of_its_inputs():
    def need(batch: int) -> int:
        return required_bytes([(32, 785), *[(32, 33)] * 3, (10, 33)], batch, item=4)

    assert need(128) < BaselineOptions().memory_limit < need(256)


def test_a_refusal_says_when_the_controls_are_those_of_the_span():
    problem = pack("fcn", "vanilla_ddp", memory_limit=1000, batch=4)
    with pytest.raises(ConfigError, match="layer 0's 16 controls within the span of its inputs and batches"):
        problem.train()


def test_the_estimate_grows_as_the_matrices_do():
    assert required_bytes([(1, 1)], 1, 8) == 8 * (1 + 3 + 2 + 5)
    assert required_bytes([(1, 9)], 1, 8) == 8 * (1 + 9 + 3 + 2 + 5), "one control spanned, and its basis"
    assert required_bytes([(4, 9)], 9, 8) > required_bytes([(4, 9)], 8, 8) > required_bytes([(4, 8)], 8, 8)
    one, two = (required_bytes([(4, 4), (4, 4)], batch, 4) for batch in (1000, 2000))
    assert 3.9 < two / one < 4.0, "the square of the batch"


@pytest.mark.parametrize("batch", [3, 7])
def test_runs_go_through_as_many_at_a_time_as_fit(batch):
    need = required_bytes([(4, 6), (4, 5), (3, 5)], batch=batch, item=8)
    packs = [pack("fcn", "vanilla_ddp", runs=5, batch=batch, memory_limit=n * need) for n in (1, 2, 5)]
    for one in packs:
        one.train(3)
    for one in packs[1:]:
        assert all(torch.equal(u, v) for u, v in zip(one.controls, packs[0].controls, strict=True))


def test_a_convolution_is_refused():
    with pytest.raises(ConfigError, match="Conv2d at layer 0") as caught:
        make(pack("cnn", "vanilla_ddp").members)
    assert "Linear" in caught.value.allowed


@pytest.mark.parametrize("at_a_time", [1, 3])
def test_a_matrix_that_is_not_positive_definite_is_that_runs_failure_alone(at_a_time):
    limit = at_a_time * required_bytes([(4, 6), (4, 5), (3, 5)], batch=40, item=8)
    numbers = {"loss": "mse", "batch": 40, "quu_reg": 0.0, "memory_limit": limit}
    problem, whole = pack("fcn", "vanilla_ddp", **numbers), pack("fcn", "vanilla_ddp", **numbers)
    problem.inputs[1, :, 2] = 0.0  # a feature that is always zero: Q_uu of layer 0 is singular
    trace = problem.step(make(problem.members))
    assert finite_members(problem.controls).tolist() == [True, False, True]
    found = blame(trace, 1, 3)
    assert found is not None
    assert (found.quantity, found.layer) == ("Q_uu of layer 0", 0)
    for u, v in zip(problem.controls, whole.train(), strict=True):
        assert torch.equal(u[[0, 2]], v[[0, 2]])


@pytest.mark.parametrize("batch", [2, 7])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_a_layer_without_a_learning_rate_has_no_controls(batch, decay):
    problem = pack("fcn", "vanilla_ddp", runs=1, batch=batch, weight_decay=decay)
    frozen = replace(problem.members.rates[1], learning_rate=torch.zeros(1, 1, 1, dtype=torch.float64))
    rates = (problem.members.rates[0], frozen, problem.members.rates[2])
    problem.members = replace(problem.members, rates=rates)
    before = [u.clone() for u in problem.controls]
    moved = [not torch.equal(u, v) for u, v in zip(before, problem.train(), strict=True)]
    assert moved == [True, False, True]


# --- In a pack --------------------------------------------------------------------------------------------

PAIRS = [(name, net) for name in NAMES for net in NETS if (name, net) != ("vanilla_ddp", "cnn")]
every_pair = pytest.mark.parametrize(("name", "net"), PAIRS, ids=[f"{name}-{net}" for name, net in PAIRS])


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_a_run_in_a_pack_is_the_run_alone(name, net, dtype, batch):
    together = pack(net, name, dtype=dtype, batch=batch)
    alone = [together.select([r]) for r in range(3)]
    together.train(3)
    for r in range(3):
        for t, u in enumerate(alone[r].train(3)):
            assert torch.equal(u[0], together.controls[t][r]), f"run {r}, layer {t}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("batch", [1, 5, 33])
def test_a_run_in_a_pack_is_the_run_alone_on_many_inputs(dtype, batch):
    """Matrices of uneven lengths, large enough for blocks and vectors, at any place in memory."""
    features = 785
    together = pack("fcn", "vanilla_ddp", dtype=dtype, batch=batch, weight_decay=0.01)
    net = nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    generator = torch.Generator().manual_seed(1)
    together.members = replace(together.members, network=convert(net).network)
    shapes = [(5, features + 1), (4, 6), (CLASSES, 5)]
    together.controls = [torch.randn(3, *shape, generator=generator).to(dtype) / 9 for shape in shapes]
    together.inputs = torch.randn(3, batch, features, generator=generator).to(dtype)
    alone = [together.select([r]) for r in range(3)]
    together.train(3)
    assert bool(finite_members(together.controls).all())
    for r in range(3):
        for t, u in enumerate(alone[r].train(3)):
            assert torch.equal(u[0], together.controls[t][r]), f"run {r}, layer {t}"


@pytest.mark.parametrize("batch", [3, 7])
@every_pair
def test_a_run_of_nan_disturbs_nobody(name, net, batch):
    clean, spoilt = pack(net, name, batch=batch), pack(net, name, batch=batch)
    spoilt.controls[0][1] = float("nan")
    optimizer = make(spoilt.members)
    for _ in range(2):
        trace = spoilt.step(optimizer)
    clean.train(2)
    for u, v in zip(clean.controls, spoilt.controls, strict=True):
        assert torch.equal(u[[0, 2]], v[[0, 2]])
    assert finite_members(spoilt.controls).tolist() == [True, False, True]
    assert blame(trace, 1, 3) is not None
    assert blame(trace, 0, 3) is None


@every_pair
@pytest.mark.parametrize("size", [1e30, 1e300, float("inf")])
@pytest.mark.parametrize("batch", [3, 7])
def test_no_size_of_weights_raises(name, net, size, batch):
    problem = pack(net, name, batch=batch)
    for u in problem.controls:
        u[1] *= size
    problem.train(3)
    assert finite_members(problem.controls)[[0, 2]].all()


@every_pair
def test_selected_runs_go_on_as_they_would_have(name, net):
    numbers = {"momentum": 0.9} if name == "sgd_vgr" else {}
    whole = pack(net, name, **numbers)
    part = pack(net, name, **numbers)
    optimizer = make(part.members)
    for _ in range(2):
        part.step(optimizer)
    optimizer.select(torch.tensor([2, 0]))
    assert len(optimizer.members.rates[0].learning_rate) == 2
    part = part.select([2, 0])
    for _ in range(2):
        part.step(optimizer)
    for u, v in zip(whole.train(4), part.controls, strict=True):
        assert torch.equal(u[[2, 0]], v)


@every_pair
def test_the_state_is_a_snapshot_to_go_back_to(name, net):
    numbers = {"momentum": 0.9} if name == "sgd_vgr" else {}
    problem = pack(net, name, **numbers)
    optimizer = make(problem.members)
    problem.step(optimizer)
    state, there = copy.deepcopy(optimizer.state()), [u.clone() for u in problem.controls]
    problem.step(optimizer)
    after = [u.clone() for u in problem.controls]
    resumed = make(problem.members)
    resumed.load_state(state)
    for u, v in zip(problem.controls, there, strict=True):
        u.copy_(v)
    problem.step(resumed)
    assert all(torch.equal(u, v) for u, v in zip(problem.controls, after, strict=True))


@pytest.mark.parametrize("name", ["sgd_vgr", "emsa"])
def test_a_generic_layer_is_refused(name):
    members = pack("fcn", name).members

    class Generic:
        dense = False

    stage = replace(members.network.stages[0], affine=Generic())
    with pytest.raises(ConfigError, match="generic layer"):
        make(replace(members, network=replace(members.network, stages=(stage,))))


# --- Training ---------------------------------------------------------------------------------------------

SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("emsa", "wine"): {"rate": 0.3, "steps": 50, "batch_size": 32},
    ("emsa", "digits"): {"rate": 0.5, "steps": 80, "batch_size": 256},
    ("vanilla_ddp", "wine"): {"rate": 0.3, "steps": 100, "batch_size": 32},
    ("vanilla_ddp", "digits"): {"rate": 0.3, "steps": 120, "batch_size": 64},
    ("sgd_vgr", "wine"): {"rate": 0.7, "steps": 600, "batch_size": 32},
    ("sgd_vgr", "digits"): {"rate": 0.1, "steps": 1500, "batch_size": 32},
}


@pytest.mark.parametrize(("name", "dataset"), SETTINGS)
def test_the_papers_nets_train_well_above_ninety_percent(name, dataset):
    numbers = SETTINGS[name, dataset]
    model = ZOO[dataset, "fcn"]
    optimizer = OptimizerConfig(name, "baseline", numbers["rate"])  # type: ignore[arg-type]
    one = run(
        optimizer,
        seed=1,
        dataset=dataset,
        dtype="float32",
        hidden=model.hidden,
        activation=model.activation,
        steps=numbers["steps"],
        batch_size=numbers["batch_size"],
        eval_every=numbers["steps"],
    )
    (result,) = results([replace(one, model=model)], load(dataset))
    assert result.divergence is None
    assert result.metrics["accuracy"] > 90


@every_optimizer
def test_as_an_optimizer_of_torch(name):
    problem = pack("fcn", name, runs=1, batch=30)
    optimizer = BaselineOptimizer(problem.modules[0], name, lr=0.3)
    losses = [float(optimizer.step(problem.inputs[0], problem.targets[0])) for _ in range(10)]
    assert optimizer.status is None
    assert losses[-1] < losses[0]
