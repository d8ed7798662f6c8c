"""WINE: 178 samples of 13 chemical measurements, 3 classes; standardised by the training set."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_wine


def read() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return (178, 13) raw measurements and (178,) labels."""
    inputs, targets = load_wine(return_X_y=True)
    return inputs.astype(np.float64), targets.astype(np.int64)


def scale(inputs: NDArray[np.float64], train: NDArray[np.float64]) -> NDArray[np.float64]:
    """Subtract the training mean and divide by the training standard deviation, per measurement."""
    scaled: NDArray[np.float64] = (inputs - train.mean(axis=0)) / train.std(axis=0)
    return scaled
