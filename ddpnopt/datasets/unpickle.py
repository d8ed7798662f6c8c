"""Read pickles that hold plain containers and arrays of bytes, and run nothing that they ask for.

A pickle is a program, and may call whatever its unpickler hands out. This one hands out stand-ins for the
four names that an array needs and refuses all others. Not numpy's own: a damaged pickle can make those
crash the process.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddpnopt.errors import DataError


class PickledType:
    """Stands in for numpy's dtype: remembers what it was called with."""

    def __init__(self, *arguments: object) -> None:
        self.code = arguments[0] if arguments else None

    def __setstate__(self, state: object) -> None:
        """Drop the byte order, which single bytes do not have."""


class PickledArray:
    """Stands in for numpy's ndarray: remembers what it was filled with."""

    def __init__(self, *arguments: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def unpacked(self) -> NDArray[np.uint8]:
        """Return the array.

        Raises:
            ValueError: if the pickle did not fill it, or not with bytes of its own shape.
        """
        match self.state:
            case (
                _,
                tuple(shape),
                PickledType(code=b"u1" | "u1"),
                bool() | int() as columns_first,
                bytes(raw),
            ):
                if all(isinstance(n, int) and n >= 0 for n in shape) and math.prod(shape) == len(raw):
                    flat = np.frombuffer(raw, dtype=np.uint8)
                    return flat.reshape(shape, order="F" if columns_first else "C")
                raise ValueError(f"an array holds {len(raw)} bytes, and its shape says otherwise")
        raise ValueError("an array is not made of bytes")


def _reconstruct(*arguments: object) -> PickledArray:
    """Stand in for the function that makes an array for the rest of its pickle to fill."""
    return PickledArray()


ALLOWED: Final[Mapping[tuple[str, str], Any]] = MappingProxyType(
    {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        # The same since numpy 2.
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): PickledArray,
        ("numpy", "dtype"): PickledType,
    }
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return what a pickle may call."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs: refused")
        return ALLOWED[module, name]


def unpickle(content: bytes, what: str) -> object:
    """Return what a pickle holds; arrays as `PickledArray`, strings of Python 2 as bytes.

    Args:
        content: the pickle.
        what: where it comes from, for messages.

    Raises:
        DataError: if it is damaged or asks for more.
    """
    try:
        return _Unpickler(io.BytesIO(content), encoding="bytes").load()
    # Damaged pickles raise, in the words of Python's documentation, other exceptions as well.
    except Exception as error:
        raise DataError(f"{what}: cannot be unpickled: {str(error) or type(error).__name__}") from error
