"""From torch.nn modules to layers.

`convert` reads an nn.Sequential. A module that is not in the tables below is refused by name; `register` adds
one, `register_generic` adds one whose derivatives torch.func takes (see `generic` for what it can do).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ddpnopt.errors import ConfigError
from ddpnopt.layers import activations, reshaping
from ddpnopt.layers.base import Affine, Map
from ddpnopt.layers.conv import Conv2d
from ddpnopt.layers.generic import FunctionAffine, FunctionMap
from ddpnopt.layers.linear import Linear
from ddpnopt.layers.network import Network, Stage
from ddpnopt.layers.pooling import AvgPool2d, MaxPool2d

Pair = tuple[int, int]

AFFINE: dict[type[nn.Module], Callable[[nn.Module], Affine]] = {}
MAPS: dict[type[nn.Module], Callable[[nn.Module], Map | None]] = {}
ALIGNED: Final = 16
"""Entries after which each layer's controls start in a buffer: 64 bytes of float32."""
KEPT_BYTES: Final = 2**25
"""Freed memory that the process keeps."""


class Slot:
    """Where the controls of a layer live in its module.

    Attributes:
        parameters: of the module, in the order in which they make up u.
        columns: whether u is [weight, bias] with the bias as its last column; else all in one row.
    """

    def __init__(self, parameters: tuple[nn.Parameter, ...], *, columns: bool) -> None:
        self.parameters = parameters
        self.columns = columns

    def shape(self) -> tuple[int, int]:
        """Return (o, ī)."""
        entries = sum(p.numel() for p in self.parameters)
        if not self.columns:
            return 1, entries
        outputs = len(self.parameters[0])
        return outputs, entries // outputs

    def read(self) -> Tensor:
        """Return a copy of the controls, u (1, o, ī)."""
        first = self.parameters[0]
        u = torch.empty((1, *self.shape()), dtype=first.dtype, device=first.device)
        for piece, parameter in zip(self.pieces(u), self.parameters, strict=True):
            piece.copy_(parameter.detach())
        return u

    def pieces(self, u: Tensor) -> list[Tensor]:
        """Return the views of u (1, o, ī) that are the parameters, in their shapes."""
        if not self.columns:
            split = u.flatten().split([p.numel() for p in self.parameters])
            return [part.view(p.shape) for part, p in zip(split, self.parameters, strict=True)]
        weight, *bias = self.parameters
        columns = u.shape[2] - len(bias)
        return [u[0, :, :columns].unflatten(1, weight.shape[1:]), *(u[0, :, columns] for _ in bias)]


class ControlBuffer:
    """The controls of all layers side by side, and the way between them and the parameters.

    Attributes:
        controls: u_t of t = 0..T-1, each (1, o, ī), views of one buffer.
        network: the layers, which know these controls' views.
    """

    controls: list[Tensor]
    network: Network

    def __init__(self, network: Network, slots: Sequence[Slot]) -> None:
        self.network = network
        self._slots = slots
        self._all = [p for slot in slots for p in slot.parameters]
        self._places: tuple[int, ...] = ()

    def read(self) -> None:
        """Copy the parameters in."""
        places = tuple([p.data_ptr() for p in self._all])
        if places != self._places:
            self._bind()
            self._places = places
        torch._foreach_copy_(self._pieces, self._parameters)

    def write(self) -> None:
        """Copy the controls out into the parameters."""
        torch._foreach_copy_(self._parameters, self._pieces)

    def finite(self) -> bool:
        """Return whether all controls are finite numbers."""
        # A sum costs one pass; only where it is not finite, which large numbers can do too, look at each.
        return math.isfinite(self._buffer.sum().item()) or bool(torch.isfinite(self._buffer).all())

    def _bind(self) -> None:
        """Make the buffer and the views anew: the parameters have moved, to another device say."""
        first = self._all[0]
        if first.device.type == "cpu":
            _keep_freed_memory()
        # As aligned as tensors of their own would be: products then have the same bits.
        starts, end = [], 0
        for slot in self._slots:
            starts.append(end)
            end += -(-math.prod(slot.shape()) // ALIGNED) * ALIGNED
        self._buffer = torch.zeros(end, dtype=first.dtype, device=first.device)
        self.controls = [
            self._buffer.narrow(0, start, math.prod(slot.shape())).view(1, *slot.shape())
            for slot, start in zip(self._slots, starts, strict=True)
        ]
        self._pieces = [
            piece for slot, u in zip(self._slots, self.controls, strict=True) for piece in slot.pieces(u)
        ]
        self._parameters = [p.detach() for p in self._all]
        self.network = Network(
            self.network.before,
            tuple(
                Stage(stage.affine.bind(u), stage.sigma) if isinstance(stage.affine, Linear) else stage
                for stage, u in zip(self.network.stages, self.controls, strict=True)
            ),
        )


def _keep_freed_memory() -> None:
    """Make glibc keep what a step frees for the next one.

    Its allocator hands freed memory back to the system from 256 KiB on, and a step at batch 512 spends a
    third of its time on page faults. The limit grows to twice the largest block that was mapped and freed;
    this one is never touched, so that it costs no memory. Elsewhere it does nothing.
    """
    torch.empty(KEPT_BYTES // 2, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Converted:
    """A model as layers.

    Attributes:
        network: the layers.
        slots: where u_t of t = 0..T-1 live.
        names: of the modules of t = 0..T-1.
    """

    network: Network
    slots: tuple[Slot, ...]
    names: tuple[str, ...]


def register(
    module: type[nn.Module],
    *,
    affine: Callable[[nn.Module], Affine] | None = None,
    layer: Callable[[nn.Module], Map | None] | None = None,
) -> None:
    """Teach `convert` a module by a class with its pullbacks.

    Args:
        module: the class; subclasses are looked up by their own name, not by their parents'.
        affine: makes the layer of a module with `weight` and perhaps `bias`, u = [weight, bias].
        layer: makes the layer of a module without parameters; None for one that does nothing.

    Raises:
        ConfigError: unless exactly one of the two is given.
    """
    if (affine is None) == (layer is None):
        raise ConfigError("register", module.__name__, "either affine or layer")
    if affine is not None:
        AFFINE[module] = affine
    if layer is not None:
        MAPS[module] = layer


def register_generic(module: type[nn.Module]) -> None:
    """Teach `convert` a module whose derivatives torch.func takes.

    It must treat samples one by one and draw no random numbers; it trains under the outer-product form with
    first-order dynamics and a diagonal preconditioner.
    """
    GENERIC.add(module)


GENERIC: set[type[nn.Module]] = set()


def supported() -> str:
    """List the modules that can be converted."""
    return ", ".join(sorted(m.__name__ for m in {*AFFINE, *MAPS, *GENERIC}))


def convert(model: nn.Sequential) -> Converted:
    """Read a model as layers; nested nn.Sequential are flattened.

    Raises:
        ConfigError: for a module that is not supported or used twice, for a model without a layer that has
            parameters, or for a model that is no nn.Sequential.
    """
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        raise ConfigError("model", type(model).__name__, "an nn.Sequential of " + supported())
    before: list[Map] = []
    stages: list[tuple[Affine, list[Map]]] = []
    slots: list[Slot] = []
    names: list[str] = []
    seen: set[nn.Parameter] = set()
    for name, module in _leaves(model, ""):
        made = _layer(name, module)
        if made[1] is None:
            if made[0] is not None:
                (stages[-1][1] if stages else before).append(made[0])
            continue
        if not seen.isdisjoint(made[1].parameters):
            allowed = "each layer once: layers share no parameters"
            raise ConfigError(f"model.{name}", "a layer's parameters a second time", allowed)
        seen.update(made[1].parameters)
        stages.append((made[0], []))
        slots.append(made[1])
        names.append(name)
    if not stages:
        raise ConfigError("model", "no parameters", "at least one of Linear, Conv2d")
    network = Network(tuple(before), tuple(Stage(affine, tuple(sigma)) for affine, sigma in stages))
    return Converted(network, tuple(slots), tuple(names))


def _leaves(model: nn.Sequential, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    # Not named_children, which leaves out what comes a second time, such as an activation used twice.
    for name, module in model._modules.items():
        assert module is not None
        if type(module) is nn.Sequential:
            yield from _leaves(module, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", module


Made = tuple[Affine, Slot] | tuple[Map | None, None]


def _layer(name: str, module: nn.Module) -> Made:
    kind = type(module)
    if kind in AFFINE:
        return AFFINE[kind](module), Slot(_weight_and_bias(name, module), columns=True)
    if kind in MAPS:
        return MAPS[kind](module), None
    if kind not in GENERIC:
        allowed = f"{supported()}; others by ddpnopt.layers.modules.register or register_generic"
        raise ConfigError(f"model.{name}", kind.__name__, allowed)
    parameters = tuple(module.parameters())
    if not parameters:
        return FunctionMap(lambda x: module(x.clone())), None  # clone: some work in place
    return FunctionAffine(_function(module)), Slot(parameters, columns=False)


def _weight_and_bias(name: str, module: nn.Module) -> tuple[nn.Parameter, ...]:
    """Return what makes up u = [weight, bias]."""
    held = dict(module.named_parameters())
    found = tuple(held.pop(key) for key in ("weight", "bias") if key in held)
    if held or not found or found[0] is not module.weight:
        allowed = "a weight and perhaps a bias (none that pruning or normalisation puts together)"
        raise ConfigError(f"model.{name}", ", ".join(dict(module.named_parameters())), allowed)
    return found


def _function(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the module as a function of one sample and its parameters in a row."""
    shapes = {name: p.shape for name, p in module.named_parameters()}

    def call(x: Tensor, controls: Tensor) -> Tensor:
        pieces = controls.split([shape.numel() for shape in shapes.values()])
        state = {n: p.reshape(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)}
        output: Tensor = functional_call(module, state, (x.unsqueeze(0).clone(),))
        return output.squeeze(0)

    return call


def _pair(name: str, value: int | tuple[int, ...]) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ConfigError(name, value, "one number or two")
    return (int(pair[0]), int(pair[1]))


def _conv(module: nn.Module) -> Conv2d:
    assert isinstance(module, nn.Conv2d)
    if module.padding_mode != "zeros":
        raise ConfigError("Conv2d.padding_mode", module.padding_mode, "zeros")
    kernel, dilation = _pair("kernel", module.kernel_size), _pair("dilation", module.dilation)
    if isinstance(module.padding, str):
        total = [
            d * (k - 1) if module.padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)
        ]
        if any(t % 2 for t in total):
            raise ConfigError(
                "Conv2d.padding", module.padding, "numbers, or odd kernels: this one is lopsided"
            )
        padding = (total[0] // 2, total[1] // 2)
    else:
        padding = _pair("padding", module.padding)
    return Conv2d(
        module.in_channels,
        module.out_channels,
        kernel,
        _pair("stride", module.stride),
        padding,
        dilation,
        module.groups,
        module.bias is not None,
    )


def _max_pool(module: nn.Module) -> MaxPool2d:
    assert isinstance(module, nn.MaxPool2d)
    if module.return_indices:
        raise ConfigError("MaxPool2d.return_indices", True, "False")
    return MaxPool2d(
        _pair("kernel_size", module.kernel_size),
        _pair("stride", module.stride),
        _pair("padding", module.padding),
        _pair("dilation", module.dilation),
        module.ceil_mode,
    )


def _avg_pool(module: nn.Module) -> AvgPool2d:
    assert isinstance(module, nn.AvgPool2d)
    if module.divisor_override is not None:
        raise ConfigError("AvgPool2d.divisor_override", module.divisor_override, "None")
    return AvgPool2d(
        _pair("kernel_size", module.kernel_size),
        _pair("stride", module.stride),
        _pair("padding", module.padding),
        module.ceil_mode,
        module.count_include_pad,
    )


def _gelu(module: nn.Module) -> Map:
    assert isinstance(module, nn.GELU)
    if module.approximate != "none":
        raise ConfigError("GELU.approximate", module.approximate, "none")
    return activations.GELU


def _leaky_relu(module: nn.Module) -> Map:
    assert isinstance(module, nn.LeakyReLU)
    return activations.leaky_relu(module.negative_slope)


def _flatten(module: nn.Module) -> Map:
    assert isinstance(module, nn.Flatten)
    if (module.start_dim, module.end_dim) != (1, -1):
        raise ConfigError("Flatten", (module.start_dim, module.end_dim), "all dimensions but the first")
    return reshaping.FLATTEN


def _dropout(module: nn.Module) -> Map:
    assert isinstance(module, nn.Dropout)
    return reshaping.Dropout(module.p, lambda: module.training)


def _linear(module: nn.Module) -> Linear:
    assert isinstance(module, nn.Linear)
    return Linear(module.bias is not None)


_NAMED: Final = {nn.Tanh: "tanh", nn.ReLU: "relu", nn.Sigmoid: "sigmoid"}


def _named(name: str) -> Callable[[nn.Module], Map | None]:
    return lambda module: activations.ACTIVATIONS[name]


AFFINE |= {nn.Linear: _linear, nn.Conv2d: _conv}
MAPS |= {
    **{kind: _named(name) for kind, name in _NAMED.items()},
    nn.AvgPool2d: _avg_pool,
    nn.Dropout: _dropout,
    nn.Flatten: _flatten,
    nn.GELU: _gelu,
    nn.Identity: lambda module: None,
    nn.LeakyReLU: _leaky_relu,
    nn.MaxPool2d: _max_pool,
}
