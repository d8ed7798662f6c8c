"""CIFAR-10: 60,000 colour images of 32 × 32 pixels, 10 classes, in six pickles, in an archive or unpacked."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ddpnopt.datasets.unpickle import PickledArray, unpickle
from ddpnopt.errors import DataError

Samples = tuple[NDArray[np.uint8], NDArray[np.int64]]

ARCHIVE: Final = "cifar-10-python.tar.gz"
UNPACKED: Final = "cifar-10-batches-py"
TRAIN: Final = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST: Final = "test_batch"
FEATURES: Final = 3 * 32 * 32
CLASSES: Final = 10


def read(folder: Path) -> tuple[Samples, Samples]:
    """Return training and test set, each (N, 3072) bytes, ordered (channel, row, column), and (N,) labels.

    Raises:
        DataError: if a file is missing, damaged or not CIFAR-10's.
    """
    unpacked = folder / UNPACKED
    where = unpacked if unpacked.is_dir() else folder / ARCHIVE
    batches = dict(_from_folder(unpacked) if unpacked.is_dir() else _from_archive(where))
    absent = [name for name in (*TRAIN, TEST) if name not in batches]
    if absent:
        raise DataError(f"{where}: found no {', '.join(absent)}; expected {UNPACKED}/ with six batches")
    train = [batches[name] for name in TRAIN]
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return (images, labels), batches[TEST]


def _from_folder(folder: Path) -> Iterator[tuple[str, Samples]]:
    for name in (*TRAIN, TEST):
        path = folder / name
        if path.exists():
            try:
                content = path.read_bytes()
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error}") from error
            yield name, parse(content, str(path))


def _from_archive(path: Path) -> Iterator[tuple[str, Samples]]:
    """Read the batches in the order in which they lie: going back would unpack the archive again."""
    wanted = {f"{UNPACKED}/{name}": name for name in (*TRAIN, TEST)}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() and member.name in wanted else None
                if file is not None:
                    yield wanted[member.name], parse(file.read(), f"{path}: {member.name}")
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as a gzipped tar archive: {error}") from error


def parse(content: bytes, what: str) -> Samples:
    """Return the (N, 3072) bytes and (N,) labels of one batch.

    Args:
        content: a pickled dictionary with `data` and `labels`.
        what: where it comes from, for messages.

    Raises:
        DataError: if it is not such a dictionary, or a pickle of anything more than arrays.
    """
    batch = unpickle(content, what)
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= set(batch):
        raise DataError(f"{what}: got {type(batch).__name__} without data and labels, expected both")
    images, labels = _images(batch[b"data"], what), _labels(batch[b"labels"], what)
    if len(images) != len(labels):
        raise DataError(f"{what}: got {len(images)} images and {len(labels)} labels, expected as many")
    return images, labels


def _images(data: object, what: str) -> NDArray[np.uint8]:
    if not isinstance(data, PickledArray):
        raise DataError(f"{what}: got data in a {type(data).__name__}, expected an array")
    try:
        images = data.unpacked()
    except ValueError as error:
        raise DataError(f"{what}: {error}") from error
    if images.shape[1:] != (FEATURES,):
        raise DataError(f"{what}: got data of shape {images.shape}, expected (N, {FEATURES})")
    return images


def _labels(labels: object, what: str) -> NDArray[np.int64]:
    if not isinstance(labels, list):
        raise DataError(f"{what}: got labels in a {type(labels).__name__}, expected a list")
    for label in labels:
        if not isinstance(label, int) or not 0 <= label < CLASSES:
            # What a damaged file holds may be too large to print.
            got = f"label {label}" if label in range(-256, 256) else f"a label of type {type(label).__name__}"
            raise DataError(f"{what}: got {got}, expected 0 to {CLASSES - 1}")
    return np.array(labels, dtype=np.int64)
