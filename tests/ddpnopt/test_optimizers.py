"""Identities between optimizers, and what every one of them must do."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from ddpnopt import config
from ddpnopt.config import FeedbackConfig, OptimizerConfig, RunConfig
from ddpnopt.ddp import backward, outer_product
from ddpnopt.errors import ConfigError
from ddpnopt.layers.activations import ACTIVATIONS
from ddpnopt.layers.losses import LOSSES
from ddpnopt.layers.network import rollout
from ddpnopt.optimizers import OPTIMIZERS, Members, group_key
from ddpnopt.optimizers import ddpnopt as ddpnopt_module
from ddpnopt.optimizers.ddpnopt import DDPNOpt
from ddpnopt.pack import rng
from ddpnopt.pack.engine import Trainer
from ddpnopt.preconditioners import PRECONDITIONERS
from tests.ddpnopt.problems import (
    CONVENTIONS,
    FEEDBACKS,
    SAFEGUARDS,
    assert_close,
    bits,
    ddpnopt,
    results,
    run,
    sgd,
    toy,
    updates,
)

DATA = toy()
STEPS = 100
MODULES = {"tanh": nn.Tanh, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "identity": nn.Identity}

activations = pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
conventions = pytest.mark.parametrize("convention", CONVENTIONS)
safeguards = pytest.mark.parametrize("safeguard", SAFEGUARDS)


def trainer(runs: list[RunConfig]) -> Trainer:
    return Trainer(runs, DATA, torch.device("cpu"))


def controls_of(pack: Trainer, index: int) -> list[Tensor]:
    """The weights of the run that was handed in at that place."""
    row = pack.stack.index.tolist().index(index)
    return [u[row] for u in pack.stack.controls]


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


@activations
@pytest.mark.parametrize("hidden", [(), (6, 4)])
def test_sgd_is_torchs_step_for_step(activation, hidden):
    runs = [
        run(sgd(rate), seed, activation=activation, hidden=hidden, batch_size=7)
        for rate, seed in ((0.05, 0), (0.3, 1))
    ]
    pack = trainer(runs)
    nets = [sequential(one, controls_of(pack, i)) for i, one in enumerate(runs)]
    peers = [
        torch.optim.SGD(net.parameters(), lr=one.optimizer.learning_rate)
        for net, one in zip(nets, runs, strict=True)
    ]
    inputs, targets = torch.from_numpy(DATA.train_inputs), torch.from_numpy(DATA.train_targets)
    per_epoch = len(targets) // 7
    for step in updates(pack, STEPS):
        for i, one in enumerate(runs):
            epoch, place = divmod(step - 1, per_epoch)
            rows = torch.from_numpy(rng.epoch_batches(one.seed, epoch, len(targets), 7)[place])
            peers[i].zero_grad()
            nn.functional.cross_entropy(nets[i](inputs[rows]), targets[rows]).backward()
            peers[i].step()
            ours = torch.cat([u.flatten() for u in controls_of(pack, i)])
            layers = [m for m in nets[i] if isinstance(m, nn.Linear)]
            theirs = torch.cat(
                [torch.cat((m.weight, m.bias.unsqueeze(1)), 1).flatten() for m in layers]
            ).detach()
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=f"run {i}, step {step}")


@activations
@conventions
@pytest.mark.parametrize("form", ["feedback off", "no curvature"])
def test_without_feedback_ddpnopt_is_sgd_step_for_step(activation, convention, form):
    off = {"feedback": False} if form == "feedback off" else {"curvature_scale": 0.0}
    reg = 0.1 if form == "feedback off" else 0.0
    runs = [
        run(optimizer, seed, activation=activation, batch_size=12)
        for seed in (0, 1)
        for optimizer in (sgd(0.3), ddpnopt(0.3, reg, convention=convention, **off))
    ]
    pack = trainer(runs)
    for step in updates(pack, STEPS):
        for i in (0, 2):
            ours, baseline = controls_of(pack, i + 1), controls_of(pack, i)
            for u, v in zip(ours, baseline, strict=True):
                torch.testing.assert_close(u, v, rtol=1e-12, atol=1e-12, msg=f"run {i}, step {step}")


@conventions
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_without_feedback_ddpnopt_is_sgd_bit_for_bit_where_the_batch_is_a_power_of_two(convention, dtype):
    runs = [
        run(optimizer, dtype=dtype, batch_size=16, steps=STEPS)
        for optimizer in (sgd(0.3), ddpnopt(0.3, convention=convention, feedback=False))
    ]
    baseline, partner = results(runs, DATA)
    assert bits(partner) == bits(baseline)


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
    sigma = (ACTIVATIONS["tanh"],) * 2 + (ACTIVATIONS["identity"],)
    rate_, reg_ = (torch.full((1, 1, 1), value, dtype=torch.float64) for value in (rate, reg))
    members = Members(ddpnopt(rate, reg, feedback), sigma, LOSSES["cross_entropy"], rate_, reg_)
    return DDPNOpt(members), controls, rollout(controls, sigma, inputs), targets


@safeguards
def test_epsilon_of_the_outer_product_is_in_the_feedback_alone(safeguard, monkeypatch):
    """The documented approximation: V_hh = z_h z_hᵀ + ε diag(σ'²) in the feedback; c and z know no ε."""
    epsilon, dx_seed, policies, zs = 0.25, 11, {}, {}
    for reg in (0.0, epsilon):
        found: list[Tensor] = []

        class Recorder(outer_product.OuterProductForm):
            def policy_and_value(self, layer, after, found=found):
                policy, before = super().policy_and_value(layer, after)
                found.append(torch.cat((before.V_x, before.z), -1))
                return policy, before

        monkeypatch.setattr(ddpnopt_module, "OuterProductForm", Recorder)
        feedback = FeedbackConfig("gauss_newton", factorized=True, safeguard=safeguard)
        optimizer, controls, trajectory, targets = one_batch(feedback, rate=0.1, reg=reg)
        policies[reg], zs[reg] = optimizer.policies(controls, trajectory, targets), found
    assert len(zs[0.0]) == 2
    assert all(torch.equal(a, b) for a, b in zip(zs[0.0], zs[epsilon], strict=True))
    for t in (1, 2):
        W, slope = controls[t][..., :-1], trajectory.slopes[t]
        generator = torch.Generator().manual_seed(dx_seed)
        dx = torch.randn(1, 8, W.shape[-1], generator=generator, dtype=torch.float64)
        extra = policies[epsilon][t].feedback(dx) - policies[0.0][t].feedback(dx)
        if t == 2:  # the last layer receives V_xx at T, which bears no ε
            assert torch.equal(extra, torch.zeros_like(extra))
        else:
            assert_close(extra, epsilon * slope**2 * (dx @ W.mT), 1e-12, "feedback")


def smallest_eigenvalues(safeguard: str, rate: float) -> list[float]:
    """Of V_xx before each layer, over its largest in absolute value, the worst of the batch."""
    found: list[float] = []

    class Recorder(backward.FullForm):
        def policy_and_value(self, layer, after):
            policy, before = super().policy_and_value(layer, after)
            V_xx = before.V_xx
            assert_close(V_xx, V_xx.mT, 1e-9, "symmetry of V_xx")
            eigenvalues = torch.linalg.eigvalsh((V_xx + V_xx.mT) / 2)
            found.append(float((eigenvalues.amin(-1) / eigenvalues.abs().amax(-1)).min()))
            return policy, before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpnopt_module, "FullForm", Recorder)
        feedback = FeedbackConfig("exact", convention="per_sample", safeguard=safeguard)
        optimizer, controls, trajectory, targets = one_batch(feedback, rate, reg=0.0)
        optimizer.policies(controls, trajectory, targets)
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
    assert bool(torch.isfinite(optimizer.policies(controls, trajectory, targets)[0].V_h).all())


def test_the_tables_have_a_row_for_all_that_the_configuration_allows():
    baselines, methods = get_args(config.Baseline), get_args(config.Method)
    assert set(OPTIMIZERS) == {(baseline, method) for baseline in baselines for method in methods}
    assert set(PRECONDITIONERS) == set(baselines)
    assert set(ACTIVATIONS) == set(get_args(config.Activation))
    assert set(LOSSES) == set(get_args(config.Loss))


def every_optimizer() -> dict[str, OptimizerConfig]:
    found = {}
    for baseline, method in OPTIMIZERS:
        if method == "baseline":
            found[f"{baseline}-baseline"] = OptimizerConfig(baseline, method, 0.05)
        else:
            for name, feedback in FEEDBACKS.items():
                found[f"{baseline}-{name}"] = OptimizerConfig(baseline, method, 0.05, 1e-4, feedback)
    return found


@pytest.mark.parametrize("optimizer", every_optimizer().values(), ids=every_optimizer().keys())
def test_every_optimizer_trains(optimizer):
    if optimizer.feedback is not None and optimizer.feedback.convention == "per_sample":
        # κ = 1/B, as the table of algorithm.md has it: at κ = 1 the paper's recursion diverges.
        optimizer = replace(optimizer, feedback=replace(optimizer.feedback, curvature_scale=1 / 16))
    (result,) = results([run(optimizer, steps=200, eval_every=200)], DATA)
    start, end = result.curves["train_loss"].tolist()
    assert result.state == "completed"
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
    ones = torch.ones(1, 1, 1)
    with pytest.raises(ConfigError, match="feedback"):
        DDPNOpt(Members(sgd(), (), LOSSES["cross_entropy"], ones, ones))
