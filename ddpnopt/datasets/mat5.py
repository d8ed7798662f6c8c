"""Read arrays of numbers from MATLAB 5 files, the format that MATLAB itself calls version 5 to 7.

scipy.io.loadmat reads far more, but a damaged file can make it crash the whole process, which no caller can
turn into a message. Here every size is compared with what there is before a byte is used.

A file is a header of 128 bytes and then elements, each a tag (type, size) and its data; a variable is a
MATRIX element that holds further elements: flags, dimensions, name, numbers. Any element may be compressed.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddpnopt.errors import DataError

HEADER: Final = 128
LITTLE_ENDIAN_5: Final = b"\x00\x01IM"
MATRIX: Final = 14
COMPRESSED: Final = 15
NUMERIC_CLASSES: Final = range(6, 16)
"""MATLAB's double, single and eight kinds of integers; below lie cells, structures, text and sparse ones."""

STORED_AS: Final[Mapping[int, str]] = MappingProxyType(
    {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
)

Element = tuple[int, memoryview]
"""Type and data."""


def read(path: Path, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """Return those of the named variables that a file holds, in the type in which they are stored.

    Raises:
        DataError: if the file is missing or damaged, or one of these is not an array of real numbers.
    """
    try:
        content = path.read_bytes()
        if content[HEADER - 4 : HEADER] != LITTLE_ENDIAN_5:
            raise ValueError("it does not begin as one")
        found = (_variable(data, names) for kind, data in _unpacked(content) if kind == MATRIX)
        return dict(variable for variable in found if variable is not None)
    except (OSError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as a MATLAB 5 file: {error}") from error


def _unpacked(content: bytes) -> Iterator[Element]:
    for kind, data in _elements(memoryview(content)[HEADER:]):
        if kind == COMPRESSED:
            yield from _elements(memoryview(zlib.decompress(data)))
        else:
            yield kind, data


def _elements(data: memoryview) -> Iterator[Element]:
    """Split into elements; at the end of a damaged file, raise ValueError."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from("<II", data, at)
        start, step = at + 8, 8 + size + -size % 8
        if kind >> 16:
            # Up to four bytes stand in the tag itself, where the size otherwise is.
            kind, size, start, step = kind & 0xFFFF, kind >> 16, at + 4, 8
        elif kind == COMPRESSED:
            # The only kind that is not padded to a multiple of eight bytes.
            step = 8 + size
        if start + size > min(len(data), at + step):
            raise ValueError(f"an element claims {size} bytes, more than are left")
        yield kind, data[start : start + size]
        at += step


def _variable(matrix: memoryview, names: Collection[str]) -> tuple[str, NDArray[Any]] | None:
    """Return a variable's name and array, or None if its name is none of these."""
    parts = list(_elements(matrix))
    if len(parts) < 4:
        return None
    (_, flags), (_, dimensions), (_, letters), (stored_as, data), *imaginary = parts
    name = bytes(letters).decode("latin-1")
    if name not in names:
        return None
    kind = flags[0] if len(flags) else 0
    if kind not in NUMERIC_CLASSES or stored_as not in STORED_AS or imaginary:
        raise ValueError(f"{name} is not an array of real numbers")
    shape = struct.unpack(f"<{len(dimensions) // 4}i", dimensions)
    numbers = np.frombuffer(data, dtype=STORED_AS[stored_as])
    if min(shape, default=-1) < 0 or math.prod(shape) != len(numbers):
        raise ValueError(f"{name} holds {len(numbers)} numbers, expected {shape}")
    return name, numbers.reshape(shape, order="F")
