"""Read a dataset by name, split it and scale it, the same way every time.

The split is stratified, a fifth goes to the test set, and the shuffle is fixed: it does not depend on
a run's seed, so that all runs of a sweep are measured on the same samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from ddpnopt.datasets import digits, wine
from ddpnopt.datasets.catalog import CATALOG, DatasetInfo
from ddpnopt.errors import ConfigError, DataError

TEST_FRACTION: Final = 0.2
SPLIT_SEED: Final = 0

Reader = Callable[[], tuple[NDArray[np.float64], NDArray[np.int64]]]
Scaler = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]

READERS: Final[Mapping[str, tuple[Reader, Scaler]]] = {
    "digits": (digits.read, digits.scale),
    "wine": (wine.read, wine.scale),
}


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """A dataset, split and scaled.

    Attributes:
        train_inputs: (N, features) float64.
        train_targets: (N,) int64 labels.
        test_inputs: (M, features) float64.
        test_targets: (M,) int64 labels.
        checksum: SHA-256 of the four arrays' bytes, in hexadecimal.
    """

    name: str
    train_inputs: NDArray[np.float64]
    train_targets: NDArray[np.int64]
    test_inputs: NDArray[np.float64]
    test_targets: NDArray[np.int64]
    checksum: str


@lru_cache(maxsize=8)
def load(name: str) -> Dataset:
    """Return the dataset of that name.

    Raises:
        ConfigError: if there is no such dataset.
        DataError: if the data are not what the catalogue promises.
    """
    if name not in READERS:
        raise ConfigError("dataset", name, "one of " + ", ".join(sorted(READERS)))
    read, scale = READERS[name]
    inputs, targets = read()
    _check(CATALOG[name], inputs, targets)
    train_x, test_x, train_y, test_y = train_test_split(
        inputs, targets, test_size=TEST_FRACTION, random_state=SPLIT_SEED, stratify=targets
    )
    # The scaler is fitted on the training set alone.
    train_x, test_x = (np.ascontiguousarray(scale(x, train_x)) for x in (train_x, test_x))
    digest = hashlib.sha256()
    for array in (train_x, train_y, test_x, test_y):
        digest.update(array.tobytes())
    return Dataset(name, train_x, train_y, test_x, test_y, checksum=digest.hexdigest())


def _check(info: DatasetInfo, inputs: NDArray[np.float64], targets: NDArray[np.int64]) -> None:
    """Compare what a reader returned with the catalogue, before anything is made of it."""
    samples = info.train_size + info.test_size
    if inputs.shape != (samples, info.features) or targets.shape != (samples,):
        raise DataError(
            f"{info.name}: got inputs {inputs.shape} and labels {targets.shape}, "
            f"expected ({samples}, {info.features}) and ({samples},)"
        )
    if not np.array_equal(np.unique(targets), np.arange(info.classes)):
        raise DataError(f"{info.name}: got labels {np.unique(targets)}, expected 0 to {info.classes - 1}")
    if not np.isfinite(inputs).all():
        raise DataError(f"{info.name}: got inputs that are not finite")
