"""Identities between optimizers, and what every one of them must do."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from ddpnopt import config
from ddpnopt.config import (
    PRECONDITIONER_OF,
    BaselineOptions,
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from ddpnopt.errors import ConfigError
from ddpnopt.layers.activations import ACTIVATIONS
from ddpnopt.layers.conv import Conv2d
from ddpnopt.layers.linear import Linear
from ddpnopt.layers.losses import LOSSES
from ddpnopt.layers.network import Network, Stage, rollout
from ddpnopt.layers.reshaping import FLATTEN, Reshape
from ddpnopt.models import network
from ddpnopt.optimizers import OPTIMIZERS, Members, group_key
from ddpnopt.optimizers.ddpnopt import DDPNOpt
from ddpnopt.pack import rng
from ddpnopt.pack.engine import Trainer
from ddpnopt.preconditioners import PRECONDITIONERS
from ddpnopt.rates import Rates
from tests.ddpnopt.nets import dense_preconditioner
from tests.ddpnopt.problems import (
    CONVENTIONS,
    FEEDBACKS,
    PARTNERS,
    SAFEGUARDS,
    assert_close,
    baseline,
    bits,
    ddpnopt,
    results,
    run,
    sgd,
    toy,
    updates,
)
from tests.reference import oracle

DATA = toy()
STEPS = 100
MODULES = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "identity": nn.Identity,
}

activations = pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
conventions = pytest.mark.parametrize("convention", CONVENTIONS)
safeguards = pytest.mark.parametrize("safeguard", SAFEGUARDS)


def trainer(runs: list[RunConfig]) -> Trainer:
    return Trainer(runs, DATA, torch.device("cpu"))


def controls_of(pack: Trainer, index: int) -> list[Tensor]:
    """The weights of the run that was handed in at that place."""
    return pack.controls_of(index)


def assert_equal_controls(actual: list[Tensor], expected: list[Tensor], relative: float, what: str) -> None:
    for t, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, relative, f"{what}, layer {t}")


def sequential(one: RunConfig, controls: list[Tensor]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for u in controls:
        linear = nn.Linear(u.shape[1] - 1, u.shape[0], dtype=torch.float64)
        linear.load_state_dict({"weight": u[:, :-1], "bias": u[:, -1]})
        modules += [linear, MODULES[one.model.activation]()]
    return nn.Sequential(*modules[:-1])


BASELINES = {
    "sgd": baseline("sgd", 0.3),
    "sgd with momentum and decay": baseline("sgd", 0.05, momentum=0.9, weight_decay=0.01),
    "rmsprop": baseline("rmsprop", 0.01),
    "rmsprop, per sample": baseline("rmsprop", 0.01, second_moment="per_sample", weight_decay=0.01),
    "adam": baseline("adam", 0.01),
    "kfac": baseline("kfac", 0.05, damping=0.1, factor_decay=0.5),
    "ekfac": baseline("ekfac", 0.05, damping=0.1, weight_decay=0.01),
}

PEERS = {
    "sgd": (baseline("sgd", 0.3), torch.optim.SGD, {}),
    "sgd with momentum": (baseline("sgd", 0.05, momentum=0.9), torch.optim.SGD, {"momentum": 0.9}),
    "sgd with decay": (baseline("sgd", 0.3, weight_decay=0.02), torch.optim.SGD, {"weight_decay": 0.02}),
    "rmsprop": (baseline("rmsprop", 0.01), torch.optim.RMSprop, {}),
    "rmsprop, all options": (
        baseline("rmsprop", 0.002, rho=0.9, eps=1e-6, momentum=0.5, weight_decay=0.01),
        torch.optim.RMSprop,
        {"alpha": 0.9, "eps": 1e-6, "momentum": 0.5, "weight_decay": 0.01},
    ),
    "adam": (baseline("adam", 0.01), torch.optim.Adam, {}),
    "adam, all options": (
        baseline("adam", 0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.01),
        torch.optim.Adam,
        {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.01},
    ),
}


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden", [(), (6, 4)])
@pytest.mark.parametrize("name", PEERS)
def test_baselines_are_torchs_step_for_step(name, activation, hidden):
    """100 steps, each by its own weights."""
    optimizer, peer, options = PEERS[name]
    one = run(optimizer, 1, activation=activation, hidden=hidden, batch_size=7)
    pack = trainer([one])
    net = sequential(one, controls_of(pack, 0))
    theirs = peer(net.parameters(), lr=optimizer.learning_rate, **options)
    inputs, targets = torch.from_numpy(DATA.train_inputs), torch.from_numpy(DATA.train_targets)
    per_epoch = len(targets) // 7
    layers = [m for m in net if isinstance(m, nn.Linear)]
    for step in updates(pack, STEPS):
        epoch, place = divmod(step - 1, per_epoch)
        rows = torch.from_numpy(rng.epoch_batches(one.seed, epoch, len(targets), 7)[place])
        theirs.zero_grad()
        nn.functional.cross_entropy(net(inputs[rows]), targets[rows]).backward()
        theirs.step()
        for u, layer in zip(controls_of(pack, 0), layers, strict=True):
            expected = torch.cat((layer.weight, layer.bias.unsqueeze(1)), 1).detach()
            torch.testing.assert_close(u, expected, rtol=1e-9, atol=1e-9, msg=f"step {step}")


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "weight_decay": 0.01}, {"inverse_every": 3}])
def test_kronecker_baselines_are_the_dense_references_step_for_step(name, options):
    """100 steps against M built as a dense matrix from each sample's gradient."""
    optimizer = baseline(name, 0.05, damping=0.1, **options)
    one = run(optimizer, 2, hidden=(4,), batch_size=12)
    pack = trainer([one])
    theirs = [u.clone() for u in controls_of(pack, 0)]
    stages = [oracle.linear(5, 4, sigma=torch.tanh), oracle.linear(4, 3)]
    dense = oracle.Options(
        learning_rate=0.05,
        feedback=False,
        weight_decay=options.get("weight_decay", 0.0),
        momentum=options.get("momentum", 0.0),
        preconditioner=dense_preconditioner(name, optimizer.options),
    )
    inputs, targets, state = torch.from_numpy(DATA.train_inputs), torch.from_numpy(DATA.train_targets), None
    for step in updates(pack, STEPS):
        epoch, place = divmod(step - 1, len(targets) // 12)
        rows = torch.from_numpy(rng.epoch_batches(one.seed, epoch, len(targets), 12)[place])
        theirs, state = oracle.step(
            stages, theirs, inputs[rows], targets[rows], oracle.cross_entropy, dense, state
        )
        assert_equal_controls(controls_of(pack, 0), theirs, 1e-9, f"step {step}")


@conventions
@pytest.mark.parametrize("form", ["feedback off", "no curvature"])
@pytest.mark.parametrize("dynamics", ["first_order", "second_order"])
@pytest.mark.parametrize("name", BASELINES)
def test_without_feedback_ddpnopt_is_its_baseline_step_for_step(name, convention, form, dynamics):
    """100 steps (Prop. 2). Without curvature, first-order dynamics have no Q_ux left."""
    if form == "no curvature" and dynamics == "second_order":
        dynamics = "first_order"
    off = {"feedback": False} if form == "feedback off" else {"curvature_scale": 0.0}
    reg = 0.1 if form == "feedback off" else 0.0
    plain = BASELINES[name]
    feedback = FeedbackConfig(convention=convention, dynamics=dynamics, **off)
    partner = replace(plain, method="ddpnopt", vxx_reg=reg, feedback=feedback)
    runs = [run(optimizer, seed, batch_size=12) for seed in (0, 1) for optimizer in (plain, partner)]
    pack = trainer(runs)
    for step in updates(pack, STEPS):
        for i in (0, 2):
            ours, theirs = controls_of(pack, i + 1), controls_of(pack, i)
            for u, v in zip(ours, theirs, strict=True):
                torch.testing.assert_close(u, v, rtol=1e-8, atol=1e-8, msg=f"run {i}, step {step}")


@pytest.mark.parametrize("name", BASELINES)
def test_without_feedback_ddpnopt_is_its_baseline_on_convolutions(name):
    images = toy(samples=60, features=36, shape=(1, 6, 6))
    partner = replace(BASELINES[name], method="ddpnopt", vxx_reg=0.1, feedback=FeedbackConfig(feedback=False))
    cnn = {"kind": "cnn", "channels": (3, 2), "hidden": (5,), "batch_size": 6}
    pack = Trainer([run(o, **cnn) for o in (BASELINES[name], partner)], images, torch.device("cpu"))
    for step in updates(pack, 30):
        assert_equal_controls(controls_of(pack, 1), controls_of(pack, 0), 1e-8, f"step {step}")


@conventions
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_without_feedback_ddpnopt_is_sgd_bit_for_bit_where_the_batch_is_a_power_of_two(convention, dtype):
    runs = [
        run(optimizer, dtype=dtype, batch_size=16, steps=STEPS)
        for optimizer in (sgd(0.3), ddpnopt(0.3, convention=convention, feedback=False))
    ]
    baseline_, partner = results(runs, DATA)
    assert bits(partner) == bits(baseline_)


@activations
@conventions
@safeguards
def test_full_form_is_the_outer_product_at_a_rank_one_hessian_and_no_epsilon(
    activation, convention, safeguard
):
    choices = {"terminal_hessian": "gauss_newton", "convention": convention, "safeguard": safeguard}
    # Small enough that 1 - c stays positive: where it does not, the outer product is clamped.
    scale = 0.5 if convention == "batch_mean" else 0.02
    runs = [
        run(ddpnopt(0.3, 0.0, curvature_scale=scale, factorized=factorized, **choices), activation=activation)
        for factorized in (False, True)
    ]
    pack = trainer(runs)
    start = [u.clone() for u in controls_of(pack, 0)]
    for step in updates(pack, 10):
        assert_equal_controls(controls_of(pack, 1), controls_of(pack, 0), 1e-11, f"step {step}")
    assert all(float((u - v).abs().max()) > 1e-2 for u, v in zip(start, controls_of(pack, 0), strict=True))


def one_batch(feedback: FeedbackConfig, rate: float, reg: float, scale: float = 1.0):
    """A DDPNOpt over one run, with a batch: the optimizer, controls, trajectory and targets."""
    generator = torch.Generator().manual_seed(3)
    widths, batch = (5, 6, 4, 3), 8
    controls = [
        scale * torch.randn(1, o, i + 1, generator=generator, dtype=torch.float64)
        for i, o in pairwise(widths)
    ]
    inputs = torch.randn(1, batch, widths[0], generator=generator, dtype=torch.float64)
    targets = torch.randint(widths[-1], (1, batch), generator=generator)
    layers = network(ModelConfig((6, 4)), (5,), 3)
    rate_, reg_ = (torch.full((1, 1, 1), value, dtype=torch.float64) for value in (rate, reg))
    members = Members(
        ddpnopt(rate, reg, feedback), layers, LOSSES["cross_entropy"], (Rates(rate_, reg_),) * 3
    )
    return DDPNOpt(members), controls, rollout(layers, controls, inputs), targets


@safeguards
def test_epsilon_of_the_outer_product_is_in_the_feedback_alone(safeguard):
    """The documented approximation: V_hh = z_h z_hᵀ + ε diag(σ'²) in the feedback; c and z know no ε."""
    epsilon, dx_seed, policies, rows = 0.25, 11, {}, {}
    for reg in (0.0, epsilon):
        feedback = FeedbackConfig("gauss_newton", factorized=True, safeguard=safeguard)
        optimizer, controls, trajectory, targets = one_batch(feedback, rate=0.1, reg=reg)
        sweep = optimizer.sweep(controls, trajectory, targets)
        policies[reg], rows[reg] = sweep.policies, [value.rows for value in sweep.values[1:]]
    assert len(rows[0.0]) == 2
    assert all(torch.equal(a, b) for a, b in zip(rows[0.0], rows[epsilon], strict=True))
    for t in (1, 2):
        W = controls[t][..., :-1]
        generator = torch.Generator().manual_seed(dx_seed)
        dx = torch.randn(1, 8, W.shape[-1], generator=generator, dtype=torch.float64)
        extra = policies[epsilon][t].feedback(dx) - policies[0.0][t].feedback(dx)
        if t == 2:  # the last layer receives V_xx at T, which bears no ε
            assert torch.equal(extra, torch.zeros_like(extra))
        else:
            slope = 1 - trajectory.tapes[t][0].kept ** 2
            assert_close(extra, epsilon * slope**2 * (dx @ W.mT), 1e-12, "feedback")


def smallest_eigenvalues(safeguard: str, rate: float) -> list[float]:
    """Of V_xx before each layer, over its largest in absolute value, the worst of the batch."""
    found: list[float] = []
    feedback = FeedbackConfig("exact", convention="per_sample", safeguard=safeguard)
    optimizer, controls, trajectory, targets = one_batch(feedback, rate, reg=0.0)
    for value in optimizer.sweep(controls, trajectory, targets).values[1:]:
        V_xx = value.V_xx
        assert_close(V_xx, V_xx.mT, 1e-9, "symmetry of V_xx")
        eigenvalues = torch.linalg.eigvalsh((V_xx + V_xx.mT) / 2)
        found.append(float((eigenvalues.amin(-1) / eigenvalues.abs().amax(-1)).min()))
    return found


@pytest.mark.parametrize("rate", [1e-3, 1.0, 1e3, 1e6])
def test_the_psd_safeguard_keeps_vxx_semi_definite_where_clamp_does_not(rate):
    assert min(smallest_eigenvalues("psd", rate)) > -1e-9
    if rate >= 1:
        assert min(smallest_eigenvalues("clamp", rate)) < -0.1
    else:
        assert min(smallest_eigenvalues("clamp", rate)) > -1e-9


def test_the_clamped_outer_product_ends_where_the_step_is_too_large():
    feedback = FeedbackConfig("gauss_newton", factorized=True, convention="per_sample")
    optimizer, controls, trajectory, targets = one_batch(feedback, rate=1e6, reg=0.0)
    assert bool(torch.isfinite(optimizer.sweep(controls, trajectory, targets).policies[0].V_h).all())


@safeguards
@pytest.mark.parametrize("dynamics", ["first_order", "second_order"])
@pytest.mark.parametrize("form", ["exact", "gauss_newton", "outer_product"])
@pytest.mark.parametrize("name", PRECONDITIONER_OF)
def test_a_convolution_over_the_whole_image_is_a_fully_connected_layer(name, form, dynamics, safeguard):
    """The same controls, so the same updates: with every preconditioner, form and order."""
    if form == "outer_product" and dynamics == "second_order":
        dynamics = "first_order"
    hessian = "exact" if form == "exact" else "gauss_newton"
    feedback = FeedbackConfig(
        hessian, form == "outer_product", safeguard=safeguard, dynamics=dynamics, curvature_scale=4.0
    )
    config = OptimizerConfig(name, "ddpnopt", 0.05, 0.01, feedback, BaselineOptions(weight_decay=0.01))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 6, 2, 3, 3, dtype=torch.float64, generator=generator)
    targets = torch.tensor([[0, 1, 2, 0, 1, 1]])
    middle, last = Stage(Linear(), (ACTIVATIONS["sigmoid"],)), Stage(Linear())
    first = (ACTIVATIONS["tanh"], Reshape((2, 1, 2)))
    convolved = Network(
        (), (Stage(Conv2d(2, 4, (3, 3)), first), Stage(Conv2d(2, 3, (1, 2)), (*middle.sigma, FLATTEN)), last)
    )
    connected = Network((FLATTEN,), (Stage(Linear(), (ACTIVATIONS["tanh"],)), middle, last))
    shapes = ((4, 19), (3, 5), (3, 4))
    start = [torch.randn(1, *s, dtype=torch.float64, generator=generator) for s in shapes]
    ends = []
    for layers in (convolved, connected):
        rates = Rates(*(torch.full((1, 1, 1), v, dtype=torch.float64) for v in (0.05, 0.01, 0.01)))
        optimizer = DDPNOpt(Members(config, layers, LOSSES["cross_entropy"], (rates,) * 3))
        controls = [u.clone() for u in start]
        for _ in range(3):
            optimizer.step(controls, rollout(layers, controls, images), targets)
        ends.append([u[0] for u in controls])
    assert_equal_controls(*ends, 1e-9, "after three updates")
    assert all(float((u - v[0]).abs().max()) > 1e-4 for u, v in zip(ends[0], start, strict=True))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_the_fully_connected_layer_of_its_matrix(groups):
    """Through any positions: what goes forward, back and into the gradient is that of the dense matrix."""
    layer = Conv2d(2, 4, (3, 2), (2, 1), (1, 0), (1, 2), groups)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 2, 5, 6, dtype=torch.float64, generator=generator)
    u = torch.randn(2, 4, 2 // groups * 6 + 1, dtype=torch.float64, generator=generator)
    h = layer.forward(x, u)
    dense, outputs = layer.matrix(x, u)[:, 0], h.shape[2:]
    bias = u[..., -1].repeat_interleave(outputs[1] * outputs[2], dim=-1)
    U = torch.cat((dense, bias.unsqueeze(-1)), dim=-1)
    flat, x_bar = Linear(), x.flatten(2)
    assert_close(h.flatten(2), flat.forward(x_bar, U), 1e-12, "h")
    rows = torch.randn(2, 3, 5, *outputs, dtype=torch.float64, generator=generator)
    pulled = layer.pull_back(rows, x, u).flatten(3)
    assert_close(pulled, flat.pull_back(rows.flatten(3), x_bar, U), 1e-12, "g_xᵀ v")
    pushed = layer.push_forward(x, x, u).flatten(2)
    assert_close(pushed, flat.push_forward(x.flatten(2), x_bar, U), 1e-12, "g_x δx")
    # Shared weights: their gradient is the dense one, summed over the entries that each stands at.
    v = rows[:, :, 0]
    shared = torch.einsum("roi,roi->r", layer.gradient(v, x, u), u)
    assert_close(
        shared, torch.einsum("roi,roi->r", flat.gradient(v.flatten(2), x_bar, U), U), 1e-12, "g_uᵀ v"
    )


def test_the_tables_have_a_row_for_all_that_the_configuration_allows():
    baselines, methods = get_args(config.Baseline), get_args(config.Method)
    paired = set(get_args(config.PairedBaseline))
    expected = {
        (name, method) for name in baselines for method in methods if method == "baseline" or name in paired
    }
    assert set(OPTIMIZERS) == expected
    assert set(PRECONDITIONERS) == set(get_args(config.PreconditionerName)) == set(PRECONDITIONER_OF.values())
    assert set(ACTIVATIONS) == set(get_args(config.Activation))
    assert set(LOSSES) == set(get_args(config.Loss))


def every_optimizer() -> dict[str, OptimizerConfig]:
    found = dict(PARTNERS)
    for name, method in OPTIMIZERS:
        if method == "baseline":
            found[f"{name}-baseline"] = OptimizerConfig(name, method, 0.05)
    for name, feedback in FEEDBACKS.items():
        found[f"sgd-{name}"] = OptimizerConfig("sgd", "ddpnopt", 0.05, 1e-4, feedback)
    return found


@pytest.mark.parametrize("optimizer", every_optimizer().values(), ids=every_optimizer().keys())
def test_every_optimizer_trains(optimizer):
    rates = {"rmsprop": 0.005, "adam": 0.01, "vanilla_ddp": 0.5, "emsa": 1.0}
    optimizer = replace(optimizer, learning_rate=rates.get(optimizer.baseline, 0.05))
    if optimizer.feedback is not None and optimizer.feedback.convention == "per_sample":
        # κ = 1/B, as the table of algorithm.md has it: at κ = 1 the paper's recursion diverges.
        optimizer = replace(optimizer, feedback=replace(optimizer.feedback, curvature_scale=1 / 16))
    (result,) = results([run(optimizer, steps=200, eval_every=200)], DATA)
    assert result.state == "completed", result.divergence
    start, end = result.curves["train_loss"].tolist()
    assert end < 0.6 * start
    assert result.metrics["train_accuracy"] > 70


def test_groups_share_what_their_key_says_and_defaults_count_as_what_they_mean():
    assert group_key(ddpnopt(0.1, 1e-3)) == group_key(ddpnopt(0.2, 1e-4))
    assert group_key(ddpnopt()) == group_key(ddpnopt(terminal_hessian="exact", factorized=False))
    assert len({group_key(ddpnopt(options=feedback)) for feedback in FEEDBACKS.values()}) == len(FEEDBACKS)
    assert group_key(sgd()) not in {group_key(ddpnopt(options=feedback)) for feedback in FEEDBACKS.values()}


@pytest.mark.parametrize("name", FEEDBACKS)
def test_learning_rate_and_epsilon_are_each_members_own(name):
    """Members of one group do not take each other's numbers."""
    rates, regs = (0.05, 0.1, 0.2), (0.0, 1e-2, 1e-1)
    runs = [run(ddpnopt(rate, reg, FEEDBACKS[name])) for rate in rates for reg in regs]
    digests = {result.weights_digest for result in results(runs, DATA)}
    assert len(digests) == len(runs)


def test_ddpnopt_without_options_is_refused():
    layers = network(ModelConfig((6, 4)), (5,), 3)
    with pytest.raises(ConfigError, match="feedback"):
        DDPNOpt(Members(sgd(), layers, LOSSES["cross_entropy"], ()))


def test_kfac_of_a_dead_layer_is_finite():
    """All gradients of a layer vanish: no ratio says how the factors share the damping."""
    one = run(baseline("kfac", 0.1), activation="relu", hidden=(3,))
    pack = trainer([one])
    pack.set_controls_of(0, [torch.full_like(pack.controls_of(0)[0], -100.0), *pack.controls_of(0)[1:]])
    pack.train_set.inputs.abs_()
    before = [u.clone() for u in controls_of(pack, 0)]
    for _ in updates(pack, 3):
        pass
    assert not pack.diverged
    assert torch.equal(controls_of(pack, 0)[0], before[0])
    assert not torch.equal(controls_of(pack, 0)[1], before[1])
