"""The nets of the paper: from a `ModelConfig` to an nn.Sequential, and an entry for each dataset (A.6.1)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import nn

from ddpnopt.config import KERNEL, POOL_EVERY, Activation, ModelConfig, ModelKind
from ddpnopt.datasets.catalog import CATALOG
from ddpnopt.errors import ConfigError
from ddpnopt.layers.modules import convert
from ddpnopt.layers.network import Network
from ddpnopt.layers.reshaping import Reshape

MODULES: Final[Mapping[Activation, type[nn.Module]]] = MappingProxyType(
    {
        "tanh": nn.Tanh,
        "relu": nn.ReLU,
        "sigmoid": nn.Sigmoid,
        "gelu": nn.GELU,
        "leaky_relu": nn.LeakyReLU,
        "identity": nn.Identity,
    }
)

_CNN: Final = ModelConfig((32,), "relu", "cnn", channels=(32,) * 4)

ZOO: Final[Mapping[tuple[str, ModelKind], ModelConfig]] = MappingProxyType(
    {
        ("wine", "fcn"): ModelConfig((10,) * 4, "tanh", output="sigmoid"),
        ("digits", "fcn"): ModelConfig((10,) * 4, "tanh"),
        ("mnist", "fcn"): ModelConfig((32,) * 4, "relu"),
        ("fashion_mnist", "fcn"): ModelConfig((32,) * 4, "relu"),
        ("mnist", "cnn"): _CNN,
        ("fashion_mnist", "cnn"): _CNN,
        ("svhn", "cnn"): _CNN,
        ("cifar10", "cnn"): _CNN,
        **{(f"clusters{k}", "fcn"): ModelConfig((16,) * 4, "relu") for k in (5, 8, 12, 15)},
    }
)
"""The paper's net for each dataset: five fully connected layers, or four convolutions and two of them."""


def sequential(model: ModelConfig, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Build a net, initialised by torch's defaults.

    Args:
        model: what to build.
        shape: of a sample: (features,), or (channels, height, width), which an fcn flattens.
        classes: number of outputs.
    """
    layers = model.layers(shape, classes)
    modules: list[nn.Module] = []
    channels, count = shape[0], len(model.channels)
    for i, width in enumerate(model.channels, start=1):
        modules.append(nn.Conv2d(channels, width, KERNEL, padding=KERNEL // 2))
        modules.append(MODULES[model.activation]())
        if i % POOL_EVERY == 0:
            modules.append(nn.MaxPool2d(2))
        channels = width
    if len(shape) > 1:
        modules.append(nn.Flatten())
    for t, layer in enumerate(layers[count:], start=count + 1):
        modules.append(nn.Linear(layer.inputs, layer.outputs))
        modules.append(MODULES[model.activation if t < len(layers) else model.output]())
    return nn.Sequential(*modules)


def network(model: ModelConfig, shape: tuple[int, ...], classes: int) -> Network:
    """Return the layers of a net on flat samples (features,), without parameters."""
    with torch.device("meta"):
        converted = convert(sequential(model, shape if model.convolutional else (_size(shape),), classes))
    if not model.convolutional:
        return converted.network
    return Network((Reshape(shape), *converted.network.before), converted.network.stages)


def for_dataset(dataset: str, kind: ModelKind = "fcn") -> nn.Sequential:
    """Build the paper's net for a dataset, initialised by torch's defaults.

    Raises:
        ConfigError: if the paper has no net of that kind for it.
    """
    if (dataset, kind) not in ZOO:
        known = ", ".join(f"{name} {of_kind}" for name, of_kind in ZOO)
        raise ConfigError("model", f"{dataset} {kind}", f"one of {known}")
    info = CATALOG[dataset]
    return sequential(ZOO[dataset, kind], info.shape, info.classes)


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
