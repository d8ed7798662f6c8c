"""From torch.nn modules to layers: each maps and learns as torch's does, and what cannot be read is named."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from ddpnopt import BaselineOptimizer, DDPNOpt
from ddpnopt.errors import ConfigError
from ddpnopt.layers import modules
from ddpnopt.layers.activations import Activation
from ddpnopt.layers.conv import Conv2d
from ddpnopt.layers.linear import Linear
from ddpnopt.layers.modules import convert, register, register_generic, supported
from ddpnopt.layers.network import predict
from tests.ddpnopt.problems import assert_close
from tests.ddpnopt.training import Batch, assert_same_bits, ddpnopt, weights
from tests.reference import oracle, preconditioners

BATCH = 6
Model = Callable[[], list[nn.Module]]


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test registers in tables of its own."""
    for name in ("AFFINE", "MAPS"):
        monkeypatch.setattr(modules, name, dict(getattr(modules, name)))
    monkeypatch.setattr(modules, "GENERIC", set(modules.GENERIC))


def built(make: Model, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*make()).to(dtype)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_for(model: nn.Sequential, shape: tuple[int, ...]) -> Batch:
    inputs = normal(BATCH, *shape)
    classes = model(inputs).shape[1]
    return inputs, torch.arange(BATCH) % classes


def conv(**options: Any) -> Model:
    return lambda: [
        nn.Conv2d(2, 4, **{"kernel_size": 3, **options}),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(3),
    ]


def after_conv(*maps: Callable[[], nn.Module]) -> Model:
    return lambda: [nn.Conv2d(2, 3, 2), *(m() for m in maps), nn.Flatten(), nn.LazyLinear(3)]


def between(*maps: Callable[[], nn.Module]) -> Model:
    return lambda: [nn.Linear(5, 6), *(m() for m in maps), nn.Linear(6, 3)]


def shared_activation() -> list[nn.Module]:
    tanh = nn.Tanh()
    return [nn.Linear(5, 6), tanh, nn.Linear(6, 4), tanh, nn.Linear(4, 3), tanh]


def named() -> list[nn.Module]:
    block = nn.Sequential(OrderedDict(affine=nn.Linear(5, 6), bend=nn.Tanh()))
    return [
        block,
        nn.Sequential(nn.Sequential(nn.Linear(6, 4)), nn.Identity()),
        nn.Sequential(),
        nn.Linear(4, 3),
    ]


IMAGES = (2, 7, 6)

NETS: dict[str, tuple[Model, tuple[int, ...]]] = {
    "linear": (lambda: [nn.Linear(5, 3)], (5,)),
    "no biases": (lambda: [nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)], (5,)),
    "no activation between": (lambda: [nn.Linear(5, 4), nn.Linear(4, 3)], (5,)),
    "one feature, one unit": (lambda: [nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 2)], (1,)),
    "tanh": (between(nn.Tanh), (5,)),
    "relu": (between(nn.ReLU), (5,)),
    "relu in place": (between(lambda: nn.ReLU(inplace=True)), (5,)),
    "sigmoid": (between(nn.Sigmoid), (5,)),
    "gelu": (between(nn.GELU), (5,)),
    "leaky relu": (between(nn.LeakyReLU), (5,)),
    "leaky relu, steep": (between(lambda: nn.LeakyReLU(0.4)), (5,)),
    "leaky relu, falling": (between(lambda: nn.LeakyReLU(-0.5)), (5,)),
    "leaky relu, flat": (between(lambda: nn.LeakyReLU(0.0)), (5,)),
    "identity": (between(nn.Identity), (5,)),
    "two activations in a row": (between(nn.Sigmoid, nn.Tanh), (5,)),
    "an activation first and last": (lambda: [nn.Tanh(), nn.Linear(5, 3), nn.Sigmoid()], (5,)),
    "one activation in three places": (shared_activation, (5,)),
    "nested": (named, (5,)),
    "flatten first": (lambda: [nn.Flatten(), nn.Linear(12, 3)], (3, 4)),
    "dropout, evaluating": (between(nn.Tanh, nn.Dropout), (5,)),
    "conv": (conv(), IMAGES),
    "conv, no bias": (conv(bias=False), IMAGES),
    "conv, 1 × 1": (conv(kernel_size=1), IMAGES),
    "conv, stride": (conv(stride=2), IMAGES),
    "conv, stride larger than the kernel": (conv(kernel_size=2, stride=3), IMAGES),
    "conv, padding": (conv(padding=1), IMAGES),
    "conv, dilation": (conv(dilation=2), IMAGES),
    "conv, groups": (conv(groups=2), IMAGES),
    "conv, depthwise without bias": (conv(groups=2, bias=False), IMAGES),
    "conv, all of them, each side its own": (
        conv(kernel_size=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        IMAGES,
    ),
    "conv, same": (conv(padding="same"), IMAGES),
    "conv, same, dilated": (conv(kernel_size=(3, 5), padding="same", dilation=(2, 1)), IMAGES),
    "conv, same, even kernel but dilated": (conv(kernel_size=2, padding="same", dilation=2), IMAGES),
    "conv, valid": (conv(padding="valid"), IMAGES),
    "conv on conv": (
        lambda: [nn.Conv2d(2, 2, 2), nn.GELU(), nn.Conv2d(2, 3, 3), nn.Flatten(), nn.LazyLinear(3)],
        IMAGES,
    ),
    "conv at the end": (
        lambda: [nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 3, (6, 5)), nn.Flatten()],
        IMAGES,
    ),
    "max pool": (after_conv(nn.Tanh, lambda: nn.MaxPool2d(2)), IMAGES),
    "max pool, overlapping": (after_conv(lambda: nn.MaxPool2d(3, 1, 1), nn.Tanh), IMAGES),
    "max pool, each side its own": (after_conv(lambda: nn.MaxPool2d((3, 2), (1, 2), (1, 0))), IMAGES),
    "max pool, dilation": (after_conv(lambda: nn.MaxPool2d(2, 1, dilation=2)), IMAGES),
    "max pool, ceil": (after_conv(lambda: nn.MaxPool2d(4, 3, ceil_mode=True)), IMAGES),
    "max pool, ceil and padding": (after_conv(lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True)), IMAGES),
    "average pool": (after_conv(nn.Tanh, lambda: nn.AvgPool2d(2)), IMAGES),
    "average pool, padding": (after_conv(lambda: nn.AvgPool2d(3, 2, 1)), IMAGES),
    "average pool, padding does not count": (
        after_conv(lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        IMAGES,
    ),
    "average pool, ceil": (after_conv(lambda: nn.AvgPool2d((4, 3), 3, ceil_mode=True)), IMAGES),
    "average pool, ceil and padding": (
        after_conv(lambda: nn.AvgPool2d(4, 3, 2, ceil_mode=True), nn.Sigmoid),
        IMAGES,
    ),
    "a pool first": (lambda: [nn.AvgPool2d(2), nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3)], IMAGES),
}


def model_of(name: str) -> tuple[nn.Sequential, Batch]:
    make, shape = NETS[name]
    torch.manual_seed(0)
    model = nn.Sequential(*make())
    model(torch.zeros(1, *shape))  # the lazy layers learn their sizes
    model.double()
    for p in model.parameters():
        nn.init.uniform_(p, -0.7, 0.7)
    model.eval()
    return model, batch_for(model, shape)


@pytest.mark.parametrize("name", NETS)
def test_a_net_maps_as_torch_does(name):
    model, (inputs, _) = model_of(name)
    converted = convert(model)
    controls = [slot.read() for slot in converted.slots]
    assert_close(
        predict(converted.network, controls, inputs.unsqueeze(0))[0], model(inputs).detach(), 1e-13, "output"
    )


@pytest.mark.parametrize("name", NETS)
def test_a_net_learns_as_torch_does(name):
    """Without feedback, by momentum and decay: torch.optim.SGD."""
    model, (inputs, targets) = model_of(name)
    twin, _ = model_of(name)
    numbers = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01}
    ours = DDPNOpt(model, feedback=False, **numbers)
    theirs = torch.optim.SGD(twin.parameters(), **numbers)
    for _ in range(3):
        theirs.zero_grad()
        functional.cross_entropy(twin(inputs), targets).backward()
        theirs.step()
        ours.step(inputs, targets)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p.detach(), q.detach(), 1e-12, "weights", 1e-14)


@pytest.mark.parametrize("name", NETS)
def test_a_net_can_have_feedback_in_every_form(name):
    for options in ({}, {"terminal_hessian": "gauss_newton"}, {"dynamics": "second_order"}):
        model, (inputs, targets) = model_of(name)
        optimizer = DDPNOpt(model, lr=0.02, vxx_reg=1e-3, **options)
        first = optimizer.step(inputs, targets)
        assert optimizer.status is None
        assert optimizer.step(inputs, targets) < first


def test_layers_have_the_names_of_their_modules():
    assert convert(built(named)).names == ("0.affine", "1.0.0", "3")


def test_a_lazy_layer_can_be_read_once_it_knows_its_size():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ConfigError, match="LazyLinear"):
        convert(model)
    model(torch.zeros(1, 5))
    assert convert(model).names == ("0",)


class Chain(nn.Sequential):
    """A name for a net, which stays a chain."""


def test_a_named_chain_is_a_chain():
    assert convert(Chain(nn.Linear(5, 3))).names == ("0",)


# --- dropout ---


class Masked(nn.Module):
    """Dropout with a mask that is known."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


def masked(module: nn.Module) -> Activation:
    assert isinstance(module, Masked)
    mask = module.mask.unsqueeze(0)
    return Activation(lambda h: h * mask, lambda h: mask.expand(h.shape), None, keeps_output=False)


def dropped_out(where: int, layer: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)]
    parts.insert(where, layer)
    return nn.Sequential(*parts).double()


@pytest.mark.parametrize(("where", "features"), [(0, 5), (1, 6), (2, 6), (4, 4)])
@pytest.mark.parametrize("form", ["exact", "gauss_newton"])
def test_both_forward_passes_share_dropouts_mask(form, where, features):
    register(Masked, layer=masked)
    inputs, targets = normal(BATCH, 5), torch.arange(BATCH) % 3
    torch.manual_seed(3)
    mask = (torch.rand(1, BATCH, features, dtype=torch.float64) >= 0.4).double()[0] / 0.6
    assert 0 < int((mask == 0).sum()) < mask.numel()
    dropping, known = dropped_out(where, nn.Dropout(0.4)), dropped_out(where, Masked(mask))
    torch.manual_seed(3)
    losses = [DDPNOpt(m, lr=0.3, terminal_hessian=form).step(inputs, targets) for m in (dropping, known)]
    assert torch.equal(*losses)
    for p, q in zip(dropping.parameters(), known.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-14)


def test_every_step_has_masks_of_its_own():
    model = dropped_out(2, nn.Dropout(0.5))
    optimizer = DDPNOpt(model, lr=1e-12)
    losses = {round(float(optimizer.step(normal(BATCH, 5), torch.arange(BATCH) % 3)), 9) for _ in range(5)}
    assert len(losses) == 5


def test_dropout_does_nothing_in_evaluation_and_at_zero():
    inputs, targets = normal(BATCH, 5), torch.arange(BATCH) % 3
    plain, resting, none = (
        dropped_out(2, layer) for layer in (nn.Identity(), nn.Dropout(0.5), nn.Dropout(0.0))
    )
    optimizers = [DDPNOpt(model, lr=0.1) for model in (plain, resting, none)]
    resting.eval()  # after the optimizer was made: asked at every pass
    before = torch.get_rng_state()
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step(inputs, targets)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_bits(weights(resting), weights(plain))
    assert_same_bits(weights(none), weights(plain))


def test_all_may_be_dropped():
    model = dropped_out(2, nn.Dropout(1.0))
    start = weights(model)
    optimizer = DDPNOpt(model, lr=0.1)
    optimizer.step(normal(BATCH, 5), torch.arange(BATCH) % 3)
    assert optimizer.status is None
    same = [torch.equal(p, q) for p, q in zip(weights(model), start, strict=True)]
    assert same == [True, True, True, False, False, False]


# --- what is refused ---


class Residual(nn.Sequential):
    """No chain at all."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.BatchNorm1d(4), "BatchNorm1d"),
        (nn.Dropout2d(), "Dropout2d"),
        (nn.Conv1d(1, 1, 1), "Conv1d"),
        (nn.ConvTranspose2d(1, 1, 1), "ConvTranspose2d"),
        (nn.LSTM(4, 4), "LSTM"),
        (nn.ModuleList([nn.Linear(4, 4)]), "ModuleList"),
        (Residual(nn.Linear(4, 4)), "Residual"),
        (Chain(nn.Linear(4, 4)), "Chain"),
        (type("MyLinear", (nn.Linear,), {})(4, 4), "MyLinear"),
        (parametrizations.weight_norm(nn.Linear(4, 4)), "ParametrizedLinear"),
    ],
    ids=str,
)
def test_a_module_that_is_not_supported_is_named_with_its_place(module, name):
    model = nn.Sequential(
        nn.Linear(5, 4), nn.Sequential(nn.Tanh(), OrderedSequential(odd=module)), nn.Linear(4, 3)
    )
    with pytest.raises(ConfigError) as caught:
        DDPNOpt(model, lr=0.1)
    assert (caught.value.field, caught.value.value) == ("model.1.1.odd", name)
    assert supported() in caught.value.allowed
    assert "register_generic" in caught.value.allowed


def OrderedSequential(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def test_what_is_supported_is_listed():
    assert supported() == (
        "AvgPool2d, Conv2d, Dropout, Flatten, GELU, "
        "Identity, LeakyReLU, Linear, MaxPool2d, ReLU, Sigmoid, Tanh"
    )
    register_generic(nn.Softplus)
    assert "Sigmoid, Softplus, Tanh" in supported()


@pytest.mark.parametrize(
    ("module", "field", "value"),
    [
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "Conv2d.padding_mode", "reflect"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "Conv2d.padding_mode", "circular"),
        (nn.Conv2d(2, 2, 2, padding="same"), "Conv2d.padding", "same"),
        (nn.GELU(approximate="tanh"), "GELU.approximate", "tanh"),
        (nn.Flatten(0), "Flatten", (0, -1)),
        (nn.Flatten(2), "Flatten", (2, -1)),
        (nn.Flatten(1, 2), "Flatten", (1, 2)),
        (nn.AvgPool2d(2, divisor_override=3), "AvgPool2d.divisor_override", 3),
        (nn.MaxPool2d(2, return_indices=True), "MaxPool2d.return_indices", True),
    ],
    ids=str,
)
def test_an_option_that_is_not_supported_is_named(module, field, value):
    with pytest.raises(ConfigError) as caught:
        convert(nn.Sequential(nn.Conv2d(2, 2, 1), module))
    assert (caught.value.field, caught.value.value) == (field, value)


@pytest.mark.parametrize("model", [nn.Sequential(), nn.Sequential(nn.Tanh(), nn.Flatten())])
def test_a_model_without_parameters_is_refused(model):
    with pytest.raises(ConfigError, match="at least one of Linear, Conv2d"):
        convert(model)


@pytest.mark.parametrize(
    "model", [Residual(nn.Linear(3, 3)), nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 3)])]
)
def test_a_model_that_is_no_chain_is_refused(model):
    with pytest.raises(ConfigError) as caught:
        convert(model)
    assert caught.value.value == type(model).__name__


def shared_layer() -> list[nn.Module]:
    layer = nn.Linear(4, 4)
    return [layer, nn.Tanh(), nn.Sequential(layer)]


def tied_weights() -> list[nn.Module]:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    return [one, nn.Tanh(), nn.Sequential(other)]


@pytest.mark.parametrize("make", [shared_layer, tied_weights])
def test_layers_that_share_parameters_are_refused(make):
    with pytest.raises(ConfigError, match="second time") as caught:
        convert(nn.Sequential(*make()))
    assert caught.value.field == "model.2.0"


def pruned() -> nn.Module:
    layer = nn.Linear(4, 3, bias=False)
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


def pruned_bias() -> nn.Module:
    layer = nn.Linear(4, 3)
    prune.random_unstructured(layer, "bias", 0.5)
    return layer


def with_a_scale() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.register_parameter("scale", nn.Parameter(torch.ones(1)))
    return layer


@pytest.mark.parametrize("make", [pruned, pruned_bias, with_a_scale])
def test_a_layer_whose_weight_is_put_together_is_refused(make):
    with pytest.raises(ConfigError, match="a weight and perhaps a bias") as caught:
        convert(nn.Sequential(nn.Linear(4, 4), make()))
    assert caught.value.field == "model.1"


def test_the_order_in_which_a_module_got_its_parameters_is_no_matter():
    model, expected = built(lambda: [nn.Linear(5, 3)]), built(lambda: [nn.Linear(5, 3)])
    weight = model[0].weight
    del model[0].weight
    model[0].weight = weight
    assert next(iter(model.parameters())) is model[0].bias
    for net in (model, expected):
        DDPNOpt(net, lr=0.1).step(normal(BATCH, 5), torch.arange(BATCH) % 3)
    assert torch.equal(model[0].weight, expected[0].weight)
    assert torch.equal(model[0].bias, expected[0].bias)


# --- registering a class with pullbacks of its own ---

SOFTPLUS = Activation(
    functional.softplus,
    torch.sigmoid,
    lambda h: torch.sigmoid(h) * torch.sigmoid(-h),
    keeps_output=False,
)


def test_a_module_is_registered_by_one_class():
    for given in ({}, {"affine": lambda m: Linear(), "layer": lambda m: None}):
        with pytest.raises(ConfigError, match="either affine or layer"):
            register(nn.Softplus, **given)
    register(nn.Softplus, layer=lambda module: SOFTPLUS)
    register(nn.Hardtanh, layer=lambda module: None)
    assert "Hardtanh, Identity" in supported()
    model = built(lambda: [nn.Hardtanh(), nn.Linear(5, 3), nn.Softplus(), nn.Hardtanh()])
    assert convert(model).network.stages[0].sigma == (SOFTPLUS,)


@pytest.mark.parametrize("safeguard", ["clamp", "psd"])
@pytest.mark.parametrize("dynamics", ["first_order", "second_order"])
def test_a_registered_activation_trains_as_the_oracles(dynamics, safeguard):
    register(nn.Softplus, layer=lambda module: SOFTPLUS)
    model = built(between(nn.Softplus))
    stages = [oracle.linear(5, 6, sigma=functional.softplus), oracle.linear(6, 3)]
    options = {"vxx_reg": 0.1, "weight_decay": 0.05, "dynamics": dynamics, "safeguard": safeguard}
    optimizer = DDPNOpt(model, lr=0.3, convention="per_sample", **options)
    dense = oracle.Options(0.3, convention="per_sample", **options)
    assert_trains_as(model, optimizer, stages, dense, (5,))


def assert_trains_as(
    model: nn.Sequential,
    optimizer: DDPNOpt,
    stages: list[oracle.Stage],
    dense: oracle.Options,
    shape: tuple[int, ...],
) -> None:
    slots = convert(model).slots
    theirs = [slot.read()[0].clone() for slot in slots]
    start, state = [u.clone() for u in theirs], None
    for k in range(3):
        inputs, targets = normal(BATCH, *shape, seed=k), torch.arange(BATCH) % 3
        optimizer.step(inputs, targets)
        theirs, state = oracle.step(stages, theirs, inputs, targets, oracle.cross_entropy, dense, state)
        for t, (slot, u) in enumerate(zip(slots, theirs, strict=True)):
            assert_close(slot.read()[0].clone(), u, 1e-9, f"controls of layer {t}", 1e-12)
    assert optimizer.status is None
    assert all(float((u - v).abs().max()) > 1e-4 for u, v in zip(theirs, start, strict=True))


class Wide(nn.Linear):
    """A layer of somebody's own."""


class Tall(nn.Conv2d):
    """A convolution of somebody's own."""


def tall(module: nn.Module) -> Conv2d:
    assert isinstance(module, Tall)
    kernel = tuple(module.kernel_size)
    return Conv2d(module.in_channels, module.out_channels, (kernel[0], kernel[1]))


def test_a_layer_with_parameters_can_be_registered():
    register(Wide, affine=lambda module: Linear(module.bias is not None))
    register(Tall, affine=tall)
    own = built(lambda: [Tall(2, 3, 2), nn.Tanh(), nn.Flatten(), Wide(12, 3)])
    plain = built(lambda: [nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)])
    for model in (own, plain):
        optimizer = ddpnopt(model, "kfac", vxx_reg=0.01)
        for k in range(2):
            optimizer.step(normal(BATCH, 2, 3, 3, seed=k), torch.arange(BATCH) % 3)
    assert_same_bits(weights(own), weights(plain))


# --- registering any module ---

OUTER = {"terminal_hessian": "gauss_newton", "vxx_reg": 0.1}
DIAGONAL = {
    "identity": ({"lr": 0.1, "momentum": 0.5}, preconditioners.Identity),
    "rmsprop": (
        {"lr": 0.05, "rho": 0.9, "eps": 0.1, "preconditioner": "rmsprop"},
        lambda: preconditioners.RMSprop("batch", 0.9, 0.1),
    ),
    "rmsprop, per sample": (
        {"lr": 0.05, "rho": 0.9, "eps": 0.1, "preconditioner": "rmsprop", "second_moment": "per_sample"},
        lambda: preconditioners.RMSprop("per_sample", 0.9, 0.1),
    ),
    "adam": (
        {"lr": 0.05, "betas": (0.8, 0.9), "eps": 0.1, "preconditioner": "adam"},
        lambda: preconditioners.Adam("batch", 0.8, 0.9, 0.1),
    ),
}
every_diagonal = pytest.mark.parametrize("name", DIAGONAL)


def with_norm() -> list[nn.Module]:
    return [nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Sigmoid(), nn.Linear(6, 3)]


def norm_stages() -> list[oracle.Stage]:
    def norm(x: Tensor, u: Tensor) -> Tensor:
        return functional.layer_norm(x, (6,)) * u[0, :6] + u[0, 6:]

    return [
        oracle.linear(5, 6, sigma=torch.tanh),
        oracle.Stage(norm, torch.sigmoid, (1, 12)),
        oracle.linear(6, 3),
    ]


@pytest.mark.parametrize(("convention", "safeguard"), [("batch_mean", "clamp"), ("per_sample", "psd")])
@every_diagonal
def test_a_generic_layer_with_parameters_trains_as_the_oracles(name, convention, safeguard):
    register_generic(nn.LayerNorm)
    numbers, dense = DIAGONAL[name]
    choices = {"convention": convention, "safeguard": safeguard, "weight_decay": 0.05}
    model = built(with_norm)
    optimizer = DDPNOpt(model, **numbers, **OUTER, **choices)
    options = oracle.Options(
        numbers["lr"],
        **OUTER,
        **choices,
        factorized=True,
        momentum=numbers.get("momentum", 0.0),
        preconditioner=dense(),
    )
    assert_trains_as(model, optimizer, norm_stages(), options, (5,))


@pytest.mark.parametrize("baseline", ["identity", "kfac", "ekfac", "adam"])
def test_a_generic_map_is_the_registered_one(baseline):
    """Softplus, by its slope and by torch.func."""
    ends = []
    for generic in (True, False):
        modules.MAPS.pop(nn.Softplus, None)
        if generic:
            register_generic(nn.Softplus)
        else:
            register(nn.Softplus, layer=lambda module: SOFTPLUS)
        model = built(
            lambda: [nn.Linear(5, 6), nn.Softplus(), nn.Linear(6, 4), nn.Softplus(), nn.Linear(4, 3)]
        )
        optimizer = ddpnopt(model, baseline, **OUTER)
        for k in range(2):
            optimizer.step(normal(BATCH, 5, seed=k), torch.arange(BATCH) % 3)
        ends.append(weights(model))
    for p, q in zip(*ends, strict=True):
        assert_close(p, q, 1e-10, "weights")


KINDS = (nn.Conv2d, nn.AvgPool2d, nn.Tanh, nn.Linear)


def mixed(conv2d: Any, pool: Any, tanh: Any, linear: Any) -> list[nn.Module]:
    return [
        nn.Conv2d(2, 3, 2),
        tanh(),
        conv2d(3, 2, 2, padding=1),
        pool(2, 1),
        nn.Flatten(),
        linear(32, 4, bias=False),
        tanh(),
        linear(4, 3),
    ]


@pytest.mark.parametrize(("convention", "safeguard"), [("batch_mean", "psd"), ("per_sample", "clamp")])
@every_diagonal
def test_generic_layers_are_those_with_pullbacks_of_their_own(name, convention, safeguard):
    """The same net, its convolution, pool, activation and read-out by torch.func."""
    numbers, _ = DIAGONAL[name]
    choices = {"convention": convention, "safeguard": safeguard, "weight_decay": 0.05}
    generic = [type(f"Generic{kind.__name__}", (kind,), {}) for kind in KINDS]
    for kind in generic:
        register_generic(kind)
    ends = []
    for kinds in (KINDS, generic):
        model = built(partial(mixed, *kinds))
        optimizer = DDPNOpt(model, **numbers, **OUTER, **choices)
        for k in range(2):
            optimizer.step(normal(BATCH, 2, 5, 5, seed=k), torch.arange(BATCH) % 3)
        assert optimizer.status is None
        ends.append(weights(model))
    for p, q in zip(*ends, strict=True):
        assert_close(p, q, 1e-9, "weights")


GENERIC: dict[str, tuple[Model, tuple[int, ...], tuple[type[nn.Module], ...]]] = {
    "layer norm": (with_norm, (5,), (nn.LayerNorm,)),
    "layer norm without parameters": (
        between(lambda: nn.LayerNorm(6, elementwise_affine=False)),
        (5,),
        (nn.LayerNorm,),
    ),
    "softplus": (between(nn.Softplus), (5,), (nn.Softplus,)),
    "silu in place": (between(lambda: nn.SiLU(inplace=True)), (5,), (nn.SiLU,)),
    "elu in place, first": (lambda: [nn.ELU(inplace=True), nn.Linear(5, 3)], (5,), (nn.ELU,)),
    "prelu": (between(lambda: nn.PReLU(6)), (5,), (nn.PReLU,)),
    "softmax": (between(lambda: nn.Softmax(dim=-1)), (5,), (nn.Softmax,)),
    "bilinear upsampling": (
        after_conv(lambda: nn.Upsample(scale_factor=2, mode="bilinear"), nn.Tanh),
        (2, 4, 4),
        (nn.Upsample,),
    ),
    "group norm on images": (after_conv(lambda: nn.GroupNorm(3, 3), nn.GELU), (2, 4, 4), (nn.GroupNorm,)),
    "a transposed convolution": (
        after_conv(lambda: nn.ConvTranspose2d(3, 2, 2)),
        (2, 4, 4),
        (nn.ConvTranspose2d,),
    ),
    "a generic layer alone": (lambda: [nn.LayerNorm(3)], (3,), (nn.LayerNorm,)),
}


def generic_model(name: str) -> tuple[nn.Sequential, Batch]:
    make, shape, kinds = GENERIC[name]
    for kind in kinds:
        register_generic(kind)
    torch.manual_seed(0)
    model = nn.Sequential(*make())
    model(torch.zeros(1, *shape))
    model.double()
    return model, batch_for(model, shape)


PEERS = {
    "identity": ({"lr": 0.1, "momentum": 0.5}, torch.optim.SGD, {"lr": 0.1, "momentum": 0.5}),
    "rmsprop": ({"lr": 0.01, "eps": 1e-3}, torch.optim.RMSprop, {"lr": 0.01, "eps": 1e-3}),
    "adam": ({"lr": 0.01, "eps": 1e-3}, torch.optim.Adam, {"lr": 0.01, "eps": 1e-3}),
}


@pytest.mark.parametrize("preconditioner", PEERS)
@pytest.mark.parametrize("name", GENERIC)
def test_without_feedback_a_generic_layer_learns_as_torch_does(name, preconditioner):
    model, (inputs, targets) = generic_model(name)
    twin, _ = generic_model(name)
    numbers, theirs, same = PEERS[preconditioner]
    ours = DDPNOpt(model, preconditioner=preconditioner, feedback=False, **numbers)
    other = theirs(twin.parameters(), **same)
    for _ in range(3):
        other.zero_grad()
        functional.cross_entropy(twin(inputs.clone()), targets).backward()
        other.step()
        ours.step(inputs, targets)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p.detach(), q.detach(), 1e-10, "weights", 1e-13)


@pytest.mark.parametrize("name", GENERIC)
def test_a_generic_layer_trains_and_leaves_its_inputs_alone(name):
    model, (inputs, targets) = generic_model(name)
    before = inputs.clone()
    expected = functional.cross_entropy(model(inputs.clone()), targets).detach()
    optimizer = DDPNOpt(model, lr=0.02, **OUTER)
    first = optimizer.step(inputs, targets)
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=0)
    for _ in range(4):
        last = optimizer.step(inputs, targets)
    assert optimizer.status is None
    assert last < first
    assert torch.equal(inputs, before)
    assert all(p.is_leaf and p.requires_grad and not p.is_inference() for p in model.parameters())


def refusals() -> Iterator[Any]:
    for name in ("layer norm", "softplus"):
        yield pytest.param(name, {}, id=f"{name}, exact")
        yield pytest.param(
            name, {"terminal_hessian": "gauss_newton", "factorized": False}, id=f"{name}, full"
        )
        yield pytest.param(name, {"dynamics": "second_order"}, id=f"{name}, second order")
    for preconditioner in ("kfac", "ekfac"):
        for feedback in (True, False):
            options = {"preconditioner": preconditioner, "feedback": feedback, **OUTER}
            yield pytest.param("layer norm", options, id=f"{preconditioner}, feedback {feedback}")


@pytest.mark.parametrize(("name", "options"), list(refusals()))
def test_what_a_generic_layer_cannot_do_is_refused(name, options):
    model, (inputs, targets) = generic_model(name)
    before = weights(model)
    with pytest.raises(ConfigError, match="generic layer"):
        DDPNOpt(model, lr=0.1, **options).step(inputs, targets)
    assert_same_bits(weights(model), before)


@pytest.mark.parametrize("baseline", ["kfac", "ekfac", "sgd_vgr", "emsa", "vanilla_ddp"])
def test_what_a_baseline_cannot_do_with_a_generic_layer_is_refused(baseline):
    model, (inputs, targets) = generic_model("layer norm")
    before = weights(model)
    with pytest.raises(ConfigError):
        BaselineOptimizer(model, baseline, lr=0.1).step(inputs, targets)
    assert_same_bits(weights(model), before)


def test_nothing_that_a_test_registers_stays():
    """The last test of this module sees the tables as they come."""
    assert "Softplus" not in supported()
    assert nn.LayerNorm not in modules.GENERIC
