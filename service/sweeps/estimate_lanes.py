"""What a run takes in lanes, in bytes and in seconds, from the sizes of its layers alone.

Beside `estimate`, which speaks of the tensor path. A block's workspace is laid out by `kernel.c`, its state
is what `ddpnopt/lanes/blocks.py` holds; `tests/service/test_estimate_lanes.py` holds both to what they are.

Sizes of a layer, per sample: o outputs, i inputs with the constant one, n = i - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from service.sweeps.estimate import Layer, Method

FLOPS_PER_SECOND: Final = 3.2e10
"""Of one CPU core inside the kernel, in blocks that are full."""
CONTROL_SECONDS: Final = 7e-10
"""For an entry of u to go through RMSprop's or Adam's moments."""
METRIC_SAMPLES: Final = 8
"""Samples that metrics are taken on at once: `SAMPLES` of kernel.c."""
VECTOR_BYTES: Final = 64


def state(net: Sequence[Layer], method: Method) -> int:
    """Count the numbers that a run holds at the most: u and its moments, while they are laid out anew.

    Twice each in lanes, once each as they come, and the last of them twice more on its way.
    """
    return (3 * (1 + _moments(method)) + 2) * _controls(net)


def workspace(net: Sequence[Layer], batch: int, method: Method, number_bytes: int) -> int:
    """Return the bytes that a thread needs for the block that it works on, whatever the pack's size."""
    widths = [layer.i - 1 for layer in net] + [net[-1].o]
    value = max(widths[1:])
    vectors = batch * sum(widths) + sum(_of_layer(layer, batch, method, t) for t, layer in enumerate(net))
    vectors += batch * (6 * value + (max(widths) + value) + 2 * value)
    if method.full:
        vectors += (batch + 2) * value**2
        vectors += value**2 + value * (value + 1) if method.psd else 0
    vectors += 2 * max(layer.controls for layer in net)
    lanes = VECTOR_BYTES // number_bytes
    vectors += -(-batch * lanes * 8 // VECTOR_BYTES)  # labels
    return max(vectors, 2 * METRIC_SAMPLES * max(widths)) * VECTOR_BYTES


def seconds(net: Sequence[Layer], batch: int, method: Method) -> float:
    """Estimate a step's time on one CPU core, in blocks that are full."""
    macs = sum(_macs(layer, method, first=t == 0, last=t == len(net) - 1) for t, layer in enumerate(net))
    moments = 0.0 if method.preconditioner == "identity" else CONTROL_SECONDS * _controls(net)
    return 2.0 * batch * macs / FLOPS_PER_SECOND + moments


def metrics_seconds(net: Sequence[Layer], samples: int) -> float:
    """Estimate the time for one point of a run's curves, over this many samples."""
    return 2.0 * samples * _controls(net) / FLOPS_PER_SECOND


def _controls(net: Sequence[Layer]) -> int:
    return sum(layer.controls for layer in net)


def _moments(method: Method) -> int:
    """Count the tensors of the controls' size that are remembered between steps."""
    return {"identity": 0, "rmsprop": 1, "adam": 2}[method.preconditioner] + bool(method.options.momentum)


def _of_layer(layer: Layer, batch: int, method: Method, t: int) -> int:
    """Count the vectors that a layer has of its own: slopes, V_h, the policy's factors, the diagonal M⁻¹."""
    o, n = layer.o, layer.i - 1
    vectors = 2 * batch * o
    if method.outer_product:
        vectors += batch * (o + 1)
    if method.full and t > 0:
        vectors += batch * o * n
    if method.preconditioner != "identity":
        vectors += layer.controls
    return vectors


def _macs(layer: Layer, method: Method, *, first: bool, last: bool) -> int:
    """Count the multiplications with additions of one sample's step."""
    o, n = layer.o, layer.i - 1
    product = o * n
    macs = 2 * product  # forward and gradient
    if not first:
        macs += product  # pull-back
    diagonal = method.preconditioner != "identity"
    if method.feedback is None:
        return macs
    macs += (0 if last else product) + diagonal * product
    if first:
        return macs
    macs += product + diagonal * product  # W δx or A δx; the contraction
    if method.outer_product:
        return macs + product
    macs += o * o * n + o * n * n // 2
    return macs + (o**3 // 3 + o * o * n if method.psd else 0)
