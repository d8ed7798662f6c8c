"""The paper's nets: what they are made of, their sizes, and where their weights start."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from ddpnopt import DDPNOpt
from ddpnopt.config import Activation, ModelConfig
from ddpnopt.datasets.catalog import CATALOG
from ddpnopt.errors import ConfigError
from ddpnopt.layers.modules import convert
from ddpnopt.layers.network import predict
from ddpnopt.models import MODULES, ZOO, for_dataset, network, sequential
from ddpnopt.pack import rng

EVERY = {f"{dataset} {kind}": (dataset, kind) for dataset, kind in ZOO}
entries = pytest.mark.parametrize("name", EVERY)

ODD = {
    "no hidden layer": (ModelConfig(()), (7,)),
    "one hidden unit": (ModelConfig((1,), "gelu", output="tanh"), (3,)),
    "images into an fcn": (ModelConfig((4,), "leaky_relu"), (2, 3, 5)),
    "one convolution": (ModelConfig((), "relu", "cnn", (3,)), (1, 4, 4)),
    "odd images": (ModelConfig((6, 5), "tanh", "cnn", (3, 4, 2), "sigmoid"), (2, 7, 5)),
    "down to one entry": (ModelConfig((3,), "identity", "cnn", (2, 2, 2, 2)), (1, 4, 5)),
}


def parametrised(model: nn.Sequential) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def as_controls(model: nn.Sequential) -> list[Tensor]:
    return [
        torch.cat((m.weight.flatten(1), m.bias.unsqueeze(1)), dim=1).detach().unsqueeze(0)
        for m in parametrised(model)
    ]


@entries
def test_the_net_of_a_dataset(name):
    dataset, kind = EVERY[name]
    info, model = CATALOG[dataset], for_dataset(dataset, kind)
    output = model(torch.zeros(3, *info.shape))
    assert output.shape == (3, info.classes)
    kinds = [type(m) for m in parametrised(model)]
    # A.6.1: five fully connected layers, or four convolutions and two fully connected layers.
    assert kinds == ([nn.Linear] * 5 if kind == "fcn" else [nn.Conv2d] * 4 + [nn.Linear] * 2)
    assert isinstance(model[-1], nn.Sigmoid if dataset == "wine" else nn.Identity)


@entries
def test_the_net_of_a_dataset_can_be_trained(name):
    dataset, kind = EVERY[name]
    info = CATALOG[dataset]
    torch.manual_seed(0)
    model = for_dataset(dataset, kind)
    optimizer = DDPNOpt(model, lr=0.01)
    inputs, targets = torch.randn(4, *info.shape), torch.arange(4) % info.classes
    first = optimizer.step(inputs, targets)
    assert optimizer.status is None
    assert optimizer.step(inputs, targets) < first


def test_every_dataset_has_a_net():
    assert {dataset for dataset, _ in ZOO} == set(CATALOG)


@pytest.mark.parametrize("name", [*EVERY, *ODD])
def test_the_configuration_knows_the_sizes(name):
    """`ModelConfig.layers` counts, without torch, what the net is made of."""
    if name in EVERY:
        model, info = ZOO[EVERY[name]], CATALOG[EVERY[name][0]]
        shape, classes = info.shape, info.classes
    else:
        (model, shape), classes = ODD[name], 3
    net = sequential(model, shape, classes)
    seen: list[tuple[int, int, int, int]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs, entries = module.weight.flatten(1).shape
        positions = output[0].numel() // outputs
        seen.append((outputs, entries, positions, inputs[0][0].numel()))

    for module in parametrised(net):
        module.register_forward_hook(record)
    assert net(torch.zeros(2, *shape)).shape == (2, classes)
    expected = [(s.outputs, s.inputs, s.positions, s.state) for s in model.layers(shape, classes)]
    assert seen == expected
    assert [tuple(slot.read().shape[1:]) for slot in convert(net).slots] == [
        (o, i + 1) for o, i, *_ in expected
    ]


@pytest.mark.parametrize("name", ODD)
def test_a_pack_has_the_net_of_torch(name):
    model, shape = ODD[name]
    net = sequential(model, shape, 3).double()
    layers, converted = network(model, shape, 3), convert(net).network
    assert [stage.affine for stage in layers.stages] == [stage.affine for stage in converted.stages]
    x = torch.randn(4, *shape, dtype=torch.float64)
    found = predict(layers, as_controls(net), x.flatten(1).unsqueeze(0))[0]
    torch.testing.assert_close(found, net(x).detach(), rtol=1e-13, atol=1e-14)


def test_an_activation_is_after_every_layer_but_the_last():
    for name, module in MODULES.items():
        net = sequential(ModelConfig((4, 3), name, output="tanh"), (5,), 2)
        assert [type(m) for m in net] == [nn.Linear, module, nn.Linear, module, nn.Linear, nn.Tanh]
    assert set(MODULES) == set(Activation.__args__)


def test_a_pool_is_after_every_second_convolution():
    net = sequential(ModelConfig((4,), "relu", "cnn", (2, 3, 4)), (1, 8, 8), 2)
    assert [type(m).__name__ for m in net] == [
        *("Conv2d", "ReLU", "Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU", "Flatten"),
        *("Linear", "ReLU", "Linear", "Identity"),
    ]


@entries
def test_weights_start_by_one_law(name):
    """Uniform on ±1/√inputs: torch's default for both kinds of layer, and the packs'."""
    dataset, kind = EVERY[name]
    info, model = CATALOG[dataset], ZOO[dataset, kind]
    layers = model.layers(info.shape, info.classes)
    torch.manual_seed(0)
    ours = [torch.from_numpy(u) for u in rng.initial_controls(0, layers)]
    theirs = [u.squeeze(0).double() for u in as_controls(for_dataset(dataset, kind))]
    for layer, u in itertools.chain(zip(layers, ours, strict=True), zip(layers, theirs, strict=True)):
        assert u.shape == (layer.outputs, layer.inputs + 1)
        bound = layer.inputs**-0.5
        assert float(u.abs().max()) <= bound * (1 + 1e-6)
        scaled = (u / bound).flatten()
        spread = 4 / len(scaled) ** 0.5  # four standard errors at least
        assert abs(float(scaled.mean())) < spread
        assert abs(float((scaled**2).mean()) - 1 / 3) < spread
        assert abs(float((scaled**4).mean()) - 1 / 5) < spread


@entries
def test_a_packs_net_draws_no_random_numbers(name):
    dataset, kind = EVERY[name]
    info = CATALOG[dataset]
    before = torch.get_rng_state()
    network(ZOO[dataset, kind], info.shape, info.classes)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dataset_without_a_net_of_that_kind_is_refused():
    for dataset, kind in (("wine", "cnn"), ("cifar10", "fcn"), ("imagenet", "cnn")):
        with pytest.raises(ConfigError, match="svhn cnn") as caught:
            for_dataset(dataset, kind)
        assert caught.value.value == f"{dataset} {kind}"


def test_images_that_get_too_small_are_refused():
    with pytest.raises(ConfigError, match="at most 3 convolutions"):
        sequential(ModelConfig((), "relu", "cnn", (2, 2, 2, 2)), (1, 3, 3), 2)
    with pytest.raises(ConfigError, match="no images"):
        sequential(ModelConfig((), "relu", "cnn", (2,)), (9,), 2)
