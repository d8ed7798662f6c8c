"""DIGITS: 1797 images of 8 × 8 pixels, 10 classes; pixels 0..16 are scaled to 0..1."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits


def read() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return (1797, 64) raw pixels and (1797,) labels."""
    inputs, targets = load_digits(return_X_y=True)
    return inputs.astype(np.float64), targets.astype(np.int64)


def scale(inputs: NDArray[np.float64], train: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide by the largest pixel value, a constant of the format."""
    del train
    return inputs / 16.0
