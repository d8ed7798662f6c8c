"""Batched linear algebra that never raises for one bad member of a batch.

Index legend: r run in the pack, b sample, o and p outputs of a layer, i inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices pair by pair, (N, m, k) by (N, k, n), by bits that do not depend on N.

    torch.bmm gives a lone product with one row or one column to a matrix-vector kernel, which adds in
    another order than the kernel for many: a run alone would then differ from the same run in a pack.
    """
    if left.shape[0] == 1 and 1 in (left.shape[1], right.shape[2]):
        return torch.bmm(left.expand(2, -1, -1), right.expand(2, -1, -1))[:1]
    return torch.bmm(left, right)


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


def damped_solve(curvature: Tensor, step: Tensor, right: Tensor) -> Tensor:
    """Solve (I + diag(s) C) X = Y for every run and sample.

    A singular or non-finite member yields non-finite numbers of its own and leaves the others alone.

    Args:
        curvature: C, (R, B, o, o), symmetric.
        step: s, broadcastable to (R, B, o).
        right: Y, broadcastable to (R, B, o, i).

    Returns:
        X, (R, B, o, i).
    """
    identity = torch.eye(curvature.shape[-1], dtype=curvature.dtype, device=curvature.device)
    system = identity + step.unsqueeze(-1) * curvature
    solution: Tensor = torch.linalg.solve_ex(system, right.expand(*system.shape[:-1], right.shape[-1]))[0]
    return solution
