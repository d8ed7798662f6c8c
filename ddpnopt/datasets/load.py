"""Read a dataset by name, split it and scale it, the same way every time.

Sets that come split keep their border, and their order. Of the others a stratified fifth goes to the test
set, and the shuffle is fixed: it does not depend on a run's seed, so that all runs of a sweep are measured
on the same samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from ddpnopt.datasets import cifar10, clusters, digits, fetch, images, mnist, store, svhn, wine
from ddpnopt.datasets.catalog import CATALOG, CLUSTERS, DatasetInfo
from ddpnopt.errors import ConfigError, DataError

TEST_FRACTION: Final = 0.2
SPLIT_SEED: Final = 0

Inputs = NDArray[Any]
"""Scaled inputs: float64, or float32 where bytes were read, which have no more to say."""

Samples = tuple[NDArray[Any], NDArray[np.int64]]
"""Raw (N, features) inputs and (N,) labels."""

Reader = Callable[[], Samples]
FileReader = Callable[[Path], tuple[Samples, Samples]]
Scaler = Callable[[NDArray[Any], NDArray[Any]], Inputs]
"""Takes what to scale and the raw training set, on which alone it may be fitted."""

READERS: Final[Mapping[str, tuple[Reader, Scaler]]] = {
    "digits": (digits.read, digits.scale),
    "wine": (wine.read, wine.scale),
    **{f"clusters{k}": (partial(clusters.read, k), clusters.scale) for k in CLUSTERS},
}
"""Sets that come whole, from a package or drawn here."""

FILE_READERS: Final[Mapping[str, tuple[FileReader, Scaler]]] = {
    "mnist": (mnist.read, images.grey),
    "fashion_mnist": (mnist.read, images.grey),
    "svhn": (svhn.read, images.colour),
    "cifar10": (cifar10.read, images.colour),
}
"""Sets that come split, in files; each is read from its folder in `store.directory()`."""


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """A dataset, split and scaled.

    Attributes:
        train_inputs: (N, features) float32 or float64.
        train_targets: (N,) int64 labels.
        test_inputs: (M, features) of the same type.
        test_targets: (M,) int64 labels.
        checksum: SHA-256 of the four arrays' bytes, in hexadecimal.
        shape: one sample's, whose product is `features`; (features,) if nothing else is said.
    """

    name: str
    train_inputs: Inputs
    train_targets: NDArray[np.int64]
    test_inputs: Inputs
    test_targets: NDArray[np.int64]
    checksum: str
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.shape:
            object.__setattr__(self, "shape", self.train_inputs.shape[1:])


class Loader:
    """Loads datasets by name, and keeps all small ones and the last large one. `load` is this process's."""

    def __init__(self) -> None:
        self._small: dict[str, Dataset] = {}
        self._large: dict[tuple[str, Path], Dataset] = {}

    def __call__(self, name: str) -> Dataset:
        """Return the dataset of that name.

        Raises:
            ConfigError: if there is no such dataset.
            DataError: if the data are missing or not what the catalogue promises.
        """
        if name in READERS:
            if name not in self._small:
                self._small[name] = _load_whole(name)
            return self._small[name]
        if name in FILE_READERS:
            return self._from(name, store.directory())
        raise ConfigError("dataset", name, "one of " + ", ".join(sorted(CATALOG)))

    def _from(self, name: str, directory: Path) -> Dataset:
        key = name, directory
        if key not in self._large:
            # Before the next one is read: two of them need not fit into memory.
            self._large.clear()
            self._large[key] = _load_files(name, directory / name)
        return self._large[key]

    def cache_clear(self) -> None:
        """Forget what was loaded."""
        self._small.clear()
        self._large.clear()


load: Final = Loader()


def _load_whole(name: str) -> Dataset:
    read, scale = READERS[name]
    info = CATALOG[name]
    inputs, targets = read()
    _check(info, name, info.train_size + info.test_size, (inputs, targets))
    train_x, test_x, train_y, test_y = train_test_split(
        inputs, targets, test_size=TEST_FRACTION, random_state=SPLIT_SEED, stratify=targets
    )
    return _scaled(info, (train_x, train_y), (test_x, test_y), scale)


def _load_files(name: str, folder: Path) -> Dataset:
    fetch.ensure(name, folder)
    read, scale = FILE_READERS[name]
    info = CATALOG[name]
    train, test = read(folder)
    _check(info, f"{name}: training set in {folder}", info.train_size, train)
    _check(info, f"{name}: test set in {folder}", info.test_size, test)
    try:
        return _scaled(info, train, test, scale)
    except DataError as error:
        raise DataError(f"{name}: training set in {folder}: {error}") from error


def _scaled(info: DatasetInfo, train: Samples, test: Samples, scale: Scaler) -> Dataset:
    # The scaler is fitted on the training set alone.
    train_x, test_x = (np.ascontiguousarray(scale(x, train[0])) for x in (train[0], test[0]))
    train_y, test_y = train[1], test[1]
    digest = hashlib.sha256()
    for array in (train_x, train_y, test_x, test_y):
        digest.update(array.data)
    return Dataset(info.name, train_x, train_y, test_x, test_y, digest.hexdigest(), info.shape)


def _check(info: DatasetInfo, what: str, samples: int, read: Samples) -> None:
    """Compare what a reader returned with the catalogue, before anything is made of it."""
    inputs, targets = read
    if inputs.shape != (samples, info.features) or targets.shape != (samples,):
        raise DataError(
            f"{what}: got inputs {inputs.shape} and labels {targets.shape}, "
            f"expected ({samples}, {info.features}) and ({samples},)"
        )
    if not np.array_equal(np.unique(targets), np.arange(info.classes)):
        raise DataError(f"{what}: got labels {np.unique(targets)}, expected 0 to {info.classes - 1}")
    if not np.isfinite(inputs).all():
        raise DataError(f"{what}: got inputs that are not finite")
