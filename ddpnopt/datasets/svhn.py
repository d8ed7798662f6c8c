"""SVHN, cropped digits: 99,289 colour images of 32 × 32 pixels, 10 classes, in two MATLAB files.

In a file, X is (row, column, channel, sample) and y holds 1 to 10, where 10 stands for the digit 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ddpnopt.datasets import mat5
from ddpnopt.errors import DataError

Samples = tuple[NDArray[np.uint8], NDArray[np.int64]]

IMAGE: Final = (32, 32, 3)
CLASSES: Final = 10


def read(folder: Path) -> tuple[Samples, Samples]:
    """Return training and test set, each (N, 3072) bytes, ordered (channel, row, column), and (N,) labels.

    Raises:
        DataError: if a file is missing, damaged or not SVHN's.
    """
    return read_part(folder / "train_32x32.mat"), read_part(folder / "test_32x32.mat")


def read_part(path: Path) -> Samples:
    """Return the (N, 3072) bytes and (N,) labels of one file.

    Raises:
        DataError: if the file is missing, damaged or not SVHN's.
    """
    content = mat5.read(path, ("X", "y"))
    if len(content) != 2:
        raise DataError(f"{path}: got {', '.join(content) or 'neither'}, expected X and y")
    X, y = content["X"], content["y"]
    if X.dtype != np.uint8 or X.ndim != 4 or X.shape[:3] != IMAGE:
        raise DataError(f"{path}: got X of shape {X.shape}, {X.dtype}, expected (32, 32, 3, N), uint8")
    samples = X.shape[3]
    if y.shape != (samples, 1) or y.dtype.kind not in "ui":
        raise DataError(f"{path}: got y of shape {y.shape}, {y.dtype}, expected ({samples}, 1), integers")
    if samples and not (y.min() >= 1 and y.max() <= CLASSES):
        raise DataError(f"{path}: got labels {y.min()} to {y.max()}, expected 1 to {CLASSES}")
    images = X.transpose(3, 2, 0, 1).reshape(samples, -1)
    return images, y[:, 0].astype(np.int64) % CLASSES
