"""The interface of a preconditioner over a pack."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Preconditioner(Protocol):
    """M_t of every layer t, for the members of one group of a pack."""

    def observe(self, t: int, V_h: Tensor, x_bar: Tensor) -> None:
        """Take in layer t's batch before its M_t is used: V_h (R, B, o), x̄ (R, B, ī)."""
        ...

    def contraction(self, t: int, x_bar: Tensor) -> Tensor:
        """Contract x̄ ⊙ x̄ with M_t⁻¹ per output unit: Σ_j x̄_j² / M_oj, broadcastable to (R, B, o)."""
        ...

    def apply(self, t: int, direction: Tensor) -> Tensor:
        """Return M_t⁻¹ d for a direction d (R, o, ī)."""
        ...

    def select(self, keep: Tensor) -> None:
        """Keep only the members of these indices (K,)."""
        ...
