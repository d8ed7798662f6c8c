"""The public classes as torch.optim.Optimizer: what a user of torch expects of one, and what it promises."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler

import ddpnopt
from ddpnopt import BaselineOptimizer, DDPNOpt
from ddpnopt.config import PRECONDITIONER_OF, BaselineOptions, FeedbackConfig, OptimizerConfig, RunConfig
from ddpnopt.errors import ConfigError
from ddpnopt.layers.losses import max_mahalanobis_centers
from ddpnopt.linalg import DTYPES
from ddpnopt.models import sequential
from ddpnopt.optimizers import OPTIMIZERS
from ddpnopt.pack.engine import Trainer
from ddpnopt.torch_optimizer import LayerOptimizer
from tests.ddpnopt import problems, training
from tests.ddpnopt.problems import FEEDBACKS, PARTNERS, assert_close
from tests.ddpnopt.training import (
    CLASSES,
    FORMS,
    MODELS,
    PRECONDITIONERS,
    Batch,
    Snapshot,
    assert_same_bits,
    batches,
    cnn,
    fcn,
    weights,
)

every_preconditioner = pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
every_form = pytest.mark.parametrize("form", FORMS)
every_model = pytest.mark.parametrize("kind", MODELS)


def train(optimizer: LayerOptimizer, data: list[Batch]) -> list[float]:
    return [float(optimizer.step(inputs, targets)) for inputs, targets in data]


def trained(
    model: nn.Sequential, data: list[Batch], preconditioner: str = "identity", **options: Any
) -> list[Tensor]:
    train(training.ddpnopt(model, preconditioner, **options), data)
    return weights(model)


# --- it is an optimizer of torch's ---


def test_it_is_a_torch_optimizer():
    model = fcn()
    optimizer = DDPNOpt(model, lr=0.1, vxx_reg=0.01, weight_decay=0.02, momentum=0.9)
    assert ddpnopt.DDPNOpt is DDPNOpt
    assert isinstance(optimizer, torch.optim.Optimizer)
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    numbers = {"lr": 0.1, "vxx_reg": 0.01, "weight_decay": 0.02, "momentum": 0.9}
    assert {key: group[key] for key in numbers} == numbers == optimizer.defaults
    assert "vxx_reg: 0.01" in repr(optimizer)


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_torchs_before_the_update(kind, dtype):
    make, shape = MODELS[kind]
    model = make(dtype)
    optimizer = DDPNOpt(model, lr=0.1)
    total = torch.zeros((), dtype=dtype, requires_grad=True)
    for inputs, targets in batches(3, shape, dtype=dtype):
        expected = nn.CrossEntropyLoss()(model(inputs), targets).detach()
        loss = optimizer.step(inputs, targets)
        torch.testing.assert_close(loss, expected, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)
        assert (loss.shape, loss.dtype, loss.requires_grad, loss.is_inference()) == ((), dtype, False, False)
        total = total + loss
    total.backward()  # an inference tensor could not be part of this


def test_the_other_losses_are_what_their_names_say():
    inputs, targets = batches(1)[0]
    values = torch.randn(8, CLASSES, dtype=torch.float64)
    output = fcn()(inputs).detach()
    centres = max_mahalanobis_centers(CLASSES)
    for loss, target, expected in (
        ("mse", values, functional.mse_loss(output, values, reduction="sum") / 2 / 8),
        ("mse", targets, ((output - functional.one_hot(targets, CLASSES)) ** 2).sum() / 16),
        ("mmc", targets, ((output - centres[targets]) ** 2).sum() / 8),
    ):
        found = DDPNOpt(fcn(), loss, lr=0.1).step(inputs, target)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@every_form
@every_model
def test_gradients_are_neither_read_nor_written(kind, form):
    make, shape = MODELS[kind]
    plain, graded = make(), make()
    gradients = [torch.full_like(p, torch.nan) for p in graded.parameters()]
    for p, gradient in zip(graded.parameters(), gradients, strict=True):
        p.grad = gradient
    optimizer = training.ddpnopt(graded, **FORMS[form])
    data = batches(2, shape)
    expected = trained(plain, data, **FORMS[form])
    for inputs, targets in data:
        optimizer.step(inputs, targets)
        assert all(p.grad is gradient for p, gradient in zip(graded.parameters(), gradients, strict=True))
        assert all(bool(gradient.isnan().all()) for gradient in gradients)
    assert_same_bits(weights(graded), expected)
    assert all(p.grad is None for p in plain.parameters())


def test_zero_grad_does_no_harm():
    one, other = fcn(), fcn()
    ours, theirs = training.ddpnopt(one, momentum=0.5), training.ddpnopt(other, momentum=0.5)
    for inputs, targets in batches(3):
        ours.zero_grad()
        ours.step(inputs, targets)
        ours.zero_grad(set_to_none=False)
        theirs.step(inputs, targets)
    assert_same_bits(weights(one), weights(other))


def test_the_parameters_stay_ordinary_and_torch_can_take_over():
    model = fcn()
    held = list(model.parameters())
    train(training.ddpnopt(model, "adam"), batches(3))
    for p, before in zip(model.parameters(), held, strict=True):
        assert p is before
        assert isinstance(p, nn.Parameter)
        assert (p.is_leaf, p.requires_grad, p.is_inference(), p.grad) == (True, True, False, None)
    twin = fcn()
    twin.load_state_dict(model.state_dict())
    (inputs, targets), *_ = batches(1)
    losses = []
    for net in (model, twin):
        theirs = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(5):
            theirs.zero_grad()
            loss = functional.cross_entropy(net(inputs), targets)
            loss.backward()
            theirs.step()
        losses.append(float(loss.detach()))
    assert_same_bits(weights(model), weights(twin))
    assert losses[0] < functional.cross_entropy(fcn()(inputs), targets).item()


def test_a_graph_from_before_the_step_is_known_to_be_stale():
    """As with torch's own optimizers: backward must not use weights that have changed since."""
    model = fcn()
    inputs, targets = batches(1)[0]
    loss = functional.cross_entropy(model(inputs), targets)
    training.ddpnopt(model).step(inputs, targets)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@every_preconditioner
def test_the_mode_around_a_step_is_no_matter(preconditioner, context):
    inside, outside = fcn(), fcn()
    optimizer = training.ddpnopt(inside, preconditioner)
    with context():
        train(optimizer, batches(2))
    train(optimizer, batches(1))
    expected = training.ddpnopt(outside, preconditioner)
    train(expected, batches(2) + batches(1))
    assert_same_bits(weights(inside), weights(outside))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_inputs_may_ask_for_gradients():
    inputs, targets = batches(1)[0]
    inputs.requires_grad_()
    plain, asking = fcn(), fcn()
    training.ddpnopt(plain).step(inputs.detach(), targets)
    training.ddpnopt(asking).step(inputs, targets)
    assert inputs.grad is None
    assert_same_bits(weights(asking), weights(plain))


def test_a_step_draws_no_random_numbers():
    before = torch.get_rng_state()
    model = fcn()
    torch.set_rng_state(before)
    train(training.ddpnopt(model, "ekfac"), batches(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_hooks_are_called():
    optimizer = DDPNOpt(fcn(), lr=0.1)
    calls: list[tuple[str, tuple[Any, ...]]] = []
    before = optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(("before", args)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("after", args)))
    batch = batches(1)[0]
    optimizer.step(*batch)
    before.remove()
    optimizer.step(*batch)
    assert [name for name, _ in calls] == ["before", "after", "after"]
    assert all(args[-2] is batch[0] and args[-1] is batch[1] for _, args in calls)


@pytest.mark.parametrize("preconditioner", ["identity", "kfac"])
@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_a_copy_works_or_is_refused(copied, preconditioner):
    """Never one that looks like an optimizer and is none."""
    model = fcn()
    optimizer = training.ddpnopt(model, preconditioner)
    train(optimizer, batches(1))
    expected = fcn()
    train(training.ddpnopt(expected, preconditioner), batches(1) + batches(2))
    try:
        if copied == "deepcopy":
            twin_model, twin = copy.deepcopy((model, optimizer))
        else:
            twin_model, twin = pickle.loads(pickle.dumps((model, optimizer)))
    except (ConfigError, TypeError, pickle.PicklingError):
        return
    train(twin, batches(2))
    assert_same_bits(weights(twin_model), weights(expected))


# --- it is the pack's ---

IMAGES = problems.toy(samples=60, features=36, shape=(1, 6, 6))
FLAT = problems.toy()


def rounds(optimizer: OptimizerConfig, **changes: Any) -> tuple[RunConfig, Any]:
    cnn = changes.get("kind") == "cnn"
    return problems.run(optimizer, seed=3, **changes), IMAGES if cnn else FLAT


def load_controls(model: nn.Sequential, controls: list[Tensor]) -> None:
    layers = [m for m in model if hasattr(m, "weight")]
    with torch.no_grad():
        for layer, u in zip(layers, controls, strict=True):
            layer.weight.copy_(u[0, :, :-1].reshape(layer.weight.shape))
            layer.bias.copy_(u[0, :, -1])


def same(config: OptimizerConfig, model: nn.Sequential, loss: str) -> LayerOptimizer:
    """The public optimizer of a configuration."""
    if config.feedback is None:
        return BaselineOptimizer(
            model, config.baseline, loss, lr=config.learning_rate, options=config.options
        )
    options = config.options
    kept = ("momentum", "weight_decay", "rho", "betas", "eps", "second_moment", "damping", "factor_decay")
    feedback = {name: getattr(config.feedback, name) for name in FeedbackConfig.__slots__}
    return DDPNOpt(
        model,
        loss,
        lr=config.learning_rate,
        vxx_reg=config.vxx_reg,
        preconditioner=PRECONDITIONER_OF[config.baseline],
        inverse_every=options.inverse_every,
        **{name: getattr(options, name) for name in kept},
        **feedback,
    )


ENGINE = {
    **PARTNERS,
    **{f"sgd-{name}": OptimizerConfig("sgd", "ddpnopt", 0.05, 1e-3, f) for name, f in FEEDBACKS.items()},
    **{
        f"{name}-baseline": OptimizerConfig(name, "baseline", 0.02)
        for name, kind in OPTIMIZERS
        if kind == "baseline"
    },
    "all options": OptimizerConfig(
        "ekfac",
        "ddpnopt",
        0.05,
        1e-3,
        FeedbackConfig("gauss_newton", safeguard="psd", curvature_scale=0.5),
        BaselineOptions(momentum=0.5, weight_decay=0.01, damping=0.1, factor_decay=0.5, inverse_every=2),
    ),
}

SETTINGS = {
    "fcn": {},
    "fcn, float32, mmc": {"dtype": "float32", "loss": "mmc", "activation": "gelu", "batch_size": 5},
    "cnn, mse": {"kind": "cnn", "channels": (3, 2), "hidden": (5,), "loss": "mse", "batch_size": 4},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ENGINE)
def test_it_is_a_pack_of_one_bit_for_bit(name, setting):
    if name.startswith("vanilla_ddp") and "cnn" in setting:
        pytest.skip("vanilla DDP is for fully connected layers alone")
    run, data = rounds(ENGINE[name], **SETTINGS[setting])
    pack = Trainer([run], data, torch.device("cpu"), lanes=False)
    dtype = DTYPES[run.dtype]
    model = sequential(run.model, data.shape, 3).to(dtype)
    load_controls(model, pack.parts[0].controls())
    optimizer = same(run.optimizer, model, run.loss)
    inputs = torch.from_numpy(data.train_inputs).to(dtype).reshape(-1, *data.shape)
    targets = torch.from_numpy(data.train_targets)
    for step in problems.updates(pack, 3):
        rows = pack.batches.stretch(step, step).rows(step)[0]
        loss = optimizer.step(inputs[rows], targets[rows])
        (part,) = pack.parts
        assert torch.equal(loss, part.last_loss[0].clone()), f"loss of step {step}"
        assert_same_bits([slot.read() for slot in optimizer.slots], part.controls())


PEERS: dict[str, tuple[dict[str, Any], Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    ),
    "rmsprop": (
        {"lr": 0.003, "rho": 0.9, "eps": 1e-6, "momentum": 0.5, "preconditioner": "rmsprop"},
        torch.optim.RMSprop,
        {"lr": 0.003, "alpha": 0.9, "eps": 1e-6, "momentum": 0.5},
    ),
    "adam": (
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.01, "preconditioner": "adam"},
        torch.optim.Adam,
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.01},
    ),
}


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("peer", PEERS)
@every_model
def test_without_feedback_it_is_torchs_optimizer_step_for_step(kind, peer, loss):
    make, shape = MODELS[kind]
    options, theirs, numbers = PEERS[peer]
    model, twin = make(), make()
    ours = DDPNOpt(model, loss, vxx_reg=0.1, feedback=False, **options)
    other = theirs(twin.parameters(), **numbers)
    for step, (inputs, targets) in enumerate(batches(100, shape, size=6)):
        other.zero_grad()
        output = twin(inputs)
        if loss == "mse":
            error = output - functional.one_hot(targets, CLASSES)
            (error**2).sum().div(2 * 6).backward()
        else:
            functional.cross_entropy(output, targets).backward()
        other.step()
        ours.step(inputs, targets)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9, msg=f"step {step}")


# --- losses with values, and what they are for ---


def test_squared_error_fits_values():
    inputs = torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.stack((inputs.sum(1), inputs[:, 0] * 2, -inputs[:, 1]), dim=1)
    model = fcn(seed=1)
    optimizer = DDPNOpt(model, "mse", lr=0.1)
    losses = train(optimizer, [(inputs, values)] * 150)
    assert losses[-1] < 0.05 * losses[0]


def test_one_output_is_a_regression():
    inputs = torch.randn(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = inputs.sum(1, keepdim=True)
    model = nn.Sequential(nn.Linear(5, 1)).double()
    losses = train(DDPNOpt(model, "mse", lr=0.3), [(inputs, values)] * 100)
    assert losses[-1] < 1e-6 * losses[0]


def test_labels_are_the_corners_of_squared_error():
    data = batches(3)
    hot = [(x, functional.one_hot(y, CLASSES).double()) for x, y in data]
    assert_same_bits(trained_on("mse", data), trained_on("mse", hot))


def trained_on(loss: str, data: list[Batch]) -> list[Tensor]:
    model = fcn()
    train(DDPNOpt(model, loss, lr=0.1), data)
    return weights(model)


def test_mmc_learns():
    data = batches(60, size=32)
    model = fcn()
    losses = train(DDPNOpt(model, "mmc", lr=0.05), data)
    assert losses[-1] < 0.3 * losses[0]
    inputs, targets = data[0]
    assert float((model(inputs).argmax(1) == targets).double().mean()) > 0.85


# --- parameter groups ---


def split(model: nn.Sequential, **numbers: Any) -> list[dict[str, Any]]:
    """Two groups: the last layer with numbers of its own, and the others."""
    return [{"params": list(model[:-1].parameters())}, {"params": list(model[-1].parameters()), **numbers}]


@every_form
@every_preconditioner
def test_two_groups_with_the_same_numbers_are_one(preconditioner, form):
    numbers = {"vxx_reg": 0.01, "weight_decay": 0.02, **FORMS[form]}
    if preconditioner != "adam":
        numbers["momentum"] = 0.5
    whole, parted = fcn(), fcn()
    expected = trained(whole, batches(3), preconditioner, **numbers)
    found = trained(parted, batches(3), preconditioner, param_groups=split(parted), **numbers)
    assert_same_bits(found, expected)


def test_the_order_of_groups_and_of_the_parameters_in_them_is_no_matter():
    model, other = fcn(), fcn()
    layers = [m for m in other if hasattr(m, "weight")]
    groups = [{"params": [m.bias, m.weight]} for m in reversed(layers)]
    numbers = {"momentum": 0.5, "vxx_reg": 0.01}
    expected = trained(model, batches(3), **numbers)
    assert_same_bits(trained(other, batches(3), param_groups=groups, **numbers), expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_each_group_has_its_own_numbers(momentum):
    """Without feedback: those of torch.optim.SGD's groups."""
    model, twin = fcn(), fcn()
    numbers = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.5}
    ours = DDPNOpt(model, lr=0.2, momentum=momentum, feedback=False, param_groups=split(model, **numbers))
    theirs = torch.optim.SGD(split(twin, **numbers), lr=0.2, momentum=momentum)
    for inputs, targets in batches(20):
        theirs.zero_grad()
        functional.cross_entropy(twin(inputs), targets).backward()
        theirs.step()
        ours.step(inputs, targets)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("number", [{"lr": 0.02}, {"vxx_reg": 0.5}, {"weight_decay": 0.1}, {"momentum": 0.5}])
def test_each_number_of_a_group_counts(number):
    plain, changed = fcn(), fcn()
    expected = trained(plain, batches(3), vxx_reg=0.01)
    found = trained(changed, batches(3), vxx_reg=0.01, param_groups=split(changed, **number))
    assert not any(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_epsilon_belongs_to_the_layer_that_it_is_added_before():
    """It acts on the feedback of the layer before: those of the first two layers on none at all."""

    def run(t: int, epsilon: float) -> list[Tensor]:
        model = fcn()
        layers = [m for m in model if hasattr(m, "weight")]
        groups = [{"params": list(layer.parameters())} for layer in layers]
        groups[t]["vxx_reg"] = epsilon
        return trained(model, batches(2), vxx_reg=0.0, param_groups=groups)

    assert_same_bits(run(0, 5.0), run(0, 0.0))
    assert_same_bits(run(1, 5.0), run(1, 0.0))
    assert not any(torch.equal(a, b) for a, b in zip(run(2, 5.0), run(2, 0.0), strict=True))


@every_form
@every_preconditioner
def test_a_group_without_a_rate_stays_and_so_does_a_frozen_layer(preconditioner, form):
    options = {"vxx_reg": 0.01, "weight_decay": 0.02, **FORMS[form]}
    frozen, resting = fcn(), fcn()
    frozen[2].requires_grad_(False)
    groups = [
        {"params": list(resting[i].parameters()), "lr": 0.0 if i == 2 else options.get("lr")}
        for i in (0, 2, 4)
    ]
    for group in (groups[0], groups[2]):
        group["lr"] = PRECONDITIONERS[preconditioner]["lr"]
    ends = [
        trained(frozen, batches(3), preconditioner, **options),
        trained(resting, batches(3), preconditioner, param_groups=groups, **options),
    ]
    assert_same_bits(*ends)
    start = weights(fcn())
    assert [torch.equal(a, b) for a, b in zip(ends[0], start, strict=True)] == [False] * 2 + [True] * 2 + [
        False
    ] * 2
    assert [p.requires_grad for p in frozen.parameters()] == [True] * 2 + [False] * 2 + [True] * 2


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS if kind == "baseline"])
def test_baselines_leave_a_frozen_layer_alone(name):
    model = fcn()
    model[2].requires_grad_(False)
    start = weights(model)
    optimizer = BaselineOptimizer(model, name, lr=0.01, options=BaselineOptions(weight_decay=0.1))
    train(optimizer, batches(3))
    same = [torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True)]
    assert same == [False] * 2 + [True] * 2 + [False] * 2


def test_a_layer_may_thaw():
    model = fcn()
    model[0].requires_grad_(False)
    optimizer = training.ddpnopt(model)
    start = weights(model)
    train(optimizer, batches(2))
    assert torch.equal(model[0].weight, start[0])
    model[0].requires_grad_(True)
    train(optimizer, batches(1))
    assert not torch.equal(model[0].weight, start[0])


def layer_parts(model: nn.Sequential) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [{"params": [p for n, p in named if n.endswith(part)]} for part in ("weight", "bias")]


def test_a_layer_belongs_in_one_group():
    model = fcn()
    for groups in (layer_parts(model), [{"params": list(model[:3].parameters())}]):
        with pytest.raises(ConfigError, match="param_groups") as caught:
            DDPNOpt(model, lr=0.1, param_groups=groups)
        assert str(caught.value.value).startswith("layer ")


def test_a_parameter_belongs_in_one_group():
    model = fcn()
    with pytest.raises(ValueError, match="more than one parameter group"):
        DDPNOpt(model, lr=0.1, param_groups=[{"params": list(model.parameters())}] * 2)


def test_a_parameter_of_another_model_is_refused():
    model = fcn()
    groups = [{"params": [*model.parameters(), nn.Parameter(torch.ones(2))]}]
    with pytest.raises(ConfigError, match="param_groups"):
        DDPNOpt(model, lr=0.1, param_groups=groups)


def test_a_group_added_later_is_refused():
    """All layers have their group already, and nothing else could be trained."""
    optimizer = DDPNOpt(fcn(), lr=0.1)
    with pytest.raises(ConfigError, match="param_groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "number", [{"lr": -1.0}, {"vxx_reg": float("nan")}, {"momentum": 1.5}, {"weight_decay": -1}]
)
def test_a_groups_numbers_are_checked_as_the_optimizers_are(number):
    model = fcn()
    with pytest.raises(ConfigError):
        DDPNOpt(model, lr=0.1, param_groups=split(model, **number))


def test_a_group_cannot_have_what_belongs_to_the_optimizer():
    model = fcn()
    with pytest.raises(ConfigError):
        DDPNOpt(model, lr=0.1, preconditioner="rmsprop", param_groups=split(model, rho=0.5))
    with pytest.raises(ConfigError):
        DDPNOpt(model, lr=0.1, preconditioner="adam", param_groups=split(model, momentum=0.5))


def test_half_a_frozen_layer_is_refused():
    model = fcn()
    model[2].bias.requires_grad_(False)
    with pytest.raises(ConfigError, match="requires_grad") as caught:
        DDPNOpt(model, lr=0.1)
    assert caught.value.value == "layer 2"


# --- state ---


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Put a state into a file and take it out again."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@every_preconditioner
@every_model
def test_training_goes_on_from_a_file_bit_for_bit(kind, preconditioner, momentum):
    if momentum and preconditioner == "adam":
        pytest.skip("adam has a first moment of its own")
    make, shape = MODELS[kind]
    options = {"momentum": momentum, "vxx_reg": 0.01}
    data = batches(6, shape)
    model = make()
    optimizer = training.ddpnopt(model, preconditioner, **options)
    train(optimizer, data[:3])
    optimizer.param_groups[0]["lr"] *= 0.5
    twin = make(seed=9)
    twin.load_state_dict(saved(model.state_dict()))
    resumed = training.ddpnopt(twin, preconditioner, **options)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    Snapshot(twin, resumed).assert_unchanged()
    assert train(resumed, data[3:]) == train(optimizer, data[3:])
    found = Snapshot(twin, resumed)
    found.model, found.optimizer = model, optimizer
    found.assert_unchanged()


def test_a_state_is_a_snapshot():
    model = fcn()
    optimizer = training.ddpnopt(model, "adam")
    train(optimizer, batches(1))
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    train(optimizer, batches(2))
    for (place, now), (_, before) in zip(training.tensors(state), training.tensors(kept), strict=True):
        assert torch.equal(now, before) if isinstance(now, Tensor) else now == before, place
    other = training.ddpnopt(fcn(), "adam")
    other.load_state_dict(state)
    train(other, batches(1))
    for (place, now), (_, before) in zip(training.tensors(state), training.tensors(kept), strict=True):
        assert torch.equal(now, before) if isinstance(now, Tensor) else now == before, place


@every_preconditioner
def test_a_state_takes_the_type_of_the_parameters(preconditioner):
    optimizer = training.ddpnopt(fcn(), preconditioner)
    train(optimizer, batches(2))
    single = training.ddpnopt(fcn(torch.float32), preconditioner)
    single.load_state_dict(optimizer.state_dict())
    assert all(
        value.dtype == torch.float32
        for _, value in training.tensors(single.state_dict())
        if isinstance(value, Tensor)
    )
    train(single, batches(1, dtype=torch.float32))
    assert single.status is None


def foreign_states() -> dict[str, Callable[[], dict[str, Any]]]:
    def of(optimizer: LayerOptimizer) -> dict[str, Any]:
        train(optimizer, batches(1))
        return optimizer.state_dict()

    def without(key: str) -> dict[str, Any]:
        state = of(training.ddpnopt(fcn(), "adam"))
        del state[key]
        return state

    wide = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return {
        "torch's adam": lambda: torch.optim.Adam(fcn().parameters()).state_dict(),
        "nothing": dict,
        "no layers": lambda: without("layers"),
        "empty layers": lambda: of(training.ddpnopt(fcn(), "adam")) | {"layers": {}},
        "kfac's": lambda: of(training.ddpnopt(fcn(), "kfac")),
        "rmsprop's": lambda: of(training.ddpnopt(fcn(), "rmsprop")),
        "a baseline without state": lambda: of(BaselineOptimizer(fcn(), "emsa", lr=0.1)),
        "a wider net's": lambda: of(training.ddpnopt(wide, "adam")),
    }


@pytest.mark.parametrize("name", foreign_states())
def test_a_foreign_state_is_refused(name):
    """With everything as it was."""
    state = foreign_states()[name]()
    model = fcn()
    optimizer = training.ddpnopt(model, "adam", lr=0.03)
    train(optimizer, batches(1))
    before = Snapshot(model, optimizer)
    with pytest.raises(ConfigError, match="state_dict"):
        optimizer.load_state_dict(state)
    before.assert_unchanged()


# --- schedulers ---

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.3),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "lambda to zero": lambda o: lr_scheduler.LambdaLR(o, lambda k: float(k % 2)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=8, cycle_momentum=False),
    "one cycle, momentum too": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=8),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.filterwarnings("error")
def test_a_scheduler_is_setting_the_rate_by_hand(groups, name):
    data = batches(6)
    model, twin = fcn(), fcn()

    def make(net: nn.Sequential) -> DDPNOpt:
        of_groups = {"param_groups": split(net, lr=0.02)} if groups == 2 else {}
        return training.ddpnopt(net, "kfac", lr=0.1, momentum=0.5, vxx_reg=0.01, **of_groups)

    optimizer, by_hand = make(model), make(twin)
    scheduler = SCHEDULERS[name](optimizer)
    seen = []
    for i, (inputs, targets) in enumerate(data):
        numbers = [(group["lr"], group["momentum"]) for group in optimizer.param_groups]
        seen.append(numbers[0])
        loss = optimizer.step(inputs, targets)
        scheduler.step(*([1.0 + i] if name == "plateau" else []))
        for group, (lr, momentum) in zip(by_hand.param_groups, numbers, strict=True):
            group["lr"], group["momentum"] = lr, momentum
        assert torch.equal(by_hand.step(inputs, targets), loss)
        assert_same_bits(weights(model), weights(twin))
    assert len(set(seen)) > 1


def test_a_scheduler_sees_whether_a_step_came_before_it():
    optimizer = DDPNOpt(fcn(), lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_a_rate_of_zero_is_a_rest():
    model = fcn()
    optimizer = training.ddpnopt(model, "identity")
    before = weights(model)
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, batches(2))
    assert_same_bits(weights(model), before)
    assert optimizer.status is None


# --- models that change under it ---


@pytest.mark.parametrize("first", [torch.float32, torch.float64])
@every_preconditioner
def test_a_model_may_be_converted_before_the_first_step(preconditioner, first):
    other = torch.float64 if first == torch.float32 else torch.float32
    model, expected = fcn(first), fcn(first).to(other)
    optimizer = training.ddpnopt(model, preconditioner)
    model.to(other)
    train(optimizer, batches(2, dtype=other))
    train(training.ddpnopt(expected, preconditioner), batches(2, dtype=other))
    assert_same_bits(weights(model), weights(expected))


@pytest.mark.parametrize(
    ("preconditioner", "first", "other"),
    [
        *((name, torch.float32, torch.float64) for name in PRECONDITIONERS),
        *((name, torch.float64, torch.float32) for name in PRECONDITIONERS),
    ],
)
def test_a_model_converted_later_trains_on_or_is_refused(preconditioner, first, other):
    model = fcn(first)
    optimizer = training.ddpnopt(model, preconditioner, momentum=0.0 if preconditioner == "adam" else 0.5)
    train(optimizer, batches(2, dtype=first))
    model.to(other)
    before = weights(model)
    try:
        train(optimizer, batches(1, dtype=other))
    except ConfigError:
        assert_same_bits(weights(model), before)
        return
    assert optimizer.status is None
    assert not any(torch.equal(p, q) for p, q in zip(weights(model), before, strict=True))


def test_loaded_weights_are_trained_on():
    """Copied in, or swapped through `data`."""
    expected = trained(fcn(seed=5), batches(2))
    copied, swapped = fcn(), fcn()
    optimizers = [training.ddpnopt(copied), training.ddpnopt(swapped)]
    for optimizer in optimizers:
        train(optimizer, batches(1))
    copied.load_state_dict(fcn(seed=5).state_dict())
    for p, q in zip(swapped.parameters(), fcn(seed=5).parameters(), strict=True):
        p.data = q.detach().clone()
    for model, optimizer in zip((copied, swapped), optimizers, strict=True):
        train(optimizer, batches(2))
        assert_same_bits(weights(model), expected)


def replace_module(model: nn.Sequential) -> None:
    model[2] = nn.Linear(6, 4).double()


def replace_parameter(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(torch.zeros_like(model[2].weight))


def assign_state(model: nn.Sequential) -> None:
    model.load_state_dict(fcn(seed=5).state_dict(), assign=True)


def append_module(model: nn.Sequential) -> None:
    model.append(nn.Linear(3, 3).double())


def swap_activation(model: nn.Sequential) -> None:
    model[1] = nn.ReLU()


@pytest.mark.parametrize(
    "change", [replace_module, replace_parameter, assign_state, append_module, swap_activation]
)
def test_a_model_that_is_no_longer_the_one_is_refused_or_trained(change):
    """Never is a net trained that the model no longer is."""
    model = fcn()
    optimizer = training.ddpnopt(model)
    train(optimizer, batches(1))
    change(model)
    inputs, targets = batches(1)[0]
    before, expected = weights(model), functional.cross_entropy(model(inputs), targets).item()
    try:
        loss = float(optimizer.step(inputs, targets))
    except ConfigError:
        assert_same_bits(weights(model), before)
        return
    assert loss == pytest.approx(expected, rel=1e-12)
    assert not any(torch.equal(p, q) for p, q in zip(weights(model), before, strict=True))


# --- layouts, sizes and types ---


@every_preconditioner
def test_weights_may_lie_in_memory_as_they_like(preconditioner):
    expected = trained(cnn(), batches(2, training.IMAGE), preconditioner)
    last, apart = cnn().to(memory_format=torch.channels_last), cnn()
    for layer in (apart[0], apart[3], apart[6]):
        weight = layer.weight.detach()
        layer.weight = nn.Parameter(torch.stack((weight, weight), dim=-1)[..., 0])
    strides = [p.stride() for p in (*last.parameters(), *apart.parameters())]
    assert strides[0] != cnn()[0].weight.stride()
    for model in (last, apart):
        assert_same_bits(trained(model, batches(2, training.IMAGE), preconditioner), expected)
    assert [p.stride() for p in (*last.parameters(), *apart.parameters())] == strides


def test_images_may_lie_in_memory_as_they_like():
    data = batches(2, training.IMAGE)
    apart = [(x.to(memory_format=torch.channels_last), y) for x, y in data]
    views = [(x.repeat(2, 1, 1, 1)[::2].copy_(x), torch.stack((y, y), 1)[:, 0]) for x, y in data]
    expected = trained(cnn(), data)
    for other in (apart, views):
        for p, q in zip(trained(cnn(), other), expected, strict=True):
            assert_close(p, q, 1e-12, "weights")


@every_form
@every_preconditioner
@every_model
def test_a_batch_of_one(kind, preconditioner, form):
    make, shape = MODELS[kind]
    model = make()
    optimizer = training.ddpnopt(model, preconditioner, **FORMS[form])
    start = weights(model)
    losses = train(optimizer, batches(1, shape, size=1) * 8)
    assert optimizer.status is None
    assert losses[-1] < losses[0]
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))


@every_form
@every_preconditioner
def test_float32_is_float64_but_for_rounding(preconditioner, form):
    options = {"eps": 1e-3} if preconditioner in ("rmsprop", "adam") else {}
    double = trained(fcn(), batches(2), preconditioner, **options, **FORMS[form])
    single = trained(
        fcn(torch.float32), batches(2, dtype=torch.float32), preconditioner, **options, **FORMS[form]
    )
    for p, q in zip(single, double, strict=True):
        assert p.dtype == torch.float32
        assert_close(p.double(), q, 1e-4, "weights")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype):
    with pytest.raises(ConfigError, match="float32 or float64"):
        DDPNOpt(fcn(dtype), lr=0.1)


def test_a_model_of_two_types_is_refused():
    model = fcn()
    model[2].float()
    with pytest.raises(ConfigError, match="dtype"):
        DDPNOpt(model, lr=0.1).step(*batches(1)[0])


# --- what does not fit ---

X, Y = batches(1)[0]
VALUES = torch.randn(8, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

UNFIT: dict[str, tuple[str, Any, Any]] = {
    "no samples": ("cross_entropy", X[:0], Y[:0]),
    "fewer inputs than targets": ("cross_entropy", X[:3], Y),
    "fewer targets than inputs": ("cross_entropy", X, Y[:3]),
    "a dimension too many": ("cross_entropy", X.unsqueeze(1), Y),
    "too few features": ("cross_entropy", X[:, :4], Y),
    "float32": ("cross_entropy", X.float(), Y),
    "integers": ("cross_entropy", X.long(), Y),
    "a label too large": ("cross_entropy", X, Y + 1),
    "a label too small": ("cross_entropy", X, Y - 1),
    "labels of floats": ("cross_entropy", X, Y.double()),
    "labels in a column": ("cross_entropy", X, Y.unsqueeze(1)),
    "one-hot labels": ("cross_entropy", X, functional.one_hot(Y, CLASSES).double()),
    "mmc, a label too large": ("mmc", X, Y + 1),
    "mse, a label too large": ("mse", X, Y + 1),
    "mse, one value for many outputs": ("mse", X, VALUES[:, :1]),
    "mse, too few values": ("mse", X, VALUES[:, :2]),
    "mse, values in a row": ("mse", X, VALUES[:, 0]),
}
assert int(Y.min()) == 0
assert int(Y.max()) == CLASSES - 1


@pytest.mark.parametrize("preconditioner", ["adam", "kfac"])
@pytest.mark.parametrize("name", UNFIT)
def test_a_batch_that_does_not_fit_is_refused(name, preconditioner):
    """With the parameters and the state as they were."""
    loss, inputs, targets = UNFIT[name]
    model = fcn()
    optimizer = training.ddpnopt(model, preconditioner, loss=loss)
    train(optimizer, batches(1))
    before = Snapshot(model, optimizer)
    with pytest.raises((ConfigError, RuntimeError, IndexError)):
        optimizer.step(inputs, targets)
    before.assert_unchanged()
    train(optimizer, batches(1))


@pytest.mark.parametrize("preconditioner", ["adam", "kfac"])
def test_values_of_another_type_are_refused_or_taken(preconditioner):
    model = fcn(torch.float32)
    optimizer = training.ddpnopt(model, preconditioner, loss="mse")
    train(optimizer, batches(1, dtype=torch.float32))
    before = Snapshot(model, optimizer)
    try:
        optimizer.step(X.float(), VALUES)
    except (ConfigError, RuntimeError):
        before.assert_unchanged()
    train(optimizer, batches(1, dtype=torch.float32))
    assert optimizer.status is None


def test_images_must_be_images():
    optimizer = DDPNOpt(cnn(), lr=0.1)
    for shape in ((72,), (2, 36), (1, 6, 6)):
        with pytest.raises(ConfigError, match="Conv2d"):
            optimizer.step(torch.zeros(4, *shape, dtype=torch.float64), torch.zeros(4, dtype=torch.long))


def test_a_missing_flatten_is_named():
    model = nn.Sequential(nn.Conv2d(2, 1, 3), nn.Linear(16, 3)).double()
    with pytest.raises(ConfigError, match="use Flatten"):
        DDPNOpt(model, lr=0.1).step(
            torch.zeros(4, *training.IMAGE, dtype=torch.float64), torch.zeros(4).long()
        )


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"lr": 0.0}, "learning_rate"),
        ({"lr": -0.1}, "learning_rate"),
        ({"lr": float("nan")}, "learning_rate"),
        ({"lr": float("inf")}, "learning_rate"),
        ({"vxx_reg": -1.0}, "vxx_reg"),
        ({"loss": "hinge"}, "loss"),
        ({"preconditioner": "sgd"}, "preconditioner"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"preconditioner": "adam", "momentum": 0.5}, "momentum"),
        ({"preconditioner": "adam", "betas": (0.9,)}, "betas"),
        ({"preconditioner": "adam", "betas": (0.9, 1.0)}, "betas[1]"),
        ({"rho": 0.9}, "rho"),
        ({"preconditioner": "rmsprop", "damping": 0.1}, "damping"),
        ({"preconditioner": "kfac", "inverse_every": 0}, "inverse_every"),
        ({"convention": "mean"}, "ddpnopt.convention"),
        ({"terminal_hessian": "exact", "factorized": True}, "ddpnopt.factorized"),
        ({"dynamics": "second_order", "factorized": True}, "ddpnopt.factorized"),
        ({"safeguard": "none"}, "ddpnopt.safeguard"),
        ({"curvature_scale": -1.0}, "ddpnopt.curvature_scale"),
    ],
    ids=str,
)
def test_numbers_that_are_not_allowed_are_refused(options, field):
    with pytest.raises(ConfigError) as caught:
        DDPNOpt(fcn(), **{"lr": 0.1, **options})
    assert caught.value.field == field


def test_a_model_that_is_no_sequential_is_refused():
    with pytest.raises(ConfigError, match="Sequential"):
        DDPNOpt(nn.Linear(2, 2), lr=0.1)


def test_a_step_takes_a_batch():
    optimizer = DDPNOpt(fcn(), lr=0.1)
    with pytest.raises(TypeError, match="targets"):
        optimizer.step(lambda: torch.zeros(()))


# --- what it keeps of a step ---


@every_model
def test_the_norms_of_the_updates(kind):
    make, shape = MODELS[kind]
    model = make()
    optimizer = training.ddpnopt(model, track_updates=True)
    assert optimizer.update_norms == ()
    layers = [list(m.parameters()) for m in model if hasattr(m, "weight")]
    for inputs, targets in batches(2, shape):
        before = [[p.detach().clone() for p in layer] for layer in layers]
        optimizer.step(inputs, targets)
        expected = [
            float(sum(((p - q) ** 2).sum() for p, q in zip(new, old, strict=True)).sqrt().detach())
            for new, old in zip(layers, before, strict=True)
        ]
        np.testing.assert_allclose(optimizer.update_norms, expected, rtol=1e-9)
    assert DDPNOpt(make(), lr=0.1).update_norms == ()


@every_form
@every_preconditioner
def test_the_same_again_is_the_same(preconditioner, form):
    ends = [trained(fcn(), batches(3), preconditioner, **FORMS[form]) for _ in range(2)]
    assert_same_bits(*ends)


@every_form
@every_preconditioner
@every_model
def test_it_learns(kind, preconditioner, form):
    make, shape = MODELS[kind]
    model = make()
    data = batches(15, shape, size=16)
    optimizer = training.ddpnopt(model, preconditioner, vxx_reg=1e-4, **FORMS[form])
    inputs, targets = data[0]
    first = functional.cross_entropy(model(inputs), targets).item()
    train(optimizer, data)
    assert optimizer.status is None
    assert functional.cross_entropy(model(inputs), targets).item() < 0.9 * first
