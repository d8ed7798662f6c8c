"""Where randomness comes from: a run's seed and nothing else.

Never the pack, the attempt or the worker. Drawn by NumPy's PCG64 on the host, so that a CPU and a GPU
start from the same weights and see the same batches, and so that both runs of a pair do.
"""

from __future__ import annotations

from enum import IntEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


class Stream(IntEnum):
    """Independent streams of one seed; the numbers are part of the numerics version."""

    WEIGHTS = 0
    BATCHES = 1


def generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """Return the generator of a seed's stream, at a place in it that `key` names."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(int(stream), *key))))


def initial_controls(seed: int, widths: tuple[int, ...]) -> list[NDArray[np.float64]]:
    """Draw u_t = [W_t, b_t] by torch's default law for Linear, uniform on ±1/sqrt(n_t).

    Args:
        seed: the run's.
        widths: n_0..n_T.

    Returns:
        u_t of t = 0..T-1, each (n_{t+1}, n_t + 1) float64.
    """
    rng = generator(seed, Stream.WEIGHTS)
    return [
        rng.uniform(-1.0, 1.0, size=(outputs, inputs + 1)) / np.sqrt(inputs)
        for inputs, outputs in pairwise(widths)
    ]


def epoch_batches(seed: int, epoch: int, samples: int, batch_size: int) -> NDArray[np.int64]:
    """Draw one epoch's batches without replacement; an incomplete last batch is dropped.

    Returns:
        (samples // batch_size, batch_size) int64 indices into the training set.
    """
    order = generator(seed, Stream.BATCHES, epoch).permutation(samples)
    batches = samples // batch_size
    return order[: batches * batch_size].reshape(batches, batch_size)
