"""MNIST and Fashion-MNIST: 70,000 grey images of 28 × 28 pixels, 10 classes, in four IDX files.

IDX: two zero bytes, a type (8: unsigned bytes), the number of dimensions, each dimension as four bytes with
the highest first, then the numbers.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ddpnopt.datasets import store
from ddpnopt.errors import DataError

Samples = tuple[NDArray[np.uint8], NDArray[np.int64]]

CLASSES: Final = 10
UNSIGNED_BYTES: Final = 8


def read(folder: Path) -> tuple[Samples, Samples]:
    """Return training and test set, each (N, pixels) bytes and (N,) labels.

    Raises:
        DataError: if a file is missing, damaged or does not fit the others.
    """
    return _read_part(folder, "train"), _read_part(folder, "t10k")


def _read_part(folder: Path, part: str) -> Samples:
    images_path = _locate(folder, f"{part}-images-idx3-ubyte")
    labels_path = _locate(folder, f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path}: got {len(labels)} labels, expected {len(images)}: {images_path.name}'s"
        )
    if labels.size and labels.max() >= CLASSES:
        raise DataError(f"{labels_path}: got label {labels.max()}, expected 0 to {CLASSES - 1}")
    return images.reshape(len(images), math.prod(images.shape[1:])), labels.astype(np.int64)


def _locate(folder: Path, name: str) -> Path:
    path = store.first_of(folder, name, f"{name}.gz")
    if path is None:
        raise DataError(f"{folder / name}: found neither it nor {name}.gz")
    return path


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Return the array of unsigned bytes in an IDX file, plain or, if it is named so, gzipped.

    Raises:
        DataError: if the file cannot be read or is no such array.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    magic = bytes((0, 0, UNSIGNED_BYTES, dimensions))
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != magic:
        got = f"{len(content)} bytes that begin with {content[:4].hex() or 'nothing'}"
        raise DataError(
            f"{path}: got {got}, expected IDX of {dimensions} dimensions: {magic.hex()} and sizes"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape):
        got = f"{len(content) - start} bytes after the header"
        raise DataError(f"{path}: got {got}, expected {math.prod(shape)}: its header says {shape}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
