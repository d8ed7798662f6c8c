"""From the state space of a layer back to image space, by deconvolution (Zeiler & Fergus, 2014).

Index legend: t layer, b sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ddpnopt.errors import ConfigError
from ddpnopt.layers.activations import ACTIVATIONS, Activation
from ddpnopt.layers.base import Map, Tape
from ddpnopt.layers.modules import convert
from ddpnopt.layers.network import Controls, Network, Trajectory, rollout

if TYPE_CHECKING:
    from ddpnopt.torch_optimizer import LayerOptimizer


@dataclass(frozen=True, slots=True)
class Path:
    """The way of a batch through a net, with all that it takes to go it backwards.

    Attributes:
        network: the layers.
        controls: u_t, each (1, o, ī).
        before: tapes of the maps ahead of the first layer.
        trajectory: from the first layer on.
    """

    network: Network
    controls: Controls
    before: tuple[Tape, ...]
    trajectory: Trajectory

    def deconvolve(self, v: Tensor, layer: int) -> Tensor:
        """See `deconvolve`."""
        t = layer_index(layer, len(self.controls))
        stages = self.network.stages
        shape = stages[t].affine.shape(self.trajectory.inputs[t])
        batch = self.trajectory.output.shape[1]
        if v.shape != (batch, *shape):
            raise ConfigError("v", tuple(v.shape), f"{(batch, *shape)}, the states before layer {t}")
        rows = v.unsqueeze(0)
        for s in range(t - 1, -1, -1):
            rows = _back(stages[s].sigma, self.trajectory.tapes[s], rows)
            pulled = stages[s].affine.pull_back(
                rows.unsqueeze(2), self.trajectory.inputs[s], self.controls[s]
            )
            rows = pulled.squeeze(2)
        return _back(self.network.before, self.before, rows).squeeze(0)


def deconvolve(model: nn.Sequential | LayerOptimizer, inputs: Tensor, v: Tensor, layer: int) -> Tensor:
    """Project vectors from the state space of a layer back to image space (Zeiler & Fergus, 2014).

    The net is gone through backwards. An affine layer is transposed; a max pool puts each entry back to where
    its maximum was in the forward pass on `inputs` (its switches; entries of windows that overlap add up); a
    ReLU is a ReLU on the way back too, on the signal itself and not on where it was positive in the forward
    pass. Zeiler & Fergus have no rule for other activations: their signal goes through as it is. What else
    there is (mean pools, dropout, changes of shape, generic layers) is transposed at its nominal point.

    With a ReLU in the net, the negative entries of v end at the first one on the way: v and -v give different
    images.

    Args:
        model: the net, or an optimizer over one.
        inputs: (B, *shape of a sample).
        v: (B, *shape of the state that enters the layer).
        layer: t; 0 is the image itself.

    Returns:
        (B, *shape of a sample).

    Raises:
        ConfigError: if there is no such layer, or v does not belong to it.
    """
    if isinstance(model, nn.Sequential):
        converted = convert(model)
        network, slots = converted.network, converted.slots
    else:
        network, slots = model.network, model.slots
    with outside_training(inputs.device):
        return roll_out(network, [slot.read() for slot in slots], inputs).deconvolve(v, layer)


def roll_out(network: Network, controls: Controls, inputs: Tensor) -> Path:
    """Send a batch (B, *shape of a sample) through a net."""
    # Not the tensor itself: it may be an inference tensor, or one that the caller writes into.
    x, tapes = inputs.detach().clone().unsqueeze(0), []
    for layer in network.before:
        y, kept = layer.forward(x)
        tapes.append(Tape(kept, tuple(x.shape[2:]), tuple(y.shape[2:])))
        x = y
    return Path(network, controls, tuple(tapes), rollout(Network((), network.stages), controls, x))


def _back(maps: Sequence[Map], tapes: Sequence[Tape], v: Tensor) -> Tensor:
    """Go backwards through maps, (1, B, *after) to (1, B, *before)."""
    for layer, tape in zip(reversed(maps), reversed(tapes), strict=True):
        if not isinstance(layer, Activation):
            v = layer.jacobian(tape).pull_back(v.unsqueeze(2)).squeeze(2)
        elif layer is ACTIVATIONS["relu"]:
            v = v.clamp_min(0)
    return v


@contextmanager
def outside_training(device: torch.device) -> Iterator[None]:
    """Record no graph, make tensors that may be used anywhere, and give back the random numbers drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices):
        yield


def layer_index(layer: int, count: int) -> int:
    """Return t of a layer's number; negative ones count from the last.

    Raises:
        ConfigError: if there is no such layer.
    """
    if not -count <= layer < count:
        raise ConfigError("layer", layer, f"{-count} to {count - 1}")
    return layer % count
