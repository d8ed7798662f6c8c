"""Inspections against the dense oracle in float64, and that they change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vjp
from torch.nn import functional

from ddpnopt import BaselineOptimizer, DDPNOpt
from ddpnopt.ddp import operators
from ddpnopt.deconvolution import deconvolve
from ddpnopt.errors import ConfigError
from ddpnopt.introspection import (
    Inspection,
    LayerInspection,
    UpdateNorms,
    leading_feedback_image,
    policy_spectrum,
)
from ddpnopt.layers import modules
from tests.ddpnopt.problems import assert_close
from tests.reference import oracle, preconditioners

RELATIVE = 1e-9
BATCH = 3
LEARNING_RATE = 0.2
VXX_REG = 0.05
DECAY = 0.1

FORMS: dict[str, dict[str, Any]] = {
    "exact": {"terminal_hessian": "exact", "factorized": False},
    "gauss-newton": {"terminal_hessian": "gauss_newton", "factorized": False},
    "outer product": {"terminal_hessian": "gauss_newton", "factorized": True},
    "outer product, ε": {"terminal_hessian": "gauss_newton", "factorized": True, "vxx_reg": VXX_REG},
    "exact, ε": {"terminal_hessian": "exact", "factorized": False, "vxx_reg": VXX_REG},
    "second order": {"terminal_hessian": "exact", "factorized": False, "dynamics": "second_order"},
}

NUMBERS: dict[str, tuple[dict[str, Any], Callable[[], oracle.Preconditioner]]] = {
    "identity": ({}, preconditioners.Identity),
    "rmsprop": ({"rho": 0.9, "eps": 0.2}, lambda: preconditioners.RMSprop("batch", 0.9, 0.2)),
    "adam": ({"eps": 0.2}, lambda: preconditioners.Adam(eps=0.2)),
    "kfac": ({"damping": 0.3, "factor_decay": 0.5}, lambda: preconditioners.KFAC(0.3, 0.5)),
    "ekfac": ({"damping": 0.3}, lambda: preconditioners.EKFAC(0.3)),
}


def fcn() -> tuple[nn.Sequential, list[oracle.Stage], tuple[int, ...]]:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False), nn.Sigmoid(), nn.Linear(3, 3)
    )
    stages = [
        oracle.linear(3, 4, sigma=torch.tanh),
        oracle.linear(4, 3, bias=False, sigma=torch.sigmoid),
        oracle.linear(3, 3),
    ]
    return model, stages, (3,)


def cnn() -> tuple[nn.Sequential, list[oracle.Stage], tuple[int, ...]]:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(4, 2, 2, padding=1, groups=2),
        nn.Sequential(nn.Tanh(), nn.AvgPool2d(2, 1)),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    stages = [
        oracle.conv2d(2, 4, 2, groups=2, sigma=oracle.chain(oracle.relu, oracle.max_pool2d(2, 1))),
        oracle.conv2d(
            4,
            2,
            2,
            padding=1,
            groups=2,
            sigma=oracle.chain(torch.tanh, oracle.avg_pool2d(2, 1), oracle.flatten),
        ),
        oracle.linear(8, 3),
    ]
    return model, stages, (2, 4, 4)


NETS = {"fcn": fcn, "cnn": cnn}
CONVENTIONS = ("batch_mean", "per_sample")


class Problem:
    """A DDPNOpt and the oracle's sweep for the same net, batch and numbers."""

    def __init__(self, net: str, preconditioner: str, seed: int = 0, **options: Any) -> None:
        torch.manual_seed(seed)
        self.model, self.stages, shape = NETS[net]()
        self.model.double()
        self.inputs = torch.randn(BATCH, *shape, dtype=torch.float64)
        self.targets = torch.arange(BATCH) % 3
        numbers, dense = NUMBERS[preconditioner]
        shared = {"weight_decay": DECAY, **options}
        self.optimizer = DDPNOpt(
            self.model, lr=LEARNING_RATE, preconditioner=preconditioner, **numbers, **shared
        )
        self.options = oracle.Options(LEARNING_RATE, preconditioner=dense(), **shared)

    def controls(self) -> list[Tensor]:
        return [slot.read()[0] for slot in self.optimizer.slots]

    def oracle(self, state: oracle.State | None = None) -> oracle.Sweep:
        return oracle.backward(
            self.stages, self.controls(), self.inputs, self.targets, oracle.cross_entropy, self.options, state
        )

    def inspect(self) -> Inspection:
        return self.optimizer.inspect(self.inputs, self.targets)


def stacked(layers: list[oracle.Layer], what: Callable[[oracle.Layer], Tensor]) -> Tensor:
    return torch.stack([what(layer) for layer in layers])


def assert_layers_equal(inspection: Inspection, problem: Problem, sweep: oracle.Sweep) -> None:
    for t, (layer, expected) in enumerate(zip(inspection.layers, sweep.layers, strict=True)):

        def check(actual: Tensor, value: Tensor, what: str, t: int = t) -> None:
            assert not actual.is_inference(), what
            assert_close(actual, value.reshape(actual.shape), RELATIVE, f"{what} of layer {t}")

        k = stacked(expected, lambda e: e.k)
        check(layer.x, stacked(expected, lambda e: e.x), "x")
        check(layer.V_h, stacked(expected, lambda e: e.V_h), "V_h")
        check(layer.k_per_sample(), k, "k per sample")
        check(layer.k, problem.options.total(k), "k")
        units = torch.eye(layer.k.numel(), dtype=torch.float64).reshape(-1, *layer.k.shape)
        inverse = torch.stack([layer.inverse.apply(unit.unsqueeze(0)).flatten() for unit in units])
        check(inverse, torch.linalg.inv(sweep.M[t]), "M⁻¹")
        if t == 0:
            continue
        V_xx = stacked(expected, lambda e: e.before.V_xx)
        check(layer.V_x, stacked(expected, lambda e: e.before.V_x), "V_x")
        check(layer.V_xx.dense(), V_xx, "V_xx")
        check(layer.K.dense(), stacked(expected, lambda e: e.K), "K")


def assert_operators_act_as_their_matrices(layer: LayerInspection) -> None:
    generator = torch.Generator().manual_seed(1)
    dx = torch.randn(layer.x.shape, generator=generator, dtype=torch.float64)
    du = torch.randn(BATCH, *layer.k.shape, generator=generator, dtype=torch.float64)
    K, V_xx = layer.K.dense(), layer.V_xx.dense()
    forward = torch.einsum("bpn,bn->bp", K, dx.flatten(1)).reshape(du.shape)
    backward = torch.einsum("bpn,bp->bn", K, du.flatten(1)).reshape(dx.shape)
    curved = torch.einsum("bmn,bn->bm", V_xx, dx.flatten(1)).reshape(dx.shape)
    assert_close(layer.K.apply(dx), forward, RELATIVE, "K δx")
    assert_close(layer.K.adjoint(du), backward, RELATIVE, "Kᵀ δu")
    assert_close(layer.K.gram(), K.mT @ K, RELATIVE, "KᵀK")
    assert_close(layer.V_xx.matvec(dx), curved, RELATIVE, "V_xx δx")


def assert_singular_vectors(layer: LayerInspection, dense: Tensor) -> None:
    K = layer.K
    most = min(dense.shape[1:])
    _, values, rows = torch.linalg.svd(dense, full_matrices=False)
    assert_close(K.singular_values(most), values, RELATIVE, "singular values", float(values.max()) * RELATIVE)
    vectors = K.right_singular_vectors(1 if K.rank_one else most)
    flat = vectors.flatten(2)
    aligned = (flat[:, 0] * rows[:, 0]).sum(1).abs()
    assert_close(aligned, torch.ones(BATCH, dtype=torch.float64), RELATIVE, "leading vector")
    assert_close(flat @ flat.mT, torch.eye(flat.shape[1]).double().expand(BATCH, -1, -1), RELATIVE, "lengths")
    answers = torch.linalg.vector_norm(dense @ flat.mT, dim=1)
    assert_close(answers, values[:, : flat.shape[1]], RELATIVE, "|K v|", float(values.max()) * RELATIVE)
    assert bool((flat.gather(2, flat.abs().argmax(dim=2, keepdim=True)) > 0).all())
    assert vectors.shape[2:] == layer.x.shape[1:]


def assert_spectra(inspection: Inspection, t: int, K: Tensor) -> None:
    expected = {"control": (K @ K.mT).mean(dim=0), "state": (K.mT @ K).mean(dim=0)}
    for side, matrix in expected.items():
        whole = torch.linalg.eigvalsh(matrix).flip(0)
        found = policy_spectrum(inspection, t, side)
        assert len(found) <= len(whole)
        padded = functional.pad(found, (0, len(whole) - len(found)))
        assert_close(padded, whole, RELATIVE, f"{side} spectrum of layer {t}", RELATIVE * float(whole[0]))


CASES = [
    (net, form, preconditioner, CONVENTIONS[i % 2], ("clamp", "psd")[i // 2 % 2])
    for i, (net, form, preconditioner) in enumerate(product(NETS, FORMS, NUMBERS))
]


@pytest.mark.parametrize(("net", "form", "preconditioner", "convention", "safeguard"), CASES)
def test_it_is_the_oracles(net, form, preconditioner, convention, safeguard):
    problem = Problem(net, preconditioner, convention=convention, safeguard=safeguard, **FORMS[form])
    inspection, sweep = problem.inspect(), problem.oracle()
    assert_layers_equal(inspection, problem, sweep)
    for layer, expected in zip(inspection.layers[1:], sweep.layers[1:], strict=True):
        assert_operators_act_as_their_matrices(layer)
        K = stacked(expected, lambda e: e.K)
        assert_singular_vectors(layer, K)
        assert_spectra(inspection, layer.t, K)


@pytest.mark.parametrize("preconditioner", NUMBERS)
def test_it_is_the_oracles_after_steps(preconditioner):
    problem = Problem("fcn", preconditioner, vxx_reg=VXX_REG)
    state = None
    for _ in range(2):
        _, state = oracle.step(
            problem.stages,
            problem.controls(),
            problem.inputs,
            problem.targets,
            oracle.cross_entropy,
            problem.options,
            state,
        )
        problem.optimizer.step(problem.inputs, problem.targets)
    assert_layers_equal(problem.inspect(), problem, problem.oracle(state))


def test_the_policy_is_what_a_step_applies():
    problem = Problem("fcn", "ekfac", vxx_reg=VXX_REG, convention="per_sample")
    inspection, before = problem.inspect(), problem.controls()
    loss = problem.optimizer.step(problem.inputs, problem.targets)
    assert float(loss) == float(inspection.loss)
    affine = [m for m in problem.model if isinstance(m, nn.Linear)]
    for layer, u, module in zip(inspection.layers, before, affine, strict=True):
        x_hat = problem.model[: list(problem.model).index(module)](problem.inputs).detach()
        du = layer.k
        if layer.t > 0:
            du = du + layer.K.apply(x_hat - layer.x).mean(dim=0)
        assert_close(problem.controls()[layer.t], u + du, RELATIVE, f"u of layer {layer.t}")


def test_loss_output_and_names():
    problem = Problem("cnn", "identity")
    inspection = problem.inspect()
    assert_close(inspection.output, problem.model(problem.inputs).detach(), RELATIVE, "x_T")
    expected = functional.cross_entropy(problem.model(problem.inputs), problem.targets)
    assert_close(inspection.loss, expected.detach(), RELATIVE, "loss")
    assert [layer.name for layer in inspection.layers] == ["0", "3", "6"]
    assert inspection.layer(-1) is inspection.layers[2]


@pytest.mark.parametrize(("loss", "lost"), [("mmc", 0), ("mse", 0), ("cross_entropy", 1)])
def test_the_prediction_layers_policy_answers_as_many_directions_as_there_are_classes(loss, lost):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).double()
    inputs, targets = torch.randn(12, 6).double(), torch.arange(12) % 5
    for _ in range(3):
        optimizer = DDPNOpt(model, loss, lr=0.1, preconditioner="ekfac", vxx_reg=VXX_REG)
        spectrum = policy_spectrum(optimizer.inspect(inputs, targets))
        assert len(spectrum) == 8
        assert int((spectrum > 1e-12 * spectrum[0]).sum()) == 5 - lost
        optimizer.step(inputs, targets)


# --- Nothing changes ----------------------------------------------------------------------------------------


def bits(optimizer: DDPNOpt) -> str:
    torch.set_printoptions(precision=17, threshold=10**6)
    try:
        return repr((optimizer.state_dict(), [p.tolist() for p in optimizer.param_groups[0]["params"]]))
    finally:
        torch.set_printoptions(profile="default")


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"preconditioner": "adam"},
        {"preconditioner": "rmsprop", "momentum": 0.9},
        {"preconditioner": "kfac", "inverse_every": 2, "factor_decay": 0.5},
        {"preconditioner": "ekfac", "inverse_every": 2, "factor_decay": 0.5},
    ],
)
def test_an_inspection_changes_nothing(options, steps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 3)).double()
    inputs, targets = torch.randn(6, 4).double(), torch.arange(6) % 3
    twins = []
    for inspected in (True, False):
        torch.manual_seed(1)
        own = copy.deepcopy(model)
        optimizer = DDPNOpt(own, lr=0.1, vxx_reg=0.1, track_updates=True, **options)
        for _ in range(steps):
            optimizer.step(inputs, targets)
        if inspected:
            before, drawn = bits(optimizer), torch.random.get_rng_state()
            members = optimizer._inner.members
            inspection = optimizer.inspect(inputs, targets)
            inspection.layers[1].K.singular_values(2)
            assert bits(optimizer) == before
            assert optimizer._inner.members is members
            assert torch.equal(torch.random.get_rng_state(), drawn)
            assert all(p.grad is None for p in own.parameters())
            for part in (inspection.layers[1].inverse.inputs, inspection.layers[1].inverse.scale):
                assert part is None or not part.is_inference()
        loss = optimizer.step(inputs, targets)
        twins.append((float(loss), optimizer.update_norms, bits(optimizer)))
    assert twins[0] == twins[1]


def test_it_follows_a_scheduler_and_leaves_frozen_layers_alone():
    problem = Problem("fcn", "identity")
    k = problem.inspect().layers[2].k  # of the last layer, whose Q_u knows no learning rate
    problem.optimizer.param_groups[0]["lr"] = 2 * LEARNING_RATE
    assert_close(problem.inspect().layers[2].k, 2 * k, RELATIVE, "k")
    problem.model[2].weight.requires_grad_(False)
    layer = problem.inspect().layers[1]
    assert not layer.k.any()
    assert not layer.K.dense().any()


def test_inside_inference_mode_tensors_stay_normal():
    problem = Problem("fcn", "ekfac", **FORMS["outer product, ε"])
    with torch.inference_mode():
        problem.optimizer.step(problem.inputs, problem.targets)
        inspection = problem.optimizer.inspect(problem.inputs.clone(), problem.targets.clone())
    dx = torch.randn(BATCH, 4, dtype=torch.float64, requires_grad=True)
    inspection.layers[1].K.apply(dx).square().sum().backward()
    assert dx.grad is not None
    for layer in inspection.layers:
        assert not any(a.is_inference() for a in (layer.x, layer.V_h, layer.k, layer.k_per_sample()))
    assert not inspection.loss.is_inference()


def test_generic_layers():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.sin(x))

    modules.register_generic(Twice)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), Twice(), nn.Linear(3, 2)).double()
        inputs, targets = torch.randn(BATCH, 2).double(), torch.arange(BATCH) % 2
        optimizer = DDPNOpt(model, lr=0.1, factorized=True, vxx_reg=0.1)
        assert_operators_act_as_their_matrices(optimizer.inspect(inputs, targets).layers[1])
    finally:
        modules.GENERIC.discard(Twice)


# --- Errors -------------------------------------------------------------------------------------------------


def test_what_is_not_there_says_why(monkeypatch):
    problem = Problem("fcn", "identity")
    first, last = problem.inspect().layer(0), problem.inspect().layer(-1)
    for what in ("V_x", "V_xx", "K"):
        with pytest.raises(ConfigError, match="layer: got 0"):
            getattr(first, what)
    with pytest.raises(ConfigError, match="layer: got 3; allowed: -3 to 2"):
        problem.inspect().layer(3)
    with pytest.raises(ConfigError, match="count: got 4; allowed: 1 to 3"):
        last.K.singular_values(4)
    with pytest.raises(ConfigError, match="factorized: got False"):
        last.K.outer_factors()
    with pytest.raises(ConfigError, match="side: got 'sideways'"):
        policy_spectrum(problem.inspect(), side="sideways")
    monkeypatch.setattr(operators, "GRAM_ENTRIES", 26)
    with pytest.raises(ConfigError, match="entries of KᵀK: got 27"):
        last.K.singular_values()


def test_without_feedback_there_is_a_gradient_and_no_gain():
    problem = Problem("fcn", "identity", feedback=False)
    layer = problem.inspect().layer(1)
    assert layer.V_x.shape == (BATCH, 4)
    for what in ("V_xx", "K"):
        with pytest.raises(ConfigError, match=f"feedback: got False; allowed: true: .* no {what}"):
            getattr(layer, what)


def test_rank_one_has_one_vector():
    problem = Problem("fcn", "identity", **FORMS["outer product"])
    K = problem.inspect().layer(1).K
    assert K.singular_values(3)[:, 1:].eq(0).all()
    with pytest.raises(ConfigError, match="count: got 2; allowed: 1"):
        K.right_singular_vectors(2)


def test_other_optimizers_and_batches_are_refused():
    problem = Problem("fcn", "identity")
    baseline = BaselineOptimizer(problem.model, "sgd", lr=0.1)
    with pytest.raises(ConfigError, match="optimizer: got 'BaselineOptimizer'"):
        leading_feedback_image(baseline, problem.inputs[0], problem.targets[0], 1)
    with pytest.raises(ConfigError, match="inputs: got '3 with 2 targets'"):
        problem.optimizer.inspect(problem.inputs, problem.targets[:2])


# --- Deconvolution ------------------------------------------------------------------------------------------


def test_without_nonlinearities_deconvolution_is_the_transposed_jacobian():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.AvgPool2d(2, 1),
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.AvgPool2d(2, 1, 1),
        nn.Conv2d(4, 3, 2, dilation=2),
        nn.Flatten(),
        nn.Linear(12, 4, bias=False),
        nn.Linear(4, 2),
    ).double()
    x = torch.randn(BATCH, 2, 7, 7).double()
    for layer, cut in enumerate([1, 3, 5, 6]):
        y, pull = vjp(model[:cut], x)
        v = torch.randn_like(y)
        assert_close(deconvolve(model, x, v, layer), pull(v)[0].detach(), RELATIVE, f"layer {layer}")


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.LeakyReLU])
def test_deconvolution_unpools_by_switches_and_rectifies(activation):
    torch.manual_seed(0)
    first, second, third = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 2), nn.Linear(8, 5)
    model = nn.Sequential(
        first,
        activation(),
        nn.MaxPool2d(2),
        second,
        activation(),
        nn.Flatten(),
        third,
        nn.ReLU(),
        nn.Linear(5, 2),
    ).double()
    x = torch.randn(BATCH, 1, 6, 6).double()
    v = torch.randn(BATCH, 5).double()

    def rectify(signal: Tensor) -> Tensor:
        return torch.relu(signal) if activation is nn.ReLU else signal

    _, switches = functional.max_pool2d(activation()(first(x)), 2, return_indices=True)
    signal = torch.relu(v) @ third.weight
    signal = rectify(signal.reshape(BATCH, 2, 2, 2))
    signal = functional.conv_transpose2d(signal, second.weight)
    signal = rectify(functional.max_unpool2d(signal, switches, 2))
    signal = functional.conv_transpose2d(signal, first.weight, padding=1)
    assert_close(deconvolve(model, x, v, 3), signal.detach(), RELATIVE, "image")


def test_the_leading_feedback_image_is_algorithm_4():
    problem = Problem("cnn", "ekfac", **FORMS["outer product"])
    image, target = problem.inputs[1], problem.targets[1]
    for layer in (1, 2):
        found = leading_feedback_image(problem.optimizer, image, target, layer)
        alone = problem.optimizer.inspect(image.unsqueeze(0), target.unsqueeze(0))
        v_max = torch.linalg.svd(alone.layers[layer].K.dense()[0])[2][0]
        v_max = v_max * torch.sign(v_max[v_max.abs().argmax()])
        shape = alone.layers[layer].x.shape
        expected = deconvolve(problem.model, image.unsqueeze(0), v_max.reshape(shape), layer)
        assert_close(found, expected[0], 1e-8, f"layer {layer}")
        assert found.shape == image.shape
    last = leading_feedback_image(problem.optimizer, image, target, -1)
    assert_close(last, found, RELATIVE, "counted from the last")


def test_what_cannot_be_deconvolved():
    problem = Problem("cnn", "identity")
    image, target = problem.inputs[0], problem.targets[0]
    with pytest.raises(ConfigError, match="layer: got 0"):
        leading_feedback_image(problem.optimizer, image, target, 0)
    with pytest.raises(ConfigError, match=r"v: got \(3, 5\); allowed: \(3, 8\)"):
        deconvolve(problem.optimizer, problem.inputs, torch.zeros(3, 5).double(), 2)
    with pytest.raises(ConfigError, match="layer: got 9"):
        deconvolve(problem.optimizer, problem.inputs, torch.zeros(3, 8).double(), 9)


def test_layer_zero_is_the_image_as_it_came():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
    x, v = torch.randn(BATCH, 1, 2, 3), torch.randn(BATCH, 6)
    assert torch.equal(deconvolve(model, x, v, 0), v.reshape(x.shape))


# --- Update norms -------------------------------------------------------------------------------------------


def test_update_norms_are_gathered():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = DDPNOpt(model, lr=0.1, track_updates=True)
    norms = UpdateNorms(optimizer)
    with pytest.raises(ConfigError, match="there was none yet"):
        norms.record()
    seen = []
    for _ in range(3):
        optimizer.step(torch.randn(5, 3), torch.arange(5) % 2)
        norms.record()
        seen.append(optimizer.update_norms)
    assert norms.names == ("0", "2")
    assert norms.history().tolist() == [list(step) for step in seen]
    assert_close(norms.mean(), torch.tensor(seen, dtype=torch.float64).mean(0), RELATIVE, "mean")
    with pytest.raises(ConfigError, match="track_updates: got False"):
        UpdateNorms(DDPNOpt(model, lr=0.1))
