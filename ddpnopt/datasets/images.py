"""Standardise images of bytes, channel by channel, by the training set.

A pixel has 256 possible values, so the mean and the variance come exactly, in integers, from how often each
occurs, and every scaled pixel is read from a table. The result depends neither on the order of a sum nor on
the machine.

Index legend: n image, c channel, p pixel within a channel; a flattened image is ordered (c, p).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ddpnopt.errors import DataError

LEVELS: Final = 256
CHUNK: Final = 2048
"""Images at a time: numpy widens indices to eight bytes, which for a whole dataset would take gigabytes."""


def grey(inputs: NDArray[np.uint8], train: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Standardise (N, pixels) images of one channel."""
    return standardise(inputs, train, channels=1)


def colour(inputs: NDArray[np.uint8], train: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Standardise (N, 3 * pixels) images of three channels."""
    return standardise(inputs, train, channels=3)


def standardise(inputs: NDArray[np.uint8], train: NDArray[np.uint8], channels: int) -> NDArray[np.float32]:
    """Divide by 255, subtract each channel's training mean, divide by its training standard deviation.

    Args:
        inputs: (N, channels * pixels) bytes.
        train: (M, channels * pixels) bytes of the training set, which may be `inputs`.
        channels: how many channels the second dimension holds, one after the other.

    Returns:
        (N, channels * pixels).

    Raises:
        DataError: if a channel of the training set holds one value only.
    """
    mean, std = statistics(train, channels)
    steps = np.arange(LEVELS) / 255.0
    table = ((steps - mean[:, None]) / std[:, None]).astype(np.float32)
    scaled = np.empty(inputs.shape, dtype=np.float32)
    for channel, block in _blocks(inputs.shape, channels):
        scaled[block] = table[channel][inputs[block]]
    return scaled


def statistics(train: NDArray[np.uint8], channels: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each channel's mean and standard deviation, (channels,), with bytes taken as 0 to 1.

    Raises:
        DataError: if a channel holds one value only.
    """
    counts = np.zeros((channels, LEVELS), dtype=np.int64)
    for channel, block in _blocks(train.shape, channels):
        counts[channel] += np.bincount(train[block].ravel(), minlength=LEVELS)
    moments = [_moments(channel, count.tolist()) for channel, count in enumerate(counts)]
    mean, std = np.array(moments).T / 255.0
    return mean, std


def _moments(channel: int, counts: list[int]) -> tuple[float, float]:
    """Return the mean and the standard deviation of byte values that occur `counts` times."""
    total = sum(counts)
    first = sum(n * value for value, n in enumerate(counts))
    second = sum(n * value * value for value, n in enumerate(counts))
    # total² times the variance: Python's integers neither round nor overflow.
    spread = total * second - first * first
    if spread == 0:
        raise DataError(f"the training images hold one value only in channel {channel}; expected several")
    return first / total, math.sqrt(spread / (total * total))


def _blocks(shape: tuple[int, ...], channels: int) -> Iterator[tuple[int, tuple[slice, slice]]]:
    """Cut (N, channels * pixels) into pieces of one channel and a limited number of images."""
    samples, features = shape
    pixels = features // channels
    for start in range(0, samples, CHUNK):
        for channel in range(channels):
            columns = slice(channel * pixels, (channel + 1) * pixels)
            yield channel, (slice(start, start + CHUNK), columns)
