"""Every derivative of Q and V, and the update, against dense automatic differentiation in float64.

Hypothesis draws the nets (fully connected and convolutional), their layers, the losses and the numbers; the
parameters of the tests are the form of V_xx with its order, and the preconditioner.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, hessian

from ddpnopt.config import PRECONDITIONER_OF, BaselineOptions, FeedbackConfig
from ddpnopt.ddp.backward import Sweep
from ddpnopt.ddp.outer_product import OuterProductValue
from ddpnopt.layers import network as net_module
from ddpnopt.layers.activations import ACTIVATIONS
from ddpnopt.layers.base import Tape
from ddpnopt.layers.losses import LOSSES, max_mahalanobis_centers
from ddpnopt.layers.modules import convert
from ddpnopt.layers.network import rollout
from ddpnopt.optimizers.ddpnopt import DDPNOpt
from tests.ddpnopt.nets import MODULES, RUNS, Case, Net, cases
from tests.ddpnopt.problems import assert_close
from tests.reference import oracle

RELATIVE = 1e-9
ABSOLUTE = 1e-12  # of entries of order one that ought to cancel
ROUNDING = 1e-14  # of p - 1, where p is nearly one

FORMS: dict[str, dict[str, Any]] = {
    "exact": {"terminal_hessian": "exact"},
    "gauss_newton": {"terminal_hessian": "gauss_newton", "factorized": False},
    "outer_product": {"terminal_hessian": "gauss_newton", "factorized": True},
    "exact_2nd": {"terminal_hessian": "exact", "dynamics": "second_order"},
    "gauss_newton_2nd": {"terminal_hessian": "gauss_newton", "dynamics": "second_order"},
}
every_form = pytest.mark.parametrize("form", FORMS)
every_preconditioner = pytest.mark.parametrize("baseline", PRECONDITIONER_OF)
every_net = pytest.mark.parametrize("kind", ["fcn", "cnn"])
examples = {"fcn": 8, "cnn": 4}


def few(kind: str) -> settings:
    # Shrinking would take minutes by the oracle, and the problems are small as they are.
    return settings(
        max_examples=examples[kind],
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=[HealthCheck.filter_too_much],
    )


@every_form
@every_preconditioner
@every_net
def test_sweep(kind, baseline, form):
    @few(kind)
    @given(case=cases(kind, baseline, FORMS[form]))
    def compare(case: Case) -> None:
        members = case.members(baseline)
        optimizer = DDPNOpt(members)
        trajectory = rollout(members.network, case.controls, case.inputs)
        sweep = optimizer.sweep(case.controls, trajectory, case.targets)
        found = Found(case, optimizer, sweep, trajectory)
        for r in range(RUNS):
            controls = [u[r] for u in case.controls]
            options = case.oracle_options(baseline, r)
            expected = oracle.backward(
                case.net.oracle(), controls, case.inputs[r], case.targets[r], case.oracle_loss(), options
            )
            assume_known(expected)
            for t in range(len(controls)):
                assert_inverse(optimizer, t, r, expected.M[t], controls[t])
                for b, layer in enumerate(expected.layers[t]):
                    found.compare(t, r, b, layer)

    compare()


@every_form
@every_preconditioner
@every_net
def test_update(kind, baseline, form):
    """Two updates, so that what a preconditioner and momentum remember counts."""

    @few(kind)
    @given(case=cases(kind, baseline, FORMS[form]))
    def compare(case: Case) -> None:
        members = case.members(baseline)
        optimizer = DDPNOpt(members)
        stages, loss = case.net.oracle(), case.oracle_loss()
        states: list[oracle.State | None] = [None] * RUNS
        controls = case.controls
        for k in range(2):
            updated = [u.clone() for u in controls]
            optimizer.step(updated, rollout(members.network, updated, case.inputs), case.targets)
            expected = []
            for r in range(RUNS):
                given_ = ([u[r] for u in controls], case.inputs[r], case.targets[r], loss)
                options = case.oracle_options(baseline, r)
                sweep = oracle.backward(stages, *given_, options, states[r])
                assume_known(sweep)
                # Second-order dynamics can make psd's Q_uu singular: no digits are left to compare then.
                Q_uus = [layer.Q_uu for layers in sweep.layers[1:] for layer in layers]
                assume(all(float(torch.linalg.cond(Q_uu)) < 1e4 for Q_uu in Q_uus))
                new, states[r] = oracle.step(stages, *given_, options, states[r])
                expected.append(new)
            for t in range(len(controls)):
                for r in range(RUNS):
                    change, ours = expected[r][t] - controls[t][r], updated[t][r] - controls[t][r]
                    assert_close(ours, change, RELATIVE, f"update {k} of layer {t}, run {r}", ABSOLUTE)
            # Both go on from the same weights: an update may amplify rounding errors.
            controls = [torch.stack([new[t] for new in expected]) for t in range(len(controls))]

    compare()


def assume_known(sweep: oracle.Sweep) -> None:
    """Leave out what the oracle does not define: KFAC's damping where a dead layer makes a factor vanish."""
    assume(all(bool(torch.isfinite(M).all()) for M in sweep.M))


class Found:
    """The library's derivatives, asked for one sample at a time."""

    def __init__(self, case: Case, optimizer: DDPNOpt, sweep: Sweep, trajectory) -> None:
        self.case, self.optimizer, self.sweep, self.trajectory = case, optimizer, sweep, trajectory
        self.units = optimizer.units(case.targets)

    def compare(self, t: int, r: int, b: int, layer: oracle.Layer) -> None:
        where = f"layer {t}, run {r}, sample {b}: "
        affine, u = self.optimizer.members.network.stages[t].affine, self.case.controls[t]
        inputs, policy = self.trajectory.inputs[t], self.sweep.policies[t]
        one = slice(b, b + 1)

        def check(actual: Tensor, expected: Tensor, what: str) -> None:
            # Q and V of one layer are of one scale; entries that cancel are not known any better.
            scale = max(1.0, float(layer.Q.Q_ux.abs().max()), float(layer.Q.Q_u.abs().max()))
            assert_close(actual.flatten(), expected.flatten(), RELATIVE, where + what, ABSOLUTE * scale)

        Q_u = affine.gradient(policy.V_h[:, one], inputs[:, one], u)[r]
        decay = self.case.options.weight_decay * self.units.share
        check(Q_u + decay * u[r], layer.Q.Q_u, "Q_u")
        check(affine.pull_back(policy.V_h.unsqueeze(2), inputs, u)[r, b], layer.Q.Q_x, "Q_x")
        if t == 0:
            return
        shape = affine.shape(inputs)
        batch = inputs.shape[1]
        for i in range(len(layer.x)):
            dx = torch.zeros(RUNS, batch, len(layer.x), dtype=u.dtype)
            dx[..., i] = 1
            dx = dx.reshape(RUNS, batch, *shape)
            response = policy.feedback(dx)
            column = affine.gradient(response[:, one], inputs[:, one], u)[r]
            if policy.second_order:
                column = column + affine.tangent_gradient(policy.V_h[:, one], dx[:, one], u)[r]
            check(column, layer.Q.Q_ux[:, i], f"Q_ux, column {i}")
            Q_xx = affine.pull_back(response.unsqueeze(2), inputs, u)[r, b]
            check(Q_xx, layer.Q.Q_xx[:, i], f"Q_xx, column {i}")
        value = self.sweep.values[t]
        if isinstance(value, OuterProductValue):
            z = value.z.flatten(2)
            V_xx = z.unsqueeze(-1) * z.unsqueeze(-2)
        else:
            V_xx = value.V_xx
        check(value.V_x[r, b], layer.before.V_x, "V_x")
        check(V_xx[r, b], layer.before.V_xx, "V_xx")


def assert_inverse(optimizer: DDPNOpt, t: int, r: int, M: Tensor, u: Tensor) -> None:
    """Compare M_t⁻¹ on a direction, for which both runs of the pack are needed."""
    generator = torch.Generator().manual_seed(7)
    d = torch.randn(RUNS, *u.shape, generator=generator, dtype=u.dtype)
    actual = optimizer.descent.preconditioner.inverse(t).apply(d)[r]
    expected = torch.linalg.solve(M, d[r].flatten()).reshape(u.shape)
    assert_close(actual, expected, RELATIVE, f"layer {t}, run {r}: M⁻¹ d", ABSOLUTE)


def test_dropout_masks_are_those_of_both_passes():
    net = Net()
    net.linear(4, 6)
    net.map(*_made("tanh"))
    net.map(nn.Dropout(0.5), oracle.identity)
    net.linear(6, 3)
    generator = torch.Generator().manual_seed(0)
    case = Case(
        net=net,
        inputs=torch.randn(RUNS, 3, 4, generator=generator, dtype=torch.float64),
        targets=torch.randint(3, (RUNS, 3), generator=generator),
        controls=[torch.randn(RUNS, *s, generator=generator, dtype=torch.float64) for s in ((6, 5), (3, 7))],
        loss="cross_entropy",
        learning_rate=(0.3, 0.1),
        vxx_reg=(0.01, 0.0),
        feedback=FeedbackConfig(),
        options=BaselineOptions(),
    )
    members = case.members("sgd")
    torch.manual_seed(5)
    trajectory = rollout(members.network, case.controls, case.inputs)
    masks = trajectory.tapes[0][1].kept
    assert set(masks.flatten().tolist()) == {0.0, 2.0}
    updated = [u.clone() for u in case.controls]
    DDPNOpt(members).step(updated, trajectory, case.targets)
    for r in range(RUNS):
        sigma = [oracle.chain(torch.tanh, oracle.dropout(mask)) for mask in masks[r]]
        stages = [oracle.linear(4, 6, sigma=sigma), oracle.linear(6, 3)]
        expected, _ = oracle.step(
            stages,
            [u[r] for u in case.controls],
            case.inputs[r],
            case.targets[r],
            oracle.cross_entropy,
            case.oracle_options("sgd", r),
        )
        for t, u in enumerate(expected):
            assert_close(updated[t][r], u, RELATIVE, f"run {r}, layer {t}")


def _made(name: str) -> tuple[nn.Module, oracle.Map]:
    module, sigma = MODULES[name]
    return module(), sigma


def _oracle_loss(name: str, classes: int) -> oracle.Loss:
    if name == "mmc":
        return oracle.mmc(max_mahalanobis_centers(classes))
    return {"cross_entropy": oracle.cross_entropy, "mse": oracle.mse}[name]


@pytest.mark.parametrize("name", sorted(LOSSES))
@given(
    batch=st.integers(1, 3), classes=st.integers(2, 12), seed=st.integers(0, 2**32), scale=st.floats(0.1, 20)
)
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
def test_losses(name, batch, classes, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(RUNS, batch, classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(classes, (RUNS, batch), generator=generator)
    loss, phi = LOSSES[name], _oracle_loss(name, classes)
    value, gradient, curvature = (f(logits, targets) for f in (loss.value, loss.gradient, loss.hessian))
    for r in range(RUNS):
        for b in range(batch):
            x, y = logits[r, b], targets[r, b]
            assert_close(value[r, b], phi(x, y), RELATIVE, "φ", ROUNDING)
            assert_close(gradient[r, b], grad(phi)(x, y), RELATIVE, "∇φ", ROUNDING)
            assert_close(curvature[r, b], hessian(phi)(x, y), RELATIVE, "∇²φ", ROUNDING)


def test_squared_error_takes_values():
    x, y = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    loss = LOSSES["mse"]
    torch.testing.assert_close(loss.value(x, y), ((x - y) ** 2).sum(-1) / 2)
    torch.testing.assert_close(loss.gradient(x, y), x - y)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_max_mahalanobis_centers_are_a_simplex(classes):
    centers = max_mahalanobis_centers(classes, norm=7.0)
    gram = torch.full((classes, classes), -7.0 / (classes - 1), dtype=torch.float64)
    gram.fill_diagonal_(7.0)
    torch.testing.assert_close(centers @ centers.T, gram)
    # The nearest centre is that of the largest entry, which is how accuracy is counted.
    x = torch.randn(100, classes, dtype=torch.float64)
    assert torch.equal(torch.cdist(x, centers).argmin(-1), x.argmax(-1))


def test_cross_entropy_of_certain_predictions_is_finite():
    logits = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]]], dtype=torch.float64)
    targets = torch.tensor([[0, 0]])
    loss = LOSSES["cross_entropy"]
    assert loss.value(logits, targets).tolist() == [[0.0, 2e4]]
    for derivative in (loss.gradient, loss.hessian):
        assert bool(torch.isfinite(derivative(logits, targets)).all())


@pytest.mark.parametrize("activation", [name for name, made in ACTIVATIONS.items() if made is not None])
def test_derivatives_of_activations(activation):
    h = torch.linspace(-30, 30, 601, dtype=torch.float64) + 1e-3
    act = ACTIVATIONS[activation]
    leaky = oracle.leaky_relu(0.01)
    sigma = leaky if activation == "leaky_relu" else MODULES[activation][1]
    y, kept = act.forward(h)
    assert_close(y, sigma(h), 1e-14, "σ")
    jacobian = act.jacobian(Tape(kept, (601,), (601,)))
    assert_close(jacobian.slope, torch.func.vmap(grad(sigma))(h), 1e-13, "σ'")
    bend = torch.zeros_like(h) if jacobian.bend is None else jacobian.bend()
    assert_close(bend, torch.func.vmap(grad(grad(sigma)))(h), 1e-12, "σ''")


def test_sigmoid_is_accurate_where_it_is_small():
    h = torch.tensor([-1000.0, -80.0, -20.0, 0.0, 1000.0], dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS["sigmoid"].value(h), torch.sigmoid(h), rtol=1e-14, atol=0)


def test_a_net_maps_as_torch_does():
    net = Net()
    net.conv(2, 4, 3, stride=2, padding=1, groups=2)
    net.map(*_made("gelu"))
    net.map(nn.AvgPool2d(2, 1), oracle.avg_pool2d(2, 1))
    net.map(nn.Flatten(), oracle.flatten)
    net.linear(16, 3, bias=False)
    model = net.sequential()
    converted = convert(model)
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    controls = [slot.read() for slot in converted.slots]
    torch.testing.assert_close(net_module.predict(converted.network, controls, x.unsqueeze(0))[0], model(x))
