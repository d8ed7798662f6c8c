"""Where randomness comes from: a run's seed and nothing else.

Never the pack, the attempt or the worker. Drawn by NumPy's PCG64 on the host, so that a CPU and a GPU
start from the same weights and see the same batches, and so that both runs of a pair do.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from ddpnopt.config import LayerShape


class Stream(IntEnum):
    """Independent streams of one seed; the numbers are part of the numerics version."""

    WEIGHTS = 0
    BATCHES = 1


def generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """Return the generator of a seed's stream, at a place in it that `key` names."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(int(stream), *key))))


def initial_controls(seed: int, layers: Sequence[LayerShape]) -> list[NDArray[np.float64]]:
    """Draw u_t = [W_t, b_t] by torch's default law for Linear and Conv2d, uniform on ±1/sqrt(inputs).

    Args:
        seed: the run's.
        layers: t = 0..T-1.

    Returns:
        u_t of t = 0..T-1, each (outputs, inputs + 1) float64.
    """
    rng = generator(seed, Stream.WEIGHTS)
    return [
        rng.uniform(-1.0, 1.0, size=(layer.outputs, layer.inputs + 1)) / np.sqrt(layer.inputs)
        for layer in layers
    ]


def epoch_batches(seed: int, epoch: int, samples: int, batch_size: int) -> NDArray[np.int64]:
    """Draw one epoch's batches without replacement; an incomplete last batch is dropped.

    Returns:
        (samples // batch_size, batch_size) int64 indices into the training set.
    """
    order = generator(seed, Stream.BATCHES, epoch).permutation(samples)
    batches = samples // batch_size
    return order[: batches * batch_size].reshape(batches, batch_size)
