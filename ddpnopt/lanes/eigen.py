"""Eigenvectors of many small symmetric matrices, a matrix in every lane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from ddpnopt.lanes.blocks import from_lanes, to_lanes
from ddpnopt.lanes.library import Library

LARGEST: Final = {torch.float32: 32, torch.float64: 12}
"""Side up to which Jacobi's method over lanes is faster than LAPACK, one matrix after another."""


def solver(library: Library) -> Callable[[Tensor], tuple[Tensor, Tensor] | None]:
    """Return a solver for symmetric, finite matrices (N, n, n) of the library's kind of numbers.

    It returns eigenvalues (N, n) and eigenvectors as columns (N, n, n), in no order, by bits that do not
    depend on N; or None where the matrices are not for it.
    """

    def solve(symmetric: Tensor) -> tuple[Tensor, Tensor] | None:
        count, n, _ = symmetric.shape
        if n > LARGEST[symmetric.dtype]:
            return None
        row = n | 1  # odd: see kernel.c
        matrices = to_lanes(pad(symmetric, (0, row - n)).flatten(1), library.lanes)
        vectors = torch.empty_like(matrices)
        values = matrices.new_empty(len(matrices), n, library.lanes)
        for a, v, w in zip(matrices, vectors, values, strict=True):
            library.functions.eigh(n, row, a.data_ptr(), v.data_ptr(), w.data_ptr())
        rows = from_lanes(vectors, count).unflatten(1, (n, row))
        return from_lanes(values, count), rows[:, :, :n].mT

    return solve
