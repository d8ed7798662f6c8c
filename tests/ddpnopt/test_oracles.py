"""The Bellman sweep, the update and the losses against dense automatic differentiation in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from unittest.mock import patch

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, hessian

from ddpnopt.config import FeedbackConfig
from ddpnopt.ddp.backward import FullForm, Gains
from ddpnopt.ddp.outer_product import OuterProductForm
from ddpnopt.layers.activations import ACTIVATIONS
from ddpnopt.layers.losses import LOSSES
from ddpnopt.layers.network import Controls, rollout
from ddpnopt.optimizers import Members
from ddpnopt.optimizers import ddpnopt as ddpnopt_module
from ddpnopt.optimizers.ddpnopt import DDPNOpt
from tests.ddpnopt.problems import FEEDBACKS, assert_close, ddpnopt
from tests.reference import dense

RELATIVE = 1e-9
ROUNDING = 1e-14  # of p - 1, where p is nearly one
RUNS = 2
ORACLES = {"cross_entropy": dense.cross_entropy}

# Shrinking would take minutes by the oracle, and the problems are small as they are.
few = settings(
    max_examples=6, deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate)
)
cases = pytest.mark.parametrize("name", FEEDBACKS)
activations = pytest.mark.parametrize("activation", sorted(ACTIVATIONS))


@dataclass(frozen=True)
class Problem:
    """Two runs on batches of their own, with numbers of their own but one κ."""

    widths: tuple[int, ...]
    batch: int
    seed: int
    learning_rate: tuple[float, ...]
    vxx_reg: tuple[float, ...]
    curvature_scale: float

    def tensors(self) -> tuple[Controls, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        layers = zip(self.widths[:-1], self.widths[1:], strict=True)
        controls = [normal(RUNS, o, i + 1) / i**0.5 for i, o in layers]
        inputs = normal(RUNS, self.batch, self.widths[0])
        targets = torch.randint(self.widths[-1], (RUNS, self.batch), generator=generator)
        return controls, inputs, targets


def per_run(values: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[float, ...]]:
    return st.tuples(*[values] * RUNS)


problems = st.builds(
    Problem,
    widths=st.tuples(st.integers(1, 4), st.lists(st.integers(1, 4), max_size=3), st.integers(2, 4)).map(
        lambda w: (w[0], *w[1], w[2])
    ),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    learning_rate=per_run(st.floats(0.05, 2)),
    vxx_reg=per_run(st.just(0.0) | st.floats(1e-4, 0.5)),
    curvature_scale=st.just(1.0) | st.floats(0, 3),
)


def sigmas(problem: Problem, activation: str) -> list[str]:
    return [activation] * (len(problem.widths) - 2) + ["identity"]


def make(problem: Problem, activation: str, feedback: FeedbackConfig) -> DDPNOpt:
    def column(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1)

    config = ddpnopt(options=feedback, curvature_scale=problem.curvature_scale)
    sigma = tuple(ACTIVATIONS[name] for name in sigmas(problem, activation))
    rates, regs = column(problem.learning_rate), column(problem.vxx_reg)
    return DDPNOpt(Members(config, sigma, LOSSES["cross_entropy"], rates, regs))


def oracle_options(problem: Problem, feedback: FeedbackConfig, r: int) -> dense.Options:
    choices = asdict(feedback) | {"curvature_scale": problem.curvature_scale}
    del choices["feedback"]
    return dense.Options(problem.learning_rate[r], problem.vxx_reg[r], **choices)


def oracle_layers(
    problem: Problem, activation: str, feedback: FeedbackConfig
) -> Iterator[tuple[int, int, int, dense.Layer]]:
    """Yield run, sample, layer and what the oracle finds there."""
    controls, inputs, targets = problem.tensors()
    functions = [dense.SIGMA[name] for name in sigmas(problem, activation)]
    for r in range(RUNS):
        options = oracle_options(problem, feedback, r)
        for b in range(problem.batch):
            own = [u[r] for u in controls]
            found = dense.backward(own, functions, inputs[r, b], targets[r, b], options, problem.batch)
            for t, layer in enumerate(found):
                yield r, b, t, layer


@contextmanager
def recorded(values: list) -> Iterator[None]:
    """Collect the value before each layer, from the last layer to the second."""

    def recorder(form_class):
        class Recorder:
            def __init__(self, *args):
                self.form = form_class(*args)

            def policy_and_value(self, layer, after):
                policy, before = self.form.policy_and_value(layer, after)
                values.append(before)
                return policy, before

        return Recorder

    with (
        patch.object(ddpnopt_module, "FullForm", recorder(FullForm)),
        patch.object(ddpnopt_module, "OuterProductForm", recorder(OuterProductForm)),
    ):
        yield


@activations
@cases
@given(problem=problems)
@few
def test_sweep(name, activation, problem):
    feedback = FEEDBACKS[name]
    optimizer = make(problem, activation, feedback)
    controls, inputs, targets = problem.tensors()
    values: list = []
    with recorded(values):
        policies = optimizer.policies(controls, rollout(controls, optimizer.members.sigma, inputs), targets)
    assert len(policies) == len(controls)
    values = [None, *values[::-1]]
    probe = torch.linspace(-1, 1, 4, dtype=torch.float64)
    for r, b, t, layer in oracle_layers(problem, activation, feedback):
        where = f"run {r}, sample {b}, layer {t}: "
        outputs, biased = controls[t].shape[1:]
        Q_ux = layer.Q.Q_ux.reshape(outputs, biased, -1)
        x_bar = torch.cat((layer.x, torch.ones(1, dtype=torch.float64)))
        Q_u = torch.outer(policies[t].V_h[r, b], x_bar).flatten()
        assert_close(Q_u, layer.Q.Q_u, RELATIVE, where + "Q_u")
        if t == 0:
            continue
        A = Q_ux[:, -1, :]  # the entry of x̄ that is one
        assert_close(Q_ux, A.unsqueeze(1) * x_bar.reshape(1, -1, 1), RELATIVE, where + "the oracle's Q_ux")
        dx = probe[: biased - 1].expand(RUNS, problem.batch, -1)
        assert_close(policies[t].feedback(dx)[r, b], A @ dx[r, b], RELATIVE, where + "feedback")
        V_xx = getattr(values[t], "V_xx", None)
        if V_xx is None:
            V_xx = values[t].z.unsqueeze(-1) * values[t].z.unsqueeze(-2)
        assert_close(values[t].V_x[r, b], layer.before.V_x, RELATIVE, where + "V_x")
        assert_close(V_xx[r, b], layer.before.V_xx, RELATIVE, where + "V_xx")
        if isinstance(policies[t], Gains):
            assert_close(policies[t].A[r, b], A, RELATIVE, where + "A")
            assert_close(policies[t].X[r, b], layer.closed_loop, RELATIVE, where + "closed loop")


@activations
@cases
@given(problem=problems)
@few
def test_update(name, activation, problem):
    optimizer = make(problem, activation, FEEDBACKS[name])
    controls, inputs, targets = problem.tensors()
    updated = [u.clone() for u in controls]
    optimizer.step(updated, rollout(updated, optimizer.members.sigma, inputs), targets)
    functions = [dense.SIGMA[s] for s in sigmas(problem, activation)]
    for r in range(RUNS):
        options = oracle_options(problem, FEEDBACKS[name], r)
        expected = dense.step([u[r] for u in controls], functions, inputs[r], targets[r], options)
        for t, u in enumerate(expected):
            change, expected_change = updated[t][r] - controls[t][r], u - controls[t][r]
            assert_close(change, expected_change, RELATIVE, f"run {r}, layer {t}: update")


@pytest.mark.parametrize("name", sorted(LOSSES))
@given(
    batch=st.integers(1, 3), classes=st.integers(2, 12), seed=st.integers(0, 2**32), scale=st.floats(0.1, 20)
)
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
def test_losses(name, batch, classes, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(RUNS, batch, classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(classes, (RUNS, batch), generator=generator)
    loss, phi = LOSSES[name], ORACLES[name]
    value, gradient, curvature = (f(logits, targets) for f in (loss.value, loss.gradient, loss.hessian))
    for r in range(RUNS):
        for b in range(batch):
            x, y = logits[r, b], targets[r, b]
            assert_close(value[r, b], phi(x, y), RELATIVE, "φ", ROUNDING)
            assert_close(gradient[r, b], grad(phi)(x, y), RELATIVE, "∇φ", ROUNDING)
            assert_close(curvature[r, b], hessian(phi)(x, y), RELATIVE, "∇²φ", ROUNDING)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_of_certain_predictions_are_finite(name):
    logits = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]]], dtype=torch.float64)
    targets = torch.tensor([[0, 0]])
    loss = LOSSES[name]
    assert loss.value(logits, targets).tolist() == [[0.0, 2e4]]
    for derivative in (loss.gradient, loss.hessian):
        assert bool(torch.isfinite(derivative(logits, targets)).all())


@activations
def test_slopes(activation):
    h = torch.linspace(-30, 30, 601, dtype=torch.float64) + 1e-3
    act = ACTIVATIONS[activation]
    expected = torch.func.vmap(grad(dense.SIGMA[activation]))(h)
    assert_close(act.forward(h), dense.SIGMA[activation](h), 1e-14, "σ")
    slope = torch.ones_like(h) if act.slope is None else act.slope(h, act.forward(h))
    assert_close(slope, expected, 1e-13, "σ'")


def test_sigmoid_is_accurate_where_it_is_small():
    h = torch.tensor([-1000.0, -80.0, -20.0, 0.0, 1000.0], dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS["sigmoid"].forward(h), torch.sigmoid(h), rtol=1e-14, atol=0)
