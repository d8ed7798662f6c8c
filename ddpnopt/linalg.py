"""Batched linear algebra that never raises for one bad member of a batch.

Index legend: r run in the pack, b sample, k row, o and p outputs of a layer, i inputs, ī inputs and the
constant one, n block of a layer's controls (a run, or a run and a group of its convolution).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ddpnopt.config import DType

DTYPES: Final[Mapping[DType, torch.dtype]] = {"float32": torch.float32, "float64": torch.float64}
"""A run's kind of numbers as torch's."""


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices pair by pair, (N, m, k) by (N, k, n), by bits that do not depend on N.

    torch.bmm gives a lone product with one row, one column or one term to another kernel, which rounds
    otherwise than the kernel for many: a run alone would then differ from the same run in a pack.
    """
    if _lone_vector(left, right):
        return torch.bmm(left.expand(2, -1, -1), right.expand(2, -1, -1))[:1]
    return torch.bmm(left, right)


def baddbmm(bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add a product to a bias, (N, 1, n) + (N, m, k) by (N, k, n), by bits that do not depend on N."""
    if _lone_vector(left, right):
        left, right, bias = (x.expand(2, -1, -1) for x in (left, right, bias))
        return torch.baddbmm(bias, left, right)[:1]
    return torch.baddbmm(bias, left, right)


def _lone_vector(left: Tensor, right: Tensor) -> bool:
    count, rows, inner = left.shape
    return count == 1 and (rows == 1 or inner == 1 or right.shape[2] == 1)


def per_sample_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiply two stacks of small matrices, sample by sample.

    Args:
        left: (R, B, o, p).
        right: (R, B, p, i).

    Returns:
        (R, B, o, i).
    """
    runs, batch = left.shape[:2]
    product = bmm(left.flatten(0, 1), right.flatten(0, 1))
    return product.reshape(runs, batch, *product.shape[1:])


def per_sample_matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Multiply each sample's matrix by its vector: (R, B, o, i) by (R, B, i) gives (R, B, o)."""
    return per_sample_matmul(matrix, vector.unsqueeze(-1)).squeeze(-1)


def rows_matmul(rows: Tensor, matrix: Tensor) -> Tensor:
    """Multiply every row of every sample by its run's matrix: (R, B, K, p) by (R, p, q) to (R, B, K, q).

    The result lies in memory as `rows` do: K rows for each sample, or B samples for each row.
    """
    runs, batch, count, _ = rows.shape
    _, of_sample, of_row, _ = rows.stride()
    if of_sample < of_row:
        product = bmm(rows.transpose(1, 2).flatten(1, 2), matrix)
        return product.view(runs, count, batch, -1).transpose(1, 2)
    return bmm(rows.flatten(1, 2), matrix).view(runs, batch, count, -1)


def solve(system: Tensor, right: Tensor) -> Tensor:
    """Solve A X = Y for every run and sample.

    A singular or non-finite member yields non-finite numbers of its own and leaves the others alone.

    Args:
        system: A, (R, B, o, o).
        right: Y, broadcastable to (R, B, o, i).

    Returns:
        X, (R, B, o, i).
    """
    solution: Tensor = torch.linalg.solve_ex(system, right.expand(*system.shape[:-1], right.shape[-1]))[0]
    return solution


def eye_like(matrix: Tensor) -> Tensor:
    """Return the identity (n, n) of the kind of matrices (…, n, n)."""
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


Eigensolver = Callable[[Tensor], tuple[Tensor, Tensor] | None]
"""Takes symmetric, finite matrices (N, n, n); returns eigenvalues (N, n) and eigenvectors as columns
(N, n, n), in any order, or None where others should solve them."""

_eigensolver: ContextVar[Eigensolver | None] = ContextVar("eigensolver", default=None)


@contextmanager
def eigensolver(solver: Eigensolver | None) -> Iterator[None]:
    """Let a faster solver than LAPACK find the eigenvectors of symmetric matrices."""
    token = _eigensolver.set(solver)
    try:
        yield
    finally:
        _eigensolver.reset(token)


def eigenvectors(symmetric: Tensor) -> Tensor:
    """Return the eigenvectors of symmetric matrices (N, n, n), as columns (N, n, n).

    A member that is not finite yields NaN of its own: torch.linalg.eigh raises for the whole batch.
    """
    return _eigh(symmetric)[1]


def eigenbasis(rows: Tensor) -> Tensor:
    """Return the eigenvectors of Σ_k r_k r_kᵀ, for rows (N, K, n), as columns (N, n, min(K, n)).

    Where there are fewer rows than entries, those of non-zero eigenvalues alone, by way of the rows' (K, K)
    Gram matrix, whose eigenvalues are the same: what is orthogonal to all rows is left out. Columns of
    eigenvalues that are rounding errors are zero. A member that is not finite yields NaN of its own.
    """
    if rows.shape[1] >= rows.shape[2]:
        return eigenvectors(bmm(rows.mT, rows))
    values, vectors = _eigh(bmm(rows, rows.mT))
    cutoff = values.amax(dim=1, keepdim=True) * (rows.shape[1] * torch.finfo(rows.dtype).eps)
    lengths = torch.where(values > cutoff, values.clamp_min(0).rsqrt(), values * 0)
    return bmm(rows.mT, vectors) * lengths.unsqueeze(1)


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (N, n) and eigenvectors (N, n, n); NaN for a member that is not finite."""
    finite = torch.isfinite(symmetric).flatten(1).all(dim=1).reshape(-1, 1, 1)
    safe = torch.where(finite, symmetric, eye_like(symmetric))
    solver = _eigensolver.get()
    values, vectors = (None if solver is None else solver(safe)) or _eigh_by_lapack(safe)
    return torch.where(finite.squeeze(2), values, torch.nan), torch.where(finite, vectors, torch.nan)


def _eigh_by_lapack(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except LinAlgError:
        each = [_eigh_of_one(matrix) for matrix in symmetric]
        values, vectors = (torch.stack(parts) for parts in zip(*each, strict=True))
    return values, vectors


def _eigh_of_one(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except LinAlgError:
        nan = torch.full_like(symmetric, torch.nan)
        return nan[:, 0], nan
    return values, vectors


def inverse_root(positive: Tensor) -> Tensor:
    """Return L⁻ᵀ of the Cholesky factor L of matrices (N, n, n), so that L⁻ᵀ L⁻¹ is the inverse.

    A member that is not positive definite yields NaN of its own.
    """
    lower, info = torch.linalg.cholesky_ex(positive)
    inverse = torch.linalg.solve_triangular(lower, eye_like(lower).expand_as(lower), upper=False)
    return torch.where((info == 0).reshape(-1, 1, 1), inverse.mT, torch.nan)


@dataclass(frozen=True, slots=True)
class FactoredInverse:
    """The inverse preconditioner of a layer, M⁻¹ = c I + (U_o ⊗ U_i) diag(m) (U_o ⊗ U_i)ᵀ on controls (o, ī).

    One form for all of Table 2: M = I leaves everything None; a diagonal M has m = 1/M alone; KFAC has
    U Uᵀ equal to the inverse of its damped factor and no m; EKFAC has the eigenbases and m. Where these do
    not span all controls, M is the damping 1/c beside them, and m what M⁻¹ differs by from c along them.

    Attributes:
        inputs: U_i, (N, ī, p); None is the identity.
        outputs: U_o, (N, o, q); None if and only if `inputs` is.
        scale: m, (N, q, p), or (N, o, ī) without bases; None is one.
        rest: c; None is zero.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None
    scale: Tensor | None = None
    rest: float | None = None

    def apply(self, direction: Tensor) -> Tensor:
        """Return M⁻¹ d for d (…, o, ī), whose leading dimensions make up the N blocks, in order."""
        if self.inputs is None or self.outputs is None:
            return direction if self.scale is None else direction * self.scale
        blocks = direction.reshape(len(self.inputs), self.outputs.shape[1], self.inputs.shape[1])
        rotated = bmm(bmm(self.outputs.mT, blocks), self.inputs)
        if self.scale is not None:
            rotated = rotated * self.scale
        found = bmm(bmm(self.outputs, rotated), self.inputs.mT).reshape(direction.shape)
        return found if self.rest is None else found + self.rest * direction

    def apply_per_sample(self, directions: Tensor) -> Tensor:
        """Return M⁻¹ d for d (N, K, o, ī)."""
        rotated = self.rotate(directions)
        if self.scale is not None:
            rotated = rotated * self.scale.unsqueeze(1)
        if self.inputs is None or self.outputs is None:
            return rotated
        by_inputs = rows_matmul(rotated, self.inputs.mT)
        found = rows_matmul(by_inputs.mT, self.outputs.mT).mT
        return found if self.rest is None else found + self.rest * directions

    def rotate(self, directions: Tensor) -> Tensor:
        """Return U_oᵀ d U_i for d (N, K, o, ī), in whose coordinates M⁻¹ - c I is diag(m)."""
        if self.inputs is None or self.outputs is None:
            return directions
        return rows_matmul(rows_matmul(directions, self.inputs).mT, self.outputs).mT
